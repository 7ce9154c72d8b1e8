"""Reports as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from feature_probe.errors import ConfigurationError
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.record import Record
from feature_probe.reports.report import Report
from feature_probe.sinks import JSONLSink

NAN = float("nan")


LAYER_COLUMNS = [
    "optimizer", "decay_form", "decay_age", "decay_age_note", "window_age", "drift", "noise",
    "fluctuation", "norm_drift", "norm_span", "scale_invariance", "invariance_statistic",
    "invariance_note", "layer_state", "layer_because",
]  # fmt: skip


def read(path: Path) -> list[Record]:
    """The records of a file, read without the package's or pandas' help."""
    names = [field.name for field in fields(Record)]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Record.from_dict({name: row[name] for name in names}) for row in rows]


def test_every_record_is_one_line_and_comes_back(
    tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    """What is read back is, field by field, what the reports hold."""
    path = tmp_path / "records.jsonl"
    sink = JSONLSink(path)
    reports = [make_report(0), make_report(100, changes={("conv", "nfa"): {"cosine": NAN}})]
    for report in reports:
        sink.write(report)
    sink.close()
    assert repr(read(path)) == repr([record for report in reports for record in report.records])


def test_a_report_is_on_disk_when_write_returns(
    tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    """Nothing waits for close."""
    path = tmp_path / "records.jsonl"
    JSONLSink(path).write(make_report())
    assert len(read(path)) == 12


def test_pandas_reads_one_row_a_record_with_its_types(
    tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    """Numbers are floats with NaN where undefined, counts integers, words and names words."""
    path = tmp_path / "records.jsonl"
    undefined = {"cosine": NAN, "status": "K was not measured"}
    report = make_report(layers=("0", "2"), changes={("2", "nfa"): undefined})
    JSONLSink(path).write(report)
    table = pd.read_json(path, lines=True, dtype={"layer": str})
    assert list(table.columns) == [field.name for field in fields(Record)] + LAYER_COLUMNS
    assert len(table) == len(report.records)
    assert table["layer"].tolist() == ["0"] * 4 + ["2"] * 4
    for name in ("relation", "premise", "status", "verdict", "because", "layer_state"):
        assert pd.api.types.is_string_dtype(table[name]), name
    for name in ("step", "n_examples", "n_rows"):
        assert table[name].dtype == "int64", name
    floats = (
        "pearson", "cosine", "residual", "power", "shared_weight_cosine", "cosine_low",
        "fitted_power", "decay_age", "fluctuation", "stationarity",
    )  # fmt: skip
    for name in floats:
        assert table[name].dtype == "float64", name
    assert table["cosine"].isna().sum() == 1
    assert table["cosine"].dropna().tolist() == [
        record.cosine for record in report.records if record.status == "ok"
    ]


def test_every_line_has_its_layers_diagnosis_in_columns_of_its_own(
    tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    """The layer's numbers are flat, null where undefined, and overwrite nothing of the record."""
    path = tmp_path / "records.jsonl"
    found = {"conv": {"decay_age": NAN, "because": "no decay", "stationarity": 7.0, "drift": 9.0}}
    said = {("conv", "fact"): {"verdict": "not applicable", "because": "a norm follows"}}
    report = make_report(changes=said, diagnosed=found)
    JSONLSink(path).write(report)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first, other = rows[0], rows[4]
    assert (first["layer"], first["relation"], other["layer"]) == ("conv", "fact", "blocks.0.fc_1")
    assert (first["verdict"], first["because"]) == ("not applicable", "a norm follows")
    assert (first["layer_state"], first["layer_because"]) == ("approaching", "no decay")
    assert (first["decay_age"], first["drift"]) == (None, 9.0)
    assert (other["decay_age"], other["drift"]) == (2.5, 0.125)
    assert (first["stationarity"], first["decay_ratio"]) == (1.5, 0.9)  # the record's
    assert not any(isinstance(value, (dict, list)) for row in rows for value in row.values())
    table = pd.read_json(path, lines=True, dtype={"layer": str})
    assert table.groupby("layer", sort=False)["decay_age"].first().tolist()[1:] == [2.5, 2.5]
    assert table["decay_age"].isna().tolist() == [True] * 4 + [False] * 8
    assert table["verdict"].value_counts()["approaching"] == 5


def test_a_diagnosis_has_no_field_that_is_lost() -> None:
    """What a line leaves out of a diagnosis is in the record under the same name."""
    left_out = {field.name for field in fields(Diagnosis)} - set(LAYER_COLUMNS)
    renamed = {"state", "because"}
    assert left_out - renamed == {"layer", "weight_decay", "stationarity", "decay_ratio"}
    assert left_out - renamed <= {field.name for field in fields(Record)}


def test_a_report_without_diagnoses_is_written(
    tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    """Its lines hold the record and nothing else."""
    path = tmp_path / "records.jsonl"
    JSONLSink(path).write(make_report(diagnosed=None))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {tuple(json.loads(line)) for line in lines} == {tuple(f.name for f in fields(Record))}


def test_what_the_file_holds_is_kept(tmp_path: Path, make_report: Callable[..., Report]) -> None:
    """A second sink on the same file appends."""
    path = tmp_path / "records.jsonl"
    for step in (0, 100):
        JSONLSink(path).write(make_report(step))
    assert [record.step for record in read(path)] == [0] * 12 + [100] * 12


def test_half_a_line_of_a_killed_run_spoils_only_itself(
    tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    """Records after a torn line stand on lines of their own."""
    path = tmp_path / "records.jsonl"
    path.write_text('{"layer": "co', encoding="utf-8")
    JSONLSink(path).write(make_report())
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"layer": "co'
    assert [json.loads(line)["layer"] for line in lines[1:5]] == ["conv"] * 4


def test_folders_are_made(tmp_path: Path) -> None:
    """A path in a folder that does not exist yet is fine."""
    JSONLSink(tmp_path / "a" / "b" / "records.jsonl")
    assert (tmp_path / "a" / "b" / "records.jsonl").exists()


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    """What can never be written is said at construction."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot write records to .*file/records.jsonl"):
        JSONLSink(tmp_path / "file" / "records.jsonl")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder is not a file to append to."""
    with pytest.raises(ConfigurationError, match="cannot write records to"):
        JSONLSink(tmp_path)
