"""FACT paper, Fig. 3 and 4: FACT-RFM and NFA-RFM find the coordinates of a sparse parity.

x ~ {±1/√50}^50, y = 1 where the product of k coordinates is positive, else 0; Gaussian kernel of
bandwidth 5, FACT with geometric averaging, 5 iterations (§4.3). The power s of NFA-RFM and the
ridge are not printed: s = 1 and 1/2 are run, and ``--ridge r`` has λ = 10⁻ʳ. M = WᵀW starts at the
identity, where k of its 50 diagonal entries belong to the parity.

    python examples/papers/rfm_parity.py                    # k = 2, n = 500
    python examples/papers/rfm_parity.py --k 3 --points 5000 --ridge 6
    python examples/papers/rfm_parity.py --k 4 --points 25000 --iterations 10    # Fig. 4
    python examples/papers/rfm_parity.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from paper_lab import COLORS, LINES, Experiment, Results, axes
from torch import Tensor

from feature_probe.rfm import Iteration, RecursiveFeatureMachine

INPUTS, BANDWIDTH, TEST = 50, 5.0, 1000
METHODS: dict[str, dict[str, Any]] = {
    "FACT-RFM": {"update": "fact", "geometric_averaging": True},
    "NFA-RFM, s = 1": {"update": "nfa"},
    "NFA-RFM, s = 1/2": {"update": "nfa", "power": 0.5},
    "kernel regression": {"update": "none"},
}


def data(points: int, support: Tensor, seed: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, d]`` and labels 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2, (points, inputs), generator=draw).double().mul_(2).sub_(1)
    y = (x[:, support].prod(1) > 0).double()
    return x / inputs**0.5, y


def train(
    method: str, k: int, points: int, iterations: int, seed: int, inputs: int, ridge: float
) -> list[dict[str, Any]]:
    """By iteration: test accuracy, the support's share of tr M, and the feature matrix."""
    draw = torch.Generator().manual_seed(1000 + seed)
    support = torch.randperm(inputs, generator=draw)[:k].sort().values
    x, y = data(points, support, seed, inputs)
    test_x, test_y = data(TEST, support, 5000 + seed, inputs)
    found: list[dict[str, Any]] = []

    def read(iteration: Iteration) -> None:
        predicted = iteration.machine(test_x.to(iteration.machine.x.dtype))[:, 0] > 0.5
        features = iteration.machine.features
        diagonal = features.matrix.diagonal()
        found.append(
            {
                "accuracy": float((predicted == (test_y > 0.5)).double().mean()),
                "share": float(diagonal[support].sum() / diagonal.sum()),
                "support": support,
                "matrix": features.matrix,
            }
        )

    settings = METHODS[method]
    last = 0 if settings["update"] == "none" else iterations
    RecursiveFeatureMachine(
        kernel="gaussian", bandwidth=BANDWIDTH, ridge=ridge, iterations=last, callbacks=[read],
        dtype="float32" if points > 5000 else "float64", memory=8.0, **settings,
    ).fit(x, y)  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all methods on one parity."""
    run = Experiment(
        __file__,
        __doc__,
        argv,
        seeds=3,
        k=(2, 3, 4, 1),
        points=(500,),
        iterations=(5,),
        ridge=(10,),
    )
    options = run.options
    k, points, iterations = options.k, options.points, options.iterations
    inputs = INPUTS
    if run.fast:
        points, inputs = 200, 20
    run.results.name = f"rfm_parity_k{k}_n{points}_ridge{options.ridge}"
    number = "4" if (k, points) == (4, 25000) else "3"
    run.results.title = (
        f"FACT paper, Fig. {number}: parity of k = {k} of {inputs}, n = {points:,}, "
        f"λ = 1e-{options.ridge}"
    )
    found = {
        method: [
            train(method, k, points, iterations, seed, inputs, 10.0**-options.ridge)
            for seed in run.seeds
        ]
        for method in METHODS
    }
    learned = {"3": "learned", "4": "a jump"}[number]
    for method, runs in found.items():
        paper = "" if method == "kernel regression" else learned
        best = [max(step["accuracy"] for step in steps) for steps in runs]
        run.row(f"{method}: test accuracy of the best iteration", paper, best)
        run.row(f"{method}: test accuracy of the last iteration", "", _last(runs, "accuracy"))
        run.row(f"{method}: share of tr M on the parity's coordinates", "", _last(runs, "share"))
    run.row("cosine of M of FACT-RFM and of NFA-RFM, s = 1", "", _alike(found))
    shown = [method for method in METHODS if method != "kernel regression"]
    figure, grid = axes(1, 1 + len(shown), width=2.3, height=2.2)
    for (method, runs), color, line in zip(found.items(), COLORS, LINES, strict=False):
        accuracy = [step["accuracy"] for step in runs[0]]
        if len(accuracy) == 1:
            grid[0, 0].axhline(accuracy[0], color=color, linestyle=line, label=method)
        else:
            grid[0, 0].plot(accuracy, color=color, linestyle=line, marker=".", label=method)
    grid[0, 0].set(title=f"k = {k}, n = {points:,}", xlabel="iteration", ylabel="test accuracy")
    grid[0, 0].legend(fontsize=6)
    for axis, method in zip(grid[0, 1:], shown, strict=True):
        matrix = found[method][0][-1]["matrix"]
        axis.imshow((matrix / matrix.abs().max()).numpy(), cmap="cividis", interpolation="nearest")
        axis.set(title=f"M, {method}")
        axis.set_xticks(found[method][0][-1]["support"].tolist())
        axis.set_yticks(found[method][0][-1]["support"].tolist())
        axis.grid(visible=False)
    return run.finish(figure)


def _last(runs: Sequence[list[dict[str, Any]]], name: str) -> list[float]:
    return [steps[-1][name] for steps in runs]


def _alike(found: dict[str, list[list[dict[str, Any]]]]) -> list[float]:
    """The cosine of two methods' feature matrices, by seed."""
    pairs = zip(found["FACT-RFM"], found["NFA-RFM, s = 1"], strict=True)
    matrices = [(ours[-1]["matrix"], theirs[-1]["matrix"]) for ours, theirs in pairs]
    return [float((a * b).sum() / a.norm() / b.norm()) for a, b in matrices]


if __name__ == "__main__":
    main()
