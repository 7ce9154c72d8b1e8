"""J − J⁰: products of the network as it was before training, beside those of the network it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from feature_probe.capture.passes import InitialPass, in_order
from feature_probe.capture.selection import select_output
from feature_probe.sums.jacobian import vector_jacobian_products
from feature_probe.sums.outer import sum_dtype

_NOT_RUN = "the network as it was before training was not run on the same inputs"
_NOT_CALLED = "the network as it was before training did not use the layer as often"


class InitialJacobian:
    """Products vᵀJ⁰ of the initial network with respect to the same calls' outputs.

    The vectors must be those of the products that they are subtracted from: with others the sum is
    K + K⁰ in place of K̄ (C-NFA paper, App. B).

    Args:
        initial: The initial network's pass on the same inputs, or None.
        names: The layer of each call of the network as it is, in their order.
        f: That network's output.
        output: Picks f out of what the initial network returned.

    Attributes:
        problems: Of each call, why there is no J⁰; "" if there is.
    """

    def __init__(
        self,
        initial: InitialPass | None,
        names: Sequence[str],
        f: Tensor,
        output: Callable[[Any], Any] | None,
    ) -> None:
        self._initial = InitialPass(problem=_NOT_RUN) if initial is None else initial
        self._keys = in_order(names)
        problem = self._initial.problem
        if not problem:
            self._f = select_output(self._initial.output, output)
            problem = _unlike(self._f, f)
        self.problems = [
            problem or ("" if key in self._initial.calls else _NOT_CALLED) for key in self._keys
        ]

    def differences(self, v: Tensor, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Rows of vᵀ(J − J⁰) of each call, in the precision of the sums.

        Args:
            v: With the shape of f.
            rows: Rows of vᵀJ ``[n, positions, groups, d_out]``, None where it is zero.

        Returns:
            The same of the difference; None where both are zero, and where there is no J⁰.
        """
        known = [i for i, problem in enumerate(self.problems) if not problem]
        held = [self._initial.calls[self._keys[i]] for i in known]
        edges = [edge for _, edge in held]
        with self._initial.aside():
            products = vector_jacobian_products(self._f, edges, v.to(self._f.dtype))
        found: list[Tensor | None] = [None] * len(rows)
        for index, (call, _), product in zip(known, held, products, strict=True):
            before = None if product is None else call.rows(product)
            found[index] = _less(rows[index], before)
        return found


def _less(now: Tensor | None, before: Tensor | None) -> Tensor | None:
    """One less the other, None standing for zero; in float32 or better."""
    some = before if now is None else now
    if some is None:
        return None
    zero = torch.zeros_like(some)
    one, other = (zero if t is None else t for t in (now, before))
    dtype = sum_dtype(some.dtype)
    return one.to(dtype) - other.to(dtype)


def _unlike(initial: Tensor, f: Tensor) -> str:
    """Why products of the two outputs cannot be compared, or ""."""
    if initial.shape != f.shape:
        return (
            f"for the same inputs the network as it was before training returned f of shape "
            f"{list(initial.shape)}, where it is {list(f.shape)} now"
        )
    return "" if initial.requires_grad else "the initial network's output carries no gradient"
