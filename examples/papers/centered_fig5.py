"""C-NFA paper, Fig. 5: the PTK-centred NFA, W₀ᵀW₀ against W₀ᵀK̄W₀, decreases through training.

The network of Fig. 2 (centered_training.py), (a) isotropic inputs, (b) a random eigenbasis with
eigenvalues 1/(1 + k²). The paper names no initial scale. Beside it the score with the covariance of
J − J⁰ in the place of K̄, its second moment.

    python examples/papers/centered_fig5.py            # 2 seeds
    python examples/papers/centered_fig5.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from centered_training import LAYERS, SCALES, OfMean, draw, last, lowest, read_at, train
from paper_lab import Experiment, Results, axes

from feature_probe import Report

PTK, SPREAD = "ptk_centered_nfa", "ptk_centered_nfa, covariance"
SPECTRA = {0: "isotropic", 2: "1/(1 + k²)"}
_RISES = (
    "falls within the first steps, mostly before the paper's first reading at time 5, and rises "
    "later, though not to where it was, with what the mean of J − J⁰ adds to K̄: with the "
    "covariance in its place (next rows) it falls to its end"
)


def apart(report: Report, layer: str, of_mean: OfMean) -> dict[str, float]:
    """The cosine, and that with Cov(J − J⁰) in the place of K̄; undefined at J = J⁰."""
    gram = report.matrix(layer, "initial_nfm")
    agop = report.matrix(layer, PTK, 1.0)
    spread = agop - torch.outer(of_mean.initial, of_mean.initial)
    return {
        PTK: report.record(layer, PTK, 1.0).cosine,
        SPREAD: ((gram * spread).sum() / gram.norm() / spread.norm()).item(),
    }


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all seeds, spectra and scales."""
    run = Experiment(__file__, __doc__, argv, seeds=2)
    first = 20 if run.fast else 1  # in the small network J hardly changes in one step
    names = ("s = 0.3", "s = 0.1", "s = 0.01")
    figure, grid = axes(2, 4, width=2.4)
    for column, (decay, spectrum) in enumerate(SPECTRA.items()):
        found = {
            name: [
                train(
                    seed, SCALES[name], (PTK,), decay=decay, fast=run.fast, read=apart, also=(1, 2)
                )
                for seed in run.seeds
            ]
            for name in (names[::2] if run.fast else names)
        }
        for i, layer in enumerate(LAYERS):
            for name, runs in found.items():
                begin = f"layer {i + 1}, {spectrum}, {name}"
                why = _RISES if (i, decay, name, run.fast) == (0, 0, "s = 0.3", False) else ""
                run.row(f"{begin}: at time {first}", "", read_at(first, runs, layer, PTK))
                run.row(f"{begin}: lowest", "", lowest({name: runs}, layer, PTK))
                run.row(f"{begin}: at the end", "lower", last(runs, layer, PTK), why)
                if i == 0:
                    begin = f"{begin}, with Cov(J − J⁰)"
                    run.row(f"{begin}: at time {first}", "", read_at(first, runs, layer, SPREAD))
                    run.row(f"{begin}: at the end", "lower", last(runs, layer, SPREAD))
            for j, (curve, title) in enumerate({PTK: "K̄", SPREAD: "Cov(J − J⁰)"}.items()):
                axis = grid[i, 2 * column + j]
                draw(axis, found, layer, curve)
                axis.set(title=f"layer {i + 1}, {spectrum}\n{title}", ylim=(0, 1.02))
    for axis in grid[1]:
        axis.set_xlabel("time, in steps of 0.05")
    for axis in grid[:, 0]:
        axis.set_ylabel("PTK-centred NFA, cosine")
    grid[1, 2].legend()
    return run.finish(figure)


if __name__ == "__main__":
    main()
