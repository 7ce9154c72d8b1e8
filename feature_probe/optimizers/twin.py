"""A twin of the user's optimizer: the same rule, on a small matrix of its own.

Nothing of the user's is touched by building or stepping one: not the optimizer, its parameters,
state or hooks, not the hooks of all optimizers, and not the state of the random numbers.
"""

from __future__ import annotations

import contextlib
import enum
import random
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module
from torch.utils._python_dispatch import TorchDispatchMode

#: Attributes of an optimizer that are not part of its rule, or that a twin has its own of. A
#: scheduler puts its own ``step`` on the instance; a GradScaler the other two.
_OWN = frozenset({"state", "param_groups", "step", "zero_grad", "grad_scale", "found_inf"})
#: Where torch keeps an instance's hooks.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
#: Group entries that choose an implementation, not a rule.
_OFF = ("foreach", "fused", "capturable", "differentiable", "maximize")
#: Larger tensors are data, not settings; deeper objects are not copied.
_ENTRIES, _DEPTH = 4096, 6
_BY_REFERENCE = (
    type(None), bool, int, float, complex, str, bytes, type, enum.Enum, torch.dtype, torch.device,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip


class NotPlain(Exception):  # noqa: N818  # says what a value is; never leaves the package
    """A value that a twin must not share and that is not plain data to copy."""


class _NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses collectives: the other processes may not be here."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError("its step communicates between processes")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Where twins may be stepped: what is global is as before at the end, and no warning leaves.

    Random numbers (torch on the CPU, ``random``), the hooks of all optimizers, gradient mode,
    default device. Collectives raise a RuntimeError.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    module: Any = optimizer_module
    hooks = module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            stack.enter_context(_NoCommunication())  # type: ignore[no-untyped-call]
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        module._global_optimizer_pre_hooks = OrderedDict()
        module._global_optimizer_post_hooks = OrderedDict()
        try:
            yield
        finally:
            module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks = hooks
            torch.set_rng_state(torch_state)
            random.setstate(python_state)


class Twin:
    """An optimizer of the user's class and settings that steps one matrix. Use :func:`isolated`.

    Args:
        optimizer: The user's; its constructor is not run again.
        group: The parameter group whose settings to take.
        start: W₀, float64, on the CPU; copied.
        lr: η of the twin.
        weight_decay: λ of the twin.
        seeded: Whether to start from the layout of the user's state, all zero, for optimizers
            whose constructor makes it.

    Raises:
        NotPlain: if ``seeded`` and there is no state, or none that can be laid out anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        group: Mapping[str, Any],
        start: Tensor,
        lr: float,
        weight_decay: float,
        seeded: bool = False,
    ) -> None:
        self.weight = start.clone().requires_grad_()
        self._steps = 0
        self._step = _plain_step(type(optimizer))
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        if seeded:
            state[self.weight] = _layout(optimizer, group, self.weight)
        self._twin = object.__new__(type(optimizer))
        self._twin.__dict__.update(_attributes(optimizer))
        settings = _settings(optimizer, group)
        settings.update(params=[self.weight], lr=lr, weight_decay=weight_decay)
        self._twin.__dict__.update(state=state, param_groups=[settings])

    def step(self, gradient: Tensor) -> Tensor:
        """Take one step with a gradient; returns a copy of W after it.

        Random numbers inside depend on the number of the step alone, so that twins draw alike.
        """
        torch.default_generator.manual_seed(self._steps)
        random.seed(self._steps)
        self._steps += 1
        self.weight.grad = gradient.clone()
        self._step(self._twin)
        return self.weight.detach().clone()


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose rule moves the weights: the one inside wrappers like SAM's."""
    for _ in range(_DEPTH):
        for name in ("base_optimizer", "optimizer"):
            inner = vars(optimizer).get(name)
            if isinstance(inner, Optimizer):
                optimizer = inner
                break
        else:
            break
    return optimizer


def attributes(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of an optimizer that can be part of its rule, as they are."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _OWN and name not in _HOOKS
    }


def is_counter(optimizer: Optimizer, name: str, value: Any) -> bool:
    """Whether a group's entry is counted by the optimizer rather than set by the user."""
    return name not in optimizer.defaults and (
        isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool))
    )


def _plain_step(kind: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """``step`` of the class without torch's profiling and hooks around it."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Copies of what can be copied; a step that needs the rest fails, and says so."""
    copies: dict[str, Any] = {name: OrderedDict() for name in _HOOKS}
    for name, value in attributes(optimizer).items():
        with contextlib.suppress(NotPlain):
            copies[name] = _copied(value)
    return copies


def _settings(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The group's settings: numbers held in tensors become numbers, implementations are off."""
    settings: dict[str, Any] = {}
    for name, value in group.items():
        if name in ("params", "param_names", "lr", "weight_decay"):
            continue
        counted = is_counter(optimizer, name, value)
        with contextlib.suppress(NotPlain):
            settings[name] = _copied(value) if counted else _numbers(_copied(value))
    settings.update({name: False for name in _OFF if name in settings})
    return settings


def _numbers(value: Any) -> Any:
    """A setting with every 0-dim tensor as a number, in tuples and lists too."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(_numbers(entry) for entry in value)
    return value


def _layout(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """State for ``weight`` like that of a parameter of the group, all zero."""
    for parameter in group["params"]:
        if optimizer.state.get(parameter):
            return {
                name: _zero(value, parameter, weight)
                for name, value in optimizer.state[parameter].items()
            }
    raise NotPlain("the optimizer has no state to follow")


def _zero(value: Any, parameter: Tensor, weight: Tensor) -> Any:
    if isinstance(value, Tensor):
        if value.shape == parameter.shape:
            return torch.zeros_like(weight, requires_grad=False)
        if value.dim() == 0:
            return torch.zeros((), dtype=value.dtype)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return type(value)(0)
    return _copied(value)


def _copied(value: Any, depth: int = 0) -> Any:
    """A copy of plain data.

    Raises:
        NotPlain: for parameters, large tensors, optimizers and what is not made of plain data.
    """
    if isinstance(value, _BY_REFERENCE):
        return value
    if depth >= _DEPTH or isinstance(value, (Optimizer, types.MethodType)):
        raise NotPlain(type(value).__name__)
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() > _ENTRIES:
            raise NotPlain("a parameter or a large tensor")
        return value.detach().cpu().clone()
    if isinstance(value, torch.Generator):
        return torch.Generator().manual_seed(0)
    if isinstance(value, random.Random):
        twin = random.Random()
        twin.setstate(value.getstate())
        return twin
    if type(value) in (list, set, frozenset, tuple):
        return type(value)(_copied(entry, depth + 1) for entry in value)
    if type(value) in (dict, OrderedDict):
        return type(value)(
            (_copied(key, depth + 1), _copied(entry, depth + 1)) for key, entry in value.items()
        )
    if type(value).__module__ == "builtins" or not hasattr(value, "__dict__"):
        raise NotPlain(type(value).__name__)
    twin = object.__new__(type(value))
    twin.__dict__.update({key: _copied(entry, depth + 1) for key, entry in vars(value).items()})
    return twin
