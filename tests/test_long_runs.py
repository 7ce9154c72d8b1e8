"""A hundred thousand steps: bounded memory, bounded files, nothing that waits for the device."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from feature_probe import FeatureProbe, Report, measure
from feature_probe.schedules import at, log_spaced
from feature_probe.sinks import JSONLSink, Sink, TensorBoardSink
from feature_probe.sinks.thinning import Thinning, is_kept

#: Points that a curve, and distributions of a tag, keep in full before they are thinned.
CURVE, DISTRIBUTION = 1000, 50
#: Bytes of one report in an event file, and of one record as JSON; both measured and rounded up.
BYTES_PER_SCALAR, BYTES_PER_HISTOGRAM, BYTES_PER_RECORD = 110, 900, 1_700
#: Of one picture or table, with few layers.
BYTES_PER_PICTURE = 40_000


# --------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def report() -> Report:
    """A report of three layers and two relations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.randn(16, 6), torch.randn(16, 3))]
    made = measure(
        model,
        data,
        nn.functional.mse_loss,
        weight_decay=0.1,
        relations=("fact", "enfa"),
        powers=0.5,
        progress=False,
    )
    return replace(made, statistics={})


def reports(report: Report, count: int) -> Iterator[Report]:
    """The same numbers at every step."""
    for step in range(count):
        yield replace(report, step=step, records=[replace(r, step=step) for r in report.records])


def points(count: int, full: int) -> int:
    """What is left of a series of which all of the first ``full`` are kept, at most."""
    doublings = max(math.log2(count / full), 0.0)
    return math.ceil(min(count, full) + full / 2 * doublings) + 2


def event_bytes(report: Report, count: int, picture: int) -> float:
    """Bound on an event file: logarithmic in the number of reports beyond the first 1000."""
    labels = len(report.labels)
    scalars = labels * 7 + 3
    pictures = 6 + math.log(max(count / 5, 1)) / math.log(1.2)
    return (
        points(count, CURVE) * scalars * BYTES_PER_SCALAR
        + points(count, DISTRIBUTION) * labels * BYTES_PER_HISTOGRAM
        + (pictures + 2) * (labels + 1) * picture
    )


def test_thinning_keeps_all_at_first_and_evenly_spaced_points_later() -> None:
    """Logarithmically many of 100,000, and never fewer than half the full number lately."""
    kept = [index for index in range(100_000) if is_kept(index, 500)]
    assert kept[:1000] == list(range(1000))
    assert len(kept) <= points(100_000, 1000)
    for end in range(1000, 100_000, 777):
        lately = [index for index in kept if end / 2 <= index < end]
        gaps = {b - a for a, b in pairwise(lately)}
        assert len(lately) >= 370
        assert len(gaps) <= 2
        assert max(gaps) <= 2 * min(gaps)


def test_thinning_goes_on_where_it_was() -> None:
    """Its state is two numbers, whatever it has seen."""
    whole = Thinning()
    parts = [whole.next() for _ in range(3000)]
    resumed = Thinning()
    for index, expected in enumerate(parts):
        resumed = Thinning.from_state(resumed.state_dict()) if index % 97 == 0 else resumed
        assert resumed.next() == expected


@pytest.mark.parametrize(
    "count", [1_100, pytest.param(100_000, marks=pytest.mark.slow, id="100000")]
)
def test_files_of_many_reports_stay_bounded(tmp_path: Path, report: Report, count: int) -> None:
    """One report a step: event files grow with the logarithm of the run, records by 1,700 bytes."""
    board, records = TensorBoardSink(tmp_path / "events"), JSONLSink(tmp_path / "records.jsonl")
    sinks: list[Sink] = [board, records]
    for made in reports(report, count):
        for sink in sinks:
            sink.write(made)
    for sink in sinks:
        sink.close()
    events = sum(path.stat().st_size for path in (tmp_path / "events").iterdir())
    assert events < event_bytes(report, count, BYTES_PER_PICTURE)
    written = (tmp_path / "records.jsonl").stat().st_size
    assert written < count * len(report.records) * BYTES_PER_RECORD
    found = EventAccumulator(
        str(tmp_path / "events"), size_guidance=dict.fromkeys(("scalars", "histograms"), 0)
    ).Reload()
    steps = [event.step for event in found.Scalars("feature_probe/fact_median_cosine")]
    assert steps[: min(count, CURVE)] == list(range(min(count, CURVE)))
    assert steps[-1] == count - 1
    assert len(steps) <= points(count, CURVE)
    histograms = found.Histograms("feature_probe.distributions/cosine/fact")
    assert histograms[-1].step == count - 1
    assert len(histograms) <= points(count, DISTRIBUTION)


