"""The figures of the study: scores over training, by layer, and when they begin to lead chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from papers.paper_lab import COLORS, LINES, STYLE, axes

from images_lab.results import age, counts, lead, median, onset, record
from images_lab.training import Outcome

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

TITLES = {
    "resnet": "ResNet, no norm, SGD",
    "resnet-bn": "ResNet, BatchNorm, SGD",
    "vit": "ViT, AdamW",
}
NAMES = {
    "fact": "FACT", "bfact": "bFACT", "update_fact": "update FACT", "update_bfact": "update bFACT",
    "nfa": "NFA", "enfa": "eNFA", "bnfa": "bNFA", "benfa": "beNFA",
    "init_centered_nfa": "init-centred NFA", "init_centered_enfa": "init-centred eNFA",
    "double_centered_nfa": "double-centred NFA", "ptk_centered_nfa": "PTK-centred NFA",
    "alignment_speed": "alignment speed", "update_alignment_speed": "speed, of updates",
}  # fmt: skip
#: Relations of one panel of the curves each; in the first the form that fits the optimizer.
PANELS = {
    "NFA and kin": ("nfa", "enfa", "bnfa", "benfa"),
    "centred": ("init_centered_nfa", "double_centered_nfa", "ptk_centered_nfa"),
    "speed": ("alignment_speed", "update_alignment_speed"),
}


def equality(outcome: Outcome, backward: bool = False) -> str:
    """The form of FACT that fits the optimizer."""
    name = "bfact" if backward else "fact"
    return f"update_{name}" if outcome.setting.optimizer == "adamw" else name


def draw(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write every figure into a folder."""
    mpl.rcParams.update(STYLE)
    for name, figure in (
        ("fact", fact_by_age(outcomes)),
        ("curves", curves(outcomes)),
        ("heatmaps", heatmaps(outcomes)),
        ("onset", onsets(outcomes)),
    ):
        figure.savefig(folder / f"{name}.png")
        plt.close(figure)


def fact_by_age(outcomes: Sequence[Outcome]) -> Figure:
    """The form of FACT that fits, layer by layer over decay age; frozen weights as circles."""
    figure, grid = axes(1, len(outcomes), width=3.4, height=2.6)
    for axis, outcome in zip(grid[0], outcomes, strict=True):
        name, layers = equality(outcome), outcome.loop[0].layers
        ages = [age(report) for report in outcome.loop]
        shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
        for layer, shade in zip(layers, shades, strict=True):
            found = [record(report, layer, name).cosine for report in outcome.loop]
            axis.plot(ages, found, color=shade, linewidth=1.0)
        frozen = [
            median(record(at.equalities, layer, "fact").cosine for layer in layers)
            for at in outcome.frozen
        ]
        halves = [0.0, _age_at(outcome, outcome.frozen[1].equalities.step), ages[-1]]
        axis.plot(
            halves,
            frozen,
            "o",
            color=COLORS[1],
            fillstyle="none",
            label="gradient FACT, frozen: median",
        )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(
            title=f"{TITLES[outcome.setting.name]}: {NAMES[name]}", ylim=(-0.6, 1.05),
            xlabel="decay age",
        )  # fmt: skip
        axis.legend(loc="lower right", fontsize=7)
    grid[0][0].set_ylabel("cosine; dark: first layers")
    return figure


def _age_at(outcome: Outcome, step: int) -> float:
    """Decay age at a step between reports."""
    steps = [report.step for report in outcome.loop]
    return float(np.interp(step, steps, [age(report) for report in outcome.loop]))


def curves(outcomes: Sequence[Outcome]) -> Figure:
    """The median layer's way from chance (0) to full agreement (1), over decay age."""
    figure, grid = axes(len(outcomes), 4, width=2.6, height=2.1)
    for row, outcome in zip(grid, outcomes, strict=True):
        panels = {"FACT": (equality(outcome), equality(outcome, backward=True)), **PANELS}
        for axis, (title, names) in zip(row, panels.items(), strict=True):
            for name, color, line in zip(names, COLORS, LINES, strict=False):
                _curve(axis, outcome, name, color, line)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set(ylim=(-0.6, 1.05), title=f"{title}")
            axis.legend(fontsize=6.5, loc="best", handlelength=2.5, frameon=True, framealpha=0.7)
        row[0].set_ylabel(
            f"{TITLES[outcome.setting.name]}\nchance = 0, agreement = 1", fontsize=7.5
        )
    for axis in grid[-1]:
        axis.set_xlabel("decay age")
    return figure


