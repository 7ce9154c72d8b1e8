"""Reports as plain numbers: the seam, and what real loggers have on disk afterwards."""

from __future__ import annotations

import csv
import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from feature_probe.errors import ConfigurationError
from feature_probe.reports.report import Report
from feature_probe.sinks import TensorBoardSink
from feature_probe.sinks.scalars import (
    ScalarSink,
    report_scalars,
    to_lightning,
    to_mlflow,
    to_trainer,
    to_wandb,
)

NAN = float("nan")


class Log:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def __call__(self, numbers: dict[str, float], step: int) -> None:
        """What ScalarSink calls."""
        self.rows.append((step, numbers))


def test_a_report_is_logged_once_at_its_step(make_report: Callable[..., Report]) -> None:
    """One call a report, with floats by tag; nothing waits for close."""
    log = Log()
    sink = ScalarSink(log)
    for step in (0, 100):
        sink.write(make_report(step))
    assert [step for step, _ in log.rows] == [0, 100]
    assert all(type(value) is float for _, numbers in log.rows for value in numbers.values())
    sink.close()
    assert len(log.rows) == 2


@pytest.mark.parametrize("score", ["cosine", "pearson"])
@pytest.mark.parametrize("layers", [False, True])
def test_tags_and_numbers_are_those_in_tensorboard(
    tmp_path: Path, make_report: Callable[..., Report], layers: bool, score: str
) -> None:
    """The same tags with the same numbers as TensorBoardSink writes."""
    report = make_report(changes={("conv", "nfa"): {"cosine": NAN, "pearson": NAN}})
    tensorboard = TensorBoardSink(tmp_path, layer_scalars=layers, score=score)
    tensorboard.write(report)
    tensorboard.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    written = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    log = Log()
    ScalarSink(log, detail="layers" if layers else "bands", score=score).write(report)
    assert log.rows[0][1] == pytest.approx(written, rel=1e-6)
    assert ("feature_probe.layers.conv/fact_cosine" in written) == (layers and score == "cosine")


def test_medians_are_the_first_group_of_tags(make_report: Callable[..., Report]) -> None:
    """detail="medians" leaves one number a relation, and how far training has come."""
    numbers = report_scalars(make_report(), "medians")
    assert set(numbers) == {
        *(f"feature_probe/{label}_median_cosine" for label in make_report().labels),
        "feature_probe/median_stationarity",
        "feature_probe/median_decay_age",
        "feature_probe/median_decay_ratio",
        "feature_probe/median_decay_ratio_plus_fluctuation",
    }
    assert numbers["feature_probe/fact_median_cosine"] == pytest.approx(0.0)  # of -0.1, 0, 0.1


def test_an_undefined_report_is_not_logged(make_report: Callable[..., Report]) -> None:
    """Undefined numbers have no entry, and without any the logger is not called."""
    names = ("cosine", "trace_free_cosine", "stationarity")
    undefined: dict[tuple[str, str], dict[str, Any]] = {
        ("conv", relation): dict.fromkeys(names, NAN)
        for relation in ("fact", "bfact", "nfa", "enfa")
    }
    log = Log()
    unknown = {"conv": {"decay_age": NAN, "decay_ratio": NAN, "stationarity": NAN}}
    undefined = {place: numbers | {"verdict": "undefined"} for place, numbers in undefined.items()}
    report = make_report(layers=["conv"], changes=undefined, diagnosed=unknown)
    ScalarSink(log).write(report)
    assert log.rows == []


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["run.log"], {}, r"log must be a function of \(numbers, step\), got 'run.log'"),
        ([print], {"detail": "all"}, "unknown detail 'all'; choose from medians, bands, layers"),
        ([print], {"score": "r2"}, "unknown score 'r2'; choose from pearson, cosine"),
    ],
)
def test_what_cannot_be_logged_to_is_refused(
    arguments: list[Any], options: dict[str, Any], message: str
) -> None:
    """A wrong argument is said at construction, not at the first report."""
    with pytest.raises(ConfigurationError, match=message):
        ScalarSink(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (to_lightning, "expected a Lightning logger, got 7, which has no log_metrics()"),
        (to_trainer, "expected a transformers.Trainer, got 7, which has no log()"),
        (to_wandb, "expected a wandb.Run, got 7, which has no log()"),
    ],
)
def test_something_else_than_the_logger_is_refused(
    make: Callable[[Any], ScalarSink], expected: str
) -> None:
    """What lacks the one method needed is named."""
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        make(7)


# --------------------------------------------------------------------------- Lightning


def test_lightning_csv_logger(tmp_path: Path, make_report: Callable[..., Report]) -> None:
    """Lightning's CSVLogger has a row a report with every number under its tag."""
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path)
    sink = to_lightning(logger)
    reports = [make_report(0), make_report(100)]
    for report in reports:
        sink.write(report)
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row.pop("step")) for row in rows] == [0, 100]
    for row, report in zip(rows, reports, strict=True):
        assert {tag: float(value) for tag, value in row.items()} == report_scalars(report)


