"""Mixed precision: the loss scale is in no number, and steps that are not taken do not count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from loops.exact import (
    LAMBDA,
    SUMS,
    assert_sums,
    data,
    joined,
    net,
    probe_of,
    rows_of,
    sgd,
    sums_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import Report

#: A power of two, so that scaled and unscaled arithmetic are the same bits.
SCALE = 2.0**10


@dataclass
class Scaled:
    """A run with a gradient scaler; the reports of every step that made one."""

    dtype: torch.dtype = torch.float32
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
    scaler: dict[str, Any] | None = field(default_factory=dict)
    autocast: torch.dtype | None = None
    clip: float | None = None
    parts: int = 1
    #: Steps whose gradients overflow.
    overflow: tuple[int, ...] = ()
    #: Whether those steps are there but not tried (what the scaled run must equal).
    without: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)

    def run(self, steps: int = 6) -> list[Report]:
        """Train and collect."""
        torch.manual_seed(2)
        model = net(self.dtype)
        optimizer = self.optimizer(model)
        settings = {"init_scale": SCALE, "growth_interval": 2, **(self.scaler or {})}
        scaler = torch.amp.GradScaler("cpu", enabled=self.scaler is not None, **settings)
        reports: list[Report] = []
        with probe_of(model, optimizer, **self.options) as probe:
            for step in range(steps):
                batches = [data(4, self.dtype) for _ in range(self.parts)]
                if step in self.without:
                    continue
                optimizer.zero_grad()
                for x, y in batches:
                    with self._autocast():
                        loss = F.mse_loss(model(x).float(), y.float()) / self.parts
                    loss = loss * float("inf") if step in self.overflow else loss
                    scaler.scale(loss).backward()
                if self.clip is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                scaler.step(optimizer)
                self.scales.append(scaler.get_scale())
                scaler.update()
                if probe.report is not None and (not reports or probe.report is not reports[-1]):
                    reports.append(probe.report)
        self.final = probe._step
        return reports

    def _autocast(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self.autocast)


def assert_same(
    found: list[Report], expected: list[Report], kinds: tuple[str, ...] = SUMS, rtol: float = 0.0
) -> None:
    """Steps, sums and every score: bit for bit where no tolerance is given."""
    assert [report.step for report in found] == [report.step for report in expected]
    for one, other in zip(found, expected, strict=True):
        for layer in other.layers:
            for kind in ("weight", *kinds):
                a, b = getattr(one.statistics[layer], kind), getattr(other.statistics[layer], kind)
                assert b is not None
                torch.testing.assert_close(a, b, rtol=rtol, atol=0)
        if kinds == SUMS and not rtol:
            for a, b in zip(one.records, other.records, strict=True):
                for name in ("cosine", "pearson", "residual", "scale", "stationarity"):
                    x, y = getattr(a, name), getattr(b, name)
                    assert x == y or (x != x and y != y), (a.layer, a.label, name)
                assert (a.n_examples, a.n_rows, a.status) == (b.n_examples, b.n_rows, b.status)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "sgd foreach": lambda model: sgd(model, foreach=True, momentum=0.9),
    "sgd fused": lambda model: sgd(model, fused=True),
    "adam fused": lambda model: torch.optim.Adam(
        model.parameters(), lr=0.1, weight_decay=LAMBDA, fused=True
    ),
    "adam foreach": lambda model: torch.optim.Adam(
        model.parameters(), lr=0.1, weight_decay=LAMBDA, foreach=True
    ),
}


@pytest.mark.parametrize(("clip", "parts"), [(None, 1), (1e-2, 2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_scale_is_in_no_number(name: str, clip: float | None, parts: int) -> None:
    """A scale that grows inside the windows, unscaled or not, clipped or not: the bits without."""
    options = {"window": 3, "every": lambda step: step in (2, 5)}
    common: dict[str, Any] = {
        "optimizer": OPTIMIZERS[name],
        "clip": clip,
        "parts": parts,
        "options": options,
    }
    scaled = Scaled(**common)
    found = scaled.run()
    assert len(set(scaled.scales)) >= 3
    assert_same(found, Scaled(**common, scaler=None).run())
    assert [report.step for report in found] == [2, 5]
    assert [report.settings["window"] for report in found] == [3, 3]


@pytest.mark.parametrize(("clip", "parts"), [(None, 2), (1e-2, 1)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflowed_steps_are_left_out(name: str, clip: float | None, parts: int) -> None:
    """As if their batches had not been there, in the sums and in the count of steps."""
    overflow = (1, 3, 4)
    options = {"window": 3, "every": lambda step: step in (0, 4)}
    common: dict[str, Any] = {
        "optimizer": OPTIMIZERS[name],
        "clip": clip,
        "parts": parts,
        "options": options,
    }
    scaled = Scaled(**common, overflow=overflow)
    found = scaled.run(9)
    assert min(scaled.scales) < SCALE
    expected = Scaled(**common, scaler=None, without=overflow).run(9)
    assert_same(found, expected)
    assert [report.step for report in found] == [0, 4]
    assert [report.settings["window"] for report in found] == [1, 3]
    if "fused" not in name:
        assert found[-1].settings["discarded"] == 2 * parts


def test_a_fused_optimizer_skips_inside_a_window() -> None:
    """Skips are known when a report is due: counted, and the window is longer by those before."""
    overflow = (1, 3, 6)
    every = {"every": lambda step: step == 4}
    common: dict[str, Any] = {"optimizer": OPTIMIZERS["sgd fused"]}
    found = Scaled(**common, overflow=overflow, options={"window": 3, **every}).run(9)
    plain = Scaled(**common, scaler=None, without=overflow, options={"window": 4, **every})
    assert_same(found, plain.run(9))
    assert found[0].settings["window"] == 4
    assert found[0].settings["discarded"] == 2


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("sgd", 1),
        ("sgd", 3),
        ("sgd fused", 1),
        ("sgd fused", 3),
    ],
)
def test_reports_of_every_step_with_overflows(name: str, every: int) -> None:
    """Each due step is reported once, under its own number, whichever steps overflow."""
    overflow = (0, 2, 3, 7)
    options = {"window": 1, "every": every}
    common: dict[str, Any] = {"optimizer": OPTIMIZERS[name], "options": options}
    found = Scaled(**common, overflow=overflow).run(10)
    assert_same(found, Scaled(**common, scaler=None, without=overflow).run(10))
    assert [report.step for report in found] == list(range(0, 6, every))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_measured_as_it_ran(dtype: torch.dtype) -> None:
    """Under autocast, with a scaler or without: the sums of the same run, near the exact ones."""
    options = {"window": 2, "every": lambda step: step == 3}
    plain = Scaled(autocast=dtype, scaler=None, options=options).run()
    exact = Scaled(scaler=None, options=options).run()
    scaled = Scaled(autocast=dtype, options=options).run()
    tolerance = 2.0 * torch.finfo(dtype).eps
    for found in (plain, scaled):
        for layer, statistics in exact[-1].statistics.items():
            for kind in ("weight", *SUMS):
                mine = getattr(found[-1].statistics[layer], kind)
                theirs = getattr(statistics, kind)
                assert mine.dtype == torch.float32
                error = float((mine - theirs).norm() / theirs.norm())
                assert error < 8 * tolerance, (layer, kind, error)
    if dtype is torch.bfloat16:  # no subnormals are lost: a power of two changes no bit
        assert_same(scaled, plain)


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scale_by_hand(as_function: bool, reduction: str) -> None:
    """loss_scale= of a scaler that is not torch's, which divides param.grad before the step."""
    model = net()
    optimizer = sgd(model)
    now = {"scale": SCALE}
    given: Any = (lambda: now["scale"]) if as_function else SCALE
    with probe_of(model, optimizer, loss_scale=given, loss_reduction=reduction) as probe:
        for step in range(3):
            now["scale"] = SCALE * (1 + step) if as_function else SCALE
            x, y = data(6)
            rows = rows_of(model, x, y)
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y) * (6 if reduction == "sum" else 1)
            (loss * now["scale"]).backward()
            for parameter in model.parameters():
                parameter.grad.div_(now["scale"])
            optimizer.step()
            assert_sums(probe.report, rows, gradient=6.0 if reduction == "sum" else 1.0)


