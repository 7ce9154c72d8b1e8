"""Explanation: three sentences on one layer, from its records and its diagnosis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from feature_probe.errors import NotMeasuredError
from feature_probe.reports.causes import (
    FINDINGS,
    Reason,
    Situation,
    actions,
    number,
    reason_in,
    reason_of,
    share_left,
)
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.phrases import listed, whole_relations
from feature_probe.reports.record import Record
from feature_probe.theory.relations import RELATIONS, Basis

#: Words a sentence may have, less those that count what was left out.
_WORDS = 84
#: Scores of one kind that are given with their numbers.
_SHOWN = 2
#: What is said of relations whose verdict says little: of one, and of several.
_OPEN: Mapping[str, tuple[str, str]] = {
    "not yet": ("does not hold yet", "do not hold yet"),
    "trivial": ("says nothing of learning", "say nothing of learning"),
    "not applicable": ("does not apply", "do not apply"),
    "cannot tell": ("cannot be judged", "cannot be judged"),
    "undefined": ("has no number", "have no number"),
}
#: What alignment says where another matrix stands in the place of the weight.
_OF_BASES: Sequence[tuple[frozenset[Basis], str]] = (
    (
        frozenset({"initial"}),
        "what has changed in the output's gradients lies where the initial weight pointed",
    ),
    (
        frozenset({"gradient", "motion"}),
        "training moves the weight along the directions to which the output reacts most",
    ),
)


class Reported(Protocol):
    """What is needed of a :class:`feature_probe.Report`."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""

    @property
    def records(self) -> list[Record]:
        """One per layer, relation and power."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """How it was measured."""

    @property
    def diagnoses(self) -> Sequence[Diagnosis]:
        """One per layer."""


def explain(report: Reported, layer: str) -> str:
    """Three sentences on one layer: what holds, what cannot be said and why, what to do.

    Args:
        report: The report.
        layer: Layer name.

    Returns:
        The sentences of :func:`sentences`, one after the other.

    Raises:
        NotMeasuredError: if the report has no such layer.
    """
    return " ".join(sentences(report, layer))


def sentences(report: Reported, layer: str) -> tuple[str, str, str]:
    """What holds, what cannot be said and why, what to do: each one sentence of plain words.

    The words follow from the records' verdicts and reasons, the diagnosis and the settings alone:
    the same report gives the same text.

    Raises:
        NotMeasuredError: if the report has no such layer.
    """
    records = [record for record in report.records if record.layer == layer]
    if not records:
        names = ", ".join(dict.fromkeys(record.layer for record in report.records)) or "none"
        raise NotMeasuredError(f"no layer {layer!r}; layers: {names}")
    diagnosis = next((d for d in report.diagnoses if d.layer == layer), Diagnosis(layer))
    situation = Situation(records, diagnosis, report.settings, report.step)
    gaps = _gaps(situation)
    return _findings(layer, situation), _open(situation, gaps), _advice(situation, gaps)


def _findings(layer: str, situation: Situation) -> str:
    """What holds, is aligned, comes nearer, or is no more than chance."""
    found = {v: [r for r in situation.records if r.verdict == v] for v in FINDINGS}
    pieces = []
    if holding := found["holds"]:
        pieces.append(
            f"{_scored(holding)} {_verb(holding, 'holds', 'hold')}{_at_age(situation)}: "
            f"{_meaning_of_rest(holding, situation.diagnosis)}"
        )
    if aligned := found["aligned"]:
        learned = _meaning_of_alignment(aligned)
        pieces.append(f"{_scored(aligned)} {_verb(aligned, 'is', 'are')} aligned: {learned}")
    if nearing := found["approaching"]:
        age = "" if holding else _at_age(situation)
        pieces.append(f"{_scored(nearing)} {_verb(nearing, 'comes', 'come')} nearer{age}")
    if chance := found["at chance"]:
        pieces.append(f"{_scored(chance)} {_verb(chance, 'is', 'are')} not clearly above chance")
    if below := found["below chance"]:
        pieces.append(f"{_scored(below)} {_verb(below, 'is', 'are')} clearly below chance")
    if not holding and not aligned:
        pieces.insert(0, "nothing holds yet" if nearing else "nothing can be said to hold")
    return _sentence(f"In {_named(layer)}, ", pieces, "print(report)")


def _open(situation: Situation, gaps: Mapping[tuple[str, Reason], Sequence[str]]) -> str:
    """What cannot be said, and why."""
    if not gaps:
        return "Nothing is left open."
    pieces = []
    for (said, reason), labels in gaps.items():
        names = whole_relations(labels, situation.records)
        shown = names if len(names) < 5 else [*names[:3], f"{len(names) - 3} more"]
        if said in _OPEN:
            what = f"{listed(shown)} {_OPEN[said][len(names) > 1]}"
        else:
            what = said.format(listed(shown))
        pieces.append(f"{what}, because {reason.words}")
    return _sentence("Not settled: ", pieces, "report.notes()")


def _advice(situation: Situation, gaps: Mapping[tuple[str, Reason], Sequence[str]]) -> str:
    """One or two things to do."""
    causes = {reason.cause for _, reason in gaps}
    findings = [record for record in situation.records if record.verdict in FINDINGS]
    if any(record.verdict == "approaching" for record in findings):
        causes.add("unripe")
    doubtful = [r for r in findings if r.verdict in ("at chance", "below chance")]
    sampled = any(RELATIONS[record.relation].needs.startswith("jacobian") for record in doubtful)
    if sampled and situation.settings.get("jacobian") == "random":
        causes.add("random")
    chosen = actions(situation, causes)[:2]
    if chosen:
        return f"What to do: {'; and '.join(chosen)}."
    if any(math.isnan(record.cosine_low) for record in findings):
        return "Nothing needs to be done; measure(jackknife=8) would add an interval to the scores."
    return "Nothing needs to be done." if findings else "What to do: read report.notes() for more."


def _gaps(situation: Situation) -> dict[tuple[str, Reason], list[str]]:
    """Labels by what cannot be said of them, a verdict or words of its own, and why."""
    gaps: dict[tuple[str, Reason], list[str]] = {}
    for record in situation.records:
        if record.verdict not in FINDINGS:
            key = record.verdict if record.verdict in _OPEN else "cannot tell"
            gaps.setdefault((key, reason_of(record, situation)), []).append(record.label)
    for record in situation.records:
        if record.verdict in FINDINGS:
            for reserve in _reserves(record, situation):
                gaps.setdefault(reserve, []).append(record.label)
    return gaps


def _reserves(record: Record, situation: Situation) -> list[tuple[str, Reason]]:
    """What remains open although there is a verdict."""
    reserves = []
    if record.premise:
        reason = reason_in(record.premise, record, situation)
        reserves.append(("{} can be taken with a reserve only", reason))
    if record.form == "window" and record.verdict == "holds":
        steps = situation.settings.get("window")
        window = f"a window of {steps:,} steps" if isinstance(steps, int) else "a window"
        words = f"gradients were averaged over {window} of training"
        reason = Reason("window", words)
        reserves.append(("how far {} would differ on all the data at once is open", reason))
    if record.interval_note:
        reason = reason_in(record.interval_note, record, situation)
        if reason.cause != "no interval":
            reserves.append(("the interval of {} is not to be relied on", reason))
    return reserves


def _sentence(start: str, pieces: Sequence[str], more: str) -> str:
    """Pieces as one sentence, at least one; those beyond its length counted, with where to look."""
    kept = [pieces[0]]
    for piece in pieces[1:]:
        if len(" ".join([start, *kept, piece]).split()) <= _WORDS:
            kept.append(piece)
    left = len(pieces) - len(kept)
    if left:
        kept.append(f"and {left} more, see {more}")
    return f"{start}{'; '.join(kept)}."


def _scored(records: Sequence[Record]) -> str:
    """Labels with numbers, the furthest above chance first; of many the rest is counted."""
    ordered = sorted(records, key=lambda record: -_gain(record))
    shown = [_score(record) for record in ordered[:_SHOWN]]
    left = len(ordered) - _SHOWN
    return listed([*shown, f"{left} more"] if left > 0 else shown)


def _score(record: Record) -> str:
    """A label with its cosine, interval, level by chance and best power, where known."""
    parts = []
    if math.isfinite(record.cosine):
        parts.append(f"cosine {record.cosine:.3f}")
    if math.isfinite(record.cosine_low) and math.isfinite(record.cosine_high):
        parts.append(f"90 % interval {record.cosine_low:.2f} to {record.cosine_high:.2f}")
    if parts and math.isfinite(record.level_by_chance):
        spread = record.chance_spread
        about = f" ± {spread:.2f}" if math.isfinite(spread) else ""
        parts.append(f"by chance {record.level_by_chance:.2f}{about}")
    if record.verdict == "aligned" and math.isfinite(record.fitted_power):
        parts.append(f"best power {number(record.fitted_power)}")
    return f"{record.label} ({', '.join(parts)})" if parts else record.label


def _gain(record: Record) -> float:
    level = record.level_by_chance
    gain = record.cosine - (0.0 if math.isnan(level) else level)
    return -2.0 if math.isnan(gain) else gain


def _verb(records: Sequence[Record], one: str, several: str) -> str:
    return one if len(records) == 1 else several


def _at_age(situation: Situation) -> str:
    age = situation.diagnosis.decay_age
    if not math.isfinite(age):
        return ""
    left = f"weight decay alone would have left {share_left(age)} of the initial weight"
    return f" at decay age {number(age)} ({left})"


def _meaning_of_rest(records: Sequence[Record], diagnosis: Diagnosis) -> str:
    """What an equality that holds says."""
    resting = diagnosis.state == "at stationarity"
    start = "training has come to rest, and " if resting else ""
    updates = all(RELATIONS[record.relation].needs == "update" for record in records)
    forces = "updates" if updates else "gradient"
    return f"{start}the weight is what {forces} and weight decay in balance make it"


def _meaning_of_alignment(records: Sequence[Record]) -> str:
    """What a proportionality that is aligned says."""
    relations = [RELATIONS[record.relation] for record in records]
    said = [said for bases, said in _OF_BASES if any(r.basis in bases for r in relations)]
    needs = {r.needs for r in relations if r.basis in ("weight", "change")}
    sums = {
        "jacobian": "the output",
        "jacobian_change": "the change of the output's gradients",
        "loss": "the loss",
    }
    names = [name for key, name in sums.items() if key in needs]
    if names:
        react = "reacts" if len(names) == 1 else "react"
        learned = f"the weight has learned the directions to which {listed(names)} {react} most"
        said = [learned, *said]
    return listed(said)


def _named(layer: str) -> str:
    return f"layer {layer}" if layer else "the model, itself a layer"
