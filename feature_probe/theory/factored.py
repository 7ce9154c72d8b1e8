"""Thin-factor matrices: X = LᵀR, block-diagonal over groups, never formed unless asked.

Every matrix that the probe compares is a product of factors with few rows, so that inner products,
traces and sums cost k₁·k₂·d instead of d² (the inner product of X₁ = L₁ᵀR₁ and X₂ = L₂ᵀR₂
is Σ (L₁L₂ᵀ)∘(R₁R₂ᵀ)). Matrices that live in the span of a few rows can be held in a :class:`Frame`,
coordinates of that span, where d shrinks too. Nothing here knows modules, layers or relations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Orthonormal coordinates of an m-dimensional subspace of ℝᵈ that some matrices live in.

    Inner products, traces and spectra are the same in the coordinates; sums of entries need the
    all-ones vector there, and counts of entries need d.

    Attributes:
        ones: Coordinates of the all-ones vector, shape ``[groups, m]``.
        size: d.
    """

    ones: Tensor
    size: int


def framed_rows(rows: Tensor) -> tuple[Tensor, Frame]:
    """Rows of ℝᵈ in coordinates of their own span.

    With the QR decomposition [Rᵀ | 1] = Q [[T, q], [0, ρ]] the rows are Tᵀ and the all-ones vector
    is q, up to a part that the rows do not see. Q is never formed.

    Args:
        rows: R, shape ``[groups, k, d]`` with k < d.

    Returns:
        Rows ``[groups, k, k]`` with the same Gram matrix, and the frame.
    """
    groups, count, size = rows.shape
    ones = torch.ones(groups, size, 1, dtype=rows.dtype, device=rows.device)
    triangle = torch.linalg.qr(torch.cat([rows.mT, ones], dim=-1), mode="r").R
    return triangle[:, :count, :count].mT, Frame(triangle[:, :count, count], size)


@dataclass(frozen=True)
class Factored:
    """The block-diagonal matrix with blocks X_b = L_bᵀ R_b.

    Attributes:
        left: L, shape ``[groups, k, d]``, or ``[groups, k, m]`` in a frame.
        right: R, the same shape. X need be neither symmetric nor positive semi-definite.
        frame: The coordinates that the factors are given in; None for ℝᵈ itself.
        left_gram: LLᵀ ``[groups, k, k]`` where it is known already.
    """

    left: Tensor
    right: Tensor
    frame: Frame | None = None
    left_gram: Tensor | None = None

    @staticmethod
    def gram(rows: Tensor, frame: Frame | None = None) -> Factored:
        """RᵀR of ``rows`` R, shape ``[groups, k, d]``."""
        return Factored(rows, rows, frame)

    @property
    def groups(self) -> int:
        """Number of diagonal blocks."""
        return self.left.shape[0]

    @property
    def size(self) -> int:
        """d, the side of one block."""
        return self.left.shape[-1] if self.frame is None else self.frame.size

    @property
    def is_gram(self) -> bool:
        """Whether both factors are one tensor, so that X is symmetric and PSD."""
        return self.left is self.right

    def thin(self) -> Factored:
        """The same matrix with at most d rows in its factors, so that the smaller side is used."""
        width = self.left.shape[2]
        if self.left.shape[1] <= width:
            return self
        identity = torch.eye(width, dtype=self.left.dtype, device=self.left.device)
        return Factored(identity.expand(self.groups, -1, -1), self.left.mT @ self.right, self.frame)

    def dense(self) -> Tensor:
        """X itself, shape ``[groups, d, d]``: memory quadratic in d.

        Raises:
            ValueError: if X is given in a frame, whose basis is not kept.
        """
        if self.frame is not None:
            raise ValueError("a matrix in a frame has no dense form")
        return self.left.mT @ self.right

    def inner(self, other: Factored) -> Tensor:
        """⟨X, Y⟩ = Σ X_ij Y_ij over the blocks, a scalar tensor."""
        if self.left is other.left and self.left_gram is not None:
            lefts = self.left_gram
        else:
            lefts = self.left @ other.left.mT
        if self.is_gram and other.is_gram:
            return lefts.square().sum()
        return (lefts * (self.right @ other.right.mT)).sum()

    def squared_norm(self) -> Tensor:
        """‖X‖_F², a scalar tensor, never negative."""
        return self.inner(self).clamp_min(0.0)

    def traces(self) -> Tensor:
        """The trace of every block, shape ``[groups]``."""
        return (self.left * self.right).sum((1, 2))

    def total(self) -> Tensor:
        """Sum of all entries inside the blocks, a scalar tensor."""
        if self.frame is None:
            return (self.left.sum(-1) * self.right.sum(-1)).sum()
        ones = self.frame.ones[..., None]
        return ((self.left @ ones) * (self.right @ ones)).sum()


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of a block-diagonal PSD matrix after the clamp, largest first.

    Attributes:
        values: Kept eigenvalues, shape ``[groups, r]``; dropped ones are exactly 0.
        vectors: Orthonormal eigenvectors as rows, shape ``[groups, r, d]``; 0 where dropped.
    """

    values: Tensor
    vectors: Tensor

    @property
    def kept(self) -> int:
        """Number of eigenvalues above the clamp, over all blocks."""
        return int((self.values > 0).sum())

    def power(self, exponent: float, frame: Frame | None = None) -> Factored:
        """Xˢ for s > 0, with the pseudo-inverse convention: dropped eigenvalues stay 0."""
        return Factored.gram(self.rows(exponent), frame)

    def rows(self, exponent: float) -> Tensor:
        """M with Xˢ = MᵀM, shape ``[groups, r, d]``."""
        return self.values.pow(exponent / 2)[..., None] * self.vectors


def symmetric_spectrum(matrix: Tensor, tolerance: float) -> Spectrum:
    """Eigendecomposition of a PSD matrix ``[groups, d, d]`` with a relative clamp.

    Eigenvalues at or below ``tolerance`` times the largest of their block are dropped (set to 0,
    not floored): below the precision of the sums they are noise that a power s < 1 would amplify.

    Args:
        matrix: Symmetric, shape ``[groups, d, d]``; only its symmetric part is used.
        tolerance: Relative clamp τ.

    Returns:
        The spectrum, cut to the largest number of eigenvalues kept in any block.

    Raises:
        torch.linalg.LinAlgError: if the eigenproblem does not converge.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values, rows = values.flip(-1), vectors.flip(-1).mT
    return _clamped(values, rows, tolerance)


