"""Sinks that go on where an earlier run stopped: nothing twice, nothing lost."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as MigratingAccumulator,
)
from torch.utils.tensorboard import SummaryWriter

from feature_probe.reports.report import Report
from feature_probe.sinks import ConsoleSink, JSONLSink, ResumableSink, TensorBoardSink
from feature_probe.sinks.history import StepHistory

NAN = float("nan")
Make = Callable[..., Report]
EVERYTHING = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
MEDIAN = "feature_probe/fact_median_cosine"


def read(folder: Path) -> EventAccumulator:
    """A folder's event files as TensorBoard reads them, unsampled."""
    return EventAccumulator(str(folder), size_guidance=EVERYTHING).Reload()


def as_shown(folder: Path) -> MigratingAccumulator:
    """A folder's event files as the reader behind TensorBoard's page sees them, unsampled."""
    return MigratingAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Steps and values of every scalar series and distribution."""
    found = read(folder)
    tags = found.Tags()
    scalars = {t: [(e.step, e.value) for e in found.Scalars(t)] for t in tags["scalars"]}
    counts = {
        t: [(e.step, e.histogram_value.bucket) for e in found.Histograms(t)]
        for t in tags["histograms"]
    }
    return scalars | counts


def pictures(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Steps and PNG files of every picture, and the tables."""
    found = read(folder)
    tags = found.Tags()
    # this reader does not purge tables
    tables = as_shown(folder).Tensors("feature_probe/summary/text_summary")
    return {
        tag: [(event.step, event.encoded_image_string) for event in found.Images(tag)]
        for tag in tags["images"]
    } | {"table": [(event.step, event.tensor_proto.string_val[0]) for event in tables]}


def moving(make_report: Make, steps: Iterable[int], shift: float = 0.0) -> Iterator[Report]:
    """Reports whose cosines, verdicts and states move with the step."""
    for step in steps:
        verdict = "not applicable" if step < 300 else "approaching"
        state = "far" if step < 800 else "at stationarity"
        moved = {"cosine": step / 1000 + shift, "verdict": verdict}
        changes = {("conv", "fact"): moved}
        yield make_report(step, changes=changes, diagnosed={"conv": {"state": state}})


def run(sink: Any, reports: Iterable[Report]) -> dict[str, Any]:
    """Write reports; the sink's state afterwards, through a file."""
    for report in reports:
        sink.write(report)
    buffer = io.BytesIO()
    torch.save(sink.state_dict(), buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)
    return state


