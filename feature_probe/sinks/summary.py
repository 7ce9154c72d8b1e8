"""A report as Markdown for a reader who has never heard of any of this."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.phrases import VERDICT_WORDS
from feature_probe.reports.record import VERDICTS, Record
from feature_probe.reports.report import Report
from feature_probe.sinks.series import (
    STATIONARITY,
    by_label,
    defined,
    resting_numbers,
    stationarity_by_layer,
)
from feature_probe.sinks.verdicts import speaking
from feature_probe.sinks.wording import SCORE_NAMES, chance_meaning, layer_name
from feature_probe.theory.relations import RELATIONS

_BRACKETS = (
    " In brackets: the cosine that chance alone would give; where both matrices have only "
    "positive eigenvalues it is far above 0. A cosine means agreement only where it is "
    "well above its bracket."
)
_SYMBOLS = (
    "W: the layer's weight, h: its input, λ: weight decay, ℓ: an example's loss, f: the model's "
    "output, G: ∂loss/∂W without decay, n: examples; K and E: the second moments of ∂f/∂(Wh) and "
    "∂ℓ/∂(Wh)."
)
_STATIONARITY = "‖λW+G‖/‖λW‖"
_EXPLAINED = 12
_LAYER_COLUMNS = (
    "**decay age**: decay alone leaves e to the minus this of the initial weight, about 3 is a "
    "long training. **window age**: the part of it in the window of this report. "
    f"**{_STATIONARITY}**: the stationarity, with the optimizer's update for G where decay is "
    "decoupled; 0 at rest. "
    "**λ̂/λ**: the weight decay that gradients balance, over the one that is set; with what "
    "minibatch noise takes from it 1 at rest, for SGD. **window drift**: how far W moved in the "
    "window, in units of its norm. **norm drift**: change of ln ‖W‖ per unit of decay age; 0 at "
    "rest. **scale invariance**: whether a norm behind the layer makes the loss blind to the size "
    "of W: then FACT is not to be expected. **state**: has training brought the layer to rest?"
)


def summary_markdown(report: Report, score: str = "cosine") -> str:
    """The table layers × relations, what each number means, notes and coverage."""
    parts = [
        f"## Step {report.step:,}: do the layers learn features, and by which account?",
        _introduction(score),
        _scores(report, score),
        *_verdicts(report),
        *_layers(report),
        *_explanations(report),
        "### What the columns compare",
        _SYMBOLS,
        _columns(report),
        *_listed("### Notes", report.notes()),
        *_listed("### Coverage of the model's weight matrices", str(report.coverage).splitlines()),
        *_listed("### How it was measured", [f"{k}: {v}" for k, v in report.settings.items()]),
    ]
    return "\n\n".join(parts)


def _introduction(score: str) -> str:
    return (
        "Each account of feature learning says that a layer's WᵀW (or WWᵀ), made of its weights "
        "W alone, comes to agree with another matrix, made of data and gradients. The numbers are "
        f"the {SCORE_NAMES[score]} of the two: **1** the same up to a factor, **0** unrelated, "
        "negative: opposed."
        + (_BRACKETS if score == "cosine" else "")
        + " The words beside a number say what may be concluded from it. A dash is an undefined "
        "number: see the notes."
    )


def _scores(report: Report, score: str) -> str:
    """Layers × relations; under them the medians of what is applicable, and of how many layers."""
    cells = {(record.layer, record.label): record for record in report.records}
    stationarity = stationarity_by_layer(report)
    is_decayed = bool(defined(list(stationarity.values())).size)
    rows = [["layer", *report.labels, *([_STATIONARITY] if is_decayed else [])]]
    for layer in report.layers:
        row = [_cell(cells.get((layer, label)), score) for label in report.labels]
        last = [_number(stationarity[layer], ".3g")] if is_decayed else []
        rows.append([layer_name(layer), *row, *last])
    total = len(report.layers)
    medians = [
        _middle([float(getattr(record, score)) for record in speaking(records)], ".3f", total)
        for records in by_label(report).values()
    ]
    resting = resting_numbers(report)[STATIONARITY]
    last = [_middle(resting, ".3g", total)] if is_decayed else []
    return _table([*rows, ["median of applicable layers", *medians, *last]], "right")


def _verdicts(report: Report) -> list[str]:
    """What the words beside the numbers mean, of those that occur."""
    found = {record.verdict for record in report.records}
    lines = [f"{word}: {VERDICT_WORDS[word][1]}" for word in VERDICTS if word in found]
    return _listed("### What the words beside the numbers mean", lines)


def _layers(report: Report) -> list[str]:
    """What is known of each layer beside its scores."""
    if not report.diagnoses:
        return []
    header = [
        "layer", "decay age", "window age", _STATIONARITY, "λ̂/λ", "window drift", "norm drift",
        "scale invariance", "state",
    ]  # fmt: skip
    rows = [_layer_row(diagnosis) for diagnosis in report.diagnoses]
    return ["### How far each layer has come", _table([header, *rows], "right"), _LAYER_COLUMNS]


def _layer_row(diagnosis: Diagnosis) -> list[str]:
    ratio = _number(diagnosis.decay_ratio, ".2g")
    if math.isfinite(diagnosis.decay_ratio + diagnosis.fluctuation):
        balance = diagnosis.decay_ratio + diagnosis.fluctuation
        ratio += f" + {diagnosis.fluctuation:.2g} = {balance:.2g}"
    return [
        layer_name(diagnosis.layer),
        _number(diagnosis.decay_age, ".2g"),
        _number(diagnosis.window_age, ".2g"),
        _number(diagnosis.stationarity, ".2g"),
        ratio,
        _number(diagnosis.drift, ".2g"),
        _number(diagnosis.norm_drift, ".2g"),
        diagnosis.scale_invariance,
        diagnosis.state,
    ]


def _explanations(report: Report) -> list[str]:
    """The first layers in words, the others by how many there are of each verdict."""
    first, others = report.layers[:_EXPLAINED], set(report.layers[_EXPLAINED:])
    lines = [report.explain(layer) for layer in first]
    for label, records in by_label(report).items():
        counts = Counter(record.verdict for record in records if record.layer in others)
        if counts:
            said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
            lines.append(f"the other {len(others)} layers, {label}: {said}")
    return _listed("### The layers in words", lines)


def _columns(report: Report) -> str:
    rows = [["column", "says that", "chance level", "arXiv:2507.05644"]]
    for label, records in by_label(report).items():
        relation = RELATIONS[records[0].relation]
        power = "" if records[0].power is None else f", s = {records[0].power:g}"
        equation = f"{relation.equation}{power}"
        rows.append([label, equation, chance_meaning(relation), relation.source])
    rows.append(
        [
            _STATIONARITY,
            "0 at a stationary point of the loss with weight decay λ, where FACT and bFACT must "
            "hold; G is the optimizer's update where decay is decoupled",
            "",
            "",
        ]
    )
    return _table(rows, "left")


def _cell(record: Record | None, score: str) -> str:
    """The score, the level by chance in brackets, the verdict."""
    if record is None:
        return ""
    value = float(getattr(record, score))
    chance = record.level_by_chance if score == "cosine" else math.nan
    bracket = f" ({chance:.2f})" if math.isfinite(chance) and math.isfinite(value) else ""
    return f"{_number(value, '.3f')}{bracket} {record.verdict}"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _middle(values: Sequence[float], form: str, total: int) -> str:
    """The median of what is defined, and of how many layers it is."""
    known = defined(values)
    if not known.size:
        return "-"
    return f"{float(np.median(known)):{form}} ({known.size} of {total} layers)"


def _table(rows: list[list[str]], alignment: str) -> str:
    rule = ["---", *("---:" if alignment == "right" else "---" for _ in rows[0][1:])]
    return "\n".join(
        f"| {' | '.join(_escape(c) for c in row)} |" for row in (rows[0], rule, *rows[1:])
    )


def _listed(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(f"- {_escape(line.strip())}" for line in lines)] if lines else []


def _escape(text: str) -> str:
    """Keep text text: Markdown would make emphasis of ``a_b_c`` and end a cell at a bar."""
    for mark in "\\`*_|<":
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return text.replace("\n", " ")
