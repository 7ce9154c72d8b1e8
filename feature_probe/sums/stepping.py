"""Steps: when the user's optimizers step, and by what the loss was scaled.

Step hooks on the optimizers see the gradients as they are about to be used. Where ``step`` is given
a closure, its first evaluation is the one that counts: it runs at the weights before the step, with
the gradient that the step starts from (LBFGS evaluates it again at others).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from feature_probe.errors import ConfigurationError
from feature_probe.layers.targets import Target

#: A number, a function that returns the scale as it stands, or None: looked for.
LossScale = float | Callable[[], Any] | None
#: Frames between an optimizer's step hook and the loss scaler that called ``step``, at most.
_DEPTH = 12
_SCALER_STEP = torch.amp.GradScaler.step.__code__
#: Where torch wraps ``step``.
_HOOKING = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


@dataclass(frozen=True)
class StepScale:
    """By what one step's loss and gradients were multiplied.

    Attributes:
        loss: The factor on the loss, and so on every gradient a backward pass delivered.
        gradient: The factor still on ``param.grad`` as the optimizer gets it: 1, except for fused
            optimizers, which divide by it themselves.
        taken: 0-dim boolean on the device: whether the optimizer will really step; None: it will.
    """

    loss: float | Tensor = 1.0
    gradient: float | Tensor = 1.0
    taken: Tensor | None = None


def step_scale(optimizer: Optimizer | None, given: LossScale) -> StepScale:
    """The scale of the step that ``optimizer`` is about to take. Nothing waits for the device.

    Args:
        optimizer: Asked from inside its step hook; None: no scaler is looked for.
        given: What the user says the scale is; None: the ``torch.amp.GradScaler`` that calls.
    """
    fused: Any = optimizer
    found_inf = getattr(fused, "found_inf", None)
    grad_scale = getattr(fused, "grad_scale", None)
    if given is not None:
        loss = given() if callable(given) else given
    else:
        scaler = None if optimizer is None else _calling_scaler()
        loss = 1.0 if scaler is None else getattr(scaler, "_scale", None)
        if loss is None:
            loss = 1.0
    return StepScale(
        loss=loss.detach().clone() if isinstance(loss, Tensor) else float(loss),
        gradient=1.0 if grad_scale is None else grad_scale.detach().clone(),
        taken=None if found_inf is None else (found_inf == 0).squeeze(),
    )


def _calling_scaler() -> Any:
    """The enabled gradient scaler among the callers: torch does not tell the optimizer of it.

    The locals of no other frame are looked at: Python would keep what they hold alive from then on.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        if frame.f_code is _SCALER_STEP:
            scaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
    return None


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside the wrappers of Accelerate, Lightning, SAM and the like.

    SAM's own ``step`` moves the weights away and back; its base optimizer is the one that steps.
    """
    while True:
        held = (getattr(optimizer, name, None) for name in ("optimizer", "base_optimizer"))
        inner = next((found for found in held if isinstance(found, Optimizer)), None)
        if inner is None:
            return optimizer
        optimizer = inner


def parse_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """One optimizer, several, or none.

    Raises:
        ConfigurationError: for anything else.
    """
    listed = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if given is not None and not listed:
        raise ConfigurationError("optimizer is an empty list")
    unwrapped = tuple(unwrap_optimizer(optimizer) for optimizer in listed)
    for optimizer in unwrapped:
        if not isinstance(optimizer, Optimizer):
            raise ConfigurationError(
                "optimizer must be a torch.optim.Optimizer or a list of them, the one that steps "
                f"last at the end; got {type(optimizer).__name__}"
            )
    if len({id(optimizer) for optimizer in unwrapped}) < len(unwrapped):
        raise ConfigurationError("optimizer lists the same optimizer twice")
    return unwrapped


def parse_loss_scale(given: Any) -> LossScale:
    """A positive number, a function, or None.

    Raises:
        ConfigurationError: for anything else.
    """
    if given is None or callable(given):
        return given  # type: ignore[no-any-return]
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
        raise ConfigurationError(
            f"loss_scale must be a positive number or a function returning one, got {given!r}; a "
            "torch.amp.GradScaler is found without it"
        )
    return float(given)


class Ownership:
    """Which optimizer trains what: the first that holds the parameter, else the last.

    Groups may be added to an optimizer at any time, so :meth:`refresh` is called once a step.

    Args:
        targets: The measured layers; more may be appended.
        optimizers: The last one ends a step.
    """

    def __init__(self, targets: Sequence[Target], optimizers: Sequence[Optimizer]) -> None:
        self._targets = targets
        self._optimizers = optimizers
        self._holder: dict[int, int] = {}
        self._group: dict[int, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the optimizers' groups."""
        self._holder, self._group = {}, {}
        for number, optimizer in reversed(list(enumerate(self._optimizers))):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._holder[id(parameter)] = number
                    self._group[id(parameter)] = group

    def group(self, parameter: Tensor | None) -> Mapping[str, Any]:
        """The group of the optimizer that holds a parameter; empty if none does."""
        return self._group.get(id(parameter), {})

    def holder(self, parameter: Tensor | None) -> int:
        """Number of the optimizer that holds a parameter."""
        return self._holder.get(id(parameter), max(len(self._optimizers) - 1, 0))

    def trainer(self, index: int) -> int:
        """Number of the optimizer that trains a target."""
        return self.holder(self._targets[index].parameter)


