"""C-NFA paper, Fig. 4: how much of the init-centred NFA the change of the Jacobians makes.

tr(W̄ᵀW̄ W̄ᵀK̄W̄) / tr(W̄ᵀW̄ W̄ᵀKW̄) over training, both layers, with W̄ = W − W₀ and K̄ of J − J⁰. The
network of Fig. 2 (centered_training.py). The paper names no initial scale; its claim is that the
ratio is small where the initialisation is large, and early. As f is homogeneous of degree 3
in the weights, labels of a tenth stand for initial weights that are larger by 10^(1/3) everywhere.

    python examples/papers/centered_fig4.py            # 2 seeds
    python examples/papers/centered_fig4.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from centered_training import LAYERS, SCALES, OfMean, draw, last, read_at, train
from paper_lab import Experiment, Results, axes

from feature_probe import Report

RATIO = "ratio"
EARLY = 20
_LARGE = (
    "the order is the paper's: the larger the initial weights, the smaller. How small depends on "
    "how large; the paper does not say. With larger ones in all layers, by labels of a tenth (row "
    "'labels / 10'), it is smaller still"
)


def ratio(report: Report, layer: str, _: OfMean) -> dict[str, float]:
    """The ratio of one layer; undefined at W = W₀."""
    gram = report.matrix(layer, "init_centered_nfm")
    doubly = (gram * report.matrix(layer, "double_centered_nfa", 1.0)).sum()
    return {RATIO: float(doubly / (gram * report.matrix(layer, "init_centered_nfa", 1.0)).sum())}


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all seeds and scales."""
    run = Experiment(__file__, __doc__, argv, seeds=2)
    large = replace(SCALES["s = 1, rate 0.01"], labels=0.1)
    # At s = 1 the rate of 0.05 is beyond stability.
    scales = {"s = 1, labels / 10": large} | {k: v for k, v in SCALES.items() if k != "s = 1"}
    names = list(scales)
    relations = ("double_centered_nfa", "init_centered_nfa")
    found = {
        name: [
            train(seed, scales[name], relations, fast=run.fast, read=ratio) for seed in run.seeds
        ]
        for name in (names[1::2] if run.fast else names)
    }
    for i, layer in enumerate(LAYERS, 1):
        for name, runs in found.items():
            small = "small" if name in names[:2] else ""
            early = read_at(EARLY, runs, layer, RATIO)
            run.row(f"layer {i}, {name}: at time {EARLY}", "small", early)
            why = _LARGE if name == names[1] and not run.fast else ""
            run.row(f"layer {i}, {name}: at the end", small, last(runs, layer, RATIO), why)
    figure, grid = axes(1, 2)
    for i, (axis, layer) in enumerate(zip(grid[0], LAYERS, strict=True), 1):
        draw(axis, found, layer, RATIO)
        axis.set(title=f"layer {i}", xlabel="time, in steps of 0.05", ylim=(0, 1))
    grid[0, 0].set_ylabel("double-centred over init-centred")
    grid[0, 1].legend(fontsize=7, loc="upper left", ncols=2)
    return run.finish(figure)


if __name__ == "__main__":
    main()
