"""C-NFA paper, Fig. 2 once more: why the init-centred NFA of the first layer dips.

One change at a time to the network of Fig. 2 with s = 0.1. For each, the score of W̄ᵀKW̄, and the
score with Cov(J) in the place of K = Cov(J) + J̄J̄ᵀ, J̄ the mean over examples of J = ∂f/∂z. What J̄
adds is vvᵀ with v = W̄ᵀJ̄: how W̄ has changed the linear part of f. The target is even, so that this
fits the linear part of a sample of the labels, Σ y_i x_i ≠ 0.

    python examples/papers/centered_dip.py             # 2 seeds
    python examples/papers/centered_dip.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from centered_training import (
    GRAM_SHARE,
    MEAN_SHARE,
    SPREAD,
    Setting,
    apart,
    draw,
    last,
    lowest,
    read_at,
    train,
)
from paper_lab import Experiment, Results, axes
from torch import nn

_BASE = Setting(0.1)


@dataclass(frozen=True)
class Change:
    """A setting that differs from the first in one thing, and what its run says of the dip."""

    setting: Setting
    says: str


CHANGES = {
    "as in Fig. 2, s = 0.1": Change(
        _BASE,
        "at first v = W̄ᵀJ̄ is the largest direction of both sides. Then W̄ᵀW̄ turns to the target "
        "while W̄ᵀKW̄ stays, as J̄ is K's first eigenvector, with ten times the second eigenvalue at "
        "the start: the score falls (last rows), until K turns too",
    ),
    "rate 0.01, as long": Change(replace(_BASE, rate=0.01), "not the size of the steps"),
    "1,024 points": Change(
        replace(_BASE, points=1024),
        "as deep, so not overfitting; but that is what holds the score down at the end",
    ),
    "mirrored points, Σ y x = 0": Change(
        replace(_BASE, mirrored=True),
        "without a linear part of the labels there is no dip: lowest is its slow end",
    ),
    "labels of deviation 0.3": Change(
        replace(_BASE, labels=0.3), "falls as much and stays: with smaller labels K turns less"
    ),
    "GELU": Change(replace(_BASE, activation=nn.GELU), "not the kinks of ReLU"),
    "other layers' s = 1/3": Change(
        replace(_BASE, others=1 / 3), "PyTorch's own initial scale there: not that either"
    ),
}
CENTRED = "init_centered_nfa"
PANELS = {
    CENTRED: "score with K",
    SPREAD: "score with Cov(J) for K",
    MEAN_SHARE: "share of vvᵀ in tr W̄ᵀKW̄",
    GRAM_SHARE: "share of v's direction in tr W̄ᵀW̄",
}


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all seeds and changes."""
    run = Experiment(__file__, __doc__, argv, seeds=2)
    names = list(CHANGES)[::4] if run.fast else list(CHANGES)
    found = {
        name: [
            train(seed, CHANGES[name].setting, (CENTRED,), fast=run.fast, read=apart)
            for seed in run.seeds
        ]
        for name in names
    }
    for name, runs in found.items():
        says = "" if run.fast else CHANGES[name].says
        paper = "high throughout" if name == names[0] else ""
        run.row(f"{name}: lowest", paper, lowest({name: runs}, "0", CENTRED), says)
        run.row(f"{name}: at the end", "", last(runs, "0", CENTRED))
        run.row(f"{name}, Cov(J) for K: lowest", "", lowest({name: runs}, "0", SPREAD))
    for time in (20, 50, 100) if run.fast else (5, 60, 800):
        for share in (MEAN_SHARE, GRAM_SHARE):
            what = f"{names[0]}: {PANELS[share]}, time {time}"
            run.row(what, "", read_at(time, found[names[0]], "0", share))
    figure, grid = axes(2, 2, width=3.6)
    for axis, (curve, title) in zip(grid.flat, PANELS.items(), strict=True):
        draw(axis, found, "0", curve)
        axis.set(title=title, ylim=(0, 1.02), xscale="log", xlim=(4, None))
    for axis in grid[1]:
        axis.set_xlabel("time, in steps of 0.05")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return run.finish(figure)


if __name__ == "__main__":
    main()
