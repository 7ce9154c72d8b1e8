"""Which of a long run's reports are worth writing where only a sample of them is shown anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

#: What TensorBoard is given of a report: numbers by tag, their distributions, and what is large
#: and cumulative, the table and the pictures.
Part = Literal["scalars", "histograms", "pictures"]
PARTS: tuple[Part, ...] = ("scalars", "histograms", "pictures")

# TensorBoard shows at most 1000 points of a curve, 50 distributions and 10 pictures of a tag.
_FULL_SCALARS = 500
_FULL_HISTOGRAMS = 25
#: Pictures are written again when the run has this many times as many reports.
_GROWTH = 1.2


class Thinning:
    """Chooses the parts of each report, so that a file grows with the logarithm of the reports.

    Curves hold every one of the first 1000 reports, distributions of the first 50, pictures of the
    first 5; see :func:`is_kept` for what follows.
    """

    def __init__(self, seen: int = 0, next_pictures: int = 1) -> None:
        """Start with a run's first report, or where :meth:`state_dict` was taken."""
        self._seen = seen
        self._next_pictures = next_pictures

    def next(self) -> list[Part]:
        """The parts that are due of the next report."""
        index = self._seen
        self._seen += 1
        due: list[Part] = []
        if is_kept(index, _FULL_SCALARS):
            due.append("scalars")
        if is_kept(index, _FULL_HISTOGRAMS):
            due.append("histograms")
        if self._seen >= self._next_pictures:
            self._next_pictures = max(self._seen + 1, math.ceil(self._seen * _GROWTH))
            due.append("pictures")
        return due

    def state_dict(self) -> dict[str, int]:
        """How far it has come, as the arguments of the constructor."""
        return {"seen": self._seen, "next_pictures": self._next_pictures}

    @classmethod
    def from_state(cls, state: Mapping[str, int]) -> Thinning:
        """The way back from :meth:`state_dict`."""
        return cls(**state)


def is_kept(index: int, full: int) -> bool:
    """Whether the report with this number, counted from 0, is one of the thinned series.

    All of the first ``2·full``, then every second until there are twice as many, then every
    fourth, and so on: the later half of a series always has at least ``full`` evenly spaced
    points, and n reports leave about ``full·(2 + log₂(n/(2·full)))``.
    """
    doublings = max(index // full, 1).bit_length() - 1
    return index % (1 << doublings) == 0
