"""Make the table of examples/README.md from what the scripts of this folder have found.

python examples/papers/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from paper_lab import RESULTS, Row

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
#: Scripts whose results' names are not their own, by what the names begin with: the options. In the
#: place of {options} comes what the rest of the name says, points1000_hidden3 as options.
OPTIONS = {
    "centered_fig7": "centered_fig2.py --decay 1",
    "centered_fig8": "centered_fig2.py --decay 2",
    "fact_fig11_depth": "fact_fig11.py --depth {}",
    "nfa_fig2": "nfa_fig2.py --shorter 10 --stored 1",
    "nfa_fig3": "nfa_fig3.py --shorter 20 --stored 1",
    "nfa_fig4_plain": "nfa_fig4.py --shorter 100 --plain 1",
    "nfa_fig8": "nfa_fig8.py --shorter 10",
    "nfa_tables_rank5": "nfa_tables.py --shorter 20 --stored 1",
    "fact_fig2_": "fact_fig2.py {options}",
    "fact_fig8_": "fact_fig8.py {options}",
}


def command(name: str) -> str:
    """What to call for a result."""
    for start, call in OPTIONS.items():
        if name.startswith(start):
            rest = name.removeprefix(start)
            options = re.sub(r"([a-z]+)(\d+)", r"--\1 \2", rest).replace("_", " ")
            return call.format(rest, options=options)
    return f"{name}.py"


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
            f"`python examples/papers/{command(found['name'])}`, {found['minutes']:.1f} minutes on "
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
