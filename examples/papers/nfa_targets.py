"""NFA paper on deep networks, Tables 1 to 3: which target its numbers belong to.

The scales of f*(x) = aᵀ[Ax + b]₊ are not printed (nfa_lab.py has two readings). At λ = 1e-5 weight
decay does next to nothing in 60,000 epochs, so that the cosine is settled once the target is
fitted: 2,500 epochs of GD with momentum at the printed rate tell the readings apart, by the printed
cosines and by where the paper's training failed (rank 20, L = 5).

    python examples/papers/nfa_targets.py            # 3 targets each, 36 networks
    python examples/papers/nfa_targets.py --fast
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfa_lab import Group, Network, cosine, printed, train
from paper_lab import COLORS, Experiment, Results, axes

READINGS = {"singular values from U(0, 100)": False, "standard normal A": True}
NETWORK = Network(1e-5)


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all ranks, two depths and both readings."""
    run = Experiment(__file__, __doc__, argv, seeds=3)
    ranks, depths = ((5,), (2,)) if run.fast else ((2, 5, 20), (2, 5))
    epochs = 400 if run.fast else 2500
    figure, grid = axes(1, len(depths), width=3.0)
    for axis, depth in zip(grid[0], depths, strict=True):
        for place, rank in enumerate(ranks):
            theirs = printed(rank, 0)["gdm", depth, NETWORK.decay]
            failed = theirs == "nan"
            for (reading, plain), color in zip(READINGS.items(), COLORS, strict=False):
                values = [
                    cosine(
                        train(
                            Group(
                                "gdm", depth, (NETWORK,), rank, seed, plain=plain, epochs=epochs,
                                last=10,
                            ),
                            run,
                        ),
                        NETWORK,
                    )
                    for seed in run.seeds
                ]  # fmt: skip
                what = f"rank {rank}, L = {depth}, {reading}: "
                diverged = [float(math.isnan(value)) for value in values]
                run.row(
                    what + "training diverged", "yes" if failed else "no", diverged, _why(depth)
                )
                finite = [value for value in values if not math.isnan(value)]
                if finite:
                    run.row(what + "cosine", "" if failed else theirs, finite, _why(depth))
                axis.plot(
                    [place + 0.15 * (plain - 0.5)] * len(finite), finite, "o", color=color,
                    mfc="none" if plain else color, markersize=4,
                    label=reading if place == 0 else None,
                )  # fmt: skip
            if not failed:
                axis.plot(place, float(theirs), "k_", markersize=16)
        axis.set(
            title=f"L = {depth} (bars: printed)", xlabel="rank of the target", ylim=(0.78, 1.01)
        )
        axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    grid[0, 0].set_ylabel("cosine, λ = 1e-5")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return run.finish(figure)


def _why(depth: int) -> str:
    """What the rows of one depth say."""
    if depth == 2:
        return "tells the readings apart: the printed 1.00 is not the standard normal A's"
    return "three targets scatter as far as the readings differ; one of rank 20 fails in one only"


if __name__ == "__main__":
    main()
