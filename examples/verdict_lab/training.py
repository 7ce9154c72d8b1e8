"""Training under the probe: what verdicts.py judges.

One run has three stages: a report early on, one after the decay age that was asked for (minibatches
at a constant learning rate), and ``measure`` after a last stretch of full batches on which the
learning rate falls. Beside the probe runs a :class:`Follower`, which shares no code with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.optim.lion import Lion
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from feature_probe import FeatureProbe, Report, measure
from verdict_lab.networks import ACTIVATIONS, NETWORKS, make_data, named_layers

EQUALITIES = ("fact", "bfact", "update_fact", "update_bfact")
PROPORTIONALITIES = ("nfa", "enfa")
#: Steps of their window.
LEARNED = 64


@dataclass(frozen=True)
class Setting:
    """One run. ``rate`` is the decay age of a step, ηλ/(1−μ) or ηλ; for Adam with L2 a nominal one.

    Attributes:
        network: Key of :data:`NETWORKS`.
        optimizer: Key of :data:`OPTIMIZERS`.
        lr: Largest learning rate.
        decay: λ.
        age: Decay age of the second stage.
        early: That of the first.
        width: Of the hidden layers.
        examples: Of the data set.
        batch: Examples per step.
        window: Steps per report.
        schedule: "constant", "warmup" or "cosine", up to the second stage.
        only: Name of the one layer whose group has weight decay, "" for all.
        frozen: Name of a frozen layer.
        activation: Key of :data:`ACTIVATIONS`.
        settle: Decay age of the last stage, were its learning rate the largest.
        seed: Of data, weights and order.
    """

    network: str
    optimizer: str
    lr: float
    decay: float
    age: float = 8.0
    early: float = 0.2
    width: int = 24
    examples: int = 256
    batch: int = 32
    window: int = 128
    schedule: str = "constant"
    only: str = ""
    frozen: str = ""
    activation: str = "gelu"
    settle: float = 3.0
    seed: int = 0

    @property
    def rate(self) -> float:
        """Decay age of one step at the largest learning rate."""
        momentum = 0.9 if self.optimizer in ("momentum", "nesterov") else 0.0
        decay = self.decay if self.decay and self.optimizer not in COUPLED_ADAPTIVE else 0.0
        return self.lr * decay / (1 - momentum) or 4e-3

    @property
    def unaged(self) -> bool:
        """Whether no decay age is defined: the decay goes through Adam's second moment."""
        return self.optimizer in COUPLED_ADAPTIVE

    @property
    def unit(self) -> int:
        """Steps per unit of decay age."""
        return max(16, round(1 / self.rate))

    def followed(self, stage: str) -> int:
        """Steps in the windows of the reports so far: of step 0 and one or three more."""
        return 1 + self.window * (1 if stage == "early" else 3)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.network}, {self.optimizer}"


