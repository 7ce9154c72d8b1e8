"""Text about reports: the table's cells and columns, words for verdicts, notes with layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from feature_probe.reports.record import Record

#: What a table's cell says of each verdict, and what the line below the table says of that.
VERDICT_WORDS: Mapping[str, tuple[str, str]] = {
    "holds": ("holds", "equal, as the theory says"),
    "approaching": ("nearing", "not equal yet, but coming nearer"),
    "not yet": ("not yet", "training has not brought the layer to rest"),
    "aligned": ("aligned", "clearly above chance"),
    "at chance": ("chance", "not clearly above chance"),
    "below chance": ("below", "clearly below chance"),
    "trivial": ("trivial", "true whatever was learned"),
    "not applicable": ("n/a", "the relation is not claimed for this layer"),
    "cannot tell": ("?", "the data do not say"),
    "undefined": ("-", "no number"),
}
#: The same for the state of a layer, where shorter than the state itself.
STATE_WORDS: Mapping[str, str] = {"not applicable": "n/a", "cannot tell": "?"}
#: The scores that a verdict speaks of.
JUDGED_SCORES = (
    "pearson",
    "cosine",
    "trace_free_cosine",
    "off_diagonal_pearson",
    "spearman",
    "r_squared",
    "residual",
    "cosine_corrected",
)
#: Verdicts whose reason a reader of the table must know; the others say it all.
_TO_EXPLAIN = ("not yet", "trivial", "not applicable", "cannot tell", "undefined")
#: How notes begin that are no news.
_ROUTINE = ("no interval", "clipped")
_NUMBER = re.compile(r"[-−]?\d[\d.,]*(?:e[-+]?\d+)?")


def cell(record: Record | None, score: str) -> tuple[str, str]:
    """A record's number, a cosine with its level by chance, and its verdict in one word."""
    if record is None:
        return "", ""
    word = VERDICT_WORDS.get(record.verdict, (record.verdict, ""))[0]
    if score not in JUDGED_SCORES:
        word = ""
    value = float(getattr(record, score))
    if math.isnan(value):
        return "-", "" if record.verdict == "undefined" else word
    level = record.level_by_chance if score == "cosine" else math.nan
    return f"{value:.3f}" + ("" if math.isnan(level) else f" ({level:.2f})"), word


def column(header: str, cells: Sequence[tuple[str, str]]) -> list[str]:
    """A column of equal width: numbers to the right, each with its word behind it to the left."""
    numbers, words = (max(len(parts[i]) for parts in cells) for i in (0, 1))
    numbers = max(numbers, len(header))
    lines = [(header, ""), *cells]
    return [f"{number.rjust(numbers)} {word.ljust(words)}" for number, word in lines]


def ruled(columns: Sequence[Sequence[str]]) -> str:
    """Columns of equal width side by side, a rule under the first row."""
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def level_legend(records: Sequence[Record]) -> str:
    """Which level stands in brackets for which relations."""
    shared = [r.relation for r in records if not math.isnan(r.shared_weight_cosine)]
    rotated = [r.relation for r in records if r.relation not in shared]
    said = {"a random rotation": rotated, "the same W with random gradient directions": shared}
    parts = [f"{', '.join(dict.fromkeys(names))}: {how}" for how, names in said.items() if names]
    return "in brackets the level by chance: " + "; ".join(parts)


def verdict_legend(records: Sequence[Record]) -> str:
    """What the words beside the numbers mean, of those that occur; "" without any."""
    said = {record.verdict for record in records}
    words = [pair for verdict, pair in VERDICT_WORDS.items() if verdict in said]
    return "; ".join(f"{word}: {meaning}" for word, meaning in words)


