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
import statistics
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

CHANCE = "by chance"
NOTE = (
    "At λ = 1e-3 and 1e-2 decay has the time to decide, and cells agree with the printed ones (but "
    "for Adam, see the end). At 1e-5 decay does next to nothing in 60,000 epochs "
    "of SGD, and what is found depends on the target (spread over three of them: `nfa_targets.py`; "
    "a spread here is over seeds, each with its own target), about as much as cells "
    "differ from the printed ones, whose target is not known. A larger rate from the first epoch "
    "on lowers them further (`nfa_rates.py`), which is why no run here has one in the first 2,000. "
    "Of Adam's decay a larger rate later on leaves less as well: one target comes the nearer to "
    "the printed cosines the less is shortened (last rows of `nfa_rates.py`)."
)


def main(argv: Sequence[str] | None = None) -> Results:
    """Run one table at one level of noise."""
    run = Experiment(
        __file__, __doc__, argv, seeds=1, rank=(5, 2, 20), noise=(0, 1), shorter=SHORTER,
        plain=(0, 1), biases=(1, 0), stored=(0, 1),
    )  # fmt: skip
    options = run.options
    number = {2: 1, 5: 2, 20: 3}[options.rank]
    reading = ", standard normal A" * options.plain + ", no decay of biases" * (1 - options.biases)
    run.results.name += f"_rank{options.rank}" + "_noise" * options.noise + "_plain" * options.plain
    run.results.name += "_weights" * (1 - options.biases)
    run.results.title = (
        f"NFA paper on deep networks, Table {number}: rank {options.rank}, σ = {options.noise}"
        + reading
    )
    run.results.note = NOTE
    run.results.columns = [*OPTIMIZERS, CHANCE]
    paper = printed(options.rank, options.noise)
    found_runs = {
        depth: {
            optimizer: runs
            for optimizer in OPTIMIZERS
            if (runs := all_seeds(optimizer, depth, run, options.noise))
        }
        for depth in depths(run)
    }
    shown = [depth for depth, by_optimizer in found_runs.items() if by_optimizer]
    figure, grid = axes(1, len(shown), width=2.3)
    for column, depth in enumerate(shown):
        axis = grid[0, column]
        for place, (optimizer, runs) in enumerate(found_runs[depth].items()):
            style = list(OPTIMIZERS).index(optimizer)
            color, line = COLORS[style], LINES[style]
            means = []
            for decay in decays(run):
                network = Network(decay, False, options.noise)
                values = [cosine(one, network) for one in runs]
                means.append(sum(values) / len(values))
            axis.plot(decays(run), means, color=color, linestyle=line, label=optimizer, marker=".")
            circles = [float(paper[optimizer, depth, decay]) for decay in decays(run)]
            aside = [decay * 1.25**place for decay in decays(run)]
            axis.plot(aside, circles, "o", mfc="none", color=color, markersize=5)
        axis.set(title=f"L = {depth}", xscale="log", xlabel="weight decay λ", ylim=(0.8, 1.01))
        for decay in decays(run):
            network = Network(decay, False, options.noise)
            levels: list[float] = []
            for optimizer, runs in found_runs[depth].items():
                values = [cosine(one, network) for one in runs]
                levels += [found(one, network).get("chance") or math.nan for one in runs]
                theirs = paper[optimizer, depth, decay]
                what = f"L = {depth}, λ = {decay:.0e}: {optimizer}"
                how = setting(runs[0]).strip(" ()") if decay == decays(run)[0] else ""
                run.row(what, theirs, values, f"{optimizer} {how}" if how else "")
            what = f"L = {depth}, λ = {decay:.0e}: {CHANCE}"
            finite = [level for level in levels if not math.isnan(level)]
            run.row(what, "", [statistics.fmean(finite) if finite else math.nan])
    grid[0, 0].set_ylabel("cosine (circles: printed)")
    grid[0, 0].legend(loc="lower right")
    return run.finish(figure)


if __name__ == "__main__":
    main()