@pytest.mark.parametrize("closed", [True, False])
def test_a_resumed_event_file_is_that_of_a_run_not_stopped(
    tmp_path: Path, make_report: Make, closed: bool
) -> None:
    """Curves and distributions are equal; pictures end alike; steps after the checkpoint went."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = range(0, 1200, 100)  # 12 reports: the last one has pictures of its own
    reference = TensorBoardSink(whole)
    run(reference, moving(make_report, steps))
    reference.close()

    first = TensorBoardSink(parts)
    state = run(first, moving(make_report, steps[:6]))
    run(first, moving(make_report, steps[6:8], shift=0.1))  # lost with the crash
    if closed:
        first.close()
    second = TensorBoardSink(parts)
    second.resume(501, state)
    run(second, moving(make_report, steps[6:]))
    second.close()

    assert curves(parts) == curves(whole)
    expected, found = pictures(whole), pictures(parts)
    assert found.keys() == expected.keys()
    for tag in expected:
        assert found[tag] == expected[tag], tag
    shown = as_shown(parts)
    for tag in shown.Tags()["tensors"]:
        seen = [event.step for event in shown.Tensors(tag)]
        assert tag == "custom_scalars__config__" or seen == sorted(set(seen)), tag
    assert shown.Tensors("custom_scalars__config__")


def test_a_stop_between_pictures_leaves_a_picture_of_the_stop(
    tmp_path: Path, make_report: Make
) -> None:
    """What close writes of the last report stays, as its step is before the resumed one."""
    first = TensorBoardSink(tmp_path)
    state = run(first, moving(make_report, range(7)))
    first.close()
    second = TensorBoardSink(tmp_path)
    second.resume(7, state)
    run(second, moving(make_report, range(7, 9)))
    second.close()
    steps = [step for step, _ in pictures(tmp_path)["table"]]
    assert steps == sorted(set(steps))
    assert {6, 8} <= set(steps)
    assert [step for step, _ in curves(tmp_path)[MEDIAN]] == list(range(9))


def test_tensorboards_own_loader_sees_no_step_twice(tmp_path: Path, make_report: Make) -> None:
    """The reader behind the web page, which migrates old summaries, purges too."""
    first = TensorBoardSink(tmp_path)
    state = run(first, moving(make_report, (0, 100)))
    run(first, moving(make_report, (200, 300), shift=0.5))
    second = TensorBoardSink(tmp_path)
    second.resume(150, state)
    run(second, moving(make_report, (200,)))
    second.close()
    found = as_shown(tmp_path)
    assert [event.step for event in found.Tensors(MEDIAN)] == [0, 100, 200]
    assert found.Tensors("custom_scalars__config__")


@pytest.mark.parametrize("same", [True, False])
def test_resumed_at_the_beginning_everything_is_written_anew(
    tmp_path: Path, make_report: Make, same: bool
) -> None:
    """A checkpoint of step 0: the mark that drops everything does not drop the new charts."""
    first = TensorBoardSink(tmp_path)
    run(first, moving(make_report, (0, 100)))
    second = first if same else TensorBoardSink(tmp_path)
    second.resume(0, {})
    run(second, moving(make_report, (0,)))
    second.close()
    assert [step for step, _ in curves(tmp_path)[MEDIAN]] == [0]
    assert as_shown(tmp_path).Tensors("custom_scalars__config__")


def test_the_same_sink_may_be_taken_back(tmp_path: Path, make_report: Make) -> None:
    """Rolling back inside one process: pictures and curves are those of the way that counts."""
    sink = TensorBoardSink(tmp_path / "a")
    state = run(sink, moving(make_report, (0, 100)))
    run(sink, moving(make_report, (200, 300), shift=0.5))
    sink.resume(150, state)
    run(sink, moving(make_report, (200,)))
    sink.close()
    straight = TensorBoardSink(tmp_path / "b")
    run(straight, moving(make_report, (0, 100, 200)))
    straight.close()
    assert curves(tmp_path / "a") == curves(tmp_path / "b")
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")


@pytest.mark.parametrize("purge", [True, False])
def test_a_users_writer_without_purge_step_is_told(
    tmp_path: Path, make_report: Make, caplog: pytest.LogCaptureFixture, purge: bool
) -> None:
    """Their curves are theirs to purge: with purge_step nothing is said and nothing is doubled."""
    with SummaryWriter(tmp_path) as writer:
        state = run(TensorBoardSink(writer=writer), moving(make_report, (0, 100, 200)))
    with (
        SummaryWriter(tmp_path, purge_step=150 if purge else None) as writer,
        caplog.at_level(logging.WARNING, "feature_probe"),
    ):
        sink = TensorBoardSink(writer=writer)
        sink.resume(150, state)
        run(sink, moving(make_report, (200, 300)))
        sink.close()
    steps = [step for step, _ in curves(tmp_path)[MEDIAN]]
    assert steps == ([0, 100, 200, 300] if purge else [0, 100, 200, 200, 300])
    shown = [event.step for event in as_shown(tmp_path).Tensors(MEDIAN)]
    assert shown == steps
    told = [record for record in caplog.records if record.name.startswith("feature_probe")]
    messages = [record.getMessage() for record in told]
    assert len(messages) == (not purge)
    assert all("SummaryWriter(..., purge_step=150)" in message for message in messages)


def test_a_users_writer_in_a_new_folder_is_not_told(
    tmp_path: Path, make_report: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is nothing earlier, nothing can be doubled."""
    with (
        SummaryWriter(tmp_path) as writer,
        caplog.at_level(logging.WARNING, "feature_probe"),
    ):
        TensorBoardSink(writer=writer).resume(150, {})
    assert caplog.records == []


def records(path: Path) -> list[tuple[int, str]]:
    """Step and layer of every line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(data["step"], data["layer"]) for data in map(json.loads, lines)]


def test_records_of_later_steps_are_superseded(tmp_path: Path, make_report: Make) -> None:
    """Byte for byte the file of a run that was not stopped."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(JSONLSink(whole), moving(make_report, range(0, 600, 100)))
    state = run(JSONLSink(parts), moving(make_report, range(0, 500, 100), shift=0.0))
    sink = JSONLSink(parts)
    sink.resume(201, state)
    run(sink, moving(make_report, range(300, 600, 100)))
    assert parts.read_bytes() == whole.read_bytes()


def test_an_earlier_run_in_the_file_is_kept(tmp_path: Path, make_report: Make) -> None:
    """Only the last run's later steps go, though the earlier run's steps were later still."""
    path = tmp_path / "records.jsonl"
    run(JSONLSink(path), moving(make_report, (0, 100, 1000)))
    run(JSONLSink(path), moving(make_report, (0, 100, 200)))
    JSONLSink(path).resume(150, {})
    assert [step for step, _ in records(path)][::12] == [0, 100, 1000, 0, 100]
    JSONLSink(path).resume(0, {})
    assert [step for step, _ in records(path)][::12] == [0, 100, 1000]


