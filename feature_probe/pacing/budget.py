"""Budget: reports as often as a share of the training's time allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feature_probe.errors import ConfigurationError
from feature_probe.pacing.cost import Cost

#: Steps outside windows before the first window after the one at step 0.
_EARLY = 20
#: Never more often than every so many steps.
_LEAST = 10
#: Training time that a budget is for, at least, in seconds.
_HORIZON = 600.0
#: The intervals in every factor of ten.
_NICE = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
#: An interval stays while what is needed lies between these shares of it.
_STAYS = (0.5, 1.1)


@dataclass(frozen=True)
class Plan:
    """What follows a report.

    Attributes:
        gap: Steps to the next one.
        interval: Steps between two once the beginning is over; 0 while it is not known.
    """

    gap: int
    interval: int


class Budget:
    """A schedule that follows from measured cost: dense at the beginning, then even.

    The report at step 0 is that of initialisation; the second comes after 20 steps outside windows.
    Then the gaps double up to the interval at which a window and a report cost ``share`` of the
    plain steps between two of them, rounded up to 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6 or 8 times a
    power of ten. It stays until the measured cost asks for more than 1.1 times it, or less than
    half. What was spent altogether stays within ``share`` of the training's time, or of ten
    minutes where that is more, so that a short run sees something: the next report waits for that.

    Args:
        share: The budget, a share of the training's time.
        window: Steps of a window.

    Attributes:
        next: The first step that is due.

    Raises:
        ConfigurationError: if ``share`` is no number above 0 and at most 1.
    """

    def __init__(self, share: float, window: int) -> None:
        given: object = share
        is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if not is_number or not 0 < share <= 1:
            raise ConfigurationError(
                "budget must be a share of the training's time, above 0 and at most 1 (0.02 is two "
                f"per cent), got {share!r}"
            )
        self.next = 0
        self._share = float(share)
        self._window = window
        self._plan = Plan(_EARLY + window, 0)

    def __call__(self, step: int) -> bool:
        """Whether a step is due: from :attr:`next` on, until :meth:`follow` is told of a report."""
        return step >= self.next

    def plan(self, cost: Cost) -> Plan:
        """What should follow a report.

        Args:
            cost: At its end.
        """
        steps = cost.cycle_steps / self._share
        if not math.isfinite(steps):
            return self._plan
        least = max(self._window, _LEAST)
        interval = self._plan.interval
        low, high = (share * interval for share in _STAYS)
        if not low <= max(steps, least) <= high:
            interval = max(nice(steps), least)
        gap = min(interval, 2 * self._plan.gap)
        ahead = cost.spent_seconds + cost.cycle_steps * cost.plain_seconds
        wait = ahead / self._share - cost.training_seconds
        if ahead > self._share * _HORIZON and wait > gap * cost.plain_seconds:
            gap = math.ceil(wait / cost.plain_seconds)
        return Plan(gap, interval)

    def follow(self, step: int, plan: Plan | None) -> bool:
        """A report was made at ``step``.

        Args:
            step: Which.
            plan: What follows, the same in all processes; None: as before.

        Returns:
            Whether the interval is another one now.
        """
        before = self._plan.interval
        self._plan = self._plan if plan is None else plan
        self.next = step + self._plan.gap
        return self._plan.interval != before

    def describe(self) -> str:
        """What was chosen, and why."""
        budget = f"a budget of {100 * self._share:g} %"
        if not self._plan.interval:
            early = _EARLY + self._window
            return f"reports at steps 0 and {early}, then by measured cost for {budget}"
        return f"a report every {self._plan.interval} steps, more at the beginning, for {budget}"

    def state_dict(self) -> dict[str, int]:
        """What a resumed run goes on with."""
        return {"next": self.next, "gap": self._plan.gap, "interval": self._plan.interval}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """The way back; from a run without a budget, an early window follows."""
        early = _EARLY + self._window
        self._plan = Plan(state.get("gap", early), state.get("interval", 0))
        self.next = state.get("next", step + early if step else 0)


def nice(steps: float) -> int:
    """The next interval from ``steps`` on that is easy to read."""
    if steps <= 1:
        return 1
    power = 10.0 ** math.floor(math.log10(steps))
    rounded = (math.ceil(round(factor * power, 9)) for factor in _NICE)
    return next(interval for interval in rounded if interval >= steps)
