"""Numbers over layers as TensorBoard series: tags, percentiles, histogram bins, the chart layout.

Tags: only the first path segment groups cards in TensorBoard, so the few series a reader starts
with (medians) stand in ``feature_probe``, what the charts need beside them in
``feature_probe.bands`` and ``feature_probe.verdicts``. With a dot, as TensorBoard sorts "_" like
"/" and would show that first. Trivial, not applicable and undefined records
(:data:`feature_probe.sinks.verdicts.SILENT`) are in no median, band or distribution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_probe.reports.record import Record
from feature_probe.reports.report import Report
from feature_probe.sinks.verdicts import can_rest, diagnoses_by_layer, goal, speaking
from feature_probe.sinks.wording import SCORE_NAMES, basis_meaning, gram_name, layer_name
from feature_probe.theory.relations import RELATIONS

ROOT = "feature_probe"
STATIONARITY = "stationarity"
TRACE_FREE = "trace_free_cosine"
DECAY_AGE, DECAY_RATIO = "decay_age", "decay_ratio"
#: λ̂/λ with what minibatch noise takes from it: 1 at rest, for SGD.
BALANCE = "decay_ratio_plus_fluctuation"
_BINS = 40
# TensorBoard gives all lines of a run one colour and no legend.
_HOVER = "hover over a line for its name"
#: Kind of chart and its tags, as ``SummaryWriter.add_custom_scalars`` takes them.
Chart = list[str | list[str]]
Layout = dict[str, dict[str, Chart]]


@dataclass(frozen=True)
class Histogram:
    """Counts in linear bins, as ``SummaryWriter.add_histogram_raw`` takes them."""

    low: float
    high: float
    count: int
    total: float
    squares: float
    limits: list[float]
    counts: list[int]


def median_tag(quantity: str, label: str = "") -> str:
    """Tag of the median over layers of a relation's score, or of a quantity of the layers.

    In one last segment, which is what TensorBoard's cards show of a long tag.
    """
    return f"{ROOT}/{label}_median_{quantity}" if label else f"{ROOT}/median_{quantity}"


def band_tag(quantity: str, label: str, level: str) -> str:
    """Tag of another level over layers: p10, p90, chance; p50 where no card should be spent."""
    return "/".join(part for part in (f"{ROOT}.bands", quantity, label, level) if part)


def share_tag(label: str) -> str:
    """Tag of the share of applicable layers for which a relation has come true."""
    return f"{ROOT}.verdicts/{label}_share_{goal(label)}"


def count_tag(label: str) -> str:
    """Tag of the number of applicable layers: those behind a relation's share and its medians."""
    return f"{ROOT}.verdicts/{label}_applicable_layers"


def layer_tag(layer: str, quantity: str) -> str:
    """Tag of one layer's number; a slash in a name would open a group of its own."""
    return f"{ROOT}.layers.{layer_name(layer).replace('/', '.')}/{quantity}"


def charted_scores(score: str) -> tuple[str, ...]:
    """The scores that get series: the chosen one, and the one that near-identities do not raise."""
    return tuple(dict.fromkeys((score, TRACE_FREE)))


def by_label(report: Report) -> dict[str, list[Record]]:
    """The records of each relation and power, layers in model order."""
    found: dict[str, list[Record]] = {label: [] for label in report.labels}
    for record in report.records:
        found[record.label].append(record)
    return found


