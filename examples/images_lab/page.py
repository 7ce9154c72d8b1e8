"""The tables of examples/images_study.md, put between its marks; its words are written by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from feature_probe import RELATIONS, Record, Report
from images_lab.figures import NAMES, TITLES, equality
from images_lab.results import age, counts, lead, leads, median, onset, record
from images_lab.training import Frozen, Outcome

BEGIN, END = "<!-- {}: made by images_study.py -->", "<!-- end -->"


def write_page(outcomes: Sequence[Outcome], path: Path) -> None:
    """Put every table into the page, between its marks."""
    path.write_text(filled(path.read_text(encoding="utf-8"), outcomes), encoding="utf-8")


def filled(text: str, outcomes: Sequence[Outcome]) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: if the page lacks a mark.
    """
    for name, make in TABLES.items():
        mark = BEGIN.format(name)
        before, found, rest = text.partition(mark)
        _, closed, after = rest.partition(END)
        if not found or not closed:
            raise ValueError(f"the page has no {mark} ... {END}")
        text = f"{before}{mark}\n\n{make(outcomes)}\n\n{END}{after}"
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _titles(outcomes: Sequence[Outcome]) -> list[str]:
    return [TITLES[outcome.setting.name] for outcome in outcomes]


def runs(outcomes: Sequence[Outcome]) -> str:
    """What was trained."""
    head = ("", "parameters", "steps", "rate, λ", "decay age", "loss", "test accuracy", "minutes")
    return _table(
        head,
        [
            [
                TITLES[o.setting.name], f"{o.parameters:,}", f"{o.setting.steps:,}",
                f"{o.setting.rate:g}, {o.setting.decay:g}", f"{age(o.loop[-1]):.1f}",
                f"{o.losses[-1][1]:.3f}", f"{o.accuracy:.1%}", f"{o.minutes:.1f}",
            ]
            for o in outcomes
        ],
    )  # fmt: skip


def verdicts(outcomes: Sequence[Outcome]) -> str:
    """What the verdicts of the last report in the loop are, by relation."""

    def cell(outcome: Outcome, name: str) -> str:
        last = outcome.loop[-1]
        said = Counter(record(last, layer, name).verdict for layer in last.layers)
        return ", ".join(f"{count} {verdict}" for verdict, count in said.most_common())

    rows = [[f"`{name}`", *(cell(o, name) for o in outcomes)] for name in RELATIONS]
    return _table(["", *_titles(outcomes)], rows)


