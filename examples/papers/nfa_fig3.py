"""NFA paper on deep networks, Fig. 3: alignment over training by optimizer, λ = 1e-2.

Cosine of W_1ᵀW_1 with A^{1/L} over 60,000 epochs of GD and SGD, with momentum and without, L = 2 to
5. The paper prints curves and no numbers: all rise to 1, with momentum sooner, deeper ones later.

    python examples/papers/nfa_fig3.py --shorter 20
    python examples/papers/nfa_fig3.py --fast
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nfa_lab import DEPTHS, SHORTER, Network, Run, all_seeds, cosine, depths, setting
from paper_lab import COLORS, LINES, Experiment, Results, axes

OPTIMIZERS = {
    "sgd": "SGD", "sgdm": "SGD with momentum", "gd": "GD", "gdm": "GD with momentum"
}  # fmt: skip
NETWORK = Network(1e-2)
ALIGNED = 0.99
#: The paper's Fig. 1 has one cosine before training, at L = 5.
FIGURE_1 = "0.915 (Fig. 1)"


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all depths of all optimizers."""
    run = Experiment(__file__, __doc__, argv, seeds=1, shorter=SHORTER, plain=(0, 1), stored=(0, 1))
    run.results.name += "_plain" * run.options.plain
    found = {
        optimizer: {d: runs for d in depths(run) if (runs := all_seeds(optimizer, d, run))}
        for optimizer in OPTIMIZERS
    }
    shown = [optimizer for optimizer in OPTIMIZERS if found[optimizer]]
    figure, grid = axes(1, len(shown), width=2.5)
    for axis, optimizer in zip(grid[0], shown, strict=True):
        title = OPTIMIZERS[optimizer]
        for depth, runs in found[optimizer].items():
            style = DEPTHS.index(depth)
            color, line = COLORS[style], LINES[style]
            curves = [_curve(one) for one in runs]
            if optimizer == shown[0]:
                before = FIGURE_1 if depth == max(DEPTHS) else ""
                run.row(f"L = {depth}: cosine before training", before, [c[0][1] for c in curves])
            what = f"{title}, L = {depth}{setting(runs[0])}"
            run.row(f"{what}: cosine at the end", "1", [curve[-1][1] for curve in curves])
            reached = [_reached(curve) for curve in curves]
            run.row(f"{what}: thousands of epochs until it stays above {ALIGNED}", "", reached)
            epochs = [epoch / 1000 for epoch, _ in curves[0]]
            mean = [sum(v[i][1] for v in curves) / len(curves) for i in range(len(epochs))]
            axis.plot(epochs, mean, color=color, linestyle=line, label=f"L = {depth}")
        axis.set(title=title, xlabel="thousands of epochs", ylim=(0.75, 1.01))
    grid[0, 0].set_ylabel("cosine, λ = 1e-2")
    grid[0, -1].legend()
    return run.finish(figure)


def _curve(run: Run) -> list[tuple[float, float]]:
    """Epoch and cosine, before the last epochs at a smaller rate."""
    snapshots: list[dict[str, Any]] = run["snapshots"][:-1]
    return [(float(s["epoch"]), cosine(run, NETWORK, i)) for i, s in enumerate(snapshots)]


def _reached(curve: list[tuple[float, float]]) -> float:
    """Thousands of epochs from which on the cosine is high; infinite where it never is."""
    since = math.inf
    for epoch, value in reversed(curve):
        if not value >= ALIGNED:
            break
        since = epoch / 1000
    return since


if __name__ == "__main__":
    main()
