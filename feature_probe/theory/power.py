"""The power s at which WᵀW is closest to a multiple of AGOPˢ, fitted on the matrices themselves.

WᵀW ∝ AGOPˢ presupposes a common eigenbasis. A regression of sorted log-eigenvalues never looks at
the eigenvectors, and returns a power for independent bases as well; here the power is the one
whose cosine with WᵀW is highest, and it is undefined where no power stands out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_NAN = float("nan")
#: Range of s that is searched, and the number of its points, even in log s.
_LOWEST, _HIGHEST, _POINTS = 0.02, 4.0, 200
#: Fewest kept eigenvalues, and least standard deviation of their logarithms, that show a power.
_FEWEST, _LEAST_SPREAD = 3, 0.1
#: How far C(s) may lie below its peak inside the flat range.
_FLAT = 0.01
#: A peak must rise this far above both ends of the range; less is rounding.
_ROUNDING = 1e-12
#: How many standard deviations of chance C(ŝ) must stand above its level. The best of many powers
#: never lies below the level itself: a third of independent pairs have a peak, all just above it.
_CHANCE_SPREADS = 2.0
#: Most steps of the search for a root, each of which halves its bracket at least, and the relative
#: step at which it ends.
_STEPS, _ACCURACY = 60, 1e-15

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FittedPower:
    """The power ŝ = argmax_s C(s) over 0.02 ≤ s ≤ 4, C(s) the cosine of WᵀW with AGOPˢ.

    Attributes:
        power: ŝ; NaN, like all that follows, where it is undefined.
        cosine: C(ŝ).
        r_squared: C(ŝ)² = 1 − min_c ‖WᵀW − c·AGOPˢ‖²/‖WᵀW‖² at s = ŝ.
        flat_low: Lowest s with C(s) ≥ C(ŝ) − 0.01; 0.02 where the range cuts it off.
        flat_high: Highest such s; 4 where the range cuts it off.
        reason: Why ŝ is undefined, "" if it is not.
    """

    power: float
    cosine: float
    r_squared: float
    flat_low: float
    flat_high: float
    reason: str = ""


def fitted_power(
    values: Tensor,
    quotients: Tensor,
    norm: float,
    level: Callable[[float], float] | None = None,
) -> FittedPower:
    """ŝ = argmax_s C(s), C(s) = Σ_j a_jˢ q_j/(‖WᵀW‖ √Σ_j a_j^{2s}), the cosine of WᵀW with AGOPˢ.

    A grid of 200 in log s, then the root of d ln C/ds beside its best point, as C itself shows its
    peak to about 10⁻⁸ only. ŝ is free of the scales of both AGOP and W. For a block-diagonal weight
    the eigenvalues of all blocks go in together: one s for all blocks, and the cosine over all
    their entries.

    Args:
        values: a, the kept eigenvalues of AGOP, any shape; entries that are not positive are
            dropped ones, and left out.
        quotients: q_j = v_jᵀ(WᵀW)v_j for the eigenvector v_j of a_j, the same shape.
        norm: ‖WᵀW‖_F, over all blocks.
        level: The cosine with AGOPˢ that chance reaches on average, as a function of s. ŝ is
            undefined unless C(ŝ) exceeds it by two standard deviations, 2√2(1 − level)/r for r kept
            eigenvalues: the bound that a random rotation gives. A NaN level decides nothing.

    Returns:
        The fit; NaN with a reason where fewer than 3 eigenvalues are kept, where their logarithms
        have a standard deviation below 0.1, where C has no peak inside the range, where C(ŝ) is
        within chance, or where an input is zero or not finite.

    Raises:
        ValueError: if ``values`` and ``quotients`` differ in shape.
    """
    logs, shares, reason = _prepared(values, quotients, norm)
    if not reason and len(logs) < _FEWEST:
        reason = f"{len(logs)} eigenvalues kept, a power needs {_FEWEST}"
    if not reason and (spread := float(logs.std())) < _LEAST_SPREAD:
        reason = f"eigenvalues too close: their logarithms spread by {spread:.2g} < {_LEAST_SPREAD}"
    if reason:
        return _undefined(reason)
    grid = np.geomspace(_LOWEST, _HIGHEST, _POINTS)
    curve = _cosines(logs, shares, grid)
    power = _peak(logs, shares, grid, int(curve.argmax()))
    cosine = _cosine(logs, shares, power)
    ends = float(curve[0]), float(curve[-1])
    if cosine <= max(ends) + _ROUNDING:
        end = _LOWEST if ends[0] >= ends[1] else _HIGHEST
        return _undefined(f"no peak inside {_LOWEST} < s < {_HIGHEST}: best at s = {end}")
    if level is not None:
        chance = level(power)
        spread = math.sqrt(2) * (1 - chance) / len(logs)
        if cosine < chance + _CHANCE_SPREADS * spread:
            by_chance = f"{chance:.3g} ± {spread:.2g}"
            return _undefined(f"cosine {cosine:.3g} at s = {power:.3g}, within chance: {by_chance}")
    place = int(np.searchsorted(grid, power))
    points, curve = np.insert(grid, place, power), np.insert(curve, place, cosine)
    low, high = _flat_range(logs, shares, points, curve, cosine - _FLAT)
    cosine = max(-1.0, min(1.0, cosine))
    return FittedPower(power, cosine, cosine**2, low, high)


def power_cosine(values: Tensor, quotients: Tensor, norm: float, power: float) -> float:
    """C(s) = Σ_j a_jˢ q_j/(‖WᵀW‖ √Σ_j a_j^{2s}), exactly the cosine of WᵀW with AGOPˢ.

    Args:
        values: a, as for :func:`fitted_power`.
        quotients: q, the same shape.
        norm: ‖WᵀW‖_F.
        power: s > 0.

    Returns:
        The cosine; NaN where no eigenvalue is kept or an input is zero or not finite.

    Raises:
        ValueError: if ``values`` and ``quotients`` differ in shape, or ``power`` is not positive.
    """
    return power_curve(values, quotients, norm, (power,))[0]


def power_curve(
    values: Tensor, quotients: Tensor, norm: float, powers: Sequence[float]
) -> list[float]:
    """C(s) of :func:`power_cosine` at every s of ``powers``, NaN everywhere if it is undefined.

    Raises:
        ValueError: if ``values`` and ``quotients`` differ in shape, or a power is not positive.
    """
    for power in powers:
        if not 0 < power < math.inf:
            raise ValueError(f"power must be positive and finite, got {power}")
    logs, shares, reason = _prepared(values, quotients, norm)
    if reason:
        return [_NAN] * len(powers)
    curve = _cosines(logs, shares, np.array(list(powers), dtype=np.float64))
    return [float(cosine) for cosine in curve.clip(-1.0, 1.0)]


def _undefined(reason: str) -> FittedPower:
    return FittedPower(_NAN, _NAN, _NAN, _NAN, _NAN, reason)


def _prepared(values: Tensor, quotients: Tensor, norm: float) -> tuple[Floats, Floats, str]:
    """log(a_j/max a) and q_j/‖WᵀW‖ of the kept eigenvalues, and why there is no cosine."""
    if values.shape != quotients.shape:
        raise ValueError(f"{tuple(values.shape)} values, {tuple(quotients.shape)} quotients")
    flat, shares = _array(values), _array(quotients)
    kept = flat > 0
    if not (math.isfinite(norm) and np.isfinite(flat).all() and np.isfinite(shares[kept]).all()):
        return flat, shares, "not finite"
    if norm <= 0:
        return flat, shares, "weight is zero"
    if not kept.any():
        return flat, shares, "predicted matrix is zero"
    logs: Floats = np.log(flat[kept])
    return logs - logs.max(), shares[kept] / norm, ""


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().double().cpu().numpy().ravel()
    return array


def _cosines(logs: Floats, shares: Floats, powers: Floats) -> Floats:
    """C(s) at every s of ``powers``, ``[p]``; the denominator is at least 1."""
    raised = np.exp(powers[:, None] * logs)
    cosines: Floats = (raised @ shares) / np.sqrt(np.square(raised).sum(1))
    return cosines


def _cosine(logs: Floats, shares: Floats, power: float) -> float:
    raised = np.exp(power * logs)
    return float(raised @ shares) / math.sqrt(float(raised @ raised))


def _peak(logs: Floats, shares: Floats, grid: Floats, best: int) -> float:
    """The s of the highest C between the neighbours of ``grid[best]``, or that point itself."""

    def slope(power: float) -> float:
        return _slope(logs, shares, power)

    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    at_low, at_high = slope(low), slope(high)
    if not at_low > 0 > at_high:
        return float(grid[best])
    return _root(slope, (low, at_low), (high, at_high))


def _slope(logs: Floats, shares: Floats, power: float) -> float:
    """d ln C/ds = Σ aˢ q ln a/Σ aˢ q − Σ a^{2s} ln a/Σ a^{2s}; NaN where C = 0."""
    raised = np.exp(power * logs)
    first, second = raised * shares, np.square(raised)
    total = float(first.sum())
    return float(first @ logs) / total - float(second @ logs / second.sum()) if total else _NAN


def _flat_range(
    logs: Floats, shares: Floats, points: Floats, curve: Floats, threshold: float
) -> tuple[float, float]:
    """Lowest and highest s with C(s) ≥ threshold: the outermost crossings between the points."""
    inside = np.flatnonzero(curve >= threshold)

    def crossing(outer: int, inner: int) -> float:
        if not 0 <= outer < len(points):
            return float(points[inner])
        ends = [(float(points[i]), float(curve[i]) - threshold) for i in (outer, inner)]
        return _root(lambda power: _cosine(logs, shares, power) - threshold, *ends)

    return crossing(inside[0] - 1, inside[0]), crossing(inside[-1] + 1, inside[-1])


def _root(
    function: Callable[[float], float], one: tuple[float, float], other: tuple[float, float]
) -> float:
    """A root between two points (x, f(x)) of opposite sign, by Ridders' method.

    Ridders, "A new algorithm for computing a single root of a real continuous function", 1979: the
    bracket halves at least, and the digits double, with every two evaluations.
    """
    (low, at_low), (high, at_high) = one, other
    if at_low == 0 or at_high == 0:
        return low if at_low == 0 else high
    found = _NAN
    for _ in range(_STEPS):
        middle = (low + high) / 2
        at_middle = function(middle)
        turn = math.copysign(1.0, at_low) * at_middle / math.sqrt(at_middle**2 - at_low * at_high)
        before, found = found, middle + (middle - low) * turn
        if abs(found - before) <= _ACCURACY * abs(found):
            break
        at_found = function(found)
        if at_found == 0:
            break
        if at_middle * at_found < 0:
            low, at_low, high, at_high = middle, at_middle, found, at_found
        elif at_low * at_found < 0:
            high, at_high = found, at_found
        else:
            low, at_low = found, at_found
    return found
