"""Observer: what the hooks see, turned into the layers' sums. Shared by the loop and `measure`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from feature_probe.capture import Recorder
from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.jacobian import JacobianSettings, cotangents, vector_jacobian_products
from feature_probe.moments import Moments
from feature_probe.passes import Anchor, Call, ForwardPass
from feature_probe.relations import Sum
from feature_probe.targets import Target

Positions = Literal["expand", "reduce"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class ObserverSettings:
    """What is summed, and by which conventions.

    Attributes:
        needs: The sums that the asked relations need.
        jacobian: Exact or random.
        output: Picks f ``[n, ...]`` out of what the model returns; None: it is a tensor already.
        positions: "expand": outer products per position, summed (the papers' patch form).
            "reduce": positions and calls of an example summed first. Acts on K and E; G is the
            same in both.
        loss_reduction: How the user's loss is reduced over the batch: with "mean" per-example
            gradients are n times what autograd delivers, with "sum" they are it.
        max_dim: Widest d_out whose d_out × d_out sums are held.
        seed: Seed of the random signs.
    """

    needs: frozenset[Sum]
    jacobian: JacobianSettings
    output: Callable[[Any], Any] | None
    positions: Positions
    loss_reduction: Reduction
    max_dim: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.positions not in ("expand", "reduce"):
            raise ConfigurationError(
                f"positions must be 'expand' or 'reduce', got {self.positions!r}"
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise ConfigurationError(
                f"loss_reduction must be 'mean' or 'sum', got {self.loss_reduction!r}"
            )
        if self.output is not None and not callable(self.output):
            raise ConfigurationError(f"output must be callable, got {self.output!r}")
        positive_integer("max_dim", self.max_dim)
        given: object = self.seed
        if not isinstance(given, int):
            raise ConfigurationError(f"seed must be an integer, got {given!r}")


@dataclass
class Window:
    """The sums of all layers over some forward passes.

    Attributes:
        layers: One :class:`Moments` per target.
        examples: n of all passes that a backward pass reached (all passes, where none is due).
        left_out: Steps that were left out after a fault.
    """

    layers: list[Moments]
    examples: int = 0
    left_out: int = 0

    @classmethod
    def empty(cls, targets: Sequence[Target]) -> Window:
        """Nothing added yet."""
        return cls([Moments() for _ in targets])

    def merge(self, other: Window) -> None:
        """Add another window, which must not be used afterwards."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.merge(theirs)
        self.examples += other.examples
        self.left_out += other.left_out

    def nbytes(self) -> int:
        """Bytes held by all sums."""
        return sum(moments.nbytes() for moments in self.layers)


class Observer:
    """Consumes the recorder's events into a :class:`Window`.

    Args:
        model: The probed module.
        targets: Its measured layers.
        settings: Sums and conventions.
        on_fault: Called with what a hook raised and where; may raise it into the user's code.
        needs_backward: Whether a pass counts only once a backward pass has reached it. True in a
            training loop, so that evaluation is not mistaken for training. False: passes wait for
            :meth:`finish`, which counts them.
        inject_leaf: See :class:`Recorder`.

    Attributes:
        reached: Targets that a gradient reached, of the loss or of the output.
        problems: Why a sum of a target is not measured, by (target, sum).
        edges: Where no backward pass is due, the gradient edges since the last :meth:`take`.
        output_layers: Targets whose own output is f, so that K is the identity.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        settings: ObserverSettings,
        on_fault: Callable[[Exception, str], None],
        *,
        needs_backward: bool = True,
        inject_leaf: bool = False,
    ) -> None:
        self.recorder = Recorder(
            model,
            targets,
            self,
            keep_inputs="gradient" in settings.needs,
            inject_leaf=inject_leaf,
        )
        self.reached: set[int] = set()
        self.problems: dict[tuple[int, Sum], str] = {}
        self.edges: list[GradientEdge] = []
        self._targets = targets
        self._settings = settings
        self._fault = on_fault
        self._needs_backward = needs_backward
        self._window = Window.empty(targets)
        self._passes = 0
        self._waiting: list[tuple[ForwardPass, list[Call], list[GradientEdge]]] = []
        self.output_layers: set[int] = set()
        self._unfinished: list[tuple[ForwardPass, dict[int, Tensor]]] = []
        for index, target in enumerate(targets):
            if target.d_out > settings.max_dim:
                reason = f"d_out {target.d_out} exceeds max_dim {settings.max_dim}"
                self.problems[index, "jacobian"] = self.problems[index, "loss"] = reason

    def take(self) -> Window:
        """What was summed since the last call; the sums start again from nothing."""
        for forward, sums in self._unfinished:
            for index, rows in sums.items():
                self._add_loss_outer(self._window.layers[index], rows, forward.examples)
        self._unfinished.clear()
        self.edges, self._waiting = [], []
        window, self._window = self._window, Window.empty(self._targets)
        return window

    def on_fault(self, error: Exception, where: str) -> None:
        """Hand a hook's failure on."""
        self._fault(error, where)

    def on_forward(self, forward: ForwardPass, output: Any) -> None:
        """Read n from the output and stage K by vector-Jacobian products of it."""
        if self._needs_backward:
            self._differentiate(forward, forward.calls, forward.edges, output)
        else:
            self._waiting.append((forward, forward.calls, forward.edges))

    def finish(self, output: Any) -> None:
        """Count the pass that waits, with ``output`` as what the model is said to have returned.

        Raises:
            ConfigurationError: unless exactly one pass waits, or if f cannot be found in ``output``
                or has too many coordinates.
        """
        waiting, self._waiting = self._waiting, []
        if len(waiting) != 1:
            raise ConfigurationError(
                f"the model was called {len(waiting)} times for one batch; it must be called once "
                "(as model(x), which runs hooks, not as model.forward(x))"
            )
        forward, calls, edges = waiting[0]
        self._differentiate(forward, calls, edges, output)
        self.edges += edges
        self._commit(forward)

    def _differentiate(
        self, forward: ForwardPass, calls: list[Call], edges: list[GradientEdge], output: Any
    ) -> None:
        f = select_output(output, self._settings.output)
        forward.examples = f.shape[0]
        if "jacobian" in self._settings.needs:
            self._settings.jacobian.check(f)
            if f.requires_grad and calls:
                self._stage_jacobian(forward, calls, edges, f)

    def on_gradient(self, forward: ForwardPass, call: Call, gradient: Tensor) -> None:
        """Add one call's g to E, and gᵀh to G where G is formed from it."""
        if not forward.reached and self._needs_backward:
            self._commit(forward)
        self.reached.add(call.index)
        moments = self._window.layers[call.index]
        if call in forward.delivered:
            self.problems[call.index, "loss"] = (
                "several backward passes reached one forward pass (or another probe's products "
                "did); E would need their sum"
            )
        if call.overwritten:
            self.problems[call.index, "gradient"] = (
                "the layer's input was modified in place before the backward pass"
            )
        product = call.weight_gradient(gradient)
        if product is not None:
            moments.add_gradient(product, weight=1.0)
        rows = self._rows(call, gradient)
        if call not in forward.delivered:
            moments.loss_rows += rows.shape[0] * rows.shape[1]
            forward.delivered.add(call)
        if "loss" in self._settings.needs and (call.index, "loss") not in self.problems:
            self._add_loss(forward, call, rows)

    def _commit(self, forward: ForwardPass) -> None:
        forward.reached = True
        self._passes += 1
        self._window.examples += forward.examples
        for index, moments in forward.staged.items():
            self._window.layers[index].merge(moments)
        forward.staged = {}

    def _stage_jacobian(
        self, forward: ForwardPass, calls: list[Call], edges: list[GradientEdge], f: Tensor
    ) -> None:
        pairs = [
            (call, edge)
            for call, edge in zip(calls, edges, strict=True)
            if (call.index, "jacobian") not in self.problems
        ]
        if not pairs:
            return
        own = get_gradient_edge(Anchor.of(f)[1])
        self.output_layers |= {call.index for call, edge in pairs if edge.node is own.node}
        asked, places = zip(*pairs, strict=True)
        self.recorder.listening = False
        try:
            for v, scale in cotangents(f, self._settings.jacobian, self._generator(f.device)):
                products = vector_jacobian_products(f, places, v)
                self._stage_products(forward, asked, products, scale)
        finally:
            self.recorder.listening = True

    def _stage_products(
        self,
        forward: ForwardPass,
        calls: Sequence[Call],
        products: Sequence[Tensor | None],
        scale: float,
    ) -> None:
        reduced: dict[int, Tensor] = {}
        counted: dict[int, int] = {}
        for call, product in zip(calls, products, strict=True):
            if product is None:
                continue
            self.reached.add(call.index)
            rows = self._rows(call, call.anchor.restore(product))
            counted[call.index] = counted.get(call.index, 0) + rows.shape[0] * rows.shape[1]
            moments = forward.staged.setdefault(call.index, Moments())
            if self._settings.positions == "expand":
                moments.add_outer("jacobian", rows.flatten(0, 1), scale)
            elif self._has_example_axis(call, rows, forward.examples, "jacobian"):
                _accumulate(reduced, call.index, rows.sum(1))
        for index, rows in reduced.items():
            forward.staged[index].add_outer("jacobian", rows, scale)
        for index, count in counted.items():
            forward.staged[index].jacobian_rows = count

    def _add_loss(self, forward: ForwardPass, call: Call, rows: Tensor) -> None:
        if self._settings.positions == "expand":
            moments = self._window.layers[call.index]
            self._add_loss_outer(moments, rows.flatten(0, 1), forward.examples)
        elif self._has_example_axis(call, rows, forward.examples, "loss"):
            for known, sums in self._unfinished:
                if known is forward:
                    _accumulate(sums, call.index, rows.sum(1))
                    return
            self._unfinished.append((forward, {call.index: rows.sum(1)}))

    def _add_loss_outer(self, moments: Moments, rows: Tensor, examples: int) -> None:
        scale = float(examples) if self._settings.loss_reduction == "mean" else 1.0
        moments.add_outer("loss", rows, scale)

    def _rows(self, call: Call, gradient: Tensor) -> Tensor:
        """``[n, positions, groups, d_out]`` of an output-shaped tensor."""
        return self._targets[call.index].rule.rows(call.module, gradient)

    def _has_example_axis(self, call: Call, rows: Tensor, examples: int, kind: Sum) -> bool:
        if rows.shape[0] == examples:
            return True
        self.problems[call.index, kind] = (
            f"positions='reduce' needs the example axis first: the layer saw {rows.shape[0]} "
            f"where the model's output has {examples} examples"
        )
        return False

    def _generator(self, device: torch.device) -> torch.Generator:
        """Where the next pass draws its signs from.

        Seeded by how many passes counted before, not by how many ran: evaluation in between, with
        gradients or without, changes no number.
        """
        seed = (self._settings.seed * 1_000_003 + self._passes) % 2**63
        return torch.Generator(device=device).manual_seed(seed)


def _accumulate(sums: dict[int, Tensor], index: int, rows: Tensor) -> None:
    sums[index] = sums[index] + rows if index in sums else rows


def select_output(output: Any, chooser: Callable[[Any], Any] | None) -> Tensor:
    """The tensor f ``[n, ...]`` in what a model returned.

    Raises:
        ConfigurationError: if there is no floating tensor with an example axis.
    """
    f = output
    if chooser is not None:
        try:
            f = chooser(output)
        except Exception as error:  # whatever the user's function raises
            raise ConfigurationError(
                f"output= raised {type(error).__name__}: {error}; the model returned a "
                f"{type(output).__name__}"
            ) from error
    if not isinstance(f, Tensor):
        raise ConfigurationError(_no_tensor(output, f, chooser is None))
    if f.dim() == 0:
        raise ConfigurationError(
            "the model's output is a scalar (a loss?); give output= to pick the tensor f of "
            "shape [n, ...] whose Jacobian is meant, e.g. output=lambda out: out[1]"
        )
    if not f.is_floating_point():
        raise ConfigurationError(f"the model's output has dtype {f.dtype}; f must be floating")
    return f


def _no_tensor(output: Any, chosen: Any, direct: bool) -> str:
    if not direct:
        return f"output= returned {type(chosen).__name__}; it must return the tensor f [n, ...]"
    if isinstance(output, Mapping):
        inside = f" with keys {', '.join(map(repr, output))}"
        example = "output=lambda out: out['logits']"
    elif isinstance(output, (tuple, list)):
        inside, example = f" of {len(output)}", "output=lambda out: out[0]"
    else:
        inside, example = "", "output=lambda out: out.logits"
    return (
        f"the model returned a {type(output).__name__}{inside}, not a tensor; give output= to pick "
        f"f, e.g. {example}"
    )
