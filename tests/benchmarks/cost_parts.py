"""What the cost benchmark measures of one model: steps, long runs, memory, and an idle probe."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from cost_models import Training
from cost_timing import Memory, Mode, apart, interleaved, seconds

from feature_probe import RELATIONS, FeatureProbe

#: Steps of a window, as by default.
WINDOW = 4
#: By name: which relations are measured; None: those of a probe that is told nothing.
RELATION_SETS: Mapping[str, tuple[str, ...] | None] = {
    "default": None,
    "forward": ("fact", "bfact", "fact_sym", "nfa", "enfa"),
    "both sides": tuple(
        f"{side}{name}" for side in ("", "b") for name in ("fact", "fact_sym", "nfa", "enfa")
    ),
    "all": tuple(name for name, row in RELATIONS.items() if not row.needs_initial_network),
}
#: The relations that no part measures: a copy of the whole network would run beside the model.
LEFT_OUT = tuple(name for name, row in RELATIONS.items() if row.needs_initial_network)
#: What a measurement of memory holds: K and E alone, and with G.
MEMORY_SETS: Mapping[str, tuple[str, ...] | None] = {
    "K and E": ("nfa", "enfa"),
    "default": None,
    "all": RELATION_SETS["all"],
}
_FACT = ("fact", "bfact")
#: Steps of a run, at least.
_SHORTEST = 20


def probed(training: Training, **options: Any) -> FeatureProbe:
    """A probe on a training, attached; whatever goes wrong in it is raised."""
    return FeatureProbe(
        training.model, optimizer=training.optimizer, strict=True, **options
    ).attach()


def _timed(training: Training) -> Callable[[], float]:
    return lambda: seconds(training.step, training.device)


def _windows(relations: Sequence[str] | None) -> dict[str, Any]:
    """A window in every five steps: one step without, three inside it, and the one reported."""
    return {
        "relations": relations,
        "window": WINDOW,
        "every": lambda step: step % (WINDOW + 1) == WINDOW,
    }


def _pass(training: Training) -> Callable[[], float]:
    """Adds every probed weight's gradient to a sum, after a plain step: the bandwidth bound."""
    weights = {id(w): w for t in FeatureProbe.targets(training.model) for w in [t.module.weight]}
    sums = [torch.zeros_like(weight) for weight in weights.values()]

    def add() -> None:
        for total, weight in zip(sums, weights.values(), strict=True):
            total += weight.grad

    def step() -> float:
        training.step()
        return seconds(add, training.device)

    return step


def step_modes(name: str, rounds: int) -> dict[str, Mode]:
    """Every way of taking a step that the table compares, each with a model of its own."""
    trainings = {mode: Training(name) for mode in ("plain", "again", "idle", "fact", "pass")}
    last = (WINDOW + 1) * (rounds + 2)  # beyond the last step of the mode
    probed(trainings["idle"], every=lambda step: step == 0)
    probed(trainings["fact"], relations=_FACT, window=last + 1, every=lambda step: step == last)
    timed = WINDOW - 1
    modes = {
        mode: Mode(_timed(trainings[mode]), timed) for mode in ("plain", "again", "idle", "fact")
    }
    modes["pass"] = Mode(_pass(trainings["pass"]), timed)
    for kind, relations in RELATION_SETS.items():
        training = Training(name)
        probed(training, **_windows(relations))
        modes[kind] = Mode(_timed(training), WINDOW)  # the last one is reported
    return modes


def steps(name: str, rounds: int, limit: float) -> dict[str, Any]:
    """Seconds of steps in every mode, and the arithmetic behind the bound."""
    return {
        "seconds": interleaved(step_modes(name, rounds), rounds, limit),
        "bound": arithmetic(name),
    }


def arithmetic(name: str) -> dict[str, float]:
    """FLOPs of the probed layers: F of a forward pass, g of one Gram sum on the smaller side.

    ``g_kept`` leaves out the layers whose rows can be kept: four batches have no more than d rows.
    """
    training = Training(name)
    with torch.autocast(training.device.type, torch.bfloat16, training.device.type == "cuda"):
        told = FeatureProbe.estimate(training.model, training.batches[0][0])
    found = {"F": 0.0, "g": 0.0, "g_kept": 0.0}
    for layer, target in zip(told.layers, FeatureProbe.targets(training.model), strict=True):
        small = min(target.d_out, target.d_in)
        gram = 2.0 * layer.rows * target.groups * small**2
        found["F"] += layer.forward_flops
        found["g"] += gram
        found["g_kept"] += 0.0 if WINDOW * layer.rows <= small else gram
    return found


