"""Hooks only: follow the forward passes of a model and hand over pre-activation gradients.

No hook stays on the user's modules between forward passes. While armed, one *global* forward
pre-hook waits for the probed model; when that is called, hooks are put on its layers, and they are
gone when it returns. So a copy or a pickle of the model made between two forward passes carries no
trace of the probe. A layer's hook takes the gradient edge of its output and puts a tensor hook on
it, anchored at the base where the output is a view: full backward hooks would make the forward of
models with in-place operations raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from feature_probe.interception import FunctionalTap, functorch_active
from feature_probe.passes import Anchor, Call, ForwardPass
from feature_probe.targets import Target

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Consumer(Protocol):
    """What is done with what the hooks see."""

    def on_forward(self, forward: ForwardPass, output: Any) -> None:
        """The model returned ``output``; the graph below it is complete."""

    def on_gradient(self, forward: ForwardPass, call: Call, gradient: Tensor) -> None:
        """A backward pass of the user's delivered ∂L/∂z of one call."""

    def on_fault(self, error: Exception, where: str) -> None:
        """A hook failed. Raising from here raises in the user's code."""


class Recorder:
    """Follows the forward passes of one model while armed.

    Args:
        model: The module whose calls are followed.
        targets: The layers.
        consumer: Who gets the passes and the gradients.
        keep_inputs: Hold the inputs of layers whose G must be formed from them.
        inject_leaf: Give layer outputs that carry no gradient one, by adding a zero that requires
            it, so that frozen layers can be measured at frozen weights. Never in a training loop.

    Attributes:
        listening: False while the probe's own products run through the graph.
        fired: Targets that were called at least once.
        weights: The effective weight last used by each intercepted target.
        problems: Why an intercepted target could not be read.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        consumer: Consumer,
        *,
        keep_inputs: bool = True,
        inject_leaf: bool = False,
    ) -> None:
        self.listening = True
        self.fired: set[int] = set()
        self.weights: dict[int, Tensor] = {}
        self.problems: dict[int, str] = {}
        self._model = model
        self._targets = targets
        self._consumer = consumer
        self._inject_leaf = inject_leaf
        self._keep_inputs = keep_inputs
        self._index = {id(m): i for i, target in enumerate(targets) for m in target.modules}
        self._waiting: RemovableHandle | None = None
        self._layer_handles: list[RemovableHandle] = []
        self._model_handles: list[RemovableHandle] = []
        self._current: ForwardPass | None = None
        self._taps: list[FunctionalTap] = []

    @property
    def armed(self) -> bool:
        """Whether forward passes are followed."""
        return self._waiting is not None

    def arm(self) -> None:
        """Follow the model's forward passes from the next one on; nothing if armed already."""
        if self._waiting is None:
            self._waiting = register_module_forward_pre_hook(_Waiting(self))

    def disarm(self) -> None:
        """Take every hook off. Tensor hooks on graphs already built fall silent."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None
        self._end_pass()

    def before_module(self, module: nn.Module) -> None:
        """A module is about to run: start a pass if it is the model, intercept where needed."""
        if module is self._model and _recordable():
            self._begin_pass()
        if self._current is None:
            return
        index = self._index.get(id(module))
        if index is not None and self._targets[index].intercepted:
            tap = FunctionalTap()
            tap.__enter__()  # type: ignore[no-untyped-call]
            self._taps.append(tap)

    def after_layer(
        self, module: nn.Module, args: Arguments, kwargs: Keywords, output: Any
    ) -> Tensor | None:
        """A layer has run: record the call. Returns a replacement output only to inject a leaf."""
        index = self._index[id(module)]
        tap = None
        if self._targets[index].intercepted and self._taps:
            tap = self._taps.pop()
            tap.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self._current is None or not isinstance(output, Tensor) or not _recordable():
            return None
        self.fired.add(index)
        replacement = None
        if not output.requires_grad:
            if not (self._inject_leaf and output.is_floating_point()):
                return None
            leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            replacement = output = output + leaf
        source = self._gradient_source(index, module, args, kwargs, tap)
        if not self._keep_inputs:
            source = (None, 0, None)
        if index not in self.problems:
            anchor, tensor = Anchor.of(output)
            call = Call(index, module, anchor, *source)
            self._current.calls.append(call)
            self._current.edges.append(get_gradient_edge(tensor))
            hook = _Arrival(self, self._current, call)
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        return replacement

    def after_model(self, output: Any) -> None:
        """The model has run, or raised (output None): end the pass."""
        current, self._current = self._current, None
        # while torch handles an exception it iterates over the model's own hooks: leave those
        self._end_pass(keep_model_hooks=output is None)
        if current is not None:
            try:
                if output is not None:
                    self._consumer.on_forward(current, output)
            finally:
                current.release()

    def guarded(self, where: str, work: Callable[..., Any], *args: Any) -> Any:
        """Run ``work``; what it raises goes to the consumer instead of the user's code."""
        try:
            return work(*args)
        except Exception as error:  # a fault of the probe must not end the user's run
            self._end_pass()
            self._consumer.on_fault(error, where)
            return None

    def arrived(self, forward: ForwardPass, call: Call, gradient: Tensor) -> None:
        """A tensor hook fired: hand over, unless it is our own product or a create_graph pass."""
        if self.listening and self.armed and not torch.is_grad_enabled():
            self._consumer.on_gradient(forward, call, call.anchor.restore(gradient))

    def uses_parameter(self, index: int) -> bool:
        """Whether the parameter's own gradient is the gradient of the matrix that was used."""
        target = self._targets[index]
        if target.parameter is None or not target.parameter.requires_grad:
            return False
        return self.weights.get(index, target.parameter) is target.parameter

    def _begin_pass(self) -> None:
        self._end_pass()
        self._current = ForwardPass()
        for target in self._targets:
            for layer in target.modules:
                handle = layer.register_forward_hook(
                    _AfterLayer(self),
                    prepend=True,
                    with_kwargs=True,
                    always_call=target.intercepted,
                )
                own = layer is self._model
                (self._model_handles if own else self._layer_handles).append(handle)
        after = self._model.register_forward_hook(_AfterModel(self), always_call=True)
        self._model_handles.append(after)

    def _end_pass(self, keep_model_hooks: bool = False) -> None:
        for held in (self._layer_handles, [] if keep_model_hooks else self._model_handles):
            for handle in held:
                handle.remove()
            held.clear()
        while self._taps:
            self._taps.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self._current is not None:
            self._current.release()
            self._current = None

    def _gradient_source(
        self,
        index: int,
        module: nn.Module,
        args: Arguments,
        kwargs: Keywords,
        tap: FunctionalTap | None,
    ) -> tuple[Tensor | None, int, Callable[[Tensor, Tensor], Tensor] | None]:
        """``inputs, version, input_gradient`` of a call whose G must be formed from its input."""
        target = self._targets[index]
        if tap is not None:
            use = tap.single_use()
            if use is None:
                self.problems[index] = (
                    f"the forward of {type(module).__name__} makes {len(tap.uses)} linear or "
                    "convolution calls instead of one"
                )
                return None, 0, None
            own = use.weight is target.parameter
            self.weights[index] = use.weight if own else use.weight.detach()
            if own and use.weight.requires_grad:
                return None, 0, None
            inputs, geometry, rule = use.inputs.detach(), use.geometry, target.rule
            return (
                inputs,
                inputs._version,
                lambda h, g: geometry.weight_gradient(rule, module, h, g),
            )
        if target.parameter is not None and target.parameter.requires_grad:
            return None, 0, None
        inputs, rule = _first_tensor(args, kwargs).detach(), target.rule
        return inputs, inputs._version, lambda h, g: rule.input_gradient_matrix(module, h, g)


