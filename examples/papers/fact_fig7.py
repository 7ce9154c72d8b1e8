"""FACT paper, Fig. 7: two-layer quadratic networks where FACT holds and the NFA does not.

f(x) = aᵀ(Wx)², width 10, y = τ·x₁x₂ + x₃x₄, x uniform on {0, 1, 2}⁴ with probability p and
(1, 1, 0, 0) otherwise, τ = 0.02, p = λ = 1e-5, Adam with learning rate 0.01, 10⁶ iterations on the
population loss (§6). The loss has (λ/2)‖θ‖² in it (§2); Adam's `weight_decay` adds its gradient.
What Adam leaves is compared with the minimisers (the best of four starts of L-BFGS, whose losses
are given) as printed and at smaller λ and p, with the same networks of Adam after a learning rate
that went to zero over 10 % more iterations, and with those of Adam at a smaller λ.

    python examples/papers/fact_fig7.py            # 5 seeds, minutes on one core: 5
    python examples/papers/fact_fig7.py --fast
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from paper_lab import Experiment, Results, axes
from torch import Tensor, nn

from feature_probe import Report, measure

TAU, WIDTH, RATE = 0.02, 10, 0.01
PRINTED, LESS = (1e-5, 1e-5), (1e-5, 1e-6)
OSCILLATES = (
    "a reading at random of an oscillation, between the lowest and the highest below: Adam at a "
    "fixed learning rate does not come to rest; with a learning rate that goes to 0 it does (below)"
)
RANK = (
    "where W has rank 1, WᵀW and AGOP are multiples of one wwᵀ whatever is learned; at the printed "
    "λ rank 1 is the minimum (the same L_λ from Adam at rest and from every start of L-BFGS), and "
    "with less decay rank 3, where the two separate"
)
#: (p, λ) of the minimisers: as printed, and less decay.
SETTINGS = (PRINTED, (1e-5, 3e-6), LESS, (1e-5, 1e-7), (1e-6, 1e-7))


@dataclass(frozen=True)
class Population:
    """The 82 atoms: ``x`` ``[82, 4]``, ``y`` and their probabilities ``[82]``, and λ."""

    x: Tensor
    y: Tensor
    probability: Tensor
    decay: float

    @classmethod
    def of(cls, p: float, decay: float) -> Population:
        """The distribution of §6, float64."""
        values = torch.arange(3, dtype=torch.float64)
        x = torch.cat([torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.cartesian_prod(*[values] * 4)])
        probability = torch.full((82,), p / 81, dtype=torch.float64)
        probability[0] = 1 - p
        return cls(x, TAU * x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3], probability, decay)

    def losses(self, first: Tensor, second: Tensor) -> Tensor:
        """L + (λ/2)‖θ‖² of S networks: W ``[S, m, 4]`` and a ``[S, m]`` to ``[S]``."""
        output = ((first @ self.x.T).square() * second.unsqueeze(2)).sum(1)
        norms = first.square().sum((1, 2)) + second.square().sum(1)
        return (output - self.y).square() @ self.probability + self.decay / 2 * norms

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """2·E[vec(xxᵀ) vec(xxᵀ)ᵀ] ``[16, 16]``, and Q* with y = xᵀQ*x ``[16]``."""
        products = (self.x.unsqueeze(2) * self.x.unsqueeze(1)).flatten(1)
        target = torch.zeros(4, 4, dtype=torch.float64)
        target[0, 1] = target[1, 0] = TAU / 2
        target[2, 3] = target[3, 2] = 0.5
        second = 2 * (products.T * self.probability) @ products
        return second.numpy(), target.flatten().numpy()


class Quadratic(nn.Module):
    """f(x) = aᵀ(Wx)², with the weights given: ``[m, 4]`` and ``[m]``."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(4, len(second), bias=False, dtype=torch.float64)
        self.second = nn.Linear(len(second), 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.first.weight.copy_(first)
            self.second.weight.copy_(second.unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 4]`` to ``[n, 1]``."""
        return self.second(self.first(x).square())


def report(population: Population, first: Tensor, second: Tensor) -> Report:
    """FACT and AGOP of the first layer, each atom as much as its probability.

    The probe's sums are means over examples. The weights n·probability go into the loss for G, and
    their root into the output for K = (1/n) Σ JᵀJ.
    """
    weights = len(population.x) * population.probability

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return (weights * (output.squeeze(1) - target).square()).mean()

    return measure(
        Quadratic(first, second), [(population.x, population.y)], loss_fn,
        weight_decay=population.decay, relations=("fact", "nfa"), powers=(0.5, 1.0),
        include="first", output=lambda f: f * weights.sqrt().unsqueeze(1), progress=False,
    )  # fmt: skip


def started(seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """PyTorch's initial weights, one network a seed: ``[S, m, 4]`` and ``[S, m]``, float64."""
    layers = []
    for seed in seeds:
        torch.manual_seed(seed)
        layers.append((nn.Linear(4, WIDTH, bias=False), nn.Linear(WIDTH, 1, bias=False)))
    first = torch.stack([a.weight.detach() for a, _ in layers]).double()
    second = torch.stack([b.weight.detach().squeeze(0) for _, b in layers]).double()
    return first.requires_grad_(), second.requires_grad_()


class Adam:
    """Adam as in torch.optim, for all seeds at once, float64, in closed form.

    Written out, as 10⁶ steps of torch.optim.Adam on so few numbers are all overhead. With
    f(x) = xᵀQx, Q = Wᵀdiag(a)W and R = ∂L/∂Q the gradients are 2·diag(a)WR and w_jᵀRw_j.
    """

    def __init__(self, population: Population, seeds: Sequence[int]) -> None:
        self.population = population
        first, second = (w.detach().numpy() for w in started(seeds))
        self._theta = np.concatenate([first, second[..., None]], axis=2)
        self._mean, self._square = np.zeros_like(self._theta), np.zeros_like(self._theta)
        self._step = 0

    def run(self, iterations: int, anneal: bool = False) -> None:
        """Train on, at the fixed learning rate or with one that falls to zero in a line."""
        theta, mean, square = self._theta, self._mean, self._square
        first, second = theta[..., :4], theta[..., 4:]
        moments, target = self.population.moments()
        gradient = np.empty_like(theta)
        for iteration in range(iterations):
            self._step += 1
            form = (first * second).swapaxes(1, 2) @ first
            slope = ((form.reshape(-1, 16) - target) @ moments).reshape(-1, 4, 4)
            product = first @ slope
            gradient[..., :4] = 2 * second * product
            gradient[..., 4] = (product * first).sum(2)
            gradient += self.population.decay * theta
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            rate = RATE * (1 - iteration / iterations) if anneal else RATE
            rate /= 1 - 0.9**self._step
            theta -= rate * mean / (np.sqrt(square / (1 - 0.999**self._step)) + 1e-8)

    def weights(self) -> tuple[Tensor, Tensor]:
        """W ``[S, m, 4]`` and a ``[S, m]``."""
        theta = torch.from_numpy(self._theta.copy())
        return theta[..., :4], theta[..., 4]

    def reports(self) -> list[Report]:
        """One a seed."""
        return [report(self.population, *pair) for pair in zip(*self.weights(), strict=True)]

    def objective(self) -> list[float]:
        """L_λ/λ, one a seed."""
        return (self.population.losses(*self.weights()) / self.population.decay).tolist()


def minimiser(
    population: Population, starts: int, iterations: int
) -> tuple[Tensor, Tensor, list[float]]:
    """The best of some starts of L-BFGS, float64: W, a, and L_λ/λ from every start."""
    found = []
    for seed in range(starts):
        first, second = started([seed])
        optimizer = torch.optim.LBFGS(
            (first, second), max_iter=iterations, max_eval=2 * iterations, tolerance_grad=1e-9,
            tolerance_change=1e-15, history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def scaled(
            first: Tensor = first, second: Tensor = second, to: torch.optim.LBFGS = optimizer
        ) -> Tensor:
            to.zero_grad()
            loss = population.losses(first, second).sum() / population.decay
            loss.backward()
            return loss

        optimizer.step(scaled)
        loss = population.losses(first, second).item() / population.decay
        found.append((first.detach()[0], second.detach()[0], loss))
    first, second, _ = min(found, key=lambda item: item[2])
    return first, second, [loss for *_, loss in found]


def main(argv: Sequence[str] | None = None) -> Results:
    """Run Adam, then L-BFGS."""
    run = Experiment(__file__, __doc__, argv)
    iterations, readings, starts, steps = (
        (20_000, 5, 1, 2000) if run.fast else (1_000_000, 200, 4, 2000)
    )
    settings = (PRINTED, SETTINGS[-1]) if run.fast else SETTINGS
    figure, grid = axes(3, 3, width=1.7, height=1.7)
    for p, decay in (PRINTED, LESS):
        printed = (p, decay) == PRINTED
        adam = Adam(Population.of(p, decay), run.seeds)
        adam.run(iterations - 10 * readings)
        found = []
        for _ in range(readings):
            adam.run(10)
            found.append(adam.reports())
        name = f"Adam, {'as printed' if printed else f'λ = {decay:.0e}'}"
        _rows_of_adam(run, name, found, adam, ("0.994", "< 0.068") if printed else ("", ""))
        if printed:
            _draw(grid[0], name, found[-1][0])
        adam.run(iterations // 10, anneal=True)
        rested, name = adam.reports(), f"{name}, then its learning rate to 0"
        run.row(f"{name}: cosine of FACT", "", _cosines(rested, "fact"))
        run.row(f"{name}: cosine of AGOP", "", _cosines(rested, "nfa", 1.0))
        run.row(f"{name}: L_λ/λ", "", adam.objective())
    shown = {PRINTED: grid[1], SETTINGS[-1]: grid[2]}
    for p, decay in settings:
        population = Population.of(p, decay)
        first, second, losses = minimiser(population, starts, steps)
        least = report(population, first, second)
        name = f"minimiser at p = {p:.0e}, λ = {decay:.0e}"
        fact, nfa, why = ("0.994", "< 0.068", RANK) if (p, decay) == PRINTED else ("", "", "")
        run.row(f"{name}: cosine of FACT", fact, _cosines([least], "fact"))
        run.row(f"{name}: cosine of AGOP", nfa, _cosines([least], "nfa", 1.0), why)
        run.row(f"{name}: cosine of √AGOP", "", _cosines([least], "nfa", 0.5))
        run.row(f"{name}: L_λ/λ, every start", "", losses)
        singular = torch.linalg.svdvals(first)
        run.row(f"{name}: rank of W", "", [int((singular > 1e-3 * singular[0]).sum())])
        if (p, decay) in shown:
            _draw(shown[p, decay], f"minimiser, p = {p:.0e}, λ = {decay:.0e}", least)
    return run.finish(figure)


def _rows_of_adam(
    run: Experiment, name: str, found: list[list[Report]], adam: Adam, paper: tuple[str, str]
) -> None:
    """The last reading, and how the readings before it scatter."""
    last = found[-1]
    why = (OSCILLATES, RANK) if paper[0] else ("", "")
    run.row(f"{name}: cosine of FACT", paper[0], _cosines(last, "fact"), why[0])
    run.row(f"{name}: cosine of AGOP", paper[1], _cosines(last, "nfa", 1.0), why[1])
    run.row(f"{name}: L_λ/λ", "", adam.objective())
    cosines = list(zip(*(_cosines(reports, "fact") for reports in found), strict=True))
    run.row(f"{name}: lowest cosine of FACT of the last readings, one every 10 iterations", "",
            [min(values) for values in cosines])  # fmt: skip
    run.row(f"{name}: highest cosine of FACT of them", "", [max(values) for values in cosines])
    resting = list(zip(*(
        [report.record("first", "fact").stationarity for report in reports] for reports in found
    ), strict=True))  # fmt: skip
    run.row(f"{name}: stationarity ‖λW + G‖/‖λW‖ of them, median (0: at rest)", "",
            [statistics.median(values) for values in resting])  # fmt: skip
    run.row(f"{name}: stationarity, highest", "", [max(values) for values in resting])


def _cosines(reports: Sequence[Report], relation: str, power: float | None = None) -> list[float]:
    return [report.record("first", relation, power).cosine for report in reports]


def _draw(row: Sequence[Any], title: str, report: Report) -> None:
    """WᵀW, FACT and AGOP, each over its largest entry."""
    shown = {
        title + "\nWᵀW": report.matrix("first", "nfm"),
        f"FACT, cosine {_cosines([report], 'fact')[0]:.3f}": report.matrix("first", "fact"),
        f"AGOP, cosine {_cosines([report], 'nfa', 1.0)[0]:.3f}": report.matrix("first", "nfa", 1.0),
    }
    for axis, (name, matrix) in zip(row, shown.items(), strict=True):
        axis.imshow((matrix / matrix.abs().max()).numpy(), cmap="PuOr_r", vmin=-1, vmax=1)
        axis.set(title=name, xticks=range(4), yticks=range(4))
        axis.set_xticklabels(["x₁", "x₂", "x₃", "x₄"])
        axis.set_yticklabels(["x₁", "x₂", "x₃", "x₄"])
        axis.grid(visible=False)


if __name__ == "__main__":
    main()
