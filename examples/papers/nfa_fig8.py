"""NFA paper on deep networks, Fig. 8: alignment over training on MNIST, by weight decay.

Linear layers 784-64-...-64, one ReLU, ten classes, cross-entropy; Adam and SGD with momentum at
learning rate 1e-4, batches of 64, 200 epochs. Width and architecture of its MNIST networks are not
printed: those of its other experiments are used. It prints curves and two numbers, the training
accuracies; and that Adam aligns sooner than SGD with momentum, at a pace that depends on λ.

    python examples/papers/nfa_fig8.py --data ROOT --shorter 20    # ROOT/MNIST/raw, 60,000 images
    python examples/papers/nfa_fig8.py --fast                      # the 5,000 that ship

``--shorter k``: k times fewer epochs at k times the learning rate, as in nfa_lab.py. Without
``--data`` the images that ship are the data set, and the rows say so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from mnist import load_mnist
from network_stack import Architecture, NetworkStack
from nfa_lab import BATCH, OPTIMIZERS, SHORTER, WIDTH, decays, depths, kept, linear_cosines
from paper_lab import COLORS, LINES, Experiment, Results, axes
from torch import Tensor

EPOCHS = 200
ACCURACY = {"adam": "≥ 0.97", "sgdm": "≥ 0.95"}
TITLES = {"adam": "Adam", "sgdm": "SGD with momentum"}


def train(
    optimizer: str, depth: int, seed: int, x: Tensor, y: Tensor, run: Experiment
) -> list[dict[str, Any]]:
    """Networks of all λ: epochs, cosines at α = 1/L and accuracies over training."""
    shorter: int = 100 if run.fast else run.options.shorter
    epochs = 2 if run.fast else max(1, EPOCHS // shorter)
    settings = {
        "optimizer": optimizer, "depth": depth, "seed": seed, "images": len(x), "epochs": epochs,
        "shorter": shorter,
    }  # fmt: skip
    name = f"mnist_{optimizer}_L{depth}_n{len(x)}_seed{seed}_k{shorter}" + "_fast" * run.fast

    def found() -> list[dict[str, Any]]:
        architecture = Architecture(x.shape[1], WIDTH, depth, outputs=10)
        stack = NetworkStack(
            [architecture.build(seed) for _ in decays(run)], architecture, decays(run),
            OPTIMIZERS[optimizer],
        )  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        snapshots = [] if run.fast else [_snapshot(stack, depth, x, y, 0)]
        for epoch in range(1, epochs + 1):
            for chosen in torch.randperm(len(x), generator=draw).split(BATCH):
                stack.step(x[chosen], y[chosen], OPTIMIZERS[optimizer].rate * shorter)
            if epoch % max(1, epochs // (1 if run.fast else 5)) == 0:
                snapshots.append(_snapshot(stack, depth, x, y, epoch * shorter))
        return snapshots

    return list(kept(run, name, settings, found)["snapshots"])


def _snapshot(stack: NetworkStack, depth: int, x: Tensor, y: Tensor, epoch: int) -> dict[str, Any]:
    numbers = []
    for index in range(stack.count):
        with torch.inference_mode(mode=False):
            network = stack.network(index)
            with torch.no_grad():
                right = float((network(x.clone()).argmax(1) == y.clone()).float().mean())
            numbers.append({"accuracy": right, **linear_cosines(network[0], depth, (1.0,))})
    return {"epoch": epoch, "networks": numbers}


def main(argv: Sequence[str] | None = None) -> Results:
    """Run both optimizers at all depths."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    root = None
    if "--data" in arguments:
        place = arguments.index("--data")
        root = arguments[place + 1]
        del arguments[place : place + 2]
    run = Experiment(__file__, __doc__, arguments, seeds=1, shorter=SHORTER)
    images, y, _, _ = load_mnist(root)
    x = images.flatten(1)
    if run.fast:
        x, y = x[:320], y[:320]
    shorter = run.options.shorter
    setting = f" ({shorter}x shorter)" * (shorter > 1) + f" (n = {len(x)})" * (len(x) != 60_000)
    figure, grid = axes(len(TITLES), len(decays(run)), width=2.2, height=2.0)
    for row, (optimizer, title) in enumerate(TITLES.items()):
        by_depth = {d: [train(optimizer, d, s, x, y, run) for s in run.seeds] for d in depths(run)}
        for column, decay in enumerate(decays(run)):
            axis = grid[row, column]
            for depth, color, line in zip(depths(run), COLORS, LINES, strict=False):
                curves = [
                    [(s["epoch"], s["networks"][column]["cosine"]) for s in snapshots]
                    for snapshots in by_depth[depth]
                ]
                run.row(
                    f"{title}, L = {depth}, λ = {decay:.0e}{setting}: cosine at the end", "",
                    [curve[-1][1] for curve in curves],
                    f"chance {by_depth[depth][0][-1]['networks'][column]['chance']:.2f}",
                )  # fmt: skip
                epochs = [epoch for epoch, _ in curves[0]]
                mean = [sum(c[i][1] for c in curves) / len(curves) for i in range(len(epochs))]
                axis.plot(epochs, mean, color=color, linestyle=line, label=f"L = {depth}")
            axis.set(title=f"{optimizer}, λ = {decay:.0e}", ylim=(0.75, 1.01))
            if row:
                axis.set_xlabel("epochs")
        grid[row, 0].set_ylabel("cosine")
        lowest = [
            min(n["accuracy"] for d in depths(run) for n in by_depth[d][i][-1]["networks"])
            for i in range(len(run.seeds))
        ]
        what = f"{title}{setting}: lowest training accuracy, all L and λ"
        why = "open: fewer images are fewer steps an epoch" if len(x) < 60_000 else ""
        run.row(what, ACCURACY[optimizer], lowest, why)
    grid[0, 0].legend(loc="lower right")
    return run.finish(figure)


if __name__ == "__main__":
    main()
