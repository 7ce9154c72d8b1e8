"""Reports as lines of JSON, one record each."""

from __future__ import annotations

import json
import os
from pathlib import Path

from feature_probe.errors import ConfigurationError
from feature_probe.report import Report


class JSONLSink:
    """Appends every record of every report to a file, one JSON object a line.

    Read it with ``pandas.read_json(path, lines=True, dtype={"layer": str})``: without the
    ``dtype`` pandas makes numbers of names like "0". Undefined numbers are null. The file is opened
    for each report only, so every report is on disk when ``write`` returns, and there is nothing to
    close.
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
        """Append the report's records.

        Raises:
            OSError: if the disk does not take them.
        """
        lines = [
            json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False)
            for record in report.records
        ]
        text = "".join(f"{line}\n" for line in lines)
        with self._path.open("ab+") as file:
            file.write(self._missing_newline() + text.encode())

    def close(self) -> None:
        """Nothing to do: no file is held open."""

    def _missing_newline(self) -> bytes:
        """A line break if a killed run left half a line: it must spoil that line only."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return b""
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"
