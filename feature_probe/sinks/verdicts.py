"""Which records and layers speak for what was learned, by their verdicts and states."""

from __future__ import annotations

from collections.abc import Iterable

from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.record import Record
from feature_probe.reports.report import Report
from feature_probe.theory.relations import RELATIONS

#: The verdicts of records whose score is no evidence of anything: they are not in medians, bands
#: and distributions, and their cells in pictures are grey.
SILENT = frozenset({"trivial", "not applicable", "undefined"})
#: Of these, what pictures hatch: there is a number, and a theorem says what it must be.
TRIVIAL = "trivial"


def speaks(record: Record) -> bool:
    """Whether the record's score says something of what the layer has learned."""
    return record.verdict not in SILENT


def speaking(records: Iterable[Record]) -> list[Record]:
    """The records that enter medians, bands and distributions."""
    return [record for record in records if speaks(record)]


def goal(label: str) -> str:
    """The verdict of a relation that has come true: "holds" of equalities, else "aligned"."""
    return "holds" if RELATIONS[label.partition("^")[0]].is_equality else "aligned"


def can_rest(diagnosis: Diagnosis | None) -> bool:
    """Whether the layer may come to rest in the sense of FACT, as far as is known."""
    return diagnosis is None or diagnosis.state != "not applicable"


def diagnoses_by_layer(report: Report) -> dict[str, Diagnosis]:
    """The diagnosis of each layer that has one."""
    return {diagnosis.layer: diagnosis for diagnosis in report.diagnoses}
