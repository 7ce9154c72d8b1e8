"""Scores between a measured Gram matrix and a predicted matrix, and the level chance reaches.

All scores are functions of inner products, traces and sums of :class:`Factored` matrices, taken
over the entries *inside* the diagonal blocks; a block-diagonal weight's zeros outside its blocks
are no data. Undefined numbers are NaN with a reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from feature_probe.theory.factored import Factored
from feature_probe.theory.levels import ChanceLevel, shared_weight_level
from feature_probe.theory.ranks import rank_correlation

__all__ = ["Agreement", "ChanceLevel", "compare", "shared_weight_level", "undefined"]

_NAN = float("nan")
#: Relative size below which a variance is rounding, not data.
_DEGENERATE = 1e-13


@dataclass(frozen=True)
class Agreement:
    """How far a predicted matrix X agrees with the measured A, over entries inside blocks.

    Attributes:
        pearson: Pearson's r over the entries.
        cosine: ⟨A, X⟩/(‖A‖‖X‖).
        trace_free_cosine: The cosine after (tr/d)·I is taken off every block of both.
        chance_cosine: The cosine expected under a random rotation of the basis,
            Σ_b (tr A_b tr X_b/d)/(‖A‖‖X‖), closed form.
        scale: c of the best least-squares fit A ≈ c·X.
        reason: Why any of them is NaN, "" if none is.
        off_diagonal_pearson: Pearson's r over the entries with i ≠ j alone.
        spearman: Spearman's rank correlation over the entries with i ≤ j, ties sharing their mean
            rank; of at most 19,900 of them, a fixed sample (:mod:`feature_probe.theory.ranks`).
        chance_spread: Standard deviation of the cosine under that random rotation, closed form; 0
            where the blocks have one entry, which no rotation changes.
    """

    pearson: float
    cosine: float
    trace_free_cosine: float
    chance_cosine: float
    scale: float
    reason: str = ""
    off_diagonal_pearson: float = _NAN
    spearman: float = _NAN
    chance_spread: float = _NAN


def undefined(reason: str) -> Agreement:
    """All scores NaN, with the reason."""
    return Agreement(_NAN, _NAN, _NAN, _NAN, _NAN, reason)


@dataclass(frozen=True)
class _Moments:
    """Second moments of the entries, their sums, and how many there are."""

    cross: float
    squares: tuple[float, float]
    totals: tuple[float, float]
    count: int

    def pearson(self, sizes: tuple[float, float]) -> float:
        """(⟨A,X⟩ − ΣA·ΣX/m)/√(…)(…); ``sizes`` are what the second moments were computed from."""
        (square_a, square_x), (total_a, total_x) = self.squares, self.totals
        return _ratio(
            self.cross - total_a * total_x / self.count,
            (sizes[0], square_a - total_a**2 / self.count),
            (sizes[1], square_x - total_x**2 / self.count),
        )


def compare(actual: Factored, predicted: Factored, inner: Tensor | None = None) -> Agreement:
    """Scores of ``predicted`` against ``actual``, both ``[groups]`` blocks of side d.

    The factors are scaled by powers of two first, so that neither tiny nor huge entries are lost.
    Beside inner products of the factors this sorts at most 19,900 entries of each side.

    Args:
        actual: A.
        predicted: X.
        inner: ⟨A, X⟩ of the factors, without their exponents, where it is known.

    Returns:
        The scores; NaN with a reason where a side is zero, not finite, constant or 1 × 1.

    Raises:
        ValueError: if a side is given in a frame and not lifted out of it.
    """
    if actual.groups * actual.size**2 == 1:
        return undefined("a 1 × 1 matrix has nothing to compare")
    (a, exponent_a), (x, exponent_x) = actual.moderated, predicted.moderated
    norms = float(a.squared_norm()), float(x.squared_norm())
    as_given = a.left is actual.left and x.left is predicted.left and x.right is predicted.right
    cross = float(a.inner(x) if inner is None or not as_given else inner)
    if not all(map(math.isfinite, (*norms, cross))):
        return undefined("not finite")
    if norms[0] == 0 or norms[1] == 0:
        return undefined("weight is zero" if norms[0] == 0 else "predicted matrix is zero")
    entries = _Moments(cross, norms, (float(a.total()), float(x.total())), a.groups * a.size**2)
    pearson = entries.pearson(norms)
    off_diagonal = _off_diagonal(a, x, entries)
    spearman = rank_correlation(a.entry_ranks, x.entry_ranks)
    traces_a, traces_x = a.traces(), x.traces()
    chance = float((traces_a * traces_x).sum()) / a.size
    trace_free = _ratio(
        cross - chance,
        (norms[0], norms[0] - float(traces_a.square().sum()) / a.size),
        (norms[1], norms[1] - float(traces_x.square().sum()) / a.size),
    )
    product = math.sqrt(norms[0]) * math.sqrt(norms[1])
    scale = _in_range(cross / norms[1], exponent_a - exponent_x)
    return Agreement(
        pearson=pearson,
        cosine=_clip(cross / product),
        trace_free_cosine=trace_free,
        chance_cosine=chance / product,
        scale=scale,
        reason=_nan_reason(pearson, off_diagonal, spearman, trace_free, scale),
        off_diagonal_pearson=off_diagonal,
        spearman=spearman,
        chance_spread=_rotation_spread(a, x) / product,
    )


def _off_diagonal(a: Factored, x: Factored, entries: _Moments) -> float:
    """Pearson's r without the diagonals; NaN where there is nothing beside them."""
    if a.size == 1:
        return _NAN
    on_a, on_x = a.diagonals, x.diagonals
    (square_a, square_x), (total_a, total_x) = entries.squares, entries.totals
    rest = _Moments(
        entries.cross - float((on_a * on_x).sum()),
        (square_a - float(on_a.square().sum()), square_x - float(on_x.square().sum())),
        (total_a - float(on_a.sum()), total_x - float(on_x.sum())),
        a.groups * a.size * (a.size - 1),
    )
    return rest.pearson(entries.squares)


