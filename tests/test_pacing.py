"""A budget spaces reports by what they cost in the very run; the cost that is told is the real one.

Time is a clock of the test's own: steps, windows and reports take what the test says they take.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from feature_probe import ConfigurationError, FeatureProbe
from feature_probe.pacing.budget import nice
from feature_probe.pacing.cost import Cost
from feature_probe.pacing.pace import Pace
from feature_probe.pacing.timers import HostTimer
from feature_probe.reports.report import Report

CPU = torch.device("cpu")


class Clock:
    """What ``time.perf_counter`` says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time stands still but for the test."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Loop:
    """A training run of which only the time counts."""

    def __init__(self, clock: Clock, pace: Pace, window: int = 4) -> None:
        self.clock, self.pace, self.window = clock, pace, window
        self.plain, self.followed, self.report = 0.01, 0.03, 1.0
        self.pause: Callable[[int], float] = lambda step: 0.0
        self.step = 0
        self.due: list[int] = []

    def run(self, stop: int) -> Loop:
        """As FeatureProbe asks."""
        while self.step < stop:
            step = self.step
            ahead = range(step, step + self.window)
            followed = step == 0 or any(self.pace.is_due(other) for other in ahead)
            self.clock.now += self.followed if followed else self.plain
            self.clock.now += self.pause(step)
            if self.pace.is_due(step):
                start = self.pace.mark()
                self.clock.now += self.report
                self.pace.reported(start, step, met=True)
                self.due.append(step)
            self.pace.stepped(followed, True)
            self.step += 1
        return self


def paced(clock: Clock, every: Any = None, budget: float | None = None, window: int = 4) -> Loop:
    """A run that has begun."""
    pace = Pace(every, budget, window, CPU, lambda numbers: numbers)
    pace.start()
    return Loop(clock, pace, window)


def gaps(steps: list[int]) -> list[int]:
    """From one to the next."""
    return [b - a for a, b in itertools.pairwise(steps)]


@pytest.mark.parametrize(
    ("plain", "followed", "report", "budget", "interval"),
    [
        (0.01, 0.03, 1.0, 0.02, 6000),  # (4 · 2 + 100)/0.02 = 5,400
        (0.25, 0.40, 0.5, 0.02, 250),  # (4 · 0.6 + 2)/0.02 = 220
        (0.25, 0.40, 0.5, 0.10, 50),
        (0.25, 0.25, 0.0, 0.02, 10),  # nothing at all: never more often
        (0.25, 0.20, 1.0, 0.02, 200),  # windows that look cheaper than plain steps cost nothing
    ],
)
def test_reports_begin_early_and_end_evenly(
    clock: Clock, plain: float, followed: float, report: float, budget: float, interval: int
) -> None:
    """Step 0, 20 steps outside windows later, doubling gaps, then one interval for good.

    Once in between a report waits until what the beginning cost is within the budget.
    """
    loop = paced(clock, budget=budget)
    loop.plain, loop.followed, loop.report = plain, followed, report
    loop.run(20 * interval + 3000)
    between = gaps(loop.due)
    doubling = [24] + [48 * 2**k for k in range(20) if 48 * 2**k < interval]
    assert between[: len(doubling)] == doubling
    rest = between[len(doubling) :]
    assert len(rest) > 10
    waits = [gap for gap in rest if gap != interval]
    assert len(waits) <= 1
    assert all(gap > interval for gap in waits)


@pytest.mark.parametrize("report", [0.1, 2.0, 9.0])
def test_a_long_run_stays_within_the_budget(clock: Clock, report: float) -> None:
    """From ten minutes on the share never exceeds the budget, with what it really took.

    But for the first two reports, where they alone exceed that of ten minutes.
    """
    loop = paced(clock, budget=0.02)
    loop.report, loop.plain, loop.followed = report, 0.1, 0.12
    spent = 0.0
    while clock.now < 100 + 3 * 3600:
        before, count = clock.now, len(loop.due)
        followed = loop.run(loop.step + 1).clock.now - before
        reported = len(loop.due) > count
        work = followed - report if reported else followed
        spent += max(work - loop.plain, 0.0) + (report if reported else 0.0)
        trained = clock.now - 100 - spent
        if trained >= 600:
            window = 4 * 0.02  # of the window that is open, too
            assert spent <= max(0.0201 * trained, 2 * report + window) + window + 1e-6
    assert spent > 0.014 * trained  # the budget is used
    assert loop.pace.cost.share == pytest.approx(spent / trained, rel=0.01)


