"""Outer: one sum Σ r rᵀ of a layer, kept as its rows while they are few."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from feature_probe.theory.precision import reduced_precision

#: Rows that are cast at once, so that the float32 copy of low-precision rows stays bounded.
_CHUNK = 16384
#: Rows are kept while they are at most this share of d_out: adding them up would write more.
KEPT = 0.25
#: Width from which on the products above the diagonal alone are formed.
_LARGE = 512
#: Width up to which a product is formed apart: some libraries add its rows to the sum one by one,
#: and lose a digit over many batches.
_SMALL = 64


class OuterSum:
    """Σ r rᵀ over rows r, per group: the rows themselves while they are few, then their sum.

    Args:
        matrix: A sum to begin with, ``[groups, d, d]``, which is added to in place.
        rows: Rows to begin with, each ``[n, groups, d]`` in the dtype of the sum.
    """

    def __init__(self, matrix: Tensor | None = None, rows: Sequence[Tensor] = ()) -> None:
        self._matrix = matrix
        self._rows = list(rows)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """The rows that are not added up yet."""
        return tuple(self._rows)

    @property
    def known(self) -> Tensor | None:
        """The sum without the rows that are kept; its blocks below the diagonal may be behind."""
        return self._matrix

    def all_kept(self) -> Tensor | None:
        """R with RᵀR the sum, ``[groups, n, d]``; None where some of it is added up."""
        if self._matrix is not None or not self._rows:
            return None
        rows = self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)
        return rows.transpose(0, 1)

    def form(self) -> Tensor:
        """The sum, ``[groups, d, d]``; the rows are let go."""
        if self._rows:
            rows = self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)
            self._add(rows, 1.0)
            self._rows = []
        if self._matrix is None:
            raise ValueError("nothing was added")
        return mirrored_(self._matrix)

    def add(self, rows: Tensor, scale: float = 1.0) -> None:
        """Add the rows times ``scale``, ``[n, groups, d]`` in any floating dtype.

        The scale is applied before the product, so that small gradients in float32 do not
        underflow when squared.
        """
        rows = rows.detach()
        if self._matrix is None and self._room(len(rows), rows.shape[-1]):
            with torch.no_grad():
                own = rows.to(sum_dtype(rows.dtype), copy=True)
                self._rows.append(own.mul_(scale) if scale != 1.0 else own)
        else:
            if self._rows:
                self.form()
            self._add(rows, scale)

    def merge(self, other: OuterSum) -> None:
        """Add another sum, taking its tensors over; it must not be used afterwards."""
        if self._matrix is None and other._matrix is None:
            count = sum(len(rows) for rows in other._rows)
            if not other._rows or self._room(count, other._rows[0].shape[-1]):
                self._rows += other._rows
                return
        mine, others = self._formed(), other._formed()
        if mine is None or others is None:
            self._matrix = others if mine is None else mine
        else:
            self._matrix = mine.add_(others)

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the sum by ``factor``, which is not negative."""
        if self._matrix is not None:
            self._matrix.mul_(factor)
        if self._rows:
            root = factor.sqrt() if isinstance(factor, Tensor) else factor**0.5
            for rows in self._rows:
                rows.mul_(root)

    def map(self, change: Callable[[Tensor], Tensor]) -> OuterSum:
        """The same with every tensor changed."""
        matrix = None if self._matrix is None else change(self._matrix)
        return OuterSum(matrix, [change(rows) for rows in self._rows])

    def nbytes(self) -> int:
        """Bytes held."""
        held = self._rows if self._matrix is None else [self._matrix, *self._rows]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _formed(self) -> Tensor | None:
        return self.form() if self._rows or self._matrix is not None else None

    def _room(self, count: int, width: int) -> bool:
        return count + sum(len(rows) for rows in self._rows) <= KEPT * width

    def _add(self, rows: Tensor, scale: float) -> None:
        if self._matrix is None:
            shape = (rows.shape[1], rows.shape[2], rows.shape[2])
            self._matrix = torch.zeros(shape, dtype=sum_dtype(rows.dtype), device=rows.device)
        add_gram_(self._matrix, rows, scale)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are held in: float64 for float64 data, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mirrored_(total: Tensor) -> Tensor:
    """The sum ``[groups, d, d]`` with the blocks below the diagonal like those above it."""
    for start, end in _quarters(total):
        total[:, end:, start:end] = total[:, start:end, end:].mT
    return total


def _quarters(total: Tensor) -> list[tuple[int, int]]:
    """Rows in quarters where the products of a half are worth their own calls, else at once."""
    width = total.shape[1]
    if total.shape[0] > 1 or width < _LARGE:
        return [(0, width)]
    step = -(-width // 4)
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def add_gram_(total: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """``total += scale²·RᵀR`` per group, in the precision of ``total`` or better.

    Of one wide group only the blocks on and above the diagonal, 10 of 16: see :func:`mirrored_`.

    Where the user allowed reduced-precision float32 products (TF32, bf16 passes), the product is
    formed in float64 instead: their switches are global and are not ours to turn.

    Args:
        total: ``[groups, d, d]``, float32 or float64, changed in place.
        rows: R, ``[rows, groups, d]``, any floating dtype.
        scale: Factor on every row.
    """
    exact = total.dtype == torch.float64 or not reduced_precision(total.device)
    dtype = total.dtype if exact else torch.float64
    with torch.no_grad(), torch.autocast(total.device.type, enabled=False):
        for start in range(0, len(rows), _CHUNK):
            block = rows[start : start + _CHUNK].to(dtype)
            block = (block * scale if scale != 1.0 else block).transpose(0, 1)
            if not exact or total.shape[1] <= _SMALL:
                total.add_(block.mT @ block)
            elif total.shape[0] == 1:
                for start, end in _quarters(total):
                    total[0, start:end, start:].addmm_(
                        block[0, :, start:end].mT, block[0, :, start:]
                    )
            else:
                total.baddbmm_(block.mT, block)
