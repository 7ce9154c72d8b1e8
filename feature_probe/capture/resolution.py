"""Which measured matrix a functional product multiplied by, and how to read its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe.capture.interception import FunctionalCall, FunctionalUse, functorch_active
from feature_probe.layers.products import linear_gradient
from feature_probe.layers.rules import ConvRule, LinearRule
from feature_probe.layers.targets import Discovery, Target
from feature_probe.layers.transposed import ConvTransposeRule


@dataclass(frozen=True)
class Match:
    """A measured matrix behind a functional product.

    Attributes:
        index: Which target.
        to_rows: A value-shaped tensor as rows ``[n, positions, groups, d_out]``.
        input_gradient: ∂L/∂W ``[groups, d_out, d_in]`` of (inputs, gradient of the value).
    """

    index: int
    to_rows: Callable[[Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Region:
    """A tensor recognised as rows and columns of a parameter, or as their transpose."""

    parameter: nn.Parameter
    rows: tuple[int, int]
    columns: tuple[int, int]
    transposed: bool

    def outputs(self, transposed: bool) -> tuple[int, int] | None:
        """Which outputs of the whole matrix a product gives; None if it reads part of its inputs.

        Args:
            transposed: Whether the matrix that multiplies is the parameter's transpose.
        """
        own, other = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        inputs = self.parameter.shape[0 if transposed else 1]
        return own if other == (0, inputs) else None


class WeightResolver:
    """Recognises parameters, their rows and their transposes in functional products.

    Parameters are known by where the modules hold them, not by identity alone: a sharded model
    holds other tensors while it runs than when it was wrapped.

    Args:
        model: The followed module.
        discovery: Its targets; a weight found in use is added to them.
    """

    def __init__(self, model: nn.Module, discovery: Discovery) -> None:
        self._model = model
        self._discovery = discovery
        self._at_rest = dict(_named(model))
        self._known: dict[int, nn.Parameter] = {}
        self._indices: dict[int, list[int]] = {}
        for index in range(len(discovery.targets)):
            self._index(index)

    def begin(self) -> None:
        """A forward pass begins: learn which tensors stand for which parameters."""
        self._known = {id(held): self._original(name, held) for name, held in _named(self._model)}

    def resolve(self, use: FunctionalUse) -> list[Match]:
        """The measured matrices that a product was formed with; none if it is no weight of ours."""
        region = self._region(use.weight)
        if region is None:
            return []
        if use.geometry.spatial:
            return self._convolution(region, use)
        transposed = region.transposed != (use.side == "columns")
        outputs = region.outputs(transposed)
        if outputs is None or self._region(use.inputs) is not None:
            return []  # a product of two parameters carries no examples
        known = self._indices.get(id(region.parameter), ())
        readers = [index for index in known if _reads(self._discovery.targets[index], transposed)]
        if not readers:
            found = self._discovery.found(region.parameter, transposed=transposed)
            if found is None:
                return []
            self._index(found)
            readers = [found]
        matches = [self._linear(index, outputs, use) for index in readers]
        return [match for match in matches if match is not None]

    def note(self, call: FunctionalCall) -> None:
        """A product in which no measured matrix was recognised: note its weights."""
        for tensor in call.tensors():
            base = tensor._base if tensor._is_view() else None
            parameter = self.parameter(tensor if base is None else base)
            if parameter is not None and parameter.dim() > 1:
                self._discovery.note_unfollowed(parameter, call.name)

    def _index(self, index: int) -> None:
        parameter = self._discovery.targets[index].parameter
        if parameter is not None:
            self._indices.setdefault(id(parameter), []).append(index)

    def _original(self, name: str, held: nn.Parameter) -> nn.Parameter:
        return self._at_rest.get(name, held)

    def _region(self, weight: Tensor) -> _Region | None:
        """What part of which parameter a tensor is."""
        whole = self.parameter(weight)
        if whole is not None and weight.dim() > 1:
            return _Region(whole, (0, weight.shape[0]), (0, weight.shape[1]), transposed=False)
        base = weight._base if weight._is_view() else None
        parameter = None if base is None else self.parameter(base)
        if base is None or parameter is None or weight.dim() != 2 or base.dim() != 2:
            return None
        for transposed in (False, True):
            corner = _corner(base, weight.mT if transposed else weight)
            if corner is not None:
                size = weight.shape[::-1] if transposed else weight.shape
                rows, columns = ((c, c + s) for c, s in zip(corner, size, strict=True))
                return _Region(parameter, rows, columns, transposed)
        return None

    def parameter(self, tensor: Tensor) -> nn.Parameter | None:
        """The parameter that a tensor is, or stands for while a sharded model runs."""
        known = self._known.get(id(tensor))
        if known is None and isinstance(tensor, nn.Parameter):
            self.begin()  # swapped in since the pass began, as a sharded module does
            known = self._known.get(id(tensor))
        return known

    def _linear(self, index: int, outputs: tuple[int, int], use: FunctionalUse) -> Match | None:
        """The match of a target with a product that gave some of the parameter's outputs."""
        target = self._discovery.targets[index]
        first, last = target.part or (0, target.d_out)
        start, stop = max(first, outputs[0]), min(last, outputs[1])
        if start >= stop:
            return None
        columns = slice(start - outputs[0], stop - outputs[0])
        unused = (start - first, last - stop)  # outputs that this product did not form

        def own(rows: Tensor) -> Tensor:
            return F.pad(rows[..., columns], unused) if any(unused) else rows[..., columns]

        def to_rows(gradient: Tensor) -> Tensor:
            return _LINEAR.rows(target.module, own(_examples_first(gradient, use)))

        def input_gradient(inputs: Tensor, gradient: Tensor) -> Tensor:
            h = inputs.mT if use.side == "left" and inputs.dim() > 1 else inputs
            g = gradient.mT if use.side == "left" and gradient.dim() > 1 else gradient
            return linear_gradient(h, own(g))

        return Match(index, to_rows, input_gradient)

    def _convolution(self, region: _Region, use: FunctionalUse) -> list[Match]:
        matches = []
        for index in self._indices.get(id(region.parameter), ()):
            target = self._discovery.targets[index]
            kind = ConvTransposeRule if use.geometry.transposed else ConvRule
            if not isinstance(target.rule, kind) or use.geometry.groups != target.groups:
                continue
            rule, module = target.rule, target.module
            gradient = partial(use.geometry.weight_gradient, rule, module)
            matches.append(Match(index, partial(rule.rows, module), gradient))
        return matches