def test_the_cost_is_what_the_clock_says(clock: Clock) -> None:
    """Plain steps, windows, reports, and their share, exactly."""
    loop = paced(clock, every=50).run(201)
    cost = loop.pace.cost
    assert cost.plain_seconds == pytest.approx(0.01)
    assert cost.window_seconds == pytest.approx(4 * 0.02)
    assert cost.report_seconds == pytest.approx(1.0)
    assert cost.reports == 5
    assert cost.spent_seconds == pytest.approx(5 + 4 * 4 * 0.02)  # step 0's own aside
    assert cost.share == pytest.approx(cost.spent_seconds / (201 * 0.01 + 0.02))
    assert cost.cycle_steps == pytest.approx(8 + 100)
    assert "a report 100" in str(cost)
    assert "in 5 reports" in str(cost)


def test_pauses_of_the_loop_are_not_the_probes(clock: Clock) -> None:
    """Evaluation after every 25 steps, even inside windows, does not space reports further."""
    still, paused = paced(clock), paced(clock)
    paused.pause = lambda step: 3.0 if step % 25 == 24 else 0.0
    still.run(3000)
    paused.run(3000)
    assert gaps(paused.due)[:4] == gaps(still.due)[:4]
    assert paused.pace.cost.window_seconds < 0.2  # 3 s of pause, in one of two windows


def test_long_windows_are_measured_by_their_latest_steps(clock: Clock) -> None:
    """A window of 200 steps costs 200 times what one step does."""
    loop = paced(clock, window=200, every=1000).run(3001)
    assert loop.pace.cost.window_seconds == pytest.approx(200 * 0.02, rel=0.02)


def test_the_interval_changes_only_for_a_reason(clock: Clock) -> None:
    """Noise of a tenth keeps it; a network that becomes four times as slow does not."""
    loop = paced(clock)
    loop.plain, loop.followed, loop.report = 0.25, 0.4, 0.5
    loop.pause = lambda step: 0.02 * (step % 3)
    loop.run(4000)
    assert gaps(loop.due).count(250) >= len(loop.due) - 6
    loop.report = 4.0
    loop.run(20_000)
    assert gaps(loop.due)[-1] == 1000  # (2.4 + 16)/0.02 = 920


def test_nice_intervals() -> None:
    """The next of 1, 1.2, 1.5, ... times a power of ten, never less than asked."""
    given = (0.1, 1, 1.1, 11, 13, 99, 101, 2501, 8001, 10_000)
    assert [nice(steps) for steps in given] == [
        1, 1, 2, 12, 15, 100, 120, 3000, 10_000, 10_000,
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [0, -0.1, 2, 1.0001, True, "2 %", math.nan, None], ids=repr)
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    """Before anything is attached; both a schedule and a budget, too."""
    model = nn.Linear(2, 2)
    if budget is None:
        with pytest.raises(ConfigurationError, match=r"every=.*budget=.*one of the two"):
            FeatureProbe(model, every=10, budget=0.1)
        return
    with pytest.raises(ConfigurationError, match=r"budget must be a share .* got"):
        FeatureProbe(model, budget=budget)


class SlowSink:
    """Writing takes 4 seconds of the test's clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.reports = clock, []  # type: ignore[var-annotated]

    def write(self, report: Report) -> None:
        """Slowly."""
        self.clock.now += 4.0
        self.reports.append(report)

    def close(self) -> None:
        """Nothing."""


class Training:
    """A network that trains, a step a second of the test's clock."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        torch.manual_seed(0)
        self.clock, self.sink = clock, SlowSink(clock)
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, weight_decay=0.01)
        self.probe = FeatureProbe(
            self.model, optimizer=self.optimizer, sinks=[self.sink], strict=True, **options
        )

    def run(self, steps: int) -> Training:
        """The loop."""
        for _ in range(steps):
            self.clock.now += 1.0
            self.optimizer.zero_grad()
            self.model(torch.randn(8, 4)).square().mean().backward()
            self.optimizer.step()
        return self

    @property
    def steps(self) -> list[int]:
        """Of the reports."""
        return [report.records[0].step for report in self.sink.reports]


