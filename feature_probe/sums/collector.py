"""Collector: one window of a training loop, step by step, with each step's gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from feature_probe.layers.targets import Target
from feature_probe.optimizers.behaviour import decay_behaviour
from feature_probe.sums.observer import Observer
from feature_probe.sums.state import NamedWindow
from feature_probe.sums.stepping import LossScale, Ownership, StepScale, step_scale
from feature_probe.sums.trajectory import Trajectory
from feature_probe.sums.verification import Evidence
from feature_probe.sums.window import Window


class Collector:
    """Adds finished steps to a window.

    Args:
        targets: The measured layers.
        observer: Who formed K and E.
        optimizers: The user's; the last one ends a step. Empty: every call ends one.
        loss_scale: As given by the user.
        gradients: Whether G is asked for.
        updates: Whether the mean update is, of layers whose decay is decoupled.
        motion: Whether the weights' motion is.

    Attributes:
        evidence: For the self-test; None: none is gathered.
        window: What was summed since :meth:`start`.
        trajectory: What the weights did meanwhile.
        spoiled: Set when a hook failed in this step, so that its sums are incomplete.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        observer: Observer,
        optimizers: Sequence[Optimizer],
        loss_scale: LossScale,
        *,
        gradients: bool,
        updates: bool = False,
        motion: bool = False,
    ) -> None:
        self.window = Window()
        self.trajectory = Trajectory()
        self.spoiled = False
        self.evidence: Evidence | None = None
        self._targets = targets
        self._observer = observer
        self._optimizers = optimizers
        self._loss_scale = loss_scale
        self._gradients = gradients
        self._updates = updates
        self._follows = gradients or updates or motion
        self._decoupled: set[int] = set()
        self._ownership = Ownership(targets, optimizers)
        if len(optimizers) > 1:
            own = self._ownership
            observer.ledger.divide(len(optimizers), own.trainer, own.holder)
        #: what the step is made of of each optimizer that stepped before the last one
        self._parts: list[tuple[int, Window, Tensor | None]] = []
        #: examples of the window's steps since each optimizer's own last one
        self._since: Counter[int] = Counter()
        self._weights: dict[int, Tensor] = {}
        self._not_taken: Tensor | None = None
        self._skipped_now: Tensor | None = None
        self._resumed: NamedWindow | None = None
        #: of the ledger, before a step that is followed for the self-test alone
        self._aside: tuple[int, bool] | None = None

    @property
    def verifying(self) -> bool:
        """Whether the next step is followed for the self-test."""
        return self.evidence is not None and self.evidence.active

    @property
    def weights(self) -> Mapping[int, Tensor]:
        """Copies of weights that their own optimizer has changed before the step ended."""
        return self._weights

    def start(self) -> None:
        """An empty window."""
        self.window, self._resumed = Window(), None
        self._observer.open_window()
        self.trajectory.start()
        self._decoupled = {
            id(group)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if self._updates and decay_behaviour(optimizer, group).form == "decoupled"
        }
        self._since.clear()

    def state_dict(self) -> dict[str, Any]:
        """The window so far, and what was seen of the layers, by name. Waits for the device.

        Of a step that has not ended, nothing.
        """
        self.window.settle()
        self._give_resumed()
        named = NamedWindow.copied(self.window, self._names)
        if self._resumed is not None:  # layers that were not used again yet
            named.layers |= self._resumed.layers
            named.problems |= self._resumed.problems
        return {
            "window": named.state_dict(),
            "trajectory": self.trajectory.state_dict(),
            "not_taken": 0 if self._not_taken is None else int(self._not_taken),
            "seen": self._observer.state_dict(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the window of :meth:`state_dict`, in place of this one."""
        self.start()
        self._aside = None
        self._resumed = NamedWindow.from_state(state["window"])
        self.trajectory.load_state_dict(state["trajectory"])
        self._not_taken = torch.tensor(state["not_taken"]) if state["not_taken"] else None
        self._observer.load_state_dict(state["seen"])

    def expect(self, *, in_window: bool) -> None:
        """Another step begins: follow it for the self-test too, or for that alone.

        What a step outside the windows counted is undone, so that reports do not depend on it.
        """
        ledger, verifying = self._observer.ledger, self.verifying
        if not verifying and self._aside is None and not ledger.verifying:
            return
        if self._aside is not None:
            ledger.passes, ledger.holding = self._aside
        self._aside = (ledger.passes, ledger.holding) if verifying and not in_window else None
        ledger.verifying = self._observer.recorder.reader.verifying = verifying

    def forget_step(self) -> None:
        """Drop what is known of a step that has not ended."""
        self._parts, self._weights, self.spoiled = [], {}, False
        self._observer.ledger.clear()

    def leave_out(self) -> None:
        """Drop the step that ends now, and say so."""
        self.forget_step()
        self.window.left_out += 1
        self._missed()

    def count(self, optimizer: Optimizer | None) -> bool:
        """An optimizer is about to step, in a window or not; nothing waits for the device.

        Notes whether a fused one will skip the step. Outside a window nothing is followed, so that
        what is left of a step that has not ended would be of another than the one that ends.

        Returns:
            Whether the step is followed.
        """
        followed = self._observer.recorder.armed
        if not followed and (
            self._parts or self._weights or self.spoiled or not self._observer.ledger.is_clear
        ):
            self.forget_step()
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and self._is_last(optimizer):
            skipped = (found_inf != 0).squeeze().detach()
            self._skipped_now = skipped
            self._not_taken = skipped.long() + (0 if self._not_taken is None else self._not_taken)
        return followed

    def steps_not_taken(self) -> int:
        """How many counted steps fused optimizers skipped since the last call. Waits for them."""
        skipped = 0 if self._not_taken is None else int(self._not_taken)
        self._not_taken = None
        return skipped

    def skipped_now(self) -> bool:
        """Whether a fused optimizer skips the step that ends now. Waits for the device."""
        return self._skipped_now is not None and bool(self._skipped_now)

    def ready(self, optimizer: Optimizer | None, *, keep_weights: bool) -> bool:
        """An optimizer is about to step: read its gradients, and the whole step if it is the last.

        Args:
            optimizer: Which; None without optimizers.
            keep_weights: Whether a report is due at this step, so that weights which change before
                its end are kept as they are now.

        Returns:
            Whether the step is complete.
        """
        scale = step_scale(optimizer, self._loss_scale)
        number, last = self._number(optimizer), self._is_last(optimizer)
        fresh = self._observer.ledger.commit(scale.loss, number)
        gradients = self._read_gradients(fresh, number, scale, keep=keep_weights and not last)
        if not last or scale.taken is not None:  # a copy: it is not known yet whether it counts
            for index, gradient in gradients:
                fresh.layer(index).add_gradient(gradient)
            gradients = []
        if not last:
            self._parts.append((number, fresh, scale.taken))
            return False
        self._end(fresh, scale.taken, gradients)
        self._ownership.refresh()
        return True

    def reported(self) -> None:
        """A report was made of the step that just ended."""
        self._weights = {}

    def nbytes(self) -> int:
        """Bytes of all sums held: of the window, and of the step that has not ended."""
        parts = sum(part.nbytes() for _, part, _ in self._parts)
        sums = self.window.nbytes() + parts + self._observer.ledger.nbytes()
        return sums + self._observer.nbytes() + self.trajectory.nbytes()

    @property
    def _names(self) -> list[str]:
        return [target.name for target in self._targets]

    def _give_resumed(self) -> None:
        """Put the sums of a resumed window under those that follow, before they are added to."""
        if self._resumed is not None:
            self._resumed.give(self.window, self._names, self._device)

    def _device(self, index: int) -> torch.device:
        target = self._targets[index]
        parameters = target.module.parameters() if target.parameter is None else [target.parameter]
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def _is_last(self, optimizer: Optimizer | None) -> bool:
        return not self._optimizers or optimizer is self._optimizers[-1]

    def _number(self, optimizer: Optimizer | None) -> int:
        for number, listed in enumerate(self._optimizers):
            if listed is optimizer:
                return number
        return 0

    def _end(
        self,
        fresh: Window,
        taken: Tensor | None,
        gradients: Sequence[tuple[int, Tensor]],
    ) -> None:
        """Add the step to the window: the last optimizer's part, and those before it.

        Args:
            fresh: The last optimizer's part.
            taken: Whether it will step.
            gradients: Of its targets, where they are not in ``fresh``: they are added as they
                stand, without a copy.
        """
        self._give_resumed()
        parts, self._parts = self._parts, []
        if self.spoiled:
            self.spoiled = False
            self.window.left_out += self._aside is None
            self._missed()
            return
        if self._aside is not None:
            return
        fresh.steps = 1
        if not fresh.examples:  # it trains no measured layer
            fresh.examples = max((part.examples for _, part, _ in parts), default=0)
        for number in range(len(self._optimizers) - 1):
            self._since[number] += fresh.examples
        behind: Counter[int] = Counter()
        for number, part, _ in parts:
            behind[number] += part.examples
        for number, part, part_taken in parts:
            _weigh(part, self._since[number], behind[number])
            _add(self.window, part, _both(taken, part_taken))
        for number in behind:
            self._since[number] = 0
        _add(self.window, fresh, taken)
        for index, gradient in gradients:
            self.window.layer(index).add_gradient(gradient)

    def _read_gradients(
        self, window: Window, number: int, scale: StepScale, *, keep: bool
    ) -> list[tuple[int, Tensor]]:
        """Each layer's gradient as its optimizer is about to use it, weight 1 a step.

        Returns:
            (index, gradient) of the targets whose G is their parameter's; not copied.
        """
        found: list[tuple[int, Tensor]] = []
        for index, target in enumerate(self._targets):
            parameter = target.parameter
            if parameter is None or self._ownership.trainer(index) != number:
                continue
            own = self._observer.recorder.reader.uses_parameter(index)
            formed = window.layer(index).take_gradient() if own else None
            if self.verifying and not self.spoiled:
                self._verify(index, target, number, formed, scale, own=own)
            if self._aside is not None:
                continue
            if self._follows:
                self._follow(target, number, scale)
            if not own:
                continue  # gᵀh of the step's calls, formed as they arrived
            if keep:
                self._weights[index] = parameter.detach().clone()
            if self._gradients and parameter.grad is not None:
                gradient = _dense(parameter.grad.detach())
                unscaled = isinstance(scale.gradient, float) and scale.gradient == 1.0
                found.append((index, gradient if unscaled else gradient / scale.gradient))
        return found

    def _verify(
        self,
        index: int,
        target: Target,
        number: int,
        formed: Tensor | None,
        scale: StepScale,
        *,
        own: bool,
    ) -> None:
        """Note the three sources of one layer's gradient; a failure ends the self-test alone."""
        evidence, group = self.evidence, self._ownership.group(target.parameter)
        if evidence is None:
            return
        optimizer = self._optimizers[number] if group else None
        unusable = "" if own else "its W is computed: the parameter's gradient is not that of W"
        if target.parameter is not None and not target.parameter.requires_grad:
            unusable = "it is frozen"
        problem = self._observer.recorder.reader.problems.get(index, "")
        problem = problem or self._observer.problems.get((index, "loss"), "")
        followed = self._observer.ledger.followed
        try:
            evidence.read(
                index, target, formed, followed, scale, optimizer, group, unusable, problem
            )
        except Exception as error:  # told by stepped()
            evidence.stop(error)

    def _missed(self) -> None:
        if self.evidence is not None and self.evidence.active:
            self.evidence.missed()

    def _follow(self, target: Target, number: int, scale: StepScale) -> None:
        """Note the weight and the gradient of one step."""
        group = self._ownership.group(target.parameter)
        optimizer = self._optimizers[number] if group else None
        self.trajectory.step(
            target,
            optimizer,
            group,
            scale=-scale.gradient if group.get("maximize") else scale.gradient,
            taken=scale.taken,
            keep_sum=id(group) in self._decoupled,
        )


def _add(window: Window, step: Window, taken: Tensor | None) -> None:
    if taken is None:
        window.merge(step)
    else:
        window.merge_if(taken, step)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b.to(a.device)


def _weigh(part: Window, examples: int, behind: int) -> None:
    """Let sums over ``behind`` examples count as if over others, by whose number means divide."""
    if behind and behind != examples:
        for moments in part.layers:
            moments.scale_outer(examples / behind)
    part.examples = 0


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient
