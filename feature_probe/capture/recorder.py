"""Hooks only: follow the forward passes of a model and hand over pre-activation gradients.

While armed, two hooks on the model itself wait for its calls (:mod:`.compiled`); in a copy of the
model they come off by themselves, in a pickle they are inert. When the model is called, hooks are
put on its layers and a function mode notes functional products (:mod:`.interception`); both are
gone when it returns. Where the call itself cannot be followed, a shadow of it is
(:mod:`.following`).
A layer's hook takes the gradient edge of its output and puts a tensor hook on it, anchored at the
base where the output is a view: full backward hooks would make the forward of models with in-place
operations raise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feature_probe.capture.following import Beside, Follower
from feature_probe.capture.interception import (
    FunctionalCall,
    FunctionalTrace,
    fused_encoders,
)
from feature_probe.capture.passes import Call, ForwardPass
from feature_probe.capture.reader import Reader
from feature_probe.capture.sharding import GatheredParameters
from feature_probe.layers.targets import Discovery

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Consumer(Protocol):
    """What is done with what the hooks see."""

    def on_begin(self) -> None:
        """The model is about to run."""

    def on_forward(self, forward: ForwardPass, output: Any) -> None:
        """The model returned ``output``; the graph below it is complete."""

    def on_backward(self, forward: ForwardPass) -> None:
        """A backward pass has reached the output of a pass whose gradients come when it is over."""

    def on_gradient(
        self, forward: ForwardPass, call: Call, gradient: Tensor, task: int | None = None
    ) -> None:
        """A backward pass (the graph task that runs, or ``task``) delivered one call's gradient."""

    def on_unfollowed(self, reason: str) -> None:
        """The model's passes cannot be followed; nothing but the parameters' gradients is seen."""

    def on_accumulated(self, parameter: Tensor | None) -> None:
        """A backward pass added to the gradient of a parameter, None: of one that is sharded."""

    def on_fault(self, error: Exception, where: str) -> None:
        """A hook failed. Raising from here raises in the user's code."""


