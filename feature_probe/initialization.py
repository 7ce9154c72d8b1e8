"""Initial weights for deep linear chains: balanced between the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from feature_probe.errors import ConfigurationError

Scale = Literal["paper", "equal", "none"]
#: Power of the expected norms' quotient that W_1 is multiplied by.
_ROOTS: dict[str, float] = {"paper": 1 / 2, "equal": 1 / 4, "none": 0.0}
_FLOATS = (torch.float32, torch.float64)


def balanced_init_(
    layers: Sequence[nn.Linear | Tensor],
    *,
    scale: Scale = "paper",
    generator: torch.Generator | None = None,
) -> None:
    """Overwrite the weights of a linear chain so that W_l W_lᵀ = W_{l+1}ᵀ W_{l+1} for all l < L.

    Algorithm 1 of Tansley, Massart, Cartis, *On the Neural Feature Ansatz for Deep Neural
    Networks*, App. B: W_1 = U_1 Σ V_1ᵀ (the reduced SVD) stays, but for a factor, and
    W_l = U_l Σ U_{l−1}ᵀ, where U_l holds the leading d_1 columns of a Haar-distributed orthogonal
    matrix. By the paper's Lemma 3.1 a chain that starts balanced stays so under gradient flow, and
    then W_1ᵀW_1 = AGOP^{1/L} of the chain at every time (Theorem 3.1). Biases stay as they are.

    The factor is to make E‖W_1W_1ᵀ‖² equal to E‖W_2ᵀW_2‖², for entries of W_l drawn from
    U(−1/√d_l, 1/√d_l), d_l the inputs of layer l, which is PyTorch's own initialisation. By
    Lemma B.1 these are d_2(5d_1 + 5d_2 − 1)/(45d_1) and d_3(5d_2 + 5d_3 − 1)/(45d_2). They scale
    with the factor's fourth power, so that the factor is the fourth root of the second over the
    first; Eq. B.2 prints the square root, at which E‖W_1W_1ᵀ‖² is that quotient times
    E‖W_2ᵀW_2‖². Either is balanced.

    Args:
        layers: The chain, from input to output: two or more linears or their weights
            ``[d_{l+1}, d_l]``, in float32 or float64, all of one dtype and device, with d_1 ≤ d_l
            for all l. W_1 is read, the others only written.
        scale: The factor of W_1: "paper", Eq. B.2 as printed; "equal", the fourth root, at which
            the expectations are equal; "none", 1.
        generator: Draws the Haar columns, on the CPU; None: PyTorch's global one.

    Raises:
        ConfigurationError: If there are fewer than two layers, a layer is neither a linear nor a
            matrix, is there twice or has a weight that is computed, if dtypes or devices differ or
            the dtype is another, if sizes do not follow each other or one of them is below d_1, if
            W_1 is not finite, or for another ``scale``.
    """
    if scale not in _ROOTS:
        raise ConfigurationError(f"scale must be one of {sorted(_ROOTS)}, got {scale!r}")
    weights = [_weight(layer, number) for number, layer in enumerate(layers, start=1)]
    _check(weights)
    first = weights[0]
    width, inputs = first.shape
    outputs = weights[1].shape[0]
    with torch.no_grad():
        first.mul_((_norm(width, outputs) / _norm(inputs, width)) ** _ROOTS[scale])
        # in float64, so that the layers are balanced to the rounding of their own dtype
        left, values, _ = torch.linalg.svd(first.double(), full_matrices=False)
        for weight in weights[1:]:
            columns = _haar(weight.shape[0], inputs, generator).to(first.device)
            weight.copy_(columns * values @ left.T)
            left = columns


def _norm(inputs: int, outputs: int) -> float:
    """E‖WᵀW‖² of a W with PyTorch's initial weights (Lemma B.1)."""
    return outputs / inputs * (1 / 5 + (inputs + outputs - 2) / 9)


def _haar(size: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Leading columns of a Haar-distributed orthogonal matrix, ``[size, columns]`` float64.

    They are the Q factor of a Gaussian matrix of that shape whose R factor has a positive diagonal:
    Gram-Schmidt, column by column, is the same with or without the columns that follow.
    """
    gaussian = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(gaussian)
    # a diagonal of exactly zero has no sign to give: the column is kept
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    columns_of_haar: Tensor = basis * signs
    return columns_of_haar


def _weight(layer: object, number: int) -> Tensor:
    """The matrix of one layer, to be written to."""
    if isinstance(layer, nn.Linear):
        if "weight" not in dict(layer.named_parameters(recurse=False)):
            raise ConfigurationError(
                f"layer {number}: its weight is computed from other parameters; initialise before "
                "the parametrisation is registered"
            )
        return layer.weight
    if isinstance(layer, Tensor) and layer.dim() == 2:
        return layer
    given = list(layer.shape) if isinstance(layer, Tensor) else type(layer).__name__
    raise ConfigurationError(
        f"layer {number}: balanced_init_ takes nn.Linear or a weight [out, in], got {given}"
    )


def _check(weights: Sequence[Tensor]) -> None:
    """Refuse what the algorithm is not defined for."""
    if len(weights) < 2:
        raise ConfigurationError(
            f"balanced_init_ balances neighbouring layers: it needs two or more, got {len(weights)}"
        )
    if len({id(weight) for weight in weights}) < len(weights):
        raise ConfigurationError("a layer is there twice: its weight cannot be both of the chain's")
    first = weights[0]
    size = inputs = first.shape[1]
    for number, weight in enumerate(weights, start=1):
        if weight.dtype not in _FLOATS or weight.dtype != first.dtype:
            raise ConfigurationError(
                f"layer {number}: weights must all be float32 or all float64, got {weight.dtype} "
                f"(layer 1: {first.dtype})"
            )
        if weight.is_meta or weight.device != first.device:
            raise ConfigurationError(
                f"layer {number}: weights must hold data, on one device, got {weight.device} "
                f"(layer 1: {first.device})"
            )
        if weight.shape[1] != size:
            raise ConfigurationError(
                f"layer {number}: takes {weight.shape[1]} inputs, but the layer before gives {size}"
            )
        size = weight.shape[0]
        if size < inputs:
            raise ConfigurationError(
                f"layer {number}: gives {size} outputs, fewer than the chain's {inputs} inputs; "
                "Algorithm 1 needs d_1 ≤ every width (leave this layer out of the chain)"
            )
    if not bool(first.isfinite().all()):
        raise ConfigurationError("layer 1: the weight is not finite")
