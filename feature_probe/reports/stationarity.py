"""Whether training has brought a layer to rest, from its trajectory: numbers, a state, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.optimizers.identities import fluctuation
from feature_probe.reports.diagnosis import State
from feature_probe.sums.trajectory import Path
from feature_probe.theory.invariance import StepScalars
from feature_probe.theory.matrices import to_algebra

_NAN = float("nan")
#: ‖λW + G‖/‖λW‖ up to which a layer counts as being at rest: FACT's cosine is then above 0.98.
AT_REST = 0.2
#: Change of ln ‖W‖ per unit of decay age up to which the norm counts as steady.
STEADY = 0.1
#: The same, up to which it comes near.
_SETTLING = 0.5
#: ‖λW + G‖/‖λW‖ over what minibatch noise adds to it, up to which noise may be all there is.
_BY_NOISE = 1.5
#: Decay ages below which decay has not had time to forget the initial weight: e⁻³ is 5 % of it.
_BEGUN, RIPE = 1.0, 3.0
#: Decay age that a change of the norm should be measured over, and must be at least.
_SPAN, _SHORTEST = 1.0, 0.3


@dataclass(frozen=True)
class Motion:
    """What a path says of the latest window and of the reports before; NaN where it does not.

    Attributes:
        steps: Steps of the window with a gradient.
        window_age: Decay age of them.
        drift: ‖W_T − W_0‖/‖W_T‖.
        gradient_noise: √ of what independent noise adds to the squared norm of the mean gradient.
        decay_ratio: λ̂/λ.
        fluctuation: Its fluctuation term.
        norm_drift: d ln ‖W‖ per unit of decay age.
        norm_span: Over how much of it.
        decays: Smallest and largest λ in the window.
    """

    steps: int = 0
    window_age: float = _NAN
    drift: float = _NAN
    gradient_noise: float = _NAN
    decay_ratio: float = _NAN
    fluctuation: float = _NAN
    norm_drift: float = _NAN
    norm_span: float = _NAN
    decays: tuple[float, float] | None = None


@dataclass(frozen=True)
class Momentum:
    """How SGD moves: what the fluctuation term depends on; None of it for other optimizers.

    Attributes:
        momentum: μ.
        dampening: δ.
        nesterov: Whether Nesterov's form is used.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


def motion(
    path: Path,
    weight: Tensor,
    squared_norm: float,
    gradient: Tensor | None,
    decay: float | None,
    *,
    clock: float,
    age: float,
    momentum: Momentum | None,
) -> Motion:
    """Read a path. Waits for the device.

    Args:
        path: The layer's.
        weight: W at the report, float64.
        squared_norm: ‖W‖².
        gradient: The window's mean gradient, or None.
        decay: λ.
        clock: Decay age per step in units of ηλ.
        age: Decay age at the report.
        momentum: SGD's settings, None for other optimizers.
    """
    if path.totals is None or path.steps == 0:
        return Motion()
    dot, squares, slopes = (float(value) for value in path.totals.tolist())
    loss = decay or 0.0
    noise = _NAN
    if gradient is not None and path.steps > 1:
        spread = slopes / max(path.slopes, 1) - float(to_algebra(gradient).square().sum())
        noise = math.sqrt(max(spread, 0.0) / (path.steps - 1))
    drift, span = _norm_drift(path, age, squared_norm)
    return Motion(
        steps=path.steps,
        window_age=float(path.rate) * loss * clock,
        drift=_drift(path, weight, math.sqrt(squared_norm)),
        gradient_noise=noise,
        decay_ratio=-dot / (loss * squares) if loss * squares > 0 else _NAN,
        fluctuation=_fluctuation(path, loss, momentum),
        norm_drift=drift,
        norm_span=span,
        decays=path.decays,
    )


def step_scalars(path: Path, columns: int) -> StepScalars | None:
    """The ring of a path for the detector of scale invariance; None where it is empty."""
    taken = [bool(flag) if flag is not None else True for flag in path.counted]
    rows = [ring for ring, counts in zip(path.ring, taken, strict=True) if counts]
    if not rows:
        return None
    stacked = to_algebra(torch.stack([ring.to(rows[-1].device) for ring in rows])).cpu()
    bias = None
    if len(path.bias) == len(path.ring):
        kept = [part for part, counts in zip(path.bias, taken, strict=True) if counts]
        parts = torch.stack([part.to(kept[-1].device) for part in kept])
        bias = to_algebra(parts).cpu().movedim(1, -1)
    return StepScalars(stacked[:, 0], stacked[:, 1], stacked[:, 2], bias, columns)


