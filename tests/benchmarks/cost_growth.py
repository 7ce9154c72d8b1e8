"""How the cost grows with width, depth, batch, positions and outputs, one at a time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cost_figures as figures
import torch
from cost_models import Batch, Recipe, Training
from cost_parts import WINDOW, probed
from cost_timing import Mode, interleaved, seconds
from torch import nn

from feature_probe import FeatureProbe


@dataclass(frozen=True)
class Size:
    """A perceptron and its batches: what the cost grows with.

    Attributes:
        width: Features of the input and of every hidden layer.
        depth: Hidden layers.
        batch: Examples.
        positions: Of an example, all of them through the same perceptron.
        outputs: Of the model, for each position.
    """

    width: int = 256
    depth: int = 4
    batch: int = 256
    positions: int = 1
    outputs: int = 10

    def recipe(self) -> Recipe:
        """How it is made; an axis for positions only where there are several."""
        title = ", ".join(f"{name} {value}" for name, value in asdict(self).items())
        return Recipe(title, self._model, self._batch, 3)

    def _model(self) -> nn.Module:
        hidden = [[nn.Linear(self.width, self.width), nn.ReLU()] for _ in range(self.depth)]
        return nn.Sequential(*itertools.chain(*hidden), nn.Linear(self.width, self.outputs))

    def _batch(self) -> Batch:
        rows = (self.batch,) if self.positions == 1 else (self.batch, self.positions)
        return torch.randn(*rows, self.width), torch.randint(self.outputs, rows)


BASE = Size()
#: What is varied, under which Jacobian, over which values: doublings.
SERIES: Sequence[tuple[str, str, tuple[int, ...]]] = (
    ("width", "random", (64, 128, 256, 512, 1024)),
    ("depth", "random", (1, 2, 4, 8, 16)),
    ("batch", "random", (128, 256, 512, 1024, 2048)),
    ("positions", "random", (1, 2, 4, 8, 16)),
    ("outputs", "random", (8, 16, 32, 64, 128)),
    ("outputs", "exact", (4, 8, 16, 32, 64)),
)
QUICK: Sequence[tuple[str, str, tuple[int, ...]]] = (
    ("width", "random", (8, 16, 32)),
    ("outputs", "exact", (2, 4, 8)),
)
#: What is fitted of a series, and how many of its points, the last ones, are.
COSTS, FITTED = ("plain", "step", "report", "bytes"), 3
_ROUNDS, _REPORTS = 7, 2


def mode(training: Training) -> Mode:
    """Turns of its steps, none of them reported."""
    return Mode(lambda: seconds(training.step, training.device), WINDOW - 1)


def endless(jacobian: str, rounds: int) -> dict[str, Any]:
    """Options of a probe whose window is open for so many rounds of a mode, and not reported."""
    last = WINDOW * (rounds + 2)
    return {"jacobian": jacobian, "window": last + 1, "every": lambda step: step == last}


def point(size: Size, jacobian: str, rounds: int, limit: float) -> dict[str, Any]:
    """Seconds of plain and probed steps by round, of reports, and the bytes that a window holds.

    Args:
        size: The model.
        jacobian: "random", one product a step, or "exact".
        rounds: Interleaved rounds.
        limit: Seconds after which no further round is begun, after three.
    """
    plain, followed = Training(size.recipe()), Training(size.recipe())
    probed(followed, **endless(jacobian, rounds))
    modes = {"plain": mode(plain), "probed": mode(followed)}
    said = FeatureProbe.estimate(plain.model, plain.batches[0][0], jacobian=jacobian, window=WINDOW)
    return {
        "seconds": interleaved(modes, rounds, limit),
        "reports": reports(size, jacobian),
        "bytes": said.bytes_held,
    }


def reports(size: Size, jacobian: str) -> list[float]:
    """What the last step of a window takes beyond its others, seconds, for a few windows."""
    training = Training(size.recipe())
    every = lambda step: step % (WINDOW + 1) == WINDOW  # noqa: E731
    probed(training, jacobian=jacobian, window=WINDOW, every=every)
    turns = Mode(lambda: seconds(training.step, training.device), WINDOW)
    return figures.report_seconds({"": [turns.turn() for _ in range(_REPORTS)]}, "")


def growth(limit: float, *, quick: bool = False) -> list[dict[str, Any]]:
    """A series for each quantity: its values and the points measured there.

    Args:
        limit: Seconds after which no further round of a point is begun, after three.
        quick: Whether only to see that everything runs.
    """
    base, rounds = (Size(depth=1), 1) if quick else (BASE, _ROUNDS)
    return [
        {
            "quantity": quantity,
            "jacobian": jacobian,
            "sizes": sizes,
            "points": [
                point(replace(base, **{quantity: size}), jacobian, rounds, limit) for size in sizes
            ],
        }
        for quantity, jacobian, sizes in (QUICK if quick else SERIES)
    ]


def costs(one: Mapping[str, Any]) -> dict[str, float]:
    """Of a point, medians over rounds, and the shorter report: what else ran only makes it longer.

    "plain": seconds of a plain step; "step": seconds that a step inside a window adds to it;
    "report": seconds of a report; "bytes": held through a window.
    """
    found = one["seconds"]
    plain = figures.plain(found)
    pairs = zip(figures.ratios(found, "probed"), plain, strict=True)
    return {
        "plain": statistics.median(plain),
        "step": statistics.median((ratio - 1) * each for ratio, each in pairs),
        "report": min(one["reports"]),
        "bytes": float(one["bytes"]),
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the size that the last three values grow with: a line through the logarithms.

    By least squares; NaN where one of the values is not positive.
    """
    x, y = sizes[-FITTED:], values[-FITTED:]
    if min(y) <= 0:
        return math.nan
    return statistics.linear_regression([*map(math.log, x)], [*map(math.log, y)]).slope


def exponents(series: Mapping[str, Any]) -> dict[str, float]:
    """Of a series, by the names of :data:`COSTS`."""
    found = [costs(one) for one in series["points"]]
    return {name: exponent(series["sizes"], [one[name] for one in found]) for name in COSTS}
