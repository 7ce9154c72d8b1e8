"""Transposed convolutions as matrices: the rule, and the columns that their fold adds up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe.layers.products import conv_gradient


class ConvTransposeRule:
    """``nn.ConvTranspose1d/2d/3d``: each input position h_p becomes a column z_p = W h_p.

    The output is the fold of the columns: entry (channel, kernel offset) of z_p is added where the
    kernel puts it. So d_out is ``C_out/groups × kernel``, d_in is ``C_in/groups``, and the rows of
    an output-shaped gradient are what the columns read of it, zero where padding crops an entry
    away. A row per example and input position; the bias is added after the fold.
    """

    parameter = "weight"

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """``weight [C_in, C_out/groups, *kernel]`` as ``[groups, d_out, C_in/groups]``."""
        conv: Any = module
        groups = conv.groups
        return weight.reshape(groups, weight.shape[0] // groups, -1).mT

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient has the weight's layout."""
        return self.matrix(module, gradient)

    def rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """``[n, C, *spatial]`` as ``[n, positions, groups, d_out]``; no n is one example.

        Positions follow from the output's size. That is unique, whether or not ``forward`` was
        given an ``output_size``, unless the module's own output padding reaches its stride; then
        ``output_size`` is taken not to have been given.
        """
        conv: Any = module
        if output.dim() == len(conv.kernel_size) + 1:
            output = output[None]
        sizes = self._positions(conv, output.shape[2:])
        patches = columns(output, sizes, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        examples, channels = output.shape[:2]
        by_group = patches.reshape(
            examples, conv.groups, channels // conv.groups, math.prod(sizes), -1
        )
        return by_group.permute(0, 3, 1, 2, 4).flatten(3)

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """Σ g hᵀ over input positions, by the weight gradient of the adjoint convolution."""
        conv: Any = module
        if inputs.dim() == len(conv.kernel_size) + 1:
            inputs, output_gradient = inputs[None], output_gradient[None]
        shape = (conv.in_channels, conv.out_channels // conv.groups, *conv.kernel_size)
        weight = transposed_conv_gradient(
            inputs, output_gradient, shape, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        return self.gradient_matrix(module, weight)

    def declared_shape(self, module: Any) -> tuple[int, int, int]:
        """The shape of W by the module's channels, groups and kernel."""
        groups, taps = module.groups, math.prod(module.kernel_size)
        return groups, module.out_channels // groups * taps, module.in_channels // groups

    def _positions(self, conv: Any, output_sizes: Sequence[int]) -> list[int]:
        """The input's sizes, from the output's."""
        sizes = []
        for axis, length in enumerate(output_sizes):
            span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
            free, stride = length + 2 * conv.padding[axis] - span, conv.stride[axis]
            own = free - conv.output_padding[axis]
            sizes.append((own if own % stride == 0 else free) // stride + 1)
        return sizes


def transposed_conv_gradient(
    inputs: Tensor,
    output_gradient: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of a transposed convolution's weight: that of its adjoint, with the roles changed.

    The convolution with the same weight takes ∂L/∂output to ∂L/∂inputs, so its weight gradient with
    the output gradient as input and the inputs as output gradient is Σ g hᵀ.

    Args:
        inputs: Shape ``[n, C_in, *spatial]``.
        output_gradient: ∂L/∂output, shape ``[n, C_out, *spatial_out]``.
        weight_shape: ``[C_in, C_out/groups, *kernel]``.
        stride: Per spatial axis.
        padding: What is cropped from either end of the output, per spatial axis.
        dilation: Per spatial axis.
        groups: Number of groups.

    Returns:
        The gradient, shape ``weight_shape``.
    """
    spans = _spans(weight_shape[2:], dilation)
    full = uncropped(output_gradient, inputs.shape[2:], spans, stride, padding)
    return conv_gradient(full, inputs, weight_shape, stride, dilation, groups)


def columns(
    output: Tensor,
    sizes: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What each input position of a transposed convolution reads of an output-shaped tensor.

    The adjoint of the fold that adds the columns up into the output. An entry that padding crops
    away is in no output and reads zero.

    Args:
        output: Shape ``[n, C, *spatial_out]``.
        sizes: Input positions, per spatial axis.
        kernel_size: Per spatial axis.
        stride: Per spatial axis.
        padding: What is cropped from either end of the output, per spatial axis.
        dilation: Per spatial axis.

    Returns:
        A view where nothing is cropped, shape ``[n, C, *sizes, *kernel_size]``.
    """
    spans = _spans(kernel_size, dilation)
    windows = uncropped(output, sizes, spans, stride, padding)
    for axis, span in enumerate(spans):
        # the axis shrinks to the positions; the taps of the kernel go to the end
        windows = windows.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
    return windows


def uncropped(
    output: Tensor,
    sizes: Sequence[int],
    spans: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The output with zeros where padding cropped it, cut to what the columns reach."""
    for axis, (size, span) in enumerate(zip(sizes, spans, strict=True)):
        before = padding[axis]
        after = (size - 1) * stride[axis] + span - before - output.shape[2 + axis]
        pads = [0, 0] * (len(sizes) - 1 - axis) + [before, max(after, 0)]
        output = F.pad(output, pads) if any(pads) else output
        if after < 0:  # output padding: no column reaches these
            output = output.narrow(2 + axis, 0, output.shape[2 + axis] + after)
    return output


def _spans(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """How far a kernel reaches, per spatial axis."""
    return [step * (side - 1) + 1 for side, step in zip(kernel_size, dilation, strict=True)]