def judge(
    stationarity: float,
    noise: float,
    age: float,
    moved: Motion,
    *,
    snapshot: bool,
    slope: str = "G",
) -> tuple[State, str]:
    """Whether a layer that can come to rest has, and why that is said.

    Args:
        stationarity: ‖λW + G‖/‖λW‖ with the mean gradient, or U for G.
        noise: What minibatch noise alone adds to it.
        age: Decay age, NaN where unknown.
        moved: The layer's motion.
        snapshot: Whether G is the gradient of all the data at frozen weights.
        slope: "G", or "U" for the update.
    """
    distance = f"‖λW + {slope}‖ is {stationarity:.2g} of ‖λW‖"
    balance = f"{'gradient' if slope == 'G' else 'update'} and decay"
    state: State
    if math.isnan(stationarity):
        return "cannot tell", "the distance from stationarity was not measured"
    if stationarity <= AT_REST:
        return "at stationarity", f"{balance} balance: {distance}"
    if snapshot:
        state = "approaching" if stationarity <= _SETTLING else "far"
        return state, f"at these weights {balance} do not balance: {distance}"
    if age < _BEGUN:
        return "far", f"decay age {age:.3g}: decay has had no time to act; {distance}"
    if age < RIPE:
        state = "approaching" if stationarity <= _SETTLING else "far"
        return state, f"decay age {age:.3g}, of about {RIPE:g} that are needed; {distance}"
    steady = _steadiness(moved)
    if math.isnan(steady):
        return _without_clock(stationarity, noise, distance)
    said = f"‖W‖ changes by {steady:.1%} per unit of decay age"
    if steady <= STEADY:
        return "at stationarity", f"{said}, so that its size is at rest; in this window {distance}"
    if steady <= _SETTLING:
        return "approaching", f"{said}; {distance}"
    return "far", f"{said}; {distance}"


def _steadiness(moved: Motion) -> float:
    """|d ln ‖W‖| per unit of decay age, from the reports' norms, else from the balance."""
    if not math.isnan(moved.norm_drift):
        return abs(moved.norm_drift)
    if moved.window_age >= _SHORTEST:
        return abs(moved.decay_ratio + moved.fluctuation - 1)
    return _NAN


def _without_clock(stationarity: float, noise: float, distance: str) -> tuple[State, str]:
    """The judgement where neither age nor steadiness is known."""
    if math.isnan(noise):
        return "cannot tell", f"{distance}; how much of it is minibatch noise is not known"
    if stationarity <= _BY_NOISE * noise:
        return "cannot tell", f"{distance}, which minibatch noise alone would give ({noise:.2g})"
    if stationarity <= _SETTLING:
        return "approaching", distance
    return "far", f"{distance}, where minibatch noise alone would give {noise:.2g}"


def _drift(path: Path, now: Tensor, norm: float) -> float:
    if path.start is None or path.steps < 2:
        return _NAN
    moved = float((to_algebra(path.start).to(now.device) - now).norm())
    return moved / norm if norm > 0 else _NAN


def _norm_drift(path: Path, age: float, squared_norm: float) -> tuple[float, float]:
    """Change of ln ‖W‖ per unit of decay age since about one unit ago, and how long ago."""
    before = [
        (age - then, norm) for then, norm in path.history if age - then >= _SHORTEST and norm > 0
    ]
    if not before or not squared_norm > 0:
        return _NAN, _NAN
    span, norm = min(before, key=lambda entry: abs(entry[0] - _SPAN))
    return math.log(squared_norm / norm) / (2 * span), span


def _fluctuation(path: Path, decay: float, momentum: Momentum | None) -> float:
    """What ⟨W, G + λW⟩ is at rest under minibatch noise, over λ‖W‖²; SGD's without dampening."""
    if momentum is None or momentum.dampening or path.moved is None or path.behind is None:
        return _NAN
    if momentum.nesterov and path.crossed is None:
        return _NAN
    return fluctuation(
        float(path.moved),
        float(path.behind),
        decay,
        momentum=momentum.momentum,
        nesterov=momentum.nesterov,
        buffer_steps=None if path.crossed is None else float(path.crossed),
    )
