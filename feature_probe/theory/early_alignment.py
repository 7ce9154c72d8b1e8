"""How fast the init-centred NFA sets in: its second derivatives at initialisation.

At initialisation W_c = W − W₀ is zero, and with it W_cᵀW_c, W_cᵀKW_c and their first derivatives.
Under gradient flow Ẇ = −G the second derivatives are 2·GᵀG and 2·GᵀKG (Proposition 3 of Beaglehole,
Mitliagkas and Agarwala, "Gradient descent induces alignment between weights and the pre-activation
tangents", below: the C-NFA paper), so that their cosine is where the init-centred NFA starts.

Here it is in the paper's dual form, which is n × n, and not the probe's, which is d_out × d_out.
Rows run over examples i, outputs c and positions p: ``jacobian`` 𝒥 holds ∂f_ic/∂z_ip, ``inputs`` H
the layer's input h_ip, the same for all c, and ``derivatives`` r the ∂ℓ_i/∂f_ic of the loss
(1/n) Σ ℓ_i, the same for all p. With 𝒦 = 𝒥𝒥ᵀ and R = diag(r)

    G = 𝒥ᵀRH/n,  K = 𝒥ᵀ𝒥/n,  GᵀG = HᵀR𝒦RH/n²,  GᵀKG = HᵀR𝒦²RH/n³,

Eq. 3 for any loss and any number of outputs and positions. (Adding 𝒦 over outputs into an n × n
matrix first, as the paper's notation for one output suggests, is wrong for more than one.) One
block of weights; a grouped layer has one such pair a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, positive_integer

__all__ = [
    "AlignmentSpeed",
    "ExpectedKernel",
    "dual_alignment_speed",
    "expected_kernel",
    "kernel_alignment_speed",
    "zero_output_alignment_speed",
]


@dataclass(frozen=True, eq=False)
class AlignmentSpeed:
    """Half the second derivatives at initialisation of the two sides of the init-centred NFA.

    Attributes:
        nfm: GᵀG = ½ d²/dt² (W_cᵀW_c), ``[d_in, d_in]``.
        agop: GᵀKG = ½ d²/dt² (W_cᵀKW_c), ``[d_in, d_in]``.
    """

    nfm: Tensor
    agop: Tensor

    @property
    def cosine(self) -> float:
        """ρ(GᵀG, GᵀKG), between 0 and 1 as K is positive; NaN where either is zero."""
        sizes = float(self.nfm.norm()), float(self.agop.norm())
        if not all(sizes):
            return float("nan")
        return float(((self.nfm / sizes[0]) * (self.agop / sizes[1])).sum())


@dataclass(frozen=True, eq=False)
class ExpectedKernel:
    """Averages of the tangent kernel 𝒦 over networks drawn at initialisation.

    Attributes:
        mean: E[𝒦], ``[m, m]`` with m rows of the Jacobian.
        mean_square: E[𝒦²], ``[m, m]``.
        draws: How many networks.
    """

    mean: Tensor
    mean_square: Tensor
    draws: int


def dual_alignment_speed(
    jacobian: Tensor, inputs: Tensor, derivatives: Tensor, examples: int
) -> AlignmentSpeed:
    """Rows of Jacobian, input and loss derivative to GᵀG and GᵀKG (C-NFA paper, Eq. 3).

    Memory m² for m rows, besides d_in².

    Args:
        jacobian: 𝒥, ``[m, d_out]``, a row for each example, output and position.
        inputs: H, ``[m, d_in]``.
        derivatives: r, ``[m]``, of the loss of each example, not divided by n.
        examples: n, over which loss and K are means.

    Raises:
        ConfigurationError: if the shapes do not fit, or ``examples`` is no positive integer.
    """
    if jacobian.dim() != 2:
        raise ConfigurationError(
            f"jacobian must be [rows, d_out], got shape {tuple(jacobian.shape)}"
        )
    return kernel_alignment_speed(jacobian @ jacobian.T, inputs, derivatives, examples)


def zero_output_alignment_speed(jacobian: Tensor, inputs: Tensor, labels: Tensor) -> AlignmentSpeed:
    """The same for one output, ℓ = ½(f − y)² and outputs of zero (C-NFA paper, Eq. 4): r = −y.

    The paper's Eq. 4 drops the factors 1/n² and 1/n³, and Eq. 10 prints −½ for the exponents +½ of
    its denominator.

    Args:
        jacobian: ∂f_i/∂z_i, ``[n, d_out]``.
        inputs: ``[n, d_in]``.
        labels: y, ``[n]``.

    Raises:
        ConfigurationError: if the shapes do not fit.
    """
    return dual_alignment_speed(jacobian, inputs, -labels, len(labels))


def kernel_alignment_speed(
    kernel: Tensor,
    inputs: Tensor,
    derivatives: Tensor,
    examples: int,
    kernel_square: Tensor | None = None,
) -> AlignmentSpeed:
    """HᵀR𝒦RH/n² and HᵀR𝒦²RH/n³ of a given 𝒦 (C-NFA paper, Eq. 3, 5 and App. C).

    With 𝒦 of one network this is that network's. With E[𝒦] in its place it is the first-order
    prediction of App. C, "in which K is replaced by its expectation", for any depth and activation;
    with E[𝒦²] as ``kernel_square`` besides, the first term of Eq. 5, in which each side is averaged
    over initialisations before the cosine is taken. Both leave out how the two sides vary together,
    and are the same at infinite width.

    Args:
        kernel: 𝒦 or E[𝒦], ``[m, m]``.
        inputs: H, ``[m, d_in]``.
        derivatives: r, ``[m]``; those of all networks averaged over, as of zero outputs.
        examples: n.
        kernel_square: What stands for 𝒦², ``[m, m]``; None: the square of ``kernel``.

    Raises:
        ConfigurationError: if the shapes do not fit, or ``examples`` is no positive integer.
    """
    positive_integer("examples", examples)
    rows = len(inputs)
    if inputs.dim() != 2 or derivatives.shape != (rows,):
        raise ConfigurationError(
            "inputs must be [rows, d_in] and derivatives [rows], got shapes "
            f"{tuple(inputs.shape)} and {tuple(derivatives.shape)}"
        )
    for name, matrix in (("kernel", kernel), ("kernel_square", kernel_square)):
        if matrix is not None and matrix.shape != (rows, rows):
            raise ConfigurationError(
                f"{name} must be [{rows}, {rows}], a row for each of the inputs', got shape "
                f"{tuple(matrix.shape)}"
            )
    weighted = derivatives[:, None] * inputs
    once = kernel @ weighted
    twice = once.T @ once if kernel_square is None else weighted.T @ kernel_square @ weighted
    return AlignmentSpeed(weighted.T @ once / examples**2, twice / examples**3)


def expected_kernel(jacobians: Iterable[Tensor]) -> ExpectedKernel:
    """Jacobian rows of networks drawn at initialisation to the averages of 𝒦 and 𝒦².

    Args:
        jacobians: 𝒥 of each network on the same rows, ``[m, d_out]``, one at a time; the widths
            d_out need not agree.

    Raises:
        ConfigurationError: if there is none, or their numbers of rows differ.
    """
    mean: Tensor | None = None
    square: Tensor | None = None
    draws = 0
    for jacobian in jacobians:
        kernel = jacobian @ jacobian.T
        if mean is None or square is None:
            mean, square = torch.zeros_like(kernel), torch.zeros_like(kernel)
        if kernel.shape != mean.shape:
            raise ConfigurationError(
                f"all networks must be on the same rows: {len(mean)} rows, then {len(kernel)}"
            )
        draws += 1
        mean += kernel
        square += kernel @ kernel
    if mean is None or square is None:
        raise ConfigurationError("no network was given to average over")
    return ExpectedKernel(mean / draws, square / draws, draws)
