"""FACT paper, Fig. 3 and 4: FACT-RFM and NFA-RFM find the coordinates of a sparse parity.

x ~ {±1/√50}^50, y = 1 where the product of k coordinates is positive, else 0; Gaussian kernel of
bandwidth 5, FACT with geometric averaging, 5 iterations (§4.3). The power s of NFA-RFM and the
ridge are not printed: s = 1 and 1/2 are run, and ``--ridge r`` has λ = 10⁻ʳ. M = WᵀW starts at the
identity, where k of its 50 diagonal entries belong to the parity. ``--signs 1`` reads the inputs as
±1: the bandwidth then is 7 times smaller beside the points' distances. Fig. 4 is of FACT-RFM alone;
K in float64 takes 5 GB there (20 GB at n = 50,000: with ±1/√d float32 rounds the parity away).

    python examples/papers/rfm_parity.py                    # k = 2, n = 500
    python examples/papers/rfm_parity.py --k 3 --points 5000 --ridge 7
    python examples/papers/rfm_parity.py --k 4 --points 25000 --ridge 7 --iterations 12   # Fig. 4
    python examples/papers/rfm_parity.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from paper_lab import COLORS, LINES, Experiment, Results, axes
from torch import Tensor

from feature_probe.rfm import Iteration, RecursiveFeatureMachine

INPUTS, BANDWIDTH, TEST = 50, 5.0, 1000
SIMILAR = ("FACT-RFM", "NFA-RFM, s = 1")
ALIKE = f"cosine of √(FACT·Mᵀ) of {SIMILAR[0]} and √AGOP of {SIMILAR[1]}"
METHODS: dict[str, dict[str, Any]] = {
    "FACT-RFM": {"update": "fact", "geometric_averaging": True},
    "NFA-RFM, s = 1": {"update": "nfa"},
    "NFA-RFM, s = 1/2": {"update": "nfa", "power": 0.5},
    "kernel regression": {"update": "none"},
}


@dataclass(frozen=True)
class Setting:
    """What a run depends on, but for method and seed: the options' values.

    Attributes:
        k: Coordinates of the parity.
        points: n.
        inputs: d.
        iterations: T.
        ridge: λ.
        signs: Whether inputs are ±1, not ±1/√d.
    """

    k: int
    points: int
    inputs: int
    iterations: int
    ridge: float
    signs: bool


def data(setting: Setting, points: int, support: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, d]`` and labels 0 or 1."""
    inputs = setting.inputs
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2, (points, inputs), generator=draw).double().mul_(2).sub_(1)
    y = (x[:, support].prod(1) > 0).double()
    return x if setting.signs else x / inputs**0.5, y


def train(method: str, setting: Setting, seed: int) -> list[dict[str, Any]]:
    """By iteration: test accuracy, the support's share of tr M, and √AGOP or √(FACT·Mᵀ)."""
    draw = torch.Generator().manual_seed(1000 + seed)
    support = torch.randperm(setting.inputs, generator=draw)[: setting.k].sort().values
    x, y = data(setting, setting.points, support, seed)
    test_x, test_y = data(setting, TEST, support, 5000 + seed)
    # with ±1/√d what belongs to products of four inputs is below the rounding of float32
    single = setting.signs and setting.points > 10_000
    options = METHODS[method]
    found: list[dict[str, Any]] = []

    def read(iteration: Iteration) -> None:
        predicted = iteration.machine(test_x.to(iteration.machine.x.dtype))[:, 0] > 0.5
        features = iteration.machine.features
        diagonal = features.matrix.diagonal()
        rule = options["update"]
        found.append(
            {
                "accuracy": float((predicted == (test_y > 0.5)).double().mean()),
                "share": float(diagonal[support].sum() / diagonal.sum()),
                "support": support,
                "matrix": None if rule == "none" else root(iteration, rule),
            }
        )
        print(method, iteration.number, f"{found[-1]['accuracy']:.3f} {found[-1]['share']:.3f}")

    last = 0 if options["update"] == "none" else setting.iterations
    RecursiveFeatureMachine(
        kernel="gaussian", bandwidth=BANDWIDTH, ridge=setting.ridge, iterations=last,
        callbacks=[read], dtype="float32" if single else "float64", memory=8.0,
        history=options["update"] != "none", **options,
    ).fit(x, y)  # fmt: skip
    return found


