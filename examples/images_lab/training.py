"""Networks and training runs: a small ResNet with and without BatchNorm, and a small ViT.

Every relation of every layer is measured in the loop, and at frozen weights before training, after
half of it and at its end. Nothing in the loop is there for the probe's sake.
"""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import RELATIONS, FeatureProbe, Report, measure
from feature_probe.schedules import at

WARMUP = 0.05  # of the steps
MOMENTUM = 0.9
#: s of AGOPˢ; the power that fits best is in every record besides.
POWER = 1.0


@dataclass(frozen=True)
class Setting:
    """One training run.

    Attributes:
        name: Its name in results and figures.
        network: "resnet", "resnet+bn" or "vit".
        optimizer: "sgd" (momentum 0.9, weight decay in the gradient) or "adamw" (decoupled).
        rate: Highest learning rate, after a linear warm-up; it falls to 0 along a cosine.
        decay: λ of the matrices; biases and the parameters of norms have none.
        steps: Optimizer steps.
        batch: Images a step.
        images: How many images to train on.
        sample: How many of these the NFA family is measured on at frozen weights.
        window: Steps whose sums go into a report.
        reports: Steps reported.
        width: Channels of the ResNet's first stage, or the ViT's features.
        seed: Of weights and order of images.
    """

    name: str
    network: str
    optimizer: str
    rate: float
    decay: float
    steps: int = 1800
    batch: int = 32
    images: int = 5000
    sample: int = 256
    window: int = 20
    reports: int = 10
    width: int = 8
    seed: int = 0

    @property
    def due(self) -> list[int]:
        """Steps reported: 0, then from 10 on denser at the start, the last step in it."""
        last = self.steps - 1
        return sorted({0, *(round(10 + (last - 10) * (i / (self.reports - 2)) ** 2)
                            for i in range(self.reports - 1))})  # fmt: skip

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a cosine to 0."""
        warm = max(1, round(WARMUP * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm))) / 2


@dataclass(frozen=True)
class Frozen:
    """One network at frozen weights.

    Attributes:
        equalities: FACT and kin, of all training images.
        others: The NFA family, of a fixed sample of them.
    """

    equalities: Report
    others: Report


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        setting: Its setting.
        parameters: How many the network has.
        loop: Reports in the loop.
        frozen: At frozen weights: before training, after half of it, at the end.
        losses: (step, mean loss since the step before) at the reports.
        accuracy: Share of the test images recognised, at the end.
        minutes: How long it took, with the probe.
    """

    setting: Setting
    parameters: int
    loop: list[Report]
    frozen: list[Frozen]
    losses: list[tuple[int, float]]
    accuracy: float
    minutes: float


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, a 1×1 convolution where the shape changes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, side, side] to [n, outputs, side / stride, side / stride]."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet(width: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """A ResNet of three blocks for images [n, 1, 28, 28] and ten classes."""
    parts: dict[str, nn.Module] = {
        "stem": nn.Conv2d(1, width, 3, 2, 1),
        "stem_norm": norm(width),
        "relu": nn.ReLU(),
        "block1": Block(width, width, 1, norm),
        "block2": Block(width, 2 * width, 2, norm),
        "block3": Block(2 * width, 4 * width, 2, norm),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(4 * width, 10),
    }
    model = nn.Sequential(OrderedDict(parts))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def build(setting: Setting) -> nn.Module:
    """The network of a setting, its weights drawn from the global generator."""
    if setting.network == "resnet":
        return resnet(setting.width, lambda channels: nn.Identity())
    if setting.network == "resnet+bn":
        return resnet(setting.width, nn.BatchNorm2d)
    if setting.network == "vit":
        return VisionTransformer(
            img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=setting.width,
            depth=3, num_heads=4, mlp_ratio=2.0,
        )  # fmt: skip
    raise ValueError(f"no network {setting.network!r}")


def build_optimizer(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW; λ on the matrices alone (a bias is no part of FACT)."""
    parameters = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if _is_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    groups = [
        {"params": matrices, "weight_decay": setting.decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if setting.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=setting.rate, momentum=MOMENTUM)
    if setting.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=setting.rate)
    raise ValueError(f"no optimizer {setting.optimizer!r}")


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.endswith("weight") and parameter.dim() >= 2


