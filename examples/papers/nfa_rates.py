"""NFA paper on deep networks, Table 2: what a shorter run at a larger learning rate changes.

SGD with momentum, λ = 1e-5, rank 5: 2,000 epochs at the printed learning rate, and the same time of
gradient flow at 5 and 20 times the rate. At that λ decay does next to nothing in 60,000 epochs
(2Σηλ/(1 − μ) = 0.04), so that the cosine is settled once the target is fitted, and what differs
between the rows is the rate alone.

    python examples/papers/nfa_rates.py
    python examples/papers/nfa_rates.py --fast
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfa_lab import DEPTHS, Group, Network, cosine, printed, train
from paper_lab import COLORS, LINES, Experiment, Results, axes

NETWORK = Network(1e-5)
TIMES = (1, 5, 20)


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all depths at three rates."""
    run = Experiment(__file__, __doc__, argv, seeds=1)
    depths, epochs = (DEPTHS[:1], 400) if run.fast else (DEPTHS, 2000)
    times = TIMES[1:] if run.fast else TIMES
    theirs = [float(printed(5, 0)["sgdm", depth, NETWORK.decay]) for depth in depths]
    figure, grid = axes(1, 1, width=3.6)
    for shorter, color, line in zip(times, COLORS, LINES, strict=False):
        means = []
        for depth in depths:
            groups = [
                Group("sgdm", depth, (NETWORK,), 5, seed, shorter, epochs=epochs, last=20)
                for seed in run.seeds
            ]
            values = [cosine(train(group, run), NETWORK) for group in groups]
            rate = "the printed rate" if shorter == 1 else f"{shorter} times the rate"
            paper = printed(5, 0)["sgdm", depth, NETWORK.decay]
            what = f"L = {depth}, {rate}"
            run.row(f"{what}: training diverged", "no", [float(math.isnan(v)) for v in values])
            finite = [value for value in values if not math.isnan(value)]
            if finite:
                run.row(f"{what}: cosine", paper, finite)
            means.append(sum(finite) / len(finite) if finite else math.nan)
        label = "the printed rate" if shorter == 1 else f"{shorter} times the rate"
        grid[0, 0].plot(depths, means, color=color, linestyle=line, marker=".", label=label)
    grid[0, 0].plot(depths, theirs, "ko", mfc="none", label="printed cosine")
    grid[0, 0].set(
        xlabel="linear layers L",
        ylabel="cosine, λ = 1e-5",
        xticks=depths,
        title="SGD with momentum, early",
    )
    grid[0, 0].legend()
    return run.finish(figure)


if __name__ == "__main__":
    main()
