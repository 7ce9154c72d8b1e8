"""The training of the C-NFA paper's Fig. 2, 4, 5, 7 and 8 (App. H), with the probe in its loop.

Chain monomial of rank 5 in 32 dimensions, labels of standard deviation 1, two hidden ReLU layers of
width 256, no bias, 800 steps of full batches at learning rate 0.05. W_ij ~ N(0, s/k), s = 1 but for
the first layer. The paper names no values of s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from paper_lab import COLORS, LINES, chain_monomial, initialise, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import FeatureProbe, Report
from feature_probe.schedules import at

RATE = 0.05
LAYERS = ("0", "2")
#: Times of the reports, in steps of RATE: dense where the curves move.
TIMES = (0, 5, 10, 20, 40, 60, 80, 100, 150, 200, 400, 800)
TIMES_FAST = (0, 20, 50, 100)
#: Names of curves of the network, and of a layer's that no relation of the probe has.
TRAIN, TEST = "train loss", "test loss"
SPREAD = "init_centered_nfa, Cov(J) for K"
MEAN_SHARE, GRAM_SHARE = "mean J in tr W̄ᵀKW̄", "its direction in tr W̄ᵀW̄"

#: Layer ("" for the network) and name, to (time, value) pairs.
Curves = dict[tuple[str, str], list[tuple[int, float]]]


@dataclass(frozen=True)
class OfMean:
    """What the mean Jacobian adds, as vvᵀ, to a layer's predicted matrices, each ``[d_in]``.

    Attributes:
        changed: v = W̄ᵀJ̄, in W̄ᵀKW̄.
        initial: v = W₀ᵀ(J̄ − J̄⁰), in W₀ᵀK̄W₀.
    """

    changed: Tensor
    initial: Tensor


#: What a figure takes from a report about a layer, by name.
Read = Callable[[Report, str, OfMean], Mapping[str, float]]


@dataclass(frozen=True)
class Setting:
    """What is varied.

    Attributes:
        scale: s of the first layer's initial variance s/k.
        rate: Learning rate; a smaller one than RATE is run for as much longer.
        points: Number of training points.
        others: s of the other layers.
        mirrored: Half of the points are the others' mirror images, so that Σ y_i x_i = 0.
        labels: Standard deviation of the labels.
        activation: Of the hidden layers.
    """

    scale: float
    rate: float = RATE
    points: int = 256
    others: float = 1.0
    mirrored: bool = False
    labels: float = 1.0
    activation: type[nn.Module] = nn.ReLU


#: At s = 1 the printed rate is beyond stability, so that a smaller one is run as well. The last
#: is Fig. 1's scale of 0.01 read as the factor of the standard deviation, not of the variance.
SCALES = {
    "s = 1": Setting(1.0),
    "s = 1, rate 0.01": Setting(1.0, rate=0.01),
    "s = 0.3": Setting(0.3),
    "s = 0.1": Setting(0.1),
    "s = 0.01": Setting(0.01),
    "s = 0.0001": Setting(0.0001),
}


class Keep:
    """A sink that keeps what is read from each report; times in steps of RATE.

    Args:
        read: What to read.
        longer: Steps for each of RATE.
    """

    def __init__(self, read: Read, longer: int) -> None:
        self.curves: Curves = {}
        self.of_mean: dict[str, OfMean] = {}  # by layer, of the step reported next
        self._read, self._longer = read, longer

    def add(self, layer: str, name: str, step: int, value: float) -> None:
        """Add a point."""
        self.curves.setdefault((layer, name), []).append((step // self._longer, value))

    def write(self, report: Report) -> None:
        """Keep what one report says."""
        for layer in LAYERS:
            for name, value in self._read(report, layer, self.of_mean[layer]).items():
                self.add(layer, name, report.step, value)

    def close(self) -> None:
        """Nothing."""


def cosines(report: Report, layer: str, _: OfMean) -> dict[str, float]:
    """The cosines of all relations, by their names."""
    return {r.relation: r.cosine for r in report.records if r.layer == layer}


def apart(report: Report, layer: str, of_mean: OfMean) -> dict[str, float]:
    """Besides the cosines, that of W̄ᵀCov(J)W̄, and what the mean Jacobian makes of either side.

    K = Cov(J) + J̄J̄ᵀ, so that v = W̄ᵀJ̄ adds vvᵀ to W̄ᵀKW̄: its share of the trace there, and that of
    the direction v in W̄ᵀW̄. Undefined at W̄ = 0.
    """
    gram = report.matrix(layer, "init_centered_nfm")
    agop = report.matrix(layer, "init_centered_nfa", 1.0)
    v = of_mean.changed
    spread = agop - torch.outer(v, v)
    along = v @ gram @ v / v.square().sum()
    return {
        **cosines(report, layer, of_mean),
        SPREAD: ((gram * spread).sum() / gram.norm() / spread.norm()).item(),
        MEAN_SHARE: (1 - spread.trace() / agop.trace()).item(),
        GRAM_SHARE: (along / gram.trace()).item(),
    }


def data(
    points: int, decay: int = 0, mirrored: bool = False, held_out: int = 2048
) -> tuple[Tensor, Tensor]:
    """Training points, then held-out ones, ``[points + held_out, 32]``, and their labels.

    Gaussian, isotropic (decay 0) or with eigenvalues 1/(1 + k^decay) in a random basis. The labels
    are scaled by the standard deviation of those of the training points.
    """
    x = torch.randn(points, 32)
    if mirrored:
        x = torch.cat([x[: points // 2], -x[: points // 2]])
    if decay:
        basis = torch.linalg.qr(torch.randn(32, 32)).Q
    x = torch.cat([x, torch.randn(held_out, 32)])
    if decay:
        x = x * (1 / (1 + torch.arange(32.0) ** decay)).sqrt() @ basis.T
    y = chain_monomial(x)
    return x, y / y[:points].std()


def mean_jacobian(model: nn.Sequential, layer: int, x: Tensor) -> Tensor:
    """J̄: the mean over examples of ∂f/∂z, z = Wh the layer's pre-activation, ``[d_out]``."""
    with torch.no_grad():
        z = model[: layer + 1](x)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(model[layer + 1 :](z).sum(), z)
    return gradient.mean(0)