_LINEAR = LinearRule()
#: Where the functions are defined that a checkpoint saves tensors by.
_CHECKPOINT = "torch.utils.checkpoint"


def recordable() -> bool:
    """Whether a graph is being built by plain eager code, outside any backward pass."""
    return (
        torch.is_grad_enabled()
        and torch._C._current_graph_task_id() == -1
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not functorch_active()
    )


def inside_checkpoint() -> bool:
    """Whether a non-reentrant checkpoint is running its function for the first time."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == _CHECKPOINT


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _corner(base: Tensor, part: Tensor) -> tuple[int, int] | None:
    """Row and column of a matrix's first entry in ``base``; None if it is no block of it."""
    alike = (
        own == given or size == 1
        for own, given, size in zip(base.stride(), part.stride(), part.shape, strict=True)
    )
    if not all(alike) or 0 in base.stride():
        return None
    offset = int(part.storage_offset() - base.storage_offset())
    if base.stride(0) >= base.stride(1):
        row, column = divmod(offset, base.stride(0))
        column //= base.stride(1)
    else:
        column, row = divmod(offset, base.stride(1))
        row //= base.stride(0)
    inside = row + part.shape[0] <= base.shape[0] and column + part.shape[1] <= base.shape[1]
    return (row, column) if inside else None


def _reads(target: Target, transposed: bool) -> bool:
    """Whether the target is the parameter as a matrix on that side, whatever rule says so."""
    if target.part is not None:
        return not transposed
    if target.parameter is None or target.parameter.dim() != 2:
        return False
    blank = torch.empty(target.parameter.shape, device="meta")
    expected = (blank.mT if transposed else blank)[None]
    try:
        matrix = target.rule.matrix(target.module, blank)
    except Exception:  # a rule of the user's that is made for real tensors
        return False
    return matrix.shape == expected.shape and matrix.stride()[1:] == expected.stride()[1:]


def _examples_first(gradient: Tensor, use: FunctionalUse) -> Tensor:
    """The gradient with examples before positions, where attention has them the other way."""
    if use.side == "left" and gradient.dim() > 1:
        return gradient.mT
    if use.attention is None:
        return gradient
    length, batch = use.attention
    if gradient.dim() == 3 and gradient.shape[1] == batch:
        return gradient.transpose(0, 1)
    if gradient.dim() == 2 and gradient.shape[0] == length * batch:
        return gradient.reshape(length, batch, -1).transpose(0, 1)
    return gradient