class Recorder:
    """Follows the forward passes of one model while armed.

    Args:
        model: The module whose calls are followed.
        discovery: Its layers.
        consumer: Who gets the passes and the gradients.
        keep_inputs: Hold the inputs of layers whose G must be formed from them.
        inject_leaf: Give layer outputs that carry no gradient one, by adding a zero that requires
            it, so that frozen layers can be measured at frozen weights. Never in a training loop.
        entrance: The model in the wrappers it is called through; None: it is called as it is.
        products: Whether K or E is asked for.
        in_training: Whether the user's loop calls the model.

    Attributes:
        listening: False while the probe's own products run through the graph.
        products: Whether K or E is asked for.
        reader: What was read in the passes.
        gathered: What a sharded model computes with.
        initial: The network as it was, to be run on the same inputs as the model; None: it is not.
    """

    def __init__(
        self,
        model: nn.Module,
        discovery: Discovery,
        consumer: Consumer,
        *,
        keep_inputs: bool = True,
        inject_leaf: bool = False,
        entrance: nn.Module | None = None,
        products: bool = True,
        in_training: bool = False,
    ) -> None:
        self.listening = True
        self.initial: Beside | None = None
        self._model = model
        self._targets = discovery.targets
        self._discovery = discovery
        self.products = products
        self._consumer = consumer
        self._inject_leaf = inject_leaf
        called = model if entrance is None else entrance  # some wrappers have no truth value
        self._follower = Follower(called, model, self, in_training=in_training)
        self._parameter_handles: list[RemovableHandle] = []
        self.gathered = GatheredParameters(model, _Accumulated(self, gathered=True))
        self.reader = Reader(
            model,
            discovery,
            self.gathered,
            self._listen,
            keep_inputs=keep_inputs,
            inject_leaf=inject_leaf,
        )
        self._layer_handles: list[RemovableHandle] = []
        self._model_handles: list[RemovableHandle] = []
        self._trace: FunctionalTrace | None = None

    @property
    def armed(self) -> bool:
        """Whether forward passes are followed."""
        return self._follower.armed

    def attach(self) -> None:
        """From now on notice it when the model is compiled."""
        self._follower.attach()

    def detach(self) -> None:
        """Take every hook off."""
        self.disarm()
        self._follower.detach()

    def arm(self) -> None:
        """Follow the model's forward passes from the next one on; nothing if armed already."""
        if self.armed:
            return
        self._follower.arm()
        self.gathered.begin()
        for parameter in self._model.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._parameter_handles.append(register(_Accumulated(self)))

    def disarm(self) -> None:
        """Take the hooks off. Tensor hooks on graphs already built fall silent."""
        self._follower.disarm()
        for handle in self._parameter_handles:
            handle.remove()
        self._parameter_handles.clear()
        self.gathered.end()
        self._end_pass()

    def began(self) -> None:
        """The model is about to run."""
        self._consumer.on_begin()

    def begin(self, *, running: bool) -> None:
        """Record from here on: hooks on the layers, a mode for functional products.

        Args:
            running: Whether the model is past its own pre-hooks.
        """
        self._end_pass()
        self.reader.begin()
        fused = [] if self._inject_leaf else fused_encoders(self._model)
        left_alone = {id(part) for encoder in fused for part in encoder.modules()}
        for layer, intercepted in self._layers():
            if id(layer) not in left_alone:
                self._put_on(layer, intercepted, running and layer is self._model)
        for encoder in fused:
            before: Any = encoder.register_forward_pre_hook(_BeforeFused(self), with_kwargs=True)
            after = encoder.register_forward_hook(_AfterFused(self), always_call=True)
            self._layer_handles += [before, after]
        self._trace = FunctionalTrace(_AfterCall(self))
        self._trace.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *, raised: bool = False) -> ForwardPass | None:
        """Record no further: the pass, which the caller has to release."""
        current = self.reader.end()
        # while torch handles an exception it iterates over the model's own hooks: leave those
        self._end_pass(keep_model_hooks=raised)
        return current

    def deliver(self, forward: ForwardPass, output: Any) -> None:
        """A pass is complete."""
        self._consumer.on_forward(forward, output)

    def entered(self, forward: ForwardPass) -> None:
        """A backward pass has reached the output of a pass that is followed by its shadow."""
        self._consumer.on_backward(forward)

    def gradient(self, forward: ForwardPass, call: Call, gradient: Tensor, task: int) -> None:
        """What backward pass ``task`` delivers at one call of a shadow."""
        self._consumer.on_gradient(forward, call, gradient, task)

    def cannot_follow(self, reason: str) -> None:
        """K, E and what is formed from inputs cannot be had."""
        self._consumer.on_unfollowed(reason)

    def needs_calls(self) -> bool:
        """Whether more is asked for than the gradients of known parameters."""
        return (
            self.products
            or self.reader.verifying
            or self._inject_leaf
            or self._discovery.undecided
            or any(
                target.intercepted or target.parameter is None or not target.parameter.requires_grad
                for target in self._targets
            )
        )

    def before_fused(self, encoder: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        """An encoder that may run fused is about to: without us, unless gradients pass through."""
        if not self.reader.reading or self._trace is None:
            return
        parts = {id(part) for part in encoder.modules()}
        given = (*args, *kwargs.values())
        if any(isinstance(value, Tensor) and value.requires_grad for value in given):
            for layer, intercepted in self._layers():
                if id(layer) in parts:
                    self._put_on(layer, intercepted, running=False)
            return
        self._trace.leave()
        for index, target in enumerate(self._targets):
            if any(id(module) in parts for module in target.modules):
                self.reader.fired.add(index)

    def after_fused(self) -> None:
        """It has run."""
        if self._trace is not None and not self._trace.active:
            self._trace.__enter__()  # type: ignore[no-untyped-call]

    def accumulated(self, parameter: Tensor | None) -> None:
        """A parameter's gradient has grown; None: that of what stands for a sharded parameter."""
        if self.armed:
            self._consumer.on_accumulated(parameter)

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
        heard = self.listening and self.armed and not forward.void
        heard = heard and call.index not in self.reader.problems
        if heard and not torch.is_grad_enabled():
            self._consumer.on_gradient(forward, call, gradient)

    def _layers(self) -> Iterator[tuple[nn.Module, bool]]:
        """The modules that are layers, and whether their forward is looked into."""
        for target in self._targets:
            if not target.functional:
                for layer in target.modules:
                    yield layer, target.intercepted

    def _put_on(self, layer: nn.Module, intercepted: bool, running: bool) -> None:
        """Hooks on one layer, for one pass."""
        held = self._model_handles if layer is self._model else self._layer_handles
        after = layer.register_forward_hook(
            _AfterLayer(self), prepend=True, with_kwargs=True, always_call=intercepted
        )
        held.append(after)
        if running:
            self.reader.before_layer(layer)
        else:
            held.append(layer.register_forward_pre_hook(_BeforeLayer(self), prepend=True))

    def _end_pass(self, keep_model_hooks: bool = False) -> None:
        for held in (self._layer_handles, [] if keep_model_hooks else self._model_handles):
            for handle in held:
                handle.remove()
            held.clear()
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.leave()
        unfinished = self.reader.end()
        if unfinished is not None:
            unfinished.release()

    def _listen(self, forward: ForwardPass, call: Call, tensor: Tensor) -> None:
        """Put the tensor hook of a call on its anchor."""
        tensor.register_hook(_Arrival(self, forward, call))  # type: ignore[no-untyped-call]


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


class _BeforeLayer(_Hook):
    def __call__(self, module: nn.Module, args: Arguments) -> None:
        self._recorder.guarded("layer forward", self._recorder.reader.before_layer, module)


class _AfterLayer(_Hook):
    def __call__(
        self, module: nn.Module, args: Arguments, kwargs: Keywords, output: Any
    ) -> Tensor | None:
        after = self._recorder.reader.after_layer
        replacement: Tensor | None = self._recorder.guarded(
            "layer forward", after, module, args, kwargs, output
        )
        return replacement


class _BeforeFused(_Hook):
    def __call__(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        self._recorder.guarded("forward", self._recorder.before_fused, module, args, kwargs)


class _AfterFused(_Hook):
    def __call__(self, *_: Any) -> None:
        self._recorder.guarded("forward", self._recorder.after_fused)


class _AfterCall(_Hook):
    def __call__(self, call: FunctionalCall, value: Any) -> Tensor | None:
        after = self._recorder.reader.after_call
        replacement: Tensor | None = self._recorder.guarded("functional call", after, call, value)
        return replacement


class _Accumulated(_Hook):
    """Held by C++, where the garbage collector does not look: it must not hold the recorder."""

    def __init__(self, recorder: Recorder, *, gathered: bool = False) -> None:
        self._reference = weakref.ref(recorder)
        self._gathered = gathered

    def __call__(self, parameter: Tensor) -> None:
        recorder = self._reference()
        if recorder is not None:
            held = None if self._gathered else parameter
            recorder.guarded("backward", recorder.accumulated, held)


class _Arrival:
    """The tensor hook of one call."""

    def __init__(self, recorder: Recorder, forward: ForwardPass, call: Call) -> None:
        self._recorder, self._forward, self._call = recorder, forward, call

    def __call__(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # else another output of the same function was reached
            arrived = self._recorder.arrived
            self._recorder.guarded("backward", arrived, self._forward, self._call, gradient)
