"""Paths of the weights, against the same numbers from every step's weight and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from feature_probe import FeatureProbe
from feature_probe.reports.stationarity import Momentum, motion, step_scalars
from feature_probe.sums.trajectory import RING, Path, Trajectory

Make = Callable[[Sequence[nn.Parameter]], Optimizer]
STEPS, WINDOW = 24, 9
LAMBDA = 0.02

SGDS: dict[str, Make] = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=LAMBDA),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, weight_decay=LAMBDA),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.8, weight_decay=LAMBDA, nesterov=True
    ),
}
DECOUPLED: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01, weight_decay=0.3),
}


@dataclass
class Seen:
    """One step, seen by the test itself."""

    weight: Tensor
    gradient: Tensor
    rate: float


def network() -> nn.Sequential:
    """6 → 8 → 3, float64, with biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(make: Make) -> tuple[FeatureProbe, list[Seen]]:
    """Train with a decaying learning rate and a report at the last step, and what the test saw."""
    model = network()
    optimizer = make(list(model.parameters()))
    seen: list[Seen] = []
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    generator = torch.Generator().manual_seed(1)
    probe = FeatureProbe(
        model, optimizer=optimizer, every=lambda step: step == STEPS - 1, window=WINDOW, strict=True
    )
    with probe:
        for _ in range(STEPS):
            x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
            y = torch.randn(16, 3, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            assert layer.weight.grad is not None
            rate = optimizer.param_groups[0]["lr"]
            seen.append(Seen(layer.weight.detach().clone(), layer.weight.grad.clone(), rate))
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.95
    return probe, seen


def window_of(seen: list[Seen]) -> list[Seen]:
    """The steps of the last report's window."""
    return seen[-WINDOW:]


@pytest.mark.parametrize("name", [*SGDS, *DECOUPLED])
def test_drift_and_decay_ratio_are_those_of_the_steps(name: str) -> None:
    """‖W_T − W_0‖/‖W_T‖ and −Σ⟨W,G⟩/(λΣ‖W‖²) over the window's steps."""
    probe, seen = train((SGDS | DECOUPLED)[name])
    steps = window_of(seen)
    assert probe.report is not None
    found = probe.report.diagnosis("0")
    drift = (steps[-1].weight - steps[0].weight).norm() / steps[-1].weight.norm()
    assert math.isclose(found.drift, float(drift), rel_tol=1e-10)
    dots = sum(float((s.weight * s.gradient).sum()) for s in steps)
    squares = sum(float(s.weight.square().sum()) for s in steps)
    assert math.isclose(found.decay_ratio, -dots / (found.weight_decay * squares), rel_tol=1e-10)


@pytest.mark.parametrize("name", DECOUPLED)
def test_update_fact_is_that_of_the_mean_update(name: str) -> None:
    """U = −(W₊ − (1 − ηλ)W)/η of every step but the last, averaged with weights η."""
    probe, seen = train(DECOUPLED[name])
    steps, decay = window_of(seen), 0.3
    total, rates = torch.zeros_like(steps[0].weight), 0.0
    for now, after in pairwise(steps):
        update = -(after.weight - (1 - now.rate * decay) * now.weight) / now.rate
        total, rates = total + now.rate * update, rates + now.rate
    mean, weight = total / rates, steps[-1].weight
    predicted, actual = -weight.mT @ mean / decay, weight.mT @ weight
    assert probe.report is not None
    record = probe.report.record("0", "update_fact")
    cosine = (predicted * actual).sum() / (predicted.norm() * actual.norm())
    assert math.isclose(record.cosine, float(cosine), rel_tol=1e-8)
    assert math.isclose(
        record.residual, float((predicted - actual).norm() / actual.norm()), rel_tol=1e-8
    )
    assert record.form == "update"
    backward = -weight @ mean.mT / decay
    gram = weight @ weight.mT
    cosine = (backward * gram).sum() / (backward.norm() * gram.norm())
    assert math.isclose(
        probe.report.record("0", "update_bfact").cosine, float(cosine), rel_tol=1e-8
    )


@pytest.mark.parametrize("name", SGDS)
def test_fluctuation_is_that_of_the_steps(name: str) -> None:
    """(1 + μ)/(2η)·‖ΔW‖²/(λ‖W‖²), and its Nesterov form from u = −ΔW/η and the buffers."""
    probe, seen = train(SGDS[name])
    mu = {"plain": 0.0, "momentum": 0.8, "nesterov": 0.8}[name]
    buffer = torch.zeros_like(seen[0].weight)
    buffers = []
    for step in seen:
        buffer = mu * buffer + step.gradient + LAMBDA * step.weight
        buffers.append(buffer)
    steps, kept = window_of(seen), buffers[-WINDOW:]
    expected, squares = 0.0, 0.0
    for (now, after), b in zip(pairwise(steps), kept, strict=False):
        change = (after.weight - now.weight) / now.rate
        if name == "nesterov":
            term = (1 - mu) / 2 * change.square().sum() - mu**2 * (change * b).sum()
        else:
            term = (1 + mu) / 2 * change.square().sum()
        expected += now.rate * float(term)
        squares += float(now.weight.square().sum())
    assert probe.report is not None
    found = probe.report.diagnosis("0").fluctuation
    assert math.isclose(found, expected / (LAMBDA * squares), rel_tol=1e-8)


def test_at_rest_ratio_and_fluctuation_add_up_to_one() -> None:
    """A noisy quadratic at stationarity: λ̂/λ alone is far from 1, with the fluctuations it is 1."""
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    with FeatureProbe(
        model, optimizer=optimizer, every=lambda s: s == 3999, window=3000,
        relations="fact", strict=True,
    ) as probe:  # fmt: skip
        for _ in range(4000):
            x = torch.randn(2, 4, generator=generator, dtype=torch.float64)
            y = 2 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    assert probe.report is not None
    found = probe.report.diagnosis(probe.report.layers[0])
    assert found.decay_ratio < 0.5
    assert abs(found.decay_ratio + found.fluctuation - 1) < 0.02
    assert found.state == "at stationarity"


def test_noise_is_the_standard_error_of_the_mean_gradient() -> None:
    """√(Σ‖G_t − Ḡ‖²/(T(T − 1)))/(λ‖W‖)."""
    probe, seen = train(SGDS["plain"])
    gradients = torch.stack([step.gradient for step in window_of(seen)])
    spread = (gradients - gradients.mean(0)).square().sum() / (WINDOW * (WINDOW - 1))
    expected = float(spread.sqrt()) / (LAMBDA * float(seen[-1].weight.norm()))
    assert probe.report is not None
    assert math.isclose(probe.report.diagnosis("0").noise, expected, rel_tol=1e-6)


@pytest.mark.parametrize("name", SGDS)
def test_a_path_stopped_and_resumed_is_the_same(name: str) -> None:
    """State in mid-window: the same numbers, but for Nesterov's one step across the stop."""
    states = []
    for stop in (False, True):
        model = network()
        optimizer = SGDS[name](list(model.parameters()))
        settings = {
            "every": lambda step: step == STEPS - 1, "window": WINDOW, "relations": "fact",
            "strict": True,
        }  # fmt: skip
        probe = FeatureProbe(model, optimizer=optimizer, **settings)
        generator = torch.Generator().manual_seed(1)
        probe.attach()
        for step in range(STEPS):
            if stop and step == STEPS - 4:
                state = probe.state_dict()
                probe.detach()
                probe = FeatureProbe(model, optimizer=optimizer, **settings)
                probe.load_state_dict(state)
                probe.attach()
            x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        probe.detach()
        assert probe.report is not None
        states.append(probe.report.diagnosis("0").to_dict())
    if name == "nesterov":
        for state in states:
            del state["fluctuation"]
    assert states[0] == states[1]


def test_what_a_fused_optimizer_skips_is_left_out() -> None:
    """A step that is not taken adds nothing to the sums, the rate or the ring, and no infinity."""
    target = FeatureProbe.targets(network())[0]
    assert target.parameter is not None
    trajectory, group = Trajectory(), {"lr": 0.1, "weight_decay": 0.5}
    for step in range(4):
        target.parameter.grad = torch.full_like(target.parameter, math.inf if step == 2 else 1.0)
        trajectory.step(target, None, group, taken=torch.tensor(step != 2), keep_sum=True)
    path = trajectory.path(target)
    assert path.totals is not None
    assert math.isclose(float(path.totals[2]), 3 * target.parameter.numel())
    assert math.isclose(float(path.rate), 0.3, rel_tol=1e-6)  # a float32 tensor by then
    scalars = step_scalars(path, target.d_in)
    assert scalars is not None
    assert scalars.dot.shape == (3, 8)
    assert torch.isfinite(scalars.gradient).all()


def test_signs_and_scales_of_gradients() -> None:
    """A scale is divided out; a maximising optimizer's gradient changes its sign."""
    target = FeatureProbe.targets(network())[0]
    assert target.parameter is not None
    target.parameter.grad = torch.ones_like(target.parameter)
    totals = []
    for scale in (1.0, -4.0):
        trajectory = Trajectory()
        trajectory.step(target, None, {"lr": 0.1}, scale=scale)
        found = trajectory.path(target).totals
        assert found is not None
        totals.append(found)
    assert torch.allclose(totals[1][0], -totals[0][0] / 4)
    assert torch.allclose(totals[1][2], totals[0][2] / 16)


def test_the_ring_and_the_history_are_bounded() -> None:
    """Only the latest steps are kept, and old reports are thinned out, the newest kept."""
    target = FeatureProbe.targets(network())[0]
    bias = target.module.bias
    assert target.parameter is not None
    assert isinstance(bias, nn.Parameter)
    target.parameter.grad, bias.grad = torch.ones_like(target.parameter), torch.ones_like(bias)
    trajectory = Trajectory()
    for _ in range(RING + 5):
        trajectory.step(target, None, {"lr": 0.1})
    path = trajectory.path(target)
    assert len(path.ring) == len(path.bias) == len(path.counted) == RING
    for report in range(1000):
        path.note(report / 100, 1.0)
    assert len(path.history) <= 64
    assert path.history[-1] == (9.99, 1.0)
    assert path.history[0][0] < 1


def test_norm_drift_is_the_change_of_the_norm_over_a_unit_of_age() -> None:
    """d ln ‖W‖/d age of a norm that decays as e^(−0.3 age)."""
    path = Path(steps=1, totals=torch.ones(3, dtype=torch.float64))
    for tenth in range(31):
        path.note(tenth / 10, math.exp(-0.6 * tenth / 10))
    weight = torch.full((1, 1, 1), math.exp(-0.3 * 3.1), dtype=torch.float64)
    squared_norm = float(weight.square().sum())
    found = motion(path, weight, squared_norm, None, 0.1, clock=1.0, age=3.1, momentum=Momentum())
    assert math.isclose(found.norm_drift, -0.3, rel_tol=1e-9)
    assert math.isclose(found.norm_span, 1.0, rel_tol=1e-9)


def test_parts_of_a_packed_weight_have_their_own_paths() -> None:
    """Attention's q, k and v are rows of one parameter, and of one bias."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    targets = [t for t in FeatureProbe.targets(attention) if t.part is not None]
    parameter, bias = attention.in_proj_weight, attention.in_proj_bias
    assert parameter is not None
    assert bias is not None
    with torch.no_grad():
        bias.copy_(torch.arange(12.0))
    parameter.grad, bias.grad = torch.randn_like(parameter), torch.randn_like(bias)
    trajectory = Trajectory()
    for place, target in enumerate(targets):
        trajectory.step(target, None, {"lr": 0.1})
        rows = slice(4 * place, 4 * place + 4)
        path = trajectory.path(target)
        dots = (parameter.detach()[rows] * parameter.grad[rows]).sum(1)
        assert torch.allclose(path.ring[0][0], dots)
        assert torch.allclose(path.bias[0][0], bias.detach()[rows] * bias.grad[rows])
