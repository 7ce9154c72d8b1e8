"""Which matrices a running model multiplies by: layers' calls and functional products, recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from feature_probe.capture.interception import FunctionalCall, FunctionalUse
from feature_probe.capture.passes import Anchor, Call, ForwardPass
from feature_probe.capture.resolution import WeightResolver, inside_checkpoint, recordable
from feature_probe.capture.sharding import GatheredParameters
from feature_probe.layers.rules import TransposedLinearRule
from feature_probe.layers.targets import Discovery

#: inputs, version and input_gradient of a call whose G must be formed from its input.
Source = tuple[Tensor | None, int, Callable[[Tensor, Tensor], Tensor] | None]
_NO_SOURCE: Source = (None, 0, None)
#: A product inside a layer's own forward: its call, and where its gradient is read, if it has one.
Product = tuple[FunctionalUse, tuple[Call, GradientEdge] | None]


class Reader:
    """Reads one forward pass at a time: each application of a measured matrix becomes a call.

    Args:
        model: The module that runs.
        discovery: Its layers.
        gathered: What a sharded model computes with.
        listen: Puts the tensor hook of a call on the tensor that its gradient is read at.
        keep_inputs: See :class:`Recorder`.
        inject_leaf: Likewise.

    Attributes:
        fired: Targets that were called at least once.
        weights: The effective weight last used by each intercepted target.
        problems: Why a target could not be read.
        verifying: Whether the inputs of all layers are kept, so that gᵀh can be formed of each.
    """

    def __init__(
        self,
        model: nn.Module,
        discovery: Discovery,
        gathered: GatheredParameters,
        listen: Callable[[ForwardPass, Call, Tensor], None],
        *,
        keep_inputs: bool,
        inject_leaf: bool,
    ) -> None:
        self.fired: set[int] = set()
        self.weights: dict[int, Tensor] = {}
        self.problems: dict[int, str] = {}
        self.verifying = False
        self._targets = discovery.targets
        self._resolver = WeightResolver(model, discovery)
        self._gathered = gathered
        self._listen_at = listen
        self._keep_inputs = keep_inputs
        self._inject_leaf = inject_leaf
        self._index = {
            id(module): i
            for i, target in enumerate(self._targets)
            if not target.functional
            for module in target.modules
        }
        self._current: ForwardPass | None = None
        #: layers that are running, with the products made in their own forward
        self._running: list[tuple[int, list[Product]]] = []

    @property
    def reading(self) -> bool:
        """Whether a pass is being read."""
        return self._current is not None

    def begin(self) -> None:
        """A pass begins."""
        self._current = ForwardPass()
        self._running.clear()
        self._resolver.begin()

    def end(self) -> ForwardPass | None:
        """The pass is over: what was read of it, which the caller has to release."""
        current, self._current = self._current, None
        self._running.clear()
        return current

    def before_layer(self, module: nn.Module) -> None:
        """A layer is about to run."""
        if self._current is not None:
            self._running.append((self._index[id(module)], []))

    def after_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """A layer has run: record the call. Returns a replacement output only to inject a leaf."""
        index = self._index[id(module)]
        products: list[Product] = []
        while self._running:
            running, products = self._running.pop()
            if running == index:
                break
        if self._current is None or not isinstance(output, Tensor) or not recordable():
            self._note_without_graph()
            return None
        self.fired.add(index)
        if self._targets[index].intercepted:
            self._record_product(index, module, products)
            return None
        replacement = self._with_gradient(output, (index,))
        output = output if replacement is None else replacement
        if not output.requires_grad:
            return None
        self._gathered.watch(module)
        source = self._module_source(index, module, args, kwargs)
        self._record(index, output, partial(self._targets[index].rule.rows, module), source)
        return replacement

    def after_call(self, call: FunctionalCall, value: Any) -> Tensor | None:
        """A functional product was formed: note it for the layer that runs, or record it."""
        if self._current is None or not isinstance(value, Tensor) or not recordable():
            self._note_without_graph()
            return None
        readings = call.readings()
        if self._running:
            return self._note_product(readings, value)
        for use in readings:
            found = self._resolver.resolve(use)
            if found:
                break
        else:
            self._resolver.note(call)
            return None
        self.fired |= {match.index for match in found}
        replacement = self._with_gradient(value, [match.index for match in found])
        value = value if replacement is None else replacement
        if value.requires_grad:
            for match in found:
                self._gathered.watch(self._targets[match.index].module)
                source = self._functional_source(match.index, use, match.input_gradient)
                self._record(match.index, value, match.to_rows, source)
        return replacement

    def uses_parameter(self, index: int) -> bool:
        """Whether the parameter's own gradient is the gradient of the matrix that was used."""
        parameter = self._targets[index].parameter
        if parameter is None or not parameter.requires_grad:
            return False
        return self.weights.get(index, parameter) is parameter

    def _note_without_graph(self) -> None:
        if self._current is not None and not torch.is_grad_enabled():
            self._current.without_graph = True

    def _with_gradient(self, output: Tensor, indices: Sequence[int]) -> Tensor | None:
        """The output with a gradient of its own where it had none and leaves are injected."""
        if output.requires_grad or not (self._inject_leaf and output.is_floating_point()):
            return None
        if inside_checkpoint():  # which runs the layer again in the backward pass, without a leaf
            self.problems |= dict.fromkeys(indices, "frozen, like all below it, in a checkpoint")
            return None
        leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        return output + leaf

    def _note_product(self, readings: Sequence[FunctionalUse], value: Tensor) -> Tensor | None:
        """A layer that may change its weight, or what it returns, forms a product.

        Its gradient is read where the product is formed: what the layer does to it afterwards is no
        part of z = W h.
        """
        index, products = self._running[-1]
        target = self._targets[index]
        if not target.intercepted:
            return None
        side = "columns" if isinstance(target.rule, TransposedLinearRule) else "rows"
        uses = [use for use in readings if use.side == side]
        if not uses:
            return None
        replacement = self._with_gradient(value, (index,))
        value = value if replacement is None else replacement
        listened = None
        if value.requires_grad:
            source = self._product_source(index, uses[0])
            listened = self._listen(index, value, partial(target.rule.rows, target.module), source)
        products.append((uses[0], listened))
        return replacement

    def _record_product(self, index: int, module: nn.Module, products: list[Product]) -> None:
        """A layer that was looked into has run: its one product is the call."""
        if len(products) != 1:
            self.problems[index] = (
                f"the forward of {type(module).__name__} makes {len(products)} linear or "
                "convolution calls instead of one"
            )
            return
        use, listened = products[0]
        own = self._targets[index].parameter
        is_own = own is not None and self._resolver.parameter(use.weight) is own
        self.weights[index] = own if own is not None and is_own else use.weight.detach()
        if self._current is not None and listened is not None:
            self._gathered.watch(module)
            self._current.calls.append(listened[0])
            self._current.edges.append(listened[1])

    def _record(
        self, index: int, output: Tensor, rows: Callable[[Tensor], Tensor], source: Source
    ) -> None:
        current = self._current
        if current is not None:
            call, edge = self._listen(index, output, rows, source)
            current.calls.append(call)
            current.edges.append(edge)

    def _listen(
        self, index: int, output: Tensor, rows: Callable[[Tensor], Tensor], source: Source
    ) -> tuple[Call, GradientEdge]:
        """The call that an output is of, with the hook put on."""
        anchor, tensor = Anchor.of(output)
        kept = self._keep_inputs or self.verifying
        call = Call(index, anchor, rows, *(source if kept else _NO_SOURCE))
        if self._current is not None:
            self._listen_at(self._current, call, tensor)
        return call, get_gradient_edge(tensor)

    def _module_source(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Source:
        target = self._targets[index]
        gradient = partial(target.rule.input_gradient_matrix, module)
        if target.parameter is not None and target.parameter.requires_grad:
            return _spare(_first_tensor(args, kwargs), gradient) if self.verifying else _NO_SOURCE
        return _source(_first_tensor(args, kwargs), gradient)

    def _product_source(self, index: int, use: FunctionalUse) -> Source:
        target = self._targets[index]
        gradient = partial(use.geometry.weight_gradient, target.rule, target.module)
        own = target.parameter
        if own is not None and self._resolver.parameter(use.weight) is own and own.requires_grad:
            return _spare(use.inputs, gradient) if self.verifying else _NO_SOURCE
        return _source(use.inputs, gradient)

    def _functional_source(
        self, index: int, use: FunctionalUse, gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> Source:
        parameter = self._targets[index].parameter
        if parameter is not None and parameter.requires_grad:
            return _spare(use.inputs, gradient) if self.verifying else _NO_SOURCE
        return _source(use.inputs, gradient)


def _source(inputs: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]) -> Source:
    held = inputs.detach()
    return held, held._version, gradient


def _spare(inputs: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]) -> Source:
    """The same for a layer whose parameter has the gradient: what follows must not depend on it.

    Under autocast a layer saves a cast copy of its input, so that the model may change the input in
    place; else autograd itself would refuse that.
    """
    autocast = torch.is_autocast_enabled(inputs.device.type)
    return _source(inputs.detach().clone() if autocast else inputs, gradient)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("the layer was called without a tensor")