def over_training(outcomes: Sequence[Outcome]) -> str:
    """Median cosine and level by chance at the first report, half-way and the last one."""

    def cell(report: Report, name: str) -> str:
        found = [record(report, layer, name) for layer in report.layers]
        found = [r for r in found if r.verdict not in ("trivial", "undefined")]
        cosine = _number(median(r.cosine for r in found))
        return f"{cosine} ({_number(median(r.level_by_chance for r in found))})"

    rows = []
    for name in RELATIONS:
        cells = [
            " → ".join(cell(o.loop[i], name) for i in (0, len(o.loop) // 2, -1)) for o in outcomes
        ]
        rows.append([f"`{name}`", *cells])
    return _table(["", *_titles(outcomes)], rows)


def layers_at_end(outcomes: Sequence[Outcome]) -> str:
    """Every layer at frozen weights after training (the loop's form of FACT for AdamW)."""
    names = ("nfa", "enfa", "bnfa", "init_centered_nfa", "double_centered_nfa", "ptk_centered_nfa")
    head = ["", "layer", "FACT of the loop", "FACT, frozen", *(NAMES[name] for name in names)]
    rows = []
    for o in outcomes:
        last, frozen = o.loop[-1], o.frozen[-1]
        for layer in last.layers:
            equalities = [
                record(last, layer, equality(o)), record(frozen.equalities, layer, "fact")
            ]  # fmt: skip
            found = [*equalities, *(record(frozen.others, layer, name) for name in names)]
            rows.append([TITLES[o.setting.name], f"`{layer}`", *map(_score, found)])
    return _table(head, rows)


def _score(found: Record) -> str:
    """Cosine (level by chance), and what is said of it where that is no plain yes."""
    numbers = f"{_number(found.cosine)} ({_number(found.level_by_chance)})"
    return numbers if found.verdict in ("holds", "aligned") else f"{numbers} {found.verdict}"


def onsets(outcomes: Sequence[Outcome]) -> str:
    """How many layers lead chance from which decay age on, to the end."""

    def cell(outcome: Outcome, name: str) -> str:
        reports = outcome.loop
        judged = [x for x in reports[-1].layers if counts(record(reports[-1], x, name))]
        found = [onset(reports, layer, name) for layer in judged]
        began = sorted((age(r), r.step) for r in found if r is not None)
        if not began:
            return f"none of {len(judged)}"
        first, middle = began[0], began[len(began) // 2]
        return f"{len(began)} of {len(judged)}: first at {_when(first)}, median {_when(middle)}"

    rows = [[f"`{name}`", *(cell(o, name) for o in outcomes)] for name in RELATIONS]
    return _table(["", *_titles(outcomes)], rows)


def _when(found: tuple[float, int]) -> str:
    return f"{found[0]:.2g} (step {found[1]:,})"


def untrained(outcomes: Sequence[Outcome]) -> str:
    """What an untrained network scores: how high, and how often clearly above chance."""
    rows = []
    for name in ("nfa", "enfa", "bnfa", "benfa", "alignment_speed"):
        cells = []
        for o in outcomes:
            start = o.frozen[0].others
            found = [record(start, layer, name) for layer in start.layers]
            found = [r for r in found if counts(r)]
            high = sum(r.cosine >= 0.5 for r in found)
            above = sum(leads(r) for r in found)
            cells.append(
                f"{_number(median(r.cosine for r in found))}, highest "
                f"{_number(max((r.cosine for r in found), default=math.nan))}; {high} of "
                f"{len(found)} above 0.5, {above} clear of chance"
            )
        rows.append([f"`{name}`", *cells])
    return _table(["before training", *_titles(outcomes)], rows)


def direction(outcomes: Sequence[Outcome]) -> str:
    """Who moves: W to the PTK (init-centred), the PTK to W₀ (PTK-centred), or both together."""

    def cell(at: Frozen, name: str) -> str:
        found = [record(at.others, layer, name) for layer in at.others.layers]
        found = [r for r in found if counts(r)]
        above = sum(leads(r) for r in found)
        return (
            f"{_number(median(r.cosine for r in found))} ({above} of {len(found)}; "
            f"lead {_number(median(lead(r) for r in found))})"
        )

    names = ("init_centered_nfa", "double_centered_nfa", "ptk_centered_nfa")
    rows = [
        [f"`{name}`, {when}", *(cell(o.frozen[index], name) for o in outcomes)]
        for name in names
        for when, index in (("half-way", 1), ("end", 2))
    ]
    return _table(["frozen weights", *_titles(outcomes)], rows)


def fact(outcomes: Sequence[Outcome]) -> str:
    """FACT over decay age, by what becomes of it; frozen weights in the last columns."""
    rows = []
    for o in outcomes:
        last = o.loop[-1]
        free = ("none", "unknown")
        scaled = [x for x in last.layers if last.diagnosis(x).scale_invariance not in free]
        others = [x for x in last.layers if x not in scaled]
        for which, layers in (("before BatchNorm", scaled), ("other layers", others)):
            if not layers:
                continue
            names = ("fact",) if o.setting.optimizer == "sgd" else ("fact", "update_fact")
            for name in names:
                cells = [
                    _number(median(record(report, x, name).cosine for x in layers))
                    for report in o.loop
                ]
                frozen = [
                    _number(median(record(at.equalities, x, name).cosine for x in layers))
                    if name == "fact" else "–" for at in o.frozen[1:]
                ]  # fmt: skip
                where = f"{TITLES[o.setting.name]}, {len(layers)} {which}, `{name}`"
                rows.append([where, *cells, *frozen])
    ages = [f"age {age(report):.2g}" for report in outcomes[0].loop]
    return _table(["median cosine", *ages, "frozen, half-way", "frozen, end"], rows)


def rest(outcomes: Sequence[Outcome]) -> str:
    """How far the layers are from rest at the end, on all training images."""
    rows = []
    for o in outcomes:
        at = o.frozen[-1].equalities
        found = [record(at, layer, "fact") for layer in at.layers]
        off = [r.stationarity for r in found]
        near = min(found, key=lambda r: r.stationarity)
        rows.append(
            [
                TITLES[o.setting.name], _number(median(off)),
                f"`{near.layer}`: {_number(near.stationarity)}, cosine {_number(near.cosine)}",
            ]
        )  # fmt: skip
    return _table(["frozen, end", "median ‖λW + G‖/‖λW‖", "least, and FACT there"], rows)


def power(outcomes: Sequence[Outcome]) -> str:
    """The power of AGOPˢ that fits best at the end of training."""
    rows = []
    for name in ("nfa", "enfa", "bnfa"):
        cells = []
        for o in outcomes:
            at = o.frozen[-1].others
            found = [record(at, layer, name) for layer in at.layers]
            found = [r for r in found if counts(r) and not math.isnan(r.fitted_power)]
            powers = [r.fitted_power for r in found]
            cells.append(
                f"{_number(median(powers))}, from {_number(min(powers, default=math.nan))} to "
                f"{_number(max(powers, default=math.nan))}, {len(found)} layers; cosine "
                f"{_number(median(r.fitted_cosine for r in found))} (s = 1: "
                f"{_number(median(r.cosine for r in found))})"
            )
        rows.append([f"`{name}`", *cells])
    return _table(["frozen, end: ŝ", *_titles(outcomes)], rows)


TABLES: dict[str, Callable[[Sequence[Outcome]], str]] = {
    "runs": runs,
    "untrained": untrained,
    "fact": fact,
    "rest": rest,
    "power": power,
    "verdicts": verdicts,
    "over training": over_training,
    "onset": onsets,
    "direction": direction,
    "layers": layers_at_end,
}
