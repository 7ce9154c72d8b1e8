"""NFA paper on deep networks, Fig. 4: the spectrum of W_1ᵀW_1 in ReLU networks.

ReLU networks with biases, 2 to 5 layers of width 64 and an output layer, N = 2,048 and 8,192,
SGD with momentum, λ = 1e-3; target of rank 5 (nfa_lab.py). Singular values of W_1ᵀW_1 over the
first, beside those of the target's AGOP over the data. The paper prints curves and no numbers:
both fall after the fifth, W_1ᵀW_1's farther with more data.

    python examples/papers/nfa_fig4.py --shorter 40
    python examples/papers/nfa_fig4.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from network_stack import Architecture, NetworkStack
from nfa_lab import (
    BATCH,
    EPOCHS,
    INPUTS,
    LAST,
    OPTIMIZERS,
    SHORTER,
    WIDTH,
    data,
    depths,
    kept,
    target,
)
from paper_lab import COLORS, LINES, Experiment, Results, axes
from torch import Tensor
from torch.nn import functional as F

from feature_probe import measure

DECAY, RANK = 1e-3, 5


def spectrum(matrix: Tensor) -> list[float]:
    """Singular values over the largest."""
    values = torch.linalg.svdvals(matrix.double())
    return [float(value) for value in values / values[0]]


def target_agop(x: Tensor, seed: int, plain: bool) -> Tensor:
    """Mean over x of ∇f*∇f*ᵀ, ``[d, d]``: ∇f* = Aᵀ(a ⊙ 1[Ax + b > 0])."""
    matrix, heads, biases = target(RANK, seed, plain)
    gradients = ((x @ matrix.T + biases > 0) * heads) @ matrix
    return gradients.T @ gradients / len(x)


def train(depth: int, points: int, seed: int, run: Experiment) -> dict[str, Any]:
    """One network's spectrum after training."""
    shorter: int = 100 if run.fast else run.options.shorter
    plain = run.fast or bool(run.options.plain)
    epochs = max(1, (30_000 if run.fast else EPOCHS) // shorter)
    last = max(1, LAST // shorter)
    settings = {
        "depth": depth, "points": points, "seed": seed, "epochs": epochs, "last": last,
        "shorter": shorter, "plain": plain,
    }  # fmt: skip
    name = f"relu_L{depth}_N{points}_seed{seed}_k{shorter}" + "_plain" * plain

    def found() -> list[dict[str, Any]]:
        architecture = Architecture(INPUTS, WIDTH, chain=1, tail=depth)
        x, y = data(RANK, points, seed, plain)
        stack = NetworkStack([architecture.build(seed)], architecture, [DECAY], OPTIMIZERS["sgdm"])
        rate = OPTIMIZERS["sgdm"].rate * shorter
        draw = torch.Generator().manual_seed(2000 + seed)
        for epoch in range(1, epochs + last + 1):
            order = torch.randperm(points, generator=draw)
            for chosen in order.split(BATCH):
                stack.step(x[chosen], y[None, chosen], rate if epoch <= epochs else rate / 10)
        with torch.inference_mode(mode=False):
            network = stack.network(0)
            inputs = x.clone()
            report = measure(
                network, list(inputs.split(1024)), relations=("nfa",), include="0.0",
                progress=False,
            )  # fmt: skip
            with torch.no_grad():
                loss = F.mse_loss(network(inputs).squeeze(1), y.clone()).item()
            nfm = spectrum(report.matrix("0.0", "nfm"))
            agop = spectrum(report.matrix("0.0", "nfa", 1.0))
        return [
            {
                "loss": loss,
                "nfm": nfm,
                "agop": agop,
                "target": spectrum(target_agop(x, seed, plain)),
            }
        ]

    return dict(kept(run, name, settings, found)["snapshots"][0])


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all depths at both sizes of the data."""
    run = Experiment(__file__, __doc__, argv, seeds=1, shorter=SHORTER, plain=(0, 1))
    run.results.name += "_plain" * run.options.plain
    reading = ", standard normal A" if run.options.plain else ""
    run.results.title += reading
    sizes = (128, 256) if run.fast else (2048, 8192)
    shorter = run.options.shorter
    setting = f" ({shorter}x shorter)" if shorter > 1 else ""
    figure, grid = axes(1, len(sizes), width=3.2)
    for axis, points in zip(grid[0], sizes, strict=True):
        for depth, color, line in zip(depths(run), COLORS, LINES, strict=False):
            found = [train(depth, points, seed, run) for seed in run.seeds]
            ratio = [one["nfm"][RANK] / one["nfm"][RANK - 1] for one in found]
            what = f"N = {points}, L = {depth}{setting}: W_1ᵀW_1, "
            run.row(what + "σ_6/σ_5", "", ratio)
            run.row(what + "σ_6/σ_1", "", [one["nfm"][RANK] for one in found])
            numbers = range(1, INPUTS + 1)
            axis.plot(numbers, found[0]["nfm"], color=color, linestyle=line, label=f"L = {depth}")
        axis.plot(numbers, found[0]["target"], "k.", markersize=4, label="AGOP of the target")
        axis.axvline(RANK, color="0.5", linewidth=0.8)
        axis.set(title=f"N = {points}", yscale="log", ylim=(1e-6, 2), xlabel="number")
        axis.set_xticks((1, 5, 10, 15, 20))
    grid[0, 0].set_ylabel("singular value over the first")
    grid[0, -1].legend()
    return run.finish(figure)


if __name__ == "__main__":
    main()
