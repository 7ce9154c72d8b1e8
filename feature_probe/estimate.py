"""What probing will cost, before anything is attached: bytes, and work in units of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feature_probe.capture.selection import select_output
from feature_probe.capture.shadow import eagerly
from feature_probe.errors import positive_integer
from feature_probe.layers.targets import Selection, Target, find_targets
from feature_probe.models import unwrap
from feature_probe.pacing.budget import nice
from feature_probe.pacing.pace import DEFAULT_BUDGET
from feature_probe.reports.scoring import LayerFacts, score_layer
from feature_probe.sums.jacobian import JacobianSettings
from feature_probe.sums.outer import KEPT, sum_dtype
from feature_probe.sums.trajectory import RING
from feature_probe.theory.projection import MAX_DIM, Subspace
from feature_probe.theory.relations import (
    LayerStatistics,
    Relation,
    Sum,
    clamp_tolerance,
    parse_powers,
    parse_relations,
)


@dataclass(frozen=True)
class LayerEstimate:
    """One layer's share.

    Attributes:
        layer: Name.
        rows: Rows (examples × positions × calls) of one forward pass on the sample.
        sum_bytes: Bytes of its sums G, K and E.
        initial_bytes: Bytes of its weight before training, for the init-centred relations.
        path_bytes: Most bytes of its path: the window's first weight, the running sum of weights
            where the decay is decoupled, three numbers a row of the latest 32 steps.
        forward_flops: Multiply-adds × 2 of its forward matrix product.
        gram_flops: The same for adding one forward pass to K and E.
    """

    layer: str
    rows: int
    sum_bytes: int
    initial_bytes: int
    path_bytes: int
    forward_flops: float
    gram_flops: float


@dataclass(frozen=True)
class Estimate:
    """Cost of probing: steps from shapes, by their matrix products alone; reports as timed here.

    Attributes:
        layers: Per layer.
        bytes_held: Bytes of the sums and paths held through a window; with ``jackknife``, of the
            groups' sums that ``measure`` holds.
        bytes_peak: The same inside a window's step, where a step's sums stand beside the window's.
        step_ratio: Arithmetic of a step inside a window over that of a plain step, which is three
            times the forward pass (the first layer needs no input gradient).
        report_seconds: Scoring every layer once, timed on this machine on random sums.
        step_seconds: A plain step, taken as three times the sample's forward pass as timed here.
    """

    layers: tuple[LayerEstimate, ...]
    bytes_held: int
    bytes_peak: int
    step_ratio: float
    report_seconds: float
    step_seconds: float

    def amortised(self, every: int, window: int) -> float:
        """Mean step over a plain one: ``window`` probed steps and a report in every ``every``."""
        probed = (self.step_ratio - 1) * min(window, every)
        return 1 + (probed + self.report_seconds / self.step_seconds) / every

    def interval(self, budget: float = DEFAULT_BUDGET, window: int = 4) -> int:
        """Steps between two reports that keep probing within a share of the training's time.

        As in :class:`feature_probe.pacing.budget.Budget`, which measures what is estimated here.
        """
        probed = (self.step_ratio - 1) * window + self.report_seconds / self.step_seconds
        return max(nice(probed / budget), window)

    def __str__(self) -> str:
        rows = [
            f"{entry.layer}: {entry.rows} rows, "
            f"{_size(entry.sum_bytes + entry.initial_bytes + entry.path_bytes)}"
            for entry in self.layers
        ]
        return "\n".join(
            [
                f"sums: {_size(self.bytes_held)} held, {_size(self.bytes_peak)} at most; "
                f"a step inside a window costs about {self.step_ratio:.2f} plain steps",
                f"a report takes about {self.report_seconds:.2g} s here, "
                f"{self.report_seconds / self.step_seconds:.3g} plain steps; with window=4 a "
                f"report every {self.interval()} steps takes {100 * DEFAULT_BUDGET:g} % of the "
                f"training's time, one every 100 takes {100 * (self.amortised(100, 4) - 1):.2g} %",
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
    powers: Iterable[float] | float = (0.5, 1.0),
    include: Selection = None,
    exclude: Selection = None,
    output: Callable[[Any], Any] | None = None,
    jacobian: Literal["exact", "random"] = "random",
    num_probes: int = 1,
    window: int = 4,
    max_dim: int = MAX_DIM,
    jackknife: int | None = None,
) -> Estimate:
    """What probing ``model`` on batches like ``sample`` will cost.

    The model runs twice on the sample, in evaluation mode without gradients, the second time for
    the clock, and one layer of each shape is scored on random sums; modes and random state are as
    before afterwards.

    Args:
        model: The module that would be probed.
        sample: What ``model`` is called with: one input, or a tuple of positional arguments.
        relations: As for the probe; likewise the options below.
        powers: The powers s.
        include: Layers to measure.
        exclude: Layers to leave out.
        output: Picks f out of what the model returns; "exact" counts its coordinates.
        jacobian: "exact" or "random".
        num_probes: Random products per forward pass.
        window: Steps per window; with one, no second set of sums is held.
        max_dim: Dimension of the subspace of wider layers.
        jackknife: Groups, for what ``measure(jackknife=...)`` will hold: no window, no path.

    Raises:
        ConfigurationError: as for the probe.
    """
    positive_integer("window", window)
    positive_integer("max_dim", max_dim)
    model = unwrap(model)
    targets = find_targets(model, include, exclude)
    asked = parse_relations(relations)
    needs = frozenset(needs for relation in asked for needs in relation.sums)
    copies = any(r.needs_initial_weights for r in asked) + any(
        r.needs_initial_network for r in asked
    )
    settings = JacobianSettings(jacobian, num_probes)
    rows, products, seconds = _run(model, targets, sample, settings, output)
    passes = None if jackknife is not None else window
    layers = tuple(
        _layer(target, count, needs, products, max_dim, copies, passes)
        for target, count in zip(targets, rows, strict=True)
    )
    forward = sum(entry.forward_flops for entry in layers)
    first = layers[0].forward_flops
    plain = 3 * forward - first
    extra = sum(entry.gram_flops for entry in layers)
    if needs & {"jacobian", "jacobian_change"}:
        extra += products * (forward - first)  # activation-only backward passes
    if "jacobian_change" in needs:  # and those of the initial network, after a forward pass
        extra += forward + products * (forward - first)
    sums = sum(entry.sum_bytes for entry in layers)
    paths = sum(entry.path_bytes + entry.initial_bytes for entry in layers)
    held, peak = sums + paths, sums * (2 if window > 1 else 1) + paths
    if jackknife is not None:  # the groups, all of them together, and a batch or a layer less one
        positive_integer("jackknife", jackknife)
        held = sums * (jackknife + 1)
        peak = held + sums
    return Estimate(
        layers=layers,
        bytes_held=held,
        bytes_peak=peak,
        step_ratio=1 + extra / plain if plain else float("nan"),
        report_seconds=_report_seconds(targets, asked, parse_powers(powers), max_dim),
        step_seconds=3 * seconds,
    )


def _layer(
    target: Target,
    rows: int,
    needs: frozenset[Sum],
    products: int,
    max_dim: int,
    copies: int,
    passes: int | None,
) -> LayerEstimate:
    """One layer's share; ``passes`` go into a window, None: it is not known how many."""
    kinds = needs & {"jacobian", "loss", "jacobian_change"}
    width = min(target.d_out, max_dim)
    weight = target.groups * target.d_out * target.d_in
    square = target.groups * width**2
    dtypes = [p.dtype for p in target.module.parameters() if p.is_floating_point()]
    size = sum_dtype(dtypes[0] if dtypes else torch.float32).itemsize
    path = RING * 6 * size * target.groups * target.d_out
    if needs & {"gradient", "update"}:
        path += weight * size * (1 + ("update" in needs))
    else:
        path = 0
    held = 0
    for kind in kinds:
        kept = None if passes is None else passes * rows * (1 if kind == "loss" else products)
        few = kept is not None and kept <= KEPT * width
        held += target.groups * width * kept if kept is not None and few else square
    frame = weight if kinds and Subspace.has_frame(target.d_out, target.d_in, max_dim) else 0
    repeats = products * len(kinds - {"loss"}) + ("loss" in needs)
    return LayerEstimate(
        layer=target.name,
        rows=rows,
        initial_bytes=weight * size * copies,
        path_bytes=path,
        sum_bytes=size * (held + frame + weight * ("gradient" in needs)),
        forward_flops=2.0 * rows * weight,
        gram_flops=2.0 * rows * square * repeats,
    )


