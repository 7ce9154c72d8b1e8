"""FACT paper, Fig. 8 and 10: agreement over epochs in the first three layers, forward and backward.

ReLU networks, App. A; Pearson's r. The paper's figures are of CIFAR-10 (``--cifar 1 --width 3072
--points 50000 --data ROOT``), ours of MNIST. Which network is given by options (see fact_mlp.py).

    python examples/papers/fact_fig8.py --points 60000 --width 256 --epochs 50 --data ROOT
    python examples/papers/fact_fig8.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence

from fact_fig2 import BACKWARD, FORWARD, STYLES
from fact_mlp import describe, experiment, networks
from paper_lab import Results, axes

LAYERS = 3


def main(argv: Sequence[str] | None = None) -> Results:
    """Show one network over epochs."""
    run = experiment(__file__, __doc__, argv, seeds=1)
    found = networks(run, followed=True)
    setting = found[0].setting
    run.results.name += f"_{setting.options}"
    run.results.title = f"FACT paper, Fig. 8 and 10: {describe(setting)}"
    for label in ("fact", "fact_sym", "nfa^0.5", "enfa^0.5"):
        for part, when in ((0.1, "a tenth"), (0.5, "half"), (1.0, "all")):
            epoch = round(part * setting.epochs)
            values = [network.curves[epoch][network.report.layers[0]][label] for network in found]
            run.row(f"layer 1, {FORWARD[label]} after {when} of the epochs", "", values)
    figure, grid = axes(2, LAYERS, width=2.5, height=2.2)
    for row, shown in zip(grid, (FORWARD, BACKWARD), strict=True):
        for layer, axis in enumerate(row):
            for label, name in shown.items():
                color, line = STYLES[label]
                epochs, values = found[0].series(layer, label)
                axis.plot(epochs, values, linestyle=line, color=color, label=name)
            axis.set(title=f"layer {layer + 1}", ylim=(-0.1, 1.05))
        row[0].set(ylabel=f"Pearson's r with {'WᵀW' if shown is FORWARD else 'WWᵀ'}")
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in grid[-1]:
        axis.set(xlabel="epoch")
    figure.suptitle(describe(setting), fontsize=9)
    return run.finish(figure)


if __name__ == "__main__":
    main()
