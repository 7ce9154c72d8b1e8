"""Window: the sums of all layers over some steps, with what they were counted from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from feature_probe.sums.moments import Moments
from feature_probe.theory.relations import Sum


@dataclass
class Window:
    """Sums of every layer over some forward passes, and their counts.

    Attributes:
        layers: One :class:`Moments` per target; targets found later have theirs appended.
        steps: Optimizer steps that were taken.
        examples: n of all passes that count (that a backward pass of the training reached).
        left_out: Steps that were left out after a fault of the probe.
        discarded: Backward passes whose gradients no optimizer step used: steps skipped by a loss
            scaler after an overflow, gradients cleared or taken without a step.
        problems: Why a sum of a target is not measured in this window, by (target, sum).
    """

    layers: list[Moments] = field(default_factory=list)
    steps: int = 0
    examples: int = 0
    left_out: int = 0
    discarded: int = 0
    problems: dict[tuple[int, Sum], str] = field(default_factory=dict)
    _undecided: list[tuple[Tensor, Window]] = field(default_factory=list)

    def layer(self, index: int) -> Moments:
        """The sums of one target."""
        while len(self.layers) <= index:
            self.layers.append(Moments())
        return self.layers[index]

    def merge(self, other: Window) -> None:
        """Add another window, which must not be used afterwards."""
        for index, moments in enumerate(other.layers):
            self.layer(index).merge(moments)
        self._merge_counts(other)
        self._undecided += other._undecided

    def merge_if(self, taken: Tensor, other: Window) -> None:
        """Add another window if ``taken``, a 0-dim tensor that need not be known to the host yet.

        The sums are masked on their device; the counts wait for :meth:`settle`. So a step that a
        fused optimizer may have skipped is added without waiting for the device.
        """
        counts = Window(steps=other.steps, examples=other.examples, problems=dict(other.problems))
        for index, moments in enumerate(other.layers):
            counts.layers.append(moments.take_counts())
            self.layer(index).merge(moments.masked(taken))
        self.discarded += other.discarded
        self.left_out += other.left_out
        self._undecided.append((taken, counts))

    def settle(self) -> int:
        """Decide what :meth:`merge_if` left open, waiting for the device.

        Returns:
            How many steps of the windows given to :meth:`merge_if` were not taken.
        """
        skipped = 0
        for taken, counts in self._undecided:
            if bool(taken):
                for index, moments in enumerate(counts.layers):
                    self.layer(index).merge(moments)
                self._merge_counts(counts)
            else:
                skipped += counts.steps
        self._undecided = []
        self.discarded += skipped
        return skipped

    def scale_loss(self, factor: float | Tensor) -> None:
        """Multiply every E by ``factor``."""
        if isinstance(factor, Tensor) or factor != 1.0:
            for moments in self.layers:
                moments.scale_outer(factor, "loss")

    def nbytes(self) -> int:
        """Bytes held by all sums."""
        return sum(moments.nbytes() for moments in self.layers)

    def _merge_counts(self, other: Window) -> None:
        self.steps += other.steps
        self.examples += other.examples
        self.left_out += other.left_out
        self.discarded += other.discarded
        self.problems |= other.problems
