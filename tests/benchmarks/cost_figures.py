"""Figures out of what the cost benchmark measured: ratios within rounds, bounds, verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: Steps of a turn that are steps and no report: a window of four reports in its last.
IN_A_WINDOW = 3
Rounds = Mapping[str, Sequence[Sequence[float]]]


def _step(turn: Sequence[float]) -> float:
    return statistics.fmean(turn[:IN_A_WINDOW])


def plain(seconds: Rounds) -> list[float]:
    """A plain step by round: the mean of both plain modes where there are two."""
    both = [seconds[mode] for mode in ("plain", "again") if mode in seconds]
    return [statistics.fmean(map(_step, turns)) for turns in zip(*both, strict=True)]


def ratios(seconds: Rounds, mode: str) -> list[float]:
    """Steps of a mode in plain ones of the same round; of "again" in those of "plain"."""
    against = [_step(turn) for turn in seconds["plain"]] if mode == "again" else plain(seconds)
    return [_step(turn) / one for turn, one in zip(seconds[mode], against, strict=True)]


def ratio(seconds: Rounds, mode: str) -> float:
    """Their median."""
    return statistics.median(ratios(seconds, mode))


def noise(seconds: Rounds) -> float:
    """How far a plain step is from a plain step of the same round, in the middle of the rounds."""
    return statistics.median(abs(each - 1) for each in ratios(seconds, "again"))


def report_seconds(seconds: Rounds, kind: str) -> list[float]:
    """What the step that is reported takes beyond the other steps of its window, by round."""
    return [turn[-1] - _step(turn) for turn in seconds[kind]]


def report_steps(seconds: Rounds, kind: str) -> list[float]:
    """The same in plain steps of the same round."""
    spent = report_seconds(seconds, kind)
    return [each / one for each, one in zip(spent, plain(seconds), strict=True)]


def bandwidth(seconds: Rounds) -> float:
    """A plain step and one pass ``sum += gradient`` over the probed weights, in plain steps."""
    return 1 + ratio(seconds, "pass")


def matmul(bound: Mapping[str, float], *, kept: bool = False) -> float:
    """(4F + 2g)/3F; with ``kept`` g counts only the layers whose rows are not kept."""
    return (4 * bound["F"] + 2 * bound["g_kept" if kept else "g"]) / (3 * bound["F"])


def added_microseconds(idle: Rounds, mode: str = "idle") -> list[float]:
    """What a mode adds to a plain step of the same round, in microseconds."""
    return [
        1e6 * (each - 1) * one for each, one in zip(ratios(idle, mode), plain(idle), strict=True)
    ]


def amortised(run: Mapping[str, Any]) -> dict[str, float]:
    """A long run's mean step in plain ones.

    "whole" and "late", its second half, against the plain runs before and after it; "inside" and
    "late inside" against its own steps outside windows, which the machine's drift does not touch.
    """
    beside = (run["plain_before"] + run["plain_after"]) / 2
    count = run["steps"]
    late = count - count // 2
    return {
        "whole": run["seconds"] / count / beside,
        "late": run["late_seconds"] / late / beside,
        "inside": run["seconds"] / count / run["plain_inside"],
        "late inside": run["late_seconds"] / late / run["late_plain_inside"],
        "noise": run["plain_after"] / run["plain_before"],
    }


def verdict(measured: float, target: float, noise: float = 0.0, *, least: bool = False) -> str:
    """Met or missed; and where the noise is larger than what it is missed by, that."""
    gap = target - measured if least else measured - target
    if gap <= 0:
        return "met"
    return "missed, by less than the noise" if gap <= noise else "**missed**"
