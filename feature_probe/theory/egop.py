"""The expected gradient outer product of a function that is known, by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.theory.matrices import to_algebra


def egop(function: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int = 1024) -> Tensor:
    """(1/n) Σ_i Σ_c ∇f_c(x_i) ∇f_c(x_i)ᵀ, the expected gradient outer product of a target function.

    Eq. 2 of Beaglehole, Mitliagkas and Agarwala, "Gradient descent induces alignment between
    weights and the pre-activation tangents"; for several outputs Σ_i J_iᵀJ_i/n, as the AGOP is.

    Cost: one forward pass, and one backward pass for each output coordinate.

    Args:
        function: f, of a batch ``[b, ...]`` to ``[b]``, ``[b, 1]`` or ``[b, ...]``, differentiable
            by autograd, in which examples do not interact. Gradients of its own parameters, if it
            has any, are not touched.
        inputs: x, shape ``[n, ...]``, of a floating-point type; d is the number of entries of one.
        batch_size: Most examples in one call of ``function``.

    Returns:
        ``[d, d]``, symmetric and positive semi-definite, in float64 on the inputs' device (on
        the CPU where that has no float64).

    Raises:
        ConfigurationError: for inputs without examples or not of a floating-point type, and for a
            function that does not return one row per example or that autograd cannot follow.
    """
    positive_integer("batch_size", batch_size)
    if inputs.dim() < 2 or not inputs.numel() or not inputs.is_floating_point():
        raise ConfigurationError(
            "inputs must be [n, ...] of a floating-point type, got shape "
            f"{list(inputs.shape)} of {inputs.dtype}"
        )
    size = inputs[0].numel()
    total = to_algebra(inputs.new_zeros(size, size))
    with torch.inference_mode(False), torch.enable_grad():
        for batch in torch.split(inputs, batch_size):
            x = batch.detach().clone().requires_grad_()
            for column in _columns(function(x), x):
                (gradient,) = torch.autograd.grad(
                    column.sum(), x, retain_graph=True, materialize_grads=True
                )
                rows = to_algebra(gradient.flatten(1))
                total += rows.mT @ rows
    return total / len(inputs)


def _columns(out: object, x: Tensor) -> list[Tensor]:
    """The coordinates of the output, ``[b]`` each."""
    if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != x.shape[0]:
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigurationError(
            f"the function must return one row per example, got {shape} for {x.shape[0]} examples"
        )
    if not out.requires_grad:
        raise ConfigurationError(
            "the function's output does not depend on its input as autograd sees it: compute it "
            "from the tensor that is given, without detach(), no_grad() or numpy"
        )
    return list(out.flatten(1).unbind(1)) if out.dim() > 1 else [out]