@pytest.mark.parametrize("torn", ['{"layer": "co', '{"layer": "conv", "step": 300, "cos'])
@pytest.mark.parametrize("step", [150, 400])
def test_a_torn_last_line_goes(tmp_path: Path, make_report: Make, torn: str, step: int) -> None:
    """Half a line of a killed run is cut off whatever the step."""
    path = tmp_path / "records.jsonl"
    run(JSONLSink(path), moving(make_report, (0, 100, 200)))
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    JSONLSink(path).resume(step, {})
    assert [s for s, _ in records(path)][::12] == [s for s in (0, 100, 200) if s < step]


def test_a_torn_line_in_the_middle_does_not_stop_the_cut(tmp_path: Path, make_report: Make) -> None:
    """Lines before it are still looked at."""
    path = tmp_path / "records.jsonl"
    run(JSONLSink(path), moving(make_report, (0, 100)))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"layer": "co')
    run(JSONLSink(path), moving(make_report, (200,)))
    JSONLSink(path).resume(100, {})
    assert [s for s, _ in records(path)] == [0] * 12


def test_files_longer_than_a_block_are_cut_right(tmp_path: Path, make_report: Make) -> None:
    """The file is read backwards in blocks; lines that lie across two are whole."""
    path = tmp_path / "records.jsonl"
    sink = JSONLSink(path)
    run(sink, moving(make_report, range(40)))
    assert path.stat().st_size > 2 * (1 << 16)
    for step in (39, 25, 3, 0):
        sink.resume(step, {})
        assert records(path) == [
            (s, layer) for s in range(step) for layer in ("conv", "blocks.0.fc_1", "head")
            for _ in range(4)
        ]  # fmt: skip


def test_an_empty_file_resumes(tmp_path: Path) -> None:
    """A new folder for the resumed run is fine."""
    path = tmp_path / "records.jsonl"
    JSONLSink(path).resume(100, {})
    assert path.read_bytes() == b""


def test_which_sinks_resume() -> None:
    """The protocol is recognised by its methods; a console has nothing to resume."""
    assert issubclass(TensorBoardSink, ResumableSink)
    assert issubclass(JSONLSink, ResumableSink)
    assert not issubclass(ConsoleSink, ResumableSink)


def test_a_history_comes_back_and_goes_on_alike() -> None:
    """Columns, gaps, order of the layers and the thinning that is under way."""

    def verdicts(step: int) -> Mapping[str, str]:
        return {"a": f"verdict {step % 4}", "b": "never there"} if step % 7 else {}

    def scores(step: int) -> Mapping[str, float]:
        layers = ["a", "b"] if step % 3 else ["c", "a"]
        layers += ["once"] if step == 3 else []  # in a column that thinning drops
        return dict.fromkeys(layers, NAN if step % 5 == 0 else step / 100)

    straight = StepHistory(capacity=6)
    for step in range(40):
        resumed = StepHistory.from_state(straight.state_dict())
        for later in range(step, step + 17):
            resumed.add(later, scores(later), verdicts(later))
        expected = StepHistory(capacity=6)
        for earlier in range(step + 17):
            expected.add(earlier, scores(earlier), verdicts(earlier))
        assert resumed.steps == expected.steps
        assert resumed.layers == expected.layers
        assert resumed.array().tobytes() == expected.array().tobytes()
        words = [f"verdict {i}" for i in range(4)]
        assert resumed.codes(words).tolist() == expected.codes(words).tolist()
        straight.add(step, scores(step), verdicts(step))


def test_a_state_of_before_there_were_verdicts_is_taken_back(
    tmp_path: Path, make_report: Make
) -> None:
    """Scores are drawn on; steps of which no verdict is known are not greyed."""
    history = StepHistory()
    history.add(0, {"conv": 0.5})
    old = history.state_dict()
    del old["words"], old["verdicts"]
    back = StepHistory.from_state(old)
    back.add(100, {"conv": 0.6}, {"conv": "trivial"})
    assert back.codes(["trivial"]).tolist() == [[-1, 0]]
    assert back.array().tolist() == [[0.5, 0.6]]
    sink = TensorBoardSink(tmp_path)
    sink.resume(50, {"histories": {"fact": old}})
    sink.write(make_report(100))
    sink.close()
    assert "feature_probe.heatmaps/state" in read(tmp_path).Tags()["images"]
