"""A report as Markdown for a reader who has never heard of any of this."""

from __future__ import annotations

import math

import numpy as np

from feature_probe.reports.report import Record, Report
from feature_probe.sinks.series import by_label, defined, stationarity_by_layer
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


def summary_markdown(report: Report, score: str = "cosine") -> str:
    """The table layers × relations, what each number means, notes and coverage."""
    parts = [
        f"## Step {report.step:,}: do the layers learn features, and by which account?",
        _introduction(score),
        _scores(report, score),
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
        + " A dash is an undefined number: see the notes."
    )


def _scores(report: Report, score: str) -> str:
    cells = {(record.layer, record.label): record for record in report.records}
    stationarity = stationarity_by_layer(report)
    is_decayed = bool(defined(list(stationarity.values())).size)
    rows = [["layer", *report.labels, *([_STATIONARITY] if is_decayed else [])]]
    for layer in report.layers:
        row = [_cell(cells.get((layer, label)), score) for label in report.labels]
        last = [_number(stationarity[layer], ".3g")] if is_decayed else []
        rows.append([layer_name(layer), *row, *last])
    medians = [
        _middle([float(getattr(record, score)) for record in records])
        for records in by_label(report).values()
    ]
    last = [_middle(list(stationarity.values()), ".3g")] if is_decayed else []
    return _table([*rows, ["median over layers", *medians, *last]], "right")


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
            "hold",
            "",
            "",
        ]
    )
    return _table(rows, "left")


def _cell(record: Record | None, score: str) -> str:
    if record is None:
        return ""
    value = float(getattr(record, score))
    chance = record.level_by_chance if score == "cosine" else math.nan
    bracket = f" ({chance:.2f})" if math.isfinite(chance) and math.isfinite(value) else ""
    return _number(value, ".3f") + bracket


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _middle(values: list[float], form: str = ".3f") -> str:
    known = defined(values)
    return format(float(np.median(known)), form) if known.size else "-"


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
