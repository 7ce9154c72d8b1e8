"""Eigenpairs, powers and polar roots of block-diagonal matrices, with a relative clamp."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from feature_probe.theory.factored import Factored, Frame, Lift, row_products
from feature_probe.theory.threads import calm


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of a block-diagonal PSD matrix after the clamp, largest first.

    Attributes:
        values: Kept eigenvalues, shape ``[groups, r]``; dropped ones are exactly 0.
        vectors: Orthonormal eigenvectors as rows, shape ``[groups, r, d]``; 0 where dropped.
        mixing: C with vectors = C·(the rows it was computed from), where there were such rows.
    """

    values: Tensor
    vectors: Tensor
    mixing: Tensor | None = None

    @property
    def kept(self) -> int:
        """Number of eigenvalues above the clamp, over all blocks."""
        return int((self.values > 0).sum())

    def weights(self, power: float, exponent: int = 0) -> tuple[Tensor, int]:
        """(w, e) with the eigenvalues of (2ˣX)ˢ = 2ᵉw, x the ``exponent``; w ``[groups, r]``.

        Where no eigenvalue was kept, or one is not finite, they stand as they are.
        """
        top = float(self.values.max()) if self.values.numel() else 0.0
        if not 0 < top < math.inf:
            return self.values.pow(power), 0
        binary = power * (math.log2(top) + exponent)
        whole = math.floor(binary)
        return (self.values / top).pow(power) * 2.0 ** (binary - whole), whole

    def power(
        self,
        power: float,
        frame: Frame | None = None,
        *,
        exponent: int = 0,
        lifted: Tensor | None = None,
    ) -> Factored:
        """(2ᵉX)ˢ for s > 0, with the pseudo-inverse convention: dropped eigenvalues stay 0.

        Args:
            power: s.
            frame: The frame that the eigenvectors are given in.
            exponent: e.
            lifted: The eigenvectors outside the frame, ``[groups, r, d]``.
        """
        weights, whole = self.weights(power, exponent)
        rows = weights.sqrt()[..., None] * self.vectors
        lift = None if lifted is None else Lift(lifted, weights)
        gram = torch.diag_embed(weights)
        return Factored(rows, rows, frame, left_gram=gram, exponent=whole, lift=lift)

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
    with calm(matrix):
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values, rows = values.flip(-1), vectors.flip(-1).mT
    return _clamped(values, rows, tolerance)


def symmetric_values(matrix: Tensor, tolerance: float) -> Tensor:
    """The eigenvalues of :func:`symmetric_spectrum` alone, at about a quarter of its cost.

    Raises:
        torch.linalg.LinAlgError: if the eigenproblem does not converge.
    """
    with calm(matrix):
        values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).flip(-1)
    keep = _kept(values, tolerance)
    return torch.where(keep, values, 0.0)[:, : _most(keep)]


def gram_spectrum(rows: Tensor, tolerance: float, gram: Tensor | None = None) -> Spectrum:
    """Eigendecomposition of BᵀB from its rows B ``[groups, r, d]``, on the smaller side.

    Args:
        rows: B.
        tolerance: Relative clamp τ.
        gram: BBᵀ ``[groups, r, r]``, where it is known and no larger than BᵀB.

    Raises:
        torch.linalg.LinAlgError: if the eigenproblem does not converge.
    """
    if rows.shape[1] > rows.shape[2]:
        return symmetric_spectrum(rows.mT @ rows, tolerance)
    small = symmetric_spectrum(rows @ rows.mT if gram is None else gram, tolerance)
    mixing = torch.where(small.values > 0, small.values.rsqrt(), 0.0)[..., None] * small.vectors
    return Spectrum(small.values, mixing @ rows, mixing)


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


class PolarRoot:
    """√(XXᵀ) of X = LᵀR, in an orthonormal basis Q of the columns of Lᵀ = Q·R₁.

    Args:
        triangle: R₁, ``[groups, m, k]``.
        right: R, ``[groups, k, d]``.
        basis: Q, ``[groups, d, m]``; None for the coordinates that L is given in.
        product: R₁R, ``[groups, m, d]``, where it is known.
        right_gram: RRᵀ, ``[groups, k, k]``, where it is known: X itself is then not formed.

    Attributes:
        triangle: R₁, so that LᵀL = Q (R₁R₁ᵀ) Qᵀ.

    Raises:
        torch.linalg.LinAlgError: if the eigenproblem does not converge.
    """

    def __init__(
        self,
        triangle: Tensor,
        right: Tensor,
        basis: Tensor | None = None,
        *,
        product: Tensor | None = None,
        right_gram: Tensor | None = None,
    ) -> None:
        self.triangle, self._right, self._basis = triangle, right, basis
        if product is not None or right_gram is None:
            product = triangle @ right if product is None else product
            square = row_products(product)
        else:
            square = triangle @ right_gram @ triangle.mT
            square = (square + square.mT) / 2
        with calm(square):
            self._left = torch.linalg.eigh(square).eigenvectors
        # σⱼvⱼᵀ
        turned = self._left.mT
        self._turned = turned @ triangle @ right if product is None else turned @ product
        # not the roots of the eigenvalues, which are good to 1e-8 of the largest alone
        self._values = torch.linalg.vector_norm(self._turned, dim=-1)

    @cached_property
    def _half(self) -> Tensor:
        half: Tensor = self._left * self._values.sqrt()[:, None, :]
        return half

    @cached_property
    def root(self) -> Tensor:
        """The small symmetric matrix S with √(XXᵀ) = Q S Qᵀ, shape ``[groups, m, m]``."""
        return row_products(self._half)

    @cached_property
    def rows(self) -> Tensor:
        """T with √(XXᵀ) = TᵀT, shape ``[groups, m, d]``."""
        half = self._half if self._basis is None else self._basis @ self._half
        return half.mT

    @cached_property
    def mixing(self) -> Tensor:
        """C with T = C·L, shape ``[groups, m, k]``; 0 where a singular value is rounding.

        U = LᵀRVΣ⁻¹, so that T = Σ^{1/2}Uᵀ = Σ^{-1/2}VᵀRᵀ·L.
        """
        values = self._values
        floor = math.sqrt(torch.finfo(values.dtype).eps) * values.amax(-1, keepdim=True)
        known = values > floor
        weights = torch.where(known, values, 1.0).pow(-1.5) * known
        mixing: Tensor = weights[..., None] * (self._turned @ self._right.mT)
        return mixing


def polar_root(
    left: Tensor,
    right: Tensor,
    *,
    product: Tensor | None = None,
    right_gram: Tensor | None = None,
) -> PolarRoot:
    """√(XXᵀ) of X = LᵀR by the eigenvectors U of XXᵀ and the lengths of UᵀX.

    The lengths are the singular values to the precision of X. Directions whose singular values are
    below 1e-8 of the largest mix among themselves, which moves the root by no more than those.

    Args:
        left: L, shape ``[groups, k, d]``, or in a frame; the result is in the same coordinates.
        right: R, shape ``[groups, k, d]``, in any orthonormal coordinates: they drop out.
        product: X, where it is known.
        right_gram: RRᵀ, where it is known.

    Raises:
        torch.linalg.LinAlgError: if the eigenproblem does not converge.
    """
    if left.shape[1] >= left.shape[2]:
        return PolarRoot(left.mT, right, product=product, right_gram=right_gram)
    with calm(left):
        basis, triangle = torch.linalg.qr(left.mT)
    return PolarRoot(triangle, right, basis, right_gram=right_gram)
