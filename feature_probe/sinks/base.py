"""The seam between reports and the places they are written to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from feature_probe.reports.report import Report


class Sink(Protocol):
    """Somewhere reports go. Any object with these two methods will do.

    A sink is called from the training loop, after a report is made, on the step the report is of.
    What it raises is logged and counted by the probe and never reaches the training loop (unless
    the probe is ``strict``); it is called again with the next report.
    """

    def write(self, report: Report) -> None:
        """Write one report. Steps only ever grow, but for :meth:`ResumableSink.resume`."""

    def close(self) -> None:
        """Flush and let go of files. Called once, when the probe detaches."""


@runtime_checkable
class ResumableSink(Protocol):
    """A sink that can go on where an earlier run stopped. A sink without these methods is fine.

    The run may have gone on after the checkpoint that it is resumed from: what was written of
    later steps is then superseded.
    """

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`resume` needs beside the files: tensors, numbers, strings, lists, dicts."""

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Take back what was written of ``step`` and later steps, and go on from there.

        Called before the first ``write``.

        Args:
            step: The next step.
            state: What :meth:`state_dict` returned when ``step`` was the next step; empty where
                the resumed run had no such sink.
        """
