"""When to report: plain functions ``step -> bool``, where step counts from 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from feature_probe.errors import positive_integer

#: True for the steps that are to be reported. Must depend on the step alone.
Schedule = Callable[[int], bool]


def every(interval: int, start: int = 0) -> Schedule:
    """Steps ``start``, ``start + interval``, ``start + 2·interval``, ...

    Raises:
        ConfigurationError: if ``interval`` is not a positive integer.
    """
    positive_integer("every (or a function step -> bool in its place)", interval)
    return lambda step: step >= start and (step - start) % interval == 0


def at(steps: Iterable[int]) -> Schedule:
    """Exactly the given steps."""
    chosen = frozenset(steps)
    return lambda step: step in chosen


def log_spaced(per_decade: int = 10) -> Schedule:
    """Step 0 and then about ``per_decade`` steps in every factor of ten.

    Raises:
        ConfigurationError: if ``per_decade`` is not positive.
    """
    positive_integer("per_decade", per_decade)

    def due(step: int) -> bool:
        if step < 1:
            return step == 0
        nearest = math.log10(step) * per_decade
        around = (math.floor(nearest), math.ceil(nearest))
        return any(round(10 ** (exponent / per_decade)) == step for exponent in around)

    return due


def parse_schedule(given: int | Schedule) -> Schedule:
    """An integer n as :func:`every` n, a callable as it is.

    Raises:
        ConfigurationError: for anything else.
    """
    return given if callable(given) else every(given)
