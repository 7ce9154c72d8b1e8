"""Reports as lines of JSON, one record each with the diagnosis of its layer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from feature_probe.errors import ConfigurationError
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.record import Record
from feature_probe.reports.report import Report

_RECORD_FIELDS = frozenset(entry.name for entry in fields(Record))
_RENAMED = {"state": "layer_state", "because": "layer_because"}
_BLOCK = 1 << 16
_STEP = re.compile(rb'"step": (\d+)[,}]')


class JSONLSink:
    """Appends every record of every report to a file, one flat JSON object a line.

    After the fields of :class:`~feature_probe.reports.record.Record` come those of the layer's
    :class:`~feature_probe.reports.diagnosis.Diagnosis`: its ``state`` and ``because`` as
    ``layer_state`` and ``layer_because``, the others under their names, but for λ, stationarity
    and decay ratio, which the record has already. Where structural quantities were asked for, the
    first record of each layer has them, too: an object ``structure``, the layer's
    :class:`~feature_probe.reports.structure.LayerStructure`.

    Read it with ``pandas.read_json(path, lines=True, dtype={"layer": str})``: without the
    ``dtype`` pandas makes numbers of names like "0". Undefined numbers are null. The file is opened
    for each report only, so every report is on disk when ``write`` returns, and there is nothing to
    close. It is the full record of the run and grows by about 1.5 kB a record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Create the file, and its folders, unless they exist; what it holds is kept.

        Args:
            path: The file.

        Raises:
            ConfigurationError: if the file cannot be written.
        """
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab"):
                pass
        except OSError as error:
            raise ConfigurationError(
                f"cannot write records to {str(path)!r}: {error}; give a file in a folder that "
                "can be written to"
            ) from error

    def write(self, report: Report) -> None:
        """Append the report's records: all of them, or none if the disk does not take them.

        Raises:
            OSError: if the disk does not take them.
        """
        layers = {found.layer: _columns(found) for found in report.diagnoses}
        structures = {found.layer: {"structure": found.to_dict()} for found in report.structures}
        lines = [
            json.dumps(
                # a layer's structure is long: its first record has it, not each of them
                record.to_dict() | layers.get(record.layer, {}) | structures.pop(record.layer, {}),
                ensure_ascii=False,
                allow_nan=False,
            )
            for record in report.records
        ]
        text = "".join(f"{line}\n" for line in lines).encode()
        with self._path.open("ab+", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, _missing_newline(file) + text)
            except BaseException:
                with suppress(OSError):  # half a report would look like one with fewer layers
                    file.truncate(start)
                raise

    def close(self) -> None:
        """Nothing to do: no file is held open."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the file itself says what it holds."""
        return {}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Drop the records of ``step`` and later, and half a line that a killed run left.

        Of the last run in the file only: where steps begin anew, an earlier run ends, and its
        records are kept. The file is cut at its end, not rewritten.

        Raises:
            OSError: if the file cannot be cut.
        """
        with self._path.open("rb+") as file:
            file.truncate(_end_of_records_before(file, step))


def _columns(diagnosis: Diagnosis) -> dict[str, Any]:
    """A layer's diagnosis under names that no field of a record has."""
    named = {_RENAMED.get(name, name): value for name, value in diagnosis.to_dict().items()}
    return {name: value for name, value in named.items() if name not in _RECORD_FIELDS}


def _write_all(file: FileIO, data: bytes) -> None:
    """Write without a buffer, which would keep what a full disk refused and try again later."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _missing_newline(file: FileIO) -> bytes:
    """A line break if a killed run left half a line: it must spoil that line only."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _end_of_records_before(file: BinaryIO, step: int) -> int:
    """Where the file is to be cut to end with the last run's records of earlier steps."""
    end = size = file.seek(0, os.SEEK_END)
    later: int | None = None
    for start, line in _lines_from_the_end(file, size):
        found = _STEP.search(line)
        if found is None or not line.endswith(b"\n"):
            if start + len(line) == end:
                end = start  # a torn line, with nothing of worth after it
            continue
        there = int(found[1])
        if there < step or (later is not None and there > later):
            break
        later, end = there, start
    return end


def _lines_from_the_end(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, the last one first, each with its place and its line break."""
    start, tail = size, b""
    while start > 0:
        length = min(_BLOCK, start)
        start -= length
        file.seek(start)
        lines = (file.read(length) + tail).splitlines(keepends=True)
        # The first may begin further up; its rest is in the block before.
        tail = lines[0]
        place = start + sum(len(line) for line in lines)
        for line in reversed(lines[1:]):
            place -= len(line)
            yield place, line
    if tail:
        yield 0, tail
