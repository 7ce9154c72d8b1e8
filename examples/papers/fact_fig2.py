"""FACT paper, Fig. 2 and 9: agreement with FACT, AGOP and eNFA by layer, forward and backward.

ReLU networks trained to interpolation, App. A; Pearson's r. Which network is given by options (see
fact_mlp.py); the figure has the forward relations (Fig. 2) and the backward ones (Fig. 9).

    python examples/papers/fact_fig2.py                  # n = 1,000; minutes on one core: 2 a seed
    python examples/papers/fact_fig2.py --epochs 1500    # where decay has had time: 12
    python examples/papers/fact_fig2.py --points 60000 --data ROOT
    python examples/papers/fact_fig2.py --fast
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fact_mlp import Trained, describe, experiment, networks
from paper_lab import COLORS, LINES, Results, axes

#: What the figures show: labels of records and names.
FORWARD = {
    "fact": "FACT",
    "fact_sym": "√(FACT·FACTᵀ)",
    "nfa^1": "AGOP",
    "nfa^0.5": "√AGOP",
    "enfa^1": "eNFA",
    "enfa^0.5": "√eNFA",
}
BACKWARD = {
    "bfact": "bFACT",
    "bnfa^1": "bAGOP",
    "bnfa^0.5": "√bAGOP",
    "benfa^1": "beNFA",
    "benfa^0.5": "√beNFA",
}
#: A colour and a line for each quantity, the same on both sides.
STYLES = dict(zip(FORWARD, zip(COLORS, LINES, strict=True), strict=True))
STYLES |= {label: STYLES[label[1:]] for label in BACKWARD}


def main(argv: Sequence[str] | None = None) -> Results:
    """Show one network by layer."""
    run = experiment(__file__, __doc__, argv, seeds=3)
    found = networks(run)
    setting = found[0].setting
    run.results.name += f"_{setting.options}"
    run.results.title = f"FACT paper, Fig. 2 and 9: {describe(setting)}"
    run.row("loss at the end, in thousandths", "", [1e3 * network.loss for network in found])
    for label, name in (FORWARD | BACKWARD).items():
        run.row(f"layer 1: Pearson's r of {name}", "", [n.pearson(label)[0] for n in found])
        run.row(f"{name}, lowest over layers", "", [_lowest(n, label) for n in found])
    figure, grid = axes(1, 2)
    for axis, shown, gram in zip(grid[0], (FORWARD, BACKWARD), ("WᵀW", "WWᵀ"), strict=True):
        for label, name in shown.items():
            color, line = STYLES[label]
            by_layer = zip(*(network.pearson(label) for network in found), strict=True)
            values = [statistics.fmean(scores) for scores in by_layer]
            layers = range(1, len(values) + 1)
            axis.plot(layers, values, linestyle=line, color=color, marker="o", ms=3, label=name)
        axis.set(xlabel="layer", ylabel=f"Pearson's r with {gram}", xticks=list(layers))
        axis.set(ylim=(min(0.0, axis.get_ylim()[0]), 1.03))
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(describe(setting), fontsize=9)
    return run.finish(figure)


def _lowest(network: Trained, label: str) -> float:
    """Over the layers where it is defined (bAGOP is a multiple of the identity in the last one)."""
    return min(score for score in network.pearson(label) if not math.isnan(score))


if __name__ == "__main__":
    main()
