"""Make the table of examples/README.md from what the scripts of this folder have found.

python examples/papers/table.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_lab import RESULTS, Row

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def table(folder: Path = RESULTS) -> str:
    """An overview, and one section a result: its command, rows and picture.

    Rows that say neither what a paper has nor why a number differs are folded away.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    full = [one for one in found if not one["fast"]]
    overview = ["| result | command in `examples/papers` | minutes of a core |", "|---|---|---|"]
    for one in full:
        link = f"[{one['title']}](#{_anchor(one['title'])})"
        overview.append(f"| {link} | `{one['command']}` | {one['minutes']:.1f} |")
    return "\n\n".join(["\n".join(overview), *(_section(one, folder) for one in full)])


def _section(found: dict[str, Any], folder: Path) -> str:
    rows = [Row(**row) for row in found["rows"]]
    seeds = len(rows[0].values)
    said = f"`python examples/papers/{found['command']}`, {found['minutes']:.1f} minutes of a core"
    if all(len(row.values) == seeds for row in rows):
        said += f", {seeds} seed{'s' * (seeds > 1)}"
    parts = [f"### {found['title']}", said]
    told = [row for row in rows if row.paper or row.why]
    rest = [row for row in rows if not (row.paper or row.why)]
    if columns := found.get("columns"):
        parts[-1] += ". In brackets: the paper's"
        parts.append(_grid(rows, columns))
        rest = []
    elif told:
        parts.append(
            _rows(
                ("", "paper", "ours", "why it differs"),
                [(row.what, row.paper, row.ours, row.why) for row in told],
            )
        )
    if note := found.get("note"):
        parts.append(note)
    picture = folder / f"{found['name']}.png"
    if picture.exists():
        parts.append(f"![{found['title']}](papers/results/{picture.name})")
    if rest:
        numbers = _rows(("", "ours"), [(row.what, row.ours) for row in rest])
        summary = f"<summary>{len(rest)} more numbers</summary>"
        parts.append(f"<details>{summary}\n\n{numbers}\n\n</details>")
    return "\n\n".join(parts)


def _grid(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows named "row: column" as a table of that shape, and what explains differences."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        name, _, column = row.what.rpartition(": ")
        cells.setdefault(name, {})[column] = row
    lines = []
    for name, by_column in cells.items():
        shown = [_cell(by_column[column]) if column in by_column else "" for column in columns]
        whys = dict.fromkeys(row.why for row in by_column.values() if row.why)
        lines.append([name, *shown, "; ".join(whys)])
    return _rows(("", *columns, "notes"), lines)


def _cell(row: Row) -> str:
    ours = "diverged" if row.ours == "nan" else row.ours
    return f"{ours} ({row.paper})" if row.paper else ours


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _anchor(title: str) -> str:
    """GitHub's name of a heading."""
    kept = "".join(char for char in title.lower() if char.isalnum() or char in " -_")
    return kept.replace(" ", "-")


def main() -> None:
    """Put the table into the README, between its marks."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
