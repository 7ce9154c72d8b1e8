"""What the ranks of a process group tell each other before their sums are added up.

From the same headers every rank draws the same conclusions: what is sent, in which order, whose
tensor counts, and whether the ranks belong together at all. So no rank waits for what another does
not send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from feature_probe.capture.sharding import is_sharded
from feature_probe.errors import FeatureProbeError
from feature_probe.processes.packing import Slot
from feature_probe.sums.moments import Moments
from feature_probe.sums.window import Window
from feature_probe.theory.relations import Sum

#: How the ranks' gradient sums become one. "shared": they are the same on all ranks already.
#: "mean": the mean over ranks. "sum": their sum, with the sum of their weights.
Held = Literal["shared", "mean", "sum"]

#: A target's name, and one of its sums or its weight.
Key: TypeAlias = tuple[str, Literal["weight"] | Sum]

_KINDS: tuple[Sum, ...] = ("gradient", "jacobian", "loss", "jacobian_change")
#: The sums over the entries of two unrelated weights differ by about √2 norms, those of copies
#: that are trained together by rounding.
_SAME_WEIGHT = 0.05
_SCHEDULE = (
    "Every rank must be given the same schedule (every, window) and be attached at the same step"
)
_MODEL = (
    "The ranks of a process group must train one model; where each trains its own, give "
    "process_group=None"
)


@dataclass(frozen=True)
class Layer:
    """One rank's sums of a target, without the sums.

    Attributes:
        held: How the gradient sums become one.
        counts: Weights and rows.
        shapes: Of the sums that there are.
        dtypes: The same.
        sharded_gradient: Whether the gradient sum is a shard.
        sharded_weight: Whether the weight is.
        weight: Its shape and dtype; None where it is sharded or this rank has none, as of a layer
            that computes its weight and that this rank never called.
        checksum: Sum and norm of the weight; empty where it is sharded or missing.
        depth: Its number from the output in a chain of layers; None where this rank saw no chain.
    """

    held: Held
    counts: Moments
    shapes: dict[Sum, tuple[int, ...]]
    dtypes: dict[Sum, torch.dtype]
    sharded_gradient: bool
    sharded_weight: bool
    weight: tuple[tuple[int, ...], torch.dtype] | None
    checksum: tuple[float, ...]
    depth: int | None = None

    @classmethod
    def of(
        cls,
        moments: Moments,
        held: Held,
        weight: Tensor | None,
        checksum: tuple[float, ...],
        depth: int | None = None,
    ) -> Layer:
        """The description of a target's sums."""
        sums = {kind: getattr(moments, kind) for kind in _KINDS}
        return cls(
            held=held,
            counts=moments.counts(),
            shapes={kind: tuple(t.shape) for kind, t in sums.items() if t is not None},
            dtypes={kind: t.dtype for kind, t in sums.items() if t is not None},
            sharded_gradient=is_sharded(moments.gradient),
            sharded_weight=is_sharded(weight),
            weight=_description(weight),
            checksum=checksum,
            depth=depth,
        )


