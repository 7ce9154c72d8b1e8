"""Numbers that describe one matrix, or two that follow each other: ranks, decay, imbalance.

Of positive semi-definite matrices, through their eigenvalues, which are their singular values:
those of WᵀW are the squares of the singular values of W. Every number is free of scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.theory.factored import moderate, scaled
from feature_probe.theory.matrices import to_algebra

_NAN = float("nan")


@dataclass(frozen=True)
class SpectrumShape:
    """How the eigenvalues λ_1 ≥ λ_2 ≥ ... ≥ 0 of a d × d matrix fall off; p_j = λ_j/Σλ.

    Attributes:
        decay: λ_j/λ_1, largest first, as many as were asked for.
        effective_rank: exp(−Σ p_j ln p_j) (Roy and Vetterli, "The effective rank: a measure of
            effective dimensionality", 2007), between 1 and the rank.
        participation_ratio: (Σλ)²/Σλ², between 1 and the effective rank.
        stable_rank: Σλ/λ_1; of WᵀW it is ‖W‖_F²/‖W‖₂², the stable rank of W.
        variation: Standard deviation of all d eigenvalues over their mean, zeros included, the
            mean of squares over d: √(d/participation_ratio − 1), 0 for a multiple of the identity.
        reason: Why there are none of these, "" if there are.
    """

    decay: tuple[float, ...]
    effective_rank: float
    participation_ratio: float
    stable_rank: float
    variation: float
    reason: str = ""


def spectrum_shape(values: Tensor, size: int, keep: int) -> SpectrumShape:
    """The shape of a spectrum.

    Args:
        values: Eigenvalues, any shape: those of all blocks of a block-diagonal matrix together.
            Negative ones, which are rounding, count as 0.
        size: d, the side of the whole matrix: the eigenvalues that are not among ``values`` are 0.
        keep: How many of the decay are kept.

    Returns:
        The shape; NaN with the reason where the matrix is zero or not finite.
    """
    found = to_algebra(values).cpu().flatten().clamp_min(0.0).sort(descending=True).values
    reason = "not finite" if not bool(found.isfinite().all()) else ""
    if not reason and (not found.numel() or float(found[0]) == 0):
        reason = "matrix is zero"
    if reason:
        return SpectrumShape((), _NAN, _NAN, _NAN, _NAN, reason)
    decay = found / found[0]
    total, squares = float(decay.sum()), float(decay.square().sum())
    participation = total**2 / squares
    return SpectrumShape(
        tuple(decay[:keep].tolist()) + (0.0,) * (min(keep, size) - len(decay)),
        math.exp(float(torch.special.entr(decay / total).sum())),
        participation,
        total,
        # as Σ(λ − mean)², which keeps its digits where all are nearly equal
        _variation(decay, size),
    )


def _variation(values: Tensor, size: int) -> float:
    mean = float(values.sum()) / size
    squares = float((values - mean).square().sum()) + (size - len(values)) * mean**2
    return math.sqrt(squares / size) / mean


@dataclass(frozen=True)
class Imbalance:
    """How far two layers that follow each other are from balanced.

    Attributes:
        relative: ‖W_l W_lᵀ − W_{l+1}ᵀ W_{l+1}‖_F/√(‖W_l W_lᵀ‖_F² + ‖W_{l+1}ᵀ W_{l+1}‖_F²): 0 where
            they are balanced, 1 where the two have nothing in common, and never more.
        norm: The numerator, which decays as e^{−2λt} under weight decay λ (Lemma 3.2).
        reason: Why there is none, "" if there is.
    """

    relative: float
    norm: float
    reason: str = ""


def imbalance(weight: Tensor, following: Tensor) -> Imbalance:
    """Distance of W_l W_lᵀ from W_{l+1}ᵀ W_{l+1}, which gradient flow keeps at 0 if it begins so.

    Definition 3.1 and Lemma 3.1 of Tansley, Massart and Cartis, "On the Neural Feature Ansatz for
    Deep Neural Networks" (the lemma is Arora's, Cohen's and Hazan's). The paper has no distance:
    the normalisation is ours.

    Args:
        weight: W_l, shape ``[k, m]``.
        following: W_{l+1}, shape ``[n, k]``.

    Returns:
        The imbalance; NaN with the reason where both weights are zero or one is not finite.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if weight.shape[0] != following.shape[1]:
        raise ValueError(f"{weight.shape[0]} outputs, {following.shape[1]} inputs")
    if not bool(weight.isfinite().all() and following.isfinite().all()):
        return Imbalance(_NAN, _NAN, "not finite: a weight holds NaN or infinity")
    first, exponent = moderate(to_algebra(weight))
    second, other = moderate(to_algebra(following).to(first.device))
    top = max(exponent, other)
    output = scaled(first @ first.mT, 2 * (exponent - top))
    inputs = scaled(second.mT @ second, 2 * (other - top))
    size = math.hypot(float(output.norm()), float(inputs.norm()))
    if size == 0:
        return Imbalance(_NAN, _NAN, "both weights are zero")
    gap = float((output - inputs).norm())
    try:
        return Imbalance(gap / size, math.ldexp(gap, 2 * top))
    except OverflowError:
        return Imbalance(gap / size, _NAN)
