"""Train a small model of timm's on MNIST, with the probe on its feature layers.

    python examples/train_timm.py                      # about a minute
    python examples/train_timm.py --model test_convnext
    tensorboard --logdir runs                          # the same numbers over the whole run

Needs timm (pip install feature-probe[timm]). The model, the optimizer, the schedule and the moving
average of the weights are timm's; the probe is the one line that says `attach`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from mnist import load_mnist
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from feature_probe import FeatureProbe
from feature_probe.integrations.timm import attach, parts

BATCH_SIZE = 100
EPOCHS = 10
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-3


def build_model(name: str) -> nn.Module:
    """A model for images of one channel and ten classes; 28 pixels a side where that is fixed."""
    options = {"img_size": 28, "patch_size": 7, "depth": 3} if "vit" in name else {}
    return timm.create_model(name, in_chans=1, num_classes=10, **options)


def train(model: nn.Module, loader: DataLoader, epochs: int, log_dir: Path) -> FeatureProbe:
    """Adam with weight decay and a cosine schedule; returns the probe.

    Not AdamW: its decay is no part of the loss, so that FACT need not hold for it.
    """
    optimizer = create_optimizer_v2(model, opt="adam", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * len(loader)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.99)  # a copy of the model: it has no hooks

    probe = attach(model, optimizer=optimizer, log_dir=log_dir, every=len(loader), window=20)
    try:
        for epoch in tqdm(range(epochs), desc="training", unit="epoch"):
            for step, (images, labels) in enumerate(loader, start=epoch * len(loader) + 1):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update(model)
                scheduler.step_update(step)
    finally:
        probe.detach()
    return probe


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images given their own label."""
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    """Train, and print the last report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="test_vit", help="any name timm knows; small ones")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--images", type=int, default=5_000, help="how many to train on")
    parser.add_argument("--threads", type=int, default=1, help="default: 1; the model is small")
    parser.add_argument("--log-dir", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    x_train, y_train, x_test, y_test = load_mnist()
    data = TensorDataset(x_train[: arguments.images], y_train[: arguments.images])
    loader = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)
    model = build_model(arguments.model)
    found = parts(model)
    print(f"features: {found.num_features} wide; head left out: {', '.join(found.head)}")

    run = arguments.log_dir / time.strftime("timm-%Y%m%d-%H%M%S")
    probe = train(model, loader, arguments.epochs, run)

    print(f"\n{probe.report}\n")
    print(f"test accuracy: {accuracy(model, x_test, y_test):.3f}")
    print(f"time: {time.perf_counter() - start:.0f} s")
    print(f"the whole run, layer by layer: tensorboard --logdir {arguments.log_dir}")


if __name__ == "__main__":
    main()