def _run(
    model: nn.Module,
    targets: list[Target],
    sample: Any,
    settings: JacobianSettings,
    output: Callable[[Any], Any] | None,
) -> tuple[list[int], int, float]:
    """Rows of every target in one forward pass, Jacobian products per pass, and its seconds."""
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
        with eagerly(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            inputs = sample if isinstance(sample, tuple) else (sample,)
            out = model(*inputs)
            for handle in handles:
                handle.remove()
            start = time.perf_counter()
            model(*inputs)
            seconds = time.perf_counter() - start
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if settings.kind == "random":
        return rows, settings.num_probes, seconds
    return rows, settings.products(select_output(out, output)), seconds


def _report_seconds(
    targets: list[Target], relations: Sequence[Relation], powers: Sequence[float], max_dim: int
) -> float:
    """Time to score every layer, by one layer of each shape on random sums of full rank."""
    timed: dict[tuple[int, int, int], float] = {}
    generator = torch.Generator().manual_seed(0)
    shapes = [(target.groups, target.d_out, target.d_in) for target in targets]
    for shape in ((1, 2, 3), *shapes):  # the first call of all starts up the linear algebra
        if shape in timed:
            continue
        weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        width = min(shape[1], max_dim)
        rows = torch.randn((shape[0], width, width), generator=generator)
        square = rows @ rows.mT
        statistics = LayerStatistics(
            weight, gradient, square, square, 1.0, clamp_tolerance(torch.float32),
            subspace=Subspace.within(shape[1], max_dim),
        )  # fmt: skip
        start = time.perf_counter()
        score_layer(LayerFacts("", 0, 1, 1, {}), statistics, relations, powers)
        timed[shape] = time.perf_counter() - start
    return sum(timed[shape] for shape in shapes)
