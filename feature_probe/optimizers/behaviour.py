"""Which fixed point an optimizer's weight decay has, found from what the optimizer does.

Twins of the optimizer (:mod:`.twin`) go through a few trials (:mod:`.trials`), so that timm's, a
user's own and a renamed optimizer are judged by their steps, not by their names.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from feature_probe.optimizers.trials import (
    PAIRS,
    STEPS,
    TOLERANCE,
    Make,
    clock_rate,
    decouples,
    difference,
    matrix,
    rests,
)
from feature_probe.optimizers.twin import Twin, attributes, inner_optimizer, is_counter, isolated

Form = Literal["none", "coupled", "decoupled", "unknown"]

_NAN = float("nan")
#: The last results, so that asking at every report costs nothing.
_CACHE: OrderedDict[Any, DecayBehaviour] = OrderedDict()
_CACHED = 128
#: What an optimizer may call its decay if not weight_decay.
_OWN_NAME = re.compile(r"decay|^(wd|l2)$")


@dataclass(frozen=True)
class DecayBehaviour:
    """How a parameter group decays its weights.

    Attributes:
        form: "none": there is no decay, or none is applied; "coupled": at rest G = −λW;
            "decoupled": W₊ = (1 − ηλ)W − ηU, at rest U = −λW; "unknown".
        clock: Decay age of one step in units of ηλ: (1−δ)/(1−μ) for SGD with momentum μ and
            dampening δ, 1 for decoupled decay; NaN where the decay is not proportional to the
            weight, as when Adam scales it.
        reason: Why the form is unknown or the clock is NaN, and what else to know; else "".
    """

    form: Form
    clock: float
    reason: str = ""


def decay_behaviour(optimizer: Optimizer, group: Mapping[str, Any]) -> DecayBehaviour:
    """The form and the clock of one parameter group's weight decay.

    Results are kept by class and settings (η and λ > 0 aside), so only the first call, and the
    first after a change of another setting, runs twins: tens of milliseconds for most, a second for
    Kron. Each later call takes some tens of microseconds.
    Attributes of the optimizer that are integers are taken for counters and not compared.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; a wrapper that holds another as
            ``base_optimizer`` or ``optimizer`` is judged by that one. Untouched.
        group: One of its parameter groups, as it stands.
    """
    optimizer = inner_optimizer(optimizer)
    name = type(optimizer).__name__
    try:
        decay = float(group.get("weight_decay", 0.0) or 0.0)
    except (TypeError, ValueError):
        return _unknown(f"{name}: weight_decay is not a number: {group['weight_decay']!r}")
    refusal = _refused(optimizer, group, decay)
    if refusal:
        return _unknown(refusal)
    if type(optimizer) is SGD:
        return _sgd(group) if decay else DecayBehaviour("none", 0.0)
    key = _key(optimizer, group, decay)
    if key not in _CACHE:
        _CACHE[key] = _tried(optimizer, group, decay)
        while len(_CACHE) > _CACHED:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def sgd_clock(group: Mapping[str, Any]) -> Any:
    """(1−δ)/(1−μ): decay age per step of ``torch.optim.SGD`` in units of ηλ, Nesterov or not.

    A number, or a 0-dim tensor where the group's momentum is one; NaN for a momentum of 1.
    """
    momentum = group["momentum"]
    if isinstance(momentum, (int, float)):
        if momentum == 0:
            return 1.0  # torch then leaves the dampening out
        if momentum >= 1:
            return _NAN
    return (1.0 - group["dampening"]) / (1.0 - momentum)


def _sgd(group: Mapping[str, Any]) -> DecayBehaviour:
    clock = float(sgd_clock(group))
    unstable = "SGD with a momentum of 1 has no decay age" if math.isnan(clock) else ""
    return DecayBehaviour("coupled", clock, unstable)


def form_note(optimizer: Optimizer) -> list[str]:
    """One line per parameter group: how its weights decay and which scores that calls for.

    For example "AdamW, group 0 (12 tensors, weight_decay 0.01): decoupled decay; ...".
    """
    optimizer = inner_optimizer(optimizer)
    lines = []
    for number, group in enumerate(optimizer.param_groups):
        count = len(group["params"])
        decay = group.get("weight_decay", 0.0)
        told = f"{float(decay):g}" if isinstance(decay, (int, float, Tensor)) else repr(decay)
        lines.append(
            f"{type(optimizer).__name__}, group {number} ({count} tensor{'s' * (count != 1)}, "
            f"weight_decay {told}): {_words(decay_behaviour(optimizer, group))}"
        )
    return lines


def _words(behaviour: DecayBehaviour) -> str:
    meaning = {
        "none": "no weight decay; nothing balances the gradient at rest: the equalities with "
        "weight_decay do not apply",
        "coupled": "coupled decay; at rest the gradient balances it: read fact",
        "decoupled": "decoupled decay; at rest the update, not the gradient, balances it: read "
        "update_fact, not fact",
        "unknown": "form of decay unknown: neither fact nor update_fact need hold",
    }[behaviour.form]
    return meaning + (f" ({behaviour.reason})" if behaviour.reason else "")


def _unknown(reason: str) -> DecayBehaviour:
    return DecayBehaviour("unknown", _NAN, reason)


def _refused(optimizer: Optimizer, group: Mapping[str, Any], decay: float) -> str:
    """Why an optimizer is not tried at all: rules that a short trial need not show."""
    names = [kind.__name__ for kind in type(optimizer).__mro__]
    name = names[0]
    if "ASGD" in names and (decay or group.get("lambd")):
        return f"{name} decays by its own lambd as well and averages: not a form the probe knows"
    if decay and any(kind.startswith("Adafactor") for kind in names):
        return (
            f"{name} scales its learning rate by the weights or by time, and its decay with or "
            "without it: not a form the probe knows"
        )
    for key, value in {**optimizer.defaults, **group}.items():
        cautious = "cautious" in key and ("decay" in key or "wd" in key)
        if decay and cautious and isinstance(value, (bool, int, float)) and value:
            return f"{name}, {key}: only some entries decay at a step: not a form the probe knows"
    return ""


def _tried(optimizer: Optimizer, group: Mapping[str, Any], decay: float) -> DecayBehaviour:
    """The behaviour, from twins with the layout of state that this optimizer needs."""
    name = type(optimizer).__name__
    if decay and "lr" not in group:
        return _unknown(f"{name} has no lr in its parameter groups")
    error = ""
    with isolated():
        for seeded in (False, True):

            def make(start: Tensor, lr: float, decay: float, seeded: bool = seeded) -> Twin:
                return Twin(optimizer, group, start, lr, decay, seeded)

            try:
                return _judged(make, name, group) if decay else _undecayed(make, name, group)
            except Exception as raised:  # the user's step may raise anything
                text = " ".join(str(raised).split())[:160]
                error = error or f"{type(raised).__name__}: {text}"
    if not decay:
        return DecayBehaviour("none", 0.0)
    return _unknown(f"{name} could not be tried on a small matrix: {error}")


def _undecayed(make: Make, name: str, group: Mapping[str, Any]) -> DecayBehaviour:
    """With no weight_decay in the group: whether weights stay where no gradient moves them."""
    twin, start = make(matrix(0), PAIRS[0][0], 0.0), matrix(0)
    for _ in range(STEPS):
        if not torch.equal(twin.step(torch.zeros_like(start)), start):
            called = [key for key in group if key != "weight_decay" and _OWN_NAME.search(key)]
            own = (
                f" ({called[0]!r} in its groups; the probe reads 'weight_decay')" if called else ""
            )
            return _unknown(
                f"{name} moves weights without weight_decay and without a gradient: it has a rule "
                f"of its own{own}, not a form the probe knows"
            )
    return DecayBehaviour("none", 0.0)


def _judged(make: Make, name: str, group: Mapping[str, Any]) -> DecayBehaviour:
    """The behaviour with λ > 0."""
    moved = [difference(make, *pair) for pair in PAIRS]
    if min(motion for motion, _ in moved) == 0:
        return _unknown(f"{name} did not move a small matrix in {STEPS} steps")
    if all(gap <= TOLERANCE for _, gap in moved):
        return DecayBehaviour("none", 0.0, f"{name} does not apply its weight_decay")
    if all(rests(make, *pair) for pair in PAIRS):
        clock = clock_rate(make)
        return DecayBehaviour(
            "coupled",
            clock,
            f"{name} does not apply the decay in proportion to the weight: its age is undefined"
            if math.isnan(clock)
            else "",
        )
    if decouples(make):
        return DecayBehaviour("decoupled", 1.0)
    if group.get("corrected_weight_decay"):
        return _unknown(
            f"{name}, corrected_weight_decay: the decay per step is not lr times weight_decay: "
            "not a form the probe knows"
        )
    return _unknown(
        f"{name}: its steps are neither those of a loss with an L2 penalty added nor those "
        "of a decay by lr times weight_decay beside the update (LAMB, for one, scales decay and "
        "gradient together): not a form the probe knows"
    )


def _key(optimizer: Optimizer, group: Mapping[str, Any], decay: float) -> Any:
    """What the behaviour can depend on, as plain hashable data."""
    left_out = ("params", "param_names", "lr", "weight_decay", "initial_lr")
    entries = {
        name: value
        for name, value in group.items()
        if name not in left_out and not is_counter(optimizer, name, value)
    }
    held = {
        name: value
        for name, value in attributes(optimizer).items()
        if name != "defaults" and (isinstance(value, bool) or not isinstance(value, int))
    }
    defaults = {name: value for name, value in optimizer.defaults.items() if name not in left_out}
    named = (type(optimizer), decay > 0, "lr" in group, bool(optimizer.state))
    return (*named, _plain(entries), _plain(held), _plain(defaults))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return tuple([(str(key), _plain(entry)) for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return tuple([_plain(entry) for entry in value])
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else tuple(value.shape)
    return getattr(value, "__qualname__", type(value).__qualname__)