def record_notes(records: Sequence[Record], limit: int | None) -> list[str]:
    """Statuses, premises and reasons of the records, each once, with relations and layers.

    Texts that differ in their numbers alone are one note, with the first one's numbers. What
    concerns all layers comes first; that intervals were not asked for comes last.

    Args:
        records: All of a report.
        limit: Most notes to give, the rest being counted in a last line; None for all.
    """
    layers = list(dict.fromkeys(record.layer for record in records))
    found: dict[str, dict[str, dict[str, str]]] = {}
    for record in records:
        for text in _texts(record):
            labels = found.setdefault(_NUMBER.sub("#", text), {})
            labels.setdefault(record.label, {}).setdefault(record.layer, text)
    notes: list[tuple[tuple[bool, bool], str]] = []
    for key, labels in found.items():
        groups: dict[tuple[str, ...], list[str]] = {}
        for label, texts in labels.items():
            groups.setdefault(tuple(texts), []).append(label)
        for concerned, members in groups.items():
            texts = labels[members[0]]
            same = len({text for label in members for text in labels[label].values()}) == 1
            text = texts[concerned[0]]
            if len(members) == 1 or len(members) < len({record.label for record in records}):
                text = f"{', '.join(whole_relations(members, records))}: {text}"
            note = layer_note(text, concerned, len(layers), same=same)
            rank = key.startswith(_ROUTINE), len(concerned) < len(layers)
            notes.append((rank, note))
    ordered = [note for _, note in sorted(notes, key=lambda entry: entry[0])]
    if limit is None or len(ordered) <= limit:
        return ordered
    left = len(ordered) - limit + 1
    return [*ordered[: limit - 1], f"... and {left} more notes: report.explain(layer)"]


def loss_notes(settings: Mapping[str, Any]) -> list[str]:
    """In words, what was not counted and what went wrong; nothing where all was well."""
    left_out, discarded, faults = (
        int(settings.get(name, 0)) for name in ("left_out", "discarded", "faults")
    )
    lines = []
    if left_out:
        lines.append(
            f"{counted(left_out, 'training step')} left out of this report: something inside the "
            "probe failed there (see the log)"
        )
    if discarded:
        lines.append(
            f"{counted(discarded, 'backward pass', 'backward passes')} not counted in this "
            "report: no optimizer step used the gradients (skipped after an overflow, or cleared)"
        )
    if faults:
        lines.append(
            f"{counted(faults, 'fault')} inside the probe since the run began (see the log); "
            "training itself was not affected"
        )
    return lines


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun, e.g. "1 fault", "2,000 faults"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def layer_note(text: str, layers: Sequence[str], total: int, *, same: bool = True) -> str:
    """A note with the layers it concerns, of ``total``; ``same``: its numbers are those of all."""
    where = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    if len(layers) == total and total > 1:
        where = "all layers"
    if not same:
        where += "; other numbers elsewhere"
    return f"{text} ({where})"


def listed(items: Iterable[str]) -> str:
    """Words as a list, e.g. "a, b and c"."""
    words = list(items)
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _texts(record: Record) -> list[str]:
    """What a reader must know of a record, nothing twice."""
    reasons = [record.premise]
    reasons += [record.because] if record.verdict in _TO_EXPLAIN else []
    heads = {text.partition(":")[0] for text in reasons if ":" in text}
    whole = record.status.startswith("fault")
    parts = [record.status] if whole else record.status.split("; ")
    texts = [part for part in parts if part != "ok" and part.partition(":")[0] not in heads]
    texts += [*reasons, record.interval_note]
    given = list(dict.fromkeys(text for text in texts if text))
    return [text for text in given if not any(text in other for other in given if other != text)]


def whole_relations(labels: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Labels, with all powers of a relation given as the relation's name alone."""
    powers: dict[str, set[str]] = {}
    for record in records:
        powers.setdefault(record.relation, set()).add(record.label)
    relation_of = {label: name for name, members in powers.items() for label in members}
    whole = {name for name, members in powers.items() if members <= set(labels)}
    names = [relation_of[label] if relation_of[label] in whole else label for label in labels]
    return list(dict.fromkeys(names))
