"""Implied gradients: what the optimizer's steps say that they were, from weights and state alone.

With D_t = G_t + λW_t for coupled decay, and D_t = G_t where the decay is decoupled (λ of
:class:`Rule` is 0 then), Σ_t D_t follows from the weights and the momentum buffers
(:mod:`feature_probe.optimizers.identities`). G is the gradient of what the optimizer minimises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from feature_probe.optimizers.identities import (
    adam_sum,
    momentum_sum,
    scaled_shift,
    sgd_sum,
    sgd_sum_from_start,
)

_ADAMS = (Adam, AdamW, NAdam, RAdam)


@dataclass(frozen=True)
class Rule:
    """What one step of a known optimizer works with.

    Attributes:
        kind: Whose state it is: SGD's momentum buffer, or Adam's first moment.
        rate: η.
        decay: λ of the coupled decay, 0 where it is decoupled.
        momentum: μ, or β₁.
        dampening: δ.
        nesterov: Whether the momentum is Nesterov's.
        decoupled: Whether there is a decay beside the gradient.
    """

    kind: Literal["sgd", "adam"]
    rate: float
    decay: float
    momentum: float
    dampening: float = 0.0
    nesterov: bool = False
    decoupled: bool = False

    @classmethod
    def of(cls, optimizer: Optimizer | None, group: Mapping[str, Any]) -> Rule | str:
        """The rule of a group as it stands, or why it is not known."""
        if optimizer is None or not group:
            return "no optimizer that holds the weight was given"
        decay, rate = float(group.get("weight_decay") or 0.0), float(group.get("lr", 0.0))
        if type(optimizer) is SGD:
            momentum = float(group["momentum"])
            dampening = float(group["dampening"]) if momentum else 0.0
            if dampening == 1:
                return "with dampening 1 the gradient never enters SGD's momentum buffer"
            return cls("sgd", rate, decay, momentum, dampening, bool(group["nesterov"]))
        if type(optimizer) in _ADAMS:
            apart = bool(group.get("decoupled_weight_decay", type(optimizer) is AdamW))
            own = 0.0 if apart else decay
            return cls("adam", rate, own, float(group["betas"][0]), decoupled=apart and decay > 0)
        return f"what {type(optimizer).__name__}'s weights say of its gradients is not known"

    @property
    def state(self) -> str:
        """Name of the optimizer's state that is followed."""
        return "momentum_buffer" if self.kind == "sgd" else "exp_avg"

    def alike(self, other: Rule) -> bool:
        """Whether one identity over a window holds for both; η may differ."""
        mine, its = self, other
        return (mine.momentum, mine.dampening, mine.nesterov, mine.decay) == (
            its.momentum, its.dampening, its.nesterov, its.decay,
        )  # fmt: skip


