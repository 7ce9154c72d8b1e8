"""C-NFA paper, Fig. 2 once more: why the init-centred NFA of the first layer dips.

One change at a time to the network of Fig. 2 with s = 0.1. For each, the score of W̄ᵀKW̄, and the
score with Cov(J) in the place of K = Cov(J) + J̄J̄ᵀ, J̄ the mean over examples of J = ∂f/∂z.

    python examples/papers/centered_dip.py             # 2 seeds
    python examples/papers/centered_dip.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from centered_training import MEAN_SHARE, SPREAD, Setting, apart, draw, last, lowest, train
from paper_lab import Experiment, Results, axes
from torch import nn

_BASE = Setting(0.1)
CHANGES = {
    "as in Fig. 2, s = 0.1": _BASE,
    "rate 0.01, as long": replace(_BASE, rate=0.01),
    "1,024 points": replace(_BASE, points=1024),
    "mirrored points, Σ y x = 0": replace(_BASE, mirrored=True),
    "labels of deviation 0.3": replace(_BASE, labels=0.3),
    "GELU": replace(_BASE, activation=nn.GELU),
    "other layers' s = 1/3": replace(_BASE, others=1 / 3),
}
CENTRED = "init_centered_nfa"


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all seeds and changes."""
    run = Experiment(__file__, __doc__, argv, seeds=2)
    names = list(CHANGES)[::4] if run.fast else list(CHANGES)
    found = {
        name: [
            train(seed, CHANGES[name], (CENTRED,), fast=run.fast, read=apart) for seed in run.seeds
        ]
        for name in names
    }
    for name, runs in found.items():
        run.row(f"{name}: lowest", "high throughout", lowest({name: runs}, "0", CENTRED))
        run.row(f"{name}: at the end", "", last(runs, "0", CENTRED))
        run.row(f"{name}, Cov(J) for K: lowest", "", lowest({name: runs}, "0", SPREAD))
    figure, grid = axes(1, 3, height=3.0)
    for axis, curve, title in zip(
        grid[0],
        (CENTRED, SPREAD, MEAN_SHARE),
        ("with K", "with Cov(J) for K", "share of J̄J̄ᵀ in tr W̄ᵀKW̄"),
        strict=True,
    ):
        draw(axis, found, "0", curve)
        axis.set(title=title, ylim=(0, 1.02), xlabel="time, in steps of 0.05")
        axis.set_xscale("symlog", linthresh=10)
    grid[0, 0].set_ylabel("cosine, layer 1")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return run.finish(figure)


if __name__ == "__main__":
    main()
