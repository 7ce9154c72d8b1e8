"""Schedules are plain functions of the step."""

from __future__ import annotations

from typing import Any

import pytest

from feature_probe import ConfigurationError
from feature_probe.schedules import Schedule, at, every, log_spaced, parse_schedule


def due(schedule: Schedule, stop: int) -> list[int]:
    """Steps below ``stop`` that are due."""
    return [step for step in range(stop) if schedule(step)]


def test_every() -> None:
    """Steps 0, n, 2n, ..., or from another start on."""
    assert due(every(3), 10) == [0, 3, 6, 9]
    assert due(every(1), 3) == [0, 1, 2]
    assert due(every(4, start=2), 12) == [2, 6, 10]
    assert due(every(4, start=5), 14) == [5, 9, 13]


@pytest.mark.parametrize("interval", [0, -1, 2.0, True, None, "3"], ids=repr)
def test_every_needs_a_positive_integer(interval: Any) -> None:
    """Anything but a positive integer is refused, with what was given."""
    with pytest.raises(ConfigurationError, match=r"every.*positive integer, got"):
        every(interval)


def test_at() -> None:
    """Exactly the steps given, from any iterable, which is read once."""
    assert due(at([5, 2, 2]), 10) == [2, 5]
    schedule = at(iter((1, 4)))
    assert due(schedule, 10) == due(schedule, 10) == [1, 4]
    assert due(at(()), 10) == []


@pytest.mark.parametrize("per_decade", [1, 2, 3, 5, 10])
def test_log_spaced(per_decade: int) -> None:
    """Step 0, all powers of ten, about ``per_decade`` steps in a factor of ten, evenly in log."""
    schedule = log_spaced(per_decade)
    steps = due(schedule, 100_001)
    assert steps[:2] == [0, 1]
    assert {1, 10, 100, 1000, 10_000, 100_000} <= set(steps)
    assert len([step for step in steps if 1000 < step <= 10_000]) == per_decade
    expected = {0} | {round(10 ** (k / per_decade)) for k in range(5 * per_decade + 1)}
    assert set(steps) == expected


def test_log_spaced_by_default_is_ten_a_decade() -> None:
    """Ten steps in every factor of ten, where there are so many integers."""
    assert due(log_spaced(), 101) == due(log_spaced(10), 101)
    assert len([step for step in due(log_spaced(), 1001) if step > 100]) == 10


def test_log_spaced_needs_a_positive_integer() -> None:
    """Zero steps a decade are refused."""
    with pytest.raises(ConfigurationError, match=r"per_decade must be a positive integer, got 0"):
        log_spaced(0)


def test_no_schedule_has_negative_steps() -> None:
    """Before the start nothing is due."""
    for schedule in (every(3), at([2]), log_spaced()):
        assert not any(schedule(step) for step in range(-9, 0))


def test_parse_schedule() -> None:
    """An integer is `every`; a function is taken as it is."""
    assert due(parse_schedule(4), 10) == [0, 4, 8]
    mine: Schedule = lambda step: step == 7  # noqa: E731
    assert parse_schedule(mine) is mine
    assert parse_schedule(due) is due  # type: ignore[arg-type]  # any callable


@pytest.mark.parametrize("given", [0, 1.5, "every", [1, 2], None], ids=repr)
def test_what_is_no_schedule_is_refused(given: Any) -> None:
    """Neither a positive integer nor a function."""
    with pytest.raises(ConfigurationError, match=r"function step -> bool.*positive integer"):
        parse_schedule(given)
