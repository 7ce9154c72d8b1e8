"""What the scripts on the paper of Tansley, Massart and Cartis share: data, training, measuring.

Tansley, Massart, Cartis, *On the Neural Feature Ansatz for Deep Neural Networks*, §5 and App. B, C:
f(x) = aᵀ[W_L···W_1 x + b_1]₊ + b_2, width 64, d = 20, N = 2,048 inputs from U([−½, ½]²⁰), 60,000
epochs and 100 more at a tenth of the learning rate, 1e-3 for GD and 1e-4 for SGD and Adam, batches
of 64, momentum 0.9.

The scales of the target f*(x) = aᵀ[Ax + b]₊ are not printed. It takes "the data generation
mechanisms proposed in Parkinson et al. (2025)", whose published code (repository
suzannastep/linearlayers) has 21 units, A = UΣVᵀ with Haar U and V and r singular values from
U(0, 100), a ~ N(0, 1), b ~ U(−½, ½); App. C's "A ∈ R^{21×20} is a rank-5 matrix" agrees. That is
the reading here; in the other one A ∈ R^{r×d} as in §5, A and a are standard normal and b = 0.

``--shorter k`` runs k times fewer epochs at k times the learning rate between the first 2,000,
which decide what SGD finds at small λ (nfa_rates.py), and the last 2,000, in which its noise is as
in the paper: for (S)GD the same time of gradient flow and the same decay age Σηλ/(1 − μ), with more
noise of the batches on the way; for Adam, whose steps do not scale with the gradient, only the sum
of the rates is the same. What was trained is kept in ``nfa_runs`` under ``--out``, a file a group
of networks, and not trained again, so that a run can be broken off and gone on with; ``--stored 1``
trains nothing and shows what is there, of each group the least shortened.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from network_stack import Architecture, NetworkStack, Updates
from paper_lab import Experiment
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import balanced_init_, measure

DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
DEPTHS = (2, 3, 4, 5)
OPTIMIZERS = {
    "gd": Updates(1e-3),
    "gdm": Updates(1e-3, momentum=0.9),
    "sgd": Updates(1e-4),
    "sgdm": Updates(1e-4, momentum=0.9),
    "adam": Updates(1e-4, adam=True),
}
#: α̃ = Lα at which the cosines are taken in the end, and in between.
SCALED_POWERS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
#: How many times shorter each optimizer may be run at each depth. Beyond, the loss of the first
#: hundred epochs becomes NaN (SGD with momentum: L = 3 at 20, L = 5 at 10), jumps (L = 5 at 5) or
#: stays high (SGD: L = 4, 5 at 20); full batches are near that limit at the printed rate.
SHORTEST = {
    "gd": dict.fromkeys(DEPTHS, 1),
    "gdm": dict.fromkeys(DEPTHS, 1),
    "sgd": dict.fromkeys(DEPTHS, 10),
    "sgdm": {2: 20, 3: 10, 4: 5, 5: 4},
    "adam": dict.fromkeys(DEPTHS, 20),
}
#: Options of every script; the first value of each is the paper's.
SHORTER = (1, 2, 4, 5, 10, 20, 40, 100)
#: The printed numbers, by rank, noise, L, λ and optimizer.
PRINTED = Path(__file__).resolve().parent / "nfa_tables.csv"
EPOCHS, LAST, BATCH, INPUTS, WIDTH = 60_000, 100, 64, 20, 64
#: The epochs at each end that a shortened run does not shorten.
ENDS = 2000


@dataclass(frozen=True)
class Network:
    """What tells one network of a group from the others."""

    decay: float
    balanced: bool = False
    noise: float = 0.0


@dataclass(frozen=True)
class Group:
    """Networks that are trained side by side on one data set.

    Attributes:
        optimizer: A key of OPTIMIZERS.
        depth: L.
        networks: What differs among them.
        rank: r of the target.
        seed: Of data, initial weights and batches.
        shorter: How many times fewer epochs, at as many times the rate.
        ends: Of the epochs, the first and the last that keep the printed rate nevertheless.
        plain: The target's other reading: A ∈ R^{r×d} and a standard normal, b = 0.
        decay_biases: Whether biases decay too, which is not printed; in Parkinson et al.'s code
            they do not.
        points: N.
        epochs: Of the paper's setting.
        last: Of them at a tenth of the rate, in the end.
    """

    optimizer: str
    depth: int
    networks: tuple[Network, ...]
    rank: int = 5
    seed: int = 0
    shorter: int = 1
    ends: int = 0
    plain: bool = False
    decay_biases: bool = True
    points: int = 2048
    epochs: int = EPOCHS
    last: int = LAST

    @property
    def name(self) -> str:
        """Of its file: what is not as in the paper is in it."""
        kinds = sorted({f"{'b' * n.balanced}{'n' * (n.noise > 0)}" for n in self.networks})
        parts = [self.optimizer, f"L{self.depth}", f"r{self.rank}", f"seed{self.seed}"]
        parts += [f"k{self.shorter}"] if self.shorter > 1 else []
        parts += [f"ends{self.ends}"] if self.ends else []
        parts += ["plain"] * self.plain + ["weights"] * (not self.decay_biases)
        parts += [f"N{self.points}"] * (self.points != 2048)
        parts += [f"e{self.epochs}"] * (self.epochs != EPOCHS)
        parts += [kind for kind in kinds if kind]
        parts += [f"of{len(self.networks)}"] * (len(self.networks) != len(DECAYS) * len(kinds))
        return "_".join(parts)


def depths(run: Experiment) -> tuple[int, ...]:
    """L of the networks of a script's run."""
    return DEPTHS[:1] if run.fast else DEPTHS


