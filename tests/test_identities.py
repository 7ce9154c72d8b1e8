"""The identities of the trajectory against sums of what torch's optimizers were really given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, NAdam, Optimizer, RAdam

from feature_probe.errors import ConfigurationError
from feature_probe.optimizers.identities import (
    adam_sum,
    fluctuation,
    momentum_sum,
    scaled_shift,
    sgd_sum,
    sgd_sum_from_start,
)

DECAY = 0.05
RATES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.03,
    "decaying": lambda step: 0.05 * 0.9**step,
}


@dataclass
class Run:
    """What a run went through: lists by step, W with one entry more."""

    weights: list[Tensor]
    rates: list[float] = field(default_factory=list)
    driven: list[Tensor] = field(default_factory=list)  # D = G + λW
    states: list[dict[str, Tensor]] = field(default_factory=list)

    def truth(self, start: int) -> Tensor:
        """Σ D_t from a step on, added up one by one."""
        total = torch.zeros_like(self.weights[0])
        for term in self.driven[start:]:
            total = total + term
        return total

    def shift(self, start: int) -> Tensor:
        """S from a step on."""
        return scaled_shift(self.weights[start:], self.rates[start:])


def train(
    make: Callable[[list[Tensor]], Optimizer],
    rate: Callable[[int], float],
    steps: int = 14,
    momentum: Callable[[int], float] | None = None,
) -> Run:
    """Least squares on fresh random data at every step, float64."""
    generator = torch.Generator().manual_seed(3)
    draw: Any = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = draw(4, 3).requires_grad_()
    optimizer = make([weight])
    run = Run([weight.detach().clone()])
    for step in range(steps):
        x, y = draw(8, 3), draw(8, 4)
        weight.grad = None
        ((x @ weight.T - y) ** 2).mean().backward()
        assert weight.grad is not None
        run.driven.append(weight.grad + DECAY * weight.detach())
        group = optimizer.param_groups[0]
        group["lr"] = rate(step)
        if momentum is not None:
            group["momentum"] = momentum(step)
        optimizer.step()
        run.rates.append(rate(step))
        run.weights.append(weight.detach().clone())
        held = optimizer.state[weight]
        run.states.append({name: held[name].clone() for name in held if held[name] is not None})
    return run


def close(found: Tensor, truth: Tensor) -> bool:
    """Equal to 1e-10 of the largest entry."""
    return float((found - truth).abs().max()) <= 1e-10 * float(truth.abs().max())


def sgd(**settings: Any) -> Callable[[list[Tensor]], Optimizer]:
    """torch's SGD with coupled decay."""
    return lambda parameters: SGD(parameters, lr=1.0, weight_decay=DECAY, **settings)


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dampening": 0.3},
        {"momentum": 0.9},
        {"momentum": 0.6, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_sgd(settings: dict[str, Any], start: int, rate: Callable[[int], float]) -> None:
    """Every variant of SGD, from the first step and later, to 1e-10."""
    run = train(sgd(**settings), rate)
    if "momentum" not in settings:
        assert close(sgd_sum(run.shift(start), **settings), run.truth(start))
        return
    buffers = [state["momentum_buffer"] for state in run.states]
    if start == 0 and "dampening" in settings:
        found = sgd_sum_from_start(run.shift(1), buffers[0], buffers[-1], **settings)
    else:
        before = None if start == 0 else buffers[start - 1]
        found = sgd_sum(run.shift(start), before, buffers[-1], **settings)
    assert close(found, run.truth(start))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9}),
        ({"momentum": 0.6, "dampening": 0.3}, {"momentum": 0.6}),
    ],
    ids=str,
)
def test_another_variants_form_is_off(settings: dict[str, Any], wrong: dict[str, Any]) -> None:
    """The plain heavy-ball form is visibly wrong for Nesterov and dampening."""
    run = train(sgd(**settings), RATES["constant"])
    buffers = [state["momentum_buffer"] for state in run.states]
    found = sgd_sum(run.shift(5), buffers[4], buffers[-1], **wrong)
    assert float((found - run.truth(5)).norm() / run.truth(5).norm()) > 0.01


@pytest.mark.parametrize(
    ("settings", "start"),
    [({}, 0), ({}, 5), ({"nesterov": True}, 0), ({"nesterov": True}, 5), ({"dampening": 0.3}, 5)],
    ids=str,
)
def test_a_schedule_of_momentum(settings: dict[str, Any], start: int) -> None:
    """Buffers give the sum whatever μ_t does, as OneCycle moves it."""
    momenta = [0.95 - 0.02 * step for step in range(14)]
    run = train(sgd(momentum=0.9, **settings), RATES["decaying"], momentum=momenta.__getitem__)
    buffers = [state["momentum_buffer"] for state in run.states]
    buffers = [torch.zeros_like(buffers[0]), *buffers]
    dampening = settings.get("dampening", 0.0)
    found = momentum_sum(buffers[start:], momenta[start:], dampening=dampening)
    assert close(found, run.truth(start))


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Adam, {}), (Adam, {"amsgrad": True}), (NAdam, {}), (RAdam, {})],
    ids=["Adam", "AMSGrad", "NAdam", "RAdam"],
)
def test_adam(
    kind: Callable[..., Optimizer],
    settings: dict[str, Any],
    start: int,
    rate: Callable[[int], float],
) -> None:
    """Adam and its kin through exp_avg, to 1e-10."""
    betas = (0.8, 0.99)
    run = train(lambda p: kind(p, lr=1.0, betas=betas, weight_decay=DECAY, **settings), rate)
    moments = [state["exp_avg"] for state in run.states]
    before = moments[start - 1] if start else None
    found = adam_sum(torch.stack(moments[start:]).sum(0), before, moments[-1], betas[0])
    assert close(found, run.truth(start))


