"""C-NFA paper, Fig. 3: where the init-centred NFA starts, predicted and observed.

f(x) = aᵀ(Wx)² at initialisation on the alignment-reversing data set (App. F) over its balance γ,
n = k = d = 1024, square loss with outputs taken as zero (Eq. 4). Observed: the cosine of GᵀG and
GᵀKG with the probe's G and K, of one network on all data sets, as in the paper. Predicted: Eq. 20,
22 and 28, the last as printed and as corrected, with the moments of R averaged over 30 networks.

The data set's text leaves its scale and an inverse of zeros open, so that three readings are run:

* "printed": Σ = 11ᵀ + I/2 as it stands, S₁⁻¹ a pseudo-inverse.
* "printed, zeros inverted": zeros of S₁ raised to 10⁻¹² of its largest value, in place of the
  rounding errors that an inverse in floating point would be made of.
* "X₁ᵀX₁ ~ Σ": X₁/√n, so that X₁ᵀX₁ is about γΣ as the text takes it, and Σ = 11ᵀ/d + I/2.

The default is 4 data sets a balance, as many as the paper shows, and 1 of the first two readings;
the paper's mean is over 10.

    python examples/papers/centered_fig3.py --seeds 10
    python examples/papers/centered_fig3.py --fast
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from paper_lab import COLORS, LINES, Experiment, Results, axes
from torch import Tensor, nn

from feature_probe import measure
from feature_probe.theory.alignment_reversing import alignment_reversing_data
from feature_probe.theory.early_alignment import AlignmentSpeed, zero_output_alignment_speed
from feature_probe.theory.quadratic_network import (
    QuadraticPrediction,
    expected_moments,
    network_moments,
    predict_alignment,
)

PRINTED, INVERTED, SIZED = "printed", "printed, zeros inverted", "X₁ᵀX₁ ~ Σ"
#: What alignment_reversing_data is called with, by the number of examples and dimensions.
READINGS: dict[str, Callable[[int], dict[str, float]]] = {
    PRINTED: lambda size: {},
    INVERTED: lambda size: {"floor": 1e-12},
    SIZED: lambda size: {"common": 1 / size, "scale": size**-0.5},
}
BALANCES = (0.01, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
#: Networks that the moments of R are averaged over (App. H).
MOMENT_NETWORKS = 30
#: A balance at which more networks are drawn.
CHECKED = 0.35
CLOSE = "closely match"
_WHY = {
    PRINTED: "11ᵀ is d times a projector, and outweighs the rest of XᵀX and XᵀYX at any γ: with "
    "11ᵀ/d the score falls (below)",
    INVERTED: "for γ < ½ X₂ fills the span that X₁ leaves and alone decides, in spite of its label "
    "of 10⁻⁵: without X₁ the score is the same, and near that of isotropic inputs (below)",
}


class Quadratic(nn.Module):
    """f(x) = aᵀ(Wx)², a ~ N(0, I), W_ij ~ N(0, 1/k), in float64."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(size, size, bias=False, dtype=torch.float64)
        nn.init.normal_(self.first.weight, std=size**-0.5)
        self.readout = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n]``."""
        return self.first(x).square() @ self.readout


def zero_output_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Mean of ½(f − y)² with f taken as zero: its gradient is −y·∂f, whatever f is."""
    return (output - output.detach() - labels).square().mean() / 2


def observed(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = zero_output_loss,
) -> float:
    """ρ(GᵀG, GᵀKG) of the layer ``first``, with G and K as the probe measures them."""
    report = measure(
        model, [(inputs, labels)], loss, relations=("fact", "init_centered_nfa"),
        powers=1.0, include="first", initial_weights=model.state_dict(), progress=False,
    )  # fmt: skip
    sums = report.statistics["first"]
    assert sums.gradient is not None
    assert sums.jacobian is not None
    gradient, jacobian = sums.gradient[0].double(), sums.jacobian[0].double()
    return AlignmentSpeed(gradient.T @ gradient, gradient.T @ jacobian @ gradient).cosine


