"""What one forward pass leaves behind: where each layer's output gradient will arrive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge


def tensors_in(value: Any, depth: int = 6) -> list[Tensor]:
    """The tensors in what a model takes or returns, in order: containers, dataclasses, objects."""
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or isinstance(value, nn.Module):
        return []
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, (tuple, list)):
        inside = list(value)
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return [tensor for part in inside for tensor in tensors_in(part, depth - 1)]


@dataclass(frozen=True)
class Anchor:
    """The place in the autograd graph where a layer output's gradient is read.

    An output that is a view loses its gradient node when it is modified in place, so the anchor is
    its base then, and :meth:`restore` reads the output's part out of the base's gradient.
    """

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    base_stride: tuple[int, ...] | None

    @classmethod
    def of(cls, output: Tensor) -> tuple[Anchor, Tensor]:
        """The anchor of an output that requires grad, and the tensor it stands on."""
        base = output._base if output._is_view() else None
        tensor = base if base is not None and base.requires_grad else output
        anchor = cls(
            size=output.shape,
            stride=output.stride(),
            offset=int(output.storage_offset() - tensor.storage_offset()),
            base_stride=None if tensor is output else tensor.stride(),
        )
        return anchor, tensor

    def restore(self, gradient: Tensor) -> Tensor:
        """The gradient with the output's shape."""
        if self.base_stride is None:
            return gradient
        buffer = torch.empty_strided(
            gradient.shape, self.base_stride, dtype=gradient.dtype, device=gradient.device
        )
        return buffer.copy_(gradient).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, eq=False)
class Call:
    """One application of a layer in one forward pass.

    Attributes:
        index: Which target.
        anchor: Where its output gradient is read.
        to_rows: An output-shaped tensor as rows ``[n, positions, groups, d_out]``.
        inputs: The layer's input, where gᵀh must be formed from it; else None.
        version: The input's version counter when it was read.
        input_gradient: ∂L/∂W ``[groups, d_out, d_in]`` of (inputs, output gradient), or None.
    """

    index: int
    anchor: Anchor
    to_rows: Callable[[Tensor], Tensor]
    inputs: Tensor | None = None
    version: int = 0
    input_gradient: Callable[[Tensor, Tensor], Tensor] | None = None

    def rows(self, gradient: Tensor) -> Tensor:
        """Rows ``[n, positions, groups, d_out]`` of the gradient at the anchor."""
        return self.to_rows(self.anchor.restore(gradient))

    @property
    def overwritten(self) -> bool:
        """Whether the input was modified in place since the layer read it."""
        return self.inputs is not None and self.inputs._version != self.version

    def weight_gradient(self, gradient: Tensor) -> Tensor | None:
        """Σ g hᵀ of this call in float32 or better; None where it is not formed from h.

        Args:
            gradient: The gradient at the anchor.
        """
        if self.inputs is None or self.input_gradient is None or self.overwritten:
            return None
        output_gradient = self.anchor.restore(gradient)
        dtype = torch.promote_types(self.inputs.dtype, output_gradient.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        with torch.no_grad(), torch.autocast(output_gradient.device.type, enabled=False):
            return self.input_gradient(inputs, output_gradient.to(dtype))


@dataclass(eq=False)
class InitialPass:
    """What the network as it was before training made of the same inputs.

    Attributes:
        calls: The layers' applications and the gradient edges of their outputs, by the layer's name
            and how often it had been called before.
        output: What it returned.
        aside: To be entered around products through its graph.
        problem: Why there is nothing, "" if there is.
        done: To be called when no more products are wanted.
    """

    calls: Mapping[tuple[str, int], tuple[Call, GradientEdge]] = field(default_factory=dict)
    output: Any = None
    aside: Callable[[], AbstractContextManager[Any]] = nullcontext
    problem: str = ""
    done: Callable[[], None] = lambda: None

    @classmethod
    def of(
        cls,
        forward: ForwardPass,
        names: Sequence[str],
        output: Any,
        aside: Callable[[], AbstractContextManager[Any]],
        done: Callable[[], None],
    ) -> InitialPass:
        """What was recorded of it; ``names`` of its layers by index."""
        keys = in_order([names[call.index] for call in forward.calls])
        calls = dict(zip(keys, zip(forward.calls, forward.edges, strict=True), strict=True))
        forward.release()
        return cls(calls, output, aside, done=done)


def in_order(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with how often it came before."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


@dataclass(eq=False)
class ForwardPass:
    """One forward pass of the probed model; kept alive by its graph alone.

    Attributes:
        calls: The layers' applications, in order.
        edges: The gradient edge of each call's output. Held here and emptied with :meth:`release`,
            as the graph holds the hooks and an edge held by a hook would keep the graph for good.
        examples: n, set when the model has returned.
        applied: How often each target was called in it, set likewise.
        staged: What the consumer holds back until a backward pass shows that it was training.
        without_graph: Whether a layer ran with gradients disabled, as in a reentrant checkpoint.
        initial: The same inputs in the network as it was, where it is asked for.
        void: Whether another pass stands in its place, so that what arrives at it is not for us.
    """

    calls: list[Call] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)
    examples: int = 0
    applied: Mapping[int, int] = field(default_factory=dict)
    staged: dict[int, Any] = field(default_factory=dict)
    without_graph: bool = False
    initial: InitialPass | None = None
    void: bool = False

    def release(self) -> None:
        """Let go of the graph."""
        if self.initial is not None:
            self.initial.done()
        self.calls, self.edges, self.initial = [], [], None