@dataclass
class Implied:
    """One layer's steps; sums in float64 where the device has it.

    Attributes:
        reason: Why nothing follows from them, or "".
        shift_reason: Why nothing follows from the weights, while it may from the state, or "".
        rule: Of the first step.
        constant: Whether λ was the same at all steps.
        stated: Σ_t D_t from the optimizer's state, of steps with one.
        stated_noise: Σ_t ε²‖b_t‖², the rounding of the state.
        shift: Σ_t (W_t − W_{t+1})/η_t, without the first step where torch's dampening spares it.
        shift_noise: Σ_t ε²‖W_t‖²/η_t², the rounding of the weights.
        changed: How often the weights were not what the step before had left.
        compared: How often they were looked at between two steps.
        steps: Steps that were closed.
    """

    reason: str = ""
    shift_reason: str = ""
    rule: Rule | None = None
    constant: bool = True
    stated: Tensor | None = None
    stated_noise: float = 0.0
    shift: Tensor | None = None
    shift_noise: float = 0.0
    changed: int = 0
    compared: int = 0
    steps: int = 0
    _now: Rule | None = None
    _before: tuple[Tensor, Tensor | None] | None = None
    _left: tuple[Tensor, Tensor | None] | None = None
    _start: Tensor | None = None
    _first: Tensor | None = None

    def begin(self, rule: Rule | str, weight: Tensor, buffer: Tensor | None) -> None:
        """The optimizer is about to step.

        Args:
            rule: Of this step.
            weight: W ``[groups, d_out, d_in]`` before it.
            buffer: The optimizer's state before it, likewise; None: it has none yet.
        """
        if isinstance(rule, str):
            self.reason = self.reason or rule
        if self._before is not None:
            self.reason = self.reason or (
                "its optimizer steps more often than the last one listed, which ends a step"
            )
        else:
            self._compare(weight, buffer)
        self._before = weight.clone(), None if buffer is None else buffer.clone()
        self._now = None if isinstance(rule, str) else rule
        if self._now is None:
            return
        if self.rule is None:
            self.rule, self._start = self._now, self._before[1]
        self.constant &= self.rule.decay == self._now.decay
        if not self.rule.alike(self._now):
            self.shift_reason = "the optimizer's settings changed from one step to another"

    def end(self, weight: Tensor, buffer: Tensor | None) -> None:
        """It has stepped; arguments as in :meth:`begin`, after the step."""
        before, rule = self._before, self._now
        self._before = None
        self._left = weight.clone(), None if buffer is None else buffer.clone()
        if before is None or rule is None or self.reason:
            return
        self.steps += 1
        self._add_state(rule, before[1], self._left[1])
        if rule.kind == "sgd":
            self._add_shift(rule, before[0], weight)

    def missed(self) -> None:
        """A step was not followed."""
        self._before = self._left = None
        if self.steps:
            self.shift_reason = "a step between was not followed"

    def close(self) -> None:
        """No more steps: what is needed no longer goes, the rest to the CPU."""
        self._before = None
        if self._left is not None:
            held = self._left[1]
            self._left = torch.empty(0), None if held is None else held.cpu()
        for name in ("stated", "shift", "_start", "_first"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.cpu())

    def from_weights(self) -> Tensor | None:
        """Σ_t D_t from the weights, and of momentum the buffers at both ends; None if not known."""
        rule, after = self.rule, None if self._left is None else self._left[1]
        if self.reason or self.shift_reason or rule is None or self.shift is None:
            return None
        if rule.momentum == 0:
            return sgd_sum(self.shift)
        if after is None:
            return None
        after = wide(after)
        if self._first is not None:
            return sgd_sum_from_start(
                self.shift, wide(self._first), after,
                momentum=rule.momentum, dampening=rule.dampening,
            )  # fmt: skip
        start = None if self._start is None else wide(self._start)
        return sgd_sum(
            self.shift, start, after,
            momentum=rule.momentum, dampening=rule.dampening, nesterov=rule.nesterov,
        )  # fmt: skip

    def weights_noise(self) -> float:
        """Size of the rounding in :meth:`from_weights`."""
        rule = self.rule
        if rule is None:
            return 0.0
        return float(self.shift_noise**0.5 * (1 - rule.momentum) / (1 - rule.dampening))

    def state_noise(self) -> float:
        """Size of the rounding in ``stated``."""
        rule = self.rule
        if rule is None:
            return 0.0
        rest = 1 - (rule.momentum if rule.kind == "adam" else rule.dampening)
        return float(self.stated_noise**0.5 / rest)

    def _compare(self, weight: Tensor, buffer: Tensor | None) -> None:
        """Whether weight and state are what the last step left."""
        if self._left is None:
            return
        held, state = self._left
        self.compared += 1
        self.changed += not torch.equal(held, weight)
        if (state is None) != (buffer is None) or (
            state is not None and buffer is not None and not torch.equal(state, buffer)
        ):
            self.reason = "the optimizer's state was changed between two steps"

    def _add_state(self, rule: Rule, before: Tensor | None, after: Tensor | None) -> None:
        if after is None:
            return
        now = wide(after)
        if rule.kind == "adam":
            term = adam_sum(now, None if before is None else wide(before), now, rule.momentum)
        elif before is None:
            term = now
        else:
            term = momentum_sum([wide(before), now], [rule.momentum], dampening=rule.dampening)
        self.stated = term.clone() if self.stated is None else self.stated.add_(term)
        self.stated_noise += (torch.finfo(after.dtype).eps * float(now.norm())) ** 2

    def _add_shift(self, rule: Rule, before: Tensor, after: Tensor) -> None:
        if rule.rate == 0:
            self.shift_reason = "the learning rate was 0 in a step"
            return
        first = self.steps == 1 and self._start is None and rule.dampening != 0
        if first and self._left is not None:
            self._first, self.shift = self._left[1], wide(torch.zeros_like(after))
            return
        size = float(wide(before).norm()) / rule.rate
        term = scaled_shift([wide(before), wide(after)], [rule.rate])
        self.shift = term if self.shift is None else self.shift.add_(term)
        self.shift_noise += (torch.finfo(before.dtype).eps / 2 * size) ** 2


def wide(tensor: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.to(torch.float64)
