"""Premises: why a relation cannot, or need not, hold in a layer, whatever its score says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feature_probe.theory.invariance import ScaleInvariance
from feature_probe.theory.relations import LayerStatistics, Sum

#: What a premise makes of a score: "not applicable": the relation is not claimed for this layer;
#: "trivial": it would hold for any gradients; "cannot tell": its level by chance is not known;
#: "noted": it may hold all the same.
Effect = Literal["not applicable", "trivial", "cannot tell", "noted"]
#: K within this relative distance of a multiple of the identity makes every NFA score a property
#: of the weight alone.
_TRIVIAL = 1e-6
#: Sampling errors of random probes that K may lie from one, and the distance up to which they show
#: that it is one.
_ERRORS, _SHARP = 2.5, 0.3
#: Share of the decay that the gradients of a partly scale-invariant layer must balance if FACT is
#: to be judged.
_BALANCED = 0.1
#: Largest entry of a float32 sum of squares below which its smaller entries have underflowed.
_UNDERFLOW = 1e-30


@dataclass(frozen=True)
class Premise:
    """Why, in words, and what follows."""

    text: str
    effect: Effect


@dataclass(frozen=True)
class Circumstances:
    """What is known of a layer beside its sums.

    Attributes:
        computed: W is computed from other parameters.
        frozen: It is not trained.
        gradient: Why the optimizer's decay keeps FACT from holding, or "".
        update: Why it keeps the update form from holding, or "".
        decays: Smallest and largest λ inside the window, where known.
        invariance: What the steps say of scale invariance; None where there were none.
        balanced: Of the same steps −Σ⟨W, G⟩/λΣ‖W‖²: the share of the decay that the gradients
            balance; NaN where unknown.
        output: Its own output is f.
        shared: The weight is used in several places, so that K contains W itself.
        rows: Output rows, over all groups.
        sampling: How far, relatively, random probes alone take K from a multiple of the identity; 0
            for exact Jacobians.
    """

    computed: bool = False
    frozen: bool = False
    gradient: str = ""
    update: str = ""
    decays: tuple[float, float] | None = None
    invariance: ScaleInvariance | None = None
    balanced: float = float("nan")
    output: bool = False
    shared: bool = False
    rows: int = 2
    sampling: float = 0.0


def premises(known: Circumstances, statistics: LayerStatistics) -> dict[Sum, Premise]:
    """The strongest premise against the relations that need a sum, by the sum."""
    found: dict[Sum, Premise | None] = {
        "gradient": _of_slope(known, known.gradient) or _of_invariance(known),
        "update": _of_slope(known, known.update),
        "jacobian": _of_jacobian(known, statistics.jacobian),
        "loss": _of_curvature(known, statistics.loss, "E"),
        "jacobian_change": _of_curvature(known, statistics.jacobian_change, "K̄"),
    }
    return {needs: premise for needs, premise in found.items() if premise is not None}


def texts(found: Mapping[Sum, Premise]) -> dict[Sum, str]:
    """The words alone."""
    return {needs: premise.text for needs, premise in found.items()}


def _of_slope(known: Circumstances, decay: str) -> Premise | None:
    if known.computed:
        return Premise(
            "the weight is computed from other parameters, on which the decay acts: FACT need not "
            "hold for it",
            "not applicable",
        )
    if known.frozen:
        return Premise("frozen: training does not drive it to stationarity", "not applicable")
    if decay:
        return Premise(decay, "not applicable")
    if known.decays is not None and known.decays[0] != known.decays[1]:
        low, high = known.decays
        return Premise(f"λ changed inside the window, from {low:g} to {high:g}", "cannot tell")
    return None


def _of_invariance(known: Circumstances) -> Premise | None:
    invariance = known.invariance
    if invariance is None or invariance.kind in ("none", "unknown"):
        return None
    if invariance.kind == "partly":
        if abs(known.balanced) >= _BALANCED or math.isnan(known.balanced):
            return Premise(invariance.reason, "noted")
        share = f"{known.balanced:.2g} of it on these steps, so FACT cannot hold"
        return Premise(f"{invariance.reason}, {share}", "not applicable")
    return Premise(invariance.reason, "not applicable")


def _of_jacobian(known: Circumstances, jacobian: Tensor | None) -> Premise | None:
    last = known.output or _is_multiple_of_identity(jacobian, known.sampling)
    if last and known.rows > 1:
        return Premise(
            "trivial: K is a multiple of the identity (last linear layer), so the score is a "
            "property of the weight alone",
            "trivial",
        )
    return _of_curvature(known, jacobian, "K")


def _of_curvature(known: Circumstances, matrix: Tensor | None, name: str) -> Premise | None:
    if known.rows == 1:
        return Premise(
            "trivial: with one output row any gradients give a full forward score", "trivial"
        )
    if _underflows(matrix):
        return Premise(
            f"the gradients behind {name} are so small that their squares underflow float32: "
            "float64 inputs, or a larger loss, would show them",
            "cannot tell",
        )
    if known.shared:
        return Premise(
            f"the weight is used in several places, so that {name} contains it: random directions "
            "are no measure of chance here",
            "cannot tell",
        )
    return None


def _underflows(matrix: Tensor | None) -> bool:
    if matrix is None or matrix.dtype != torch.float32 or matrix.numel() == 0:
        return False
    return bool((matrix.abs().max() < _UNDERFLOW) & matrix.any())


def _is_multiple_of_identity(matrix: Tensor | None, sampling: float) -> bool:
    if matrix is None or matrix.shape[-1] < 2:
        return False
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    gap = torch.linalg.vector_norm(matrix - mean[:, None, None] * identity)
    allowed = _ERRORS * sampling
    allowed = allowed if 0 < allowed < _SHARP else _TRIVIAL
    return bool(gap <= allowed * torch.linalg.vector_norm(matrix))
