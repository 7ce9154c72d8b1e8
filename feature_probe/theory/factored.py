"""Thin-factor matrices: X = LᵀR, block-diagonal over groups, never formed unless asked.

Every matrix that the probe compares is a product of factors with few rows, so that inner products,
traces and sums cost k₁·k₂·d instead of d² (the inner product of X₁ = L₁ᵀR₁ and X₂ = L₂ᵀR₂
is Σ (L₁L₂ᵀ)∘(R₁R₂ᵀ)). Matrices that live in the span of a few rows can be held in a :class:`Frame`,
coordinates of that span, where d shrinks too. Nothing here knows modules, layers or relations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from feature_probe.theory.ranks import Floats, average_ranks, entry_sample, upper_entries
from feature_probe.theory.threads import calm

#: Largest entries between 2⁻⁶⁴ and 2⁶⁴ need no scaling: no product or norm of them over- or
#: underflows.
_MODERATE = 64
#: Least pivot of a Cholesky factor, relative to the longest row: below it RRᵀ has lost digits.
_CONDITION = 1e-4
#: Rows from which on their products are formed above the diagonal alone.
_LARGE = 512


def moderate(tensor: Tensor) -> tuple[Tensor, int]:
    """(Y, e) with tensor = 2ᵉ·Y exactly and Y's largest entry moderate; e = 0 if it is already."""
    largest = _largest(tensor) if tensor.numel() else 0.0
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    if abs(exponent) <= _MODERATE:
        return tensor, 0
    return scaled(tensor, -exponent), exponent


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high))


