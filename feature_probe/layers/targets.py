"""Discovery: which layers of a model are measured, under which names, with which weight."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from feature_probe.errors import ConfigurationError
from feature_probe.layers.refusals import refusal
from feature_probe.layers.rules import (
    LayerRule,
    LinearRule,
    TransposedLinearRule,
    find_rule,
    known_layer_names,
    layer_shape,
)
from feature_probe.models import plain_name

#: One criterion: a glob on names, a compiled pattern, a module type, or a predicate.
Criterion = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Selection = Criterion | Sequence[Criterion] | None

#: Name of the model itself where it is a layer.
ROOT_NAME = "(model)"


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix to be measured, and the modules that multiply by it.

    Attributes:
        name: Name of the first module that holds the weight, as in ``named_modules()``; for a
            weight without a layer of its own, the parameter's name or one of its parts'.
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
        part: First and last + 1 of the parameter's rows that are this matrix; None: all.
        functional: Whether no module's forward is this product, so that it is seen in functional
            calls alone.
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
    part: tuple[int, int] | None = None
    functional: bool = False

    @property
    def module(self) -> nn.Module:
        """The first module that holds the weight."""
        return self.modules[0]

    def matrix(self, weight: Tensor) -> Tensor:
        """W ``[groups, d_out, d_in]`` of the stored or effective weight."""
        return self.rule.matrix(self.module, self._own(weight))

    def gradient_matrix(self, gradient: Tensor) -> Tensor:
        """∂L/∂W ``[groups, d_out, d_in]`` of the stored weight's gradient."""
        return self.rule.gradient_matrix(self.module, self._own(gradient))

    def _own(self, stored: Tensor) -> Tensor:
        return stored if self.part is None else stored[self.part[0] : self.part[1]]

    def __str__(self) -> str:
        blocks = f"{self.groups} × " if self.groups > 1 else ""
        tied = f", tied with {', '.join(self.aliases)}" if self.aliases else ""
        return f"{self.name}: {type(self.module).__name__} {blocks}{self.d_out} × {self.d_in}{tied}"


