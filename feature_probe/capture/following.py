"""Which forward passes are followed, and how: the user's own, or a shadow of it.

The user's own pass is followed where hooks can see it. A compiled model runs without hooks, and a
reentrant checkpoint builds no graph in the forward pass; there a :class:`ShadowPass` is followed,
and ∂L/∂output is carried over from the user's pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from feature_probe.capture.compiled import Watch
from feature_probe.capture.outputs import OutputGradients
from feature_probe.capture.passes import Call, ForwardPass, InitialPass
from feature_probe.capture.resolution import recordable
from feature_probe.capture.shadow import ShadowPass, World, reentrant_checkpoint, repeatable


class Beside(Protocol):
    """Another network that is run on what the model is called with."""

    def shadow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShadowPass:
        """Its pass, to be run after the model's, with the random state as it stands."""

    def follow(self, shadow: ShadowPass) -> InitialPass:
        """Run it."""


class Recording(Protocol):
    """What the follower asks of a recorder."""

    @property
    def listening(self) -> bool:
        """False while the probe's own products run through a graph."""

    @listening.setter
    def listening(self, value: bool) -> None: ...

    @property
    def products(self) -> bool:
        """Whether K or E is asked for, so that products may run through the graph."""

    def begin(self, *, running: bool) -> None:
        """Put the layers' hooks on; ``running``: the model is past its own pre-hooks."""

    def end(self, *, raised: bool = False) -> ForwardPass | None:
        """Take them off; what was recorded, to be released."""

    def guarded(self, where: str, work: Callable[..., Any], *args: Any) -> Any:
        """Run ``work``; what it raises goes to the consumer."""

    def began(self) -> None:
        """The model is about to run."""

    def deliver(self, forward: ForwardPass, output: Any) -> None:
        """A pass is complete."""

    def entered(self, forward: ForwardPass) -> None:
        """A backward pass has reached the output of a pass."""

    def gradient(self, forward: ForwardPass, call: Call, gradient: Tensor, task: int) -> None:
        """What a backward pass delivers at one call."""

    def cannot_follow(self, reason: str) -> None:
        """K, E and what is formed from inputs cannot be had."""

    def needs_calls(self) -> bool:
        """Whether anything is asked for that the parameters' gradients do not show."""

    @property
    def initial(self) -> Beside | None:
        """The network as it was before training, if it is to be run on the same inputs."""


