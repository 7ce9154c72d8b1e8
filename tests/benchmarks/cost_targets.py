"""What was promised of the probe's cost, and whether it is kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import cost_accuracy
import cost_exact
import cost_figures as figures
from cost_layers import SIZES
from cost_models import MODELS

Found = Mapping[str, Any]
IDLE_MICROSECONDS, IDLE_RATIO, LONG_STEP = 15.0, 1.005, 3e-3
BUDGET = 1.02
#: A step inside a window.
WINDOW_STEP = {"mlp": 1.6, "resnet18": 1.45, "vit_tiny": 1.6, "gpt": 1.6, "vit_base": 1.6,
               "gpt2": 1.6, "resnet50": 1.45}  # fmt: skip
#: FACT and bFACT on every step, where the batch has 500 rows; on the MLP; on a GPU.
FACT_STEP, FACT_MLP, FACT_CUDA = 1.04, 1.12, 1.01
#: In units of the matmul bound, and what FACT adds in units of what the bandwidth bound does.
OF_MATMUL, OF_BANDWIDTH = 1.1, 2.0
#: Seconds of a whole report, by model and relations.
REPORTS = {("resnet18", "forward"): 0.8, ("resnet18", "all"): 1.4, ("mlp", "forward"): 0.3}
SAME_NUMBERS = 1e-9
#: An exact Jacobian: backward passes per output, products that form weight gradients, FLOPs in
#: those of its passes and Gram sums; the peak at the most outputs over that at the fewest.
EXACT_PASSES, EXACT_WEIGHTS, EXACT_FLOPS, EXACT_MEMORY = 1.0, 0.0, 1.0, 1.1
#: Of any score, from bfloat16 rows against float64.
BF16 = 2e-3
#: Bytes held, in bytes of the parameters; and how near the estimate is to be.
HELD, NEAR = {"K and E": 2.0, "default": 3.0}, 0.05


def rows(found: Found) -> list[list[str]]:
    """Figure, model, target, measured, verdict."""
    table = [*_idle(found)]
    for name, recipe in MODELS.items():
        parts = found["models"].get(name, {})
        for part, judge in _JUDGES.items():
            if part in parts:
                table += [[row[0], recipe.title, *row[1:]] for row in judge(name, parts[part])]
    return [*table, *_layers(found), *_exact(found), *_accuracy(found)]


def _idle(found: Found) -> Iterator[list[str]]:
    if "idle" in found:
        added = figures.added_microseconds(found["idle"])
        again = figures.added_microseconds(found["idle"], "again")
        middle, noise = statistics.median(added), statistics.median(map(abs, again))
        yield [
            "attached, no step due", "Linear 8-8", f"≤ {IDLE_MICROSECONDS:.0f} µs",
            f"{middle:.1f} µs", figures.verdict(middle, IDLE_MICROSECONDS, noise),
        ]  # fmt: skip


def _judged(
    figure: str, measured: float, target: float, noise: float = 0.0, *, least: bool = False
) -> list[str]:
    sign = "≥" if least else "≤"
    return [
        figure, f"{sign} {target:g}", f"{measured:.3g}" if least else f"{measured:.3f}",
        figures.verdict(measured, target, noise, least=least),
    ]  # fmt: skip


def _steps(name: str, part: Found) -> Iterator[list[str]]:
    seconds, noise = part["seconds"], figures.noise(part["seconds"])
    if statistics.median(figures.plain(seconds)) > LONG_STEP:
        idle = figures.ratio(seconds, "idle")
        yield _judged("attached, no step due", idle, IDLE_RATIO, noise)
    fact, bound = figures.ratio(seconds, "fact"), figures.bandwidth(seconds)
    target = FACT_CUDA if MODELS[name].needs_cuda else FACT_STEP
    target = FACT_MLP if name == "mlp" else target
    yield _judged("FACT and bFACT on every step", fact, target, noise)
    yield _judged(
        "what FACT adds / the bandwidth bound", max(fact - 1, 0.0) / (bound - 1), OF_BANDWIDTH,
        noise / (bound - 1),
    )  # fmt: skip
    step = figures.ratio(seconds, "all")
    matmul = figures.matmul(part["bound"])
    yield _judged("a step inside a window, all relations", step, WINDOW_STEP[name], noise)
    yield _judged("the same / the matmul bound", step / matmul, OF_MATMUL, noise / matmul)
    for (model, kind), target in REPORTS.items():
        if model == name:
            spent = statistics.median(figures.report_seconds(seconds, kind))
            yield _judged(f"a whole report, seconds, relations: {kind}", spent, target)


def _long(_: str, part: Found) -> Iterator[list[str]]:
    for kind, run in part.items():
        got = figures.amortised(run)
        noise = abs(got["noise"] - 1)
        yield _judged(
            f"default settings, relations: {kind}, whole run", got["whole"], BUDGET, noise
        )
        yield _judged(
            "the same, second half against its own plain steps", got["late inside"], BUDGET
        )


def _memory(_: str, part: Found) -> Iterator[list[str]]:
    for kind, target in HELD.items():
        one = part[kind]
        held = one["held"] / one["parameters"]
        yield _judged(f"memory held, relations: {kind}, in parameters", held, target)
        off = abs(one["held"] / one["said_held"] - 1)
        yield _judged(f"memory held, off the estimate, relations: {kind}", off, NEAR)


_JUDGES = {"steps": _steps, "long": _long, "memory": _memory}


def _layers(found: Found) -> Iterator[list[str]]:
    least = {(d_out, d_in): factor for d_out, d_in, _, factor in SIZES}
    for one in found.get("layers", []):
        size = (one["d_out"], one["d_in"])
        if size not in least:
            continue
        times = [b / a for a, b in zip(one["ours"], one["dense"], strict=True)]
        name = f"layer {size[0]} × {size[1]}"
        figure = f"one layer's report, times faster than dense {one['dtype']}"
        row = _judged(figure, statistics.median(times), least[size], least=True)
        yield [row[0], name, *row[1:]]
        yield [
            "the same numbers", name, f"≤ {SAME_NUMBERS:g}", f"{one['difference']:.1e}",
            figures.verdict(one["difference"], SAME_NUMBERS),
        ]  # fmt: skip


def _exact(found: Found) -> Iterator[list[str]]:
    counted = found.get("exact", [])
    if not counted:
        return
    for one in counted:
        name = f"perceptron, {one['outputs']} outputs"
        judged = (
            _judged(
                "exact Jacobian: backward passes / c", cost_exact.passes_each(one), EXACT_PASSES
            ),
            _judged("the same: weight gradients formed", one["weight_products"], EXACT_WEIGHTS),
            _judged("the same: FLOPs / c passes and sums", cost_exact.of_theory(one), EXACT_FLOPS),
        )
        yield from ([row[0], name, *row[1:]] for row in judged)
    name = f"perceptron, {counted[0]['outputs']} and {counted[-1]['outputs']} outputs"
    figure = "the same: peak of a window's step, most / fewest outputs"
    row = _judged(figure, cost_exact.peak_ratio(counted), EXACT_MEMORY)
    yield [row[0], name, *row[1:]]


def _accuracy(found: Found) -> Iterator[list[str]]:
    for one in found.get("accuracy", []):
        off = cost_accuracy.worst(one)
        yield [
            f"scores from {one['rows']:,} rows in bfloat16, off float64",
            f"layer {one['width']} × {one['width']}, {one['way']}", f"≤ {BF16:g}", f"{off:.1e}",
            figures.verdict(off, BF16),
        ]  # fmt: skip