def test_the_budget_is_the_default(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Writing 4 s where a step takes 1 s: every 200 steps; said in the reports and in the log.

    12 of the first 600 seconds may be spent; the fourth report waits until it is within 2 %.
    """
    training = Training(clock)
    with caplog.at_level(logging.INFO, "feature_probe"), training.probe:
        training.run(1200)
    assert training.steps == [0, 24, 72, 799, 999, 1199]
    first, *_, last = (report.settings["cost"] for report in training.sink.reports)
    assert first.startswith("reports at steps 0 and 24, then by measured cost for a budget of 2 %")
    assert last.startswith("a report every 200 steps, more at the beginning, for a budget of 2 %")
    assert "a plain step takes 1e+03 ms, a window 0 of them more, a report 4" in last
    assert sum("a report every 200 steps" in message for message in caplog.messages) == 1
    assert training.probe.cost.spent_seconds == pytest.approx(24)
    assert training.probe.cost.share == pytest.approx(24 / 1200)


def test_a_fixed_schedule_is_timed_too(clock: Clock) -> None:
    """`every` decides alone, its reports say nothing that depends on time, `cost` does."""
    training = Training(clock, every=10)
    with training.probe:
        training.run(41)
    assert training.steps == [0, 10, 20, 30, 40]
    assert all("cost" not in report.settings for report in training.sink.reports)
    assert training.probe.cost.share == pytest.approx(20 / 41)


def test_detached_time_is_not_counted(clock: Clock) -> None:
    """Neither the time in between nor the step that is under way when attached again."""
    training = Training(clock, every=10)
    with training.probe:
        training.run(21)
    clock.now += 1000
    with training.probe:
        training.run(20)
    assert training.probe.cost.training_seconds == pytest.approx(41)
    assert training.probe.cost.plain_seconds == pytest.approx(1)


def test_a_report_that_fails_is_not_tried_again_at_once(clock: Clock) -> None:
    """The next one is due where it would have been; no report means no cost is known."""
    training = Training(clock)
    training.probe._strict = False
    training.probe._assembler = None  # type: ignore[assignment]  # whatever may go wrong
    with training.probe:
        training.run(200)
    assert training.sink.reports == []
    assert training.probe.faults == 200 // 24 + 1


def test_a_resumed_run_keeps_its_pace(clock: Clock) -> None:
    """Reports come at the steps at which they would have come, and the cost goes on adding up."""
    whole = Training(clock)
    with whole.probe:
        whole.run(1000)
    halves = Training(clock)
    with halves.probe:
        halves.run(500)
        buffer = io.BytesIO()
        torch.save(halves.probe.state_dict(), buffer)
    buffer.seek(0)
    resumed = Training(clock)
    resumed.probe.load_state_dict(torch.load(buffer, weights_only=True))
    with resumed.probe:
        resumed.run(500)
    assert halves.steps + resumed.steps == whole.steps
    assert resumed.probe.cost == whole.probe.cost


def test_a_state_of_a_fixed_schedule_begins_anew(clock: Clock) -> None:
    """A budget that takes over has an early window, then its own interval."""
    fixed = Training(clock, every=10)
    with fixed.probe:
        fixed.run(95)
    taken = Training(clock, budget=0.1)
    state = fixed.probe.state_dict()
    taken.probe.load_state_dict(state)
    with taken.probe:
        taken.run(200)
    assert taken.steps == [119, 159, 199, 239, 279]
    without = {key: value for key, value in state.items() if key != "pace"}
    older = Training(clock, budget=0.1)
    older.probe.load_state_dict(without)  # a state of a version that did not time
    with older.probe:
        older.run(60)
    assert older.steps == [119]


class Sometimes(HostTimer):
    """Has no time for the first 30 marks, like a device whose work is being captured."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> Any:
        """None at first."""
        self.marks += 1
        return None if self.marks <= 30 else super().mark()


def test_a_time_that_is_not_known_is_no_fault(clock: Clock) -> None:
    """Steps and reports without a mark are not measured; what follows is."""
    loop = paced(clock, every=10)
    loop.pace._meter._timer = Sometimes()
    loop.run(102)
    assert loop.pace.cost.plain_seconds == pytest.approx(0.01)
    assert loop.pace.cost.report_seconds == pytest.approx(1.0)
    assert loop.pace.cost.reports == 8


def test_cost_before_anything_is_known() -> None:
    """Undefined numbers are NaN and can be printed."""
    cost = Cost()
    assert math.isnan(cost.share)
    assert math.isnan(cost.cycle_steps)
    assert "nan" in str(cost)
