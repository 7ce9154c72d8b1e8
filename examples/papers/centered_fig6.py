"""C-NFA paper, Fig. 6: where the init-centred NFA starts with two hidden layers, first order.

Gaussian inputs in a random basis with eigenvalues 1/(1 + k^α), k = 1 … d; labels the chain monomial
of rank 5 or Σ(Qx)_i², of standard deviation 1; W_ij ~ N(0, 1/fan-in); quadratic or ReLU units;
n = d = 128 and width 128 or 1024 (App. C and H); layer 1, outputs taken as zero (Eq. 4). Observed:
the cosine of GᵀG and GᵀKG with the probe's G and K, one network a data set. Predicted: the same
with K replaced by its expectation (App. C), averaged over networks: E[𝒦] in the place of 𝒦, so that
E[𝒦]² is in the place of 𝒦²; the other reading, E[𝒦²] as in Eq. 5, is in the rows.

    python examples/papers/centered_fig6.py            # 3 data sets
    python examples/papers/centered_fig6.py --fast
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from centered_fig3 import observed
from paper_lab import COLORS, Experiment, Results, axes, chain_monomial
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe.theory.early_alignment import (
    ExpectedKernel,
    expected_kernel,
    kernel_alignment_speed,
    zero_output_alignment_speed,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quadratic": torch.square,
    "ReLU": torch.relu,
}
LOW, HIGH = "low rank", "high rank"
_PART = (
    "the paper says that terms of the nonlinear part of φ′ are missing in its prediction; averaged "
    "over networks E[𝒦] has them, and without them (below) the gap is several times as wide"
)
#: Decay rate at which single things are changed.
CHECKED = 1.0


@dataclass(frozen=True)
class Setting:
    """Sizes of one run: ``draws`` networks of each width are averaged over."""

    dimension: int
    widths: tuple[int, ...]
    draws: tuple[int, ...]
    decays: tuple[float, ...]


PAPER = Setting(128, (128, 1024), (160, 20), (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 6.0))
SMALL = Setting(32, (32, 96), (30, 10), (0.0, 1.0, 6.0))


class TwoHidden(nn.Module):
    """f(x) = aᵀφ(W₂φ(W₁x)), W_ij ~ N(0, 1/fan-in), no bias, in float64."""

    def __init__(self, dimension: int, width: int, activation: str) -> None:
        super().__init__()
        sizes = ((dimension, width), (width, width), (width, 1))
        self.first, self.second, self.readout = (
            nn.Linear(inputs, outputs, bias=False, dtype=torch.float64) for inputs, outputs in sizes
        )
        for linear in (self.first, self.second, self.readout):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.activation = ACTIVATIONS[activation]

    def rest(self, hidden: Tensor) -> Tensor:
        """Outputs ``[n]`` of the first pre-activation."""
        second = self.second(self.activation(hidden))
        return self.readout(self.activation(second)).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n]``."""
        return self.rest(self.first(x))

    def jacobian(self, x: Tensor) -> Tensor:
        """∂f/∂(W₁x), ``[n, width]``."""
        hidden = self.first(x).detach().requires_grad_()
        return torch.autograd.grad(self.rest(hidden).sum(), hidden)[0]


