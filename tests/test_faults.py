"""Faults inside the probe: training goes on untouched, the rest is measured, everyone is told."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from feature_probe import ConfigurationError, FeatureProbe, Report, measure
from feature_probe.reports.assembly import Assembler
from feature_probe.sinks import ConsoleSink, JSONLSink, Sink, TensorBoardSink, outlets
from feature_probe.sinks.scalars import ScalarSink
from feature_probe.sinks.summary import summary_markdown

#: Where a write meets a full disk that the kernel itself plays.
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
# TensorBoard's writer thread dies of it, in front of everyone.
dying_thread = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
STEPS = 9


class Network(nn.Module):
    """Three layers of different widths, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Rows of six numbers."""
        hidden = nn.functional.dropout(torch.tanh(self.first(x)), 0.2)
        out: Tensor = self.head(torch.tanh(self.second(hidden)))
        return out


class Kept:
    """A sink in order."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.closed = 0

    def write(self, report: Report) -> None:
        """Keep the report."""
        self.reports.append(report)

    def close(self) -> None:
        """Count."""
        self.closed += 1


@dataclass
class Trained:
    """What a run left behind."""

    weights: dict[str, Tensor]
    rng: Tensor
    probe: FeatureProbe | None
    kept: Kept


def train(probed: bool = True, **options: Any) -> Trained:
    """Nine steps, a report at every third, with a healthy sink listed last."""
    torch.manual_seed(5)
    model, kept, probe = Network(), Kept(), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    generator = torch.Generator().manual_seed(6)
    if probed:
        sinks = [*options.pop("sinks", ()), kept]
        settings = {"every": 3, "window": 2, "sinks": sinks, **options}
        probe = FeatureProbe(model, optimizer=optimizer, **settings).attach()
    try:
        for _ in range(STEPS):
            x = torch.randn(8, 6, generator=generator)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x[:, :3]).backward()
            optimizer.step()
    finally:
        if probe is not None:
            probe.detach()
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return Trained(weights, torch.get_rng_state(), probe, kept)


@pytest.fixture(scope="module")
def plain() -> Trained:
    """The run without the probe."""
    return train(probed=False)


@pytest.fixture(scope="module")
def healthy() -> Trained:
    """The run with the probe, in which nothing fails."""
    return train()


def assert_untouched(run: Trained, plain: Trained) -> None:
    """Weights and the random state are those of the run without the probe, bit for bit."""
    assert run.weights.keys() == plain.weights.keys()
    assert all(torch.equal(run.weights[name], plain.weights[name]) for name in plain.weights)
    assert torch.equal(run.rng, plain.rng)


def numbers(report: Report) -> list[str]:
    """Every number of every record."""
    return [json.dumps(record.to_dict()) for record in report.records]


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the probe logged of its faults."""
    return [r.getMessage() for r in caplog.records if "fault in the probe" in r.getMessage()]


# --------------------------------------------------------------------------- sinks


class Anything:
    """A sink that raises whatever it is given, at writing and at closing."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, report: Report) -> None:
        """Fail."""
        raise self.error

    def close(self) -> None:
        """Fail."""
        raise self.error


class Stateful(Anything):
    """A sink that fails at everything a sink can be asked for."""

    def state_dict(self) -> dict[str, Any]:
        """Fail."""
        raise self.error

    def resume(self, step: int, state: Any) -> None:
        """Fail."""
        raise self.error


class FullStream(io.TextIOBase):
    """A stream without a buffer on the full disk."""

    def write(self, text: str) -> int:
        """Meet the kernel's refusal."""
        with FULL.open("wb", buffering=0) as file:
            return file.write(text.encode())


def _full_stream() -> ConsoleSink:
    return ConsoleSink(FullStream())


def _closed_stream() -> ConsoleSink:
    stream = open(os.devnull, "w")  # noqa: SIM115
    stream.close()
    return ConsoleSink(stream)


