"""NFA paper on deep networks, Table 2: what a shorter run at a larger learning rate changes.

SGD with momentum and Adam, λ = 1e-5, rank 5: 2,000 epochs at the printed learning rate, and 5 and
20 times fewer at as many times the rate. At that λ SGD's decay does next to nothing in all 60,000
epochs (2Σηλ/(1 − μ) = 0.04), so that its cosine is settled once the target is fitted. What differs
between the rows of an optimizer and depth is the rate alone.

The last rows are of whole trainings by Adam, all but the first and last 2,000 epochs 20 and 5 times
shortened: Adam divides by the size of the gradients, the noise of batches in it, which grows with
the rate; so the larger the rate, the less its coupled decay does.

    python examples/papers/nfa_rates.py
    python examples/papers/nfa_rates.py --fast
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfa_lab import DECAYS, DEPTHS, ENDS, Group, Network, cosine, printed, train
from paper_lab import COLORS, LINES, Experiment, Results, axes

NETWORK = Network(1e-5)
OPTIMIZERS = {"sgdm": ("SGD with momentum", DEPTHS), "adam": ("Adam", (2, 5))}
TIMES = (1, 5, 20)
WHY = {
    "sgdm": "the larger rate, the one thing changed",
    "adam": "not the rate of the first 2,000 epochs: it is as far off at the printed one",
}


def main(argv: Sequence[str] | None = None) -> Results:
    """Run both optimizers at all rates."""
    run = Experiment(__file__, __doc__, argv, seeds=1)
    figure, grid = axes(1, len(OPTIMIZERS), width=3.0)
    for axis, (optimizer, (title, depths)) in zip(grid[0], OPTIMIZERS.items(), strict=True):
        depths = depths[:1] if run.fast else depths
        printed_cells = [printed(5, 0)[optimizer, depth, NETWORK.decay] for depth in depths]
        for shorter, color, line in zip(TIMES, COLORS, LINES, strict=False):
            if run.fast and shorter == 1:
                continue
            rate = "the printed rate" if shorter == 1 else f"{shorter} times the rate"
            means = []
            for depth, paper in zip(depths, printed_cells, strict=True):
                values = _cosines(run, optimizer, depth, shorter)
                what = f"{title}, L = {depth}, {rate}"
                finite = [value for value in values if not math.isnan(value)]
                why = "" if shorter == 1 and optimizer == "sgdm" else WHY[optimizer]
                if len(finite) < len(values):
                    diverged = [float(math.isnan(value)) for value in values]
                    run.row(f"{what}: training diverged", "no", diverged, why)
                if finite:
                    run.row(f"{what}: cosine", paper, finite, why)
                means.append(sum(finite) / len(finite) if finite else math.nan)
            axis.plot(depths, means, color=color, linestyle=line, marker=".", label=rate)
        circles = [float(cell) for cell in printed_cells]
        axis.plot(depths, circles, "ko", mfc="none", label="printed cosine")
        axis.set(xlabel="linear layers L", xticks=depths, title=title, ylim=(0.78, 1.01))
    grid[0, 0].set_ylabel("cosine, λ = 1e-5")
    if not run.fast:
        _whole(run)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return run.finish(figure)


def _whole(run: Experiment) -> None:
    """Adam's cosines after all epochs, by how much of them was shortened."""
    networks = tuple(Network(decay) for decay in DECAYS)
    for shorter in (20, 5):
        groups = [Group("adam", 2, networks, 5, seed, shorter, ENDS) for seed in run.seeds]
        found = [train(group, run) for group in groups]
        for network in networks[:2]:
            run.row(
                f"Adam, L = 2, λ = {network.decay:.0e}, all epochs, {shorter}x shorter: cosine",
                printed(5, 0)["adam", 2, network.decay],
                [cosine(one, network) for one in found],
                "the larger rate, the one thing changed" if shorter == 20 else "",
            )


def _cosines(run: Experiment, optimizer: str, depth: int, shorter: int) -> list[float]:
    """Of all seeds' networks after the first epochs."""
    epochs = 400 if run.fast else 2000
    groups = [
        Group(optimizer, depth, (NETWORK,), 5, seed, shorter, epochs=epochs, last=20)
        for seed in run.seeds
    ]
    return [cosine(train(group, run), NETWORK) for group in groups]


if __name__ == "__main__":
    main()
