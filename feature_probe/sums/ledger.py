"""Ledger: which backward passes belong to the optimizer's step, and what they add up to.

A backward pass counts if it added to the gradient of some parameter of the model; one that did not
(``autograd.grad`` for an adversarial example, another probe's products, a loss of another model) is
forgotten. What counts is held back until the optimizer takes its step, and forgotten if the
gradients are cleared before that: a loss scaler skipped the step after an overflow, or the gradient
was another optimizer's by-product, as in a GAN. Of several optimizers each has its own account.

Where no backward pass of a step added to a gradient but one delivered gradients all the same, that
one is taken: a loop that sets ``p.grad`` from ``autograd.grad``.

Per-example gradients are those of the loss that the optimizer minimises in one step, written as a
mean (or sum) over its examples: with "mean", g_i = a·n·δ_i/S for the delivered δ_i, where n is the
number of examples of its forward pass, a the number of forward passes of the step, and S the loss
scale. So a step accumulated from a forward passes, each with its loss divided by a, is one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from feature_probe.capture.passes import Call, ForwardPass
from feature_probe.sums.staging import Followed, Stage, Task
from feature_probe.sums.window import Window

Positions = Literal["expand", "reduce"]
Reduction = Literal["mean", "sum"]
SEVERAL = (
    "several backward passes reached one forward pass, and E needs the sum of their gradients; it "
    "is formed from the next step on"
)
UNCLEAR = (
    "several backward passes of this step (autograd.grad?) left every parameter's gradient as it "
    "was: which of them the optimizer's gradients come from cannot be told"
)


class Ledger:
    """Stages, confirms, drops and commits what backward passes deliver.

    Args:
        reduction: How the loss is reduced over a batch.
        positions: "expand" or "reduce": whether positions of an example are summed first.
        within: Takes a target's index and rows ``[..., groups, d_out]`` to what goes into E.

    Attributes:
        passes: Forward passes that counted since the beginning.
        holding: Whether gradients are held back until the step, as several backward passes have
            reached one forward pass.
        verifying: Whether gᵀh arrives of every layer, to be verified.
        followed: Of the step that was committed last, while verifying.
    """

    def __init__(
        self,
        reduction: Reduction,
        positions: Positions,
        within: Callable[[int, Tensor], Tensor] = lambda index, rows: rows,
    ) -> None:
        self.passes = 0
        self._reduction = reduction
        self._positions = positions
        self._within = within
        self.holding = False
        self.verifying = False
        self.followed = Followed()
        self._tasks: dict[int, Task] = {}
        self._discarded = 0
        self._aside: list[Task] = []
        self._owner_of: Callable[[Tensor], int] = lambda parameter: 0
        self._stages = [Stage(lambda index: True)]

    def divide(
        self,
        optimizers: int,
        trains: Callable[[int], int],
        holds: Callable[[Tensor], int],
    ) -> None:
        """Keep one account for each of several optimizers.

        Args:
            optimizers: How many.
            trains: Number of the optimizer that trains a target, by the target's index.
            holds: Number of the optimizer that holds a parameter.
        """
        self._owner_of = holds
        self._stages = [
            Stage(lambda index, number=number: trains(index) == number)  # type: ignore[misc]
            for number in range(optimizers)
        ]

    def begin(self, besides: Tensor | None = None) -> None:
        """A forward pass begins: decide on the backward passes that ended before it.

        Args:
            besides: A parameter whose gradient a new backward pass has grown already.
        """
        self._settle()
        for stage in self._stages:
            if stage.cleared(besides):
                self._discarded += stage.drop()

    def gradient(
        self,
        forward: ForwardPass,
        call: Call,
        rows: Tensor,
        weight_gradient: Tensor | None,
        *,
        loss: bool,
        task: int | None = None,
    ) -> None:
        """One call's gradient arrived.

        Args:
            forward: Its forward pass.
            call: The call.
            rows: ``[n, positions, groups, d_out]``.
            weight_gradient: gᵀh ``[groups, d_out, d_in]`` where G is formed from it.
            loss: Whether E is to be summed.
            task: The graph task of the backward pass it belongs to; None: the one that runs.
        """
        into = self._open(torch._C._current_graph_task_id() if task is None else task)
        into.forwards[forward] = None
        into.delivered[call] = rows.shape[0] * rows.shape[1]
        moments = into.window.layer(call.index)
        if weight_gradient is not None:
            moments.add_gradient(weight_gradient)
        if self.verifying:
            self._follow(into.followed, forward, call, rows, weight_gradient)
        if not loss:
            return
        rows = self._within(call.index, rows)
        if self._positions == "reduce":
            key, summed = (forward, call.index), rows.sum(1)
            into.reduced[key] = into.reduced[key] + summed if key in into.reduced else summed
        elif self.holding:
            into.held[call] = forward, rows.clone()
        else:
            moments.add_outer("loss", rows.flatten(0, 1), self._scale(forward))

    def enter(self, forward: ForwardPass) -> None:
        """The backward pass that runs has reached the output of a forward pass."""
        self._open(torch._C._current_graph_task_id()).forwards[forward] = None

    def accumulated(self, parameter: Tensor | None) -> None:
        """A parameter's gradient has grown in the backward pass that runs, or just ran.

        Args:
            parameter: None for what stands for a sharded parameter, whose own gradient is not
                there yet: any of the optimizers' may be meant.
        """
        task = self._running(parameter)
        if task is None:
            return
        if parameter is None:
            task.accumulated |= set(range(len(self._stages)))
        else:
            owner = self._owner_of(parameter)
            task.accumulated.add(owner)
            self._stages[owner].grown(parameter)

    def commit(self, loss_scale: float | Tensor = 1.0, optimizer: int = -1) -> Window:
        """An optimizer takes its step: what it is made of, complete.

        Args:
            loss_scale: S, what the user's loss was multiplied by.
            optimizer: Its number; the last one by default, which ends the step.

        Returns:
            Sums of the step's forward passes. G formed from gᵀh is one gradient, of weight 1.
        """
        self._settle()
        stage, last = self._stages[optimizer], optimizer in (-1, len(self._stages) - 1)
        if stage.gone():
            self._discarded += stage.drop()
        if last:
            self._take_aside(stage)
        passes, followed = len(stage.forwards), stage.followed
        sizes = tuple(forward.examples for forward in stage.forwards)
        window = stage.take(self._scale)
        factor: float | Tensor = 1.0 / loss_scale
        for moments in window.layers:
            if moments.gradient is not None:
                moments.gradient.mul_(factor)
                moments.gradient_weight = 1.0
        scale = self._step_scale(passes, factor)
        window.scale_loss(scale**2)
        self.followed = replace(
            followed,
            weighted={index: total * scale for index, total in followed.weighted.items()},
            passes=passes,
            sizes=sizes,
        )
        if last:
            window.discarded, self._discarded = self._discarded, 0
        return window

    @property
    def is_clear(self) -> bool:
        """Whether nothing is staged."""
        if self._tasks or self._aside or self._discarded:
            return False
        return all(stage.is_empty for stage in self._stages)

    def clear(self) -> None:
        """Forget what is staged."""
        self._tasks.clear()
        self._aside.clear()
        self._discarded = 0
        for stage in self._stages:
            stage.drop()

    def nbytes(self) -> int:
        """Bytes of what is held back."""
        return sum(stage.nbytes() for stage in self._stages)

    def _running(self, parameter: Tensor | None) -> Task | None:
        """The backward pass in which a gradient has grown."""
        number = torch._C._current_graph_task_id()
        if number in self._tasks:
            return self._tasks[number]
        # inside another, or after its end
        others = [task for task in self._tasks.values() if not task.ended or number < 0]
        if others or number < 0:
            return others[-1] if others else None
        self.begin(besides=parameter)  # a new one that has reached no measured layer yet
        return self._open(number)

    def _open(self, number: int) -> Task:
        task = self._tasks.get(number)
        if task is None:
            if all(before.ended for before in self._tasks.values()):
                self.begin()
            task = self._tasks[number] = Task()
            torch.autograd.Variable._execution_engine.queue_callback(task.end)
        return task

    def _settle(self) -> None:
        """Add the backward passes that have ended, if they count; one that raised does not."""
        for task in self._tasks.values():
            if task.ended and task.accumulated:
                for owner in task.accumulated:
                    self._add(task, self._stages[owner])
                task.release()
            elif task.ended and task.delivered:
                # two are as unclear as many, and only one needs its sums
                self._aside = [*self._aside[:1], task]
        self._tasks.clear()

    def _add(self, task: Task, stage: Stage) -> None:
        counted = {forward for other in self._stages for forward in other.forwards}
        self.passes += sum(forward not in counted for forward in task.forwards)
        again = stage.add(task)
        if again and not self.holding and self._positions == "expand":
            stage.withhold(again, "loss", SEVERAL)
            self.holding = True

    def _take_aside(self, stage: Stage) -> None:
        """Use the one backward pass that added to no gradient, if nothing else is there."""
        aside, self._aside = self._aside, []
        if stage.forwards or not aside:
            return
        if len(aside) == 1:
            self._add(aside[0], stage)
        else:
            reached = {call.index for task in aside for call in task.delivered}
            stage.withhold(reached, "loss", UNCLEAR)
            stage.withhold(reached, "jacobian", UNCLEAR)
            stage.withhold(reached, "jacobian_change", UNCLEAR)

    def _follow(
        self,
        followed: Followed,
        forward: ForwardPass,
        call: Call,
        rows: Tensor,
        weight_gradient: Tensor | None,
    ) -> None:
        if torch.finfo(rows.dtype).bits < 32:
            followed.coarse.add(call.index)
        if weight_gradient is None or call.inputs is None:
            followed.missing.add(call.index)
            return
        sizes = torch.linalg.vector_norm(rows), torch.linalg.vector_norm(call.inputs.float())
        fresh = Followed(
            weighted={call.index: weight_gradient * self._scale(forward)},
            reach={call.index: sizes[0].float() * sizes[1]},
        )
        followed.merge(fresh, lambda _: True)

    def _step_scale(self, passes: int, factor: float | Tensor) -> float | Tensor:
        """Factor of a step on all its per-example gradients: a/S with "mean", 1/S with "sum"."""
        return factor * passes if self._reduction == "mean" else factor

    def _scale(self, forward: ForwardPass) -> float:
        return float(forward.examples) if self._reduction == "mean" else 1.0