def _full_records() -> JSONLSink:
    return JSONLSink(FULL)


def _broken_logger() -> ScalarSink:
    def log(values: dict[str, float], step: int) -> None:
        raise ConnectionError("the tracking server is gone")

    return ScalarSink(log)


#: Sink, and how often it fails in three reports and a close.
SINKS: dict[str, tuple[Callable[[], Any], int]] = {
    "console, full disk": (_full_stream, 3),
    "console, closed stream": (_closed_stream, 3),
    "records, full disk": (_full_records, 3),
    "scalars, broken logger": (_broken_logger, 3),
    "an operating system error": (lambda: Anything(OSError(errno.EIO, "device gone")), 4),
    "a programming error": (lambda: Anything(KeyError("layer")), 4),
    "no memory": (lambda: Anything(MemoryError()), 4),
    "recursion": (lambda: Anything(RecursionError("too deep")), 4),
    "a sink of another package": (lambda: Anything(type("Odd", (Exception,), {})("odd")), 4),
    "state as well": (lambda: Stateful(ValueError("no")), 5),
}


@needs_full
@pytest.mark.parametrize(("make", "count"), SINKS.values(), ids=SINKS.keys())
def test_a_broken_sink_costs_nobody_anything(
    make: Callable[[], Any],
    count: int,
    plain: Trained,
    healthy: Trained,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Training is untouched, the other sinks get every number, each failure counts."""
    with caplog.at_level(logging.WARNING, "feature_probe"):
        run = train(sinks=[make()])
    assert_untouched(run, plain)
    assert run.probe is not None
    assert run.probe.faults == count
    assert list(map(numbers, run.kept.reports)) == list(map(numbers, healthy.kept.reports))
    assert [report.settings["faults"] for report in run.kept.reports] == [0, 1, 2]
    assert run.kept.closed == 1
    written = [message for message in faults(caplog) if "writing to" in message]
    assert len(written) == 1
    assert type(make()).__name__ in written[0]


@needs_full
@pytest.mark.parametrize(("make", "count"), SINKS.values(), ids=SINKS.keys())
def test_a_strict_probe_raises_it(make: Callable[[], Any], count: int) -> None:
    """What the sink raised reaches the loop, at the step of the report, and hooks come off."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        train(sinks=[make()], strict=True)
    assert not isinstance(caught.value, (AssertionError, ConfigurationError))


@needs_full
def test_records_on_a_full_disk_beside_event_files(tmp_path: Path, plain: Trained) -> None:
    """In one log_dir the records fail and TensorBoard goes on."""
    (tmp_path / outlets.JSONL_NAME).symlink_to(FULL)
    run = train(log_dir=tmp_path)
    assert_untouched(run, plain)
    assert run.probe is not None
    assert run.probe.faults == 3
    found = EventAccumulator(str(tmp_path)).Reload()
    assert len(found.Scalars("feature_probe/nfa^0.5_median_cosine")) == 3


@pytest.fixture
def full_events(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A switch: while its entry is true, event files cannot be written to."""
    switch = [False]
    write = RecordWriter.write

    def maybe(self: RecordWriter, data: bytes) -> None:
        if switch[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", maybe)
    return switch


@dying_thread
@pytest.mark.parametrize("own", [True, False])
def test_event_files_on_a_full_disk_beside_records(
    tmp_path: Path, plain: Trained, healthy: Trained, full_events: list[bool], own: bool
) -> None:
    """TensorBoard's writer dies; the records and every other sink are complete."""

    class Filling(Kept):
        def write(self, report: Report) -> None:
            full_events[0] = True

    where: dict[str, Any] = {"log_dir": tmp_path}
    writer = None if own else SummaryWriter(tmp_path)
    if writer is not None:
        where = {"writer": writer}
    records = tmp_path / "more.jsonl"
    run = train(sinks=[Filling(), JSONLSink(records)], **where)
    assert_untouched(run, plain)
    assert run.probe is not None
    assert run.probe.faults >= 2
    assert list(map(numbers, run.kept.reports)) == list(map(numbers, healthy.kept.reports))
    assert len(records.read_text(encoding="utf-8").splitlines()) == 3 * len(
        run.kept.reports[0].records
    )
    full_events[0] = False
    if writer is not None:
        with pytest.raises(OSError, match="No space left"):
            writer.close()


@dying_thread
def test_event_files_go_on_when_there_is_space_again(
    tmp_path: Path, healthy: Trained, full_events: list[bool]
) -> None:
    """A new event file continues the curves; only the report that met the full disk is missing."""
    sink = TensorBoardSink(tmp_path)
    for index, report in enumerate(healthy.kept.reports):
        full_events[0] = index == 1
        if full_events[0]:
            with pytest.raises(OSError, match="No space left"):
                sink.write(report)
        else:
            sink.write(report)
    sink.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    steps = [event.step for event in found.Scalars("feature_probe/nfa^0.5_median_cosine")]
    assert steps in ([0, 6], [0, 3, 6])  # the thread may have had some of it already
    assert found.Tensors("custom_scalars__config__")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_whole_reports_in_the_records(
    tmp_path: Path, healthy: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a report would look like one with fewer layers: it is taken back."""
    path = tmp_path / "records.jsonl"
    sink = JSONLSink(path)
    first, second, third = healthy.kept.reports
    sink.write(first)
    whole = path.read_bytes()

    def half(file: Any, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("feature_probe.sinks.jsonl._write_all", half)
        with pytest.raises(OSError, match="No space left"):
            sink.write(second)
    assert path.read_bytes() == whole
    sink.write(third)
    steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(set(steps)) == [first.step, third.step]


LIMITED = """
    import resource, signal, sys, torch
    sys.path.insert(0, {tests!r})
    from test_faults import train
    plain = train(probed=False)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    run = train(log_dir={folder!r})
    assert all(torch.equal(run.weights[name], plain.weights[name]) for name in plain.weights)
    print("faults", run.probe.faults, "reports", len(run.kept.reports))
"""


def test_a_disk_that_really_takes_no_more(tmp_path: Path) -> None:
    """The kernel refuses every file beyond 20 kB: training ends like the run without the probe."""
    pytest.importorskip("resource")
    code = textwrap.dedent(LIMITED).format(
        tests=str(Path(__file__).parent), folder=str(tmp_path / "run")
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert int(words[1]) >= 1
    assert words[3] == "3"
    assert "fault in the probe while writing to TensorBoardSink" in done.stderr


# --------------------------------------------------------------------------- opening, closing


@pytest.mark.parametrize("strict", [False, True])
def test_a_sink_that_cannot_be_opened_leaves_the_others(
    tmp_path: Path, plain: Trained, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    """A broken TensorBoard: the records are written all the same; strict: said at attach."""

    def broken(*args: Any, **kwargs: Any) -> Sink:
        raise RuntimeError("protobuf is of another version")

    monkeypatch.setattr(outlets, "TensorBoardSink", broken)
    if strict:
        with pytest.raises(RuntimeError, match="protobuf"):
            train(log_dir=tmp_path, strict=True)
        return
    run = train(log_dir=tmp_path)
    assert_untouched(run, plain)
    assert run.probe is not None
    assert run.probe.faults == 1
    lines = (tmp_path / outlets.JSONL_NAME).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 * len(run.kept.reports[0].records)


def test_a_folder_that_cannot_be_used_is_said_at_attach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set-up that cannot work raises, what was open is closed, and nothing is attached."""
    opened: list[TensorBoardSink] = []

    class Noted(TensorBoardSink):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(self)

    monkeypatch.setattr(outlets, "TensorBoardSink", Noted)
    (tmp_path / outlets.JSONL_NAME).mkdir()
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = FeatureProbe(model, optimizer=optimizer, log_dir=tmp_path)
    for _ in range(2):  # the second try is no different
        with pytest.raises(ConfigurationError, match="cannot write records to"):
            probe.attach()
        assert not probe.is_attached
        assert not optimizer._optimizer_step_pre_hooks
    assert len(opened) == 2
    assert all(sink._is_closed() for sink in opened)


def test_sinks_that_cannot_save_or_resume(plain: Trained) -> None:
    """A checkpoint is made and loaded without them; each failure is counted."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = FeatureProbe(model, optimizer=optimizer, sinks=[Stateful(ValueError("no")), Kept()])
    with probe:
        state = probe.state_dict()
        assert state["sinks"] == [{"sink": "Stateful", "state": {}}]
        assert probe.faults == 1
        state["faults"] = 0
        probe.load_state_dict(state)
        assert probe.faults == 1


def test_a_strict_probe_closes_every_sink() -> None:
    """The one that fails to close is raised after the others are closed."""
    broken, kept = Anything(OSError("gone")), Kept()
    broken.write = kept.write  # type: ignore[method-assign]
    model = Network()
    probe = FeatureProbe(model, sinks=[broken, kept], strict=True).attach()
    with pytest.raises(OSError, match="gone"):
        probe.detach()
    assert kept.closed == 1
    assert not probe.is_attached


# --------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("window", [1, 4])
def test_a_schedule_that_fails_is_one_fault_a_step(
    plain: Trained, caplog: pytest.LogCaptureFixture, window: int
) -> None:
    """Steps it cannot speak for are not due; the others are, with their windows."""

    def moody(step: int) -> bool:
        if step in (4, 7):
            raise ZeroDivisionError("not today")
        return step in (2, 5, 8)

    with caplog.at_level(logging.WARNING, "feature_probe"):
        run = train(every=moody, window=window)
    assert_untouched(run, plain)
    assert run.probe is not None
    assert run.probe.faults == 2
    assert [report.step for report in run.kept.reports] == [2, 5, 8]
    assert [r.settings["window"] for r in run.kept.reports] == [min(window, 3)] * 3
    assert len(faults(caplog)) == 1
    assert "asking the schedule" in faults(caplog)[0]


def test_a_schedule_that_always_fails_follows_nothing(plain: Trained) -> None:
    """The run is as cheap as without a probe, and says how often it asked in vain."""

    def never(step: int) -> bool:
        raise ZeroDivisionError("not today")

    run = train(every=never, window=3)
    assert_untouched(run, plain)
    assert run.probe is not None
    assert run.probe.report is None
    assert run.probe.faults == STEPS + 3  # steps 0 to 8 and three ahead of the last
    assert not run.probe._observer.recorder.armed


def test_strict_raises_what_the_schedule_raises() -> None:
    """At attach, where the first steps are asked for."""

    def never(step: int) -> bool:
        raise ZeroDivisionError("not today")

    with pytest.raises(ZeroDivisionError):
        train(every=never, strict=True)


# --------------------------------------------------------------------------- one layer


@pytest.fixture
def bad_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenproblems and SVDs of side 5, the second layer's d_out, do not converge."""
    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        whole = getattr(torch.linalg, name)

        def failing(matrix: Tensor, *args: Any, _whole: Any = whole, **kwargs: Any) -> Any:
            if matrix.shape[-2] == 5:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")  # type: ignore[attr-defined]
            return _whole(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, failing)


def assert_one_layer_lost(run: Trained, healthy: Trained, layer: str, reason: str) -> None:
    """The layer's records say why; all others are what they would have been."""
    for report, whole in zip(run.kept.reports, healthy.kept.reports, strict=True):
        lost = [r for r in report.records if r.status.startswith("fault: ")]
        assert lost
        assert all(reason in record.status and record.layer == layer for record in lost)
        assert all(math.isnan(record.cosine) for record in lost)
        rest = [r for r in report.records if r not in lost]
        expected = [whole.record(record.layer, record.relation, record.power) for record in rest]
        assert [json.dumps(r.to_dict()) for r in rest] == [
            json.dumps(r.to_dict()) for r in expected
        ]
        assert {record.layer for record in rest} >= {"first", "second", "head"} - {layer}


def test_linear_algebra_that_fails_costs_one_layers_numbers(
    bad_algebra: None, plain: Trained, healthy: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    """Its NFA is lost, its FACT and all other layers are not; one message names the layer."""
    with caplog.at_level(logging.WARNING, "feature_probe"):
        run = train()
    assert_untouched(run, plain)
    assert_one_layer_lost(run, healthy, "second", "LinAlgError: the algorithm failed to converge")
    last = run.kept.reports[-1]
    assert last.record("second", "fact").status.startswith("weight decay") or not math.isnan(
        last.record("second", "fact").cosine
    )
    assert len(faults(caplog)) == 1
    assert "scoring layer 'second'" in faults(caplog)[0]
    assert run.probe is not None
    assert run.probe.faults > 0
    counted = [report.settings["faults"] for report in run.kept.reports]
    assert counted[0] > 0  # the report that met the fault shows it already
    assert counted == sorted(counted)
    assert counted[-1] == run.probe.faults


def test_a_report_with_faults_says_so_in_words(bad_algebra: None) -> None:
    """In print, in TensorBoard's table and in the records."""
    report = train().kept.reports[-1]
    for text in (str(report), summary_markdown(report)):
        assert "faults inside the probe since the run began (see the log)" in text
        assert "training itself was not affected" in text
        assert "LinAlgError: the algorithm failed to converge (second)" in text


def test_strict_raises_what_linear_algebra_raises(bad_algebra: None) -> None:
    """The exception itself, not another one about it."""
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):  # type: ignore[attr-defined]
        train(strict=True)


@pytest.mark.parametrize("keep", [False, True])
def test_a_layer_that_cannot_even_be_read_costs_its_own_records(
    plain: Trained, healthy: Trained, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """All of its numbers are NaN with the reason, in the coverage as well."""
    whole = Assembler._statistics

    def failing(self: Assembler, index: int, *args: Any) -> Any:
        if self.targets[index].name == "first":
            raise torch.OutOfMemoryError("tried to allocate 12 GiB")
        return whole(self, index, *args)

    monkeypatch.setattr(Assembler, "_statistics", failing)
    run = train(keep_matrices=keep)
    assert_untouched(run, plain)
    assert_one_layer_lost(run, healthy, "first", "OutOfMemoryError: tried to allocate 12 GiB")
    report = run.kept.reports[-1]
    lost = [r for r in report.records if r.status.startswith("fault")]
    assert len(lost) == len(report.labels)
    assert {r.verdict for r in lost} == {"undefined"}
    gaps = {gap.parameter: gap.reason for gap in report.coverage.gaps()}
    assert gaps == {"first.weight": "fault: OutOfMemoryError: tried to allocate 12 GiB"}
    if keep:
        with pytest.raises(LookupError, match="was not measured: fault: OutOfMemoryError"):
            report.matrix("first", "fact")


def test_measure_goes_on_without_the_number(
    bad_algebra: None, caplog: pytest.LogCaptureFixture
) -> None:
    """At frozen weights a failure is in the record and in the log, too."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 6), torch.randn(8, 3))]
    with caplog.at_level(logging.WARNING, "feature_probe"):
        report = measure(
            Network().eval(), data, nn.functional.mse_loss, weight_decay=0.1, progress=False
        )
    assert report.record("second", "nfa", 1.0).status.startswith("fault: LinAlgError")
    assert report.record("first", "nfa", 1.0).status == "ok"
    assert any("layer 'second'" in record.getMessage() for record in caplog.records)
