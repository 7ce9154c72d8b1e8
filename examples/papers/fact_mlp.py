"""The FACT paper's ReLU networks (App. A): trained once, their reports kept on disk.

Table 2 and Fig. 2, 8, 9 and 10 are about the same networks. :func:`trained` returns what is known
of one of them: from its file in ``OUT/fact_runs`` if it is there, else it trains it and writes the
file. So a script that is stopped loses one network at most, and the next one goes on from there.

As printed: width 1024 (CIFAR-10: 3072), SGD with momentum 0.9, learning rate 0.1 with cosine decay,
weight decay 1e-4, batches of 64, mean squared error on one-hot labels, 200 epochs, PyTorch's
initialisation. "5-layer" and "depth 3" are both said of the same networks: 3 or 5 hidden layers.

Up to 5,000 images of MNIST are of the subset that ships with the examples; more, and CIFAR-10, need
``--data``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from paper_lab import Experiment
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import Report, measure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the readers of data are one folder up

from cifar import load_cifar10
from mnist import load_mnist

RATE, MOMENTUM, BATCH = 0.1, 0.9, 64
RELATIONS = ("fact", "fact_sym", "nfa", "enfa", "bfact", "bnfa", "benfa")
#: Where in training the reports of Fig. 8 and 10 are made, as parts of all epochs.
MOMENTS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Setting:
    """What tells one network from another.

    Attributes:
        points: Training examples n.
        hidden: Hidden layers.
        width: Their width.
        epochs: Passes over the data.
        seed: Of the initial weights, of the choice of the examples and of their order.
        reading: 0: the loss is the mean over entries and pixels are in [0, 1]; 1: the squared error
            is summed over classes; 2: the pixels have mean 0 and standard deviation 1.
        followed: Whether it is measured at ``MOMENTS`` too, which takes longer than to train it
            where the data are few and the width is the paper's.
        cifar: CIFAR-10, not MNIST.
        strong: Weight decay 1e-3, not 1e-4.
    """

    points: int
    hidden: int
    width: int
    epochs: int
    seed: int
    reading: int = 0
    followed: bool = False
    cifar: bool = False
    strong: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        parts = {key: int(part) for key, part in asdict(self).items()}
        return "_".join(f"{key}{part}" for key, part in parts.items() if part or key == "seed")

    @property
    def options(self) -> str:
        """What the networks of all its seeds have in common, for names of results."""
        name = replace(self, seed=0, followed=False).name
        return name.replace("_seed0", "")

    @property
    def decay(self) -> float:
        """λ."""
        return 1e-3 if self.strong else 1e-4

    @property
    def age(self) -> float:
        """Decay age at the end, Σ ηλ/(1 − μ); the cosine's mean is a half."""
        rates = sum(_rate(epoch, self.epochs) for epoch in range(self.epochs))
        return rates * math.ceil(self.points / BATCH) * self.decay / (1 - MOMENTUM)


@dataclass(frozen=True)
class Trained:
    """What is known of one network.

    Attributes:
        setting: Which.
        loss: Over all the training data, at the end.
        worst: The largest loss of a batch of the last epoch.
        minutes: Of training and measuring.
        report: At the end.
        curves: Pearson's r by epoch, by layer and relation: ``{epoch: {layer: {label: r}}}``.
    """

    setting: Setting
    loss: float
    worst: float
    minutes: float
    report: Report
    curves: dict[int, dict[str, dict[str, float]]]

    def pearson(self, label: str) -> list[float]:
        """Pearson's r at the end, by layer."""
        by_layer = {r.layer: r.pearson for r in self.report.records if r.label == label}
        return [by_layer[layer] for layer in self.report.layers]

    def series(self, layer: int, label: str) -> tuple[list[int], list[float]]:
        """Epochs, and Pearson's r there, of the layer of that number from the input, from 0."""
        name = self.report.layers[layer]
        found = {epoch: scores[name].get(label, math.nan) for epoch, scores in self.curves.items()}
        return list(found), list(found.values())


def networks(run: Experiment, followed: bool = False) -> list[Trained]:
    """The networks of a script's options, one a seed (``run`` made by :func:`experiment`)."""
    o = run.options
    first = Setting(
        o.points, o.hidden, o.width, o.epochs, 0, o.reading, followed, bool(o.cifar), bool(o.strong)
    )
    if (
        run.fast
    ):  # decay ten times the paper's, so that few steps are a decay age of 1; 7 × 7 pixels
        first = replace(first, points=128, width=32, epochs=1000, strong=True)
    x, y = _images(first, o.data)
    if run.fast:
        x = x.unflatten(1, (28, 28))[:, ::4, ::4].flatten(1)
    return [trained(run, replace(first, seed=seed), x, y) for seed in run.seeds]


def describe(setting: Setting) -> str:
    """In words, for titles and rows."""
    full = 3072 if setting.cifar else 1024
    readings = ("", ", squared error summed over classes", ", pixels standardised")
    data = "CIFAR-10" if setting.cifar else "MNIST"
    return (
        f"{data}, n = {setting.points:,}, {setting.hidden} hidden layers of {setting.width}"
        f"{'' if setting.width == full else ' (reduced)'}, "
        f"{setting.epochs:,} epochs{', weight decay 1e-3' if setting.strong else ''}"
        f"{readings[setting.reading]} (decay age {setting.age:.2f})"
    )


