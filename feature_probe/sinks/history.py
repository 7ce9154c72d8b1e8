"""What a picture over time is drawn from: layers' scores over the reports, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class StepHistory:
    """Scores of layers over steps, at most ``capacity`` columns however long the run.

    When it is full every second column is dropped and from then on only every second report
    opens a new column, so the columns stay evenly spaced over the reports. The first report is
    kept, and the latest one is always the last column.
    """

    def __init__(self, capacity: int = 256) -> None:
        """Start empty.

        Args:
            capacity: Most columns held, at least 2.

        Raises:
            ValueError: for a capacity below 2.
        """
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}")
        self._capacity = capacity
        self._stride = 1
        self._seen = 0
        self._columns: list[tuple[int, dict[str, float]]] = []
        self._last_is_provisional = False

    def add(self, step: int, scores: Mapping[str, float]) -> None:
        """Add one report's scores by layer name; layers may come and go."""
        if self._last_is_provisional:
            self._columns.pop()
        if len(self._columns) == self._capacity:
            self._columns = self._columns[::2]
            self._stride *= 2
        self._last_is_provisional = self._seen % self._stride != 0
        self._columns.append((step, dict(scores)))
        self._seen += 1

    @property
    def steps(self) -> list[int]:
        """Step of each column."""
        return [step for step, _ in self._columns]

    @property
    def layers(self) -> list[str]:
        """Layers of the latest report in its order, then those that only earlier ones had."""
        newest_first = (scores for _, scores in reversed(self._columns))
        return list(dict.fromkeys(layer for scores in newest_first for layer in scores))

    def array(self) -> NDArray[np.float64]:
        """Scores ``[layers, steps]``, NaN where a layer has none."""
        nan = float("nan")
        rows = [[scores.get(layer, nan) for _, scores in self._columns] for layer in self.layers]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self._columns))

    def state_dict(self) -> dict[str, Any]:
        """Everything that is held, as tensors, numbers and lists."""
        layers = self.layers
        present = [[layer in scores for layer in layers] for _, scores in self._columns]
        return {
            "capacity": self._capacity,
            "stride": self._stride,
            "seen": self._seen,
            "last_is_provisional": self._last_is_provisional,
            "steps": self.steps,
            "layers": layers,
            "scores": torch.from_numpy(self.array().T.copy()),
            # An undefined score has a row, a layer that was not there has none.
            "present": torch.tensor(present, dtype=torch.bool).reshape(len(present), len(layers)),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StepHistory:
        """The way back from :meth:`state_dict`."""
        history = cls(state["capacity"])
        history._stride, history._seen = state["stride"], state["seen"]
        history._last_is_provisional = state["last_is_provisional"]
        rows = zip(state["steps"], state["scores"].tolist(), state["present"].tolist(), strict=True)
        for step, scores, present in rows:
            columns = zip(state["layers"], scores, present, strict=True)
            history._columns.append((step, {name: x for name, x, there in columns if there}))
        return history
