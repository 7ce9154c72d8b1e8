"""Results of the runs: as files, as curves, and when each account begins to lead chance."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from feature_probe import RELATIONS, Record, Report
from images_lab.training import POWER, Frozen, Outcome, Setting

#: A score leads chance by a tenth of the way to 1, and by this many spreads of chance.
SPREADS = 4.0


def save(outcome: Outcome, folder: Path) -> Path:
    """Write a run as JSON, packed, numbers to five digits."""
    data = {
        "setting": asdict(outcome.setting),
        "parameters": outcome.parameters,
        "losses": outcome.losses,
        "accuracy": outcome.accuracy,
        "minutes": outcome.minutes,
        "loop": [report.to_dict() for report in outcome.loop],
        "frozen": [
            {"equalities": at.equalities.to_dict(), "others": at.others.to_dict()}
            for at in outcome.frozen
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{outcome.setting.name}.json.gz"
    text = json.dumps(_rounded(data), ensure_ascii=False)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return path


def load(path: Path) -> Outcome:
    """The way back from :func:`save`."""
    data = json.loads(gzip.decompress(path.read_bytes()))
    return Outcome(
        Setting(**data["setting"]),
        data["parameters"],
        [Report.from_dict(report) for report in data["loop"]],
        [
            Frozen(Report.from_dict(at["equalities"]), Report.from_dict(at["others"]))
            for at in data["frozen"]
        ],
        [(step, loss) for step, loss in data["losses"]],
        data["accuracy"],
        data["minutes"],
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value


def record(report: Report, layer: str, relation: str) -> Record:
    """A layer's record, at the power of this study where the relation has one."""
    return report.record(layer, relation, POWER if RELATIONS[relation].has_power else None)


def age(report: Report) -> float:
    """The decay age, Σ ηλ/(1 − μ) or Σ ηλ, the same for all layers."""
    return report.diagnoses[0].decay_age


def lead(found: Record) -> float:
    """How far a score is from its level by chance to 1: 0 at chance, 1 in full agreement."""
    return (found.cosine - found.level_by_chance) / (1 - found.level_by_chance)


def leads(found: Record) -> bool:
    """Whether a score is clearly above its level by chance, the same rule for all relations."""
    above, spread = found.cosine - found.level_by_chance, found.chance_spread
    if not math.isnan(found.chance_arctanh_spread):  # near 1 chance scatters evenly on this scale
        nearly = 1 - 1e-12
        above = math.atanh(min(found.cosine, nearly)) - math.atanh(found.level_by_chance)
        spread = found.chance_arctanh_spread
    return lead(found) >= 0.1 and above >= SPREADS * spread


def counts(found: Record) -> bool:
    """Whether there is a score that says something of learning."""
    return found.verdict not in ("trivial", "not applicable", "undefined")


def onset(reports: Iterable[Report], layer: str, relation: str) -> Report | None:
    """The first report from which on the score leads chance in every later one; None: never."""
    first = None
    for report in reports:
        found = record(report, layer, relation)
        first = (first or report) if counts(found) and leads(found) else None
    return first


def median(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN if there are none."""
    found = [value for value in values if not math.isnan(value)]
    return statistics.median(found) if found else math.nan
