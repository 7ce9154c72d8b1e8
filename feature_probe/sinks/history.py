"""What a picture over time is drawn from: layers' scores and verdicts, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class StepHistory:
    """Scores and verdicts of layers over steps, at most ``capacity`` columns however long the run.

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
        self._columns: list[tuple[int, dict[str, float], dict[str, str]]] = []
        self._last_is_provisional = False

    def add(
        self, step: int, scores: Mapping[str, float], verdicts: Mapping[str, str] | None = None
    ) -> None:
        """Add one report's scores by layer name, and the words on them; layers may come and go."""
        if self._last_is_provisional:
            self._columns.pop()
        if len(self._columns) == self._capacity:
            self._columns = self._columns[::2]
            self._stride *= 2
        self._last_is_provisional = self._seen % self._stride != 0
        self._columns.append((step, dict(scores), dict(verdicts or {})))
        self._seen += 1

    @property
    def steps(self) -> list[int]:
        """Step of each column."""
        return [step for step, _, _ in self._columns]

    @property
    def layers(self) -> list[str]:
        """Layers of the latest report in its order, then those that only earlier ones had."""
        newest_first = (scores for _, scores, _ in reversed(self._columns))
        return list(dict.fromkeys(layer for scores in newest_first for layer in scores))

    def array(self) -> NDArray[np.float64]:
        """Scores ``[layers, steps]``, NaN where a layer has none."""
        nan = float("nan")
        rows = [[scores.get(layer, nan) for _, scores, _ in self._columns] for layer in self.layers]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self._columns))

    def codes(self, words: Sequence[str]) -> NDArray[np.int64]:
        """Verdicts ``[layers, steps]`` as places in ``words``, -1 where there is none of them."""
        place = {word: index for index, word in enumerate(words)}
        rows = [
            [place.get(verdicts.get(layer, ""), -1) for _, _, verdicts in self._columns]
            for layer in self.layers
        ]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self._columns))

    def state_dict(self) -> dict[str, Any]:
        """Everything that is held, as tensors, numbers and lists."""
        layers = self.layers
        present = [[layer in scores for layer in layers] for _, scores, _ in self._columns]
        words = sorted({word for _, _, verdicts in self._columns for word in verdicts.values()})
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
            "words": words,
            "verdicts": torch.from_numpy(self.codes(words).T.astype(np.int16)),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StepHistory:
        """The way back from :meth:`state_dict`."""
        history = cls(state["capacity"])
        history._stride, history._seen = state["stride"], state["seen"]
        history._last_is_provisional = state["last_is_provisional"]
        layers, words = state["layers"], state.get("words", [])
        scores, present = state["scores"].tolist(), state["present"].tolist()
        # A state of before there were verdicts has none.
        codes = state["verdicts"].tolist() if words else [[-1] * len(layers)] * len(scores)
        for step, numbers, there, places in zip(
            state["steps"], scores, present, codes, strict=True
        ):
            kept = {name: x for name, x, is_in in zip(layers, numbers, there, strict=True) if is_in}
            said = {name: words[p] for name, p in zip(layers, places, strict=True) if p >= 0}
            history._columns.append((step, kept, said))
        return history
