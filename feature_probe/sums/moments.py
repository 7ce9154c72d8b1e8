"""Moments: the streaming sums of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Outer = Literal["jacobian", "loss", "jacobian_change"]
#: Rows that are cast at once, so that the float32 copy of low-precision rows stays bounded.
_CHUNK = 16384


@dataclass
class Moments:
    """Sums (not means) of one layer over everything added since they were empty.

    Attributes:
        gradient: Σ w·G over what was added, w its weight. G is the gradient of the loss as it
            stands: "mean" or "sum" reduction, accumulation and loss scale are the caller's, in the
            weight or in the reading of it. In the layout of the parameter where it is the
            parameter's gradient, ``[groups, d_out, d_in]`` where it is formed as gᵀh.
        gradient_weight: Σ w.
        jacobian: Σ JᵀJ over examples and positions, ``[groups, d_out, d_out]``.
        loss: Σ g gᵀ over examples and positions, ``[groups, d_out, d_out]``.
        jacobian_rows: Examples × positions × calls of the forward passes behind ``jacobian``.
        loss_rows: The same for the gradients that arrived.
        jacobian_change: Σ (J − J⁰)ᵀ(J − J⁰) of the same passes, J⁰ of the network as it was.

    All are float32, or float64 for float64 data, whatever the activations' type. An empty sum is
    None, which is not the same as a sum of zeros: nothing was ever added.
    """

    gradient: Tensor | None = None
    gradient_weight: float = 0.0
    jacobian: Tensor | None = None
    loss: Tensor | None = None
    jacobian_rows: int = 0
    loss_rows: int = 0
    jacobian_change: Tensor | None = None

    @property
    def rows(self) -> int:
        """Examples × positions × calls behind the sums."""
        return max(self.jacobian_rows, self.loss_rows)

    def add_gradient(self, gradient: Tensor, weight: float = 1.0) -> None:
        """Add ``weight``·``gradient``; the tensor given is not kept."""
        dtype = sum_dtype(gradient.dtype)
        if self.gradient is None:
            self.gradient = gradient.detach().to(dtype, copy=True)
            if weight != 1.0:
                self.gradient.mul_(weight)
        else:
            self.gradient.add_(gradient.detach(), alpha=weight)
        self.gradient_weight += weight

    def take_gradient(self) -> Tensor | None:
        """Σ w·G, which is empty here afterwards."""
        gradient, self.gradient, self.gradient_weight = self.gradient, None, 0.0
        return gradient

    def add_outer(self, kind: Outer, rows: Tensor, scale: float = 1.0) -> None:
        """Add scale² Σ r rᵀ over the rows r, per group.

        Args:
            kind: Which sum.
            rows: ``[rows, groups, d_out]``, any floating dtype.
            scale: Factor on every row, applied before the product so that small gradients in
                float32 do not underflow when squared.
        """
        total: Tensor | None = getattr(self, kind)
        if total is None:
            shape = (rows.shape[1], rows.shape[2], rows.shape[2])
            total = torch.zeros(shape, dtype=sum_dtype(rows.dtype), device=rows.device)
        add_gram_(total, rows.detach(), scale)
        setattr(self, kind, total)

    def merge(self, other: Moments) -> None:
        """Add another layer's sums, taking its tensors over where there are none yet.

        Associative and commutative up to rounding. ``other`` must not be used afterwards.
        """
        self.gradient = _added(self.gradient, other.gradient)
        self.gradient_weight += other.gradient_weight
        self.jacobian = _added(self.jacobian, other.jacobian)
        self.loss = _added(self.loss, other.loss)
        self.jacobian_change = _added(self.jacobian_change, other.jacobian_change)
        self.jacobian_rows += other.jacobian_rows
        self.loss_rows += other.loss_rows

    def without(self, other: Moments) -> Moments:
        """The sums less those of a part of them, in tensors of their own."""
        return Moments(
            gradient=_less(self.gradient, other.gradient),
            gradient_weight=self.gradient_weight - other.gradient_weight,
            jacobian=_less(self.jacobian, other.jacobian),
            loss=_less(self.loss, other.loss),
            jacobian_rows=self.jacobian_rows - other.jacobian_rows,
            loss_rows=self.loss_rows - other.loss_rows,
            jacobian_change=_less(self.jacobian_change, other.jacobian_change),
        )

    def take_counts(self) -> Moments:
        """The counts alone, which are zero here afterwards."""
        counts = Moments(
            gradient_weight=self.gradient_weight,
            jacobian_rows=self.jacobian_rows,
            loss_rows=self.loss_rows,
        )
        self.gradient_weight, self.jacobian_rows, self.loss_rows = 0.0, 0, 0
        return counts

    def masked(self, taken: Tensor) -> Moments:
        """The sums where ``taken`` (0-dim, boolean), zeros elsewhere, whatever they held."""

        def mask(total: Tensor | None) -> Tensor | None:
            return None if total is None else torch.where(taken, total, torch.zeros_like(total))

        return Moments(
            gradient=mask(self.gradient),
            gradient_weight=self.gradient_weight,
            jacobian=mask(self.jacobian),
            loss=mask(self.loss),
            jacobian_rows=self.jacobian_rows,
            loss_rows=self.loss_rows,
            jacobian_change=mask(self.jacobian_change),
        )

    def nbytes(self) -> int:
        """Bytes held by the sums."""
        held = (self.gradient, self.jacobian, self.loss, self.jacobian_change)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are held in: float64 for float64 data, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_gram_(total: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """``total += scale²·RᵀR`` per group, in the precision of ``total`` or better.

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
            if not exact:
                total.add_(block.mT @ block)
            elif total.shape[0] == 1:
                total[0].addmm_(block[0].mT, block[0])
            else:
                total.baddbmm_(block.mT, block)


def reduced_precision(device: torch.device) -> bool:
    """Whether the user's settings allow float32 matrix products below float32 precision."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    setting: str | None = getattr(matmul, "fp32_precision", None)
    if setting is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return setting not in ("none", "ieee")


def _less(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return None
    return a.clone() if b is None else a - b


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)
