"""Layer rules: how a module's weight, outputs and gradients become canonical arrays.

A rule turns one layer type into matrices on rows: the weight as ``[groups, d_out, d_in]`` and an
output-shaped tensor as rows ``[n, positions, groups, d_out]``. Everything after it is written once.
Rules sit in a registry that users extend for their own layer types::

    class TransposedLinear(nn.Module):                  # weight stored as [d_in, d_out]
        def forward(self, x):
            return x @ self.weight

    class TransposedLinearRule(LinearRule):
        def matrix(self, module, weight):               # z = W h with W = weightᵀ
            return weight.mT[None]

    register_layer_rule(TransposedLinear, TransposedLinearRule())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe.errors import ConfigurationError


class LayerRule(Protocol):
    """What the probe must know about a layer type that multiplies its input by a weight matrix."""

    @property
    def parameter(self) -> str:
        """Name of the attribute that holds the weight."""

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight as W with z = W h, shape ``[groups, d_out, d_in]``."""

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """∂L/∂W from the gradient of the stored weight, shape ``[groups, d_out, d_in]``."""

    def rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """An output-shaped tensor as rows, shape ``[n, positions, groups, d_out]``."""

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """∂L/∂W = Σ g hᵀ from the layer's input and ∂L/∂output, ``[groups, d_out, d_in]``."""


class LinearRule:
    """``nn.Linear`` on ``[..., d_in]``; the first axis is the example, the others positions."""

    parameter = "weight"

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """``weight [d_out, d_in]`` as one group."""
        return weight[None]

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient has the weight's layout."""
        return self.matrix(module, gradient)

    def rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """``[n, ..., d_out]`` as ``[n, positions, 1, d_out]``; ``[d_out]`` is one example."""
        examples = output.shape[0] if output.dim() > 1 else 1
        return output.reshape(examples, -1, 1, output.shape[-1])

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """gᵀh over all rows."""
        return linear_gradient(inputs, output_gradient)


class ConvRule:
    """``nn.Conv1d/2d/3d`` as a matrix on patches: a row per example and output position.

    W is ``weight.reshape(groups, d_out, -1)``: an input patch is ordered by channel, then by kernel
    offset. A grouped convolution is block-diagonal, one block a group.
    """

    parameter = "weight"

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """``weight [C_out, C_in/groups, *kernel]`` as ``[groups, C_out/groups, d_in]``."""
        groups = _conv(module).groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient has the weight's layout."""
        return self.matrix(module, gradient)

    def rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """``[n, C, *spatial]`` as ``[n, positions, groups, C/groups]``; no n is one example."""
        conv = _conv(module)
        if output.dim() == len(conv.kernel_size) + 1:
            output = output[None]
        channels_last = output.movedim(1, -1)
        return channels_last.reshape(
            output.shape[0], -1, conv.groups, output.shape[1] // conv.groups
        )

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """Σ g hᵀ over patches, by the convolution's own weight-gradient kernel."""
        conv = _conv(module)
        if inputs.dim() == len(conv.kernel_size) + 1:
            inputs, output_gradient = inputs[None], output_gradient[None]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
        weight = conv_gradient(
            padded, output_gradient, conv.weight.shape, conv.stride, conv.dilation, conv.groups
        )
        return self.gradient_matrix(module, weight)


def linear_gradient(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """Σ g hᵀ of rows ``[..., d_in]`` and ``[..., d_out]``, shape ``[1, d_out, d_in]``."""
    g = output_gradient.reshape(-1, output_gradient.shape[-1])
    h = inputs.reshape(-1, inputs.shape[-1])
    return (g.mT @ h)[None]


def conv_gradient(
    padded: Tensor,
    output_gradient: Tensor,
    weight_shape: torch.Size,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of a convolution's weight, for an input that is padded already.

    Args:
        padded: Input, shape ``[n, C_in, *spatial]``, padding included.
        output_gradient: ∂L/∂output, shape ``[n, C_out, *spatial_out]``.
        weight_shape: ``[C_out, C_in/groups, *kernel]``.
        stride: Per spatial axis.
        dilation: Per spatial axis.
        groups: Number of groups.

    Returns:
        The gradient, shape ``weight_shape``.
    """
    dims = padded.dim() - 2
    # the kernel wants a weight for its shape only: one element, expanded
    weight = torch.empty(1, dtype=padded.dtype, device=padded.device).expand(weight_shape)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        output_gradient, padded, weight, None, list(stride), [0] * dims, list(dilation),
        False, [0] * dims, groups, [False, True, False],
    )[1]  # fmt: skip
    return gradient


def _conv(module: nn.Module) -> Any:
    """The module as the convolution the rule was registered for."""
    return module


_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LinearRule(),
    nn.Conv1d: ConvRule(),
    nn.Conv2d: ConvRule(),
    nn.Conv3d: ConvRule(),
}


def register_layer_rule(layer_type: type[nn.Module], rule: LayerRule) -> None:
    """Teach the probe a layer type; its subclasses are taken too. Replaces an earlier rule.

    Args:
        layer_type: The module class. Its ``forward`` must be linear in the weight that the rule
            names (plus a bias), returning one tensor.
        rule: How weight, output and gradients become canonical arrays.

    Raises:
        ConfigurationError: if ``layer_type`` is not a subclass of ``nn.Module``.
    """
    given: object = layer_type
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise ConfigurationError(f"layer_type must be an nn.Module class, got {layer_type!r}")
    _RULES[layer_type] = rule


def unregister_layer_rule(layer_type: type[nn.Module]) -> None:
    """Forget a rule given to :func:`register_layer_rule`.

    Raises:
        ConfigurationError: if there is none for exactly this type.
    """
    if layer_type not in _RULES:
        raise ConfigurationError(f"no rule is registered for {layer_type!r}")
    del _RULES[layer_type]


def known_layer_types() -> tuple[type[nn.Module], ...]:
    """The layer types that have a rule."""
    return tuple(_RULES)


def find_rule(module: nn.Module) -> tuple[type[nn.Module], LayerRule] | None:
    """The registered type nearest in the module's class hierarchy, and its rule."""
    for kind in type(module).__mro__:
        if kind in _RULES:
            return kind, _RULES[kind]
    return None