def data(
    reading: str, size: int, balance: float, seed: int, but: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """One data set of a reading, some of whose options are left as printed."""
    options: dict[str, Any] = READINGS[reading](size)
    kept = {name: value for name, value in options.items() if name not in but}
    generator = torch.Generator().manual_seed(seed)
    return alignment_reversing_data(size, size, balance, generator=generator, **kept)


@dataclass(frozen=True)
class Point:
    """One data set's cosine."""

    balance: float
    seen: float
    predicted: QuadraticPrediction


def sampled_moments(size: int, networks: int) -> Tensor:
    """The moments of R, averaged over networks of their own seeds."""
    drawn = (Quadratic(size, 100 + seed) for seed in range(networks))
    with torch.no_grad():
        return torch.stack([network_moments(net.first.weight, net.readout) for net in drawn]).mean(
            0
        )


def curve(model: Quadratic, moments: Tensor, reading: str, seed: int) -> list[Point]:
    """One seed's data sets, over the balance."""
    points = []
    for balance in BALANCES:
        inputs, labels = data(reading, len(model.readout), balance, seed)
        predicted = predict_alignment(inputs, labels, moments)
        points.append(Point(balance, observed(model, inputs, labels), predicted))
    return points


def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Over the balances of one seed."""
    return statistics.correlation(*zip(*pairs, strict=True))


def summarise(run: Experiment, reading: str, curves: list[list[Point]]) -> None:
    """The rows of one reading, a value a data seed."""
    name = f"{reading} (data sets: {len(curves)})"
    lowest, highest = ([which(p.seen for p in c) for c in curves] for which in (min, max))
    run.row(f"{name}: observed, lowest over γ", "low", lowest,
            _WHY.get(reading, ""))  # fmt: skip
    run.row(f"{name}: observed, highest over γ", "", highest)
    gaps = [statistics.fmean(abs(p.predicted.cosine - p.seen) for p in c) for c in curves]
    run.row(f"{name}: distance of predicted and observed, mean over γ", CLOSE, gaps)
    as_printed, refused = [], []
    for points in curves:
        values = [p.predicted.cosine_as_printed for p in points]
        possible = [value <= 1 + 1e-9 for value in values]  # False for NaN
        pairs = [(v, p.seen) for v, p, ok in zip(values, points, possible, strict=True) if ok]
        as_printed.append(statistics.fmean(abs(v - seen) for v, seen in pairs))
        refused.append(1 - statistics.fmean(possible))
    run.row(
        f"{name}: the same with Eq. 28 as printed, where that gives a cosine", "", as_printed,
        "its last term vanishes as printed; corrected it is right to 10⁻¹⁰ of the sum over free "
        "cumulants (tests/test_quadratic_network.py)",
    )  # fmt: skip
    if any(refused):
        run.row(f"{name}: share of γ where Eq. 28 as printed gives none", "", refused,
                "a cosine above 1, or the root of a negative number")  # fmt: skip
    if min(highest) - max(lowest) > 0.01:  # else there is nothing to be correlated
        run.row(
            f"{name}: Pearson of predicted and observed over γ", CLOSE,
            [pearson([(p.predicted.cosine, p.seen) for p in c]) for c in curves],
        )  # fmt: skip


def checks(run: Experiment, size: int, moments: Tensor, networks: int) -> None:
    """What the difference of prediction and observation is made of: networks, moments, size."""
    for order, exact in enumerate(expected_moments(size, size).tolist(), start=1):
        run.row(f"tr(R^{order})/d: {MOMENT_NETWORKS} networks over the expectation", "",
                [float(moments[order - 1]) / exact])  # fmt: skip
    inputs, labels = data(SIZED, size, CHECKED, 0)
    more = [observed(Quadratic(size, 200 + i), inputs, labels) for i in range(networks)]
    name = f"{SIZED}, one data set, γ = {CHECKED}"
    run.row(f"{name}: observed, {networks} networks", "", more,
            "the spread is that of one network: the paper's single one is that far from its "
            "prediction by chance, on all its data sets at once")  # fmt: skip
    run.row(f"{name}: predicted", "", [predict_alignment(inputs, labels, moments).cosine])
    exact = predict_alignment(inputs, labels, expected_moments(size, size)).cosine
    run.row(f"{name}: predicted with E[tr Rʲ] in closed form", "", [exact])
    for what, but in (("X₁/√n but 11ᵀ", "common"), ("11ᵀ/d but X₁ itself", "scale")):
        changed = data(SIZED, size, CHECKED, 0, [but])
        run.row(f"{what}, one data set, γ = {CHECKED}: observed", "",
                [observed(Quadratic(size, 0), *changed)])  # fmt: skip
    filled, few = data(INVERTED, size, 0.1, 0), round(0.1 * size)
    isotropic = torch.eye(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for what, given in (
        (f"{INVERTED}, one data set, γ = 0.1: observed", filled),
        ("the same without X₁", (filled[0][few:], filled[1][few:])),
        ("isotropic inputs, labels 1: observed", isotropic),
    ):
        run.row(what, "", [observed(Quadratic(size, 0), *given)])
    small = 64 if run.fast else 256
    other, few = Quadratic(small, 0), expected_moments(small, small)
    gaps = [
        statistics.fmean(abs(p.predicted.cosine - p.seen) for p in curve(other, few, SIZED, seed))
        for seed in run.seeds
    ]
    at = f"{SIZED}, n = k = d = {small}"
    run.row(f"{at}: distance of predicted and observed, mean over γ", "", gaps,
            "farther apart than at full size: the prediction is of large networks")  # fmt: skip
    with torch.no_grad():
        model = Quadratic(size, 0)
        jacobian = 2 * model.first(inputs) * model.readout
    dual = zero_output_alignment_speed(jacobian, inputs, labels).cosine
    run.row(f"{name}: the probe's G and K against the dual form (Eq. 4), difference", "0",
            [observed(model, inputs, labels) - dual])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all readings, balances and data seeds."""
    run = Experiment(__file__, __doc__, argv, seeds=4)
    size = 128 if run.fast else 1024
    moments = sampled_moments(size, MOMENT_NETWORKS)
    model = Quadratic(size, 0)
    found = {}
    for reading in READINGS:
        seeds = run.seeds if reading == SIZED else run.seeds[:1]
        found[reading] = [curve(model, moments, reading, seed) for seed in seeds]
    for reading in (SIZED, PRINTED, INVERTED):
        summarise(run, reading, found[reading])
    checks(run, size, moments, networks=4 if run.fast else 10)
    figure, grid = axes(len(READINGS), 3, width=2.7, height=2.1)
    for row, (reading, curves) in zip(grid, found.items(), strict=True):
        _draw(row, reading, curves)
    for axis, label in zip(grid[-1], ("balance γ", "balance γ", "observed"), strict=True):
        axis.set_xlabel(label)
    grid[-1, 2].legend(fontsize=7, loc="upper left")
    return run.finish(figure)


def _draw(row: Sequence[Any], reading: str, curves: list[list[Point]]) -> None:
    lowest = min(min(p.seen, p.predicted.cosine, 0.9) for c in curves for p in c) - 0.02
    read = {"observed": lambda p: p.seen, "predicted": lambda p: p.predicted.cosine}
    for axis, (kind, value) in zip(row, read.items(), strict=False):
        for points, color, line in zip(curves[:4], COLORS[1:], LINES[1:], strict=False):
            axis.plot(BALANCES, [value(p) for p in points], color=color, linestyle=line, lw=0.9)
        mean = [statistics.fmean(value(c[i]) for c in curves) for i in range(len(BALANCES))]
        axis.plot(BALANCES, mean, color=COLORS[0], lw=2.2)
        axis.set(title=f"{reading}: {kind}", ylim=(lowest, 1.02), ylabel="cosine", xlim=(0, 1))
    points = [p for c in curves for p in c]
    given = [p for p in points if math.isfinite(p.predicted.cosine_as_printed)]
    row[2].plot([lowest, 1], [lowest, 1], color="0.6", lw=0.8)
    row[2].plot([p.seen for p in given], [p.predicted.cosine_as_printed for p in given], "x",
                ms=4, color=COLORS[1], label="Eq. 28 as printed")  # fmt: skip
    row[2].plot([p.seen for p in points], [p.predicted.cosine for p in points], "o", ms=3,
                color=COLORS[0], label="corrected")  # fmt: skip
    highest = max(p.predicted.cosine_as_printed for p in given)
    top = min(max(1.0, highest), 1.1) + 0.02
    row[2].set(xlim=(lowest, 1.02), ylim=(lowest, top), ylabel="predicted", title=reading)


if __name__ == "__main__":
    main()
