"""The Accelerate helper in real loops, against the bare loop and against one without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import (
    OPTIONS,
    Kept,
    assert_same_reports,
    assert_same_weights,
    bare_loop,
    hooks_of,
    make_batches,
    make_model,
    make_optimizer,
)
from torch import nn
from torch.utils.data import DataLoader

from feature_probe import ConfigurationError, FeatureProbe
from feature_probe.integrations.accelerate import attach

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def one_accelerator() -> Iterator[None]:
    """Accelerate keeps the settings of a process for good: forget them after every test."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """A prepared model, optimizer and loader."""

    def __init__(self, accumulate: int = 1, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, **options
        )
        self.net = make_model()
        loader = DataLoader(make_batches(), batch_size=None)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.net, make_optimizer(self.net), loader
        )

    def attach(self, **options: Any) -> FeatureProbe:
        """The probe, as a user would attach it."""
        return attach(self.accelerator, self.model, self.optimizer, **{**OPTIONS, **options})

    def train(self, first: int = 0, last: int = 8) -> None:
        """The batches from first to last."""
        for i, (x, y) in enumerate(self.loader):
            if first <= i < last:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
                    self.optimizer.step()
                    self.optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loop_is_the_bare_loop(accumulate: int) -> None:
    """Weights are bitwise those without the probe, reports those of the bare loop."""
    plain, probed, kept = Run(accumulate), Run(accumulate), Kept()
    plain.train()
    probe = probed.attach(sinks=[kept])
    probed.train()
    probe.detach()
    assert_same_weights(probed.net.state_dict(), plain.net.state_dict())
    expected = bare_loop(accumulate)
    assert_same_weights(probed.net.state_dict(), expected.weights)
    assert_same_reports(kept.reports, expected.reports)


def test_nothing_remains_after_detach() -> None:
    """Hooks are off the model and the optimizer inside the wrapper."""
    run = Run()
    before = hooks_of(run.net, run.optimizer.optimizer)
    probe = run.attach()
    run.train()
    probe.detach()
    assert hooks_of(run.net, run.optimizer.optimizer) == before


def test_a_resumed_loop_reports_like_one_not_stopped(tmp_path: Path) -> None:
    """Stopped in mid-window and resumed with load_state, the same reports come."""
    first, second = Kept(), Kept()
    run = Run()
    probe = run.attach(sinks=[first])
    run.train(0, 4)
    run.accelerator.save_state(tmp_path / "state")
    probe.detach()
    resumed = Run()
    probe = resumed.attach(sinks=[second])
    resumed.accelerator.load_state(tmp_path / "state")
    resumed.train(4, 8)
    probe.detach()
    expected = bare_loop()
    assert_same_weights(resumed.net.state_dict(), expected.weights)
    assert_same_reports(first.reports + second.reports, expected.reports)


def test_the_state_can_be_left_out(tmp_path: Path) -> None:
    """With checkpoint=False nothing of ours is in the folder of a state."""
    run = Run()
    run.attach(checkpoint=False).detach()
    run.accelerator.save_state(tmp_path / "state")
    assert not list((tmp_path / "state").glob("custom_checkpoint*"))


def test_several_optimizers_and_bare_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of wrapped and unwrapped optimizers is taken; the last listed ends a step."""
    accelerator, model, kept = accelerate.Accelerator(cpu=True), make_model(), Kept()
    model, first = accelerator.prepare(model, make_optimizer(model[:2]))
    second = make_optimizer(model[2:])
    probe = attach(accelerator, model, [first, second], sinks=[kept], **OPTIONS)
    for x, y in make_batches():
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        for optimizer in (first, second):
            optimizer.step()
        model.zero_grad()
    probe.detach()
    assert_same_reports(kept.reports, bare_loop().reports)


def test_another_process_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main process makes files and calls sinks."""
    run, kept = Run(), Kept()
    monkeypatch.setattr(type(run.accelerator), "is_main_process", False)
    probe = run.attach(log_dir=tmp_path / "run", sinks=[kept])
    run.train()
    probe.detach()
    assert probe.report is not None
    assert kept.reports == []
    assert not (tmp_path / "run").exists()


def test_something_else_than_an_accelerator_is_refused() -> None:
    """The model in the first place is told, with the extra to install."""
    model = make_model()
    with pytest.raises(ConfigurationError, match="got Sequential, which has no unwrap_model"):
        attach(model, model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