def root(iteration: Iteration, rule: str) -> Tensor:
    """√AGOP or √(FACT·Mᵀ), which the paper shows; of what is not symmetric (A·Aᵀ)^{1/4}."""
    if rule == "nfa":
        found = iteration.agop.double()
    else:
        found = (iteration.fact @ iteration.machine.features.matrix.T).double()
    left, values, _ = torch.linalg.svd(found)
    return (left * values.sqrt()) @ left.T


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
        signs=(0, 1),
    )
    options = run.options
    points, inputs = (200, 20) if run.fast else (options.points, INPUTS)
    k, signs = options.k, bool(options.signs)
    setting = Setting(k, points, inputs, options.iterations, 10.0**-options.ridge, signs)
    run.results.name = f"rfm_parity_k{k}_n{points}_ridge{options.ridge}" + "_signs" * signs
    number = "4" if (k, points) == (4, 25000) else "3"
    run.results.title = (
        f"FACT paper, Fig. {number}: parity of k = {k} of {inputs}, n = {points:,}, "
        f"λ = 1e-{options.ridge}" + ", inputs ±1" * signs
    )
    run.results.note = (
        "The ridge is not printed, and decides which update learns: rfm_parity_ridge.py."
    )
    methods = ["FACT-RFM"] if number == "4" else list(METHODS)
    found = {method: [train(method, setting, seed) for seed in run.seeds] for method in methods}
    learned = {"3": "learned", "4": "a jump"}[number]
    for method, runs in found.items():
        paper = "" if method == "kernel regression" else learned
        best = [max(step["accuracy"] for step in steps) for steps in runs]
        run.row(f"{method}: test accuracy of the best iteration", paper, best)
        run.row(f"{method}: test accuracy of the last iteration", "", _last(runs, "accuracy"))
        run.row(f"{method}: share of tr M on the parity's coordinates", "", _last(runs, "share"))
    if all(name in found for name in SIMILAR):
        signed, unsigned = _alike(found, signed=True), _alike(found, signed=False)
        both = all(steps[-1]["accuracy"] > 0.9 for name in SIMILAR for steps in found[name])
        why = "next row: signs differ off the diagonal" if both else "one of them has not learned"
        run.row(ALIKE, "very similar", signed, why)
        run.row(f"{ALIKE}, of absolute entries", "", unsigned)
    shown = [method for method in methods if method != "kernel regression"]
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
        scaled = (matrix / matrix.abs().max()).numpy()
        axis.imshow(scaled, cmap="cividis", interpolation="nearest", vmin=-1, vmax=1)
        axis.set(title=f"{method}:\n{'√AGOP' if 'NFA' in method else '√(FACT·Mᵀ)'}")
        axis.set_xticks(found[method][0][-1]["support"].tolist())
        axis.set_yticks(found[method][0][-1]["support"].tolist())
        axis.grid(visible=False)
    return run.finish(figure)


def _last(runs: Sequence[list[dict[str, Any]]], name: str) -> list[float]:
    return [steps[-1][name] for steps in runs]


def _alike(found: dict[str, list[list[dict[str, Any]]]], signed: bool) -> list[float]:
    """The cosine of two methods' matrices, or of their absolute entries, at the end, by seed."""
    pairs = zip(*(found[name] for name in SIMILAR), strict=True)
    matrices = [(ours[-1]["matrix"], theirs[-1]["matrix"]) for ours, theirs in pairs]
    if not signed:
        matrices = [(a.abs(), b.abs()) for a, b in matrices]
    return [float((a * b).sum() / a.norm() / b.norm()) for a, b in matrices]


if __name__ == "__main__":
    main()
