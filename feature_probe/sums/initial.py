"""The weights before training, W₀, which the init-centred relations subtract."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from feature_probe.capture.sharding import full
from feature_probe.errors import ConfigurationError
from feature_probe.layers.targets import Target
from feature_probe.models import plain_name
from feature_probe.theory.matrices import to_algebra

#: What ``initial_weights=`` takes: a state dict, a file of one, or the model as it was.
Given: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str] | nn.Module | None"
#: Where, and how exactly, W₀ is kept.
Store = Literal["device", "cpu", "half"]
#: Keys under which checkpoints hold the state dict of a model.
_NESTED = ("model", "state_dict", "model_state_dict", "module")
#: ‖W − W₀‖/‖W‖ up to which rounding W₀ to float16 (about 1.4·10⁻⁴) would be seen in a score.
_RESOLVED = 3e-3


class InitialWeights:
    """W₀ of a model's measured weights, by parameter.

    Args:
        model: The probed module.
        given: W₀; None: the weights as they stand at :meth:`take`.
        store: "device": as it is, beside the weights. "cpu": in main memory. "half": in main memory
            as float16; layers that have moved by less than 0.3 % of ‖W‖ then have no score.

    Raises:
        ConfigurationError: for another ``store``, or if ``given`` is no state dict, names none of
            the model's weights, or has one of another shape.
    """

    def __init__(self, model: nn.Module, given: Given = None, store: Store = "device") -> None:
        if store not in ("device", "cpu", "half"):
            raise ConfigurationError(f"initial_store must be device, cpu or half, got {store!r}")
        self._store = store
        self._names = {
            id(parameter): plain_name(name)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.dim() > 1
        }
        self._kept: dict[str, Tensor] = {}
        self._is_given = given is not None
        if given is not None:
            self._read(model, given)

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy parameters as they stand, those that are known already excepted.

        All ranks must call it where parameters are sharded.
        """
        new = [p for p in parameters if id(p) in self._names and self.of(p) is None]
        if self._is_given:
            return
        whole = full([parameter.detach() for parameter in new])
        for parameter, tensor in zip(new, whole, strict=True):
            if tensor is not None:
                self._kept[self._names[id(parameter)]] = self._stored(tensor)

    def of(self, parameter: nn.Parameter | None) -> Tensor | None:
        """W₀ of a parameter, in its shape; None where it is not known."""
        name = self._names.get(id(parameter))
        return None if name is None else self._kept.get(name)

    def matrix(self, target: Target) -> tuple[Tensor | None, str]:
        """W₀ of a layer in float64, ``[groups, d_out, d_in]``, or None with the reason."""
        initial = self.of(target.parameter)
        if initial is None:
            where = "in initial_weights" if self._is_given else "when the probe was attached"
            return None, f"W₀ is not known: there was no such weight {where}"
        return to_algebra(target.matrix(initial)), ""

    def change(self, target: Target, weight: Tensor) -> tuple[Tensor | None, str]:
        """W − W₀ of a layer, or None with the reason.

        Args:
            target: The layer, which multiplies by its parameter.
            weight: W ``[groups, d_out, d_in]`` as it stands.

        Returns:
            W − W₀ in float64, ``[groups, d_out, d_in]``.
        """
        initial, unknown = self.matrix(target)
        if initial is None:
            return None, unknown
        now = to_algebra(weight)
        change = now - initial.to(now.device)
        if self._store == "half" and float(change.norm()) <= _RESOLVED * float(now.norm()):
            return None, "W − W₀ is not known: it is no larger than what W₀ in float16 resolves"
        return change, ""

    def state_dict(self) -> dict[str, Tensor]:
        """W₀ by name, as it is kept."""
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The way back; weights given to this object come first."""
        if not self._is_given:
            self._kept = {name: self._stored(tensor) for name, tensor in state.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        if self._store == "device":
            return tensor.detach().clone()
        dtype = torch.float16 if self._store == "half" else tensor.dtype
        return tensor.detach().to("cpu", dtype, copy=True)

    def _read(self, model: nn.Module, given: Given) -> None:
        found = without_prefix(
            {plain_name(name): value for name, value in given_state(given).items()},
            list(self._names.values()),
        )
        shapes = {plain_name(n): p.shape for n, p in model.named_parameters(remove_duplicate=False)}
        for name in dict.fromkeys(self._names.values()):
            value = found.get(name)
            if not isinstance(value, Tensor):
                continue
            if value.shape != shapes[name]:
                raise ConfigurationError(
                    f"initial_weights has {name} of shape {list(value.shape)}, the model "
                    f"{list(shapes[name])}"
                )
            self._kept[name] = self._stored(value)
        if not self._kept:
            raise ConfigurationError(
                "initial_weights has none of the model's weights: it has "
                f"{', '.join(list(found)[:5]) or 'nothing'}"
            )


def without_prefix(state: Mapping[str, Any], names: list[str]) -> Mapping[str, Any]:
    """Names without what a wrapper or a training module put before all of them."""
    if any(name in state for name in names):
        return state
    for name in names:
        for key in state:
            if key.endswith(f".{name}"):
                prefix = key.removesuffix(name)
                return {k.removeprefix(prefix): value for k, value in state.items()}
    return state


def given_state(given: Given) -> Mapping[str, Any]:
    """The state dict that was given, or that is in the file.

    Raises:
        ConfigurationError: if it is none of these.
    """
    if isinstance(given, nn.Module):
        return given.state_dict()
    if isinstance(given, (str, os.PathLike)):
        given = torch.load(given, map_location="cpu", weights_only=True)
    if isinstance(given, Mapping):
        for key in _NESTED:
            if isinstance(given.get(key), Mapping):
                return given[key]  # type: ignore[no-any-return]
        return given
    raise ConfigurationError(
        "initial_weights must be a state dict, a file of one or a module, got "
        f"{type(given).__name__}"
    )
