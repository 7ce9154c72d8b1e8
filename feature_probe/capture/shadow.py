"""A forward pass of the probe's own beside the user's, where the user's own cannot be followed.

A compiled forward runs without Python hooks, and one under reentrant checkpointing builds its graph
only inside the backward pass. There a second forward pass, eager and with the same inputs, random
state and buffers, is run and followed instead: the *shadow*. K comes from products of the shadow's
output. E comes from ∂L/∂output, read off the user's own output, carried back through the shadow's
graph. The user's pass is not touched, and nothing that the shadow changes is left behind.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from feature_probe.capture.passes import tensors_in


class World:
    """A second set of what a forward pass may change, to be exchanged with the user's.

    Random states, buffers and plain attributes of the modules (a step counter, say) are the
    world's while :meth:`entered`, and the user's own again afterwards, to the object. Changes made
    inside stay in the world: entered again, it is as it was left. All buffers are copied: version
    counters do not tell which will change, as batch norm's statistics change without them.

    Args:
        model: The modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._random = _random_states(model)
        self._contents = [dict(vars(module)) for module in self._modules]
        self._buffers = [dict(module._buffers) for module in self._modules]
        copies: dict[int, Tensor] = {}  # a buffer held twice is copied once
        for held in self._buffers:
            for name, buffer in held.items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.detach().clone()
                    held[name] = copies[id(buffer)]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The model and the random generators are the world's inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        self._random = _exchange_random_states(self._random)
        for index, module in enumerate(self._modules):
            self._contents[index] = _exchange_contents(vars(module), self._contents[index])
            if self._buffers[index]:
                self._buffers[index] = _exchange_contents(module._buffers, self._buffers[index])


class ShadowPass:
    """One shadow of one forward pass. Made before the user's pass, run after it.

    Args:
        model: The probed module, unwrapped.
        args: What it is called with.
        kwargs: Likewise.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self._world = World(model)
        self._inputs = _versions(tensors_in((args, kwargs)))
        self._others = _versions(_tensors_outside_buffers(model))

    def problem(self) -> str | None:
        """Why the shadow cannot be trusted; asked after the user's pass, before :meth:`run`."""
        if any(tensor._version != version for tensor, version in self._inputs):
            return "the forward pass modified its input in place, so it cannot be repeated"
        if any(tensor._version != version for tensor, version in self._others):
            return (
                "the forward pass modified a parameter, or a tensor that is no registered buffer, "
                "in place, so it cannot be repeated; register_buffer makes it repeatable"
            )
        if _dynamo_loaded() and not hasattr(torch.compiler, "set_stance"):
            return "following a compiled model needs torch 2.6 or newer (torch.compiler.set_stance)"
        return None

    def run(self) -> Any:
        """Run the forward pass eagerly; the caller's hooks follow it. Returns its output."""
        args, kwargs = self._args, self._kwargs
        self._args, self._kwargs, self._inputs, self._others = (), {}, [], []
        with self.aside(), nonreentrant_checkpoints():
            return self._model(*args, **kwargs)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around every product through the shadow's graph, as checkpointing runs layers there."""
        with eagerly(), self._world.entered():
            yield


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled parts run as plain Python inside; nothing is compiled, nothing recompiled later."""
    if not (_dynamo_loaded() and hasattr(torch.compiler, "set_stance")):
        yield
        return
    frames = torch._C._dynamo.eval_frame
    previous = frames.set_eval_frame(None)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        frames.set_eval_frame(previous)


@contextlib.contextmanager
def nonreentrant_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints become non-reentrant inside: they save the same memory, and a graph."""

    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )

    own = vars(checkpoint.CheckpointFunction)
    previous = own.get("apply")  # inherited from autograd.Function unless someone put one there
    checkpoint.CheckpointFunction.apply = staticmethod(apply)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if previous is None:
            del checkpoint.CheckpointFunction.apply
        else:
            checkpoint.CheckpointFunction.apply = previous  # type: ignore[method-assign]


def reentrant_checkpoint(output: Any) -> type | None:
    """The class of a reentrant checkpoint in the graph of ``output``; None if there is none.

    Only of torch's own (:func:`repeatable`) can a shadow be made.
    """
    seen: set[Any] = set()
    todo = [tensor.grad_fn for tensor in tensors_in(output)]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = getattr(node, "_forward_cls", None)
        if kind is not None and "checkpoint" in kind.__name__.lower():
            return kind  # type: ignore[no-any-return]
        todo += [below for below, _ in node.next_functions]
    return None


def repeatable(kind: type) -> bool:
    """Whether a shadow replaces this kind of reentrant checkpoint."""
    return kind is checkpoint.CheckpointFunction


def _dynamo_loaded() -> bool:
    return "torch._dynamo" in sys.modules


def _versions(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Tensors with their version counters, leaving out those that have none."""
    return [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]


def _tensors_outside_buffers(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value


def _exchange_contents(held: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Put ``others`` into the dictionary in place; returns what was in it."""
    before = dict(held)
    if [*map(id, held.values())] == [*map(id, others.values())] and [*held] == [*others]:
        return before
    for name in before.keys() - others.keys():
        del held[name]
    held.update(
        (name, value)
        for name, value in others.items()
        if name not in before or before[name] is not value
    )
    return before


def _random_states(model: nn.Module) -> dict[Any, Any]:
    """States of the generators a forward pass of the model may draw from, by where they are set."""
    states: dict[Any, Any] = {random: random.getstate(), torch: torch.get_rng_state()}
    if "numpy" in sys.modules:
        generator = sys.modules["numpy"].random
        states[generator] = generator.get_state()
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type not in ("cpu", "meta"):
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def _exchange_random_states(states: dict[Any, Any]) -> dict[Any, Any]:
    """Set the states; returns those that were there."""
    before: dict[Any, Any] = {}
    for place, state in states.items():
        if place is random:
            before[place] = random.getstate()
            random.setstate(state)
        elif place is torch:
            before[place] = torch.get_rng_state()
            torch.set_rng_state(state)
        elif isinstance(place, torch.device):
            module = torch.get_device_module(place)
            before[place] = module.get_rng_state(place)
            module.set_rng_state(state, place)
        else:
            before[place] = place.get_state()
            place.set_state(state)
    return before