@dataclass(frozen=True)
class Header:
    """What one rank tells the others.

    Attributes:
        step: The step of its report.
        layers: Its targets, by name.
        problems: Why it could not measure a sum.
        steps: Optimizer steps in its window.
        examples: n of its window.
        left_out: Steps it left out.
        discarded: Steps whose gradients no optimizer used.
        failure: Why it cannot take part; "" if it can.
    """

    step: int
    layers: dict[str, Layer] = field(default_factory=dict)
    problems: dict[Key, str] = field(default_factory=dict)
    steps: int = 0
    examples: int = 0
    left_out: int = 0
    discarded: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Union:
    """The headers of all ranks, in their order, and what follows from them."""

    headers: Sequence[Header]

    @cached_property
    def names(self) -> list[str]:
        """The targets that any rank has met."""
        return list(dict.fromkeys(name for header in self.headers for name in header.layers))

    def check(self) -> None:
        """Refuse what cannot be added up.

        Raises:
            FeatureProbeError: if a rank failed, the ranks are at different steps, or they train
                different models.
        """
        for rank, header in enumerate(self.headers):
            if header.failure:
                raise FeatureProbeError(f"rank {rank} cannot take part: {header.failure}")
        _alike({rank: header.step for rank, header in enumerate(self.headers)}, "step", _SCHEDULE)
        for name in self.names:
            layers = self._layers(name)
            for kind in _KINDS:
                shapes = {r: layer.shapes[kind] for r, layer in layers if kind in layer.shapes}
                _alike(shapes, f"shape of the {kind} sum of {name}", _MODEL)
            checksums = {rank: layer.checksum for rank, layer in layers if layer.checksum}
            if any(_unlike(next(iter(checksums.values())), other) for other in checksums.values()):
                _alike(checksums, f"sum and norm of the weight of {name}", _MODEL)

    @cached_property
    def problems(self) -> dict[Key, str]:
        """Why a sum is not measured: what any rank says, and what no exchange can mend."""
        found: dict[Key, str] = {}
        for name in self.names:
            gradient = self._gradient_problem(name)
            if gradient:
                found[name, "gradient"] = gradient
            if self._is_sharded(name) and not self._everywhere(name):
                reason = "only some ranks have met it, so its sharded weight was not gathered"
                found |= {(name, kind): reason for kind in _KINDS}
        for header in reversed(self.headers):
            found |= header.problems
        return found

    @property
    def depths(self) -> dict[str, int]:
        """Where the layers are one chain on all ranks: the number of each from the output."""
        own = {
            tuple((name, layer.depth) for name, layer in sorted(header.layers.items()))
            for header in self.headers
        }
        if len(own) > 1:
            return {}
        return {name: depth for name, depth in next(iter(own)) if depth is not None}

    @property
    def sharded_weights(self) -> list[str]:
        """Targets whose weights all ranks gather, in the order in which they do."""
        return [name for name in self.names if self._is_sharded(name) and self._everywhere(name)]

    @property
    def sharded_gradients(self) -> list[str]:
        """Targets whose gradient sums all ranks gather, in the order in which they do."""
        return [
            name
            for name in self.sharded_weights
            if (name, "gradient") not in self.problems
            and any(layer.sharded_gradient for _, layer in self._layers(name))
        ]

    @cached_property
    def slots(self) -> dict[Key, Slot]:
        """What adds up, in the order in which it travels."""
        slots: dict[Key, Slot] = {}
        for name in self.names:
            for kind in _KINDS:
                holders = self._holders(name, kind)
                if (name, kind) in self.problems or not self.sources((name, kind)):
                    continue
                dtype = reduce(
                    torch.promote_types, (layer.dtypes[kind] for layer in holders.values())
                )
                shape = next(iter(holders.values())).shapes[kind]
                slots[name, kind] = Slot(shape, dtype, symmetric=kind != "gradient")
            given = [
                layer.weight for rank, layer in self._layers(name) if rank in self._givers(name)
            ]
            if given and given[0] is not None:
                slots[name, "weight"] = Slot(*given[0], symmetric=False)
        return slots

    def sources(self, key: Key) -> list[int]:
        """The ranks whose tensors are added; none where nothing travels."""
        name, kind = key
        if kind == "weight":
            return self._givers(name)
        holders = self._holders(name, kind)
        if kind != "gradient" or any(layer.held != "shared" for layer in holders.values()):
            return list(holders)
        if any(layer.sharded_gradient for layer in holders.values()):
            return []
        weights = [self._weight(rank, name) for rank in range(len(self.headers))]
        if len(set(weights)) == 1:
            return []
        # a rank left a step out after a fault: the sum that has the most steps in it is everyone's
        return [weights.index(max(weights))]

    def counts(self, names: Sequence[str]) -> Window:
        """The window of all ranks, without the sums, for targets in the order given."""
        window = Window(
            layers=[self._counts(name) for name in names],
            steps=max(header.steps for header in self.headers),
            examples=sum(header.examples for header in self.headers),
            left_out=max(header.left_out for header in self.headers),
            discarded=max(header.discarded for header in self.headers),
        )
        for index, name in enumerate(names):
            for kind in _KINDS:
                if (name, kind) in self.problems:
                    window.problems[index, kind] = self.problems[name, kind]
        return window

    def _counts(self, name: str) -> Moments:
        layers = self._layers(name)
        weights = [layer.counts.gradient_weight for _, layer in layers]
        held = {layer.held for layer in self._holders(name, "gradient").values()}
        if "sum" in held:
            weight = sum(weights)
        else:  # steps, which the ranks take together
            weight = max(weights) * (len(self.headers) if "mean" in held else 1)
        return Moments(
            gradient_weight=weight,
            jacobian_rows=sum(layer.counts.jacobian_rows for _, layer in layers),
            loss_rows=sum(layer.counts.loss_rows for _, layer in layers),
        )

    def _gradient_problem(self, name: str) -> str:
        holders = self._holders(name, "gradient")
        if len({layer.held for layer in holders.values()}) > 1:
            return "the ranks compute its weight in different ways"
        sharded = any(layer.sharded_gradient for layer in holders.values())
        weights = {self._weight(rank, name) for rank in range(len(self.headers))}
        if sharded and len(weights) > 1:
            return "the ranks counted different steps, so that its shards do not belong together"
        return ""

    def _givers(self, name: str) -> list[int]:
        """The rank whose weight others take that have none; empty where none is missing."""
        layers = self._layers(name)
        if all(layer.weight is not None or layer.sharded_weight for _, layer in layers):
            return []
        return [rank for rank, layer in layers if layer.weight is not None][:1]

    def _layers(self, name: str) -> list[tuple[int, Layer]]:
        return [(r, h.layers[name]) for r, h in enumerate(self.headers) if name in h.layers]

    def _holders(self, name: str, kind: Sum) -> dict[int, Layer]:
        return {rank: layer for rank, layer in self._layers(name) if kind in layer.shapes}

    def _weight(self, rank: int, name: str) -> float:
        layer = self._holders(name, "gradient").get(rank)
        return 0.0 if layer is None else layer.counts.gradient_weight

    def _is_sharded(self, name: str) -> bool:
        return any(layer.sharded_weight for _, layer in self._layers(name))

    def _everywhere(self, name: str) -> bool:
        return len(self._layers(name)) == len(self.headers)


def _description(weight: Tensor | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    if weight is None or is_sharded(weight):
        return None
    return tuple(weight.shape), weight.dtype


def _alike(values: Mapping[int, object], what: str, remedy: str) -> None:
    """Raise unless all ranks say the same."""
    by_value: dict[object, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(rank)
    if len(by_value) > 1:
        told = "; ".join(f"{value} on rank {ranks[0]}" for value, ranks in by_value.items())
        raise FeatureProbeError(f"the ranks came to a report with another {what}: {told}. {remedy}")


def _unlike(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two checksums are of unrelated weights; NaN is like anything."""
    return abs(a[0] - b[0]) > _SAME_WEIGHT * max(a[1], b[1])