def decays(run: Experiment) -> tuple[float, ...]:
    """λ of the networks of a script's run."""
    return (DECAYS[0], DECAYS[-1]) if run.fast else DECAYS


def group(
    optimizer: str, depth: int, seed: int, run: Experiment, noise: float = 0.0, shorter: int = 0
) -> Group:
    """The networks of one optimizer and depth, one a λ; for SGD with Fig. 2's balanced ones."""
    options = run.options
    shorter = min(shorter or options.shorter, SHORTEST[optimizer][depth])
    starts = (False, True) if optimizer == "sgd" and not noise else (False,)
    networks = tuple(Network(decay, start, noise) for start in starts for decay in decays(run))
    rank = getattr(options, "rank", 5)
    if run.fast:  # the target of small scale, at which larger rates are stable
        shorter = 40 if optimizer in ("gd", "gdm", "adam") else 200
        return Group(
            optimizer, depth, networks, rank, seed, shorter, plain=True, points=256, epochs=40_000
        )
    return Group(
        optimizer,
        depth,
        networks,
        rank,
        seed,
        shorter=shorter,
        ends=ENDS if shorter > 1 else 0,
        plain=bool(options.plain),
        decay_biases=bool(getattr(options, "biases", 1)),
    )


def printed(rank: int, noise: int) -> dict[tuple[str, int, float], str]:
    """The paper's numbers at one rank and level of noise, by optimizer, L and λ."""
    with PRINTED.open(encoding="utf-8", newline="") as file:
        rows = [
            r for r in csv.DictReader(file) if (r["rank"], r["sigma"]) == (f"{rank}", f"{noise}")
        ]
    return {
        (optimizer, int(row["depth"]), float(row["decay"])): row[optimizer]
        for row in rows
        for optimizer in OPTIMIZERS
    }


def setting(run: Run) -> str:
    """What a row says of a setting that is not the paper's."""
    shorter = run["settings"]["shorter"]
    return f" ({shorter}x shorter)" if shorter > 1 else ""


#: What is kept of a group: `snapshots` hold, by network, loss and cosines at SCALED_POWERS.
Run = dict[str, Any]


