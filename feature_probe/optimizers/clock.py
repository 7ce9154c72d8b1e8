"""The decay age: how much weight decay the weights have been through since the run began."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from feature_probe.errors import ConfigurationError
from feature_probe.optimizers.behaviour import decay_behaviour, sgd_clock
from feature_probe.optimizers.twin import inner_optimizer

_LATE = "attached after training had begun: what decay came before is not known"


@dataclass
class _Entry:
    """The clock of one parameter group.

    Attributes:
        total: Σ ηλ·clock so far; on lr's device where lr is a tensor.
        reason: Why that is not the age, or "".
        factor: The clock per step; None: SGD's, from the group as it stands.
        decided: The sign of λ that ``factor`` was found for; None: not yet.
        settings: Momentum and its kin when ``factor`` was measured; None: it does not need them.
    """

    total: float | Tensor = 0.0
    reason: str = ""
    factor: float | None = 0.0
    decided: bool | None = None
    settings: tuple[Any, ...] | None = None


class DecayClock:
    """Σ_t η_t λ_t·clock_t for every parameter: at age a without gradients, e⁻ᵃ of W₀ is left.

    clock is (1−δ)/(1−μ) for SGD with momentum μ and dampening δ, 1 for decoupled decay, and
    measured once for other rules (:func:`.behaviour.decay_behaviour`). η, λ and SGD's μ and δ are
    read at every step, so schedules are followed.

    The age counts from the start of the run. Where the run had begun before, it is unknown until a
    state is loaded. Evidence is an optimizer's state of a step taken, or a step that one of torch's
    LR schedulers has seen; SGD without momentum and without such a scheduler leaves none. A
    backward pass is no evidence, nor is a learning rate that differs from the first (warm-up).

    Args:
        optimizers: The user's, always in the same order; wrappers like SAM's are followed by the
            groups they show.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._index = {id(optimizer): number for number, optimizer in enumerate(self._optimizers)}
        self._entries: list[list[_Entry]] = []
        self.start()

    def start(self) -> None:
        """Begin at age 0, or unknown for the optimizers that have stepped before."""
        self._entries = []
        for optimizer in self._optimizers:
            reason = _LATE if has_begun(optimizer) else ""
            self._entries.append([_Entry(reason=reason) for _ in optimizer.param_groups])
        self._decide_all()

    def advance(self, optimizer: Optimizer) -> None:
        """Count one step that an optimizer takes, with its groups as they stand.

        Takes microseconds, and waits for no device, save when a group is new or its λ leaves 0.

        Raises:
            ConfigurationError: if the clock was not made for this optimizer.
        """
        number = self._index.get(id(optimizer))
        if number is None:
            raise ConfigurationError(
                f"the decay clock was not made for this {type(optimizer).__name__}: give it all "
                "optimizers at the start"
            )
        entries = self._entries[number]
        for place, group in enumerate(optimizer.param_groups):
            if place == len(entries):
                entries.append(_Entry())
            entry = entries[place]
            decay = group.get("weight_decay", 0.0)
            decays = isinstance(decay, Tensor) or decay != 0
            if entry.decided is not decays and (decays or entry.decided is None):
                _decide(entry, optimizer, group, decays)
            if decays and not entry.reason:
                _advance(entry, group, decay)

    def age(self, parameter: Tensor) -> float:
        """The decay age of a parameter; NaN where it is undefined or unknown."""
        entry = self._entry(parameter)
        return math.nan if entry is None or entry.reason else float(entry.total)

    def why_unknown(self, parameter: Tensor) -> str:
        """Why :meth:`age` is NaN, or ""."""
        entry = self._entry(parameter)
        if entry is None:
            return "not held by an optimizer of the clock"
        undefined = "a step's lr, weight_decay or momentum (1 or more) left the age undefined"
        return entry.reason or (undefined if math.isnan(float(entry.total)) else "")

    def state_dict(self) -> dict[str, Any]:
        """Ages and reasons by number of optimizer and group, as plain data."""
        return {
            "ages": [[float(entry.total) for entry in entries] for entries in self._entries],
            "reasons": [[entry.reason for entry in entries] for entries in self._entries],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; groups that it lacks start at 0.

        Raises:
            ConfigurationError: if it is of another number of optimizers, or no such state.
        """
        ages, reasons = state.get("ages"), state.get("reasons")
        if not isinstance(ages, list) or not isinstance(reasons, list):
            raise ConfigurationError(f"not the state of a decay clock: it holds {sorted(state)}")
        if len(ages) != len(self._optimizers) or list(map(len, ages)) != list(map(len, reasons)):
            raise ConfigurationError(
                f"the decay clock's state is of {len(ages)} optimizers, there are "
                f"{len(self._optimizers)}"
            )
        self._entries = [
            [
                _Entry(total=float(age), reason=str(reason))
                for age, reason in zip(*both, strict=True)
            ]
            for both in zip(ages, reasons, strict=True)
        ]
        for entries, optimizer in zip(self._entries, self._optimizers, strict=True):
            entries.extend(_Entry() for _ in optimizer.param_groups[len(entries) :])
        self._decide_all()

    def _decide_all(self) -> None:
        for entries, optimizer in zip(self._entries, self._optimizers, strict=True):
            for entry, group in zip(entries, optimizer.param_groups, strict=False):
                decay = group.get("weight_decay", 0.0)
                _decide(entry, optimizer, group, isinstance(decay, Tensor) or decay != 0)

    def _entry(self, parameter: Tensor) -> _Entry | None:
        for entries, optimizer in zip(self._entries, self._optimizers, strict=True):
            for place, group in enumerate(optimizer.param_groups):
                if any(parameter is held for held in group["params"]):
                    return entries[place] if place < len(entries) else _Entry()
        return None


def has_begun(optimizer: Optimizer) -> bool:
    """Whether an optimizer shows that it has stepped: its state, or a torch LR scheduler's mark.

    State that a constructor lays out (Adagrad's) stands at step 0 and is none.
    """
    both = (optimizer, inner_optimizer(optimizer))
    return any(
        getattr(one, "_opt_called", False) or any(_stepped(held) for held in one.state.values())
        for one in both
    )


def _stepped(state: Any) -> bool:
    if isinstance(state, Mapping):
        return _nonzero([state["step"]] if "step" in state else state.values())
    return _nonzero([state])


def _nonzero(values: Iterable[Any]) -> bool:
    return any(
        hasattr(value, "to_local") or bool(value.count_nonzero())  # a shard may be empty here
        if isinstance(value, Tensor)
        else bool(value)
        for value in values
    )


def _decide(entry: _Entry, optimizer: Optimizer, group: Mapping[str, Any], decays: bool) -> None:
    """Find how a group's age advances."""
    behaviour = decay_behaviour(optimizer, group)
    entry.decided, entry.settings = decays, None
    entry.factor = behaviour.clock
    if math.isnan(behaviour.clock):
        entry.reason = entry.reason or behaviour.reason
    elif behaviour.form == "coupled":
        like = _like_sgd(group)
        close = like is not None and abs(like - behaviour.clock) <= 1e-3 * behaviour.clock
        entry.factor = None if close else behaviour.clock
        entry.settings = None if entry.factor is None else _momenta(group)


def _like_sgd(group: Mapping[str, Any]) -> float | None:
    """The clock by SGD's formula, where the group has what it needs."""
    try:
        return float(sgd_clock(group))
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _momenta(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name) for name in ("momentum", "dampening", "nesterov", "betas"))


def _advance(entry: _Entry, group: Mapping[str, Any], decay: Any) -> None:
    """Add ηλ·clock of one step."""
    if entry.settings is not None and entry.settings != _momenta(group):
        entry.reason = "the momentum changed under a rule whose clock was measured before"
        return
    factor = sgd_clock(group) if entry.factor is None else entry.factor
    passed = group["lr"] * decay * factor
    if isinstance(passed, Tensor):
        passed = passed.detach() if passed.device.type == "mps" else passed.detach().double()
    entry.total = entry.total + passed