class StepWatch:
    """Hooks on the user's optimizers.

    Args:
        optimizers: The last one ends a step.
        ready: Called before an optimizer changes the weights, with its gradients complete.
        done: Called after the last one has changed them.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        ready: Callable[[Optimizer], None],
        done: Callable[[], None],
    ) -> None:
        self._optimizers = optimizers
        self._ready = ready
        self._done = done
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on."""
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
        self._handles.append(self._optimizers[-1].register_step_post_hook(self._after))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _is_nested(optimizer):
            return None
        alone = not args or (len(args) == 1 and args[0] is optimizer)
        where = None if alone and not kwargs else _closure(args, kwargs)
        if where is None:
            self._ready(optimizer)
            return None
        if isinstance(where, str):
            watched = self._watched(optimizer, kwargs[where])
            return args, {**kwargs, where: watched}
        watched = self._watched(optimizer, args[where])
        return (*args[:where], watched, *args[where + 1 :]), kwargs

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_nested(optimizer):
            self._done()

    def _watched(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        first = True

        @functools.wraps(closure)
        def watched() -> Any:
            nonlocal first
            value = closure()
            if first:
                first = False
                self._ready(optimizer)
            return value

        return watched


def _is_nested(optimizer: object) -> bool:
    """Whether a step hook runs in a step that another step of the same optimizer called.

    torch puts its hooks around the ``step`` of each class, so that a subclass whose ``step`` calls
    its parent's runs them twice.
    """
    kinds = _classes_with_step(type(optimizer))  # type: ignore[arg-type]  # a class has a hash
    if len(kinds) < 2 or sum(getattr(vars(kind)["step"], "hooked", False) for kind in kinds) < 2:
        return False
    frame, steps = sys._getframe(1), 0
    while frame.f_back is not None and steps < 2:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename == _HOOKING:
            steps += frame.f_locals.get("self") is optimizer
    return steps > 1


@functools.lru_cache(maxsize=128)
def _classes_with_step(kind: type) -> tuple[type, ...]:
    """The class and those above it that define ``step``, but for torch's base class."""
    return tuple(each for each in kind.__mro__ if "step" in vars(each) and each is not Optimizer)


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where ``optimizer.step`` was given a closure; ``args`` may start with the optimizer."""
    for place, value in enumerate(args):
        if callable(value) and not isinstance(value, Optimizer):
            return place
    return "closure" if callable(kwargs.get("closure")) else None
