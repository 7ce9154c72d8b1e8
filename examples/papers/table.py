"""Make the table of examples/README.md from what the scripts of this folder have found.

python examples/papers/table.py
"""

from __future__ import annotations

import json
from pathlib import Path

from paper_lab import RESULTS, Row

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def table(folder: Path = RESULTS) -> str:
    """One section a result: its rows, command and minutes."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["fast"]:
            continue
        rows = [Row(**row) for row in found["rows"]]
        lines = [
            f"### {found['title']}",
            "",
            f"`python examples/papers/{found['command']}`, {found['minutes']:.1f} minutes on "
            f"one core, {len(rows[0].values)} seed{'s' * (len(rows[0].values) > 1)}",
            "",
            "| | paper | ours | why it differs |",
            "|---|---|---|---|",
            *(f"| {row.what} | {row.paper} | {row.ours} | {row.why} |" for row in rows),
        ]
        picture = path.with_suffix(".png")
        if picture.exists():
            lines += ["", f"![{found['title']}](papers/results/{picture.name})"]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def main() -> None:
    """Put the table into the README, between its marks."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
