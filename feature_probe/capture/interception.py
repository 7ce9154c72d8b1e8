"""Functional calls: what a weight was really multiplied with, seen while the model runs.

Module hooks do not see every matrix product. A subclass may standardise, mask or re-parametrise its
weight before it calls ``F.linear`` or ``F.conv*d``; attention multiplies by parts of a packed
projection; a model may write ``x @ self.w`` or ``F.linear(x, self.qkv.weight)``. A function mode,
active during a followed forward pass, notes such calls and changes nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn, overrides
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from feature_probe.layers.products import conv_gradient, linear_gradient
from feature_probe.layers.rules import LayerRule
from feature_probe.layers.transposed import transposed_conv_gradient

_TRANSPOSED: dict[Callable[..., Any], int] = {
    F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3,
}  # fmt: skip
_CONVOLUTIONS: dict[Callable[..., Any], int] = {
    F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, **_TRANSPOSED,
}  # fmt: skip
#: Functions whose last two tensors are multiplied as matrices.
_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm),
        *(torch.addmm, torch.Tensor.addmm, torch.Tensor.__rmatmul__),
        *(torch.mv, torch.Tensor.mv),
    }
)
#: Functions that multiply by matrices in forms that are not read.
_UNREAD: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.einsum, torch.tensordot, torch.inner, torch.Tensor.inner),
        *(torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.Tensor.baddbmm),
        *(torch.chain_matmul, torch.linalg.multi_dot),
    }
)
_CALLS = frozenset({F.linear, *_CONVOLUTIONS}) | _PRODUCTS | _UNREAD


@dataclass(frozen=True)
class Geometry:
    """How a functional call applied its weight.

    Attributes:
        weight_shape: Shape of the weight as it was given.
        spatial: Number of spatial axes, 0 for ``F.linear``.
        stride: As given.
        padding: As given: numbers or "same" or "valid".
        dilation: As given.
        groups: As given.
        transposed: Whether it was a transposed convolution.
    """

    weight_shape: torch.Size
    spatial: int
    stride: int | Sequence[int] = 1
    padding: str | int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    transposed: bool = False

    def weight_gradient(
        self, rule: LayerRule, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """∂L/∂W ``[groups, d_out, d_in]`` of the effective weight, from the call's own input."""
        if self.spatial == 0:
            return linear_gradient(inputs, output_gradient)
        if inputs.dim() == self.spatial + 1:
            inputs, output_gradient = inputs[None], output_gradient[None]
        if self.transposed:
            return rule.matrix(module, self._transposed_gradient(inputs, output_gradient))
        padded = F.pad(inputs, self._pads())
        gradient = conv_gradient(
            padded,
            output_gradient,
            self.weight_shape,
            self._per_axis(self.stride),
            self._per_axis(self.dilation),
            self.groups,
        )
        return rule.matrix(module, gradient)

    def _transposed_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)  # torch has no "same" here
        return transposed_conv_gradient(
            inputs,
            output_gradient,
            self.weight_shape,
            self._per_axis(self.stride),
            self._per_axis(self.padding),
            self._per_axis(self.dilation),
            self.groups,
        )

    def _per_axis(self, value: int | Sequence[int]) -> tuple[int, ...]:
        if isinstance(value, int):
            return (value,) * self.spatial
        return tuple(value) * (self.spatial if len(value) == 1 else 1)

    def _pads(self) -> list[int]:
        """Padding in ``F.pad`` order, last axis first; "same" puts the odd one on the right."""
        pairs = []
        for axis in range(self.spatial):
            if self.padding == "same":
                extent = self.weight_shape[2 + axis] - 1
                total = self._per_axis(self.dilation)[axis] * extent
                pairs.append((total // 2, total - total // 2))
            elif isinstance(self.padding, str):
                pairs.append((0, 0))
            else:
                pairs.append((self._per_axis(self.padding)[axis],) * 2)
        return [side for pair in reversed(pairs) for side in pair]


@dataclass(frozen=True, eq=False)
class FunctionalUse:
    """One functional product with a tensor that may be a weight.

    Attributes:
        inputs: What it was multiplied with.
        weight: The tensor that may be a weight, as it was given.
        geometry: How it was applied.
        side: "rows": z = h wᵀ, as in ``F.linear``, and convolutions. "columns": z = h w. "left":
            z = w h with examples and positions behind the features.
        attention: ``(target length, batch)`` inside ``F.multi_head_attention_forward``, where rows
            run over positions first; else None.
    """

    inputs: Tensor
    weight: Tensor
    geometry: Geometry
    side: Literal["rows", "columns", "left"] = "rows"
    attention: tuple[int, int] | None = None


class OnCall(Protocol):
    """Told of a functional product; may return a replacement of its value."""

    def __call__(self, call: FunctionalCall, value: Any) -> Tensor | None:
        """``value`` is what the call returned."""


class FunctionalTrace(TorchFunctionMode):
    """Tells ``on_call`` of every product that may involve a weight, while it is active."""

    def __init__(self, on_call: OnCall) -> None:
        super().__init__()
        self._on_call = on_call
        self._attention: tuple[int, int] | None = None
        self._telling = False
        self._cleaning: RemovableHandle | None = None

    @property
    def active(self) -> bool:
        """Whether it is among the active modes."""
        return _is_active(self)

    def leave(self) -> None:
        """Take the mode off, wherever it is among the active ones.

        While ``on_call`` is told of a call, torch holds the mode and puts it back afterwards, so
        that it can only be taken off when the module that runs returns.
        """
        if self._telling:
            self._cleaning = register_module_forward_hook(self._after_module, always_call=True)
        else:
            _take_off(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function, and tell of it if it is a product."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        result = func(*args, **kwargs)
        if func in _CALLS:
            replacement = self._tell(FunctionalCall(func, args, kwargs, self._attention), result)
            return result if replacement is None else replacement
        return result

    def _tell(self, call: FunctionalCall, value: Any) -> Tensor | None:
        self._telling = True
        try:
            return self._on_call(call, value)
        finally:
            self._telling = False

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module returned after the mode was to leave; output None: it may be raising."""
        _take_off(self)
        # while torch handles an exception it iterates over these hooks: gone after the next module
        if output is not None and self._cleaning is not None:
            self._cleaning.remove()
            self._cleaning = None

    def _inside_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run attention's own code with this mode on: torch runs it with the mode off."""
        query = args[0] if args else kwargs["query"]
        outer, self._attention = self._attention, None
        if query.dim() == 3:
            self._attention = (query.shape[0], query.shape[1])
        try:
            with self:
                return _attention_forward(*args, **kwargs)
        finally:
            self._attention = outer


def fused_encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    """torch's encoders that may run as one fused kernel in the midst of training: frozen, in eval.

    Any hook on their layers or function mode would have them run layer by layer instead, which
    rounds otherwise and, with padding, returns other numbers where there is padding.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder)
        and module is not model
        and not any(part.training for part in module.modules())
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def _take_off(mode: TorchFunctionMode) -> None:
    """Remove a mode from the active ones; those that the user put on after it stay on."""
    if not _is_active(mode):
        return
    above: list[Any] = []
    while (top := overrides._pop_mode()) is not mode:  # type: ignore[no-untyped-call]
        above.append(top)
    for other in reversed(above):
        overrides._push_mode(other)  # type: ignore[no-untyped-call]


def _is_active(mode: TorchFunctionMode) -> bool:
    active = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(one is mode for one in active)


def _transparent(function: Any) -> Callable[..., Any]:
    """The same function, which does not hand over to an active function mode as a whole."""
    own = dict(function.__globals__)
    own["has_torch_function"] = lambda _: False
    copy = types.FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_attention_forward = _transparent(F.multi_head_attention_forward)


@dataclass(frozen=True, eq=False)
class FunctionalCall:
    """A call of one of the functions that multiply by a weight, as it was made."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attention: tuple[int, int] | None

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__name__", self.function))

    def tensors(self) -> list[Tensor]:
        """Its tensor arguments, those in lists as well."""
        given = (*self.args, *self.kwargs.values())
        nested = (v if isinstance(v, (list, tuple)) else (v,) for v in given)
        return [value for values in nested for value in values if isinstance(value, Tensor)]

    def readings(self) -> list[FunctionalUse]:
        """The ways in which the call can be a product with a weight."""
        if self.function in _UNREAD:
            return []
        if self.function is F.linear or self.function in _CONVOLUTIONS:
            spatial = _CONVOLUTIONS.get(self.function, 0)
            transposed = self.function in _TRANSPOSED
            return [_parse(spatial, self.args, self.kwargs, self.attention, transposed=transposed)]
        swapped = self.function is torch.Tensor.__rmatmul__
        return list(_factors(self.args[::-1] if swapped else self.args, self.kwargs))


def _factors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[FunctionalUse]:
    names = ("input", "mat1", "mat2", "other", "tensor2")
    given = (*args, *(kwargs[name] for name in names if name in kwargs))
    tensors = [value for value in given if isinstance(value, Tensor)][-2:]
    if len(tensors) < 2:
        return
    a, b = tensors
    if b.dim() == 2:
        yield FunctionalUse(a, b, Geometry(b.shape, 0), "columns")
    if a.dim() == 2:
        yield FunctionalUse(b, a, Geometry(a.shape, 0), "left")


def _parse(
    spatial: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attention: tuple[int, int] | None,
    *,
    transposed: bool,
) -> FunctionalUse:
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if transposed:
        names = (*names[:5], "output_padding", "groups", "dilation")
    given = dict(zip(names, args, strict=False)) | kwargs
    inputs, weight = given.pop("input"), given.pop("weight")
    for name in ("bias", "output_padding"):
        given.pop(name, None)
    geometry = Geometry(weight.shape, spatial, **given, transposed=transposed)
    return FunctionalUse(inputs, weight, geometry, attention=attention)


def functorch_active() -> bool:
    """Whether a torch.func transform is running, whose tensors are wrappers."""
    return torch._C._functorch.maybe_current_level() is not None
