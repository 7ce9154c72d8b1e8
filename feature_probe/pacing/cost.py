"""What probing costs: a window's steps and a report, against the plain steps of the same run."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from feature_probe.pacing.timers import Timer

_NAN = float("nan")
#: Steps of a kind that are remembered, and windows and reports.
_STEPS, _CYCLES = 64, 5
#: Fewest steps outside windows whose median is taken.
_FEWEST = 5
#: A step longer than so many others of its kind held a pause of the loop: an evaluation, a
#: checkpoint.
_PAUSE = 4.0

#: The stretches of time that one step is made of, each from a mark to a mark.
_Span = tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Cost:
    """What probing has cost in a run so far, as measured in it.

    Attributes:
        plain_seconds: A step outside windows, the median of the latest 64; NaN before 5 were seen.
        window_seconds: What the steps of a window took beyond plain ones, all of them together:
            the median of the latest 5 windows; NaN before one was measured. The first step after
            :meth:`FeatureProbe.attach` is not measured: it starts up the model, too.
        report_seconds: Making and writing a report: the median of the latest 5; NaN before one.
        spent_seconds: All windows and reports so far.
        training_seconds: How long the probe was attached, less that.
        reports: How many were made.
    """

    plain_seconds: float = _NAN
    window_seconds: float = _NAN
    report_seconds: float = _NAN
    spent_seconds: float = 0.0
    training_seconds: float = 0.0
    reports: int = 0

    @property
    def share(self) -> float:
        """Time spent on probing, as a share of the training's own; NaN where none has passed."""
        return self.spent_seconds / self.training_seconds if self.training_seconds > 0 else _NAN

    @property
    def cycle_steps(self) -> float:
        """A window and a report, in plain steps; NaN while any of the three is not known."""
        return (max(self.window_seconds, 0.0) + self.report_seconds) / self.plain_seconds

    def __str__(self) -> str:
        share = f"{100 * self.share:.2g} % of the training's time"
        said = f"so far {self.spent_seconds:.3g} s, {share}, in {self.reports} reports"
        if math.isnan(self.cycle_steps):
            return said
        window, report = (
            f"{seconds / self.plain_seconds:.3g}"
            for seconds in (max(self.window_seconds, 0.0), self.report_seconds)
        )
        return (
            f"{said}; a plain step takes {1e3 * self.plain_seconds:.3g} ms, a window {window} "
            f"of them more, a report {report}"
        )


class CostMeter:
    """Times a run as it passes: one mark a step, read only after reports.

    Args:
        timer: Makes the marks.
    """

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._plain: deque[_Span] = deque(maxlen=_STEPS)
        self._followed: deque[_Span] = deque(maxlen=_STEPS)
        self._followed_steps = 0
        self._windows: deque[float] = deque(maxlen=_CYCLES)
        self._reports: deque[float] = deque(maxlen=_CYCLES)
        self._plain_seconds = _NAN
        self._spent, self._count = 0.0, 0
        self._elapsed = 0.0
        self._attached: float | None = None
        self._last: Any = None
        #: of the report in this step, if there is one: before and after
        self._around: tuple[Any, Any] | None = None

    def start(self) -> None:
        """The probe is attached, in the middle of a step."""
        self._attached = time.perf_counter()
        self._forget()

    def stop(self) -> None:
        """The probe is detached: what follows is not its time."""
        if self._attached is not None:
            self._elapsed += time.perf_counter() - self._attached
        self._attached = None
        self._forget()

    def mark(self) -> Any:
        """Now, for :meth:`reported`."""
        return self._timer.mark()

    def reported(self, start: Any) -> None:
        """A report was made in this step, since ``start``."""
        self._around = start, self._timer.mark()

    def stepped(self, *, followed: bool, alone: bool = True) -> None:
        """A step has ended; waits for the device if there was a report in it.

        Args:
            followed: Whether it was in a window.
            alone: Whether nothing else was done in it, such as the self-test's work.
        """
        mark, around = self._timer.mark(), self._around
        if mark is None or (around is not None and None in around):
            self._forget()
            return
        if self._last is not None and alone:
            kind = self._followed if followed else self._plain
            if around is None:
                kind.append(((self._last, mark),))
            else:
                kind.append(((self._last, around[0]), (around[1], mark)))
            self._followed_steps += followed
        self._last, self._around = mark, None
        if around is not None:
            self._reports.append(self._timer.seconds(*around))
            self._spent += self._reports[-1]
            self._count += 1
            self._read()

    def cost(self) -> Cost:
        """What is known by now."""
        running = 0.0 if self._attached is None else time.perf_counter() - self._attached
        return Cost(
            plain_seconds=self._plain_seconds,
            window_seconds=_median(self._windows),
            report_seconds=_median(self._reports),
            spent_seconds=self._spent,
            training_seconds=self._elapsed + running - self._spent,
            reports=self._count,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with: numbers alone."""
        cost = self.cost()
        return {
            "plain_seconds": cost.plain_seconds,
            "windows": list(self._windows),
            "reports": list(self._reports),
            "spent": cost.spent_seconds,
            "elapsed": cost.training_seconds + cost.spent_seconds,
            "count": cost.reports,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back from :meth:`state_dict`; the machine may be another one."""
        self._plain_seconds = state["plain_seconds"]
        self._windows = deque(state["windows"], maxlen=_CYCLES)
        self._reports = deque(state["reports"], maxlen=_CYCLES)
        self._spent, self._count = state["spent"], state["count"]
        self._elapsed = state["elapsed"]
        if self._attached is not None:
            self.start()

    def _forget(self) -> None:
        self._last = self._around = None
        self._plain.clear()
        self._followed.clear()
        self._followed_steps = 0

    def _read(self) -> None:
        """Plain steps, and what the window cost beyond them, where there are any."""
        plain, followed = self._seconds(self._plain), self._seconds(self._followed)
        steps, self._followed_steps = self._followed_steps, 0
        self._followed.clear()
        if len(plain) >= _FEWEST:
            self._plain_seconds = statistics.median(plain)
        if not followed or math.isnan(self._plain_seconds):
            return
        longest = _PAUSE * statistics.median(followed)
        mean = statistics.fmean(min(seconds, longest) for seconds in followed)
        self._windows.append(steps * (mean - self._plain_seconds))
        self._spent += self._windows[-1]

    def _seconds(self, spans: Iterable[_Span]) -> list[float]:
        seconds = self._timer.seconds
        return [sum(seconds(start, end) for start, end in span) for span in spans]


def _median(values: deque[float]) -> float:
    """Of two the smaller one: a pause of the loop makes a window look dear, never cheap."""
    return statistics.median_low(values) if values else _NAN