@pytest.mark.parametrize(
    "count", [1_600, pytest.param(100_000, marks=pytest.mark.slow, id="100000")]
)
def test_memory_of_sinks_stays_bounded(
    tmp_path: Path, report: Report, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sinks keep between reports, all that pictures are drawn from, stops growing."""
    monkeypatch.setattr(Thinning, "next", lambda _: [])  # writing takes time and keeps nothing
    sinks: list[Sink] = [TensorBoardSink(tmp_path / "events"), JSONLSink(tmp_path / "records")]
    tracemalloc.start()
    try:
        half = 0
        for index, made in enumerate(reports(report, count)):
            if index == count // 2:
                gc.collect()
                half, _ = tracemalloc.get_traced_memory()
            for sink in sinks:
                sink.write(made)
        gc.collect()
        end, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert half > 50_000  # the columns of the pictures are full
    assert end - half < 50_000
    for sink in sinks:
        sink.close()


def test_the_state_of_a_sink_is_bounded(tmp_path: Path, report: Report) -> None:
    """At most 256 columns a relation, however many reports there were."""
    sink = TensorBoardSink(tmp_path)
    for made in reports(report, 600):
        sink._remember(made)
    sink.close()
    histories = sink.state_dict()["histories"]
    assert set(histories) == set(report.labels)
    assert all(len(kept["steps"]) <= 256 for kept in histories.values())


# --------------------------------------------------------------------------- the loop


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """A training loop of the cheapest kind."""
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [600, pytest.param(100_000, marks=pytest.mark.slow, id="100000")])
@pytest.mark.parametrize("every", ["log_spaced", "failing", 20])
def test_memory_of_a_long_loop_stays_bounded(steps: int, every: Any) -> None:
    """Neither Python's memory nor the tensors alive grow with the steps, not even with faults."""

    class Broken:
        def write(self, report: Report) -> None:
            raise OSError("disk full")

        def close(self) -> None:
            pass

    def failing(step: int) -> bool:
        raise RuntimeError("no schedule today")

    schedule = {"log_spaced": log_spaced(20), "failing": failing}.get(every, every)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.1)
    tracemalloc.start()
    try:
        with FeatureProbe(
            model, optimizer=optimizer, every=schedule, window=3, sinks=[Broken()]
        ) as probe:
            held, tensors = [], []
            for part in (steps // 2, steps // 4, steps // 4):
                loop(model, optimizer, part)
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
                tensors.append(_tensors())
            faults = probe.faults
    finally:
        tracemalloc.stop()
    assert faults > 0
    # a leak shows in both quarters, a dictionary that doubles its room in one
    assert min(after - before for before, after in pairwise(held)) < 15_000
    assert tensors[-1] <= tensors[0] + 10


def _tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


# --------------------------------------------------------------------------- waiting


#: What makes the host wait for a device, as operators and as methods of a tensor.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
_METHODS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__",
    "__contains__", "__array__",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Notes operators whose result the host must wait for."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITING or (name == "index" and _has_mask(args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes methods that read a tensor on the host; those on the CPU never reach an operator."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in map(str, (*args[1:], *(kwargs or {}).values()))
        if name in _METHODS or to_host:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in args[1])


@contextmanager
def waits() -> Iterator[list[str]]:
    """Everything inside that would wait for a device, if the tensors were on one."""
    found: list[str] = []
    with Methods(found), Operators(found):
        yield found


