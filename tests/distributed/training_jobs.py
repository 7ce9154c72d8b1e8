"""Training loops of one process and of several: the same data, dealt out or accumulated."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from window_jobs import counted

from feature_probe import FeatureProbe, measure


class Blocks(nn.Module):
    """Linear blocks, one of them used on the first rank alone if asked, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.extra = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        """Logits."""
        for block in self.blocks:
            x = torch.tanh(block(x))
        if extra:
            x = x + torch.tanh(self.extra(x))
        out: Tensor = self.head(x)
        return out


class Convolutional(nn.Module):
    """Convolutions, the second grouped, with channels that ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 2)
        self.second = nn.Conv2d(6, 3, 2, groups=3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        """Logits of ``[n, 6]``, read as images of 2 × 3."""
        x = F.pad(x.view(-1, 1, 2, 3), (1, 1, 1, 1))
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Computed(nn.Module):
    """A weight that is computed, one used without a layer, a subclass and packed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.w = nn.Parameter(torch.randn(6, 6) / 3)
        self.own = Scaled(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        """Logits."""
        x = self.normed(x) if extra else x
        x = torch.tanh(self.own(torch.tanh(x @ self.w)))
        x = torch.stack([x, x.roll(1, -1)], 1)
        x, _ = self.attention(x, x, x, need_weights=False)
        out: Tensor = self.head(x[:, 0])
        return out


class Scaled(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Half of what a linear layer gives."""
        return F.linear(x, self.weight, self.bias) / 2


class Traffic(TorchDispatchMode):
    """Counts every collective that goes through the dispatcher, whoever called it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.operations.append(func.name())
        return func(*args, **(kwargs or {}))


MODELS = {"blocks": Blocks, "convolutional": Convolutional, "computed": Computed}


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        model: A key of MODELS.
        wrapper: How the model is spread: "ddp", "fsdp" (blocks and root), "fsdp root", "none".
        sizes: Examples of each rank's batch, by rank, in turn over the micro-batches of a step.
        micro: Micro-batches of a rank and step.
        extra: Whether all ranks use the branch; else the first alone.
        ddp: Options of DDP.
        policy: Lower precision under fully_shard.
        jacobian: As the probe's.
        probed: Whether the probe watches.
        every: As the probe's.
        steps: How many.
        dtype: Of weights and data.
        log_dir: As the probe's.
        relations: As the probe's.
        strict: As the probe's.
        device: "cpu" or "cuda".
        traced: Whether all communication is counted, the model's own included.
        resumed: Whether the probe is replaced after the second step, in mid-window, by one that
            goes on from its saved state.
        blind_on: The rank that cannot form E of the first layer.
        broken_on: The rank on which the probe cannot read the second step.
        structure: As the probe's.
        max_dim: As the probe's.
    """

    model: str = "blocks"
    wrapper: str = "ddp"
    sizes: tuple[int, ...] = (4, 4, 4, 4)
    micro: int = 1
    extra: bool = True
    ddp: dict[str, Any] = field(default_factory=dict)
    policy: bool = False
    jacobian: str = "random"
    probed: bool = True
    every: int = 2
    steps: int = 4
    dtype: torch.dtype = torch.float64
    log_dir: str | None = None
    relations: tuple[str, ...] = ("fact", "fact_sym", "bfact", "nfa", "bnfa", "enfa", "benfa")
    strict: bool = True
    device: str = "cpu"
    traced: bool = False
    resumed: bool = False
    blind_on: int | None = None
    broken_on: int | None = None
    structure: bool = False
    max_dim: int = 4096


def new_model(run: Run) -> nn.Module:
    """The model as every process begins with it."""
    torch.manual_seed(1)
    model = MODELS[run.model]().to(run.dtype)
    if run.device == "cuda" and dist.is_initialized():
        return model.cuda()
    return model


def batch(run: Run, step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's micro-batch; rank and micro-batch alone decide its size."""
    n = run.sizes[(rank + micro) % len(run.sizes)]
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x = torch.randn(n, 6, generator=generator, dtype=run.dtype)
    y = torch.randint(0, 3, (n,), generator=generator)
    return (x.cuda(), y.cuda()) if run.device == "cuda" and dist.is_initialized() else (x, y)


def wrapped(run: Run, model: nn.Module) -> nn.Module:
    """The model in the run's wrapper."""
    if run.wrapper == "ddp":
        return DistributedDataParallel(model, **run.ddp)
    options: dict[str, Any] = {"mesh": init_device_mesh(run.device, (dist.get_world_size(),))}
    if run.policy:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if run.wrapper == "fsdp":
        for child in list(model.children()):
            if isinstance(child, nn.MultiheadAttention):
                continue  # left to the root: it returns a view, of which FSDP warns
            parts = list(child) if isinstance(child, nn.ModuleList) else [child]
            for part in parts:
                fully_shard(part, **options)
    if run.wrapper.startswith("fsdp"):
        fully_shard(model, **options)
    return model


def new_probe(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any
) -> FeatureProbe:
    """The run's probe."""
    return FeatureProbe(
        model, optimizer=optimizer, every=run.every, window=2, strict=run.strict,
        log_dir=run.log_dir, jacobian=run.jacobian, relations=run.relations, powers=1.0,
        keep_matrices=True, structure=run.structure,
        max_dim=run.max_dim, **more,
    )  # type: ignore[arg-type]  # fmt: skip


@contextlib.contextmanager
def unsynchronised(run: Run, model: nn.Module, micro: int) -> Iterator[None]:
    """All but the last micro-batch of a step are not averaged over ranks."""
    last = micro == run.micro - 1
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if run.wrapper.startswith("fsdp"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    yield


def train(run: Run) -> dict[str, Any]:
    """The run on this rank: its reports, its last weights, and the collectives of the probe."""
    rank = dist.get_rank()
    if run.log_dir is not None:
        run = replace(run, log_dir=f"{run.log_dir}/{rank}")
    model = wrapped(run, new_model(run))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    probe = new_probe(run, model, optimizer)
    reports: list[Any] = []
    calls: list[list[str]] = []
    traffic: list[list[str]] = []
    if run.probed:
        probe.attach()
    if run.blind_on == rank:
        probe._observer.problems[0, "loss"] = "not seen here"
    if run.broken_on == rank:
        _break_second_step(probe)
    for step in range(run.steps):
        trace = Traffic() if run.traced else contextlib.nullcontext()
        with counted() as made, warnings.catch_warnings(), trace:
            if run.traced:  # under which a linear layer's output is a view
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            optimizer.zero_grad()
            for micro in range(run.micro):
                x, y = batch(run, step, micro, rank)
                with unsynchronised(run, model, micro):
                    out = model(x, run.extra or rank == 0)
                    (F.cross_entropy(out.to(run.dtype), y) / run.micro).backward()
            optimizer.step()
        if run.resumed and step == 1:
            probe = _resumed(run, probe, model, optimizer)
        calls.append(made)
        if run.traced:
            traffic.append(trace.operations)
        if probe.report is not None and (not reports or probe.report is not reports[-1]):
            reports.append(probe.report)
    if run.probed:
        probe.detach()
    return {
        "reports": [plain(report) for report in reports],
        "weights": [_whole(p).cpu() for p in model.parameters()],
        "calls": calls,
        "traffic": traffic,
        "faults": probe.faults,
    }


def paced(budget: float, steps: int) -> dict[str, Any]:
    """Which steps a budget reports on this rank, whose probe works as slowly as its number."""
    rank = dist.get_rank()
    run = Run()
    model = wrapped(run, new_model(run))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[int] = []
    with FeatureProbe(model, optimizer=optimizer, budget=budget, strict=True) as probe:
        reduce = probe._ranks.reduce

        def slow(*args: Any, **kwargs: Any) -> Any:
            reduced = reduce(*args, **kwargs)
            time.sleep(0.05 * rank)
            return reduced

        probe._ranks.reduce = slow  # type: ignore[method-assign]
        for step in range(steps):
            optimizer.zero_grad()
            x, y = batch(run, step, 0, rank)
            F.cross_entropy(model(x, True), y).backward()
            optimizer.step()
            if probe.report is not None and (probe.report.records[0].step not in found):
                found.append(probe.report.records[0].step)
        report = probe.report
    assert report is not None
    return {"steps": found, "cost": report.settings["cost"], "own": probe._pace.cost.report_seconds}


def accumulate(run: Run, ranks: int) -> dict[str, Any]:
    """The same in one process, which accumulates the ranks' batches as micro-batches."""
    model = new_model(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    reports: list[Any] = []
    with new_probe(replace(run, log_dir=None), model, optimizer) as probe:
        for step in range(run.steps):
            optimizer.zero_grad()
            for micro in range(run.micro):
                for rank in range(ranks):
                    x, y = batch(run, step, micro, rank)
                    out = model(x, run.extra or rank == 0)
                    (F.cross_entropy(out, y) / (run.micro * ranks)).backward()
            optimizer.step()
            if probe.report is not None and (not reports or probe.report is not reports[-1]):
                reports.append(probe.report)
    weights = [p.detach() for p in model.parameters()]
    return {"reports": [plain(report) for report in reports], "weights": weights}


def in_one_batch(run: Run, ranks: int) -> dict[str, Any]:
    """The same in one process, with the union of the ranks' batches as its batch."""
    model = new_model(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    reports: list[Any] = []
    with new_probe(run, model, optimizer) as probe:
        for step in range(run.steps):
            optimizer.zero_grad()
            parts = [batch(run, step, 0, rank) for rank in range(ranks)]
            x, y = (torch.cat(values) for values in zip(*parts, strict=True))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if probe.report is not None and (not reports or probe.report is not reports[-1]):
                reports.append(probe.report)
    return {"reports": [plain(report) for report in reports]}


def measured(run: Run, batches: dict[int, list[int]]) -> dict[str, Any]:
    """``measure`` of the whole data: all of it, or the batches that are this rank's share."""
    model = new_model(run)
    if dist.is_initialized():
        numbers = batches[dist.get_rank()]
        model = wrapped(run, model)
    else:
        numbers = [number for share in batches.values() for number in share]
    loader = [batch(run, number, 0, number) for number in numbers]
    with counted() as calls:
        report = measure(
            model, loader, F.cross_entropy, weight_decay=1e-2, progress=False, powers=1.0,
            relations=run.relations,
        )  # fmt: skip
    return plain(report) | {"calls": calls}


def plain(report: Any) -> dict[str, Any]:
    """What a report says, with the sums it was made from."""
    sums = {
        f"{layer} {name}": _on_host(getattr(statistics, name))
        for layer, statistics in report.statistics.items()
        for name in ("weight", "gradient", "jacobian", "loss")
    }
    return {
        "step": report.step,
        "records": [vars(record) for record in report.records],
        "share": report.coverage.share(),
        "settings": dict(report.settings),
        "sums": sums,
        "structures": [structure.to_dict() for structure in report.structures],
    }


def _on_host(total: Tensor | None) -> Tensor | None:
    return None if total is None else total.cpu()


def _whole(parameter: Tensor) -> Tensor:
    full_tensor = getattr(parameter, "full_tensor", None)
    return (parameter if full_tensor is None else full_tensor()).detach()


def _resumed(
    run: Run, probe: FeatureProbe, model: nn.Module, optimizer: torch.optim.Optimizer
) -> FeatureProbe:
    """Another probe with the state of the first, which went through a file."""
    file = io.BytesIO()
    torch.save(probe.state_dict(), file)
    probe.detach()
    file.seek(0)
    after = new_probe(run, model, optimizer)
    after.load_state_dict(torch.load(file, weights_only=True))
    return after.attach()


def _break_second_step(probe: FeatureProbe) -> None:
    ready, steps = probe._collector.ready, [0]

    def broken(*args: Any, **kwargs: Any) -> bool:
        steps[0] += 1
        if steps[0] == 2:
            raise RuntimeError("broken on purpose")
        return ready(*args, **kwargs)

    probe._collector.ready = broken  # type: ignore[method-assign]


def lose_a_rank(run: Run, how: str, patience: float) -> dict[str, Any]:
    """Train without DDP, so that the probe alone communicates; the last rank goes at step 1."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=patience))
    last = dist.get_rank() == dist.get_world_size() - 1
    model = new_model(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = new_probe(run, model, optimizer, process_group=group)
    began = time.monotonic()
    with probe:
        for step in range(run.steps):
            if last and step == 1:
                if how == "exits":
                    os._exit(1)
                probe.detach()
                time.sleep(patience + 1)
                break
            x, y = batch(run, step, 0, 0)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return {
        "seconds": time.monotonic() - began,
        "faults": probe.faults,
        "step": None if probe.report is None else probe.report.step,
        "weights": [p.detach() for p in model.parameters()],
    }


def train_until_data_runs_out(run: Run) -> dict[str, Any]:
    """Under DDP's ``join()``, the first rank with half of the others' batches."""
    rank = dist.get_rank()
    model = DistributedDataParallel(new_model(run))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = new_probe(run, model, optimizer)
    with counted() as calls, probe, model.join():
        for step in range(run.steps // 2 if rank == 0 else run.steps):
            x, y = batch(run, step, 0, rank)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return {"calls": calls, "faults": probe.faults, "report": probe.report}