COUPLED_ADAPTIVE = ("adam+l2",)
Groups = list[dict[str, object]]
OPTIMIZERS: dict[str, Callable[[Groups, float, float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
    "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=wd),
    "nesterov": lambda p, lr, wd: torch.optim.SGD(
        p, lr=lr, momentum=0.9, weight_decay=wd, nesterov=True
    ),
    "adam+l2": lambda p, lr, wd: torch.optim.Adam(p, lr=lr, weight_decay=wd),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd),
    "nadamw": lambda p, lr, wd: torch.optim.NAdam(
        p, lr=lr, weight_decay=wd, decoupled_weight_decay=True
    ),
    "radamw": lambda p, lr, wd: torch.optim.RAdam(
        p, lr=lr, weight_decay=wd, decoupled_weight_decay=True
    ),
    "lion": lambda p, lr, wd: Lion(p, lr=lr, weight_decay=wd),
}


@dataclass
class Segment:
    """Sums over some steps, float64, by layer.

    Attributes:
        steps: How many, of which the last may not have its update yet.
        weight: Σ W.
        gradient: Σ G.
        squares: Σ ‖G‖².
        dots: Σ ⟨W, G⟩.
        norms: Σ ‖W‖².
        rates: Σ η over the updates.
        update: Σ ηU, where W₊ = (1 − ηλ)W − ηU.
        latest: W of the last step.
    """

    steps: int = 0
    weight: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    dots: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    rates: float = 0.0
    update: dict[str, Tensor] = field(default_factory=dict)
    latest: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Follower:
    """Sums of weights, gradients and updates over equal segments of some steps, by brute force.

    Attributes:
        layers: Weights by layer name.
        first: First step.
        length: Steps of a segment.
        decay: λ.
        count: Segments.
        segments: Those there are.
    """

    layers: dict[str, nn.Parameter]
    first: int
    length: int
    decay: float
    count: int = 4
    segments: list[Segment] = field(default_factory=list)
    _rate: float = 0.0

    def see(self, step: int, rate: float) -> None:
        """Before the optimizer's step, with the gradients in place; η is ``rate``."""
        place = step - self.first
        if 0 < place <= self.count * self.length:
            self._finish(self.segments[-1])
        if not 0 <= place < self.count * self.length:
            return
        if place % self.length == 0:
            self.segments.append(Segment())
        now = self.segments[-1]
        now.steps += 1
        self._rate = rate
        for name, weight in self.layers.items():
            slope = torch.zeros_like(weight) if weight.grad is None else weight.grad
            w, g = weight.detach().double().flatten(1), slope.double().flatten(1)
            now.latest[name] = w
            now.weight[name] = now.weight.get(name, 0) + w
            now.gradient[name] = now.gradient.get(name, 0) + g
            for sums, value in ((now.squares, g * g), (now.dots, w * g), (now.norms, w * w)):
                sums[name] = sums.get(name, 0.0) + float(value.sum())

    def _finish(self, segment: Segment) -> None:
        """What the last step did, now that the weights after it are there."""
        segment.rates += self._rate
        for name, weight in self.layers.items():
            before, after = segment.latest[name], weight.detach().double().flatten(1)
            pushed = (1 - self._rate * self.decay) * before - after
            segment.update[name] = segment.update.get(name, 0) + pushed

    def mean_weight(self, name: str, segment: int | None = None) -> Tensor:
        """Mean of W over one segment or all."""
        chosen = self.segments if segment is None else [self.segments[segment]]
        return _total([s.weight[name] for s in chosen]) / sum(s.steps for s in chosen)

    def slope(self, name: str, *, update: bool) -> Tensor:
        """Mean of G over all steps, or U of all of them together."""
        if update:
            return _total([s.update[name] for s in self.segments]) / self.rates
        return _total([s.gradient[name] for s in self.segments]) / self.steps

    @property
    def steps(self) -> int:
        """How many were seen."""
        return sum(segment.steps for segment in self.segments)

    @property
    def rates(self) -> float:
        """Σ η of them."""
        return sum(segment.rates for segment in self.segments)

    def balanced(self, name: str) -> float:
        """−Σ⟨W, G⟩/λΣ‖W‖²."""
        dots, norms = (
            sum(s[name] for s in sums)
            for sums in (
                [segment.dots for segment in self.segments],
                [segment.norms for segment in self.segments],
            )
        )
        return -dots / (self.decay * norms) if self.decay else 0.0

    def mean_square(self, name: str) -> float:
        """Mean of ‖G‖² over all steps."""
        return sum(segment.squares[name] for segment in self.segments) / self.steps


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


@dataclass
class Outcome:
    """What a run leaves.

    Attributes:
        setting: The run's.
        reports: By stage.
        followers: Of what comes after a stage ("early", "late"), of what came "before" the second,
            and of the windows of the reports ("early window", "window").
        networks: The network at a stage, and before training ("untrained").
        states: At each step of the window of nfa and enfa, with the batch.
        data: All of it.
    """

    setting: Setting
    reports: dict[str, Report]
    followers: dict[str, Follower]
    networks: dict[str, nn.Module]
    states: list[tuple[nn.Module, Tensor, Tensor]]
    data: tuple[Tensor, Tensor]


def _make_optimizers(setting: Setting, network: nn.Module) -> list[torch.optim.Optimizer]:
    everything = list(network.parameters())
    if setting.optimizer == "muon":
        hidden = [w for w in named_layers(network).values() if w.dim() == 2]
        rest = [p for p in everything if all(p is not w for w in hidden)]
        first = torch.optim.Muon(hidden, lr=setting.lr, weight_decay=setting.decay)
        return [first, torch.optim.AdamW(rest, lr=setting.lr, weight_decay=setting.decay)]
    make = OPTIMIZERS[setting.optimizer]
    if not setting.only:
        return [make([{"params": everything}], setting.lr, setting.decay)]
    chosen = named_layers(network)[setting.only]
    rest = [p for p in everything if p is not chosen]
    groups: Groups = [{"params": [chosen]}, {"params": rest, "weight_decay": 0.0}]
    return [make(groups, setting.lr, setting.decay)]


def _factor(setting: Setting, step: int, end: int, settle: int) -> float:
    """The learning rate over the largest: the schedule up to ``end``, then at rest, then falling.

    A cosine ends at a tenth, which is kept until the full batches.
    """
    main = round(end * setting.age / (setting.age + 2))
    start = 0.1 if setting.schedule == "cosine" else 1.0
    if step >= end:
        late = max(0.0, (step - end) / settle - 0.75) * 4
        return start * (0.02 + 0.98 * (1 + math.cos(math.pi * late)) / 2)
    if setting.schedule == "warmup":
        return min(1.0, (step + 1) / (0.05 * main))
    if setting.schedule == "cosine":
        return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, step / main))) / 2
    return 1.0


