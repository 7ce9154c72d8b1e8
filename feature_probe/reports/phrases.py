"""Text about reports: the table's columns, notes with their layers, what was not counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width, the first to the left, a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def loss_notes(settings: Mapping[str, Any]) -> list[str]:
    """In words, what was not counted and what went wrong; nothing where all was well."""
    left_out, discarded, faults = (
        int(settings.get(name, 0)) for name in ("left_out", "discarded", "faults")
    )
    lines = []
    if left_out:
        lines.append(
            f"{_counted(left_out, 'training step')} left out of this report: something inside the "
            "probe failed there (see the log)"
        )
    if discarded:
        lines.append(
            f"{_counted(discarded, 'backward pass', 'backward passes')} not counted in this "
            "report: no optimizer step used the gradients (skipped after an overflow, or cleared)"
        )
    if faults:
        lines.append(
            f"{_counted(faults, 'fault')} inside the probe since the run began (see the log); "
            "training itself was not affected"
        )
    return lines


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def layer_note(text: str, layers: Sequence[str], total: int) -> str:
    """A note with the layers it concerns, of ``total``."""
    if len(layers) == total and total > 1:
        return f"{text} (all layers)"
    shown = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    return f"{text} ({shown})"