def band_scalars(report: Report, score: str) -> dict[str, float]:
    """Percentiles over layers by tag, and how many layers there are of which verdict.

    What is undefined or not applicable in every layer has no entry.
    """
    scalars: dict[str, float] = {}
    for label, all_records in by_label(report).items():
        records = speaking(all_records)
        for charted in charted_scores(score):
            values = [float(getattr(record, charted)) for record in records]
            scalars |= _band(_band_tags(charted, label, charted == score), values)
        if score == "cosine":
            # Of the layers whose cosines the band is made of, and of no others.
            levels = defined([r.level_by_chance for r in records if math.isfinite(r.cosine)])
            if levels.size:
                scalars[band_tag(score, label, "chance")] = float(np.median(levels))
        if records:
            reached = sum(record.verdict == goal(label) for record in records)
            scalars[share_tag(label)] = reached / len(records)
            scalars[count_tag(label)] = float(len(records))
    resting = resting_numbers(report)
    scalars |= _band(_band_tags(STATIONARITY, "", True), resting[STATIONARITY])
    for quantity in (DECAY_AGE, DECAY_RATIO, BALANCE):
        known = defined(resting[quantity])
        if known.size:
            scalars[median_tag(quantity)] = float(np.median(known))
    return scalars


def stationarity_by_layer(report: Report) -> dict[str, float]:
    """Each layer's stationarity, from its diagnosis or whichever of its records has it, else NaN.

    The diagnosis knows the update where decay is decoupled, and is asked first.
    """
    diagnoses = diagnoses_by_layer(report)
    found = {
        layer: diagnoses[layer].stationarity if layer in diagnoses else math.nan
        for layer in report.layers
    }
    for record in report.records:
        if math.isnan(found[record.layer]):
            found[record.layer] = record.stationarity
    return found


def resting_numbers(report: Report) -> dict[str, list[float]]:
    """How far layers are from rest: stationarity, decay age, λ̂/λ without and with fluctuation.

    Of layers that can come to rest. The decay age also of scale-invariant ones: of any that decay.
    """
    diagnoses = diagnoses_by_layer(report)
    resting = [layer for layer in report.layers if can_rest(diagnoses.get(layer))]
    known = [diagnoses[layer] for layer in resting if layer in diagnoses]
    distances = stationarity_by_layer(report)
    return {
        STATIONARITY: [distances[layer] for layer in resting],
        DECAY_AGE: [d.decay_age for d in report.diagnoses if d.decay_form != "none"],
        DECAY_RATIO: [d.decay_ratio for d in known],
        BALANCE: [d.decay_ratio + d.fluctuation for d in known],
    }


def layer_scalars(report: Report, score: str) -> dict[str, float]:
    """Every layer's defined scores, whatever their verdicts, and its rest, by tag."""
    scalars = {
        layer_tag(record.layer, f"{record.label}_{score}"): float(getattr(record, score))
        for record in report.records
    }
    for layer, distance in stationarity_by_layer(report).items():
        scalars[layer_tag(layer, STATIONARITY)] = distance
    for found in report.diagnoses:
        scalars[layer_tag(found.layer, DECAY_AGE)] = found.decay_age
        scalars[layer_tag(found.layer, BALANCE)] = found.decay_ratio + found.fluctuation
    return {tag: value for tag, value in scalars.items() if math.isfinite(value)}


def histogram(values: Sequence[float]) -> Histogram | None:
    """Defined scores in linear bins of 0.05 on [−1, 1], the same at every step; None without any.

    TensorBoard draws the outermost bins from ``low`` and to ``high``: these are the smallest and
    the largest score, widened to their bin where they are one.
    """
    scores = np.clip(defined(values), -1.0, 1.0)
    if not scores.size:
        return None
    counts, edges = np.histogram(scores, bins=_BINS, range=(-1.0, 1.0))
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        only = int(counts.argmax())
        low, high = float(edges[only]), float(edges[only + 1])
    return Histogram(
        low, high, scores.size, float(scores.sum()), float((scores**2).sum()),
        [float(edge) for edge in edges[1:]], [int(count) for count in counts],
    )  # fmt: skip