def symmetric_values(matrix: Tensor, tolerance: float) -> Tensor:
    """The eigenvalues of :func:`symmetric_spectrum` alone, at about a quarter of its cost.

    Raises:
        torch.linalg.LinAlgError: if the eigenproblem does not converge.
    """
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).flip(-1)
    keep = _kept(values, tolerance)
    return torch.where(keep, values, 0.0)[:, : _most(keep)]


def gram_spectrum(rows: Tensor, tolerance: float) -> Spectrum:
    """Eigendecomposition of BᵀB from its rows B ``[groups, r, d]``, on the smaller side.

    Raises:
        torch.linalg.LinAlgError: if the eigenproblem does not converge.
    """
    if rows.shape[1] > rows.shape[2]:
        return symmetric_spectrum(rows.mT @ rows, tolerance)
    small = symmetric_spectrum(rows @ rows.mT, tolerance)
    scale = torch.where(small.values > 0, small.values.rsqrt(), 0.0)
    return Spectrum(small.values, scale[..., None] * (small.vectors @ rows))


def _clamped(values: Tensor, rows: Tensor, tolerance: float) -> Spectrum:
    keep = _kept(values, tolerance)
    count = _most(keep)
    keep = keep[:, :count]
    return Spectrum(
        torch.where(keep, values[:, :count], 0.0),
        torch.where(keep[..., None], rows[:, :count], 0.0),
    )


def _kept(values: Tensor, tolerance: float) -> Tensor:
    return (values > tolerance * values[:, :1].clamp_min(0.0)) & (values > 0)


def _most(keep: Tensor) -> int:
    """The largest number of eigenvalues kept in any block, at least one."""
    return max(int(keep.sum(-1).max()), 1) if keep.numel() else 0


@dataclass(frozen=True)
class PolarRoot:
    """√(XXᵀ) of X = LᵀR, in the orthonormal basis Q of the columns of Lᵀ = Q·R₁.

    Attributes:
        root: The small symmetric matrix S with √(XXᵀ) = Q S Qᵀ, shape ``[groups, m, m]``.
        triangle: R₁, shape ``[groups, m, k]``, so that LᵀL = Q (R₁R₁ᵀ) Qᵀ in the same basis.
        rows: T with √(XXᵀ) = TᵀT, shape ``[groups, m, d]``.
    """

    root: Tensor
    triangle: Tensor
    rows: Tensor


def polar_root(left: Tensor, right: Tensor) -> PolarRoot:
    """√(XXᵀ) of X = LᵀR without forming XXᵀ, whose spectrum would be squared.

    With Lᵀ = Q₁R₁, Rᵀ = Q₂R₂ and the SVD R₁R₂ᵀ = U S Vᵀ, √(XXᵀ) = Q₁ U S Uᵀ Q₁ᵀ.

    Args:
        left: L, shape ``[groups, k, d]``, or in a frame; the result is in the same coordinates.
        right: R, shape ``[groups, k, d]``, in any orthonormal coordinates: they drop out.

    Raises:
        torch.linalg.LinAlgError: if the SVD does not converge.
    """
    basis, left_triangle = torch.linalg.qr(left.mT)
    right_triangle = torch.linalg.qr(right.mT, mode="r").R
    u, s, _ = torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)
    half = u * s.sqrt()[:, None, :]
    return PolarRoot(half @ half.mT, left_triangle, (basis @ half).mT)
