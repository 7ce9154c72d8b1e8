"""C-NFA paper, Fig. 5: the PTK-centred NFA, W₀ᵀW₀ against W₀ᵀK̄W₀, decreases through training.

The network of Fig. 2 (centered_training.py), (a) isotropic inputs, (b) a random eigenbasis with
eigenvalues 1/(1 + k²). The paper names no initial scale.

    python examples/papers/centered_fig5.py            # 2 seeds
    python examples/papers/centered_fig5.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence

from centered_training import LAYERS, SCALES, draw, last, read_at, train
from paper_lab import Experiment, Results, axes

PTK = "ptk_centered_nfa"
SPECTRA = {0: "isotropic", 2: "1/(1 + k²)"}
FIRST = 5


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all seeds, spectra and scales."""
    run = Experiment(__file__, __doc__, argv, seeds=2)
    names = ("s = 0.3", "s = 0.1", "s = 0.01")
    figure, grid = axes(2, 2)
    for column, (decay, spectrum) in enumerate(SPECTRA.items()):
        found = {
            name: [
                train(seed, SCALES[name], (PTK,), decay=decay, fast=run.fast) for seed in run.seeds
            ]
            for name in (names[::2] if run.fast else names)
        }
        for i, layer in enumerate(LAYERS):
            for name, runs in found.items():
                begin = f"layer {i + 1}, {spectrum}, {name}"
                start = 20 if run.fast else FIRST
                run.row(f"{begin}: at time {start}", "", read_at(start, runs, layer, PTK))
                run.row(f"{begin}: at the end", "lower", last(runs, layer, PTK))
            draw(grid[i, column], found, layer, PTK)
            grid[i, column].set(title=f"layer {i + 1}, {spectrum}", ylim=(0, 1.02))
            grid[i, 0].set_ylabel("PTK-centred NFA, cosine")
        grid[1, column].set_xlabel("time, in steps of 0.05")
    grid[0, 1].legend()
    return run.finish(figure)


if __name__ == "__main__":
    main()
