"""Σ g hᵀ of a linear layer and of a convolution: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_gradient(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """Σ g hᵀ of rows ``[..., d_in]`` and ``[..., d_out]``, shape ``[1, d_out, d_in]``."""
    g = output_gradient.reshape(-1, output_gradient.shape[-1])
    h = inputs.reshape(-1, inputs.shape[-1])
    return (g.mT @ h)[None]


def conv_gradient(
    padded: Tensor,
    output_gradient: Tensor,
    weight_shape: Sequence[int],
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
    weight = torch.empty(1, dtype=padded.dtype, device=padded.device).expand(*weight_shape)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        output_gradient, padded, weight, None, list(stride), [0] * dims, list(dilation),
        False, [0] * dims, groups, [False, True, False],
    )[1]  # fmt: skip
    return gradient
