"""∂L/∂output, read off the user's own output and carried back through the shadow's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from feature_probe.capture.passes import Anchor, Call, tensors_in

#: Node and output number: what tells one place in an autograd graph from another.
Place = tuple[Any, int]


@dataclass(eq=False)
class _Port:
    """A place where the gradient leaves the user's graph and enters the shadow's.

    Attributes:
        anchor: Reads the user's gradient.
        shadow: The tensor of the shadow that takes it.
        whole: Whether it takes the gradient of the user's anchor as a whole, not one view's part.
        total: Whether another output was computed from this one in the user's graph, so that what
            arrives here includes what came through that one.
    """

    anchor: Anchor
    shadow: Tensor
    whole: bool
    total: bool = False

    def gradient(self, arrived: Tensor) -> Tensor:
        return arrived if self.whole else self.anchor.restore(arrived)


@dataclass(eq=False)
class OutputGradients:
    """Collects ∂L/∂output of one forward pass, by backward graph task.

    Made by :meth:`watch`; :meth:`pull` carries what one task delivered to the shadow's layers.

    Attributes:
        problem: Why no gradient can be carried over, or None.
        calls: The layers' applications in the shadow.
        on_arrival: Asked, with this, when a graph task delivers first: whether it is to be
            collected. It must not hold this itself: the cycle would keep the graph for a while.
    """

    problem: str | None = None
    calls: Sequence[Call] = ()
    on_arrival: Callable[[OutputGradients], bool] | None = None
    _edges: Sequence[GradientEdge] = ()
    _tasks: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    _ports: list[_Port] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    @classmethod
    def watch(
        cls,
        output: Any,
        shadow_output: Any,
        calls: Sequence[Call] = (),
        edges: Sequence[GradientEdge] = (),
    ) -> OutputGradients:
        """Put a hook on every output of the user's that requires grad.

        Args:
            output: What the user's forward pass returned.
            shadow_output: What the shadow returned; None: there is none, and arrivals are told of
                without being collected.
            calls: The layers' applications in the shadow.
            edges: The gradient edge of each.
        """
        found = cls(calls=calls, _edges=edges)
        if shadow_output is None:
            anchors = {
                _place(t): t for t in map(_anchor, filter(_carries_gradient, tensors_in(output)))
            }
            found._listen(anchors, {})
            return found
        tensors, repeated = tensors_in(output), tensors_in(shadow_output)
        if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in repeated]:
            found.problem = "the forward pass, run again, returned something else"
            return found
        pairs = zip(tensors, repeated, strict=True)
        found._open([(a, b) for a, b in pairs if _carries_gradient(a) and _carries_gradient(b)])
        return found

    def close(self) -> None:
        """Take the hooks off and let go of the graphs."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._ports, self._edges = [], [], ()
        self._tasks.clear()
        self.on_arrival = None

    def take(self, ports: Sequence[int], gradient: Tensor) -> None:
        """A gradient arrived at some ports."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            if self.on_arrival is None or not self.on_arrival(self):
                return
            self._tasks[task] = {}
        self._tasks[task] |= dict.fromkeys(ports, gradient)

    def pull(self, task: int, *, retain_graph: bool) -> tuple[Tensor | None, ...]:
        """The gradient at each call for what ``task`` delivered, None where nothing arrives.

        To be called inside :meth:`feature_probe.shadow.ShadowPass.aside`.

        Raises:
            RuntimeError: from autograd, if the user modified in place what the shadow has saved.
        """
        arrived = self._tasks.pop(task, {})
        if not arrived or not self._edges:
            return (None,) * len(self.calls)
        used = [(self._ports[i], g) for i, g in sorted(arrived.items())]
        with _totals([(port, g) for port, g in used if port.total]):
            return torch.autograd.grad(
                [port.shadow for port, _ in used],
                self._edges,
                [port.gradient(g) for port, g in used],
                retain_graph=retain_graph,
                allow_unused=True,
            )

    def _open(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        places: dict[Place, list[int]] = {}
        anchors: dict[Place, Tensor] = {}
        for leaf, other in pairs:
            anchor, tensor = Anchor.of(leaf)
            place = _place(tensor)
            shadow = _anchor(other)
            if shadow is tensor:
                continue  # an input handed through, above all layers
            known = [self._ports[i] for i in places.get(place, ())]
            if shadow.shape == tensor.shape:
                if any(port.shadow is shadow for port in known):
                    continue  # two views of one tensor, or one tensor returned twice
                port = _Port(anchor, shadow, whole=True)
            else:
                port = _Port(anchor, other, whole=False)
            places.setdefault(place, []).append(len(self._ports))
            anchors[place] = tensor
            self._ports.append(port)
        if len(places) > 1:
            for place in _below(anchors.values()) & places.keys():
                for i in places[place]:
                    self._ports[i].total = True
        self._listen(anchors, places)

    def _listen(self, anchors: dict[Place, Tensor], places: dict[Place, list[int]]) -> None:
        for place, tensor in anchors.items():
            hook = _Arrival(self, places.get(place, []))
            self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]


class _Arrival:
    """The tensor hook on one output of the user's."""

    def __init__(self, gradients: OutputGradients, ports: list[int]) -> None:
        self._gradients, self._ports = gradients, ports

    def __call__(self, gradient: Tensor | None) -> None:
        # None: the backward pass reached another output of the same compiled function
        if gradient is not None and not torch.is_grad_enabled():  # else create_graph, left out
            self._gradients.take(self._ports, gradient)


@contextlib.contextmanager
def _totals(known: list[tuple[_Port, Tensor]]) -> Iterator[None]:
    """Where the total gradient is known, it replaces what has come together there."""
    handles = [
        port.shadow.register_hook(_Replacement(port.gradient(gradient)))  # type: ignore[no-untyped-call]
        for port, gradient in known
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Replacement:
    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient

    def __call__(self, _: Tensor) -> Tensor:
        return self._gradient


def _carries_gradient(value: Tensor) -> bool:
    return value.requires_grad and value.grad_fn is not None


def _anchor(output: Tensor) -> Tensor:
    return Anchor.of(output)[1]


def _place(tensor: Tensor) -> Place:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _below(tensors: Iterable[Tensor]) -> set[Place]:
    """Every place in the graphs of these tensors that something above it was computed from."""
    found: set[Place] = set()
    seen: set[Any] = set()
    todo = [tensor.grad_fn for tensor in tensors]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= set(node.next_functions)
        todo += [below for below, _ in node.next_functions]
    return found