def _batches(data: tuple[Tensor, Tensor], batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2000 + seed)
    while True:
        order = torch.randperm(len(data[0]), generator=generator)
        for chosen in torch.split(order, batch):
            yield data[0][chosen], data[1][chosen]


class _Keep:
    """A sink that keeps the reports."""

    def __init__(self) -> None:
        self.reports: dict[int, Report] = {}

    def write(self, report: Report) -> None:
        """Keep one."""
        self.reports[report.step] = report

    def close(self) -> None:
        """Nothing."""


def train(setting: Setting) -> Outcome:
    """Train one network under the probe through its three stages."""
    torch.manual_seed(setting.seed)
    network = NETWORKS[setting.network](setting.width, ACTIVATIONS[setting.activation])
    data = make_data(setting.network, setting.examples, setting.seed)
    layers = named_layers(network)
    if setting.frozen:
        layers[setting.frozen].requires_grad_(False)
    optimizers = _make_optimizers(setting, network)
    unit = setting.unit
    steps = round(setting.age * unit)
    early = max(round(setting.early * unit), 8)
    end, settle = steps + 2 * unit, round(setting.settle * unit)
    decay = setting.decay
    spans = {"early window": min(early + 1, setting.window), "window": setting.window}
    followers = {
        "early": Follower(layers, early, unit // 4, decay),
        "late": Follower(layers, steps, unit // 2, decay),
        "before": Follower(layers, steps - unit // 4 * 4, unit // 4, decay),
        "early window": Follower(
            layers, early + 1 - spans["early window"], spans["early window"], decay, 1
        ),
        "window": Follower(layers, steps + 1 - spans["window"], spans["window"], decay, 1),
    }
    due = {0, early, steps - unit, steps}
    kept = _Keep()
    blank = copy.deepcopy(network)  # a copy made later would have the probe's hooks
    networks = {"frozen": network, "untrained": copy.deepcopy(blank)}
    states: list[tuple[nn.Module, Tensor, Tensor]] = []
    stream = _batches(data, setting.batch, setting.seed)
    equalities = FeatureProbe(
        network, optimizer=optimizers, every=due.__contains__, window=setting.window,
        relations=EQUALITIES, sinks=[kept], strict=True,
    )  # fmt: skip
    proportionalities = FeatureProbe(
        network, optimizer=optimizers, every={0, steps}.__contains__, window=LEARNED,
        relations=PROPORTIONALITIES, jacobian="exact", strict=True,
    )  # fmt: skip
    with equalities, proportionalities:
        for step in range(end + settle):
            x, y = data if step >= end else next(stream)
            if step == early or steps - LEARNED < step <= steps:
                copied = copy.deepcopy(blank)
                copied.load_state_dict(network.state_dict())
                if step == early:
                    networks["early"] = copied
                else:
                    states.append((copied, x, y))
            factor = _factor(setting, step, end, settle)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = setting.lr * factor
                optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
            for follower in followers.values():
                follower.see(step, setting.lr * factor)
            for optimizer in optimizers:
                optimizer.step()
    loader = DataLoader(TensorDataset(*data), batch_size=len(data[0]))
    networks["window"] = states[-1][0]
    before = measure(networks["untrained"], loader, F.cross_entropy, progress=False)
    frozen = measure(
        network, loader, F.cross_entropy, optimizer=optimizers, progress=False, initial=before
    )
    reports = {"early": kept.reports[early], "window": kept.reports[steps], "frozen": frozen}
    learned = proportionalities.report
    assert learned is not None
    reports["learned"] = learned
    return Outcome(setting, reports, followers, networks, states, data)
