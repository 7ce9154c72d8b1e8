"""Reports as text on a stream."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from feature_probe.reports.report import Report
from feature_probe.sinks import ConsoleSink


def test_the_report_is_written_as_it_prints(make_report: Callable[..., Report]) -> None:
    """The stream holds exactly str(report) and a blank line."""
    stream = io.StringIO()
    report = make_report()
    ConsoleSink(stream).write(report)
    assert stream.getvalue() == f"{report}\n\n"


def test_the_default_is_stdout_at_the_time_of_writing(
    make_report: Callable[..., Report], capsys: pytest.CaptureFixture[str]
) -> None:
    """A stdout that was replaced after construction gets the report."""
    sink = ConsoleSink()
    with capsys.disabled():
        pass
    sink.write(make_report())
    assert "blocks.0.fc_1" in capsys.readouterr().out


def test_a_stream_without_the_characters_gets_question_marks(
    make_report: Callable[..., Report],
) -> None:
    """An ASCII terminal raises nothing."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    changes = {("conv", "fact"): {"status": "λ is not known"}}
    ConsoleSink(stream).write(make_report(changes=changes))
    assert b"fact: ? is not known" in raw.getvalue()


def test_close_leaves_the_stream_open(make_report: Callable[..., Report]) -> None:
    """The stream is the user's, and goes on after close."""
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    sink.write(make_report())
    sink.close()
    assert not stream.closed