def target(rank: int, seed: int, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[k, d]``, a ``[k]`` and b ``[k]`` of f*(x) = aᵀ[Ax + b]₊."""
    draw = torch.Generator().manual_seed(1000 + seed)
    if plain:
        matrix = torch.randn(rank, INPUTS, generator=draw)
        return matrix, torch.randn(rank, generator=draw), torch.zeros(rank)
    units = INPUTS + 1
    left = _orthogonal(units, draw)[:, :rank]
    right = _orthogonal(INPUTS, draw)[:, :rank]
    values = 100 * torch.rand(rank, generator=draw)
    heads = torch.randn(units, generator=draw)
    return left * values @ right.T, heads, torch.rand(units, generator=draw) - 0.5


def _orthogonal(size: int, draw: torch.Generator) -> Tensor:
    basis, upper = torch.linalg.qr(torch.randn(size, size, generator=draw))
    return basis * upper.diagonal().sign()


def data(rank: int, points: int, seed: int, plain: bool) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, d]`` and noiseless labels ``[n]``."""
    matrix, heads, biases = target(rank, seed, plain)
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(points, INPUTS, generator=draw) - 0.5
    return x, (x @ matrix.T + biases).relu() @ heads


def start(architecture: Architecture, seed: int, balanced: bool) -> nn.Sequential:
    """A network before training: PyTorch's own initialisation, or the chain balanced."""
    network = architecture.build(seed)
    if balanced:
        balanced_init_(list(network[0]), generator=torch.Generator().manual_seed(seed))
    return network


def linear_cosines(
    chain: nn.Module, depth: int, scaled_powers: Sequence[float] = SCALED_POWERS
) -> dict[str, Any]:
    """The probe's numbers of a chain's first layer, at scaled powers that 1 is among.

    The chain's Jacobian is the same at every input, so that one input is the whole data set.
    """
    powers = [scaled / depth for scaled in scaled_powers]
    inputs = chain[0].in_features  # type: ignore[index, union-attr]
    report = measure(
        chain, [torch.zeros(1, inputs)], relations=("nfa",), powers=powers, include="0",
        progress=False,
    )  # fmt: skip
    records = [report.record("0", "nfa", power) for power in powers]
    own = records[scaled_powers.index(1.0)]
    return {
        "cosine": own.cosine,
        "cosines": [record.cosine for record in records],
        "chance": own.shared_weight_cosine,
        "fitted_power": own.fitted_power,
    }


def train(group: Group, run: Experiment) -> Run:
    """Train a group and measure it over training; or what was found before, if it was trained."""
    return kept(run, group.name, asdict(group), lambda: _train(group))


def kept(
    run: Experiment,
    name: str,
    settings: dict[str, Any],
    found: Callable[[], list[dict[str, Any]]],
) -> Run:
    """What is in ``nfa_runs/NAME.json``, if it was found at the same settings, or find it now."""
    before = stored(run, name, settings)
    if before is not None:
        return before
    begin = time.process_time()
    with torch.inference_mode():
        snapshots = found()
    minutes = (time.process_time() - begin) / 60
    written: Run = {
        "settings": settings, "minutes": minutes, "snapshots": snapshots
    }  # fmt: skip
    path = _place(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(written)) + "\n", encoding="utf-8")
    print(f"{name}: {minutes:.1f} minutes of one core", flush=True)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def stored(run: Experiment, name: str, settings: dict[str, Any]) -> Run | None:
    """What was found before at the same settings, if anything was; its minutes are counted."""
    path = _place(run, name)
    if path.exists():
        found: Run = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == json.loads(json.dumps(settings)):
            run.spent += found["minutes"]
            return found
    return None


def _place(run: Experiment, name: str) -> Path:
    folder: Path = run.options.out
    return folder / "nfa_runs" / f"{name}.json"


