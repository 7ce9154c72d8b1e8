"""Scores from rows in bfloat16 against float64: what summing them in float32 costs in accuracy.

One layer z = W h in a model whose output and loss are linear in z, so that the rows of its Jacobian
and the loss's gradients are given ones. They arrive in bfloat16, from a bfloat16 autocast or a
model in bfloat16, and :func:`feature_probe.measure` sums them. Beside it stand the same rows summed
in float64, and rows that were never rounded, scored with the same eigenvalue clamp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from feature_probe import measure
from feature_probe.reports.report import Report
from feature_probe.reports.scoring import LayerFacts, score_layer
from feature_probe.theory.relations import LayerStatistics, clamp_tolerance, parse_relations

RELATIONS = ("nfa", "enfa", "bnfa", "benfa", "fact")
POWERS = (0.5, 1.0)
DECAY = 1e-3
#: d_out = d_in, and whether the rows become bfloat16 in an autocast or the model is all bfloat16.
CASES = ((256, "autocast"), (256, "bfloat16"), (512, "autocast"))
#: In all, 98 batches, and of a batch: the mean over 1024 examples rounds nothing.
ROWS, BATCH = 100_352, 1024
_QUICK_CASES, _QUICK_ROWS = ((16, "autocast"), (32, "bfloat16")), 4096
#: Of W, in units of what follows the rows' directions.
_NOISE = 0.1
Scores = dict[str, tuple[float, float]]


class Given(nn.Module):
    """A layer whose output gradients are given.

    Args:
        weight: W, ``[d_out, d_in]``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data = weight.clone()

    def forward(self, h: Tensor, along: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """An output ``[n, 1]`` whose Jacobian rows, and losses ``[n]`` whose gradients are given.

        Args:
            h: Inputs, ``[n, d_in]``.
            along: ∂f/∂z, ``[n, d_out]``.
            down: ∂ℓ/∂z, ``[n, d_out]``.
        """
        z = self.layer(h)
        return (z * along).sum(-1, keepdim=True), (z * down).sum(-1)


@dataclass
class Sums:
    """K, E and G of a layer in float64, added up apart from the probe.

    Attributes:
        weight: W, ``[d, d]``.
        rows: n so far.
        jacobian: n·K, ``[d, d]``, likewise the others.
        loss: n·E.
        gradient: n·G.
    """

    weight: Tensor
    rows: int = 0
    jacobian: Tensor = field(init=False)
    loss: Tensor = field(init=False)
    gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin with zeros."""
        self.weight = self.weight.double()
        self.jacobian, self.loss, self.gradient = (torch.zeros_like(self.weight) for _ in range(3))

    def add(self, h: Tensor, along: Tensor, down: Tensor) -> None:
        """Add rows ``[n, d]``: inputs, ∂f/∂z and ∂ℓ/∂z."""
        h, along, down = h.double(), along.double(), down.double()
        self.rows += len(h)
        self.jacobian.addmm_(along.mT, along)
        self.loss.addmm_(down.mT, down)
        self.gradient.addmm_(down.mT, h)

    def scores(self) -> Scores:
        """Cosine and Pearson's r by relation and power."""
        means = ((one / self.rows)[None] for one in (self.gradient, self.jacobian, self.loss))
        statistics = LayerStatistics(
            self.weight[None], *means, DECAY, clamp_tolerance(torch.float32)
        )
        facts = LayerFacts("layer", 0, self.rows, self.rows)
        records = score_layer(facts, statistics, parse_relations(RELATIONS), POWERS)
        return {record.label: (record.cosine, record.pearson) for record in records}


class Source:
    """Draws a weight, and batches of rows whose singular values fall off as 1/j.

    The inputs h and ∂f/∂z fall off so, each in a basis of its own; ∂ℓ/∂z is −W h and as much noise,
    so that FACT is not zero. W has K's directions on the left and the inputs' on the right, its
    singular values fall off as j^(−1/2), and there is noise in it: a trained layer's scores, and
    eigenvalues on both sides of the clamp.

    Args:
        width: d.
        rows: How many in all.
    """

    def __init__(self, width: int, rows: int) -> None:
        self._draw = torch.Generator().manual_seed(0)
        self._rows = rows
        fall = 1 / torch.arange(1, width + 1)
        turns = [torch.linalg.qr(self._noise(width, width)).Q for _ in range(3)]
        self._bases = [fall[:, None] * turn.mT for turn in turns]
        follows = turns[1] * fall.sqrt() @ turns[0].mT
        noise = self._noise(width, width)
        self.weight = follows + _NOISE * follows.norm() / noise.norm() * noise

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """h, ∂f/∂z and ∂ℓ/∂z, each ``[n, d]`` in float32."""
        for _ in range(0, self._rows, BATCH):
            h, along, noise = (self._noise(BATCH, len(basis)) @ basis for basis in self._bases)
            yield h, along, -(h @ self.weight.mT + noise)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw)


def measured(model: Given, batches: Iterator[tuple[Tensor, Tensor, Tensor]], way: str) -> Report:
    """The probe's report on the model, its activations and their gradients in bfloat16."""

    def forward(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            out, losses = module(*batch)
        return out, losses.mean()

    return measure(
        model, batches, forward=forward, weight_decay=DECAY, relations=RELATIONS, powers=POWERS,
        progress=False,
    )  # fmt: skip


def compared(width: int, rows: int, way: str) -> dict[str, Any]:
    """Scores in float64, how far those of the probe are from them, and those of unrounded rows.

    Args:
        width: d_out = d_in.
        rows: How many.
        way: "autocast" or "bfloat16".
    """
    source = Source(width, rows)
    weight = source.weight if way == "autocast" else source.weight.bfloat16()
    rounded, unrounded = Sums(weight), Sums(weight)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in source:
            h, along, down = (one.bfloat16() for one in batch)
            unrounded.add(*batch)
            rounded.add(h, along, down)
            yield h, along, down

    report = measured(Given(weight), batches(), way)
    ours = {record.label: (record.cosine, record.pearson) for record in report.records}
    exact, before = rounded.scores(), unrounded.scores()
    return {
        "width": width,
        "rows": rounded.rows,
        "way": way,
        "float64": exact,
        "summed": {name: _apart(ours[name], pair) for name, pair in exact.items()},
        "rounded": {name: _apart(before[name], pair) for name, pair in exact.items()},
    }


def _apart(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return abs(one[0] - other[0]), abs(one[1] - other[1])


def accuracy(*, quick: bool = False) -> list[dict[str, Any]]:
    """Every case; ``quick``: only to see that everything runs."""
    cases, rows = (_QUICK_CASES, _QUICK_ROWS) if quick else (CASES, ROWS)
    return [compared(width, rows, way) for width, way in cases]


def worst(one: Mapping[str, Any], kind: str = "summed") -> float:
    """The largest difference of any score: "summed" by the probe, or "rounded" to begin with."""
    return max(difference for pair in one[kind].values() for difference in pair)