def _curve(axis: Axes, outcome: Outcome, name: str, color: str, line: object) -> None:
    found = [
        (age(report), median(lead(r) for r in _scores(outcome, index, name)))
        for index, report in enumerate(outcome.loop)
    ]
    axis.plot(*zip(*found, strict=True), color=color, linestyle=line, label=NAMES[name])


def _scores(outcome: Outcome, index: int, name: str) -> list:
    report = outcome.loop[index]
    found = [record(report, layer, name) for layer in report.layers]
    return [r for r in found if r.verdict not in ("trivial", "undefined")]


def heatmaps(outcomes: Sequence[Outcome]) -> Figure:
    """Cosine by layer and report, the level by chance at the right; hatched: says nothing."""
    names = ("", "nfa", "enfa", "init_centered_nfa", "ptk_centered_nfa", "update_alignment_speed")
    figure, grid = axes(len(outcomes), len(names), width=2.0, height=2.5)
    colors = mpl.colormaps["viridis"].with_extremes(bad="0.85")
    for row, outcome in zip(grid, outcomes, strict=True):
        for axis, name in zip(row, names, strict=True):
            image = _heatmap(axis, outcome, name or equality(outcome), colors)
            if axis is row[0]:
                layers = outcome.loop[0].layers
                axis.set_yticks(range(len(layers)), layers, fontsize=5.5)
                axis.set_ylabel(TITLES[outcome.setting.name])
    figure.colorbar(image, ax=grid, shrink=0.5, label="cosine")
    return figure


def _heatmap(axis: Axes, outcome: Outcome, name: str, colors: Colormap) -> mpl.image.AxesImage:
    reports, layers = outcome.loop, outcome.loop[0].layers
    shown = np.full((len(layers), len(reports) + 2), math.nan)
    for i, layer in enumerate(layers):
        for j, report in enumerate(reports):
            found = record(report, layer, name)
            shown[i, j] = found.cosine
            if not counts(found):
                axis.add_patch(
                    plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", linewidth=0,
                                  edgecolor="0.5")
                )  # fmt: skip
        shown[i, -1] = record(reports[-1], layer, name).level_by_chance
    image = axis.imshow(shown, cmap=colors, vmin=0, vmax=1, aspect="auto")
    ticks = range(0, len(reports), 2)
    axis.set_xticks([*ticks, len(reports) + 1], [*(str(reports[t].step) for t in ticks), "chance"])
    axis.tick_params(axis="x", labelsize=6, rotation=90)
    axis.set_yticks([])
    axis.set_title(NAMES[name])
    axis.grid(visible=False)
    return image


def onsets(outcomes: Sequence[Outcome]) -> Figure:
    """By layer and relation: the decay age from which on a score leads chance for good."""
    figure, grid = axes(1, len(outcomes), width=3.6, height=3.6)
    for axis, outcome in zip(grid[0], outcomes, strict=True):
        layers = outcome.loop[0].layers
        names = (equality(outcome), "nfa", "bnfa", "init_centered_nfa", "ptk_centered_nfa")
        for k, (name, color, marker) in enumerate(zip(names, COLORS, "osD^v", strict=False)):
            found = [onset(outcome.loop, layer, name) for layer in layers]
            points = [(age(r), i + 0.14 * (k - 2)) for i, r in enumerate(found) if r is not None]
            axis.plot(
                [a for a, _ in points], [i for _, i in points], marker, color=color, markersize=4,
                label=NAMES[name],
            )  # fmt: skip
        axis.set_yticks(range(len(layers)), layers, fontsize=6)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set(title=TITLES[outcome.setting.name], xlabel="decay age at onset", xlim=(-0.01, 6))
        axis.set_ylim(len(layers) - 0.4, -0.6)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.4, -0.15), ncols=2)
    return figure