class Attention(nn.Module):
    """Packed projections, a weight used functionally, a computed one, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.w = nn.Parameter(torch.randn(8, 8) / 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images of 3 channels and 5 positions."""
        h = self.conv(x).mT
        h = h + self.attention(h, h, h, need_weights=False)[0] @ self.w
        out: Tensor = self.head(torch.relu(self.normed(h)).mean(1))
        return out


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step as in every tutorial."""
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Two micro-batches under autocast, then clipping."""
    optimizer.zero_grad(set_to_none=False)
    for rows in (slice(0, 2), slice(2, 6)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(x[rows]).float(), y[rows]) / 2
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """The loss in a closure."""

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(evaluate)


Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact": {"jacobian": "exact"},
    "reduced positions": {"positions": "reduce", "num_probes": 2},
    "a sum": {"loss_reduction": "sum", "keep_matrices": True},
}


@pytest.mark.parametrize("step", [plain, accumulated, closure])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_followed_steps_do_not_wait(step: Step, options: dict[str, Any]) -> None:
    """Steps of a window read nothing back to the host; the report does, once it is due."""
    torch.manual_seed(0)
    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    x, y = torch.randn(6, 3, 5), torch.randn(6, 2)
    seen: dict[int, list[str]] = {}
    with waits() as expected:  # clipping moves norms to the device of the first
        step(model, optimizer, x, y)
    with FeatureProbe(
        model, optimizer=optimizer, every=at([0, 6]), window=4, strict=True, **options
    ) as probe:
        for index in range(7):
            followed = probe._observer.recorder.armed
            with waits() as found:
                step(model, optimizer, x, y)
            seen[index] = found
            assert followed == (index in (0, 3, 4, 5, 6))
    assert probe.report is not None
    assert probe.report.settings["window"] == 4
    assert [seen[index] for index in range(1, 6)] == [expected] * 5
    assert len(seen[6]) > len(expected)


def test_a_fused_optimizer_that_may_skip_does_not_wait() -> None:
    """With a gradient scaler and a fused optimizer nobody waits but the scaler's own update."""
    found: dict[bool, list[list[str]]] = {True: [], False: []}
    for probed in found:
        torch.manual_seed(0)
        model = Attention()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        probe = FeatureProbe(model, optimizer=optimizer, every=at([6]), window=4, strict=True)
        x, y = torch.randn(6, 3, 5), torch.randn(6, 2)
        if probed:
            probe.attach()
        for _ in range(6):
            with waits() as here:
                optimizer.zero_grad()
                scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
            found[probed].append(here)
        if probed:
            plain(model, optimizer, x, y)
            probe.detach()
            assert probe.report is not None
    assert found[True] == found[False]


def test_the_detector_sees_what_waits() -> None:
    """Each way to read a tensor on the host is noticed, operators that do not are not."""
    x = torch.arange(4.0)
    with waits() as found:
        _ = x * 2 + x.sum()
        torch.where(x > 1, x, torch.zeros_like(x)).to(torch.float64)
        assert found == []
    ways: list[Callable[[], Any]] = [
        lambda: x.sum().item(), lambda: bool(x.any()), lambda: float(x[0]), x.tolist, x.cpu,
        lambda: x.to("cpu"), lambda: x.to(device=torch.device("cpu")), x.numpy, x.nonzero,
        lambda: x[x > 1], lambda: torch.equal(x, x), lambda: int(x[1]), lambda: 1.0 in x,
    ]  # fmt: skip
    for way in ways:
        with waits() as found:
            way()
        assert found, way


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("step", [plain, closure])
def test_followed_steps_do_not_synchronise_on_the_device(step: Step) -> None:
    """The driver itself is asked to raise where the host waits."""
    torch.manual_seed(0)
    model = Attention().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.01)
    x, y = torch.randn(6, 3, 5, device="cuda"), torch.randn(6, 2, device="cuda")
    with FeatureProbe(model, optimizer=optimizer, every=at([6]), window=4, strict=True) as probe:
        for index in range(7):
            torch.cuda.set_sync_debug_mode("error" if 1 <= index < 6 else "default")
            try:
                step(model, optimizer, x, y)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert probe.report is not None
