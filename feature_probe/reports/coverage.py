"""Which of the model's weight matrices are measured, which are not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Measured = Literal["all", "gradient only", "none"]


@dataclass(frozen=True)
class ParameterCoverage:
    """What became of one matrix parameter (two or more dimensions).

    Attributes:
        parameter: Name as in ``model.named_parameters()``.
        elements: Number of entries.
        layer: Name of the layer that measures it, None if no layer does.
        measured: "all" of the asked relations, the "gradient only" ones (FACT, bFACT), or "none".
        reason: Why not "all"; "" otherwise.
    """

    parameter: str
    elements: int
    layer: str | None
    measured: Measured
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The share of the model's matrix parameters that a report measures."""

    parameters: tuple[ParameterCoverage, ...]

    @property
    def elements(self) -> int:
        """Entries in all matrix parameters."""
        return sum(entry.elements for entry in self.parameters)

    def share(self, measured: Iterable[Measured] = ("all",)) -> float:
        """Share of matrix entries measured to one of the given degrees; NaN without any matrix."""
        wanted = set(measured)
        held = sum(entry.elements for entry in self.parameters if entry.measured in wanted)
        return held / self.elements if self.elements else float("nan")

    def gaps(self) -> tuple[ParameterCoverage, ...]:
        """The parameters that are not fully measured."""
        return tuple(entry for entry in self.parameters if entry.measured != "all")

    def summary(self) -> str:
        """One line, then one line per reason with the parameters it concerns."""
        lines = [
            f"measured: {self.share():.1%} of {self.elements:,} matrix entries"
            + (f", FACT/bFACT only: {partial:.1%}" if (partial := self._partial()) else "")
        ]
        for reason, names in self._by_reason().items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"  {reason}: {shown}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {
            "share": None if not self.elements else self.share(),
            "parameters": [asdict(entry) for entry in self.parameters],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Coverage:
        """The way back from :meth:`to_dict`."""
        return cls(tuple(ParameterCoverage(**entry) for entry in data["parameters"]))

    def _partial(self) -> float:
        return self.share(("gradient only",)) if self.elements else 0.0

    def _by_reason(self) -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {}
        for entry in self.gaps():
            reasons.setdefault(entry.reason, []).append(entry.parameter)
        return reasons
