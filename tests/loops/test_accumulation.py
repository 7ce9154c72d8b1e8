"""Gradient accumulation, clipping, and gradients cleared anywhere, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loops.exact import (
    assert_gradients,
    assert_sums,
    data,
    gradients_of,
    net,
    probe_of,
    rows_of,
    sgd,
)
from torch import Tensor, nn
from torch.nn import functional as F

Clear = Callable[[nn.Module, torch.optim.Optimizer], None]


def halves(x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The batch in micro-batches of these sizes."""
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 4, 2)])
def test_accumulation_is_one_big_batch(sizes: tuple[int, ...], divided: bool) -> None:
    """K, E and n are the big batch's; an undivided loss is a times the mean, so are G and g."""
    model = net()
    optimizer = sgd(model)
    a = len(sizes)
    times = 1.0 if divided else float(a)
    with probe_of(model, optimizer) as probe:
        for step in range(3):
            x, y = data(sum(sizes))
            rows = rows_of(model, x, y)
            for part in halves(x, y, sizes):
                loss = F.mse_loss(model(part[0]), part[1])
                (loss / a if divided else loss).backward()
            gradients = gradients_of(model)
            optimizer.step()
            optimizer.zero_grad()
            assert_sums(probe.report, rows, only=("jacobian", "loss"), loss=times**2)
            assert_gradients(probe.report, gradients)
            if len(set(sizes)) == 1:
                assert_sums(probe.report, rows, gradient=times, loss=times**2)
            assert probe.report.step == step
            assert probe.report.settings["discarded"] == 0


def test_accumulation_by_all_the_examples_of_the_step() -> None:
    """Σℓ/N over uneven micro-batches, N the step's examples, is "sum": E is the batch's over N²."""
    model, (x, y) = net(), data(10)
    optimizer = sgd(model)
    rows = rows_of(model, x, y)
    with probe_of(model, optimizer, loss_reduction="sum") as probe:
        for part in halves(x, y, (4, 4, 2)):
            loss = F.mse_loss(model(part[0]), part[1], reduction="sum") / 3
            (loss / 10).backward()
        optimizer.step()
    assert_sums(probe.report, rows, loss=1 / 10**2)


@pytest.mark.parametrize("jacobian", ["exact", "random"])
def test_a_summed_loss_accumulates(jacobian: str) -> None:
    """loss_reduction="sum": g_i is as delivered, G the step's sum, whatever the micro-batches."""
    model, (x, y) = net(), data(10)
    optimizer = sgd(model)
    rows = rows_of(model, x, y)
    with probe_of(model, optimizer, loss_reduction="sum", jacobian=jacobian) as probe:
        for part in halves(x, y, (3, 4, 3)):
            (F.mse_loss(model(part[0]), part[1], reduction="sum") / 3).backward()
        optimizer.step()
    assert_sums(probe.report, rows, only=("gradient", "loss"), gradient=10.0)


@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_accumulation_is_one_big_batch_with_positions(positions: str) -> None:
    """With tokens, micro-batches and two losses on each forward: equal to one batch's report."""
    found = []
    for sizes in ((6,), (2, 2, 2)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = sgd(model, lr=0.0)
        with probe_of(model, optimizer, positions=positions) as probe:
            for _ in range(2):  # E of two losses on one forward is there from the second step on
                x, y = torch.randn(6, 3, 4).double(), torch.randn(6, 3, 3).double()
                for part in halves(x, y, sizes):
                    output = model(part[0])
                    (F.mse_loss(output, part[1]) / len(sizes)).backward(retain_graph=True)
                    (output.square().mean() / len(sizes)).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(probe.report)
        together = F.mse_loss(model(x), y) + model(x).square().mean()
        with probe_of(model, optimizer, positions=positions) as single:
            optimizer.zero_grad()
            output = model(x)
            together = F.mse_loss(output, y) + output.square().mean()
            together.backward()
            optimizer.step()
        for layer, expected in single.report.statistics.items():
            for kind in ("gradient", "jacobian", "loss"):
                torch.testing.assert_close(
                    getattr(found[-1].statistics[layer], kind),
                    getattr(expected, kind),
                    rtol=1e-9,
                    atol=0,
                )


@pytest.mark.parametrize("norm", [1e-3, 1e3])
@pytest.mark.parametrize("each", [False, True])
def test_clipping_acts_on_the_gradient_alone(norm: float, each: bool) -> None:
    """G is read after clipping, at the end or at every micro-batch; K and E are as without."""
    model = net()
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for _ in range(3):
            x, y = data(8)
            rows = rows_of(model, x, y)
            for part in halves(x, y, (4, 4)):
                (F.mse_loss(model(part[0]), part[1]) / 2).backward()
                if each:
                    nn.utils.clip_grad_norm_(model.parameters(), norm)
            nn.utils.clip_grad_norm_(model.parameters(), norm)
            gradients = gradients_of(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            assert_sums(probe.report, rows, only=("jacobian", "loss"))
            assert_gradients(probe.report, gradients)
            assert probe.report.settings["discarded"] == 0


def to_none(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """p.grad = None by hand."""
    for parameter in model.parameters():
        parameter.grad = None


def zero_each(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """p.grad.zero_() by hand."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def zero_foreach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """torch._foreach_zero_ on all gradients."""
    present = [p.grad for p in model.parameters() if p.grad is not None]
    if present:
        torch._foreach_zero_(present)


CLEAR: dict[str, Clear] = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad(set_to_none=False)": lambda model, optimizer: optimizer.zero_grad(False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model, optimizer: model.zero_grad(False),
    "p.grad = None": to_none,
    "p.grad.zero_()": zero_each,
    "_foreach_zero_": zero_foreach,
}


@pytest.mark.parametrize(
    ("when", "discard"), [("between", False), ("top", True), ("between", True), ("after", True)]
)
@pytest.mark.parametrize("how", CLEAR)
def test_gradients_are_cleared_anywhere(how: str, when: str, discard: bool) -> None:
    """However and wherever gradients are cleared; one backward pass that is thrown away or none."""
    model, clear = net(), CLEAR[how]
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for step in range(2):
            if discard:
                x, y = data(3)
                F.mse_loss(model(x), y).backward()
                if when == "after":
                    clear(model, optimizer)
            x, y = data(4)
            rows = rows_of(model, x, y)
            if when == "top":
                clear(model, optimizer)
            loss = F.mse_loss(model(x), y)
            if when == "between":
                clear(model, optimizer)
            loss.backward()
            optimizer.step()
            if when == "after":
                clear(model, optimizer)
            assert_sums(probe.report, rows)
            assert probe.report.step == step
            assert probe.report.settings["discarded"] == int(discard)


def test_cleared_gradients_are_noticed_below_an_unmeasured_head() -> None:
    """The head's gradient grows before any measured layer's: the pass before is still dropped."""
    model = net()
    optimizer = sgd(model)
    for how in CLEAR.values():
        optimizer.zero_grad()
        with probe_of(model, optimizer, include=["0", "2"]) as probe:
            x, y = data(5)
            F.mse_loss(model(x), y).backward()
            x, y = data(7)
            rows = rows_of(model, x, y)
            del rows["4"]
            loss = F.mse_loss(model(x), y)
            how(model, optimizer)
            loss.backward()
            optimizer.step()
        assert_sums(probe.report, rows)
        assert probe.report.settings["discarded"] == 1
