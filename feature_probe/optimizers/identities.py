"""Identities of the trajectory: what the weights alone say about the gradients that moved them.

Notation, for the steps t = 0, ..., T−1 of a window: W_t the weights before step t, G_t the gradient
of the loss without decay that the optimizer saw (clipped, unscaled, averaged), λ the coupled weight
decay, D_t = G_t + λW_t what torch's coupled optimizers work on; η_t the learning rate, μ the
momentum, δ the dampening, b_t the momentum buffer after step t (b₋ before the window, b₊ after it).
All functions are pure and take tensors of one shape, best in float64: the sums cancel.

Each identity follows from the update rule of ``torch.optim`` by summation over t and holds exactly,
for any schedule of η; μ, δ and λ are constant unless said otherwise. Because the sum of D_t is a
difference of end states, its mean is small over a long window for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError


def scaled_shift(weights: Sequence[Tensor], learning_rates: Sequence[float]) -> Tensor:
    """S = Σ_t (W_t − W_{t+1})/η_t, which is (W_0 − W_T)/η only for constant η.

    In a loop, add (W_t − W_{t+1})/η_t at every step instead of keeping the weights.

    Args:
        weights: W_0, ..., W_T.
        learning_rates: η_0, ..., η_{T−1}, none of them 0.

    Raises:
        ConfigurationError: if there is not one more of the weights than of the learning rates.
    """
    if len(weights) != len(learning_rates) + 1 or len(weights) < 2:
        raise ConfigurationError(
            f"{len(learning_rates)} steps have {len(learning_rates) + 1} weights, "
            f"got {len(weights)}"
        )
    terms = [
        (before - after) / rate
        for before, after, rate in zip(weights, weights[1:], learning_rates, strict=False)
    ]
    return torch.stack(terms).sum(0)


def sgd_sum(
    shift: Tensor,
    before: Tensor | None = None,
    after: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> Tensor:
    """Σ_t D_t of ``torch.optim.SGD`` from S, :func:`scaled_shift`.

    - μ = 0: S (torch then leaves the dampening out);
    - heavy ball: [(1−μ)S + μ(b₊ − b₋)]/(1−δ);
    - Nesterov (δ = 0): (1−μ)S + μ²(b₊ − b₋).

    Args:
        shift: S.
        before: b₋; None: the window holds the run's first step, b₋ = 0.
        after: b₊, needed with momentum.
        momentum: μ.
        dampening: δ.
        nesterov: Whether the group is.

    Raises:
        ConfigurationError: if b₊ is missing, δ = 1, or the window holds the first step and δ ≠ 0:
            torch starts with b_0 = D_0, without the factor 1−δ; see :func:`sgd_sum_from_start`.
    """
    if momentum == 0:
        return shift
    end = _checked(after, dampening, nesterov)
    if before is None and dampening != 0:
        raise ConfigurationError(
            "with dampening, a window with the run's first step is for sgd_sum_from_start"
        )
    change = end if before is None else end - before
    if nesterov:
        return (1 - momentum) * shift + momentum**2 * change
    return ((1 - momentum) * shift + momentum * change) / (1 - dampening)


def sgd_sum_from_start(
    later_shift: Tensor,
    first: Tensor,
    after: Tensor,
    *,
    momentum: float,
    dampening: float,
) -> Tensor:
    """Σ_t D_t of heavy-ball SGD with dampening over a window that begins with the run.

    b₁ + [(1−μ)S′ + μ(b₊ − b₁)]/(1−δ): the first step leaves b₁ = D_0, whatever δ is.

    Args:
        later_shift: S′, the sum S over all steps but the first.
        first: b₁, the buffer after the first step.
        after: b₊.
        momentum: μ > 0.
        dampening: δ < 1.

    Raises:
        ConfigurationError: if δ = 1.
    """
    rest = sgd_sum(later_shift, first, after, momentum=momentum, dampening=dampening)
    return first + rest


def momentum_sum(
    buffers: Sequence[Tensor], momenta: Sequence[float], *, dampening: float = 0.0
) -> Tensor:
    """Σ_t (b_t − μ_t b_{t−1})/(1−δ): Σ_t D_t of SGD under a schedule of μ, Nesterov or not.

    In a loop, add the terms as they come. Not for a window with the first step where δ ≠ 0.

    Args:
        buffers: b₋ (zeros before the first step), b_0, ..., b_{T−1}.
        momenta: μ_0, ..., μ_{T−1}.
        dampening: δ.

    Raises:
        ConfigurationError: if there is not one more of the buffers than of the momenta, or δ = 1.
    """
    if len(buffers) != len(momenta) + 1 or len(buffers) < 2:
        raise ConfigurationError(
            f"{len(momenta)} steps have {len(momenta) + 1} buffers, got {len(buffers)}"
        )
    _checked(buffers[-1], dampening, False)
    terms = [
        after - momentum * before
        for before, after, momentum in zip(buffers, buffers[1:], momenta, strict=False)
    ]
    return torch.stack(terms).sum(0) / (1 - dampening)


def adam_sum(first_moments: Tensor, before: Tensor | None, after: Tensor, beta1: float) -> Tensor:
    """Σ_t D_t of Adam, AMSGrad, NAdam and RAdam with coupled decay: Σ m_t + β₁/(1−β₁)(m₊ − m₋).

    m is ``exp_avg``, m_t = β₁m_{t−1} + (1−β₁)D_t. Weights alone do not give the sum here. With
    decoupled decay the same sum is that of G_t.

    Args:
        first_moments: Σ_t m_t, each after its step.
        before: m₋ before the window; None: the window holds the first step, m₋ = 0.
        after: m₊ = m_{T−1}.
        beta1: β₁, constant.

    Raises:
        ConfigurationError: if β₁ is not in [0, 1).
    """
    if not 0 <= beta1 < 1:
        raise ConfigurationError(f"beta1 must be in [0, 1), got {beta1!r}")
    change = after if before is None else after - before
    return first_moments + beta1 / (1 - beta1) * change


def fluctuation(
    scaled_steps: float,
    squared_weights: float,
    weight_decay: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    buffer_steps: float | None = None,
) -> float:
    """1 − λ̂/λ as the noise of the steps gives it, for SGD without dampening at stationarity.

    λ̂ = −Σ⟨W_t, G_t⟩/Σ‖W_t‖² from the same steps. With P = Σ‖ΔW_t‖²/η_t, ΔW_t = W_{t+1} − W_t:

    - heavy ball: (1+μ)/2 · P/(λΣ‖W_t‖²), for constant η (1+μ)/(2η) · ‖ΔW‖²/(λ‖W‖²) in averages;
    - Nesterov: [(1−μ)P/2 + μ²Q]/(λΣ‖W_t‖²), Q = −Σ⟨ΔW_t, b_t⟩.

    λ̂/λ plus this is 1 where the weights are stationary: what is left over, terms in ‖W‖² at the
    window's two ends, falls with the window's length. λ̂/λ alone is not 1 under minibatch noise; it
    is 0 for scale-invariant weights. A fluctuation-dissipation relation (Yaida, arXiv:1810.00004)
    with momentum. Adaptive methods have none.

    Args:
        scaled_steps: P, summed at each step with that step's η.
        squared_weights: Σ‖W_t‖² over the same steps, W_t before the step.
        weight_decay: λ > 0.
        momentum: μ.
        nesterov: Whether the group is.
        buffer_steps: Q, for Nesterov and for that alone.

    Returns:
        The fraction; NaN where λ or the weights are 0.

    Raises:
        ConfigurationError: if Q is missing or not asked for.
    """
    if nesterov is (buffer_steps is None):
        raise ConfigurationError("buffer_steps goes with nesterov: give both or neither")
    scale = weight_decay * squared_weights
    if scale == 0:
        return float("nan")
    if buffer_steps is not None:
        return ((1 - momentum) * scaled_steps / 2 + momentum**2 * buffer_steps) / scale
    return (1 + momentum) * scaled_steps / 2 / scale


def _checked(after: Tensor | None, dampening: float, nesterov: bool) -> Tensor:
    """b₊, where the settings are such that the sum follows from it."""
    if after is None:
        raise ConfigurationError("with momentum, the buffer after the window is needed")
    if dampening == 1:
        raise ConfigurationError("with dampening 1 the gradient never enters the buffer")
    if nesterov and dampening != 0:
        raise ConfigurationError("Nesterov momentum has no dampening")
    return after
