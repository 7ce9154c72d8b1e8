"""Observer: what the hooks see, turned into the layers' sums. Shared by the loop and `measure`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from feature_probe.capture.chain import remaining_depths
from feature_probe.capture.passes import Anchor, Call, ForwardPass, InitialPass
from feature_probe.capture.recorder import Recorder
from feature_probe.capture.selection import select_output
from feature_probe.capture.sharding import is_sharded, unreduced
from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.layers.targets import Discovery
from feature_probe.sums.initial_jacobian import InitialJacobian
from feature_probe.sums.jacobian import JacobianSettings, cotangents, vector_jacobian_products
from feature_probe.sums.ledger import Ledger, Positions, Reduction
from feature_probe.sums.moments import Moments, Outer
from feature_probe.sums.window import Window
from feature_probe.theory.projection import Subspace
from feature_probe.theory.relations import Sum


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
        loss_reduction: How the user's loss is reduced over the batch; see :mod:`ledger`.
        max_dim: Most outputs of a block whose sums are held in full; of wider ones those in a
            random subspace of so many dimensions are.
        seed: Seed of the random signs.
        stream: This process's number among those that report together, and how many they are: each
            draws other signs.
    """

    needs: frozenset[Sum]
    jacobian: JacobianSettings
    output: Callable[[Any], Any] | None
    positions: Positions
    loss_reduction: Reduction
    max_dim: int
    seed: int
    stream: tuple[int, int] = (0, 1)

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


#: The sums that are made of products of the output.
JACOBIANS: tuple[Outer, ...] = ("jacobian", "jacobian_change")
#: Nodes that leave the Jacobian of what is below them the identity.
_COPIES = frozenset({"ToCopyBackward0", "CloneBackward0", "AliasBackward0"})