def of_mean(model: nn.Sequential, before: nn.Sequential, name: str, x: Tensor) -> OfMean:
    """What the mean Jacobian adds to a layer's predicted matrices as the network stands."""
    weight = model.get_parameter(f"{name}.weight").detach().double()
    initial = before.get_parameter(f"{name}.weight").detach().double()
    now, then = (mean_jacobian(m, int(name), x).double() for m in (model, before))
    return OfMean((weight - initial).T @ now, initial.T @ (now - then))


def train(
    seed: int,
    setting: Setting,
    relations: Sequence[str],
    *,
    decay: int = 0,
    fast: bool = False,
    read: Read = cosines,
    also: Sequence[int] = (),
) -> Curves:
    """The curves of one network: what is read from its reports, and its losses at those times.

    Args:
        seed: Of data and initial weights.
        setting: What is varied.
        relations: What the probe measures.
        decay: Of the inputs' spectrum, see :func:`data`.
        fast: A small network for a short time.
        read: What is kept of a report.
        also: Times of reports besides the usual ones; it trains until the latest of all.
    """
    torch.manual_seed(seed)
    width, times = (24, TIMES_FAST) if fast else (256, TIMES)
    points = setting.points // 4 if fast else setting.points
    times = sorted({*times, *also})
    longer = round(RATE / setting.rate)
    x, y = data(points, decay, setting.mirrored)
    y = y * setting.labels
    model = mlp((32, width, width, 1), setting.activation)
    initialise(model, setting.scale, setting.others)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate)
    due = at(time * longer for time in times)
    kept = Keep(read, longer)
    with FeatureProbe(
        model, optimizer=optimizer, every=due, window=1, relations=tuple(relations),
        powers=1.0, include=LAYERS, jacobian="exact", keep_matrices=read is not cosines,
        sinks=[kept], strict=True,
    ):  # fmt: skip
        for step in range(times[-1] * longer + 1):
            if due(step):
                with torch.no_grad():
                    errors = (model(x).squeeze(1) - y).square()
                kept.add("", TRAIN, step, errors[:points].mean().item())
                kept.add("", TEST, step, errors[points:].mean().item())
                kept.of_mean = {name: of_mean(model, before, name, x[:points]) for name in LAYERS}
            optimizer.zero_grad()
            F.mse_loss(model(x[:points]).squeeze(1), y[:points]).backward()
            optimizer.step()
    return kept.curves


def last(runs: Sequence[Curves], layer: str, name: str) -> list[float]:
    """The last value of each network."""
    return [run[layer, name][-1][1] for run in runs]


def read_at(when: int, runs: Sequence[Curves], layer: str, name: str) -> list[float]:
    """The value of each network at one of the times."""
    return [dict(run[layer, name])[when] for run in runs]


def lowest(found: Mapping[str, Sequence[Curves]], layer: str, name: str) -> list[float]:
    """The lowest value after time 0 in any setting, by seed."""
    return [
        min(value for run in same_seed for time, value in run[layer, name] if time)
        for same_seed in zip(*found.values(), strict=True)
    ]


def draw(
    axis: Axes,
    found: Mapping[str, Sequence[Curves]],
    layer: str,
    name: str,
    *,
    scaled: bool = False,
) -> None:
    """One curve a setting, the mean over networks, into a panel; scaled: each by its maximum."""
    for index, (setting, runs) in enumerate(found.items()):
        times = [time for time, _ in runs[0][layer, name]]
        values = torch.tensor([[value for _, value in run[layer, name]] for run in runs])
        if scaled:
            values = values / values.amax(1, keepdim=True)
        style = {"color": COLORS[index % 6], "linestyle": LINES[(index + index // 6) % 6]}
        axis.plot(times, values.mean(0).tolist(), label=setting, **style)
