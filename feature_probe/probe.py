"""FeatureProbe: the context manager around a training loop. The only stateful object."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feature_probe.assembly import Assembler
from feature_probe.decay import WeightDecay
from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.estimate import estimate_cost
from feature_probe.jacobian import JacobianSettings
from feature_probe.models import unwrap
from feature_probe.observer import Observer, ObserverSettings, Positions, Reduction, Window
from feature_probe.relations import parse_powers, parse_relations
from feature_probe.report import Report
from feature_probe.schedules import Schedule, parse_schedule
from feature_probe.sinks import JSONLSink, Sink, TensorBoardSink
from feature_probe.targets import Selection, Target, find_targets

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

#: Coverage from which on its gaps are told quietly.
_NEARLY_ALL = 0.99
#: Name of the record file beside the event files of ``log_dir``.
JSONL_NAME = "feature_probe.jsonl"


class FeatureProbe:
    """Watches a training loop and says how far each layer's weight agrees with FACT, NFA and kin.

    ::

        with FeatureProbe(model, optimizer=optimizer, log_dir="runs/mlp", every=100) as probe:
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        print(probe.report)

    Nothing of the user's is written to, no random state but the probe's own is used, and training
    is bit-identical with and without the probe. Relations and their equations:
    :mod:`feature_probe.relations`.

    In the loop a report is an estimate: over the minibatches of ``window`` steps, with the weights
    of the last of them. G is the mean of ``param.grad`` as the optimizer sees it (so clipping and
    accumulation are in it) over the steps in which there was one; K and E are means over examples.
    For the definitions at frozen weights over a whole data set use :func:`feature_probe.measure`.

    Args:
        model: The module whose ``forward`` the loop calls.
        optimizer: Its optimizer. Steps are counted, and λ is read, from it. Without one call
            :meth:`step` after ``loss.backward()``.
        every: Report at steps 0, n, 2n, ... (step 0 is initialisation), or any ``step -> bool``
            that depends on the step alone (:mod:`feature_probe.schedules`).
        window: Steps whose sums go into a report, the reported one last; fewer where the previous
            report, or step 0, is nearer. FACT is a matter of the whole data set's gradient: a few
            minibatches show little of it while the learning rate is large, an epoch shows it.
        relations: Names in :data:`feature_probe.RELATIONS`.
        powers: The powers s of AGOPˢ and eNFAˢ.
        include: Layers to measure: a glob on names, a compiled pattern, a module type, a predicate
            ``(name, module) -> bool``, or a list of these. All known layers if None.
        exclude: Layers to leave out of those, chosen likewise.
        weight_decay: λ of the loss (λ/2)‖W‖², for all layers or by layer name; None: from the
            optimizer's groups.
        output: Picks f, shape ``[n, ...]``, out of what the model returns.
        jacobian: "random": ``num_probes`` products with random signs a forward pass, unbiased for
            K; "exact": one product per output coordinate.
        num_probes: Random products per forward pass.
        positions: "expand": outer products per position (pixel, token, call), summed. "reduce":
            an example's positions are summed first (K and E; G is the same).
        loss_reduction: "mean" or "sum": how the loss is reduced over the batch. Only the scale of E
            and the weighting of uneven batches in it depend on this; G is read as it stands.
        log_dir: Folder for TensorBoard event files and ``feature_probe.jsonl``.
        writer: The user's own ``SummaryWriter`` instead; it is flushed but not closed.
        sinks: More places to write reports to (:class:`feature_probe.sinks.Sink`).
        keep_matrices: Keep a copy of W and the sums with every report, so that ``report.matrix``
            and matrix pictures work, at about the memory that :meth:`estimate` names.
        max_dim: Layers with more output rows per group get no K and E (FACT and bFACT only).
        max_outputs: Most output coordinates that jacobian="exact" accepts.
        seed: Seed of the random signs.
        strict: Raise what goes wrong inside the probe instead of logging and counting it.

    Attributes:
        report: The latest report, or None.
        faults: How often something inside the probe failed.

    Raises:
        ConfigurationError: for anything that cannot be probed as asked. What only a forward pass
            can show (the output's type, too many outputs for "exact") is raised in the first one,
            before any weight has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        every: int | Schedule = 100,
        window: int = 4,
        relations: Iterable[str] | str = ("fact", "bfact", "nfa", "enfa"),
        powers: Iterable[float] | float = (0.5, 1.0),
        include: Selection = None,
        exclude: Selection = None,
        weight_decay: float | Mapping[str, float] | None = None,
        output: Callable[[Any], Any] | None = None,
        jacobian: Literal["exact", "random"] = "random",
        num_probes: int = 1,
        positions: Positions = "expand",
        loss_reduction: Reduction = "mean",
        log_dir: str | os.PathLike[str] | None = None,
        writer: SummaryWriter | None = None,
        sinks: Iterable[Sink] = (),
        keep_matrices: bool = False,
        max_dim: int = 8192,
        max_outputs: int = 1024,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        positive_integer("window", window)
        self.report: Report | None = None
        self.faults = 0
        self._model = unwrap(model)
        self._optimizer = optimizer
        self._due = parse_schedule(every)
        self._window_steps = window
        self._keep = keep_matrices
        self._strict = strict
        self._targets = find_targets(self._model, include, exclude)
        asked, wanted = parse_relations(relations), parse_powers(powers)
        settings = ObserverSettings(
            needs=frozenset(relation.needs for relation in asked),
            jacobian=JacobianSettings(jacobian, num_probes, max_outputs),
            output=output,
            positions=positions,
            loss_reduction=loss_reduction,
            max_dim=max_dim,
            seed=seed,
        )
        self._settings = settings
        self._decay = WeightDecay(self._targets, optimizer, weight_decay)
        self._observer = Observer(self._model, self._targets, settings, self._on_hook_fault)
        self._assembler = Assembler(
            self._model, self._targets, self._observer, self._decay, asked, wanted
        )
        self._sinks_given = _checked_sinks(sinks)
        if log_dir is not None and writer is not None:
            raise ConfigurationError("give log_dir or writer, not both")
        self._log_dir, self._writer = log_dir, _checked_writer(writer)
        self._sinks: list[Sink] = []
        self._handles: list[RemovableHandle] = []
        self._attached = False
        self._validated = False
        self._spoiled = False
        self._logged: set[tuple[str, str]] = set()
        self._step = 0
        self._steps_in_window = 0
        self._window = Window.empty(self._targets)

    @staticmethod
    def targets(
        model: nn.Module, include: Selection = None, exclude: Selection = None
    ) -> list[Target]:
        """The layers that would be measured, without attaching anything.

        Raises:
            ConfigurationError: if no layer matches, or a criterion matches none.
        """
        return find_targets(unwrap(model), include, exclude)

    #: What probing a model on batches like a sample will cost, before anything is attached.
    estimate = staticmethod(estimate_cost)

    @property
    def is_attached(self) -> bool:
        """Whether the probe is watching."""
        return self._attached

    def attach(self) -> FeatureProbe:
        """Start watching, with an empty window.

        The model's next forward pass is step 0's. Attached again, the probe goes on counting where
        :meth:`detach` left off; steps in between are not counted.

        Raises:
            ConfigurationError: if attached already, or if ``log_dir`` cannot be written.
        """
        if self._attached:
            raise ConfigurationError("this probe is attached already; detach() it first")
        self._sinks = [*self._open_sinks(), *self._sinks_given]
        if self._optimizer is not None:
            self._handles = [
                self._optimizer.register_step_pre_hook(self._before_step),
                self._optimizer.register_step_post_hook(self._after_step),
            ]
        self._attached = True
        self._observer.take()
        self._window, self._steps_in_window = Window.empty(self._targets), 0
        self._arm()
        return self

    def detach(self) -> None:
        """Stop watching: every hook comes off, sinks are closed. Nothing if not attached."""
        if not self._attached:
            return
        self._attached = False
        if self.report is None:
            logger.warning(
                "the probe made no report: of the steps it saw (%d) none was due%s",
                self._step,
                "" if self._optimizer is not None else " (without optimizer= call probe.step())",
            )
        self._observer.recorder.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for sink in self._sinks:
            self._guard("closing a sink", sink.close)
        self._sinks = []

    def __enter__(self) -> FeatureProbe:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def step(self) -> None:
        """End a training step, where no optimizer was given.

        Call it after ``loss.backward()`` and before the gradients are zeroed; before the weights
        change, too, if weights and gradients are to belong together.

        Raises:
            ConfigurationError: if not attached, or if steps are counted from an optimizer.
        """
        if not self._attached:
            raise ConfigurationError("step() needs an attached probe: use `with` or attach()")
        if self._optimizer is not None:
            raise ConfigurationError(
                "steps are counted from the optimizer; call step() only on a probe without one"
            )
        self._guard("collecting a step", self._collect)
        self._advance()

    def _open_sinks(self) -> list[Sink]:
        if self._writer is not None:
            return [TensorBoardSink(writer=self._writer)]
        if self._log_dir is None:
            return []
        folder = os.fspath(self._log_dir)
        if os.path.exists(os.path.join(folder, JSONL_NAME)):
            logger.warning("%s holds an earlier run: its records are appended to", folder)
        return [TensorBoardSink(folder), JSONLSink(os.path.join(folder, JSONL_NAME))]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._observer.recorder.armed and not _has_closure(args, kwargs):
            self._guard("collecting a step", self._collect)

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # the backward passes ran inside the step
        if self._observer.recorder.armed and _has_closure(args, kwargs):
            self._guard("collecting a step", self._collect)
        self._advance()

    def _advance(self) -> None:
        self._step += 1
        self._guard("asking the schedule", self._arm)

    def _arm(self) -> None:
        """Follow the next step's passes if it is in a window; step 0's are always checked."""
        ahead = range(self._step, self._step + self._window_steps)
        if self._step == 0 or any(self._due(step) for step in ahead):
            self._observer.recorder.arm()
        elif self._observer.recorder.armed:
            self._observer.recorder.disarm()

    def _collect(self) -> None:
        """Add the finished step to the window, and report if it is due."""
        if not self._observer.recorder.armed:
            return
        fresh = self._observer.take()
        self._validated = True
        if self._spoiled:
            self._spoiled = False
            self._window.left_out += 1
        else:
            self._add_gradients(fresh)
            self._window.merge(fresh)
            self._steps_in_window += 1
        due = self._due(self._step)
        if due:
            self._guard("making a report", self._report)
        if due or not self._due_soon():
            self._window = Window.empty(self._targets)
            self._steps_in_window = 0

    def _due_soon(self) -> bool:
        ahead = range(self._step + 1, self._step + self._window_steps)
        return any(self._due(step) for step in ahead)

    def _add_gradients(self, step: Window) -> None:
        """Complete one step's sums by its gradient, weight 1 a step."""
        if "gradient" not in self._settings.needs:
            return
        for index, (target, moments) in enumerate(zip(self._targets, step.layers, strict=True)):
            if not self._observer.recorder.uses_parameter(index):
                # gᵀh of all calls of the step: together one gradient
                moments.gradient_weight = 0.0 if moments.gradient is None else 1.0
            elif target.parameter is not None and target.parameter.grad is not None:
                gradient = _dense(target.parameter.grad.detach())
                moments.add_gradient(target.rule.gradient_matrix(target.module, gradient))

    def _report(self) -> None:
        settings = {
            "source": "loop",
            "window": self._steps_in_window,
            "jacobian": self._settings.jacobian.kind,
            "num_probes": self._settings.jacobian.num_probes,
            "positions": self._settings.positions,
            "loss_reduction": self._settings.loss_reduction,
            "faults": self.faults,
        }
        report = self._assembler.report(self._window, self._step, settings, keep=self._keep)
        for sink in self._sinks:
            self._guard(f"writing to {type(sink).__name__}", sink.write, report)
        if self.report is None:
            self._tell_gaps(report)
        self.report = report

    def _tell_gaps(self, report: Report) -> None:
        if report.coverage.gaps():
            small = report.coverage.share() >= _NEARLY_ALL
            logger.log(logging.INFO if small else logging.WARNING, "%s", report.coverage)

    def _guard(self, where: str, work: Callable[..., Any], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:  # a fault of the probe must not end the user's run
            self._on_fault(error, where)

    def _on_hook_fault(self, error: Exception, where: str) -> None:
        """A hook failed, so that the step's sums are incomplete: leave the step out."""
        self._spoiled = True
        self._on_fault(error, where)

    def _on_fault(self, error: Exception, where: str) -> None:
        """Count and log a failure once; raise it if strict, or if the set-up cannot work."""
        unusable = isinstance(error, ConfigurationError) and not self._validated
        if self._strict or unusable:
            raise error
        self.faults += 1
        key = (where, type(error).__name__)
        if key not in self._logged:
            self._logged.add(key)
            logger.warning(
                "fault in the probe while %s (training goes on, counted in probe.faults)",
                where,
                exc_info=error,
            )


def _checked_sinks(sinks: Iterable[Sink]) -> tuple[Sink, ...]:
    given: object = sinks
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ConfigurationError(f"sinks must be a list of sinks, got {given!r}")
    listed = tuple(given)
    for sink in listed:
        if not (callable(getattr(sink, "write", None)) and callable(getattr(sink, "close", None))):
            raise ConfigurationError(f"a sink needs write(report) and close(), got {sink!r}")
    return listed


def _checked_writer(writer: SummaryWriter | None) -> SummaryWriter | None:
    if writer is not None and not callable(getattr(writer, "add_custom_scalars", None)):
        raise ConfigurationError(
            f"writer must be a torch.utils.tensorboard.SummaryWriter, got {writer!r}; "
            "for a folder use log_dir="
        )
    return writer


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``optimizer.step`` was given a closure; ``args`` may start with the optimizer."""
    return any(
        callable(value) and not isinstance(value, torch.optim.Optimizer)
        for value in (*args, kwargs.get("closure"))
    )


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