def test_the_scale_of_a_weight_that_is_computed() -> None:
    """G formed from gᵀh, as the parameter's gradient is another's: the scale is divided out."""

    def build() -> nn.Module:
        torch.manual_seed(2)
        model = net()
        nn.utils.parametrizations.weight_norm(model[2])
        return model

    found = []
    for enabled in (False, True):
        model = build()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=SCALE)
        with probe_of(model, optimizer, window=2, every=lambda step: step == 2) as probe:
            for _ in range(3):
                optimizer.zero_grad()
                for _ in range(2):
                    x, y = data(6)
                    scaler.scale(F.mse_loss(model(x), y) / 2).backward()
                scaler.step(optimizer)
                scaler.update()
        found.append(probe.report)
    assert_same([found[1]], [found[0]])


def test_one_of_two_optimizers_skips_its_step() -> None:
    """An overflow in one optimizer's gradients alone: its layers lose the step, the others not."""

    class Spoilt(torch.autograd.Function):
        """The identity, whose gradient can be made infinite."""

        on = False

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * float("inf") if Spoilt.on else g

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(Spoilt.apply(torch.tanh(self.first(x))))

    model = Model().double()
    optimizers = [sgd(model.first), sgd(model.second)]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    firsts, seconds = [], []
    with probe_of(model, optimizers, window=3, every=lambda step: step == 2) as probe:
        for step in range(3):
            x, y = data(6)
            Spoilt.on = False
            rows = rows_of(model, x, y)
            seconds.append(rows["second"])
            if step != 1:
                firsts.append(rows["first"])
            Spoilt.on = step == 1
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(x), y)).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    for name, parts in {"first": firsts, "second": seconds}.items():
        expected = sums_of(joined([{name: part} for part in parts])[name])
        statistics = probe.report.statistics[name]
        torch.testing.assert_close(statistics.gradient, expected["gradient"], rtol=1e-9, atol=1e-12)
        if name == "second":
            torch.testing.assert_close(statistics.loss, expected["loss"], rtol=1e-9, atol=1e-12)
        assert bool(statistics.loss.isfinite().all())