def long_run(name: str, relations: Sequence[str] | None, duration: float) -> dict[str, Any]:
    """A run whose probe is not told when to report, between two plain ones.

    Args:
        name: The model.
        relations: None: those by default.
        duration: Seconds of the probed run, twenty steps at least; the plain ones have half.
    """
    plain, followed = Training(name), Training(name)
    before = statistics.fmean(_run(plain, duration / 4))
    reports: list[int] = []
    with FeatureProbe(
        followed.model, optimizer=followed.optimizer, relations=relations, strict=True
    ) as probe:

        def stepped(step: int) -> None:
            if probe.report is not None and probe.report.step == step:
                reports.append(step)

        taken = _run(followed, duration, stepped)
        said = "" if probe.report is None else str(probe.report.settings.get("cost", ""))
    after = statistics.fmean(_run(plain, duration / 4))
    inside = {step - back for step in reports for back in range(WINDOW)}
    middle = len(taken) // 2
    late = range(middle, len(taken))
    return {
        "steps": len(taken),
        "seconds": sum(taken),
        "late_seconds": sum(taken[middle:]),
        "plain_before": before,
        "plain_after": after,
        "plain_inside": statistics.fmean(e for i, e in enumerate(taken) if i not in inside | {0}),
        "late_plain_inside": statistics.fmean(taken[i] for i in late if i not in inside),
        "reports": reports,
        "said": said,
    }


def _run(
    training: Training, duration: float, stepped: Callable[[int], None] = lambda _: None
) -> list[float]:
    """Seconds of each step of a run of so many seconds, twenty steps at least."""
    taken: list[float] = []
    end = time.perf_counter() + duration
    while len(taken) < _SHORTEST or time.perf_counter() < end:
        taken.append(seconds(training.step, training.device))
        stepped(len(taken) - 1)
    return taken


def long_runs(name: str, duration: float) -> dict[str, Any]:
    """Long runs with the default relations and with all, after a few steps that start things up."""
    _run(Training(name), 0)
    return {kind: long_run(name, RELATION_SETS[kind], duration) for kind in ("default", "all")}


def _load_code(relations: Sequence[str] | None) -> None:
    """A window and a report of a small model: what they load is no memory of the probe's."""
    training = Training("small")
    probe = probed(training, **_windows(relations))
    for _ in range(WINDOW + 1):
        training.step()
    probe.detach()


def held(name: str, relations: Sequence[str] | None) -> dict[str, Any]:
    """Bytes that a window holds, and those at the peak of a step, beyond a plain one's."""
    _load_code(relations)
    training = Training(name)
    memory = Memory(training.device)
    for _ in range(3):
        training.step()
    before, plain = memory.now(), memory.peak_of(training.step)
    options = {} if relations is None else {"relations": relations}
    # one step more than is estimated: after it the window is at once gone into the report
    probe = probed(training, every=lambda step: step == WINDOW + 1, window=WINDOW + 1, **options)
    started = memory.now()
    for _ in range(WINDOW):  # the first belongs to no window
        training.step()
    inside = memory.peak_of(training.step)
    window = memory.now()
    reported = memory.peak_of(training.step)
    if probe.report is None or probe.report.step != WINDOW + 1:
        raise RuntimeError("the step that was to be the report's was not")
    x = training.batches[0][0]
    with torch.autocast(training.device.type, torch.bfloat16, training.device.type == "cuda"):
        said = FeatureProbe.estimate(training.model, x, window=WINDOW, **options)
    return {
        "parameters": training.parameter_bytes,
        "attached": started - before,
        "held": window - before,
        "step_peak": inside - plain,
        "report_peak": reported - plain,
        "said_held": said.bytes_held,
        "said_peak": said.bytes_peak,
        "said_step": said.step_ratio,
        "said_report": said.report_seconds,
    }


def memory(name: str) -> dict[str, Any]:
    """:func:`held` for each choice of relations, each in a process of its own."""
    return {kind: apart(held, name, chosen) for kind, chosen in MEMORY_SETS.items()}


def idle(name: str, rounds: int, block: int) -> dict[str, list[list[float]]]:
    """Seconds a step on a small model, plain and idle: blocks of steps, interleaved."""

    def mode(training: Training) -> Mode:
        def steps_of_a_block() -> float:
            def run() -> None:
                for _ in range(block):
                    training.step()

            return seconds(run, training.device) / block

        return Mode(steps_of_a_block, 3)

    trainings = {kind: Training(name) for kind in ("plain", "again", "idle")}
    probed(trainings["idle"], every=lambda step: step == 0)
    return interleaved({kind: mode(each) for kind, each in trainings.items()}, rounds)
