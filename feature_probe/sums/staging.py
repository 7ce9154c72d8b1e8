"""Staging: what backward passes delivered, held back until an optimizer takes its step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from feature_probe.capture.passes import Call, ForwardPass
from feature_probe.sums.window import Window
from feature_probe.theory.relations import Sum


@dataclass
class Followed:
    """What a step that is verified shows beside its sums, by target.

    Attributes:
        weighted: Σ s·gᵀh over the calls, s the factor of their forward pass in E; at last that of
            the step is in it too, so that it is Σ_i g_i h_iᵀ with the g_i of E.
        reach: Σ ‖g‖‖h‖ over the calls, of which the rounding of Σ gᵀh is a multiple.
        missing: Targets with a call whose gᵀh was not to be had.
        coarse: Targets with a gradient that arrived in less than float32.
        passes: Forward passes of the step.
        sizes: Their numbers of examples.
    """

    weighted: dict[int, Tensor] = field(default_factory=dict)
    reach: dict[int, Tensor] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    coarse: set[int] = field(default_factory=set)
    passes: int = 0
    sizes: tuple[int, ...] = ()

    def merge(self, other: Followed, mine: Callable[[int], bool]) -> None:
        """Add another's, of the targets asked for; its tensors may be shared."""
        for held, others in ((self.weighted, other.weighted), (self.reach, other.reach)):
            for index in filter(mine, others):
                held[index] = held[index] + others[index] if index in held else others[index]
        self.missing |= set(filter(mine, other.missing))
        self.coarse |= set(filter(mine, other.coarse))


@dataclass(eq=False)
class Task:
    """One backward pass: what it delivered, sums formed as it arrived or gradients held back.

    Attributes:
        window: Sums.
        forwards: The forward passes it reached.
        delivered: Rows that arrived, by call.
        held: Gradients whose outer products wait for more backward passes of the step.
        reduced: Gradients summed over the positions of each example, by pass and target.
        followed: What verification needs of it.
        accumulated: The optimizers to whose parameters' gradients it added.
        ended: Whether it ran to its end.
        used: Whether an optimizer stepped with it.
        staged: In how many stages it waits.
    """

    window: Window = field(default_factory=Window)
    forwards: dict[ForwardPass, None] = field(default_factory=dict)
    delivered: dict[Call, int] = field(default_factory=dict)
    held: dict[Call, tuple[ForwardPass, Tensor]] = field(default_factory=dict)
    reduced: dict[tuple[ForwardPass, int], Tensor] = field(default_factory=dict)
    followed: Followed = field(default_factory=Followed)
    accumulated: set[int] = field(default_factory=set)
    ended: bool = False
    used: bool = False
    staged: int = 0

    def end(self) -> None:
        """The backward pass is over."""
        self.ended = True

    def release(self) -> None:
        """Let go of what was delivered; what became of the pass is still to be told."""
        self.window, self.forwards, self.delivered = Window(), {}, {}
        self.held, self.reduced, self.followed = {}, {}, Followed()


