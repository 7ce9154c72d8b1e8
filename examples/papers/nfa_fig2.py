"""NFA paper on deep networks, Fig. 2: alignment by power, balanced and unbalanced (SGD).

Cosine of W_1ᵀW_1 with A^α after training by SGD, over α̃ = Lα, for L = 2 to 5 and four weight
decays. The paper prints curves and no numbers: that they peak at α̃ = 1 in balanced chains whatever
λ, and in unbalanced ones where λ is large. Eq. B.2's factor is taken as printed.

    python examples/papers/nfa_fig2.py --shorter 10
    python examples/papers/nfa_fig2.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from nfa_lab import (
    SCALED_POWERS,
    SHORTER,
    Network,
    Run,
    all_seeds,
    cosine,
    decays,
    depths,
    found,
    group,
    stored,
)
from paper_lab import COLORS, LINES, Experiment, Results, axes

AT_ONE, BEST = "cosine at α̃ = 1", "best α̃"
NOTE = (
    "Theory has balanced chains at 1 under gradient flow. What is left at L = 4 and 5 is the size "
    "of the steps, as the last rows show, where the same chain is shortened less."
)


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all depths."""
    run = Experiment(__file__, __doc__, argv, seeds=1, shorter=SHORTER, plain=(0, 1), stored=(0, 1))
    run.results.name += "_plain" * run.options.plain
    runs = {depth: all_seeds("sgd", depth, run) for depth in depths(run)}
    runs = {depth: found for depth, found in runs.items() if found}
    run.results.columns = [*(f"L = {depth}" for depth in runs), AT_ONE, BEST]
    times = sorted({one["settings"]["shorter"] for same in runs.values() for one in same})
    how = "" if times == [1] else f" ({' to '.join(map(str, times))}x shorter)"
    run.results.title += how
    run.results.note = NOTE
    figure, grid = axes(2, len(decays(run)), width=2.2, height=2.0)
    for row, balanced in enumerate((True, False)):
        name = "balanced" if balanced else "unbalanced"
        for column, decay in enumerate(decays(run)):
            network = Network(decay, balanced)
            what = f"{name}, λ = {decay:.0e}"
            peak = "1" if balanced or decay == max(decays(run)) else ""
            for depth, same in runs.items():
                cosines = [cosine(one, network) for one in same]
                run.row(f"{what}, cosine at α̃ = 1: L = {depth}", "", cosines)
            for depth, same in runs.items():
                best = [_best(one, network) for one in same]
                run.row(f"{what}, best α̃ tried: L = {depth}", peak, best)
            axis = grid[row, column]
            for depth, color, line in zip(runs, COLORS, LINES, strict=False):
                curves = [found(one, network)["cosines"] for one in runs[depth]]
                mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                axis.plot(SCALED_POWERS, mean, color=color, linestyle=line, label=f"L = {depth}")
            axis.axvline(1, color="0.5", linewidth=0.8)
            axis.set(title=f"{name}, λ = {decay:.0e}", ylim=(0.75, 1.01))
            if row:
                axis.set_xlabel("α̃ = Lα")
        grid[row, 0].set_ylabel("cosine")
    grid[1, 0].legend()
    if not run.fast:
        _by_rate(run)
    return run.finish(figure)


def _by_rate(run: Experiment) -> None:
    """L = 5, balanced, by how much was shortened: those that are there."""
    spent = run.spent  # the least shortened has been counted
    for times in (10, 5, 2, 1):
        before = group("sgd", 5, 0, run, shorter=times)
        if (one := stored(run, before.name, asdict(before))) is not None:
            for decay in decays(run):
                network = Network(decay, balanced=True)
                what = f"balanced, λ = {decay:.0e}, L = 5 shortened {times}x"
                run.row(f"{what}: {AT_ONE}", "", [cosine(one, network)])
                run.row(f"{what}: {BEST}", "1", [_best(one, network)])
    run.spent = spent


def _best(run: Run, network: Network) -> float:
    """Of the scaled powers tried, the one with the highest cosine."""
    cosines = found(run, network)["cosines"]
    return max(zip(cosines, SCALED_POWERS, strict=True))[1]


if __name__ == "__main__":
    main()
