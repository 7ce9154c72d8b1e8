"""Running the user's model on a batch apart from the training loop, and leaving no trace of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feature_probe.errors import ConfigurationError

LossFunction = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], tuple[Any, Tensor | None]]


def runner(
    loss_fn: LossFunction | None, forward: Forward | None, *, loss_needed: bool
) -> Callable[[nn.Module, Any], tuple[Any, Tensor | None]]:
    """A function of (model, batch) giving output and loss.

    Args:
        loss_fn: ``loss_fn(output, target) -> scalar``, for batches ``(input, target)``.
        forward: ``(model, batch) -> (output, loss)`` instead.
        loss_needed: Whether one of the two must be given.

    Raises:
        ConfigurationError: if both are given, or none where one is needed; the function raises it
            for batches of another shape, and for a ``forward`` that returns something else.
    """
    if forward is not None:
        if loss_fn is not None:
            raise ConfigurationError("give loss_fn or forward, not both: forward returns the loss")
        return lambda model, batch: _pair(forward(model, batch))
    if loss_fn is None:
        if loss_needed:
            raise ConfigurationError(
                "loss_fn is needed for FACT and eNFA relations; only nfa and bnfa do without"
            )
        return lambda model, batch: (model(_split(batch, 1)[0]), None)

    def run(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        inputs, target = _split(batch, 2)
        out = model(inputs)
        return out, loss_fn(out, target)

    return run


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors, also those in dicts, lists and tuples, on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in it, also in dicts, lists and tuples, changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


@contextmanager
def left_as_found(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """Training flags, buffers and random states are afterwards what they were.

    Args:
        model: The model that runs meanwhile.
        eval_mode: Whether it does so in evaluation mode; False leaves the modes as they are.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            if eval_mode:
                model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _pair(returned: Any) -> tuple[Any, Tensor | None]:
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ConfigurationError(
            f"forward must return (output, loss), got {type(returned).__name__}"
        )
    return returned[0], returned[1]


def _split(batch: Any, parts: int) -> Sequence[Any]:
    if isinstance(batch, (tuple, list)) and len(batch) >= parts and len(batch) <= 2:
        return batch
    if isinstance(batch, Tensor) and parts == 1:
        return (batch,)
    shape = f" of {len(batch)}" if isinstance(batch, Sized) else ""
    raise ConfigurationError(
        f"a batch must be (input, target), got {type(batch).__name__}{shape}; for other shapes "
        "give forward=lambda model, batch: (output, loss)"
    )
