"""Reports as text on a stream."""

from __future__ import annotations

import sys
from typing import TextIO

from feature_probe.reports.report import Report


class ConsoleSink:
    """Writes every report's table to a stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Remember the stream.

        Args:
            stream: Any text stream; None is whatever ``sys.stdout`` is when a report comes.
        """
        self._stream = stream

    def write(self, report: Report) -> None:
        """Write the table, the notes and the coverage, and a blank line."""
        stream = sys.stdout if self._stream is None else self._stream
        text = f"{report}\n\n"
        # A terminal that cannot show ᵀ or λ gets a question mark, not an exception.
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()

    def close(self) -> None:
        """Nothing to do: the stream belongs to whoever opened it."""