def all_seeds(optimizer: str, depth: int, run: Experiment, noise: float = 0.0) -> list[Run]:
    """Runs of one optimizer and depth, one a seed; with ``--stored 1`` those that are there."""
    if not run.options.stored:
        return [train(group(optimizer, depth, seed, run, noise), run) for seed in run.seeds]
    for shorter in SHORTER:
        groups = [group(optimizer, depth, seed, run, noise, shorter) for seed in run.seeds]
        before = [found for one in groups if (found := stored(run, one.name, asdict(one)))]
        if before:
            return before
    return []


def _train(group: Group) -> list[dict[str, Any]]:
    torch.set_flush_denormal(True)  # weights that decay to nothing would slow all steps down
    architecture = Architecture(INPUTS, WIDTH, group.depth)
    x, clean = data(group.rank, group.points, group.seed, group.plain)
    draw = torch.Generator().manual_seed(2000 + group.seed)
    noise = torch.randn(group.points, generator=draw)
    y = torch.stack([clean + network.noise * noise for network in group.networks])
    stack = NetworkStack(
        [start(architecture, group.seed, network.balanced) for network in group.networks],
        architecture,
        [network.decay for network in group.networks],
        OPTIMIZERS[group.optimizer],
        group.decay_biases,
    )
    rate = OPTIMIZERS[group.optimizer].rate
    # by epoch, how many of the paper's it stands for, and at how many times its rate it is run
    shortened = max(1, (group.epochs - 2 * group.ends) // group.shorter)
    slower = 1 if group.ends else group.shorter
    schedule = [
        *[(1, 1.0)] * group.ends,
        *[(group.shorter, float(group.shorter))] * shortened,
        *[(1, 1.0)] * group.ends,
        *[(slower, slower / 10)] * max(1, group.last // slower),
    ]
    # more often at the start, where the curves rise
    readings = 10 if len(schedule) > 1000 else 1
    due = [group.epochs * (i / readings) ** 2 for i in range(1, readings + 1)]
    snapshots = [_snapshot(stack, group, x, y, 0, (1.0,))]
    epoch = 0
    for stands_for, times in schedule:
        epoch += stands_for
        now = rate * times
        if group.optimizer.startswith("gd"):
            stack.step(x, y, now)
        else:
            order = torch.randperm(group.points, generator=draw)
            inputs, labels = x[order], y[:, order]
            for first in range(0, group.points, BATCH):
                batch = slice(first, first + BATCH)
                stack.step(inputs[batch], labels[:, batch], now)
        if due and epoch >= round(due[0]):
            due.pop(0)
            snapshots.append(_snapshot(stack, group, x, y, epoch, (1.0,)))
    snapshots.append(_snapshot(stack, group, x, y, epoch))
    return snapshots


def _snapshot(
    stack: NetworkStack,
    group: Group,
    x: Tensor,
    y: Tensor,
    epoch: int,
    powers: Sequence[float] = SCALED_POWERS,
) -> dict[str, Any]:
    numbers = []
    for index in range(len(group.networks)):
        with torch.inference_mode(mode=False):
            network = stack.network(index)
            with torch.no_grad():
                loss = F.mse_loss(network(x.clone()).squeeze(1), y[index].clone()).item()
            diverged = not math.isfinite(loss)
            cosines = {} if diverged else linear_cosines(network[0], group.depth, powers)
            numbers.append({"loss": loss, **cosines})
    return {"epoch": epoch, "networks": numbers}


def found(run: Run, network: Network, snapshot: int = -1) -> dict[str, Any]:
    """What was found of one network of a group: nothing but a null loss where it diverged."""
    index = run["settings"]["networks"].index(asdict(network))
    numbers: dict[str, Any] = run["snapshots"][snapshot]["networks"][index]
    return numbers


def cosine(run: Run, network: Network, snapshot: int = -1) -> float:
    """The cosine at α = 1/L; NaN where the network diverged."""
    return float(found(run, network, snapshot).get("cosine", math.nan))


def _rounded(value: Any) -> Any:
    """Six digits, and NaN as null, which JSON knows."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
