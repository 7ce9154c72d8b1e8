"""NFA paper on deep networks, Tables 1 to 3: alignment by depth, weight decay and optimizer.

Cosine of W_1ᵀW_1 with A^{1/L}, A = JᵀJ of the linear part, after training; by default Table 2
(rank 5) without label noise. nfa_lab.py says what the setting is and what is not printed of it.

    python examples/papers/nfa_tables.py                           # the paper's setting: days
    python examples/papers/nfa_tables.py --shorter 20
    python examples/papers/nfa_tables.py --shorter 20 --stored 1   # of it, what is there
    python examples/papers/nfa_tables.py --rank 20 --noise 1       # the other tables
    python examples/papers/nfa_tables.py --fast
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfa_lab import (
    OPTIMIZERS,
    SHORTER,
    Network,
    all_seeds,
    cosine,
    decays,
    depths,
    found,
    printed,
    setting,
)
from paper_lab import COLORS, LINES, Experiment, Results, axes


def main(argv: Sequence[str] | None = None) -> Results:
    """Run one table at one level of noise."""
    run = Experiment(
        __file__, __doc__, argv, seeds=1, rank=(5, 2, 20), noise=(0, 1), shorter=SHORTER,
        plain=(0, 1), stored=(0, 1),
    )  # fmt: skip
    options = run.options
    number = {2: 1, 5: 2, 20: 3}[options.rank]
    reading = ", standard normal A" if options.plain else ""
    run.results.name += f"_rank{options.rank}" + "_noise" * options.noise + "_plain" * options.plain
    run.results.title = (
        f"NFA paper on deep networks, Table {number}: rank {options.rank}, σ = {options.noise}"
        + reading
    )
    paper = printed(options.rank, options.noise)
    figure, grid = axes(1, len(depths(run)), width=2.3)
    for column, depth in enumerate(depths(run)):
        axis = grid[0, column]
        for optimizer, color, line in zip(OPTIMIZERS, COLORS, LINES, strict=False):
            runs = all_seeds(optimizer, depth, run, options.noise)
            if not runs:
                continue
            means = []
            for decay in decays(run):
                network = Network(decay, False, options.noise)
                values = [cosine(one, network) for one in runs]
                levels = [found(one, network).get("chance", math.nan) for one in runs]
                means.append(sum(values) / len(values))
                run.row(
                    f"{optimizer}, L = {depth}, λ = {decay:.0e}{setting(runs[0])}",
                    paper[optimizer, depth, decay],
                    values,
                    f"chance {levels[0]:.2f}",
                )
            axis.plot(decays(run), means, color=color, linestyle=line, label=optimizer, marker=".")
            theirs = [float(paper[optimizer, depth, decay]) for decay in decays(run)]
            axis.plot(decays(run), theirs, "o", mfc="none", color=color, markersize=5)
        axis.set(title=f"L = {depth}", xscale="log", xlabel="weight decay λ", ylim=(0.8, 1.005))
    grid[0, 0].set_ylabel("cosine (circles: printed)")
    grid[0, 0].legend(loc="lower right")
    return run.finish(figure)


if __name__ == "__main__":
    main()