def inputs(size: int, decay: float, seed: int, start: int = 1) -> Tensor:
    """Gaussian, eigenvalues 1/(1 + k^decay) from k = ``start`` on, ``[size, size]``."""
    torch.manual_seed(seed)
    x = torch.randn(size, size, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    order = torch.arange(start, start + size, dtype=torch.float64)
    return x * (1 / (1 + order**decay)).sqrt() @ basis.T


def labels(x: Tensor, task: str, seed: int) -> Tensor:
    """Of standard deviation 1, ``[n]``."""
    if task == LOW:
        y = chain_monomial(x)
    else:
        torch.manual_seed(1000 + seed)
        y = (x @ torch.randn(x.shape[1], x.shape[1], dtype=torch.float64).T).square().sum(1)
    return y / y.std()


def networks(dimension: int, width: int, activation: str, draws: int) -> Iterator[TwoHidden]:
    """Those that E[𝒦] is an average over."""
    torch.manual_seed(width)
    return (TwoHidden(dimension, width, activation) for _ in range(draws))


def predicted(expected: ExpectedKernel, x: Tensor, y: Tensor, reading: str = "E[𝒦]²") -> float:
    """The first-order prediction."""
    square = None if reading == "E[𝒦]²" else expected.mean_square
    return kernel_alignment_speed(expected.mean, x, -y, len(y), square).cosine


def relu_kernel(x: Tensor, linear_part: bool) -> Tensor:
    """E[𝒦] of two hidden ReLU layers at infinite width, up to a factor, ``[n, n]``.

    A product over the layers of E[φ′(u)φ′(v)] = ¼ + arcsin(c)/2π, c the cosine of the layer's
    inputs; of φ′ = ½ + u/√(2π) + …, in Hermite polynomials, the linear part alone gives ¼ + c/2π.
    """
    directions = x / x.norm(dim=1, keepdim=True)
    first = (directions @ directions.T).clamp(-1, 1)
    second = ((1 - first**2).sqrt() + first * (torch.pi - first.acos())) / torch.pi
    product = torch.ones_like(first)
    for cosine in (first, second.clamp(-1, 1)):
        product *= 1 / 4 + (cosine if linear_part else cosine.asin()) / (2 * torch.pi)
    return product


@dataclass
class Curves:
    """Of one activation, task and width: by data seed, over the decay rate."""

    seen: list[list[float]] = field(default_factory=list)
    first_order: list[list[float]] = field(default_factory=list)
    mean_term: list[list[float]] = field(default_factory=list)

    def gap(self, predictions: list[list[float]]) -> list[float]:
        """Mean distance of predicted and observed over the decay rate, by data seed."""
        return [
            statistics.fmean(abs(a - b) for a, b in zip(found, seen, strict=True))
            for found, seen in zip(predictions, self.seen, strict=True)
        ]


def mean(curves: list[list[float]]) -> list[float]:
    """Over data seeds."""
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


Found = dict[tuple[str, str, int], Curves]
#: The prediction by relu_kernel: by task, by data seed, over the decay rate.
ClosedForm = dict[tuple[str, bool], list[list[float]]]


def closed_form(setting: Setting, seeds: Sequence[int]) -> ClosedForm:
    """First-order predictions for ReLU at infinite width, with all of φ′ and its linear part."""
    found: ClosedForm = {}
    for task in (LOW, HIGH):
        for linear in (False, True):
            found[task, linear] = []
            for seed in seeds:
                sets = [inputs(setting.dimension, decay, seed) for decay in setting.decays]
                found[task, linear].append([
                    kernel_alignment_speed(
                        relu_kernel(x, linear), x, -labels(x, task, seed), len(x)
                    ).cosine
                    for x in sets
                ])  # fmt: skip
    return found


def sweep(setting: Setting, activation: str, width: int, draws: int, seeds: Sequence[int]) -> Found:
    """Both tasks of one width, over data seeds, each with its own network, and decay rates."""
    found = {(activation, task, width): Curves() for task in (LOW, HIGH)}
    drawn = list(networks(setting.dimension, width, activation, draws))
    for seed in seeds:
        torch.manual_seed(5000 + seed)
        model = TwoHidden(setting.dimension, width, activation)
        for curves in found.values():
            for values in (curves.seen, curves.first_order, curves.mean_term):
                values.append([])
        for decay in setting.decays:
            x = inputs(setting.dimension, decay, seed)
            expected = expected_kernel(net.jacobian(x) for net in drawn)
            for (_, task, _), curves in found.items():
                y = labels(x, task, seed)
                curves.seen[-1].append(observed(model, x, y))
                curves.first_order[-1].append(predicted(expected, x, y))
                curves.mean_term[-1].append(predicted(expected, x, y, "E[𝒦²]"))
    return found


def summarise(run: Experiment, setting: Setting, found: Found) -> None:
    """The rows of every activation, task and width."""
    for (activation, task, width), curves in found.items():
        name = f"{activation}, {task}, k = {width}"
        run.row(f"{name}: observed at α = {setting.decays[0]:g}", "", [c[0] for c in curves.seen])
        for kind, values in (("observed", curves.seen), ("predicted", curves.first_order)):
            dips = [min(c[0], c[-1]) - min(c) for c in values]
            run.row(f"{name}: {kind}, lowest between below the lower end", "above 0", dips)
        wider = "closer at k = 1024" if activation == "quadratic" else "farther than quadratic"
        why = _PART if activation == "ReLU" and width == setting.widths[-1] else ""
        gap = curves.gap(curves.first_order)
        run.row(f"{name}: distance of predicted and observed, mean over α", wider, gap, why)
        run.row(f"{name}: the same with E[𝒦²] as in Eq. 5", "", curves.gap(curves.mean_term))
        run.row(
            f"{name}: Pearson of predicted and observed over α", "captured",
            [
                statistics.correlation(a, b)
                for a, b in zip(curves.first_order, curves.seen, strict=True)
            ],
        )  # fmt: skip


def checks(run: Experiment, setting: Setting) -> None:
    """One thing changed at a time, at one decay rate."""
    size, width, seed = setting.dimension, setting.widths[-1], 0
    x = inputs(size, CHECKED, seed)
    y = labels(x, LOW, seed)
    for activation in ACTIVATIONS:
        name = f"{activation}, {LOW}, k = {width}, α = {CHECKED:g}"
        nets = list(networks(size, width, activation, setting.draws[-1]))
        seen = [zero_output_alignment_speed(net.jacobian(x), x, y).cosine for net in nets]
        run.row(f"{name}: {len(nets)} networks, by the dual form", "", seen)
        for draws in (len(nets) // 2, len(nets)):
            expected = expected_kernel(net.jacobian(x) for net in nets[:draws])
            run.row(f"{name}: predicted from {draws} networks", "", [predicted(expected, x, y)])
        run.row(f"{name}: observed, the network's own output in the loss", "",
                [observed(net, x, y, lambda f, target: F.mse_loss(f, target) / 2)
                 for net in nets[:4]], "in place of outputs taken as zero")  # fmt: skip
        last = setting.decays[-1]
        other = inputs(size, last, seed, start=0)
        target = labels(other, LOW, seed)
        found = [zero_output_alignment_speed(n.jacobian(other), other, target).cosine for n in nets]
        run.row(f"{activation}, {LOW}, k = {width}, α = {last:g}: eigenvalues from k = 0 on", "",
                found, "1, ½ and then next to nothing: no projector")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> Results:
    """Run every activation, width, task, decay rate and data seed."""
    run = Experiment(__file__, __doc__, argv, seeds=3)
    setting = SMALL if run.fast else PAPER
    found: Found = {}
    for activation in ACTIVATIONS:
        for width, draws in zip(setting.widths, setting.draws, strict=True):
            found |= sweep(setting, activation, width, draws, run.seeds)
    summarise(run, setting, found)
    infinite = closed_form(setting, run.seeds)
    for (task, linear), curves in infinite.items():
        observed_there = found["ReLU", task, setting.widths[-1]]
        which = "the linear part of φ′ alone" if linear else "all of φ′"
        run.row(
            f"ReLU, {task}, k = {setting.widths[-1]}: distance of predicted and observed, "
            f"mean over α, E[𝒦] at infinite width with {which}", "", observed_there.gap(curves),
        )  # fmt: skip
    checks(run, setting)
    figure, grid = axes(len(ACTIVATIONS), 2)
    for row, activation in zip(grid, ACTIVATIONS, strict=True):
        for axis, task in zip(row, (LOW, HIGH), strict=True):
            _draw(axis, setting, {k: found[activation, task, k] for k in setting.widths})
            axis.set(title=f"{activation}, {task}", ylim=(0.6, 1.02))
            if activation == "ReLU":
                axis.plot(setting.decays, mean(infinite[task, True]), color=COLORS[2],
                          linestyle=":", label="first order, linear part of φ′")  # fmt: skip
    for axis in grid[1]:
        axis.set_xlabel("data decay rate α")
    for axis in grid[:, 0]:
        axis.set_ylabel("cosine")
    grid[1, 0].legend(fontsize=7, loc="lower right", handlelength=3.5)
    return run.finish(figure)


def _draw(axis: Any, setting: Setting, curves: dict[int, Curves]) -> None:
    for (width, found), line in zip(curves.items(), ("--", "-"), strict=True):
        for name, values, color, mark in (
            ("observed", found.seen, COLORS[0], "o"),
            ("first order", found.first_order, COLORS[1], "x"),
        ):
            axis.plot(setting.decays, mean(values), color=color, linestyle=line, marker=mark, ms=3,
                      label=f"{name}, k = {width}")  # fmt: skip


if __name__ == "__main__":
    main()
