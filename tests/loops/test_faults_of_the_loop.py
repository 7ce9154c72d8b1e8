"""Exceptions in the user's own code inside a window, after which training goes on."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops.exact import assert_sums, data, joined, net, probe_of, rows_of, sgd
from torch import Tensor, nn
from torch.nn import functional as F


class OutOfMemoryError(RuntimeError):
    """What the loop catches."""


class Failing(nn.Module):
    """Fails once, where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.fail = ""
        self.delivering = False  # not while the probe's own products run

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[:2](x)
        if self.fail == "forward":
            raise OutOfMemoryError
        if self.fail == "backward" and x.requires_grad:
            x.register_hook(self._raise)
        return self.inner[2:](x)

    def _raise(self, gradient: Tensor) -> None:
        if self.delivering:
            raise OutOfMemoryError


def backward(model: Failing, x: Tensor, y: Tensor) -> None:
    """One loss and its gradients."""
    loss = F.mse_loss(model(x), y)
    model.delivering = True
    loss.backward()


class FailingSGD(torch.optim.SGD):
    """Fails before anything has changed, when told to."""

    fail = False

    def step(self, closure: Any = None) -> Any:
        if self.fail:
            raise OutOfMemoryError
        return super().step(closure)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("where", ["forward", "backward", "loss", "optimizer"])
@pytest.mark.parametrize("when", [0, 2, 5])
def test_a_step_is_tried_again_after_an_error(where: str, when: int, parts: int) -> None:
    """The attempt that failed is in no number of this window or of later ones."""
    model = Failing()
    optimizer = FailingSGD(model.parameters(), lr=0.2, weight_decay=0.03)
    window: list[dict[str, Any]] = []

    def attempt(batches: list[tuple[Tensor, Tensor]], fail: str) -> None:
        optimizer.zero_grad()
        model.delivering = False
        for number, (x, y) in enumerate(batches):
            model.fail = fail if number == len(batches) - 1 else ""
            loss = F.mse_loss(model(x), y)
            if model.fail == "loss":
                raise OutOfMemoryError
            model.delivering = True
            (loss / len(batches)).backward()
            model.delivering = False
        optimizer.fail = fail == "optimizer"
        optimizer.step()

    with probe_of(model, optimizer, window=2, every=lambda step: step in (0, 3, 5)) as probe:
        for step in range(6):
            batches = [data(4) for _ in range(parts)]
            rows = [rows_of(model, x, y) for x, y in batches]
            if step == when:
                with pytest.raises(OutOfMemoryError):
                    attempt(batches, where)
            attempt(batches, "")
            if step in (0, 2, 4):
                window = []
            window += rows
            if step in (0, 3, 5):
                assert probe.report.step == step
                assert_sums(probe.report, joined(window))
                assert probe.report.settings["window"] == (1 if step == 0 else 2)
    assert probe.faults == 0


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_is_given_up(where: str) -> None:
    """The batch that failed is skipped, its half-grown gradients cleared: the next ones count."""
    model = Failing()
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for step in range(4):
            x, y = data(4)
            optimizer.zero_grad()
            model.fail = where
            with pytest.raises(OutOfMemoryError):
                backward(model, x, y)
            model.fail, model.delivering = "", False
            optimizer.zero_grad()
            x, y = data(4)
            rows = rows_of(model, x, y)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            assert_sums(probe.report, rows)
            assert (probe.report.step, probe.faults) == (step, 0)
            assert probe.report.settings["discarded"] == 0  # it never ended
