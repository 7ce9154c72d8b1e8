"""Truth: at an exact stationary point of the weight-decayed loss FACT and its kin hold exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import Report, measure

LAMBDA = 0.01
EQUALITIES = ("fact", "bfact", "fact_sym", "bfact_sym")


@dataclass(frozen=True)
class Stationary:
    """A model at a stationary point of loss + (λ/2)‖θ‖², and the data."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    gradient_norm: float


def linear_net() -> tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Three Linear layers with biases on a smooth regression task."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    y = torch.stack([torch.sin(2 * x[:, 0]) + x[:, 1], 2 * x[:, 2] * x[:, 3]], dim=1)
    return model, x, y, lambda output, target: ((output - target) ** 2).sum(1).mean()


def conv_net() -> tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Two convolutions, one of them strided, grouped and padded, on a three-class task."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()
    x = torch.randn(30, 2, 4, 4, dtype=torch.float64)
    return model, x, (x[:, 0].sum((1, 2)) > 0).long() + (x[:, 1, 0, 0] > 0).long(), F.cross_entropy


NETS = {"linear": linear_net, "conv": conv_net}


@functools.cache
def solve(name: str) -> Stationary:
    """L-BFGS on the full batch, then Newton with the explicit Hessian, down to rounding."""
    torch.manual_seed(4)
    model, x, y, loss_fn = NETS[name]()
    names = [key for key, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def objective(theta: Tensor) -> Tensor:
        parts = (t.view(s) for t, s in zip(theta.split(sizes), shapes, strict=True))
        output = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return loss_fn(output, y) + LAMBDA / 2 * theta.square().sum()

    theta = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=3000,
        tolerance_grad=1e-5,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(theta)
        value.backward()
        return value

    optimizer.step(closure)
    point = theta.detach()
    for _ in range(5):
        gradient = torch.func.grad(objective)(point)
        hessian = torch.func.jacrev(torch.func.grad(objective))(point)
        point = point - torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
    gradient_norm = float(torch.func.grad(objective)(point).norm())
    with torch.no_grad():
        for p, part in zip(model.parameters(), point.split(sizes), strict=True):
            p.copy_(part.view_as(p))
    return Stationary(model, x, y, loss_fn, gradient_norm)


def report_at(point: Stationary, sign: float = 1.0, **options: object) -> Report:
    """The four equalities at the stationary point."""
    return measure(
        point.model,
        [(point.x[:7], point.y[:7]), (point.x[7:], point.y[7:])],
        lambda output, target: sign * point.loss_fn(output, target),
        relations=EQUALITIES,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("name", NETS)
def test_the_point_is_stationary_and_not_trivial(name: str) -> None:
    """The gradient is at rounding level and no layer has decayed to zero."""
    point = solve(name)
    assert point.gradient_norm < 1e-12
    for parameter in point.model.parameters():
        if parameter.dim() > 1:
            assert float(parameter.detach().norm()) > 0.3


@pytest.mark.parametrize("relation", EQUALITIES)
@pytest.mark.parametrize("name", NETS)
def test_equalities_hold_at_a_stationary_point(name: str, relation: str) -> None:
    """At a stationary point the residual of every equality vanishes and the cosine is 1."""
    report = report_at(solve(name), weight_decay=LAMBDA)
    records = report.select(relation=relation)
    assert len(records) == 3
    for record in records:
        assert record.status == "ok", record
        assert record.residual < 1e-8, record
        assert abs(record.cosine - 1) < 1e-12, record
        assert abs(record.pearson - 1) < 1e-12, record
        assert record.stationarity < 1e-8, record
        assert abs(record.decay_ratio - 1) < 1e-8, record


@pytest.mark.parametrize("relation", EQUALITIES)
@pytest.mark.parametrize("name", NETS)
def test_the_wrong_weight_decay_shows(name: str, relation: str) -> None:
    """With twice the true λ the prediction is half the Gram matrix: residual ½, cosine still 1."""
    report = report_at(solve(name), weight_decay=2 * LAMBDA)
    records = report.select(relation=relation)
    assert len(records) == 3
    for record in records:
        assert abs(record.residual - 0.5) < 1e-8, record
        assert abs(record.cosine - 1) < 1e-12, record


@pytest.mark.parametrize("relation", ["fact", "bfact"])
@pytest.mark.parametrize("name", NETS)
def test_the_wrong_sign_shows(name: str, relation: str) -> None:
    """With the loss negated the prediction is minus the Gram matrix: cosine −1, residual 2."""
    report = report_at(solve(name), sign=-1.0, weight_decay=LAMBDA)
    records = report.select(relation=relation)
    assert len(records) == 3
    for record in records:
        assert abs(record.cosine + 1) < 1e-12, record
        assert abs(record.residual - 2) < 1e-8, record


@pytest.mark.parametrize("name", NETS)
def test_maximize_turns_the_sign(name: str) -> None:
    """An optimizer that maximises minimises the negated loss: with it FACT holds for −loss only."""
    point = solve(name)
    optimizer = torch.optim.SGD(
        point.model.parameters(), lr=0.1, weight_decay=LAMBDA, maximize=True
    )
    right = report_at(point, sign=-1.0, optimizer=optimizer).select(relation="fact")
    wrong = report_at(point, sign=1.0, optimizer=optimizer).select(relation="fact")
    assert len(right) == len(wrong) == 3
    for good, bad in zip(right, wrong, strict=True):
        assert good.residual < 1e-8, good
        assert abs(bad.residual - 2) < 1e-8, bad


@pytest.mark.parametrize("name", NETS)
def test_away_from_the_point_the_equality_fails(name: str) -> None:
    """One ascent-sized kick off the stationary point and the residual is visible in some layer."""
    point = solve(name)
    state = {key: value.clone() for key, value in point.model.state_dict().items()}
    with torch.no_grad():
        for parameter in point.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    try:
        records = report_at(point, weight_decay=LAMBDA).select(relation="fact")
    finally:
        point.model.load_state_dict(state)
    assert all(record.residual > 1e-2 for record in records)
