"""What the loss of a batch and of its two halves are: whether it is a mean or a sum over examples.

A gradient alone cannot show that: a mean-reduced loss times n has the gradient of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from feature_probe.capture.evaluation import left_as_found, map_tensors, to_device
from feature_probe.capture.selection import select_output
from feature_probe.capture.shadow import eagerly
from feature_probe.errors import ConfigurationError

Run = Callable[[nn.Module, Any], tuple[Any, Tensor | None]]


@dataclass(frozen=True)
class Halves:
    """The losses of a batch and of its parts, in evaluation mode.

    Attributes:
        losses: Of the batch, of its first part and of its second.
        sizes: Their numbers of examples, by the first axis of the batch's tensors.
        outputs: The first axis of the model's output on each.
    """

    losses: tuple[float, float, float]
    sizes: tuple[int, int, int]
    outputs: tuple[int, int, int]


def halve(
    model: nn.Module, batch: Any, run: Run, output: Callable[[Any], Any] | None = None
) -> Halves:
    """Evaluate a batch, its first half and the rest; the model is left as it was.

    Args:
        model: The model, which goes to evaluation mode meanwhile; no gradients.
        batch: Tensors in tuples, lists or dicts, with the examples along their first axis.
        run: Gives the output and the loss of (model, batch).
        output: Picks f out of the output.

    Raises:
        ConfigurationError: for a batch without two examples, or a loss that is no scalar.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    size = _size(batch)
    cut = (size + 1) // 2
    parts = [to_device(batch, device)]
    parts.append(map_tensors(parts[0], lambda t: t[:cut] if _along(t, size) else t))
    parts.append(map_tensors(parts[0], lambda t: t[cut:] if _along(t, size) else t))
    losses: list[float] = []
    outputs: list[int] = []
    with left_as_found(model, True), eagerly(), torch.no_grad():
        for part in parts:
            returned, loss = run(model, part)
            if loss is None or loss.dim() != 0:
                given = "None" if loss is None else f"shape {tuple(loss.shape)}"
                raise ConfigurationError(f"the loss must be a scalar, got {given}")
            losses.append(float(loss))
            outputs.append(select_output(returned, output).shape[0])
    return Halves(
        losses=(losses[0], losses[1], losses[2]),
        sizes=(size, cut, size - cut),
        outputs=(outputs[0], outputs[1], outputs[2]),
    )


def _size(batch: Any) -> int:
    """Examples of a batch: the first axis of its first tensor that has one."""
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim():
            found.append(tensor.shape[0])
        return tensor

    map_tensors(batch, note)
    if not found or found[0] < 2:
        raise ConfigurationError(
            "verify(batch=...) needs a batch of two examples at least, along the first axis of its "
            f"tensors; got {found[0] if found else 'no tensor'}"
        )
    return found[0]


def _along(tensor: Tensor, size: int) -> bool:
    return bool(tensor.dim()) and tensor.shape[0] == size