class Stage:
    """The backward passes that the next step of one optimizer is made of.

    Args:
        mine: Whether that optimizer trains a target.

    Attributes:
        forwards: The forward passes they reached.
        followed: What verification needs of them.
    """

    def __init__(self, mine: Callable[[int], bool]) -> None:
        self._mine = mine
        self._start_again()

    def add(self, task: Task) -> set[int]:
        """Add a backward pass.

        Returns:
            Targets with a call that an earlier one had reached, so that this one's gradient and
            the earlier one's should have been summed before their outer product was formed.
        """
        mine = {call for call in task.delivered if self._mine(call.index)}
        again = mine & set(self._seen)
        fresh = [forward for forward in task.forwards if forward not in self.forwards]
        if fresh:
            self._merge_latest()
        for forward in fresh:
            self.forwards[forward] = self._latest[forward] = None
            self._window.examples += forward.examples
        for index, moments in enumerate(task.window.layers):
            if self._mine(index):
                self._window.layer(index).merge(moments)
        for call in mine - again:
            self._window.layer(call.index).loss_rows += task.delivered[call]
            self._seen.add(call)
        for call in mine & task.held.keys():
            forward, rows = task.held[call]
            self._held[call] = forward, _sum(self._held.get(call, (forward, None))[1], rows)
        for key, rows in task.reduced.items():
            if self._mine(key[1]):
                self._reduced[key] = _sum(self._reduced.get(key), rows)
        self.followed.merge(task.followed, self._mine)
        self._tasks.append(task)
        task.staged += 1
        return {call.index for call in again}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to forget."""
        return not self._tasks and not self._gradients

    def withhold(self, indices: set[int], kind: Sum, reason: str) -> None:
        """A sum of these targets cannot be had in this step."""
        for index in indices:
            self._window.problems[index, kind] = reason

    def grown(self, parameter: Tensor) -> None:
        """The gradient of one of the optimizer's parameters has grown."""
        self._gradients[parameter] = _mark(parameter)

    def take(self, scale: Callable[[ForwardPass], float]) -> Window:
        """The sums, complete, as delivered; the stage is empty afterwards.

        Args:
            scale: Factor on a forward pass's gradients where outer products waited.
        """
        self._merge_latest()
        window = self._window
        for (forward, index), rows in self._reduced.items():
            window.layer(index).add_outer("loss", rows, scale(forward))
        for call, (forward, rows) in self._held.items():
            window.layer(call.index).add_outer("loss", rows.flatten(0, 1), scale(forward))
        for index, kind in window.problems:
            if kind == "loss":
                window.layer(index).loss = None
        for task in self._tasks:
            task.used = True
            task.staged -= 1
        self._start_again()
        return window

    def drop(self) -> int:
        """Forget everything.

        Returns:
            How many backward passes no optimizer has used or can use any more.
        """
        if not self._tasks and not self._gradients:
            return 0
        lost = 0
        for task in self._tasks:
            task.staged -= 1
            lost += int(task.staged == 0 and not task.used)
        self._start_again()
        return lost

    def cleared(self, besides: Tensor | None = None) -> bool:
        """Whether the gradients that had grown are gone: None, or zero after having changed.

        Only gradients that something changed since they grew are looked at, which waits for the
        device: clipping or clearing between the backward passes of one step, and skipped steps.

        Args:
            besides: A parameter whose gradient the next backward pass has grown already.
        """
        grown = [parameter for parameter in self._gradients if parameter is not besides]
        if not self._tasks or not grown:
            return False
        present = [parameter for parameter in grown if parameter.grad is not None]
        if any(_mark(parameter) == self._gradients[parameter] for parameter in present):
            return False
        for parameter in present:
            gradient = parameter.grad
            if gradient is not None and bool(_local(gradient).any()):
                return False
        return True

    def gone(self) -> bool:
        """Whether every gradient that had grown is None."""
        return bool(self._gradients) and all(p.grad is None for p in self._gradients)

    def nbytes(self) -> int:
        """Bytes of what is held back."""
        rows = [*(rows for _, rows in self._held.values()), *self._reduced.values()]
        staged = [m for forward in self._latest for m in forward.staged.values()]
        sums: int = self._window.nbytes() + sum(moments.nbytes() for moments in staged)
        return sums + sum(t.numel() * t.element_size() for t in rows)

    def _start_again(self) -> None:
        self.forwards: dict[ForwardPass, None] = {}
        self.followed = Followed()
        self._window = Window()
        self._tasks: list[Task] = []
        self._seen: weakref.WeakSet[Call] = weakref.WeakSet()
        self._held: dict[Call, tuple[ForwardPass, Tensor]] = {}
        self._reduced: dict[tuple[ForwardPass, int], Tensor] = {}
        self._latest: dict[ForwardPass, None] = {}
        self._gradients: dict[Tensor, tuple[int, int]] = {}

    def _merge_latest(self) -> None:
        """Take K over from the forward passes of the latest backward pass.

        Not at once: if it is forgotten, another backward pass on the same forward may count.
        """
        for forward in self._latest:
            for index in [index for index in forward.staged if self._mine(index)]:
                self._window.layer(index).merge(forward.staged.pop(index))
        self._latest = {}


def _sum(total: Tensor | None, rows: Tensor) -> Tensor:
    return rows if total is None else total + rows


def _mark(parameter: Tensor) -> tuple[int, int]:
    """What changes when a gradient is replaced or written to."""
    gradient = parameter.grad
    return (0, 0) if gradient is None else (id(gradient), gradient._version)


def _local(gradient: Tensor) -> Tensor:
    """The part of a sharded gradient that this process holds."""
    to_local = getattr(gradient, "to_local", None)
    return gradient if to_local is None else to_local()
