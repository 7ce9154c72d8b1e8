"""λ: the weight decay of each layer, from the optimizer's parameter groups or as given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from feature_probe.errors import ConfigurationError
from feature_probe.layers.targets import Discovery, Target

#: Optimizers whose decay is decoupled whatever their groups say.
_DECOUPLED = frozenset({"AdamW", "NAdamW", "SGDW", "Lion", "Muon"})


class WeightDecay:
    """Where λ comes from: given numbers first, then the optimizer's group that holds the weight.

    Groups are read anew at every report, so a schedule of λ is followed.

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
        if optimizers:
            self._check(discovery)

    def value(self, target: Target, computed: bool) -> float | None:
        """λ of a layer; None where it is not known.

        Args:
            target: The layer.
            computed: Whether its W is computed from other parameters, on which the decay acts.
        """
        if isinstance(self._given, float):
            return self._given
        if target.name in self._given:
            return self._given[target.name]
        group = self._group(target.parameter)
        if group is None or computed:
            return None
        decay = group.get("weight_decay", 0.0)
        return float(decay)

    def premise(self, target: Target, computed: bool) -> str:
        """Why an equality with λ may not be expected to hold for this layer, or ""."""
        if computed:
            return (
                "the weight is computed from other parameters, on which the decay acts: "
                "FACT need not hold for it"
            )
        if target.parameter is not None and not target.parameter.requires_grad:
            return "frozen: training does not drive it to stationarity"
        group = self._group(target.parameter)
        if group is None:
            return "not held by the optimizer" if self._optimizers else ""
        name = type(self._holder(target.parameter)).__name__
        if group.get("weight_decay") and (
            name in _DECOUPLED or group.get("decoupled_weight_decay", False)
        ):
            return (
                f"decoupled weight decay ({name}): FACT in its gradient form need not hold, "
                "residual and decay ratio do not apply"
            )
        if self.value(target, computed) and not group.get("weight_decay"):
            return (
                f"λ was given, but {name} applies none: where the loss itself holds (λ/2)‖W‖², its "
                "gradient contains λW and FACT cannot be read from it (measure() without that term)"
            )
        return ""

    def sign(self, target: Target) -> float:
        """−1 where the optimizer maximises: the loss it minimises is then minus the user's."""
        group = self._group(target.parameter)
        return -1.0 if group is not None and group.get("maximize", False) else 1.0

    def _group(self, parameter: nn.Parameter | None) -> Mapping[str, Any] | None:
        holder = self._holder(parameter)
        for group in () if holder is None else holder.param_groups:
            if any(parameter is held for held in group["params"]):
                return group
        return None

    def _holder(self, parameter: nn.Parameter | None) -> Optimizer | None:
        """The optimizer that trains a parameter."""
        for optimizer in () if parameter is None else self._optimizers:
            for group in optimizer.param_groups:
                if any(parameter is held for held in group["params"]):
                    return optimizer
        return None

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
            _number(group.get("weight_decay", 0.0), "the optimizer's weight_decay")


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
