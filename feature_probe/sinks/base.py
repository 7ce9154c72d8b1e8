"""The seam between reports and the places they are written to."""

from __future__ import annotations

from typing import Protocol

from feature_probe.report import Report


class Sink(Protocol):
    """Somewhere reports go. Any object with these two methods will do.

    A sink is called from the training loop, after a report is made, on the step the report is of.
    What it raises is logged and counted by the probe and never reaches the training loop (unless
    the probe is ``strict``).
    """

    def write(self, report: Report) -> None:
        """Write one report. Steps only ever grow within one run."""

    def close(self) -> None:
        """Flush and let go of files. Called once, when the probe detaches."""
