"""The pictures of a report: scores and verdicts over layers and steps, a layer's matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from feature_probe.errors import NotMeasuredError
from feature_probe.reports.record import Record
from feature_probe.reports.report import Report
from feature_probe.sinks.heatmap import (
    Pixels,
    render_categories,
    render_heatmap,
    render_matrices,
)
from feature_probe.sinks.history import StepHistory
from feature_probe.sinks.palette import STATE_PATTERNS, VERDICT_PATTERNS, Pattern
from feature_probe.sinks.verdicts import SILENT, TRIVIAL
from feature_probe.sinks.wording import SCORE_NAMES, layer_name, question

#: The matrices of a matrix picture: caption, relation or Gram matrix, power.
_MATRICES = (
    ("W^T W", "nfm", None),
    ("FACT", "fact", None),
    ("AGOP^0.5", "nfa", 0.5),
    ("eNFA^0.5", "enfa", 0.5),
)


def heatmap_picture(records: Sequence[Record], history: StepHistory, score: str) -> Pixels:
    """One relation's scores, layers × the reports so far, with the chance level beside them.

    Grey where the verdict of that step was "not applicable" or "undefined", hatched where it was
    "trivial".
    """
    chance = None
    if score == "cosine":
        levels = {layer_name(record.layer): record.level_by_chance for record in records}
        chance = np.array([levels.get(layer, math.nan) for layer in history.layers])
    return render_heatmap(
        history.array(),
        layers=history.layers,
        steps=history.steps,
        title=question(records[0]),
        subtitle=f"{SCORE_NAMES[score]}: 1 = same up to a factor, 0 = unrelated",
        chance=chance,
        grey=history.codes(sorted(SILENT - {TRIVIAL})) >= 0,
        hatched=history.codes([TRIVIAL]) >= 0,
    )


def verdict_picture(records: Sequence[Record], history: StepHistory) -> Pixels:
    """One relation's verdicts, layers × the reports so far."""
    return _words_picture(
        history,
        VERDICT_PATTERNS,
        title=question(records[0]),
        subtitle="what may be concluded; the words are explained under TEXT",
    )


def state_picture(history: StepHistory) -> Pixels:
    """The layers' states, layers × the reports so far."""
    return _words_picture(
        history,
        STATE_PATTERNS,
        title="state: has training brought the layers to rest?",
        subtitle="where it has, decay and mean gradient balance: FACT holds over a long window",
    )


def _words_picture(
    history: StepHistory, patterns: Mapping[str, Pattern], *, title: str, subtitle: str
) -> Pixels:
    return render_categories(
        history.codes(list(patterns)),
        patterns,
        layers=history.layers,
        steps=history.steps,
        title=title,
        subtitle=subtitle,
    )


def matrix_picture(report: Report, layer: str) -> Pixels | None:
    """The matrices of a layer's first group; None where none were kept."""
    found, groups = _layer_matrices(report, layer)
    if not found:
        return None
    title = f"layer {layer_name(layer)}: do these agree? (step {report.step:,})"
    subtitle = f"group 1 of {groups}" if groups > 1 else ""
    return render_matrices(found, title=title, subtitle=subtitle)


def _layer_matrices(report: Report, layer: str) -> tuple[dict[str, NDArray[np.float64]], int]:
    """The matrices that were kept and measured, of the first group, and the number of groups."""
    found: dict[str, NDArray[np.float64]] = {}
    groups = 1
    for caption, kind, power in _MATRICES:
        try:
            matrix = report.matrix(layer, kind, power).numpy(force=True)
        except NotMeasuredError:
            continue
        groups = matrix.shape[0] if matrix.ndim == 3 else 1
        found[caption] = matrix[0] if matrix.ndim == 3 else matrix
    return found, groups