def _rotation_spread(a: Factored, x: Factored) -> float:
    """√Var⟨A, UXUᵀ⟩ of a random rotation U of every block.

    With S = sym − (tr/d)I and N the antisymmetric part, which rotations do not mix,
    Var = Σ_b 2‖S_A‖²‖S_X‖²/((d−1)(d+2)) + 2‖N_A‖²‖N_X‖²/(d(d−1)).
    """
    d = a.size
    if d == 1:
        return 0.0
    symmetric, skew = [], []
    for side in (a, x):
        spherical = side.traces().square() / d
        symmetric.append((side.block_norms + side.block_transposes) / 2 - spherical)
        skew.append((side.block_norms - side.block_transposes) / 2)
    shape = (symmetric[0].clamp_min(0.0) * symmetric[1].clamp_min(0.0)).sum()
    turn = (skew[0].clamp_min(0.0) * skew[1].clamp_min(0.0)).sum()
    return math.sqrt(float(2 * shape / ((d - 1) * (d + 2)) + 2 * turn / (d * (d - 1))))


def _ratio(cross: float, a: tuple[float, float], x: tuple[float, float]) -> float:
    """cross/√(var_a·var_x); each pair is (second moment, variance), NaN if a variance is nil."""
    if any(variance <= _DEGENERATE * moment for moment, variance in (a, x)):
        return _NAN
    return _clip(cross / (math.sqrt(a[1]) * math.sqrt(x[1])))


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _in_range(value: float, exponent: int) -> float:
    """value·2^exponent, NaN where floating point has no such number."""
    try:
        result = math.ldexp(value, exponent)
    except OverflowError:
        return _NAN
    return _NAN if result == 0 and value != 0 else result


def _nan_reason(
    pearson: float, off_diagonal: float, spearman: float, trace_free: float, scale: float
) -> str:
    reasons = []
    if math.isnan(pearson) or math.isnan(spearman):
        names = [
            name
            for name, value in (("Pearson", pearson), ("Spearman", spearman))
            if math.isnan(value)
        ]
        reasons.append(f"{' and '.join(names)} undefined: all entries equal")
    if math.isnan(off_diagonal):
        reasons.append("off-diagonal Pearson undefined: no two different entries off the diagonal")
    if math.isnan(trace_free):
        reasons.append("trace-free cosine undefined: a multiple of the identity")
    if math.isnan(scale):
        reasons.append("scale out of the range of floating point")
    return "; ".join(reasons)
