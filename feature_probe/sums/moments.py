"""Moments: the streaming sums of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from feature_probe.sums.outer import OuterSum, sum_dtype

Outer = Literal["jacobian", "loss", "jacobian_change"]
_OUTER: tuple[Outer, ...] = ("jacobian", "loss", "jacobian_change")


class Moments:
    """Sums (not means) of one layer over everything added since they were empty.

    Args:
        gradient: See below, like the others.
        gradient_weight: Likewise.
        jacobian: Likewise.
        loss: Likewise.
        jacobian_rows: Likewise.
        loss_rows: Likewise.
        jacobian_change: Likewise.

    Attributes:
        gradient: Σ w·G over what was added, w its weight. G is the gradient of the loss as it
            stands: "mean" or "sum" reduction, accumulation and loss scale are the caller's, in the
            weight or in the reading of it. In the layout of the parameter where it is the
            parameter's gradient, ``[groups, d_out, d_in]`` where it is formed as gᵀh.
        gradient_weight: Σ w.
        jacobian_rows: Examples × positions × calls of the forward passes behind ``jacobian``.
        loss_rows: The same for the gradients that arrived.

    All are float32, or float64 for float64 data, whatever the activations' type. An empty sum is
    None, which is not the same as a sum of zeros: nothing was ever added.
    """

    def __init__(
        self,
        gradient: Tensor | None = None,
        gradient_weight: float = 0.0,
        jacobian: Tensor | None = None,
        loss: Tensor | None = None,
        jacobian_rows: int = 0,
        loss_rows: int = 0,
        jacobian_change: Tensor | None = None,
    ) -> None:
        self.gradient = gradient
        self.gradient_weight = gradient_weight
        self.jacobian_rows = jacobian_rows
        self.loss_rows = loss_rows
        self._outer: dict[Outer, OuterSum] = {}
        self.jacobian, self.loss, self.jacobian_change = jacobian, loss, jacobian_change

    @property
    def jacobian(self) -> Tensor | None:
        """Σ JᵀJ over examples and positions, ``[groups, d_out, d_out]``."""
        return self._formed("jacobian")

    @jacobian.setter
    def jacobian(self, total: Tensor | None) -> None:
        self._set("jacobian", total)

    @property
    def loss(self) -> Tensor | None:
        """Σ g gᵀ over examples and positions, ``[groups, d_out, d_out]``."""
        return self._formed("loss")

    @loss.setter
    def loss(self, total: Tensor | None) -> None:
        self._set("loss", total)

    @property
    def jacobian_change(self) -> Tensor | None:
        """Σ (J − J⁰)ᵀ(J − J⁰) of the same passes, J⁰ of the network as it was."""
        return self._formed("jacobian_change")

    @jacobian_change.setter
    def jacobian_change(self, total: Tensor | None) -> None:
        self._set("jacobian_change", total)

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
            scale: Factor on every row.
        """
        self._outer.setdefault(kind, OuterSum()).add(rows, scale)

    def scale_outer(self, factor: float | Tensor, *kinds: Outer) -> None:
        """Multiply these sums, all of them if none is named, by ``factor``."""
        for kind in kinds or _OUTER:
            if kind in self._outer:
                self._outer[kind].scale(factor)

    def merge(self, other: Moments) -> None:
        """Add another layer's sums, taking its tensors over where there are none yet.

        Associative and commutative up to rounding. ``other`` must not be used afterwards.
        """
        self.gradient = _added(self.gradient, other.gradient)
        self.gradient_weight += other.gradient_weight
        for kind, total in other._outer.items():
            if kind in self._outer:
                self._outer[kind].merge(total)
            else:
                self._outer[kind] = total
        self.jacobian_rows += other.jacobian_rows
        self.loss_rows += other.loss_rows

    def without(self, other: Moments) -> Moments:
        """The sums less those of a part of them, in tensors of their own."""
        rest = Moments(
            gradient=_less(self.gradient, other.gradient),
            gradient_weight=self.gradient_weight - other.gradient_weight,
            jacobian_rows=self.jacobian_rows - other.jacobian_rows,
            loss_rows=self.loss_rows - other.loss_rows,
        )
        for kind in _OUTER:
            rest._set(kind, _less(self._formed(kind), other._formed(kind)))
        return rest

    def counts(self) -> Moments:
        """The counts without the sums."""
        return Moments(
            gradient_weight=self.gradient_weight,
            jacobian_rows=self.jacobian_rows,
            loss_rows=self.loss_rows,
        )

    def take_counts(self) -> Moments:
        """The counts alone, which are zero here afterwards."""
        counts = self.counts()
        self.gradient_weight, self.jacobian_rows, self.loss_rows = 0.0, 0, 0
        return counts

    def masked(self, taken: Tensor) -> Moments:
        """The sums where ``taken`` (0-dim, boolean), zeros elsewhere, whatever they held."""
        return self.map(lambda total: torch.where(taken, total, torch.zeros_like(total)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Moments:
        """The same sums with every tensor changed."""
        mapped = self.counts()
        if self.gradient is not None:
            mapped.gradient = change(self.gradient.detach())
        mapped._outer = {kind: total.map(change) for kind, total in self._outer.items()}
        return mapped

    def state_dict(self) -> dict[str, Any]:
        """Plain data and the tensors themselves."""
        return {
            "gradient": self.gradient,
            "gradient_weight": self.gradient_weight,
            "jacobian_rows": self.jacobian_rows,
            "loss_rows": self.loss_rows,
            "outer": {
                kind: {"matrix": total.known, "rows": list(total.kept)}
                for kind, total in self._outer.items()
            },
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Moments:
        """The way back from :meth:`state_dict`; the tensors are shared."""
        counts = {name: value for name, value in state.items() if name != "outer"}
        moments = cls(**counts)
        moments._outer = {
            kind: OuterSum(held["matrix"], held["rows"])
            for kind, held in state.get("outer", {}).items()
        }
        return moments

    def nbytes(self) -> int:
        """Bytes held by the sums."""
        gradient = self.gradient
        own = 0 if gradient is None else gradient.numel() * gradient.element_size()
        return own + sum(total.nbytes() for total in self._outer.values())

    def kept_rows(self) -> dict[Outer, Tensor]:
        """R with RᵀR the sum, ``[groups, n, d_out]``, of the sums whose rows are all kept still.

        Reading a sum itself lets its rows go.
        """
        kept = {kind: total.all_kept() for kind, total in self._outer.items()}
        return {kind: rows for kind, rows in kept.items() if rows is not None}

    def _formed(self, kind: Outer) -> Tensor | None:
        total = self._outer.get(kind)
        return None if total is None else total.form()

    def _set(self, kind: Outer, total: Tensor | None) -> None:
        self._outer.pop(kind, None)
        if total is not None:
            self._outer[kind] = OuterSum(total)


def _less(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return None
    return a.clone() if b is None else a - b


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)
