"""Pace: which steps are due, by a schedule or by a budget, and what that has cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from feature_probe.errors import ConfigurationError
from feature_probe.pacing.budget import Budget, Plan
from feature_probe.pacing.cost import Cost, CostMeter
from feature_probe.pacing.timers import timer_on
from feature_probe.schedules import Schedule, parse_schedule

logger = logging.getLogger(__name__)

#: The share of the training's time that probing may take where nothing is said.
DEFAULT_BUDGET = 0.02


class Pace:
    """Says when to report, and times the run for that.

    Args:
        every: A schedule; None: by the budget.
        budget: A share of the training's time; None: 0.02 where there is no schedule.
        window: Steps of a window.
        device: What the model runs on.
        agree: Makes of each process's numbers those of the first; called by all of them.

    Raises:
        ConfigurationError: for both a schedule and a budget, or where either is none.
    """

    def __init__(
        self,
        every: int | Schedule | None,
        budget: float | None,
        window: int,
        device: torch.device,
        agree: Callable[[Sequence[int]], Sequence[int]],
    ) -> None:
        if every is not None and budget is not None:
            raise ConfigurationError(
                "every= fixes when reports are made and budget= chooses it by their cost: give one "
                "of the two"
            )
        self._budget: Budget | None = None
        if every is None:
            self._budget = Budget(DEFAULT_BUDGET if budget is None else budget, window)
            self._schedule: Schedule = self._budget
        else:
            self._schedule = parse_schedule(every)
        self._agree = agree
        self._meter = CostMeter(timer_on(device))
        #: the step that was reported last, until it ends, and whether all processes met
        self._reported: tuple[int, bool] | None = None

    @property
    def cost(self) -> Cost:
        """What probing has cost so far."""
        return self._meter.cost()

    @property
    def settings(self) -> dict[str, str]:
        """What a report says about it, where it does not follow from the step alone."""
        if self._budget is None:
            return {}
        return {"cost": f"{self._budget.describe()}; {self.cost}"}

    def is_due(self, step: int) -> bool:
        """Whether a step is to be reported."""
        return bool(self._schedule(step))

    def start(self) -> None:
        """The probe is attached."""
        self._reported = None
        self._meter.start()

    def stop(self) -> None:
        """The probe is detached."""
        self._meter.stop()

    def mark(self) -> Any:
        """Now, for :meth:`reported`."""
        return self._meter.mark()

    def reported(self, start: Any, step: int, *, met: bool) -> None:
        """A report was made, or failed.

        Args:
            start: The mark before it.
            step: Of which step.
            met: Whether it came so far that all processes took part.
        """
        self._meter.reported(start)
        self._reported = step, met

    def stepped(self, followed: bool, alone: bool) -> None:
        """A step has ended; after a report, decide on the next one. All processes then meet.

        Args:
            followed: Whether it was in a window.
            alone: Whether nothing else was done in it.
        """
        self._meter.stepped(followed=followed, alone=alone)
        reported, self._reported = self._reported, None
        if self._budget is None or reported is None:
            return
        step, met = reported
        plan = self._budget.plan(self.cost)
        agreed = Plan(*self._agree((plan.gap, plan.interval))) if met else None
        if self._budget.follow(step, agreed):
            logger.info("%s; %s", self._budget.describe(), self.cost)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        budget = {} if self._budget is None else self._budget.state_dict()
        return {"cost": self._meter.state_dict(), "budget": budget}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """The way back from :meth:`state_dict`, at ``step``; an empty state is none."""
        if "cost" in state:
            self._meter.load_state_dict(state["cost"])
        if self._budget is not None:
            self._budget.load_state_dict(state.get("budget", {}), step)