def _recordable() -> bool:
    """Whether a graph is being built by plain eager code, outside any backward pass."""
    return (
        torch.is_grad_enabled()
        and torch._C._current_graph_task_id() == -1
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not functorch_active()
    )


def _first_tensor(args: Arguments, kwargs: Keywords) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("the layer was called without a tensor")


def _inert(*_: Any) -> None:
    """What a copied or unpickled hook becomes."""


def _make_inert() -> Callable[..., None]:
    return _inert


class _Hook:
    """A hook that turns into nothing when the module it is on is copied or pickled."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


class _Waiting(_Hook):
    def __call__(self, module: nn.Module, args: Arguments) -> None:
        self._recorder.guarded("forward", self._recorder.before_module, module)


class _AfterLayer(_Hook):
    def __call__(
        self, module: nn.Module, args: Arguments, kwargs: Keywords, output: Any
    ) -> Tensor | None:
        after = self._recorder.after_layer
        replacement: Tensor | None = self._recorder.guarded(
            "layer forward", after, module, args, kwargs, output
        )
        return replacement


class _AfterModel(_Hook):
    def __call__(self, module: nn.Module, args: Arguments, output: Any) -> None:
        self._recorder.guarded("model forward", self._recorder.after_model, output)


class _Arrival:
    """The tensor hook of one call."""

    def __init__(self, recorder: Recorder, forward: ForwardPass, call: Call) -> None:
        self._recorder, self._forward, self._call = recorder, forward, call

    def __call__(self, gradient: Tensor) -> None:
        arrived = self._recorder.arrived
        self._recorder.guarded("backward", arrived, self._forward, self._call, gradient)
