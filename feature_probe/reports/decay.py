"""λ: the weight decay of each layer, from the optimizer's parameter groups or as given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import SGD, Optimizer

from feature_probe.errors import ConfigurationError
from feature_probe.layers.targets import Discovery, Target
from feature_probe.optimizers.behaviour import DecayBehaviour, decay_behaviour
from feature_probe.reports.diagnosis import DecayForm
from feature_probe.reports.stationarity import Momentum

#: What takes the place of FACT and bFACT where the decay is decoupled.
UPDATE_RELATIONS = ("update_fact", "update_bfact")
#: How far a λ that was given may lie from the optimizer's, relatively, and be the same.
_SAME = 1e-6


class WeightDecay:
    """Where λ comes from: given numbers first, then the optimizer's group that holds the weight.

    Groups are read anew at every report (:meth:`refresh`), so a schedule of λ is followed.

    Args:
        discovery: The measured layers.
        optimizers: The optimizers that train them.
        given: One λ for all layers, or λ by layer name, or None.

    Raises:
        ConfigurationError: for a negative or non-finite λ, an unknown layer name, or an optimizer
            that holds none of the measured weights.
    """

    def __init__(
        self,
        discovery: Discovery,
        optimizers: Sequence[Optimizer],
        given: float | Mapping[str, float] | None,
    ) -> None:
        self._optimizers = optimizers
        self._given = _parse(given, discovery.names())
        self.refresh()
        if optimizers:
            self._check(discovery)

    def refresh(self) -> None:
        """Read which optimizers hold which parameters, and forget how they were found to decay."""
        self._held: dict[int, list[tuple[Optimizer, dict[str, Any]]]] = {}
        self._behaviours: dict[int, DecayBehaviour] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._held.setdefault(id(parameter), []).append((optimizer, group))

    def value(self, target: Target, computed: bool) -> float | None:
        """λ of a layer; None where it is not known.

        Args:
            target: The layer.
            computed: Whether its W is computed from other parameters, on which the decay acts.
        """
        given = self._given_value(target)
        if given is not None:
            return given
        group = self.group(target)
        if not group or computed:
            return None
        return float(group.get("weight_decay") or 0.0)

    def default_relations(self) -> tuple[str, ...]:
        """The relations to measure where none are asked for, by how the optimizers decay."""
        decoupled = any(
            decay_behaviour(optimizer, group).form == "decoupled"
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        )
        return ("fact", "bfact", *(UPDATE_RELATIONS if decoupled else ()), "nfa", "enfa")

    def form(self, target: Target) -> DecayForm:
        """How the decay of a layer's weight acts."""
        behaviour = self.behaviour(target)
        if behaviour is not None:
            return behaviour.form
        return "unknown" if self._optimizers else "given"

    def behaviour(self, target: Target) -> DecayBehaviour | None:
        """How the layer's optimizer decays weights; None where none holds its weight."""
        for optimizer, group in self._holders(target)[:1]:
            if id(group) not in self._behaviours:
                self._behaviours[id(group)] = decay_behaviour(optimizer, group)
            return self._behaviours[id(group)]
        return None

    def momentum(self, target: Target) -> Momentum | None:
        """SGD's settings for a layer; None for other optimizers."""
        optimizer, group = self.holder(target), self.group(target)
        if not isinstance(optimizer, SGD) or type(optimizer).step is not SGD.step:
            return None
        return Momentum(
            float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"])
        )

    def gradient_premise(self, target: Target) -> str:
        """Why the optimizer's way with weight decay keeps FACT from holding, or ""."""
        behaviour, name = self.behaviour(target), type(self.holder(target)).__name__
        if behaviour is None:
            return "not held by the optimizer" if self._optimizers else ""
        if behaviour.form == "decoupled":
            return (
                f"decoupled weight decay ({name}): at rest the update, not the gradient, balances "
                "the decay, so that FACT in its gradient form need not hold; read update_fact"
            )
        if behaviour.form == "unknown":
            return behaviour.reason
        if behaviour.form == "none":
            if self.value(target, computed=False):
                return (
                    f"λ was given, but {name} applies none: where the loss itself holds an L2 "
                    "penalty, its gradient contains that, and FACT cannot be read from it "
                    "(measure() without the penalty can)"
                )
            return "no weight decay: nothing balances the gradient at rest"
        return self._other_decay(target) or self._several(target)

    def update_premise(self, target: Target) -> str:
        """Why the update form of FACT is not the one to read, or ""."""
        behaviour, name = self.behaviour(target), type(self.holder(target)).__name__
        if behaviour is None or behaviour.form == "unknown":
            return self.gradient_premise(target) or "no optimizer, and so no update, was seen"
        if behaviour.form == "decoupled":
            return self._other_decay(target) or self._several(target)
        if behaviour.form == "none":
            return "no weight decay: nothing balances the update at rest"
        return f"coupled weight decay ({name}): at rest the gradient balances the decay; read fact"

    def sign(self, target: Target) -> float:
        """−1 where the optimizer maximises: the loss it minimises is then minus the user's."""
        return -1.0 if self.group(target).get("maximize", False) else 1.0

    def group(self, target: Target) -> Mapping[str, Any]:
        """The optimizer's group that holds a layer's weight; empty if none does."""
        return next((group for _, group in self._holders(target)), {})

    def holder(self, target: Target) -> Optimizer | None:
        """The optimizer that trains a layer's weight."""
        return next((optimizer for optimizer, _ in self._holders(target)), None)

    def _holders(self, target: Target) -> Sequence[tuple[Optimizer, Mapping[str, Any]]]:
        return self._held.get(id(target.parameter), ())

    def own_value(self, target: Target) -> float | None:
        """λ that the optimizer's group says, whatever was given; None where there is no group."""
        group = self.group(target)
        return float(group.get("weight_decay") or 0.0) if group else None

    def _other_decay(self, target: Target) -> str:
        """Whether λ was given otherwise than the optimizer applies it."""
        given, own = self._given_value(target), self.own_value(target)
        if given is None or own is None or abs(given - own) <= _SAME * own:
            return ""
        name = type(self.holder(target)).__name__
        return f"λ was given as {given:g}, but {name} applies {own:g}"

    def _several(self, target: Target) -> str:
        """Whether several optimizers decay one weight."""
        if len(self._holders(target)) < 2:
            return ""
        return "several optimizers hold the weight: no one λ is that of its loss"

    def _given_value(self, target: Target) -> float | None:
        if isinstance(self._given, float):
            return self._given
        return self._given.get(target.name)

    def _check(self, discovery: Discovery) -> None:
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        if not any(id(parameter) in held for parameter in discovery.parameters()):
            kinds = ", ".join(type(optimizer).__name__ for optimizer in self._optimizers)
            raise ConfigurationError(
                f"the optimizer ({kinds}) holds none of the measured layers' parameters "
                f"({', '.join(discovery.names()[:8])}): was it made for another model, or before "
                "the model was copied or moved?"
            )
        for group in groups:
            _number(group.get("weight_decay") or 0.0, "the optimizer's weight_decay")


def _parse(
    given: float | Mapping[str, float] | None, names: Sequence[str]
) -> float | dict[str, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return _number(given, "weight_decay")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ConfigurationError(
            f"weight_decay names layer {unknown[0]!r}, which is not measured; "
            f"layers: {', '.join(names)}"
        )
    return {name: _number(decay, f"weight_decay[{name!r}]") for name, decay in given.items()}


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{name} must be a number, got {value!r}") from error
    if not (math.isfinite(number) and number >= 0):
        raise ConfigurationError(f"{name} must be finite and not negative, got {value!r}")
    return number