def balance(run: Run, start: int, momentum: float, nesterov: bool) -> tuple[float, float, float]:
    """1 − λ̂/λ by brute force, :func:`fluctuation`, and the terms at the window's two ends."""
    weights, rates = run.weights, run.rates
    window = range(start, len(rates))
    scale = DECAY * sum(float(weights[t].square().sum()) for t in window)
    truth = sum(float((weights[t] * run.driven[t]).sum()) for t in window) / scale
    moves = [after - before for before, after in itertools.pairwise(weights)]
    buffers = [state["momentum_buffer"] for state in run.states]
    steps = sum(float(moves[t].square().sum()) / rates[t] for t in window)
    crossed = -sum(float((moves[t] * buffers[t]).sum()) for t in window)
    found = fluctuation(
        steps,
        sum(float(weights[t].square().sum()) for t in window),
        DECAY,
        momentum=momentum,
        nesterov=nesterov,
        buffer_steps=crossed if nesterov else None,
    )
    first, last = start - 1, len(rates) - 1
    if nesterov:  # μ times the change of ⟨W, b⟩ − η⟨u, b⟩, and a drop of ‖W‖², each telescoped
        inner = [float((weights[t + 1] * buffers[t]).sum()) for t in (first, last)]
        drop = float(weights[start].square().sum() - weights[-1].square().sum()) / (2 * rates[0])
        ends = momentum**2 * (inner[1] - inner[0]) + (1 - momentum) * drop
    else:
        edge = [
            float((weights[t] * moves[t]).sum() / rates[t] + moves[t].square().sum() / rates[t])
            for t in (first, last)
        ]
        drop = float(weights[start].square().sum() - weights[-1].square().sum()) / (2 * rates[0])
        ends = (1 - momentum) * drop + momentum * (edge[0] - edge[1])
    return truth, found, ends / scale


@pytest.mark.parametrize("nesterov", [False, True])
def test_fluctuation_is_exact_up_to_the_ends(nesterov: bool) -> None:
    """Σ⟨W, D⟩ is the fluctuation plus terms at the window's two ends, to 1e-10."""
    run = train(sgd(momentum=0.8, nesterov=nesterov), RATES["constant"], steps=40)
    truth, found, ends = balance(run, 7, 0.8, nesterov)
    assert truth == pytest.approx(found + ends, rel=1e-10)
    assert abs(ends) > 1e-3 * abs(truth)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fluctuation_under_noise(nesterov: bool) -> None:
    """Over a long stationary window λ̂/λ plus the fluctuation is 1, where λ̂/λ alone is not.

    The ends fall with the length of the window: 1500 steps leave less than 2 %.
    """
    run = train(sgd(momentum=0.8, nesterov=nesterov), RATES["constant"], steps=2000)
    truth, found, _ = balance(run, 500, 0.8, nesterov)
    assert truth > 0.3
    assert found == pytest.approx(truth, rel=0.02)


def test_fluctuation_under_a_schedule() -> None:
    """With a slowly falling η the sum has each step's own η in it."""
    rate = lambda step: 0.04 / (1 + step / 1500)  # noqa: E731
    run = train(sgd(momentum=0.8), rate, steps=2000)
    truth, found, _ = balance(run, 500, 0.8, nesterov=False)
    assert found == pytest.approx(truth, rel=0.02)


def test_fluctuation_undefined() -> None:
    """Without decay or weights there is no fraction."""
    assert math.isnan(fluctuation(1.0, 1.0, 0.0))
    assert math.isnan(fluctuation(1.0, 0.0, 0.1, momentum=0.9))


ONE = torch.ones(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaled_shift([ONE, ONE], [0.1, 0.1]), "2 steps have 3 weights, got 2"),
        (lambda: scaled_shift([ONE], []), "got 1"),
        (lambda: sgd_sum(ONE, ONE, momentum=0.9), "buffer after the window is needed"),
        (lambda: sgd_sum(ONE, ONE, ONE, momentum=0.9, dampening=1.0), "never enters"),
        (
            lambda: sgd_sum(ONE, ONE, ONE, momentum=0.9, dampening=0.1, nesterov=True),
            "Nesterov momentum has no dampening",
        ),
        (lambda: sgd_sum(ONE, None, ONE, momentum=0.9, dampening=0.1), "sgd_sum_from_start"),
        (lambda: momentum_sum([ONE], [0.9]), "1 steps have 2 buffers, got 1"),
        (lambda: momentum_sum([ONE, ONE], [0.9], dampening=1.0), "never enters"),
        (lambda: adam_sum(ONE, ONE, ONE, 1.0), r"beta1 must be in \[0, 1\), got 1.0"),
        (lambda: fluctuation(1.0, 1.0, 0.1, nesterov=True), "goes with nesterov"),
        (lambda: fluctuation(1.0, 1.0, 0.1, buffer_steps=1.0), "goes with nesterov"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    """What does not determine the sum is refused, with the reason."""
    with pytest.raises(ConfigurationError, match=message):
        call()