def row_products(rows: Tensor) -> Tensor:
    """RRᵀ of rows ``[groups, k, d]``; the half below the diagonal is that above it where k ≥ 512.

    A quarter of the rows at a time takes 10 of the 16 blocks that a whole product does.
    """
    count = rows.shape[1]
    if count < _LARGE:
        return rows @ rows.mT
    products = rows.new_empty(len(rows), count, count)
    quarter = -(-count // 4)
    for start in range(0, count, quarter):
        end = start + quarter
        products[:, start:end, start:] = rows[:, start:end] @ rows[:, start:].mT
        products[:, end:, start:end] = products[:, start:end, end:].mT
    return products


def scaled(tensor: Tensor, exponent: int) -> Tensor:
    """tensor·2^exponent, exact unless the result leaves the range of its dtype."""
    left = max(-4000, min(4000, exponent))
    while left:
        step = max(-1000, min(1000, left))
        tensor, left = tensor * 2.0**step, left - step
    return tensor


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


def framed_rows(rows: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Frame]:
    """Rows of ℝᵈ in coordinates of their own span.

    With the QR decomposition [Rᵀ | 1] = Q [[T, q], [0, ρ]] the rows are Tᵀ and the all-ones vector
    is q, up to a part that the rows do not see. Q is never formed. Where the rows are far from
    dependent T follows from RRᵀ = TᵀT by Cholesky's algorithm, at a third of the cost.

    Args:
        rows: R, shape ``[groups, k, d]`` with k < d.
        gram: RRᵀ, where it is known.

    Returns:
        Rows ``[groups, k, k]`` with the same Gram matrix, and the frame.
    """
    groups, count, size = rows.shape
    gram = rows @ rows.mT if gram is None else gram
    with calm(gram):
        factor, failed = torch.linalg.cholesky_ex(gram)
    scale = gram.diagonal(dim1=1, dim2=2).amax(-1).sqrt()
    conditioned = factor.diagonal(dim1=1, dim2=2).amin(-1) > _CONDITION * scale
    if not failed.any() and conditioned.all():
        q = torch.linalg.solve_triangular(factor, rows.sum(-1, keepdim=True), upper=False)
        return factor, Frame(q[..., 0], size)
    ones = torch.ones(groups, size, 1, dtype=rows.dtype, device=rows.device)
    with calm(rows):
        triangle = torch.linalg.qr(torch.cat([rows.mT, ones], dim=-1), mode="r").R
    return triangle[:, :count, :count].mT, Frame(triangle[:, :count, count], size)


@dataclass(frozen=True)
class Lift:
    """Σ_r w_r n_r n_rᵀ in ℝᵈ: what a matrix that is held in a frame looks like outside it.

    Attributes:
        rows: n, shape ``[groups, r, d]``, shared by the powers of one matrix.
        weights: w, shape ``[groups, r]``, or None for ones.
    """

    rows: Tensor
    weights: Tensor | None = None

    def weighted(self) -> Tensor:
        """The rows w_r n_r."""
        return self.rows if self.weights is None else self.weights[..., None] * self.rows

    def diagonals(self) -> Tensor:
        """The diagonal of every block, ``[groups, d]``."""
        return (_weights(self)[:, None] @ self.rows.square())[:, 0]


@dataclass(frozen=True)
class Factored:
    """The block-diagonal matrix with blocks X_b = 2ᵉ L_bᵀ R_b.

    Attributes:
        left: L, shape ``[groups, k, d]``, or ``[groups, k, m]`` in a frame.
        right: R, the same shape. X need be neither symmetric nor positive semi-definite.
        frame: The coordinates that the factors are given in; None for ℝᵈ itself.
        left_gram: LLᵀ ``[groups, k, k]`` where it is known already.
        right_gram: RRᵀ likewise.
        cross: LRᵀ likewise.
        exponent: e, so that X itself may be out of the range of floating point.
        lift: LᵀR in ℝᵈ where the factors are given in a frame and single entries are wanted.
        is_whole: Whether L is the identity, so that R is X itself.
        is_symmetric: Whether X is known to be.
    """

    left: Tensor
    right: Tensor
    frame: Frame | None = None
    left_gram: Tensor | None = None
    right_gram: Tensor | None = None
    cross: Tensor | None = None
    exponent: int = 0
    lift: Lift | None = None
    is_whole: bool = False
    is_symmetric: bool = False

    @staticmethod
    def whole(matrix: Tensor, *, symmetric: bool = False) -> Factored:
        """``[groups, d, d]`` as it is."""
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        identity = identity.expand(len(matrix), -1, -1)
        return Factored(identity, matrix, left_gram=identity, is_whole=True, is_symmetric=symmetric)

    @staticmethod
    def gram(rows: Tensor, frame: Frame | None = None, exponent: int = 0) -> Factored:
        """2ᵉRᵀR of ``rows`` R, shape ``[groups, k, d]``."""
        return Factored(rows, rows, frame, exponent=exponent)

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
        if self.left.shape[1] <= self.left.shape[2]:
            return self
        whole = Factored.whole(self.left.mT @ self.right, symmetric=self.is_gram)
        return replace(whole, frame=self.frame, exponent=self.exponent, lift=self.lift)

    @cached_property
    def moderated(self) -> tuple[Factored, int]:
        """(Y, e) with X = 2ᵉ·Y exactly and factors of moderate size, so that no score overflows."""
        left, left_exponent = moderate(self.left)
        right, right_exponent = (left, left_exponent) if self.is_gram else moderate(self.right)
        taken = left_exponent + right_exponent
        if not taken and not self.exponent and left is self.left and right is self.right:
            return self, 0
        gram = None if left_exponent else self.left_gram
        lift = self.lift
        if lift is not None and taken:
            lift = Lift(lift.rows, scaled(_weights(lift), -taken))
        other = None if right_exponent else self.right_gram
        cross = None if taken else self.cross
        whole = replace(
            self, left=left, right=right, left_gram=gram, right_gram=other, cross=cross,
            exponent=0, lift=lift,
        )  # fmt: skip
        return whole, taken + self.exponent

    def dense(self) -> Tensor:
        """X itself, shape ``[groups, d, d]``: memory quadratic in d.

        Raises:
            ValueError: if X is given in a frame, whose basis is not kept.
        """
        if self.frame is not None:
            raise ValueError("a matrix in a frame has no dense form")
        return scaled(self.left.mT @ self.right, self.exponent)

    def inner(self, other: Factored) -> Tensor:
        """⟨X, Y⟩ = Σ X_ij Y_ij over the blocks, a scalar tensor."""
        return self.block_inners(other).sum()

    def block_inners(self, other: Factored) -> Tensor:
        """⟨X_b, Y_b⟩ of every block, shape ``[groups]``."""
        if self.is_whole and other.is_whole:
            return scaled((self.right * other.right).sum((1, 2)), self.exponent + other.exponent)
        if self.left is other.left and self.left_gram is not None:
            lefts = self.left_gram
        else:
            lefts = self.left @ other.left.mT
        if self.is_gram and other.is_gram:
            inners = lefts.square().sum((1, 2))
        elif self.is_gram and self.left is other.left:
            inners = (lefts * other.crossed).sum((1, 2))
        elif self.right is other.right and self.right_gram is not None:
            inners = (lefts * self.right_gram).sum((1, 2))
        else:
            inners = (lefts * (self.right @ other.right.mT)).sum((1, 2))
        return scaled(inners, self.exponent + other.exponent)

    @cached_property
    def crossed(self) -> Tensor:
        """LRᵀ, shape ``[groups, k, k]``."""
        if self.is_whole:
            return self.right.mT
        return self.left @ self.right.mT if self.cross is None else self.cross

    @cached_property
    def block_norms(self) -> Tensor:
        """‖X_b‖_F² of every block, shape ``[groups]``, never negative."""
        return self.block_inners(self).clamp_min(0.0)

    @cached_property
    def block_transposes(self) -> Tensor:
        """⟨X_b, X_bᵀ⟩ of every block, shape ``[groups]``: ‖X_b‖_F² where X is symmetric."""
        if self.is_gram or self.is_symmetric:
            return self.block_norms
        return scaled((self.crossed * self.crossed.mT).sum((1, 2)), 2 * self.exponent)

    def squared_norm(self) -> Tensor:
        """‖X‖_F², a scalar tensor, never negative."""
        return self.block_norms.sum()

    def traces(self) -> Tensor:
        """The trace of every block, shape ``[groups]``."""
        if self.is_whole:
            return scaled(self.right.diagonal(dim1=1, dim2=2).sum(-1), self.exponent)
        if self.is_gram:
            return scaled(torch.linalg.vector_norm(self.left, dim=(1, 2)).square(), self.exponent)
        return scaled(torch.linalg.vecdot(self.left, self.right).sum(1), self.exponent)

    def total(self) -> Tensor:
        """Sum of all entries inside the blocks, a scalar tensor."""
        ones = None if self.frame is None else self.frame.ones[..., None]
        left = self.left.sum(-1) if ones is None else (self.left @ ones)[..., 0]
        right = self.right.sum(-1) if ones is None else (self.right @ ones)[..., 0]
        return scaled((left * right).sum(), self.exponent)

    @cached_property
    def diagonals(self) -> Tensor:
        """The diagonal of every block, shape ``[groups, d]``.

        Raises:
            ValueError: if X is given in a frame and not lifted out of it.
        """
        if self.frame is not None:
            return scaled(self._lifted().diagonals(), self.exponent)
        if self.is_whole:
            return scaled(self.right.diagonal(dim1=1, dim2=2), self.exponent)
        if self.is_gram:
            return scaled(torch.linalg.vector_norm(self.left, dim=1).square(), self.exponent)
        return scaled((self.left * self.right).sum(1), self.exponent)

    @cached_property
    def entry_ranks(self) -> Floats:
        """Ranks of the entries of :func:`~feature_probe.theory.ranks.entry_sample`.

        Raises:
            ValueError: if X is given in a frame and not lifted out of it.
        """
        sample = entry_sample(self.groups, self.size)
        blocks, columns = torch.from_numpy(sample.blocks), torch.from_numpy(sample.columns)

        def taken(factor: Tensor) -> Tensor:
            if len(blocks) < self.groups:
                factor = factor[blocks.to(factor.device)]
            return factor[..., columns.to(factor.device)]

        if self.frame is None:
            left, right = taken(self.left), taken(self.right)
        else:
            lift = self._lifted()
            weights = lift.weights
            if weights is not None and len(blocks) < self.groups:
                weights = weights[blocks.to(weights.device)]
            right = taken(lift.rows)
            left = Lift(right, weights).weighted()
        return average_ranks(upper_entries((left.mT @ right).cpu().numpy()))

    def _lifted(self) -> Lift:
        if self.lift is None:
            raise ValueError("a matrix in a frame has no single entries unless it is lifted")
        return self.lift


def _weights(lift: Lift) -> Tensor:
    return lift.rows.new_ones(lift.rows.shape[:2]) if lift.weights is None else lift.weights
