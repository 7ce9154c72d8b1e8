"""Train a small network on MNIST and watch its layers come to satisfy FACT.

    python examples/quickstart.py                 # one to two minutes
    python examples/quickstart.py --data ROOT     # the whole of MNIST, from ROOT/MNIST/raw
    tensorboard --logdir runs                     # the same numbers over the whole run

The training loop is an ordinary one; the probe is the `with` around it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from mnist import load_mnist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from feature_probe import FeatureProbe, Report, measure

BATCH_SIZE = 250
STEPS = 3_000  # decay age: the sum of lr * weight_decay / (1 - momentum) over the steps is 6
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.2, 0.9, 2e-3
WINDOW = 20  # steps that a report sums over: one pass over the shipped 5,000 images
LINE = 100  # characters; the table is a little wider


def build_model() -> nn.Sequential:
    """A plain multilayer perceptron, images [n, 1, 28, 28] -> logits [n, 10]."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def train(model: nn.Module, loader: DataLoader, epochs: int, log_dir: Path, every: int) -> None:
    """SGD with momentum, weight decay and a cosine schedule, watched by the probe."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))

    with FeatureProbe(model, optimizer=optimizer, log_dir=log_dir, every=every, window=WINDOW):
        for _ in tqdm(range(epochs), desc="training", unit="epoch"):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images given their own label."""
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def explain(before: Report, after: Report) -> str:
    """The two reports in three sentences, a line each or two."""

    def span(report: Report, relation: str, power: float | None, score: str) -> str:
        layers = report.layers if relation == "fact" else report.layers[:-1]
        values = [getattr(report.record(layer, relation, power), score) for layer in layers]
        low, high = (f"{round(value, 2) + 0.0:.2f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    fact = [span(report, "fact", None, "cosine") for report in (before, after)]
    nfa = [span(report, "nfa", 0.5, "cosine") for report in (before, after)]
    error = span(after, "fact", None, "residual")
    chance = span(after, "nfa", 0.5, "shared_weight_cosine")
    return "\n".join(
        textwrap.fill(sentence, LINE)
        for sentence in [
            f"FACT, the balance of loss and weight decay: cosine {fact[0]} before training, "
            f"{fact[1]} after, relative error {error}.",
            f"NFA, W'W ~ sqrt(AGOP), but for the last layer: {nfa[0]} before, {nfa[1]} after; with "
            f"random gradient directions {chance}.",
            "So a high NFA cosine says little by itself: set it against the last of these numbers.",
        ]
    )


def conclude(report: Report) -> str:
    """How often each verdict of the table was given, and what is said of the first layer."""
    counts = []
    for label in report.labels:
        verdicts = Counter(record.verdict for record in report.records if record.label == label)
        counts.append(f"{label} {', '.join(f'{said} in {n}' for said, n in verdicts.items())}")
    first = report.layers[0]
    paragraphs = [
        f"Verdicts, of {len(report.layers)} layers: {'; '.join(counts)}.",
        f"One layer in words, report.explain({first!r}): {report.explain(first)}",
    ]
    return "\n".join(textwrap.fill(paragraph, LINE) for paragraph in paragraphs)


def dashboard_command(log_dir: Path) -> str:
    """What to type to see the run, with the TensorBoard of the Python that is running."""
    beside = Path(sys.executable).parent / "tensorboard"
    program = os.path.relpath(beside) if beside.exists() else "tensorboard"
    return f"{program} --logdir {log_dir}"


def main() -> None:
    """Train, measure before and after, and say what it means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds MNIST/raw: use all of MNIST")
    parser.add_argument("--epochs", type=int, help=f"default: as many as make {STEPS:,} steps")
    parser.add_argument("--log-dir", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="default: 1; matrices this small gain little by more"
    )
    parser.add_argument(
        "--fast", action="store_true", help="3 epochs: shows that it runs, not what FACT does"
    )
    arguments = parser.parse_args()

    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    x_train, y_train, x_test, y_test = (
        part.to(arguments.device) for part in load_mnist(arguments.data)
    )
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=BATCH_SIZE, shuffle=True)
    model = build_model().to(arguments.device)
    epochs = arguments.epochs or (3 if arguments.fast else math.ceil(STEPS / len(loader)))
    run = arguments.log_dir / time.strftime("quickstart-%Y%m%d-%H%M%S")

    steps = epochs * len(loader)

    def weigh(step: int, initial: Report | None = None) -> Report:
        # One power, for a table that fits on a screen; the dashboard has s = 1, too.
        return measure(
            model, loader, F.cross_entropy, weight_decay=WEIGHT_DECAY, powers=0.5, step=step,
            initial=initial,
        )  # fmt: skip

    before = weigh(0)
    train(model, loader, epochs, run, every=20 if arguments.fast else 100)
    after = weigh(steps, before)

    print(f"\n{after}\n\n{explain(before, after)}\n\n{conclude(after)}\n")
    print(f"test accuracy: {accuracy(model, x_test, y_test):.3f}")
    print(f"time: {time.perf_counter() - start:.0f} s")
    print(f"the whole run, layer by layer: {dashboard_command(arguments.log_dir)}")


if __name__ == "__main__":
    main()
