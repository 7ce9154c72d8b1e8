"""Leading eigenspaces of symmetric block-diagonal matrices, and how far two of them agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.theory.matrices import to_algebra

#: Eigenvalues this close to each other, or to 0, in units of the largest, are not told apart.
_APART = 1e-9
#: An asymmetry up to this, in units of the largest entry, is rounding.
_SYMMETRIC = 1e-5


@dataclass(frozen=True)
class Subspace:
    """The span of orthonormal vectors that live in one block each.

    Attributes:
        blocks: The block of each, shape ``[r]``.
        rows: Their entries there, shape ``[r, d]``.
    """

    blocks: Tensor
    rows: Tensor

    @property
    def rank(self) -> int:
        """r, the dimension."""
        return len(self.blocks)


def leading_subspace(values: Tensor, vectors: Tensor, rank: int) -> tuple[Subspace | None, str]:
    """The span of the eigenvectors of the ``rank`` largest eigenvalues over all blocks.

    Args:
        values: Eigenvalues, shape ``[groups, r]``, those not given being 0.
        vectors: Orthonormal eigenvectors as rows, shape ``[groups, r, d]``.
        rank: Dimension of the subspace.

    Returns:
        The subspace, or None with the reason: fewer eigenvalues than ``rank`` are positive, or the
        last one taken is as large as the next one, so that the choice would be arbitrary.
    """
    groups, count = values.shape
    ordered, order = values.flatten().sort(descending=True)
    top = float(ordered[0]) if ordered.numel() else 0.0
    positive = int((ordered > _APART * top).sum()) if top > 0 else 0
    if positive < rank:
        return None, f"no leading subspace of rank {rank}: {positive} eigenvalues are positive"
    rest = float(ordered[rank]) if rank < len(ordered) else 0.0
    whole = rank == groups * vectors.shape[-1]
    if not whole and float(ordered[rank - 1]) - rest <= _APART * top:
        return None, f"no leading subspace of rank {rank}: the next eigenvalue is as large"
    chosen = order[:rank]
    return Subspace(chosen // count, vectors.flatten(0, 1)[chosen]), ""


def cosines_between(first: Subspace, second: Subspace) -> Tensor:
    """U_AᵀU_B for orthonormal bases U of two subspaces, shape ``[r_A, r_B]``.

    On the first's device. Its singular values are the cosines of the principal angles.
    """
    blocks, rows = second.blocks.to(first.blocks.device), second.rows.to(first.rows.device)
    return (first.rows @ rows.mT) * (first.blocks[:, None] == blocks)


def overlap(first: Subspace, second: Subspace) -> float:
    """‖U_AᵀU_B‖_F²/r for two subspaces of dimension r: 1 the same, 0 orthogonal, r/d by chance."""
    return min(1.0, float(cosines_between(first, second).square().sum()) / first.rank)


def subspace_overlap(first: Tensor, second: Tensor, rank: int) -> float:
    """‖U_AᵀU_B‖_F²/r of the leading eigenspaces of two symmetric matrices, between 0 and 1.

    U holds the eigenvectors of the r largest eigenvalues. Two random subspaces of dimension r in ℝᵈ
    have r/d on average.

    Args:
        first: A, shape ``[d, d]``, or ``[groups, d, d]`` for the blocks of a block-diagonal matrix.
        second: B, the same shape.
        rank: r.

    Returns:
        The overlap; NaN where a leading eigenspace of that rank is not defined: the r-th
        eigenvalue is not positive, or the next one is as large (within 10⁻⁹ of the largest).

    Raises:
        ConfigurationError: for matrices of different shapes, that are not square, symmetric and
            finite, or with fewer than ``rank`` rows in all.
    """
    found = _both(first, second, rank)
    return float("nan") if found is None else overlap(*found)


def principal_angles(first: Tensor, second: Tensor, rank: int) -> Tensor:
    """Angles between the leading eigenspaces of two symmetric matrices, in radians, smallest first.

    Small ones from their sines, as the cosine of an angle below 10⁻⁸ is 1.

    Args:
        first: A, as for :func:`subspace_overlap`.
        second: B, the same shape.
        rank: r.

    Returns:
        Shape ``[r]``, between 0 and π/2, float64; NaN where an eigenspace is not defined.

    Raises:
        ConfigurationError: as :func:`subspace_overlap`.
    """
    found = _both(first, second, rank)
    if found is None:
        return torch.full((rank,), float("nan"), dtype=torch.float64)
    one, other = (_embedded(subspace, first) for subspace in found)
    between = one @ other.mT
    cosines = torch.linalg.svdvals(between).clamp(0.0, 1.0)
    sines = torch.linalg.svdvals(other - between.mT @ one).clamp(0.0, 1.0).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def symmetric_blocks(matrix: Tensor, name: str) -> Tensor:
    """A symmetric matrix as blocks ``[groups, d, d]`` in float64, rounding in its symmetry removed.

    Raises:
        ConfigurationError: naming ``name``, if it is not ``[d, d]`` or ``[groups, d, d]``, not
            real, finite and symmetric.
    """
    if matrix.dim() not in (2, 3) or matrix.shape[-1] != matrix.shape[-2] or not matrix.numel():
        raise ConfigurationError(
            f"{name} must be [d, d] or [groups, d, d], got shape {list(matrix.shape)}"
        )
    if matrix.is_complex():
        raise ConfigurationError(f"{name} must be real, got {matrix.dtype}")
    blocks = to_algebra(matrix).reshape(-1, *matrix.shape[-2:])
    if not bool(blocks.isfinite().all()):
        raise ConfigurationError(f"{name} holds NaN or infinity")
    gap, largest = float((blocks - blocks.mT).abs().max()), float(blocks.abs().max())
    if gap > _SYMMETRIC * largest:
        raise ConfigurationError(
            f"{name} must be symmetric: entries across the diagonal differ by {gap:.3g}, the "
            f"largest is {largest:.3g}"
        )
    return (blocks + blocks.mT) / 2


def _both(first: Tensor, second: Tensor, rank: int) -> tuple[Subspace, Subspace] | None:
    if first.shape != second.shape:
        raise ConfigurationError(
            f"the matrices differ in shape: {list(first.shape)} and {list(second.shape)}"
        )
    positive_integer("rank", rank)
    spaces = []
    for matrix, name in ((first, "the first matrix"), (second, "the second matrix")):
        blocks = symmetric_blocks(matrix, name)
        if rank > blocks.shape[0] * blocks.shape[1]:
            raise ConfigurationError(
                f"rank {rank} is more than the {blocks.shape[0] * blocks.shape[1]} rows there are"
            )
        values, vectors = torch.linalg.eigh(blocks)
        spaces.append(leading_subspace(values, vectors.mT, rank)[0])
    one, other = spaces
    return None if one is None or other is None else (one, other)


def _embedded(subspace: Subspace, matrix: Tensor) -> Tensor:
    """The vectors in the space of all blocks, shape ``[r, groups·d]``."""
    size = subspace.rows.shape[-1]
    whole = subspace.rows.new_zeros(subspace.rank, matrix.numel() // size**2, size)
    whole[torch.arange(subspace.rank), subspace.blocks] = subspace.rows
    return whole.flatten(1)