class Follower:
    """Follows the calls of one model while armed.

    Args:
        model: The module as the user calls it, in its wrappers.
        inner: The module inside them.
        recorder: Records what is followed.
        in_training: Whether the user's loop runs the model. False: the probe itself does, with
            compiled parts and reentrant checkpoints replaced already.
    """

    def __init__(
        self, model: nn.Module, inner: nn.Module, recorder: Recording, *, in_training: bool
    ) -> None:
        self._inner, self._recorder, self._in_training = inner, recorder, in_training
        self._watch = Watch(model, self)
        self._shadow: ShadowPass | None = None
        self._beside: ShadowPass | None = None
        self._direct = self._apart = False
        #: Whether the parameters' gradients are all that can be seen.
        self._alone = False
        #: Whether the model checkpoints reentrantly; None: not known yet.
        self._reentrant: bool | None = None if in_training else False

    @property
    def armed(self) -> bool:
        """Whether calls are followed."""
        return self._watch.armed

    def attach(self) -> None:
        """From now on notice it when the model is compiled."""
        self._watch.open()

    def arm(self) -> None:
        """Follow the calls from the next one on."""
        self._watch.arm()

    def disarm(self) -> None:
        """Follow no more calls."""
        self._watch.disarm()
        self._forget()

    def detach(self) -> None:
        """Take every hook off."""
        self._watch.close()
        self._forget()

    def before_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run."""
        self._recorder.guarded("forward", self._before, args, kwargs)

    def after_pass(self, output: Any) -> None:
        """The model has returned, or raised (output None)."""
        self._recorder.guarded("model forward", self._after, output)
        self._forget()

    def _forget(self) -> None:
        self._shadow, self._beside, self._direct, self._apart = None, None, False, False

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        if not recordable():
            return
        self._recorder.began()
        compiled = self._in_training and self._watch.compiled() is not None
        self._apart = compiled or bool(self._reentrant)
        self._direct = not self._apart
        calls = self._recorder.needs_calls() and not self._alone
        if calls and (self._apart or self._reentrant is None):
            self._shadow = ShadowPass(self._inner, args, kwargs)
        if calls and self._in_training and self._recorder.initial is not None:
            self._beside = self._recorder.initial.shadow(args, kwargs)
        if self._direct:
            self._recorder.begin(running=True)

    def _after(self, output: Any) -> None:
        if self._direct:
            self._end_direct(output)
        elif self._apart and output is not None:
            self._end_apart(output)

    def _end_direct(self, output: Any) -> None:
        forward = self._recorder.end(raised=output is None)
        if forward is None or output is None:
            return
        try:
            look = forward.without_graph or self._reentrant is None
            kind = reentrant_checkpoint(output) if look else None
            if kind is None:
                self._reentrant = bool(self._reentrant)
                # products recompute what is checkpointed, which must not count for batch norm
                aside = self._in_training and self._recorder.products
                world = World(self._inner).entered() if aside else nullcontext()
                with world:
                    forward.initial = self._initial_pass()
                    self._recorder.deliver(forward, output)
                return
            forward.void = True
        finally:
            forward.release()
        known, self._reentrant = self._reentrant, True
        if not repeatable(kind):
            self._shadow, self._alone = None, True
            self._recorder.cannot_follow(
                f"{kind.__module__}.{kind.__name__} checkpoints reentrantly, so that the forward "
                "pass builds no graph; torch.utils.checkpoint can be followed"
            )
        elif known is not None:
            raise RuntimeError("the model began to checkpoint reentrantly; it is followed from now")
        self._end_apart(output)

    def _end_apart(self, output: Any) -> None:
        shadow = self._shadow
        if shadow is None:
            forward = ForwardPass()
            self._recorder.deliver(forward, output)
            self._carry(forward, None, OutputGradients.watch(output, None))
            return
        problem = shadow.problem()
        if problem is not None:
            self._recorder.cannot_follow(problem)
            return
        self._recorder.begin(running=False)
        try:
            repeated = shadow.run()
        except BaseException:
            self._recorder.end(raised=True)
            raise
        recorded = self._recorder.end()
        if recorded is None:
            return
        gradients = OutputGradients.watch(output, repeated, recorded.calls, recorded.edges)
        try:
            recorded.initial = self._initial_pass()
            with shadow.aside():
                self._recorder.deliver(recorded, repeated)
        finally:
            recorded.release()
        if gradients.problem is not None:
            self._recorder.cannot_follow(gradients.problem)
        self._carry(recorded, shadow, gradients)

    def _initial_pass(self) -> InitialPass | None:
        """The same inputs in the network as it was, if that is asked for."""
        network, shadow = self._recorder.initial, self._beside
        return None if network is None or shadow is None else network.follow(shadow)

    def _carry(
        self, forward: ForwardPass, shadow: ShadowPass | None, gradients: OutputGradients
    ) -> None:
        """Have ∂L/∂output taken to the shadow when a backward pass is over."""
        gradients.on_arrival = partial(self._arrived, forward, shadow)

    def _arrived(
        self, forward: ForwardPass, shadow: ShadowPass | None, gradients: OutputGradients
    ) -> bool:
        """A backward pass delivers ∂L/∂output: whether it is to be collected."""
        if not (self._recorder.listening and self.armed):
            return False
        task = torch._C._current_graph_task_id()
        if shadow is not None:
            pull = partial(self._pull, forward, shadow, gradients, task, _keeps_graph())
            guarded = partial(self._recorder.guarded, "backward", pull)
            # before the recorder's own callback, for which the backward pass is over then
            torch.autograd.Variable._execution_engine.queue_callback(guarded)
        self._recorder.guarded("backward", self._recorder.entered, forward)
        return shadow is not None

    def _pull(
        self,
        forward: ForwardPass,
        shadow: ShadowPass,
        gradients: OutputGradients,
        task: int,
        keep: bool,
    ) -> None:
        """A backward pass is over: carry what it delivered through the shadow's graph."""
        self._recorder.listening = False
        try:
            with shadow.aside(), torch.no_grad():
                products = gradients.pull(task, retain_graph=keep)
        finally:
            self._recorder.listening = True
        with torch.no_grad():
            for call, product in zip(gradients.calls, products, strict=True):
                if product is not None:
                    self._recorder.gradient(forward, call, product, task)
        if not keep:
            gradients.close()


def _keeps_graph() -> bool:
    """Whether the backward pass that runs keeps its graph for another one."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