class Observer:
    """Consumes the recorder's events into a :class:`Window`.

    Args:
        model: The probed module.
        discovery: Its measured layers.
        settings: Sums and conventions.
        on_fault: Called with what a hook raised and where; may raise it into the user's code.
        in_training: Whether a pass counts only once a backward pass of the training has reached it
            (:class:`Ledger`), so that evaluation is not mistaken for training. False: passes wait
            for :meth:`finish`, which counts them.
        inject_leaf: See :class:`Recorder`.
        entrance: See :class:`Recorder`.

    Attributes:
        model: The probed module.
        ledger: What backward passes delivered for the optimizer's next step.
        reached: Targets that a gradient reached, of the loss or of the output.
        problems: Why a sum of a target cannot be measured, by (target, sum).
        edges: Out of training, the gradient edges since the last :meth:`take`.
        output_layers: Targets whose own output is f, so that K is the identity.
        repeated: Targets that one forward pass used more than once, so that K contains W.
        depths: Where the targets form a chain, the number of each from the output by name, 1 the
            last; None until a pass was seen, empty once one used other layers.
    """

    def __init__(
        self,
        model: nn.Module,
        discovery: Discovery,
        settings: ObserverSettings,
        on_fault: Callable[[Exception, str], None],
        *,
        in_training: bool = True,
        inject_leaf: bool = False,
        entrance: nn.Module | None = None,
    ) -> None:
        self.recorder = Recorder(
            model,
            discovery,
            self,
            keep_inputs="gradient" in settings.needs,
            inject_leaf=inject_leaf,
            entrance=entrance,
            products=bool(settings.needs - {"gradient", "update"}),
            in_training=in_training,
        )
        self.reached: set[int] = set()
        self.problems: dict[tuple[int, Sum], str] = {}
        self.edges: list[GradientEdge] = []
        self.output_layers: set[int] = set()
        self.repeated: set[int] = set()
        self.depths: dict[str, int] | None = None
        self.ledger = Ledger(settings.loss_reduction, settings.positions, self._within_limit)
        self.model = model
        self._targets = discovery.targets
        self._settings = settings
        self._fault = on_fault
        self._in_training = in_training
        self._window = Window()
        self._subspaces: dict[int, Subspace] = {}
        self._passes = 0
        self._waiting: list[tuple[ForwardPass, list[Call], list[GradientEdge]]] = []
        self._reduced: dict[tuple[ForwardPass, int], Tensor] = {}

    def take(self) -> Window:
        """Out of training: what was summed since the last call; the sums start again."""
        for (forward, index), rows in self._reduced.items():
            self._window.layer(index).add_outer("loss", rows, self._loss_scale(forward))
        self._reduced.clear()
        self.edges, self._waiting = [], []
        window, self._window = self._window, Window()
        return window

    def state_dict(self) -> dict[str, Any]:
        """In training: what was seen of the layers, by name, and how many passes counted."""
        names = [target.name for target in self._targets]
        recorder = self.recorder
        return {
            "passes": self.ledger.passes,
            "holding": self.ledger.holding,
            "fired": [names[index] for index in sorted(recorder.reader.fired)],
            "reached": [names[index] for index in sorted(self.reached)],
            "output_layers": [names[index] for index in sorted(self.output_layers)],
            "repeated": [names[index] for index in sorted(self.repeated)],
            "depths": None if self.depths is None else dict(self.depths),
            "problems": [[names[i], needs, why] for (i, needs), why in self.problems.items()],
            "frames": {names[i]: found.frame for i, found in self._subspaces.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back from :meth:`state_dict`, for the layers known by now."""
        index = {target.name: i for i, target in enumerate(self._targets)}
        self.ledger.passes, self.ledger.holding = state["passes"], state["holding"]
        self.recorder.reader.fired |= {index[name] for name in state["fired"] if name in index}
        self.reached |= {index[name] for name in state["reached"] if name in index}
        self.output_layers |= {index[name] for name in state["output_layers"] if name in index}
        self.repeated |= {index[name] for name in state["repeated"] if name in index}
        self.depths = None if state["depths"] is None else dict(state["depths"])
        for name, frame in state.get("frames", {}).items():
            if name in index:
                target = self._targets[index[name]]
                own = Subspace(target.d_out, self._settings.max_dim, frame)
                self._subspaces[index[name]] = own
        for name, needs, why in state["problems"]:
            if name in index:
                self.problems[index[name], needs] = why

    def sampling_error(self, width: int, examples: int) -> float:
        """How far, relatively, random probes of a multiple of the identity lie from it; 0: exact.

        Args:
            width: d_out, or the dimension of the subspace.
            examples: n.
        """
        settings = self._settings.jacobian
        if settings.kind == "exact":
            return 0.0
        return math.sqrt((width - 1) / max(examples * settings.num_probes, 1))

    def subspace(self, index: int) -> Subspace | None:
        """In which a target's K and E of this window are held, None where they are in full."""
        target = self._targets[index]
        if target.d_out <= self._settings.max_dim:
            return None
        if index not in self._subspaces:
            weight = self.recorder.reader.weights.get(index, target.parameter)
            whole = None if weight is None or is_sharded(weight) else target.matrix(weight.detach())
            found = Subspace.within(target.d_out, self._settings.max_dim, whole)
            if found is not None:
                self._subspaces[index] = found
        return self._subspaces[index]

    def open_window(self) -> None:
        """The sums begin again, in subspaces of the weights as they will be then."""
        self._subspaces.clear()

    def nbytes(self) -> int:
        """Bytes of what the subspaces of this window hold."""
        return sum(subspace.nbytes() for subspace in self._subspaces.values())

    def width(self, index: int) -> int:
        """The side of a target's K and E: d_out, or the dimension of the subspace."""
        return min(self._targets[index].d_out, self._settings.max_dim)

    def _within_limit(self, index: int, rows: Tensor) -> Tensor:
        """A target's rows ``[..., groups, d_out]`` as they are, or in the subspace."""
        subspace = self.subspace(index)
        return rows if subspace is None else subspace.rows(rows)

    def on_fault(self, error: Exception, where: str) -> None:
        """Hand a hook's failure on."""
        self._fault(error, where)

    def on_begin(self) -> None:
        """The model is about to run: backward passes before it are over."""
        if self._in_training:
            self.ledger.begin()

    def on_accumulated(self, parameter: Tensor | None) -> None:
        """A parameter's gradient has grown, or (None) that of what stands for a sharded one."""
        if self._in_training:
            self.ledger.accumulated(parameter)

    def on_forward(self, forward: ForwardPass, output: Any) -> None:
        """Read n from the output and stage K by vector-Jacobian products of it."""
        if self._in_training:
            self._differentiate(forward, forward.calls, forward.edges, output, forward.initial)
        else:
            self._waiting.append((forward, forward.calls, forward.edges))

    def finish(self, output: Any, initial: InitialPass | None = None) -> None:
        """Count the pass that waits, with ``output`` as what the model is said to have returned.

        Args:
            output: Likewise.
            initial: The same inputs in the network as it was.

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
        self._differentiate(forward, calls, edges, output, initial)
        self.edges += edges
        self._passes += 1
        self._window.examples += forward.examples
        self._count(forward, self._window)

    def on_backward(self, forward: ForwardPass) -> None:
        """A backward pass has reached the output of a pass that is followed by its shadow."""
        self.ledger.enter(forward)

    def on_unfollowed(self, reason: str) -> None:
        """Say so for every sum that needs the layers' inputs or output gradients."""
        for index in range(len(self._targets)):
            self.problems[index, "jacobian"] = self.problems[index, "loss"] = reason
            self.problems[index, "jacobian_change"] = reason
            if not self.recorder.reader.uses_parameter(index):
                self.problems[index, "gradient"] = reason

    def on_gradient(
        self, forward: ForwardPass, call: Call, gradient: Tensor, task: int | None = None
    ) -> None:
        """Add one call's g to E, and gᵀh to G where G is formed from it."""
        if self._in_training and not forward.examples:
            return  # before the model returned: the products of another probe
        self.reached.add(call.index)
        if call.overwritten:
            self.problems[call.index, "gradient"] = (
                "the layer's input was modified in place before the backward pass"
            )
        product = call.weight_gradient(gradient)
        rows = call.rows(gradient)
        loss = "loss" in self._settings.needs and self._measurable(call, "loss")
        if loss and self._settings.positions == "reduce":
            loss = self._has_example_axis(call, rows, forward.examples, "loss")
        elif loss:
            loss = self._tells_examples_apart(forward, call, rows, "loss")
        if self._in_training:
            self.ledger.gradient(forward, call, rows, product, loss=loss, task=task)
            return
        moments = self._window.layer(call.index)
        moments.loss_rows += rows.shape[0] * rows.shape[1]
        if product is not None:
            moments.add_gradient(product)
        if loss:
            rows = self._within_limit(call.index, rows)
        if loss and self._settings.positions == "expand":
            moments.add_outer("loss", rows.flatten(0, 1), self._loss_scale(forward))
        elif loss:
            key = (forward, call.index)
            summed = rows.sum(1)
            self._reduced[key] = self._reduced[key] + summed if key in self._reduced else summed

    def _differentiate(
        self,
        forward: ForwardPass,
        calls: list[Call],
        edges: list[GradientEdge],
        output: Any,
        initial: InitialPass | None,
    ) -> None:
        f = select_output(output, self._settings.output)
        forward.examples = f.shape[0]
        forward.applied = Counter(call.index for call in calls)
        self.repeated |= {index for index, times in forward.applied.items() if times > 1}
        if f.requires_grad and calls:
            self._note_depths(f, calls, edges)
        if self._settings.needs & {"jacobian", "jacobian_change"}:
            self._settings.jacobian.check(f)
            if f.requires_grad and calls:
                self._stage_jacobian(forward, calls, edges, f, initial)

    def _note_depths(self, f: Tensor, calls: Sequence[Call], edges: Sequence[GradientEdge]) -> None:
        """Whether the layers are a chain: asked of the first pass, and of the same layers ever."""
        if self.depths is None:
            found = remaining_depths(f, calls, edges)
            self.depths = {self._targets[index].name: depth for index, depth in found.items()}
        elif self.depths and self.depths.keys() != {self._targets[c.index].name for c in calls}:
            self.depths = {}

    def _count(self, forward: ForwardPass, window: Window) -> None:
        """A pass counts: add what was staged for it."""
        for index, moments in forward.staged.items():
            window.layer(index).merge(moments)
        forward.staged = {}

    def _stage_jacobian(
        self,
        forward: ForwardPass,
        calls: list[Call],
        edges: list[GradientEdge],
        f: Tensor,
        initial: InitialPass | None,
    ) -> None:
        needs = self._settings.needs
        kinds = [kind for kind in JACOBIANS if kind in needs]
        pairs = [
            (call, edge)
            for call, edge in zip(calls, edges, strict=True)
            if any(self._measurable(call, kind) for kind in kinds)
        ]
        if not pairs:
            return
        own = _behind_copies(get_gradient_edge(Anchor.of(f)[1]).node)
        self.output_layers |= {call.index for call, edge in pairs if edge.node is own}
        asked, places = zip(*pairs, strict=True)
        before = self._initial_jacobian(asked, f, initial) if "jacobian_change" in needs else None
        self.recorder.listening = False
        try:
            with unreduced(self.model):
                for v, scale in cotangents(f, self._settings.jacobian, self._generator(f.device)):
                    products = vector_jacobian_products(f, places, v)
                    rows = [
                        None if product is None else call.rows(product)
                        for call, product in zip(asked, products, strict=True)
                    ]
                    self.reached |= {
                        call.index for call, r in zip(asked, rows, strict=True) if r is not None
                    }
                    if "jacobian" in needs:
                        self._stage_rows(forward, asked, rows, scale, "jacobian")
                    if before is not None:
                        changed = before.differences(v, rows)
                        self._stage_rows(forward, asked, changed, scale, "jacobian_change")
        finally:
            self.recorder.listening = True

    def _initial_jacobian(
        self, calls: Sequence[Call], f: Tensor, initial: InitialPass | None
    ) -> InitialJacobian | None:
        """J⁰ at the same places, or None with the reason among the problems."""
        names = [self._targets[call.index].name for call in calls]
        before = InitialJacobian(initial, names, f, self._settings.output)
        for call, problem in zip(calls, before.problems, strict=True):
            if problem:
                self.problems[call.index, "jacobian_change"] = problem
        return None if all(before.problems) else before

    def _stage_rows(
        self,
        forward: ForwardPass,
        calls: Sequence[Call],
        rows_of_calls: Sequence[Tensor | None],
        scale: float,
        kind: Outer,
    ) -> None:
        reduced: dict[int, Tensor] = {}
        counted: dict[int, int] = {}
        for call, rows in zip(calls, rows_of_calls, strict=True):
            if rows is None or (call.index, kind) in self.problems:
                continue
            counted[call.index] = counted.get(call.index, 0) + rows.shape[0] * rows.shape[1]
            rows = self._within_limit(call.index, rows)
            moments = forward.staged.setdefault(call.index, Moments())
            if self._settings.positions == "expand":
                if not self._tells_examples_apart(forward, call, rows, kind):
                    continue
                moments.add_outer(kind, rows.flatten(0, 1), scale)
            elif self._has_example_axis(call, rows, forward.examples, kind):
                summed = rows.sum(1)
                reduced[call.index] = (
                    reduced[call.index] + summed if call.index in reduced else summed
                )
        for index, rows in reduced.items():
            forward.staged[index].add_outer(kind, rows, scale)
        for index, count in counted.items():
            forward.staged[index].jacobian_rows = count

    def _loss_scale(self, forward: ForwardPass) -> float:
        return float(forward.examples) if self._settings.loss_reduction == "mean" else 1.0

    def _measurable(self, call: Call, kind: Sum) -> bool:
        """Whether a d_out × d_out sum is to be formed for the call's layer."""
        return (call.index, kind) not in self.problems

    def _tells_examples_apart(
        self, forward: ForwardPass, call: Call, rows: Tensor, kind: Sum
    ) -> bool:
        """Whether a row is one example's: not for a layer that ran once for all of them.

        One that was called for each example by itself ran as often as there are examples. Random
        products stay unbiased for K even there, by their sign per example.
        """
        examples = forward.examples
        once = rows.shape[0] == 1 < examples and forward.applied.get(call.index, 1) % examples
        if not once or (kind in JACOBIANS and self._settings.jacobian.kind == "random"):
            return True
        self.problems[call.index, kind] = (
            f"the layer ran once for all {examples} examples (on a table of positions?), so that "
            "what arrives is the sum of their gradients"
        )
        return False

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
        counted = self.ledger.passes if self._in_training else self._passes
        rank, ranks = self._settings.stream
        seed = (self._settings.seed * 1_000_003 + counted * ranks + rank) % 2**63
        return torch.Generator(device=device).manual_seed(seed)


def _behind_copies(node: Any) -> Any:
    """The node whose value is only cast, copied or viewed from here on."""
    while node.name() in _COPIES:
        node = node.next_functions[0][0]
    return node