class Discovery:
    """The measured layers of one model: those known beforehand, and those found in use.

    Layers with a rule, and attention's projections, are known from the modules. A parameter that no
    layer claims (``x @ self.w``) becomes a target when it is first seen in a matrix product.

    Args:
        model: Any module.
        include: Layers to take; all if None. A glob on names (``"blocks.*.mlp.*"``), a compiled
            pattern (searched), a module type, a predicate ``(name, module) -> bool``, or a list of
            these, any of which may match.
        exclude: Layers to leave out of those.

    Attributes:
        targets: Grows when a weight is found in use.

    Raises:
        ConfigurationError: if no layer matches, if a criterion matches none, or if a chosen layer
            cannot be measured for what it is (quantisation-aware modules).
    """

    def __init__(
        self, model: nn.Module, include: Selection = None, exclude: Selection = None
    ) -> None:
        self._include, self._exclude = include, exclude
        self._unfollowed: dict[int, list[str]] = {}
        self._model = model
        known = [*_ruled(model), *_attention(model)]
        free = list(_free(model, {id(target.parameter) for target in known}))
        _check_any(model, known, free)
        kept = self._selected([(t.name, t.module) for t in [*known, *free]])
        self.targets = _tie([t for i, t in enumerate(known) if i in kept])
        self._left_out = {
            id(t.parameter) for i, t in enumerate([*known, *free]) if i not in kept
        } - {id(target.parameter) for target in self.targets}
        self._candidates = {
            id(target.parameter): target
            for i, target in enumerate(free, len(known))
            if i in kept and target.parameter is not None
        }
        if not self.targets and not self._candidates:
            raise ConfigurationError(
                f"include={include!r} without exclude={exclude!r} leaves no layer; "
                f"layers: {_names([(t.name, t.module) for t in known])}"
            )
        _refuse(self.targets)

    def weights(self) -> list[nn.Parameter]:
        """The parameters that targets multiply by, and those that may be found to be one."""
        known = [t.parameter for t in (*self.targets, *self._candidates.values())]
        return [parameter for parameter in known if parameter is not None]

    def found(self, parameter: nn.Parameter, *, transposed: bool) -> int | None:
        """A parameter was used as a matrix that no target is: the index of a target, made for it.

        A layer's weight that is used on its other side as well (a decoder tied to its encoder) is a
        second target, named after the parameter, with ``.T`` if that is transposed or the name is
        taken.

        Args:
            parameter: A 2-D parameter of the model.
            transposed: Whether the matrix that multiplies is its transpose, as in
                ``h @ parameter``.

        Returns:
            None if the parameter is not selected.
        """
        target = self._candidates.pop(id(parameter), None)
        target = target or self._other_side(parameter, transposed)
        if target is None:
            return None
        rows, columns = parameter.shape
        rule, d_out, d_in = LinearRule(), rows, columns
        if transposed:
            rule, d_out, d_in = TransposedLinearRule(), columns, rows
        self.targets.append(replace(target, rule=rule, d_out=d_out, d_in=d_in))
        return len(self.targets) - 1

    @property
    def undecided(self) -> bool:
        """Whether there are matrices of which only their use shows what they are."""
        return bool(self._candidates)

    def note_unfollowed(self, parameter: nn.Parameter, function: str) -> None:
        """A parameter was used in a product that none of its targets is read from."""
        names = self._unfollowed.setdefault(id(parameter), [])
        if function not in names:
            names.append(function)

    def not_followed(self, parameter: nn.Parameter) -> str:
        """The functions of such products, or ""."""
        return ", ".join(self._unfollowed.get(id(parameter), ()))

    def is_left_out(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter would be measured but for ``include`` and ``exclude``."""
        return id(parameter) in self._left_out

    def names(self) -> list[str]:
        """Names of the targets, and of the parameters that may become some."""
        return [t.name for t in (*self.targets, *self._candidates.values())]

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the modules that hold them."""
        for target in (*self.targets, *self._candidates.values()):
            for module in target.modules:
                yield from module.parameters()

    def _other_side(self, parameter: nn.Parameter, transposed: bool) -> Target | None:
        """A target for the other side of a parameter that is a target already."""
        if parameter.dim() != 2:
            return None
        for target in self.targets:
            if target.parameter is parameter and target.part is None:
                named = self._model.named_parameters()
                name = next((name for name, p in named if p is parameter), target.name)
                taken = any(other.name == name for other in self.targets)
                name = f"{name}.T" if transposed or taken else name
                return replace(target, name=name, aliases=(), functional=True)
        return None

    def _selected(self, named: list[tuple[str, nn.Module]]) -> set[int]:
        keep = set(range(len(named)))
        if self._include is not None:
            keep = _select(named, self._include, "include")
        if self._exclude is not None:
            keep -= _select(named, self._exclude, "exclude")
        return keep


def find_targets(
    model: nn.Module, include: Selection = None, exclude: Selection = None
) -> list[Target]:
    """The layers of ``model`` that are known beforehand and selected, in model order.

    Args:
        model: Any module.
        include: As for :class:`Discovery`.
        exclude: As for :class:`Discovery`.

    Raises:
        ConfigurationError: as for :class:`Discovery`.
    """
    return Discovery(model, include, exclude).targets


def _ruled(model: nn.Module) -> Iterator[Target]:
    """The modules that have a rule, one target each."""
    for name, module in model.named_modules():
        found = find_rule(module)
        if found is None or _is_uninitialised(module):
            continue
        kind, rule = found
        parameter = module._parameters.get(rule.parameter)
        groups, d_out, d_in = layer_shape(module, rule)
        yield Target(
            name=plain_name(name) or ROOT_NAME,
            modules=(module,),
            aliases=(),
            rule=rule,
            parameter=parameter,
            intercepted=parameter is None or _overrides_forward(module, kind),
            groups=groups,
            d_out=d_out,
            d_in=d_in,
        )


def _attention(model: nn.Module) -> Iterator[Target]:
    """The input projections of ``nn.MultiheadAttention``: packed or separate, q, k and v."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{plain_name(name)}." if name else ""
        packed, size = module._parameters.get("in_proj_weight"), module.embed_dim
        for place, letter in enumerate("qkv"):
            if packed is not None:
                part = (place * size, (place + 1) * size)
                label, parameter, width = f"in_proj.{letter}", packed, packed.shape[1]
            else:
                own = module._parameters.get(f"{letter}_proj_weight")
                if own is None:
                    continue
                part, label, parameter, width = None, f"{letter}_proj", own, own.shape[1]
            yield Target(
                name=prefix + label,
                modules=(module,),
                aliases=(),
                rule=LinearRule(),
                parameter=parameter,
                intercepted=False,
                groups=1,
                d_out=size,
                d_in=width,
                part=part,
                functional=True,
            )


def _free(model: nn.Module, claimed: set[int]) -> Iterator[Target]:
    """Matrix parameters that no layer claims; their side is known when they are first used."""
    for name, parameter in model.named_parameters():
        if id(parameter) in claimed or isinstance(parameter, UninitializedParameter):
            continue
        if parameter.dim() != 2 or not parameter.is_floating_point():
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.RNNBase) or "parametrizations" in name.split("."):
            continue
        yield Target(
            name=plain_name(name),
            modules=(owner,),
            aliases=(),
            rule=LinearRule(),
            parameter=parameter,
            intercepted=False,
            groups=1,
            d_out=parameter.shape[0],
            d_in=parameter.shape[1],
            functional=True,
        )


def _check_any(model: nn.Module, known: Sequence[Target], free: Sequence[Target]) -> None:
    if known or free:
        return
    types = ", ".join(known_layer_names())
    raise ConfigurationError(
        f"{type(model).__name__} has no layer the probe knows ({types}); uninitialised lazy "
        "layers do not count: run one forward pass first. Other types: register_layer_rule"
    )


def _refuse(targets: Sequence[Target]) -> None:
    for target in targets:
        reason = refusal(target.module, None if target.functional else target.rule)
        if reason:
            raise ConfigurationError(f"{target.name}: {reason}")


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


def _tie(targets: list[Target]) -> list[Target]:
    """One target a weight: modules that share a parameter are one matrix with more positions.

    Only layers that read the parameter the same way are one; an embedding tied to a linear layer
    multiplies by the transpose and stays apart.
    """
    holders: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        weight = target.module if target.parameter is None else target.parameter
        reading = (type(target.rule), target.groups, target.d_out, target.d_in, target.part)
        holders.setdefault((id(weight), *reading), []).append(target)
    return [
        replace(
            held[0],
            modules=tuple(target.module for target in held),
            aliases=tuple(target.name for target in held[1:]),
        )
        for held in holders.values()
    ]


def _overrides_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module computes otherwise than the type its rule was registered for."""
    if "forward" in vars(module):
        return True
    return any(
        getattr(type(module), method, None) is not getattr(kind, method, None)
        for method in ("forward", "_conv_forward")
    )
