"""What a layer really multiplied: its functional call, seen from inside its forward.

A subclass may standardise, mask or re-parametrise its weight, or pad its input, before it calls
``F.linear`` or ``F.conv*d``. Reading the module's attributes would miss that (and reading a
parametrized weight can change the model's state), so such layers run under a function mode that
notes the arguments of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feature_probe.layers import LayerRule, conv_gradient, linear_gradient

_LINEAR = F.linear
_CONVOLUTIONS: dict[Callable[..., Any], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


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
    """

    weight_shape: torch.Size
    spatial: int
    stride: int | Sequence[int] = 1
    padding: str | int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1

    def weight_gradient(
        self, rule: LayerRule, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """∂L/∂W ``[groups, d_out, d_in]`` of the effective weight, from the call's own input."""
        if self.spatial == 0:
            return linear_gradient(inputs, output_gradient)
        if inputs.dim() == self.spatial + 1:
            inputs, output_gradient = inputs[None], output_gradient[None]
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
    """One call of ``F.linear`` or ``F.conv*d``: its input, its effective weight, its geometry."""

    inputs: Tensor
    weight: Tensor
    geometry: Geometry


class FunctionalTap(TorchFunctionMode):
    """Notes the linear and convolution calls made while it is active; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[FunctionalUse] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function, and note it if it is one of ours."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _LINEAR or func in _CONVOLUTIONS:
            self.uses.append(_parse(_CONVOLUTIONS.get(func, 0), args, kwargs))
        return result

    def single_use(self) -> FunctionalUse | None:
        """The call, if there was exactly one."""
        return self.uses[0] if len(self.uses) == 1 else None


def _parse(spatial: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionalUse:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    inputs, weight = given.pop("input"), given.pop("weight")
    given.pop("bias", None)
    return FunctionalUse(inputs, weight, Geometry(weight.shape, spatial, **given))


def functorch_active() -> bool:
    """Whether a torch.func transform is running, whose tensors are wrappers."""
    return torch._C._functorch.maybe_current_level() is not None
