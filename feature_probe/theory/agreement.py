"""Scores between a measured Gram matrix and a predicted matrix, and the levels chance reaches.

All scores are functions of inner products, traces and sums of :class:`Factored` matrices, taken
over the entries *inside* the diagonal blocks; a block-diagonal weight's zeros outside its blocks
are no data. Undefined numbers are NaN with a reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.theory.factored import Factored, gram_spectrum

_NAN = float("nan")
#: Most random rotations drawn, and d_out² × rotations, for the control at powers other than 1.
_MOST_DRAWS, _DRAW_BUDGET = 256, 65536
#: Width up to which the closed form at s = 1 is not good to 0.01.
_NARROW = 64
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
    """

    pearson: float
    cosine: float
    trace_free_cosine: float
    chance_cosine: float
    scale: float
    reason: str = ""


def undefined(reason: str) -> Agreement:
    """All scores NaN, with the reason."""
    return Agreement(_NAN, _NAN, _NAN, _NAN, _NAN, reason)


def compare(actual: Factored, predicted: Factored) -> Agreement:
    """Scores of ``predicted`` against ``actual``, both ``[groups]`` blocks of side d.

    Returns:
        The scores; NaN with a reason where a side is zero, not finite, constant or 1 × 1.
    """
    size, entries = actual.size, actual.groups * actual.size**2
    if entries == 1:
        return undefined("a 1 × 1 matrix has nothing to compare")
    norm_a, norm_x = float(actual.squared_norm()), float(predicted.squared_norm())
    cross = float(actual.inner(predicted))
    if not all(map(math.isfinite, (norm_a, norm_x, cross))):
        return undefined("not finite")
    if norm_a == 0 or norm_x == 0:
        return undefined("weight is zero" if norm_a == 0 else "predicted matrix is zero")
    total_a, total_x = float(actual.total()), float(predicted.total())
    traces_a, traces_x = actual.traces(), predicted.traces()
    chance = float((traces_a * traces_x).sum()) / size
    spherical_a = float(traces_a.square().sum()) / size
    spherical_x = float(traces_x.square().sum()) / size
    pearson = _ratio(
        cross - total_a * total_x / entries,
        (norm_a, norm_a - total_a**2 / entries),
        (norm_x, norm_x - total_x**2 / entries),
    )
    trace_free = _ratio(
        cross - chance, (norm_a, norm_a - spherical_a), (norm_x, norm_x - spherical_x)
    )
    product = math.sqrt(norm_a) * math.sqrt(norm_x)
    return Agreement(
        pearson=pearson,
        cosine=_clip(cross / product),
        trace_free_cosine=trace_free,
        chance_cosine=chance / product,
        scale=cross / norm_x,
        reason=_nan_reason(pearson, trace_free),
    )


def _ratio(cross: float, a: tuple[float, float], x: tuple[float, float]) -> float:
    """cross/√(var_a·var_x); each pair is (second moment, variance), NaN if a variance is nil."""
    if any(variance <= _DEGENERATE * moment for moment, variance in (a, x)):
        return _NAN
    return _clip(cross / (math.sqrt(a[1]) * math.sqrt(x[1])))


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _nan_reason(pearson: float, trace_free: float) -> str:
    reasons = []
    if math.isnan(pearson):
        reasons.append("Pearson undefined: all entries equal")
    if math.isnan(trace_free):
        reasons.append("trace-free cosine undefined: a multiple of the identity")
    return "; ".join(reasons)


def shared_weight_cosine(
    weight: Tensor,
    values: Tensor,
    power: float,
    tolerance: float,
    *,
    seed: int = 0,
) -> float:
    """Cosine of WᵀW with (WᵀQKQᵀW)ˢ, Q a random rotation: what K with random eigenvectors gets.

    The control of Beaglehole, Mitliagkas and Agarwala, "Gradient descent induces alignment between
    weights and the pre-activation tangents": the W that both sides share is kept, only K's
    eigenvectors are drawn anew. For s = 1 and d_out > 64 a closed form, the ratio of expectations
    (up to 0.025 low in narrower layers). Otherwise the mean over draws, 256 where d_out ≤ 16 down
    to 1 from 256 on: the spread of one draw falls with the width, and the mean is good to about
    0.01.

    Args:
        weight: W in float64, shape ``[groups, d_out, d_in]``, or in coordinates of its row space.
        values: Kept eigenvalues of K or E, ``[groups, r]``, 0 where dropped.
        power: s.
        tolerance: Relative eigenvalue clamp.
        seed: Seed of the draws, so that a report can be repeated.

    Returns:
        The cosine: 1 for a single row, as every K gives WᵀKW ∝ WᵀW; NaN where a side is zero or
        the blocks have one row each.
    """
    groups, width, _ = weight.shape
    if not (values > 0).any() or (width == 1 and groups > 1):
        return _NAN
    if width == 1:
        return 1.0
    if power == 1.0 and width > _NARROW:
        return _closed_form(weight, values)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    draws = max(1, min(_MOST_DRAWS, _DRAW_BUDGET // width**2) // groups)
    rows = _random_rows(weight, values, draws, generator)
    spectrum = gram_spectrum(rows.flatten(0, 1), tolerance)
    roots = spectrum.rows(power).reshape((*rows.shape[:2], -1, weight.shape[2]))
    cross = (roots @ weight.mT).square().sum((1, 2, 3))
    norms = spectrum.values.pow(2 * power).sum(-1).reshape(rows.shape[:2]).sum(-1)
    gram_norm = Factored.gram(weight).thin().squared_norm()
    return float((cross / (norms * gram_norm).sqrt()).mean())


def _random_rows(weight: Tensor, values: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Λ^{1/2} QᵀW with Q the first r columns of Haar rotations, ``[draws, groups, r, d_in]``.

    Where W has fewer columns than r, QᵀW = P·T with W = U·T and P = QᵀU a random frame of d_in
    columns, which is the smaller one to draw.
    """
    groups, width, columns = weight.shape
    count = values.shape[1]
    shape = (draws, groups, width, min(count, columns))
    normal = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
    frame = torch.linalg.qr(normal).Q  # the signs of its columns cancel in the product
    if count <= columns:
        rotated = frame.mT @ weight
    else:
        rotated = frame[:, :, :count] @ torch.linalg.qr(weight, mode="r").R
    rows: Tensor = values.sqrt()[..., None] * rotated
    return rows


def _closed_form(weight: Tensor, values: Tensor) -> float:
    """ρ ≈ (tr K/k) tr L² / √(tr L² · [a tr L² + b(tr L² + (tr L)²)]), blocks added."""
    k = weight.shape[1]
    gram = weight @ weight.mT if k <= weight.shape[2] else weight.mT @ weight
    trace_l2 = gram.square().sum((-1, -2))
    trace_l = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    trace_k, trace_k2 = values.sum(-1), values.square().sum(-1)
    b = (k * trace_k2 - trace_k**2) / (k * (k - 1) * (k + 2))
    a = (trace_k**2 - 2 * k * b) / k**2
    cross = (trace_k / k * trace_l2).sum()
    norm = (a * trace_l2 + b * (trace_l2 + trace_l**2)).sum()
    product = float((trace_l2.sum() * norm).sqrt())
    return float(cross) / product if product > 0 else _NAN
