"""C-NFA paper, Fig. 2, 7 and 8: NFA and init-centred NFA over training and initial scale.

Chain monomial of rank 5, 256 points in 32 dimensions, two hidden ReLU layers of width 256, no bias,
800 steps of full batches at learning rate 0.05; the first layer's initial variance s/k is varied
(App. H; the paper names no values of s). Fig. 2: isotropic inputs. Fig. 7 and 8: a random
eigenbasis with eigenvalues 1/(1 + k) and 1/(1 + k²). The probe sits in the training loop.

    python examples/papers/centered_fig2.py                # Fig. 2: isotropic, 3 seeds
    python examples/papers/centered_fig2.py --decay 1      # Fig. 7; 2: Fig. 8
    python examples/papers/centered_fig2.py --fast
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from paper_lab import COLORS, LINES, Experiment, Results, axes, chain_monomial, initialise, mlp
from torch.nn import functional as F

from feature_probe import FeatureProbe, Report

#: Initial scale s and learning rate. At s = 1 the printed rate is beyond stability, so that a
#: smaller one, for as much longer, is run as well.
SETTINGS = {
    "s = 1": (1.0, 0.05),
    "s = 1, rate 0.01": (1.0, 0.01),
    "s = 0.3": (0.3, 0.05),
    "s = 0.1": (0.1, 0.05),
    "s = 0.01": (0.01, 0.05),
}
_UNSTABLE = (
    "the loss jumps from 0.96 to 7 at step 3: at s = 1 the rate of 0.05 is beyond stability, and "
    "the jump is in W − W₀; at 0.01 (next row) it does not, and the score stays"
)
LAYERS = ("0", "2")
NAMES = {"nfa": "uncentred", "init_centered_nfa": "init-centred"}
_OPEN = "the paper prints curves, no numbers; why layer 1 dips to a half is not explained yet"
Curves = dict[tuple[str, str], list[tuple[int, float]]]


class Keep:
    """A sink that keeps the cosines."""

    def __init__(self) -> None:
        self.curves: Curves = {}

    def write(self, report: Report) -> None:
        """Keep one report's."""
        for record in report.records:
            key = record.layer, record.relation
            self.curves.setdefault(key, []).append((report.step, record.cosine))

    def close(self) -> None:
        """Nothing."""


def inputs(points: int, decay: int) -> torch.Tensor:
    """Gaussian, isotropic or with eigenvalues 1/(1 + k^decay) in a random basis."""
    x = torch.randn(points, 32)
    if decay == 0:
        return x
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    return x * (1 / (1 + torch.arange(32.0) ** decay)).sqrt() @ basis.T


def train(seed: int, setting: str, decay: int, fast: bool) -> Curves:
    """The curves of one network, by the time in steps at the rate of 0.05."""
    torch.manual_seed(seed)
    points, width, steps, every = (64, 24, 100, 50) if fast else (256, 256, 800, 20)
    scale, rate = SETTINGS[setting]
    longer = round(0.05 / rate)
    x = inputs(points, decay)
    y = chain_monomial(x)
    y = y / y.std()
    model = mlp((32, width, width, 1))
    initialise(model, scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    kept = Keep()
    with FeatureProbe(
        model, optimizer=optimizer, every=every * longer, window=1, relations=tuple(NAMES),
        powers=1.0, include=LAYERS, jacobian="exact", sinks=[kept], strict=True,
    ):  # fmt: skip
        for _ in range(steps * longer + 1):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x).squeeze(1), y)
            loss.backward()
            optimizer.step()
    return {
        key: [(step // longer, value) for step, value in curve]
        for key, curve in kept.curves.items()
    }


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all seeds and scales."""
    run = Experiment(__file__, __doc__, argv, seeds=3, decay=(0, 1, 2))
    decay = run.options.decay
    figure_number = {0: "2", 1: "7", 2: "8"}[decay]
    run.results.name = f"centered_fig{figure_number}"
    run.results.title = f"C-NFA paper, Fig. {figure_number}: (init-centred) NFA over training"
    settings = list(SETTINGS)[::4] if run.fast else list(SETTINGS)
    found = {s: [train(seed, s, decay, run.fast) for seed in run.seeds] for s in settings}
    for layer, number in zip(LAYERS, (1, 2), strict=True):
        for relation, name in NAMES.items():
            for setting in settings:
                last = [curves[layer, relation][-1][1] for curves in found[setting]]
                unstable = decay == 0 and setting == "s = 1" and name == "init-centred"
                why = _UNSTABLE if unstable and number == 2 and not run.fast else ""
                run.row(f"layer {number}, {name}, {setting}: at the end", "", last, why)
        lowest = {
            relation: [
                min(
                    value
                    for s in settings
                    if s != "s = 1" or run.fast
                    for step, value in found[s][i][layer, relation]
                    if step and math.isfinite(value)
                )
                for i in range(len(run.seeds))
            ]
            for relation in NAMES
        }
        for relation, name in NAMES.items():
            paper = "high throughout" if relation == "init_centered_nfa" else "low at the start"
            among = "any setting" if run.fast else "any setting but the first"
            what = f"layer {number}, {name}: lowest, {among}, any step"
            open_still = number == 1 and relation == "init_centered_nfa" and not run.fast
            run.row(what, paper, lowest[relation], _OPEN if open_still else "")
    figure, grid = axes(2, 2)
    for i, layer in enumerate(LAYERS):
        for j, (relation, name) in enumerate(NAMES.items()):
            for setting, color, line in zip(settings, COLORS, LINES, strict=False):
                curves = [dict(c[layer, relation]) for c in found[setting]]
                steps = sorted(curves[0])
                mean = [statistics.fmean(c[step] for c in curves) for step in steps]
                grid[i, j].plot(steps, mean, color=color, linestyle=line, label=setting)
            grid[i, j].set(title=f"layer {i + 1}, {name} NFA", ylim=(0, 1.02))
            grid[1, j].set_xlabel("time, in steps of 0.05")
        grid[i, 0].set_ylabel("cosine")
    grid[1, 0].legend()
    return run.finish(figure)


if __name__ == "__main__":
    main()