def custom_scalars_layout(labels: Sequence[str], score: str = "cosine") -> Layout:
    """The Custom Scalars page, for ``SummaryWriter.add_custom_scalars``.

    A run has one such page: whoever has one already merges the two dictionaries and writes the
    result, with ``TensorBoardSink(..., layout=False)``.
    """
    median = f"{ROOT}: median {SCORE_NAMES[score]} over layers"
    layout: Layout = {}
    accounts = _account_charts(labels, score)
    if accounts:
        layout[f"{median}: which account agrees best? ({_HOVER})"] = accounts
    for charted in charted_scores(score):
        layout[f"{ROOT}: {SCORE_NAMES[charted]}, median over layers and 10-90 % band"] = {
            # TensorBoard shows margin charts last first.
            label: _margin(charted, label, charted == score)
            for label in reversed(labels)
        }
    if score == "cosine":
        layout[f"{median} beside the level that chance alone would give ({_HOVER})"] = {
            f"{label}: cosine and chance": _multiline(
                [median_tag(score, label), band_tag(score, label, "chance")]
            )
            for label in labels
        }
    shares = _share_charts(labels)
    layout[f"{ROOT}: for which share of the applicable layers is it true? ({_HOVER})"] = shares
    layout[f"{ROOT}: |decay*W + G| / |decay*W| (0 = stationary, where FACT must hold)"] = {
        STATIONARITY: _margin(STATIONARITY, "", True)
    }
    layout[f"{ROOT}: how far has training come? (medians over layers; {_HOVER})"] = {
        "decay age: decay alone leaves exp(-age) of the initial W": _multiline(
            [median_tag(DECAY_AGE)]
        ),
        "decay found / decay set, alone and with its fluctuation (1 = at rest)": _multiline(
            [median_tag(DECAY_RATIO), median_tag(BALANCE)]
        ),
    }
    return layout


def defined(values: Sequence[float]) -> NDArray[np.float64]:
    """The finite ones among ``values``."""
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def _band_tags(quantity: str, label: str, has_card: bool) -> tuple[str, str, str]:
    """Tags of the median and of the ends of its band."""
    middle = median_tag(quantity, label) if has_card else band_tag(quantity, label, "p50")
    return middle, band_tag(quantity, label, "p10"), band_tag(quantity, label, "p90")


def _account_charts(labels: Sequence[str], score: str) -> dict[str, Chart]:
    """One chart per matrix of the weight that has several accounts to compare."""
    charts: dict[str, Chart] = {}
    relations = {label: RELATIONS[label.partition("^")[0]] for label in labels}
    grams = {label: gram_name(relation) for label, relation in relations.items()}
    for first in sorted(labels, key=_side):
        gram, meaning = grams[first], basis_meaning(relations[first])
        chosen = [label for label in labels if grams[label] == gram]
        if len(chosen) > 1:
            tags = [median_tag(score, label) for label in chosen]
            charts[f"accounts of {gram}{meaning}"] = _multiline(tags)
    return charts


def _side(label: str) -> tuple[bool, bool]:
    """Sorts forward before backward, and both before what has another matrix in the place of W."""
    relation = RELATIONS[label.partition("^")[0]]
    return relation.basis != "weight", relation.side == "backward"


def _share_charts(labels: Sequence[str]) -> dict[str, Chart]:
    """One chart of equalities, whose verdict is to be "holds", and one of proportionalities."""
    charts: dict[str, Chart] = {}
    for reached, kind in (("holds", "equalities"), ("aligned", "proportionalities")):
        tags = [share_tag(label) for label in labels if goal(label) == reached]
        if tags:
            charts[f"{kind}: share of layers with the verdict '{reached}'"] = _multiline(tags)
    return charts


def _multiline(tags: Sequence[str]) -> Chart:
    # TensorBoard takes them for patterns, and matches beginnings.
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]


def _margin(quantity: str, label: str, has_card: bool) -> Chart:
    return ["Margin", list(_band_tags(quantity, label, has_card))]


def _band(tags: tuple[str, str, str], values: Sequence[float]) -> dict[str, float]:
    known = defined(values)
    if not known.size:
        return {}
    levels = (float(level) for level in np.percentile(known, (50, 10, 90)))
    return dict(zip(tags, levels, strict=True))