class Kept:
    """A sink that keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def write(self, report: Report) -> None:
        """Keep one."""
        self.reports.append(report)

    def close(self) -> None:
        """Nothing."""


def train(setting: Setting, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> Outcome:
    """Train one network with the probe in its loop.

    Args:
        setting: What to train, and how.
        data: Images and classes to train on, and to test on, as of ``load_mnist``.
    """
    start = time.perf_counter()
    torch.manual_seed(setting.seed)
    x, y, x_test, y_test = data
    x, y = _standardised(x[: setting.images]), y[: setting.images]
    model = build(setting)
    initial = copy.deepcopy(model)
    optimizer = build_optimizer(setting, model)
    frozen: list[Frozen] = []

    def freeze(step: int) -> None:
        before = frozen[0] if frozen else None
        frozen.append(_at_frozen_weights(setting, model, initial, optimizer, (x, y), step, before))

    kept, losses, recent = Kept(), [], []
    freeze(0)
    with FeatureProbe(
        model, optimizer=optimizer, every=at(setting.due), window=setting.window,
        relations=RELATIONS, powers=POWER, num_probes=2, sinks=[kept], strict=True,
    ):  # fmt: skip
        for step, (images, labels) in enumerate(islice(_batches(x, y, setting), setting.steps)):
            for group in optimizer.param_groups:
                group["lr"] = setting.rate_at(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            recent.append(loss.item())
            if step in setting.due:
                losses.append((step, sum(recent) / len(recent)))
                recent = []
            if step + 1 == setting.steps // 2:
                freeze(step + 1)
    freeze(setting.steps)
    return Outcome(
        setting, sum(p.numel() for p in model.parameters()), kept.reports, frozen, losses,
        _accuracy(model, _standardised(x_test), y_test),
        (time.perf_counter() - start) / 60,
    )  # fmt: skip


def _at_frozen_weights(
    setting: Setting,
    model: nn.Module,
    initial: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    step: int,
    before: Frozen | None,
) -> Frozen:
    """Measure a network as it stands, in training mode: the loss that is trained.

    The update forms need an optimizer's steps, and are not there.
    """

    def found(names: Iterable[str], images: int, earlier: Report | None) -> Report:
        x, y = data[0][:images], data[1][:images]
        return measure(
            model, list(zip(x.split(setting.batch), y.split(setting.batch), strict=True)),
            F.cross_entropy, optimizer=optimizer, relations=names, powers=POWER,
            initial_weights=initial, initial=earlier, eval_mode=False, progress=False, step=step,
        )  # fmt: skip

    frozen = [name for name in RELATIONS if not name.startswith("update")]
    equal = [name for name in frozen if RELATIONS[name].is_equality]
    others = [name for name in frozen if not RELATIONS[name].is_equality]
    return Frozen(
        found(equal, setting.images, before and before.equalities),
        found(others, setting.sample, before and before.others),
    )


def _batches(x: Tensor, y: Tensor, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of equal size, without end."""
    generator = torch.Generator().manual_seed(setting.seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for chosen in order[: len(x) // setting.batch * setting.batch].split(setting.batch):
            yield x[chosen], y[chosen]


def _standardised(x: Tensor) -> Tensor:
    """Pixels with MNIST's mean 0 and standard deviation 1."""
    return (x - 0.1307) / 0.3081


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum((model(a).argmax(dim=1) == b).sum().item() for a, b in
                zip(x.split(500), y.split(500), strict=True))  # fmt: skip
    return right / len(y)
