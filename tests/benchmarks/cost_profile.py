"""Where the time of a window's step and of a report goes: the functions a profiler saw, in groups.

Python's profiler counts a call's time whole. So a group is a few functions none of which calls
another of them, and what is left of a step after a plain one, or of a report, is "the rest".
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from cost_models import Training
from cost_parts import RELATION_SETS, WINDOW, probed
from cost_timing import seconds

#: By what is said of them: functions, as (file or "~" for builtins, name), whose time is added up.
STEP_GROUPS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vector-Jacobian products": (("jacobian.py", "vector_jacobian_products"),),
    "sums K and E": (("outer.py", "add_gram_"),),
    "scalars and copies of W, g and momentum": (("trajectory.py", "step"),),
    "sum G": (("moments.py", "add_gradient"),),
}
REPORT_GROUPS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "levels by chance": (("levels.py", "at"), ("levels.py", "mean")),
    "eigenproblems of K, E and AGOP": (("matrices.py", "spectrum"),),
    "products of W and G": (("matrices.py", "_slope_products"), ("matrices.py", "weight_gram")),
    "polar roots": (("matrices.py", "_root"),),
    "scores": (("agreement.py", "compare"),),
    "verdicts": (("doctor.py", "examine"), ("doctor.py", "judge")),
}
Work = Callable[[], object]


def profile(name: str) -> dict[str, Any]:
    """Shares of a window's step beyond a plain one, and of a report, with the default relations."""
    plain, followed = Training(name), Training(name)
    probed(
        followed, relations=RELATION_SETS["default"], window=WINDOW,
        every=lambda step: step % (WINDOW + 1) == WINDOW,
    )  # fmt: skip
    for _ in range(WINDOW + 2):  # a report, and the first step outside the next window
        followed.step()
    unprobed = statistics.median(seconds(plain.step, plain.device) for _ in range(WINDOW + 1))
    steps = _profiled(lambda: [followed.step() for _ in range(WINDOW - 1)])
    reported = _profiled(followed.step)
    step_total = _total(steps) / (WINDOW - 1)
    report_total = _cumulative(reported, ("probe.py", "_report"))
    return {
        "plain": unprobed,
        "step": step_total,
        "step_groups": {
            group: sum(_cumulative(steps, each) for each in functions) / (WINDOW - 1)
            for group, functions in STEP_GROUPS.items()
        },
        "report": report_total,
        "report_groups": {
            group: sum(_cumulative(reported, each) for each in functions)
            for group, functions in REPORT_GROUPS.items()
        },
    }


def _profiled(work: Work) -> pstats.Stats:
    profiler = cProfile.Profile()
    profiler.runcall(work)
    return pstats.Stats(profiler)


def _total(stats: pstats.Stats) -> float:
    total: float = stats.total_tt  # type: ignore[attr-defined]
    return total


def _cumulative(stats: pstats.Stats, function: tuple[str, str]) -> float:
    """Seconds in a function of a file and all that it calls."""
    file, name = function
    entries: Mapping[tuple[str, int, str], tuple[Any, ...]] = stats.stats  # type: ignore[attr-defined]
    return sum(
        timing[3]
        for (path, _, called), timing in entries.items()
        if called == name and path.rsplit("/", 1)[-1] == file and "benchmarks" not in path
    )


def shares(total: float, groups: Mapping[str, float], taken: float = 0.0) -> dict[str, float]:
    """Of what ``total`` has beyond ``taken``: each group's part and the rest, largest first."""
    beyond = total - taken
    found = {group: part / beyond for group, part in groups.items() if part > 0}
    found["the rest"] = 1 - sum(found.values())
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))
