"""Discovery: which layers of a model are measured, under which names, with which weight."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import UninitializedParameter

from feature_probe.errors import ConfigurationError
from feature_probe.layers import LayerRule, find_rule, known_layer_types

#: One criterion: a glob on names, a compiled pattern, a module type, or a predicate.
Criterion = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Selection = Criterion | Sequence[Criterion] | None

#: Name of the model itself where it is a layer.
ROOT_NAME = "(model)"


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix to be measured, and the modules that multiply by it.

    Attributes:
        name: Name of the first module that holds the weight, as in ``named_modules()``.
        modules: All modules that hold it: several where the weight is tied.
        aliases: The names of the others.
        rule: The layer rule.
        parameter: The leaf parameter behind W, or None where W is computed (a parametrization, a
            subclass that changes its weight in ``forward``).
        intercepted: Whether W and h are taken from the functional call inside ``forward``,
            because the module's own attributes need not be what it multiplies by.
        groups: Number of diagonal blocks.
        d_out: Rows of a block.
        d_in: Columns of a block (channels/groups × kernel for a convolution).
    """

    name: str
    modules: tuple[nn.Module, ...] = field(repr=False)
    aliases: tuple[str, ...]
    rule: LayerRule = field(repr=False)
    parameter: nn.Parameter | None = field(repr=False)
    intercepted: bool
    groups: int
    d_out: int
    d_in: int

    @property
    def module(self) -> nn.Module:
        """The first module that holds the weight."""
        return self.modules[0]

    def __str__(self) -> str:
        blocks = f"{self.groups} × " if self.groups > 1 else ""
        tied = f", tied with {', '.join(self.aliases)}" if self.aliases else ""
        return f"{self.name}: {type(self.module).__name__} {blocks}{self.d_out} × {self.d_in}{tied}"


def find_targets(
    model: nn.Module, include: Selection = None, exclude: Selection = None
) -> list[Target]:
    """The layers of ``model`` that have a rule and are selected, in model order.

    Args:
        model: Any module.
        include: Layers to take; all if None. A glob on names (``"blocks.*.mlp.*"``), a compiled
            pattern (searched), a module type, a predicate ``(name, module) -> bool``, or a list of
            these, any of which may match.
        exclude: Layers to leave out of those.

    Raises:
        ConfigurationError: if no layer matches, or a criterion matches none.
    """
    named = [
        (name or ROOT_NAME, module)
        for name, module in model.named_modules()
        if find_rule(module) is not None and not _is_uninitialised(module)
    ]
    if not named:
        known = ", ".join(kind.__name__ for kind in known_layer_types())
        raise ConfigurationError(
            f"{type(model).__name__} has no layer the probe knows ({known}); uninitialised lazy "
            "layers do not count: run one forward pass first. Other types: register_layer_rule"
        )
    keep = _select(named, include, "include") if include is not None else set(range(len(named)))
    if exclude is not None:
        keep -= _select(named, exclude, "exclude")
    if not keep:
        raise ConfigurationError(
            f"include={include!r} without exclude={exclude!r} leaves no layer; "
            f"layers: {_names(named)}"
        )
    return _tie([named[i] for i in sorted(keep)])


def _is_uninitialised(module: nn.Module) -> bool:
    return any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False))


def _select(named: list[tuple[str, nn.Module]], selection: Selection, argument: str) -> set[int]:
    chosen: set[int] = set()
    for criterion in _criteria(selection):
        matched = {i for i, (name, m) in enumerate(named) if _matches(criterion, name, m)}
        if not matched:
            raise ConfigurationError(
                f"{argument}={criterion!r} matches no layer; layers: {_names(named)}"
            )
        chosen |= matched
    return chosen


def _criteria(selection: Selection) -> Iterable[Criterion]:
    if selection is None:
        return ()
    if isinstance(selection, (str, re.Pattern, type)) or callable(selection):
        return (selection,)
    if not isinstance(selection, Iterable):
        raise _no_criterion(selection)
    return selection


def _matches(criterion: Criterion, name: str, module: nn.Module) -> bool:
    if isinstance(criterion, str):
        return fnmatch.fnmatchcase(name, criterion)
    if isinstance(criterion, re.Pattern):
        return criterion.search(name) is not None
    if isinstance(criterion, type):
        return isinstance(module, criterion)
    if callable(criterion):
        return bool(criterion(name, module))
    raise _no_criterion(criterion)


def _no_criterion(given: object) -> ConfigurationError:
    return ConfigurationError(
        f"a layer is chosen by glob, compiled pattern, type or predicate, got {given!r}"
    )


def _names(named: list[tuple[str, nn.Module]]) -> str:
    shown = [name for name, _ in named[:40]]
    return ", ".join(shown) + (f" and {len(named) - 40} more" if len(named) > 40 else "")


def _tie(named: list[tuple[str, nn.Module]]) -> list[Target]:
    """One target a weight: modules that share a parameter are one matrix with more positions."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in named:
        parameter = _leaf_parameter(module)
        holders.setdefault(id(module) if parameter is None else id(parameter), []).append(
            (name, module)
        )
    return [_target(held) for held in holders.values()]


def _target(held: list[tuple[str, nn.Module]]) -> Target:
    name, module = held[0]
    kind, rule = _known_rule(module)
    groups, d_out, d_in = _shape(module, rule)
    return Target(
        name=name,
        modules=tuple(m for _, m in held),
        aliases=tuple(other for other, _ in held[1:]),
        rule=rule,
        parameter=_leaf_parameter(module),
        intercepted=_leaf_parameter(module) is None or _overrides_forward(module, kind),
        groups=groups,
        d_out=d_out,
        d_in=d_in,
    )


def _known_rule(module: nn.Module) -> tuple[type[nn.Module], LayerRule]:
    found = find_rule(module)
    if found is None:
        raise ConfigurationError(f"no layer rule for {type(module).__name__}")
    return found


def _leaf_parameter(module: nn.Module) -> nn.Parameter | None:
    """The weight if it is a parameter of the module's own; None if it is computed."""
    return module._parameters.get(_known_rule(module)[1].parameter)


def _overrides_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module computes otherwise than the type its rule was registered for."""
    if "forward" in vars(module):
        return True
    return any(
        getattr(type(module), method, None) is not getattr(kind, method, None)
        for method in ("forward", "_conv_forward")
    )


def _shape(module: nn.Module, rule: LayerRule) -> tuple[int, int, int]:
    """``groups, d_out, d_in``; a parametrization is not evaluated, as that may change it."""
    parameter = module._parameters.get(rule.parameter)
    if parameter is not None:
        groups, d_out, d_in = rule.matrix(module, parameter.detach()).shape
        return groups, d_out, d_in
    if isinstance(module, nn.Linear):
        return 1, module.out_features, module.in_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        kernel = 1
        for side in module.kernel_size:
            kernel *= side
        channels = module.in_channels // module.groups
        return module.groups, module.out_channels // module.groups, channels * kernel
    raise ConfigurationError(
        f"the weight {rule.parameter!r} of {type(module).__name__} is no parameter of the module; "
        "a registered layer type must hold it as one"
    )