def test_lightning_tensorboard_logger(tmp_path: Path, make_report: Callable[..., Report]) -> None:
    """Lightning's TensorBoardLogger has every number under its tag and step."""
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.TensorBoardLogger(tmp_path)
    report = make_report(100)
    to_lightning(logger, detail="layers").write(report)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    expected = report_scalars(report, "layers")
    for tag, value in expected.items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (100, pytest.approx(value, rel=1e-6))


# --------------------------------------------------------------------------- MLflow


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow on a folder of files, with its telemetry off."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "true")
    module = pytest.importorskip("mlflow")
    before = module.get_tracking_uri()
    module.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield module
    module.set_tracking_uri(before)


def read_mlflow(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value by metric name, from the files themselves."""
    (folder,) = root.glob("mlruns/*/*/metrics")
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            lines = [line.split() for line in path.read_text().splitlines()]
            name = path.relative_to(folder).as_posix()
            found[name] = [(int(line[2]), float(line[1])) for line in lines]
    return found


def test_mlflow_file_store(tmp_path: Path, mlflow: Any, make_report: Callable[..., Report]) -> None:
    """MLflow's files have every number and step, the names in the letters MLflow takes."""
    reports = [make_report(0, layers=["", "a/b"]), make_report(100, layers=["", "a/b"])]
    with mlflow.start_run():
        sink = to_mlflow(detail="layers")
        for report in reports:
            sink.write(report)
    found = read_mlflow(tmp_path)
    assert len(found) == len(report_scalars(reports[0], "layers"))
    for tag, first in report_scalars(reports[0], "layers").items():
        name = tag.translate(str.maketrans("^()", "___"))
        last = report_scalars(reports[1], "layers")[tag]
        assert found[name] == [(0, pytest.approx(first)), (100, pytest.approx(last))]
    assert "feature_probe/nfa_0.5_median_cosine" in found


def test_mlflow_run_by_its_id(
    tmp_path: Path, mlflow: Any, make_report: Callable[..., Report]
) -> None:
    """A run that is not active is written to by its id."""
    with mlflow.start_run() as run:
        pass
    to_mlflow(run.info.run_id, detail="medians").write(make_report(3))
    assert read_mlflow(tmp_path)["feature_probe/fact_median_cosine"] == [(3, pytest.approx(0.0))]
    assert mlflow.active_run() is None


def test_without_mlflow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"pip install feature-probe\[mlflow\]"):
        to_mlflow()


# --------------------------------------------------------------------------- Weights & Biases


def read_log(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind seven bytes of header."""
    block, header = 32768, 7
    data, offset, record = path.read_bytes(), header, b""
    while offset + header <= len(data):
        left = block - offset % block
        if left < header:  # the end of a block is padding
            offset += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        record += data[offset + header : offset + header + length]
        offset += header + length
        if offset > len(data):  # being written
            return
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(folder: Path) -> list[dict[str, Any]]:
    """The rows of history of an offline run that has finished."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(path)
    patience = time.monotonic() + 60
    # another process writes the file, and may still be at it when finish() returns
    while all(record.WhichOneof("record_type") != "exit" for record in records):
        assert time.monotonic() < patience, "the run never ended in its file"
        time.sleep(0.1)
        records = wandb_records(path)
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json)
         for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip


def wandb_records(path: Path) -> list[Any]:
    """What an offline run's file holds so far."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415  (an extra)

    return [wandb_internal_pb2.Record.FromString(data) for data in read_log(path)]


@pytest.fixture
def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Weights & Biases run without a network."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
    run = wandb.init(project="test", mode="offline", dir=tmp_path, settings=quiet)
    yield run
    run.finish()


def test_wandb_offline(tmp_path: Path, wandb_run: Any, make_report: Callable[..., Report]) -> None:
    """The run's file has a row a report, with its own step beside every number."""
    sink = to_wandb(wandb_run, detail="layers")
    reports = [make_report(0), make_report(100)]
    for report in reports:
        sink.write(report)
        wandb_run.log({"loss": 1.0})
    wandb_run.finish()
    rows = [
        {tag: value for tag, value in row.items() if not tag.startswith("_")}
        for row in read_wandb(tmp_path)
    ]
    expected = [report_scalars(report, "layers") for report in reports]
    assert rows == [
        expected[0] | {"feature_probe/step": 0},
        {"loss": 1.0},
        expected[1] | {"feature_probe/step": 100},
        {"loss": 1.0},
    ]


def test_wandb_rows_at_the_users_steps(
    tmp_path: Path, wandb_run: Any, make_report: Callable[..., Report]
) -> None:
    """With shared steps no row of the user's explicit steps is lost, and reports join them."""
    sink = to_wandb(wandb_run, detail="medians", shared_steps=True)
    for step in range(5):
        if step % 2 == 0:
            sink.write(make_report(step))
        wandb_run.log({"loss": 1.0}, step=step)
    wandb_run.finish()
    rows = read_wandb(tmp_path)
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 1.0) for step in range(5)]
    assert [row.get("feature_probe/step") for row in rows] == [0, None, 2, None, 4]