def experiment(script: str, doc: str, argv: Sequence[str] | None, seeds: int) -> Experiment:
    """The options that say which network; defaults as printed, n = 1,000."""
    return Experiment(
        script, doc, argv, seeds, data="MNIST/raw or cifar-10-batches-py", points=(1000,),
        hidden=(3, 5), width=(1024,), epochs=(200,), reading=(0, 1, 2), cifar=(0, 1), strong=(0, 1),
    )  # fmt: skip


def _images(setting: Setting, data: Path | None) -> tuple[Tensor, Tensor]:
    """All there are to choose from: ``[N, d]`` in [0, 1], and their classes ``[N]``."""
    needed = setting.cifar or setting.points > 5000
    if needed and data is None:
        raise SystemExit(
            "CIFAR-10, and more than 5,000 images of MNIST, are not shipped: give --data, the "
            "folder that holds MNIST/raw or cifar-10-batches-py"
        )
    if setting.cifar:
        return load_cifar10(data or "")
    x, y, *_ = load_mnist(data if needed else None)
    return x.flatten(1), y


def kept(run: Experiment, besides: Sequence[Trained]) -> list[Trained]:
    """All networks whose files are there; the minutes of those not in ``besides`` are counted."""
    found = [_read(path) for path in sorted(_folder(run).glob("*.json"))]
    counted = {network.setting for network in besides}
    run.spent += sum(network.minutes for network in found if network.setting not in counted)
    return found


def trained(run: Experiment, setting: Setting, x: Tensor, y: Tensor) -> Trained:
    """One network: read if its file is there, followed or not, else trained and written there.

    Args:
        run: The script's; the minutes of a network that is read are counted there.
        setting: Which.
        x: All images there are to choose from, ``[N, d]`` in [0, 1].
        y: Their classes, ``[N]``.
    """
    names = [replace(setting, followed=True).name, setting.name]
    paths = [_folder(run) / f"{name}.json" for name in names]
    path = next((path for path in paths if path.exists()), None)
    if path is not None:
        read = _read(path)
        run.spent += read.minutes
        return read
    found = _train(setting, x, y)
    data = asdict(found) | {"report": found.report.to_dict()}
    paths[-1].parent.mkdir(parents=True, exist_ok=True)
    paths[-1].write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
    return _read(paths[-1])


def _folder(run: Experiment) -> Path:
    folder: Path = run.options.out
    return folder / "fact_runs"


def _read(path: Path) -> Trained:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    data["setting"] = Setting(**data["setting"])
    data["report"] = Report.from_dict(data["report"])
    data["curves"] = {int(epoch): scores for epoch, scores in data["curves"].items()}
    return Trained(**data)


def _rate(epoch: int, epochs: int) -> float:
    """The cosine schedule."""
    return RATE * (1 + math.cos(math.pi * epoch / epochs)) / 2


def network(inputs: int, hidden: int, width: int, outputs: int) -> nn.Sequential:
    """Linears with bias, ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise((inputs, *[width] * hidden, outputs)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _train(setting: Setting, x: Tensor, y: Tensor) -> Trained:
    start = time.process_time()
    torch.manual_seed(setting.seed)
    torch.set_flush_denormal(True)  # dying units otherwise make steps several times slower
    chosen = torch.randperm(len(x))[: setting.points]
    images, labels = x[chosen], F.one_hot(y[chosen], 10).float()
    if setting.reading == 2:
        images = (images - images.mean()) / images.std()
    scale = 10.0 if setting.reading == 1 else 1.0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.mse_loss(output, target)

    model = network(images.shape[1], setting.hidden, setting.width, 10)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=RATE,
        momentum=MOMENTUM,
        weight_decay=setting.decay,
        fused=True,
    )
    loader = list(zip(images.split(1000), labels.split(1000), strict=True))
    moments = {setting.epochs}
    if setting.followed:
        moments |= {round(part * setting.epochs) for part in MOMENTS}
    curves: dict[int, dict[str, dict[str, float]]] = {}
    losses: list[float] = []
    for epoch in range(setting.epochs + 1):
        if epoch in moments:
            report = measure(
                model, loader, loss_fn, weight_decay=setting.decay, relations=RELATIONS,
                progress=False, step=epoch * math.ceil(setting.points / BATCH),
            )  # fmt: skip
            curves[epoch] = {layer: {} for layer in report.layers}
            for record in report.records:
                if not math.isnan(record.pearson):
                    curves[epoch][record.layer][record.label] = round(record.pearson, 5)
        if epoch == setting.epochs:
            break
        optimizer.param_groups[0]["lr"] = _rate(epoch, setting.epochs)
        losses = []
        for batch in torch.randperm(setting.points).split(BATCH):
            optimizer.zero_grad()
            loss = loss_fn(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        final = sum(loss_fn(model(a), b).item() * len(a) for a, b in loader) / setting.points
    minutes = (time.process_time() - start) / 60
    return Trained(setting, final, max(losses), minutes, report, curves)
