"""The truth about a small network, by brute force: what verdicts.py holds the probe's verdicts to.

Nothing here comes from feature_probe. Scale invariance is read off the loss itself, rest off the
weights' and gradients' means over further training, chance off dense random eigenvectors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A network in the mode it ran in, and the examples that it saw.
State = tuple[nn.Module, Tensor, Tensor]
Invariance = Literal["whole", "nearly", "partly", "none"]
Rest = Literal["reached", "not reached", "between"]
#: How weight decay acts, by hand: in the gradient, or on the weights beside it.
DECAY = {
    "sgd": "coupled",
    "momentum": "coupled",
    "nesterov": "coupled",
    "adam+l2": "coupled",
    "adamw": "decoupled",
    "nadamw": "decoupled",
    "radamw": "decoupled",
    "lion": "decoupled",
    "muon": "decoupled",
}
#: Shares of what random changes of a layer do to the loss up to which rescaling it counts as doing
#: nothing, and as doing nearly nothing; above three times the latter the layer is not invariant.
_SAME, _NEARLY = 1e-3, 3e-2
#: Share of the decay that the gradient of an invariant layer does not balance: ε is not small.
_BALANCED = 0.1
DRAWS = 300
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Balance:
    """How a layer's gradient stands to its decay at frozen weights.

    Attributes:
        distance: ‖λW + G‖/‖λW‖.
        cosine: Of WᵀW with −WᵀG/λ.
        residual: ‖WᵀW + WᵀG/λ‖/‖WᵀW‖.
    """

    distance: float
    cosine: float
    residual: float


@dataclass(frozen=True)
class Chance:
    """A cosine among those with random eigenvectors.

    Attributes:
        cosine: Of WᵀW with (WᵀKW)ˢ.
        share: Of the draws that reach it, (1 + count)/(1 + draws).
        gain: Share of the way from their mean to 1.
        lead: The same from the highest of them or, if higher, from the score before training.
        spreads: By how many standard deviations of the draws it lies above their mean or, if that
            is higher, above the score before training; of arctanh, where 1 is far away.
    """

    cosine: float
    share: float
    gain: float
    lead: float
    spreads: float

    @property
    def aligned(self) -> bool | None:
        """Whether it leads all draws and the untrained network clearly.

        None near the border, and where the untrained network was above chance as it is.
        """
        if self.gain < 0.07 or self.share > 0.05:
            return False
        return True if self.lead > 0.1 and self.spreads > 4 else None


def scale_invariance(
    network: nn.Module, data: tuple[Tensor, Tensor], layer: str, balanced: float
) -> Invariance:
    """Whether the training loss in float64 stays when a layer is rescaled, alone or with its bias.

    By factors ½, 1.5 and 3, against random changes as large. It changes a little where a
    normalisation's ε shows. A layer that random changes do not show in the loss is not invariant,
    one whose gradient balances a tenth of its decay all the same (``balanced``) only nearly.
    """
    twin = copy.deepcopy(network).double().train()
    x, y = data[0].double(), data[1]
    module = twin.get_submodule(layer)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(11)
    kept = weight.detach().clone(), bias.detach().clone() if isinstance(bias, Tensor) else None

    def change(new: Tensor, factor: float) -> float:
        weight.copy_(new)
        if isinstance(bias, Tensor) and kept[1] is not None:
            bias.copy_(factor * kept[1])
        return abs(F.cross_entropy(twin(x), y).item() - before)

    with torch.no_grad():
        before = F.cross_entropy(twin(x), y).item()
        factors = (0.5, 1.5, 3.0)
        alone = max(change(factor * kept[0], 1.0) for factor in factors)
        together = max(change(factor * kept[0], factor) for factor in factors)
        noise = [torch.randn(weight.shape, generator=generator).double() for _ in factors]
        random = [
            change(kept[0] + abs(factor - 1) * kept[0].norm() / n.norm() * n, 1.0)
            for factor, n in zip(factors, noise, strict=True)
        ]
    share = min(alone, together) / max(random) if max(random) > 1e-9 * before else 1.0
    if share < _SAME and balanced < _BALANCED:
        return "whole"
    if share < _NEARLY:
        return "nearly"
    return "partly" if share < 3 * _NEARLY else "none"


@dataclass(frozen=True)
class Window:
    """What brute force finds in a window of training.

    Attributes:
        cosines: Of WᵀW ("fact") and WWᵀ ("bfact") with −WᵀS/λ and −SWᵀ/λ, S the mean gradient, or
            under decoupled decay what the optimizer did beside the decay ("update_fact", ...).
        residuals: ‖WᵀW + WᵀS/λ‖/‖WᵀW‖ and so on.
        distance: ‖λW + S‖/‖λW‖.
        noise: What independent steps add to it; NaN for a single one.
        balanced: −Σ⟨W, G⟩/λΣ‖W‖² of the steps, the share of the decay that gradients balance.
    """

    cosines: dict[str, float]
    residuals: dict[str, float]
    distance: float
    noise: float
    balanced: float

    @classmethod
    def of(
        cls,
        weight: Tensor,
        slope: Tensor,
        squares: float,
        balanced: float,
        steps: int,
        decay: float,
        before: str,
    ) -> Window:
        """From W, S, the mean of ‖G‖² over the steps, λ, and what the names begin with."""
        cosines, residuals = {}, {}
        for name, w, s in (("fact", weight, slope), ("bfact", weight.T, slope.T)):
            gram, fact = w.T @ w, -w.T @ s / decay
            cosines[before + name] = _cosine(gram, fact)
            residuals[before + name] = float((gram - fact).norm() / gram.norm())
        pull = float((decay * weight).norm())
        rest = max(squares - float(slope.square().sum()), 0.0)
        spread = rest / (steps - 1) if steps > 1 else math.nan
        distance = float((decay * weight + slope).norm()) / pull
        return cls(cosines, residuals, distance, math.sqrt(spread) / pull, balanced)


def is_at_rest(movement: float, balance: float | None) -> Rest:
    """Whether further training finds a layer at rest.

    Args:
        movement: ‖change of the mean weight‖/‖W‖ per unit of decay age.
        balance: ‖λW + G‖/‖λW‖ of the means; None under decoupled decay.
    """
    worst = max(movement, (balance or 0.0) / 1.5)
    if worst <= 0.1:
        return "reached"
    return "not reached" if worst >= 0.4 else "between"


def balances(
    network: nn.Module, data: tuple[Tensor, Tensor], layers: list[str], decay: float
) -> dict[str, Balance]:
    """Of every layer, with the full gradient of the loss in evaluation mode, float64."""
    twin = copy.deepcopy(network).double().eval()
    twin.zero_grad()
    F.cross_entropy(twin(data[0].double()), data[1]).backward()  # type: ignore[no-untyped-call]
    found = {}
    for layer in layers:
        weight = twin.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        w, g = weight.detach().flatten(1), gradient.flatten(1)
        gram, fact = w.T @ w, -w.T @ g / decay
        found[layer] = Balance(
            float((decay * w + g).norm() / (decay * w).norm()),
            _cosine(gram, fact),
            float((gram - fact).norm() / gram.norm()),
        )
    return found


def chances(
    states: Sequence[State],
    layers: list[str],
    powers: tuple[float, ...],
    untrained: State,
) -> dict[tuple[str, str, float], Chance]:
    """Of every layer, "nfa" and "enfa", and power: dense matrices, exact Jacobians.

    K and E are means over the states of a network in training; W is that of the last.
    """
    weights, sums = _of_states(states, layers)
    first_weights, first_sums = _of_states([untrained], layers)
    found = {}
    for (name, relation), matrix in sums.items():
        before = _cosines(first_weights[name], first_sums[name, relation][None], powers)
        judged = _chance(weights[name], matrix, powers, before[:, 0].tolist())
        found.update({(name, relation, s): c for s, c in zip(powers, judged, strict=True)})
    return found


def _of_states(
    states: Sequence[State], layers: list[str]
) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """W of the last state by layer, K and E over all of them."""
    sums: dict[tuple[str, str], Tensor] = {}
    for network, x, y in states:
        twin = copy.deepcopy(network).double()
        for key, matrix in _curvatures(twin, (x, y), layers).items():
            sums[key] = sums.get(key, torch.zeros(()).double()) + matrix / len(states)
    weights = {}
    for name in layers:
        weight = twin.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weights[name] = weight.detach().flatten(1)
    return weights, sums


def _curvatures(
    twin: nn.Module, data: tuple[Tensor, Tensor], layers: list[str]
) -> dict[tuple[str, str], Tensor]:
    """K ("nfa") and E ("enfa") of every layer."""
    outputs: dict[str, Tensor] = {}
    handles = [
        twin.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: outputs.__setitem__(name, out)
        )
        for name in layers
    ]
    logits = twin(data[0].double().requires_grad_())
    for handle in handles:
        handle.remove()
    held, count = list(outputs.values()), len(data[0])
    found: dict[tuple[str, str], Tensor] = {}
    # one by one where the outputs of an example depend on the others in its batch
    mixed = twin.training and any(isinstance(m, _BATCH_NORMS) for m in twin.modules())
    scalars = logits.flatten() if mixed else logits.sum(0)
    for scalar in scalars:
        slopes = torch.autograd.grad(scalar, held, retain_graph=True)
        for name, slope in zip(outputs, slopes, strict=True):
            before = found.get((name, "nfa"), torch.zeros(()).double())
            found[name, "nfa"] = before + _second_moment(slope, count)
    loss = F.cross_entropy(logits, data[1], reduction="sum")
    for name, slope in zip(outputs, torch.autograd.grad(loss, held), strict=True):
        found[name, "enfa"] = _second_moment(slope, count)
    return found


def _second_moment(slope: Tensor, count: int) -> Tensor:
    """Mean over examples of the sum over positions of s sᵀ."""
    rows = slope.movedim(1, -1) if slope.dim() == 4 else slope  # channels last
    rows = rows.reshape(-1, rows.shape[-1])
    return rows.T @ rows / count


def _chance(
    weight: Tensor, matrix: Tensor, powers: tuple[float, ...], untrained: list[float]
) -> list[Chance]:
    """At every power, the draws all at once: own matrix first, then those turned at random."""
    values = torch.linalg.eigvalsh(matrix).clamp_min(0.0)
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(DRAWS, *matrix.shape, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    basis = basis * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]
    turned = torch.cat([matrix[None], basis * values @ basis.mT])
    found = []
    for before, cosines in zip(untrained, _cosines(weight, turned, powers).tolist(), strict=True):
        own, *drawn = cosines
        level, highest = math.fsum(drawn) / DRAWS, max(*drawn, before)
        above = sum(value >= own for value in drawn)
        gain, lead = ((own - floor) / max(1 - floor, 1e-12) for floor in (level, highest))
        far = torch.tensor([own, before, *drawn]).double().clamp(max=1 - 1e-9).atanh()
        spreads = float((far[0] - torch.maximum(far[1], far[2:].mean())) / far[2:].std())
        found.append(Chance(own, (1 + above) / (1 + DRAWS), gain, lead, spreads))
    return found


def _cosines(weight: Tensor, matrices: Tensor, powers: tuple[float, ...]) -> Tensor:
    """Of WᵀW with (WᵀMW)ˢ, [powers, matrices]."""
    spectrum, vectors = torch.linalg.eigh(weight.T @ matrices @ weight)
    kept = spectrum.where(spectrum > 1e-13 * spectrum[:, -1:], torch.zeros(()).double())
    gram, found = weight.T @ weight, []
    for power in powers:
        raised = kept.pow(power)
        predicted = vectors * raised[:, None] @ vectors.mT
        found.append((predicted * gram).sum((1, 2)) / raised.norm(dim=1) / gram.norm())
    return torch.stack(found)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))
