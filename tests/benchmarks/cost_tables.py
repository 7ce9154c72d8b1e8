"""The Markdown of the cost benchmark: a table a topic, made of the JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cost_accuracy
import cost_exact
import cost_figures as figures
import cost_growth
import cost_profile
from cost_alternatives import PACKAGES
from cost_models import MODELS
from cost_parts import LEFT_OUT, MEMORY_SETS, RELATION_SETS, WINDOW
from cost_targets import rows

Found = Mapping[str, Any]


def _spread(values: Sequence[float], form: str = ".3f") -> str:
    """Median (lowest to highest)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def _table(title: str, told: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A title, a paragraph and a table; nothing where there are no rows."""
    if not body:
        return []
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    return [f"## {title}", "", told, "", *lines, ""]


def _models(found: Found, part: str) -> Iterator[tuple[str, Any]]:
    """Title and results of every model that has the part."""
    for name, recipe in MODELS.items():
        if part in found["models"].get(name, {}):
            yield recipe.title, found["models"][name][part]


def _targets(found: Found) -> list[str]:
    told = (
        "Every figure that was promised, beside what was measured here. A ratio is in plain "
        "training steps of the same model in the same run, median over rounds."
    )
    return _table(
        "Targets", told, ("figure", "model", "target", "measured", "verdict"), rows(found)
    )


def _steps(found: Found) -> list[str]:
    told = (
        "How long a step takes, in plain ones of the same round: median over rounds (lowest to "
        "highest). *plain again* is a second plain loop: the noise. *Idle*: attached, nothing due. "
        "*FACT, bFACT*: both followed on every step. *Window*: a step inside a window of four "
        "with the default relations, or with all. The bounds are what cannot be saved: one pass "
        "over the weights (`sum += gradient`, timed here), and the matrix products "
        "(4F + 2g)/3F, F a forward pass, g one Gram sum on the smaller side of every layer; in "
        "brackets without the layers whose rows are kept instead."
    )
    head = (
        "model", "plain, ms", "plain again", "idle", "FACT, bFACT", "bandwidth bound",
        "window, default", "window, all", "matmul bound",
    )  # fmt: skip
    body = []
    for title, part in _models(found, "steps"):
        seconds = part["seconds"]
        ratios = {
            mode: _spread(figures.ratios(seconds, mode))
            for mode in ("again", "idle", "fact", "default", "all")
        }
        plain = 1e3 * statistics.median(figures.plain(seconds))
        bounds = figures.matmul(part["bound"]), figures.matmul(part["bound"], kept=True)
        body.append([
            title, f"{plain:.1f}", ratios["again"], ratios["idle"], ratios["fact"],
            f"{figures.bandwidth(seconds):.3f}", ratios["default"], ratios["all"],
            f"{bounds[0]:.2f} ({bounds[1]:.2f})",
        ])  # fmt: skip
    return _table("A step", told, head, body)


def _reports(found: Found) -> list[str]:
    named = "; ".join(
        f"*{kind}*: {', '.join(names) if names else 'what a probe measures that is told nothing'}"
        for kind, names in RELATION_SETS.items()
    )
    told = (
        "What the step with a report takes beyond the other steps of its window: seconds, median "
        "(lowest to highest), and the median in plain steps. Powers ½ and 1, float64. Relations: "
        f"{named}. Not measured, as a copy of the whole network runs beside the model for them: "
        f"{', '.join(LEFT_OUT)}."
    )
    body = []
    for title, part in _models(found, "steps"):
        seconds = part["seconds"]
        body.append([title] + [
            f"{_spread(figures.report_seconds(seconds, kind), '.2f')} s, "
            f"{statistics.median(figures.report_steps(seconds, kind)):.3g} steps"
            for kind in RELATION_SETS
        ])  # fmt: skip
    return _table("A report", told, ("model", *RELATION_SETS), body)


def _long_runs(found: Found) -> list[str]:
    told = (
        "`FeatureProbe(model, optimizer=optimizer)` and nothing else (with *all*: `relations=` "
        "too), end to end, reports included: the mean step in plain ones. Against the plain "
        "runs before and after it, whose ratio to each other is the noise; and against the same "
        "run's own steps outside windows, which drift does not touch. The second half is what a "
        "longer run comes to: at the beginning reports are made early."
    )
    head = (
        "model", "relations", "steps", "seconds", "reports", "whole run", "second half",
        "whole, own plain steps", "second half, own plain steps", "plain after / before",
    )  # fmt: skip
    body = []
    for title, part in _models(found, "long"):
        for kind, run in part.items():
            got = figures.amortised(run)
            shown = [f"{got[key]:.3f}" for key in ("whole", "late", "inside", "late inside")]
            body.append([
                title, kind, f"{run['steps']:,}", f"{run['seconds']:.0f}",
                str(len(run["reports"])), *shown, f"{got['noise']:.3f}",
            ])  # fmt: skip
    return _table("A long run with the default settings", told, head, body)


def _memory(found: Found) -> list[str]:
    named = ", ".join(f"*{kind}*" for kind in MEMORY_SETS)
    told = (
        "In a process of its own, beyond what a plain loop has, in bytes of all parameters: held "
        "late in a window of four, at the peak of a step in it, and at the peak of the step with "
        f"the report; and what `FeatureProbe.estimate` says of the first two. Relations: {named}, "
        "*K and E* being nfa and enfa alone."
    )
    head = (
        "model", "parameters, MiB", "relations", "held", "estimate", "held / estimate",
        "peak of a step", "estimate", "peak of a report",
    )  # fmt: skip
    body = []
    for title, part in _models(found, "memory"):
        for kind, one in part.items():
            unit = one["parameters"]
            body.append([
                title, f"{unit / 2**20:.1f}", kind, f"{one['held'] / unit:.2f}",
                f"{one['said_held'] / unit:.2f}", f"{one['held'] / one['said_held']:.2f}",
                f"{one['step_peak'] / unit:.2f}", f"{one['said_peak'] / unit:.2f}",
                f"{one['report_peak'] / unit:.2f}",
            ])  # fmt: skip
    return _table("Memory", told, head, body)


def _layers(found: Found) -> list[str]:
    told = (
        "FACT, its symmetric form, NFA and eNFA, at powers ½ and 1, of one layer on random sums: "
        "`score_layer` in float64 against code that forms every matrix d_in × d_in and calls "
        "`eigh`. `score_layer` also finds every other number of a record. Difference: the "
        "largest of cosine and Pearson's r from the dense code in float64."
    )
    head = (
        "d_out × d_in", "dense in", "dense, s", "score_layer, s", "times faster", "difference",
        "difference of the dense code",
    )  # fmt: skip
    body = [
        [
            f"{one['d_out']} × {one['d_in']}", one["dtype"], _spread(one["dense"]),
            _spread(one["ours"], ".4f"),
            _spread([b / a for a, b in zip(one["ours"], one["dense"], strict=True)], ".1f"),
            f"{one['difference']:.1e}", f"{one['dense_difference']:.1e}",
        ]
        for one in found.get("layers", [])
    ]  # fmt: skip
    return _table("One layer's report against dense algebra", told, head, body)


def _idle(found: Found) -> list[str]:
    if "idle" not in found:
        return []
    told = (
        "On a Linear 8-8, where nothing hides it: microseconds added to a step, median (lowest "
        "to highest) over rounds of three blocks of steps."
    )
    plain = 1e6 * statistics.median(figures.plain(found["idle"]))
    shown = [
        _spread(figures.added_microseconds(found["idle"], m), ".1f") for m in ("again", "idle")
    ]
    head = ("plain step, µs", "a second plain loop adds", "an idle probe adds")
    return _table("An idle probe", told, head, [[f"{plain:.1f}", *shown]])


def _growth(found: Found) -> list[str]:
    base = cost_growth.BASE
    told = (
        f"Of a perceptron with {base.depth} hidden layers of width {base.width}, batch "
        f"{base.batch}, {base.positions} position and {base.outputs} outputs, one quantity varied: "
        "the e in cost ∝ sizeᵉ, by least squares on the logarithms of the last "
        f"{cost_growth.FITTED} sizes; in brackets the cost at the largest. By matrix products "
        "steps grow with the width's square, with depth, batch and positions, and with the outputs "
        "where the Jacobian is exact; reports with the width's cube and with depth; what is held "
        "with the width's square and with depth. A report draws its levels by chance as often as "
        "is affordable, so that its time does not follow from the sizes alone."
    )
    head = (
        "quantity", "Jacobian", "sizes", "plain step", "a window's step adds", "a report",
        "bytes held",
    )  # fmt: skip
    body = []
    for series in found.get("growth", []):
        fitted, last = cost_growth.exponents(series), cost_growth.costs(series["points"][-1])
        shown = {
            "plain": f"{1e3 * last['plain']:.1f} ms", "step": f"{1e3 * last['step']:.1f} ms",
            "report": f"{last['report']:.2f} s", "bytes": f"{last['bytes'] / 2**20:.1f} MiB",
        }  # fmt: skip
        sizes = ", ".join(map(str, series["sizes"]))
        body.append([
            series["quantity"], series["jacobian"], sizes,
            *(f"{fitted[cost]:.2f} ({shown[cost]})" for cost in cost_growth.COSTS),
        ])  # fmt: skip
    return _table("How the cost grows", told, head, body)


def _exact(found: Found) -> list[str]:
    size = cost_exact.SIZE
    told = (
        'A step inside a window with `jacobian="exact"` beyond a plain one, at c outputs. Counted '
        f"on a perceptron {'-'.join(map(str, cost_exact.WIDTHS))}-c, batch {cost_exact.BATCH}: "
        "backward passes through every hidden layer, matrix products that form a weight's "
        "gradient, FLOPs over those of c activation-only backward passes, as many Gram sums for K "
        f"and one for E. Measured with {size.depth} hidden layers of width {size.width}, batch "
        f"{size.batch}: the peak in a process of its own, beside an array [n, c, d] of one layer; "
        "and the seconds that an output adds, in activation-only backward passes of the same round "
        "(from the output to the first layer's, weights without gradients), beside what the matrix "
        "products alone come to."
    )
    head = (
        "c", "passes / c", "weight gradients", "FLOPs / theory", "peak, MiB", "[n, c, d], MiB",
        "an output's passes of time", "by products",
    )  # fmt: skip
    body = [
        [
            str(one["outputs"]), f"{cost_exact.passes_each(one):g}", str(one["weight_products"]),
            f"{cost_exact.of_theory(one):.3f}", f"{one['peak'] / 2**20:.1f}",
            f"{one['array'] / 2**20:g}", _spread(cost_exact.seconds_each(one), ".2f"),
            f"{cost_exact.products_each(one):.2f}",
        ]
        for one in found.get("exact", [])
    ]  # fmt: skip
    return _table("Exact Jacobians", told, head, body)


def _accuracy(found: Found) -> list[str]:
    told = (
        "Rows of the Jacobian and the loss's gradients that arrive in bfloat16 (from an autocast, "
        "or from a model that is all bfloat16) in batches of "
        f"{cost_accuracy.BATCH}, summed by `measure`; singular values fall off as 1/j. *Off*: how "
        "far cosine and Pearson's r are from those of the same rows in float64, with the same "
        "eigenvalue clamp. *Unrounded*: how far those in float64 are from rows that were never "
        "rounded to bfloat16."
    )
    head = (
        "layer", "bfloat16 by", "rows", "relation", "cosine", "cosine off", "pearson off",
        "cosine, unrounded", "pearson, unrounded",
    )  # fmt: skip
    body = [
        [
            f"{one['width']} × {one['width']}", one["way"], f"{one['rows']:,}", label,
            f"{pair[0]:.4f}", *(f"{each:.1e}" for each in one["summed"][label]),
            *(f"{each:.1e}" for each in one["rounded"][label]),
        ]
        for one in found.get("accuracy", [])
        for label, pair in one["float64"].items()
    ]  # fmt: skip
    return _table("Scores from bfloat16 rows", told, head, body)


def _profile(found: Found) -> list[str]:
    told = (
        "The default relations; shares of what a window's step takes beyond a plain one, and of a "
        "report. By Python's profiler, which makes short calls look longer. Beside the work named, "
        "the cost of a step is what its traffic leaves the training of the caches."
    )
    body = []
    for title, part in _models(found, "profile"):
        step = cost_profile.shares(part["step"], part["step_groups"], part["plain"])
        report = cost_profile.shares(part["report"], part["report_groups"])
        for where, spent, found_shares in (
            ("a window's step", part["step"] - part["plain"], step),
            ("a report", part["report"], report),
        ):
            said = ", ".join(f"{name} {share:.0%}" for name, share in found_shares.items())
            body.append([title, where, f"{spent:.3f} s", said])
    return _table("Where the time goes", told, ("model", "of", "takes", "shares"), body)


def _wide(found: Found) -> list[str]:
    told = (
        "Two layers of a GPT of GPT-2's width and vocabulary after some steps of training, "
        "measured at frozen weights in full and within `max_dim`: the cosine in full, and how far "
        "it is off in the subspace. In the head K is the identity: nfa and bnfa in full are for "
        "that, so that what they are off is mostly what the random probes leave. Backward scores "
        "are those of a sketch of K."
    )
    found = found.get("wide", [])
    if not found:
        return []
    limits = [part["limit"] for part in found[0]["within"]]
    head = ("layer", "relation", "in full", *(f"off in {limit}" for limit in limits))
    body = []
    for one in found:
        name = f"{one['d_in']} × {one['d_out']}"
        for label, cosine in one["full"].items():
            off = [f"{part['off'][label]:+.4f}" for part in one["within"]]
            body.append([name, label, f"{cosine:.4f}", *off])
        spent = [f"{part['seconds']:.0f}" for part in one["within"]]
        body.append([name, "seconds to measure", "-", *spent])
    return _table("Layers wider than max_dim", told, head, body)


def _alternatives(found: Found) -> list[str]:
    told = (
        "A step with other code's statistics, in plain steps of the same model on the same batch, "
        "in evaluation mode: median (lowest to highest). A pass that replaces the loop's own is "
        "counted as it is, one beside it is added to a plain step. *Straightforward* is "
        "per-example Jacobians by torch.func, FACT, AGOP and eNFA formed d_in × d_in, and their "
        "dense eigendecompositions as the report: at so many outputs and examples as are named, "
        "with our step on as many beside it."
    )
    head = ("model", "code", "collects", "a step", "a report, s")
    body = []
    for title, part in _models(found, "alternatives"):
        body += [[title, *row] for row in _of_packages(part)]
        body += [[title, *row] for row in _of_straightforward(part["straightforward"])]
    return _table("Alternatives", told, head, body)


def _of_packages(part: Found) -> Iterator[list[str]]:
    seconds = part["seconds"]
    report = _spread(figures.report_seconds(seconds, "feature_probe"), ".2f")
    ours = _spread(figures.ratios(seconds, "feature_probe"), ".2f")
    yield ["**feature_probe**, a window's step", "G, K, E", ours, report]
    for name, package in PACKAGES.items():
        if name in part["left_out"]:
            why = part["left_out"][name].replace("|", "/")
            yield [package.title, package.collects, f"left out: {why}", "-"]
        elif name in seconds:
            taken = [each + package.beside for each in figures.ratios(seconds, name)]
            title = f"{package.title}, {part['versions'][name]}"
            yield [title, package.collects, _spread(taken, ".2f"), "-"]


def _of_straightforward(part: Found) -> Iterator[list[str]]:
    seconds = part["seconds"]
    size = f"{part['examples']} examples, {part['outputs']} outputs"
    ours = _spread(figures.ratios(seconds, "feature_probe"), ".2f")
    report = _spread(figures.report_seconds(seconds, "feature_probe"), ".2f")
    yield [f"**feature_probe**, {part['examples']} examples", "G, K, E", ours, report]
    taken = [each + 1 for each in figures.ratios(seconds, "straightforward")]
    yield [
        f"straightforward, {size}", "FACT, AGOP, eNFA", _spread(taken, ".1f"),
        f"{part['report']:.2f}",
    ]  # fmt: skip


def _published() -> list[str]:
    return [
        "## Published overheads of relatives", "",
        "Cockpit, on an RTX 2080 Ti, in units of its own loop without instruments: its lightest "
        "preset cost 1.25 on ResNet-50 at one step in 16, 1.07 at one in 64 and 1.04 at one in "
        "256; on a perceptron for MNIST 1.29, 1.07 and 1.04. Not run here.", "",
    ]  # fmt: skip


def markdown(found: Found) -> str:
    """The whole page."""
    said = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    skipped = [f"- {MODELS[name].title}: {why}" for name, why in found["skipped"].items()]
    lines = [
        "# What probing costs",
        "",
        "`python tests/benchmarks/cost.py` measures and writes this page; what is compared stands "
        "at the top of that file. Every mode has a turn in each round, in random order, in one "
        f"process; a turn is one step that does not count and {WINDOW - 1} that do. {said}.",
        "",
        *_targets(found), *_steps(found), *_idle(found), *_reports(found), *_profile(found),
        *_layers(found), *_long_runs(found), *_memory(found), *_growth(found), *_exact(found),
        *_accuracy(found), *_wide(found), *_alternatives(found), *_published(),
    ]  # fmt: skip
    if skipped:
        lines += ["## Not run", "", *skipped, ""]
    return "\n".join(lines[:-1]) + "\n"
