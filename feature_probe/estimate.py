"""What probing will cost, before anything is attached: bytes, and work in units of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feature_probe.errors import positive_integer
from feature_probe.jacobian import JacobianSettings
from feature_probe.models import unwrap
from feature_probe.moments import sum_dtype
from feature_probe.observer import select_output
from feature_probe.relations import Sum, parse_relations
from feature_probe.targets import Selection, Target, find_targets


@dataclass(frozen=True)
class LayerEstimate:
    """One layer's share.

    Attributes:
        layer: Name.
        rows: Rows (examples × positions × calls) of one forward pass on the sample.
        sum_bytes: Bytes of its sums G, K and E.
        forward_flops: Multiply-adds × 2 of its forward matrix product.
        gram_flops: The same for adding one forward pass to K and E.
    """

    layer: str
    rows: int
    sum_bytes: int
    forward_flops: float
    gram_flops: float


@dataclass(frozen=True)
class Estimate:
    """Cost of probing, from shapes alone; work outside matrix products is not counted.

    Attributes:
        layers: Per layer.
        bytes_held: Bytes of the sums held through a window.
        bytes_peak: The same inside a window's step, where a step's sums stand beside the window's.
        step_ratio: Arithmetic of a step inside a window over that of a plain step, which is three
            times the forward pass (the first layer needs no input gradient).
    """

    layers: tuple[LayerEstimate, ...]
    bytes_held: int
    bytes_peak: int
    step_ratio: float

    def amortised(self, every: int, window: int) -> float:
        """Mean step over a plain one with ``window`` probed steps in every ``every``, no report."""
        return 1 + (self.step_ratio - 1) * min(window, every) / every

    def __str__(self) -> str:
        rows = [
            f"{entry.layer}: {entry.rows} rows, {_size(entry.sum_bytes)}" for entry in self.layers
        ]
        return "\n".join(
            [
                f"sums: {_size(self.bytes_held)} held, {_size(self.bytes_peak)} at most; "
                f"a step inside a window costs about {self.step_ratio:.2f} plain steps",
                *rows,
            ]
        )


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def estimate_cost(
    model: nn.Module,
    sample: Any,
    *,
    relations: Iterable[str] | str = ("fact", "bfact", "nfa", "enfa"),
    include: Selection = None,
    exclude: Selection = None,
    output: Callable[[Any], Any] | None = None,
    jacobian: Literal["exact", "random"] = "random",
    num_probes: int = 1,
    window: int = 4,
    max_dim: int = 8192,
) -> Estimate:
    """What probing ``model`` on batches like ``sample`` will cost.

    The model runs once on the sample, in evaluation mode without gradients; modes and random state
    are as before afterwards.

    Args:
        model: The module that would be probed.
        sample: What ``model`` is called with: one input, or a tuple of positional arguments.
        relations: As for the probe; likewise the options below.
        include: Layers to measure.
        exclude: Layers to leave out.
        output: Picks f out of what the model returns; "exact" counts its coordinates.
        jacobian: "exact" or "random".
        num_probes: Random products per forward pass.
        window: Steps per window; with one, no second set of sums is held.
        max_dim: Widest d_out with K and E.

    Raises:
        ConfigurationError: as for the probe.
    """
    positive_integer("window", window)
    positive_integer("max_dim", max_dim)
    model = unwrap(model)
    targets = find_targets(model, include, exclude)
    needs = frozenset(relation.needs for relation in parse_relations(relations))
    settings = JacobianSettings(jacobian, num_probes)
    rows, products = _run(model, targets, sample, settings, output)
    layers = tuple(
        _layer(target, count, needs, products, max_dim)
        for target, count in zip(targets, rows, strict=True)
    )
    forward = sum(entry.forward_flops for entry in layers)
    first = layers[0].forward_flops
    plain = 3 * forward - first
    extra = sum(entry.gram_flops for entry in layers)
    if "jacobian" in needs:
        extra += products * (forward - first)  # activation-only backward passes
    held = sum(entry.sum_bytes for entry in layers)
    return Estimate(
        layers=layers,
        bytes_held=held,
        bytes_peak=held * (2 if window > 1 else 1),
        step_ratio=1 + extra / plain if plain else float("nan"),
    )


def _layer(
    target: Target, rows: int, needs: frozenset[Sum], products: int, max_dim: int
) -> LayerEstimate:
    grams = sum(kind in needs for kind in ("jacobian", "loss")) if target.d_out <= max_dim else 0
    weight = target.groups * target.d_out * target.d_in
    square = target.groups * target.d_out**2
    dtypes = [p.dtype for p in target.module.parameters() if p.is_floating_point()]
    size = sum_dtype(dtypes[0] if dtypes else torch.float32).itemsize
    repeats = products * ("jacobian" in needs) + ("loss" in needs)
    return LayerEstimate(
        layer=target.name,
        rows=rows,
        sum_bytes=size * (grams * square + weight * ("gradient" in needs)),
        forward_flops=2.0 * rows * weight,
        gram_flops=2.0 * rows * square * repeats if grams else 0.0,
    )


def _run(
    model: nn.Module,
    targets: list[Target],
    sample: Any,
    settings: JacobianSettings,
    output: Callable[[Any], Any] | None,
) -> tuple[list[int], int]:
    """Rows of every target in one forward pass, and Jacobian products per pass."""
    rows = [0] * len(targets)
    handles = []

    def counter(index: int, module: nn.Module) -> Any:
        def count(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                shape = targets[index].rule.rows(module, out).shape
                rows[index] += shape[0] * shape[1]

        return module.register_forward_hook(count)

    modes = [(module, module.training) for module in model.modules()]
    try:
        handles = [counter(i, m) for i, target in enumerate(targets) for m in target.modules]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            out = model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if settings.kind == "random":
        return rows, settings.num_probes
    return rows, settings.products(select_output(out, output))
