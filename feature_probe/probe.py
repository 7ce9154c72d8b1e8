"""FeatureProbe: the context manager around a training loop. The only stateful object."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from feature_probe.capture.evaluation import Forward, LossFunction
from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.estimate import estimate_cost
from feature_probe.layers.targets import Discovery, Selection, Target, find_targets
from feature_probe.models import unwrap
from feature_probe.optimizers.behaviour import form_note
from feature_probe.optimizers.clock import DecayClock
from feature_probe.pacing.cost import Cost
from feature_probe.pacing.pace import Pace
from feature_probe.processes.ranks import Ranks
from feature_probe.processes.reduction import GroupChoice
from feature_probe.reports.assembly import Assembler
from feature_probe.reports.decay import WeightDecay
from feature_probe.reports.doctor import Doctor
from feature_probe.reports.report import Report
from feature_probe.reports.structure_settings import Structure
from feature_probe.reports.structuring import Structuring
from feature_probe.reports.verification import Verification
from feature_probe.schedules import Schedule
from feature_probe.selftest import SelfTest
from feature_probe.sinks import Sink
from feature_probe.sinks.outlets import Outlets
from feature_probe.sums.collector import Collector
from feature_probe.sums.initial import Given, InitialWeights, Store
from feature_probe.sums.initial_network import InitialNetwork
from feature_probe.sums.jacobian import JacobianSettings
from feature_probe.sums.ledger import Positions, Reduction
from feature_probe.sums.observer import Observer, ObserverSettings
from feature_probe.sums.state import FORMAT, check_state, without_sums
from feature_probe.sums.stepping import LossScale, StepWatch, parse_loss_scale, parse_optimizers
from feature_probe.sums.verification import wrapper_name
from feature_probe.theory.projection import MAX_DIM
from feature_probe.theory.relations import Relation, parse_powers, parse_relations

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

#: Coverage from which on its gaps are told quietly.
_NEARLY_ALL = 0.99


class FeatureProbe:
    """Watches a training loop and says how far each layer's weight agrees with FACT, NFA and kin.

    ::

        with FeatureProbe(model, optimizer=optimizer, log_dir="runs/mlp") as probe:
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        print(probe.report)

    Nothing of the user's is written to, no random state but the probe's own is used, and training
    is bit-identical with and without the probe. Relations and their equations:
    :mod:`feature_probe.theory.relations`.

    In the loop a report is an estimate: over the minibatches of ``window`` steps, with the weights
    of the last of them. G is the mean of ``param.grad`` as the optimizer sees it (so clipping and
    accumulation are in it) over the steps in which there was one; K and E are means over examples.
    For the definitions at frozen weights over a whole data set use :func:`feature_probe.measure`.

    Args:
        model: The module whose ``forward`` the loop calls.
        optimizer: Its optimizer. Steps are counted, and λ is read, from it. Without one call
            :meth:`step` after ``loss.backward()``. Of several the last one listed ends a step; each
            layer's weight and gradient are read when its own optimizer steps.
        every: Report at steps 0, n, 2n, ... (step 0 is initialisation), or any ``step -> bool``
            that depends on the step alone (:mod:`feature_probe.schedules`). None: as often as
            ``budget`` allows.
        budget: Without ``every``, the share of the training's time that probing may take, 0.02 if
            None: reports at step 0 and after 20 steps outside windows, then with doubling gaps up
            to an even spacing at which a window and a report stay within it, as measured in this
            run; it is counted over ten minutes of training at least. What was chosen stands in
            ``report.settings["cost"]``, what it really costs in :attr:`cost`. Of several processes
            the first decides.
        window: Steps whose sums go into a report, the reported one last; fewer where the previous
            report, or step 0, is nearer. FACT is a matter of the whole data set's gradient: a few
            minibatches show little of it while the learning rate is large, an epoch shows it.
        relations: Names in :data:`feature_probe.RELATIONS`. None: "fact", "bfact", "nfa", "enfa",
            and where the optimizer's weight decay is decoupled (AdamW, Lion, Muon) "update_fact"
            and "update_bfact" too.
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
        loss_scale: What the loss is multiplied by before ``backward``, a number or a function that
            returns it as it stands. None: that of the ``torch.amp.GradScaler`` which calls the
            optimizer, if one does.
        log_dir: Folder for TensorBoard event files and ``feature_probe.jsonl``.
        writer: The user's own ``SummaryWriter`` instead; it is flushed but not closed.
        sinks: More places to write reports to (:class:`feature_probe.sinks.Sink`).
        initial_weights: W₀ for the centred relations: a state dict, a file of one, or the model as
            it was. None: the weights as they stand at the first :meth:`attach`.
            "double_centered_nfa" and "ptk_centered_nfa" need all parameters and buffers, and a
            model that can be copied: the copy runs beside the model on every followed pass.
        initial_store: Where they are kept: "device", "cpu", or "half" (float16 in main memory, for
            W₀ alone).
        structure: True or a :class:`feature_probe.Structure`: ``report.structure(layer)`` then
            holds the agreement as a function of the power, spectra and effective ranks, how far
            successive layers are from balanced, and the agreement with given matrices. A report
            takes about a tenth longer (with references of wide layers up to twice as long), a step
            not at all.
        keep_matrices: Keep a copy of W and the sums with every report, so that ``report.matrix``
            and matrix pictures work, at about the memory that :meth:`estimate` names.
        max_dim: Layers with more output rows per group than this have K and E measured in a fixed
            random subspace of so many dimensions, and their records say so (a vocabulary head);
            FACT and bFACT are not touched. K and E each hold max_dim² numbers at most.
        max_outputs: Most output coordinates that jacobian="exact" accepts.
        seed: Seed of the random signs.
        process_group: The processes that make one report together, of all their batches, with
            torch.distributed. "auto": those that the model is trained on, DistributedDataParallel's
            or ``fully_shard``'s, else all. Each must be given the same schedule and be attached at
            the same step, for they meet at every report; the first one writes. None: this process
            by itself.
        strict: Raise what goes wrong inside the probe instead of logging and counting it.
        verify_steps: How many steps from :meth:`attach` on are followed closely for :meth:`verify`.
            In them every layer's input is kept and its gradient formed a second time, so that they
            cost up to two more backward passes, and 60 bytes for each weight.

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
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        every: int | Schedule | None = None,
        budget: float | None = None,
        window: int = 4,
        relations: Iterable[str] | str | None = None,
        powers: Iterable[float] | float = (0.5, 1.0),
        include: Selection = None,
        exclude: Selection = None,
        weight_decay: float | Mapping[str, float] | None = None,
        output: Callable[[Any], Any] | None = None,
        jacobian: Literal["exact", "random"] = "random",
        num_probes: int = 1,
        positions: Positions = "expand",
        loss_reduction: Reduction = "mean",
        loss_scale: LossScale = None,
        log_dir: str | os.PathLike[str] | None = None,
        writer: SummaryWriter | None = None,
        sinks: Iterable[Sink] = (),
        initial_weights: Given = None,
        initial_store: Store = "device",
        structure: bool | Structure = False,
        keep_matrices: bool = False,
        max_dim: int = MAX_DIM,
        max_outputs: int = 1024,
        seed: int = 0,
        process_group: GroupChoice = "auto",
        strict: bool = False,
        verify_steps: int = 0,
    ) -> None:
        positive_integer("window", window)
        self.report: Report | None = None
        self.faults = 0
        self._model = unwrap(model)
        self._ranks = Ranks(model, process_group)
        parameters = self._model.parameters()
        device = next((parameter.device for parameter in parameters), torch.device("cpu"))
        self._pace = Pace(every, budget, window, device, self._ranks.of_the_first)
        self._optimizers = parse_optimizers(optimizer)
        self._window_steps = window
        self._keep = keep_matrices
        self._strict = strict
        discovery = Discovery(self._model, include, exclude)
        self._decay = WeightDecay(discovery, self._optimizers, weight_decay)
        chosen = self._decay.default_relations() if relations is None else relations
        asked, wanted = parse_relations(chosen), parse_powers(powers)
        self._settings = ObserverSettings(
            needs=frozenset(needs for relation in asked for needs in relation.sums),
            jacobian=JacobianSettings(jacobian, num_probes, max_outputs),
            output=output,
            positions=positions,
            loss_reduction=loss_reduction,
            max_dim=max_dim,
            seed=seed,
            stream=(self._ranks.rank, self._ranks.count),
        )
        self._self_test = SelfTest(
            verify_steps,
            self._model,
            discovery,
            self._decay,
            self._settings,
            self._ranks,
            wrapper_name(optimizer),
        )
        self._observer = Observer(
            self._model, discovery, self._settings, self._on_hook_fault, entrance=model
        )
        self._collector = Collector(
            discovery.targets,
            self._observer,
            self._optimizers,
            parse_loss_scale(loss_scale),
            gradients="gradient" in self._settings.needs,
            updates="update" in self._settings.needs,
            motion=any(relation.basis == "motion" for relation in asked),
        )
        self._clock = DecayClock(self._optimizers)
        self._watch = StepWatch(self._optimizers, self._before_step, self._advance)
        self._initial_weights = (
            InitialWeights(self._model, initial_weights, initial_store)
            if any(relation.needs_initial_weights for relation in asked)
            else None
        )
        self._initial_network = (
            InitialNetwork(self._model, initial_weights, include, exclude, store=initial_store)
            if any(relation.needs_initial_network for relation in asked)
            else None
        )
        self._observer.recorder.initial = self._initial_network
        self._assembler = Assembler(
            self._model,
            discovery,
            self._observer,
            self._decay,
            asked,
            wanted,
            Doctor(self._decay, self._collector.trajectory, self._clock),
            on_fault=self._on_fault,
            initial_weights=self._initial_weights,
            structuring=Structuring.of(structure, discovery.targets),
        )
        self._discovery = discovery
        self._initial: dict[tuple[str, str], float] = {}
        self._outlets = Outlets(
            log_dir, writer, sinks, self._on_fault, writes=self._ranks.is_writer
        )
        self._configuration = _configuration(discovery.targets, asked, wanted, self._settings)
        self._resumed: Mapping[str, Any] | None = None
        self._unanswered: set[int] = set()
        self._in_window = self._met = False
        #: No step before this one is due, but for those that are over.
        self._none_before = 0
        self._attached = False
        self._fresh = True
        self._stepped: list[torch.optim.Optimizer] = []
        self._validated = False
        self._logged: set[tuple[str, str]] = set()
        self._step = 0

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

    def preflight(self) -> list[str]:
        """How each parameter group's weights decay, and so which form of FACT to read for it.

        Found from what the optimizer does to a small matrix of the probe's own, not from its name.
        A line per group; also in ``report.settings["weight_decay"]``.
        """
        return [line for optimizer in self._optimizers for line in form_note(optimizer)]

    @property
    def is_attached(self) -> bool:
        """Whether the probe is watching."""
        return self._attached

    @property
    def cost(self) -> Cost:
        """What probing has cost in this run so far, as measured; ``print`` it."""
        return self._pace.cost

    def attach(self) -> FeatureProbe:
        """Start watching, with an empty window, or with that of :meth:`load_state_dict`.

        The model's next forward pass is step 0's. Attached again, the probe goes on counting where
        :meth:`detach` left off; steps in between are not counted.

        Raises:
            ConfigurationError: if attached already, or if ``log_dir`` cannot be written. What else
                keeps a sink from opening is a fault, and the probe does without that sink.
        """
        if self._attached:
            raise ConfigurationError("this probe is attached already; detach() it first")
        self._outlets.open(self._step)
        if self._optimizers:
            self._watch.attach()
            logger.info("%s", "; ".join(self.preflight()))
        if self._initial_weights is not None:
            self._initial_weights.take(self._discovery.weights())
        if self._initial_network is not None:
            self._initial_network.take()
        if self._fresh:
            self._clock.start()
            self._fresh = False
        self._attached = True
        self._observer.recorder.attach()
        self._collector.forget_step()
        self._collector.start()
        self._collector.evidence = self._self_test.evidence()
        self._take_up()
        self._pace.start()
        self._arm()
        return self

    def detach(self) -> None:
        """Stop watching: every hook comes off, sinks are closed. Nothing if not attached."""
        if not self._attached:
            return
        self._attached = False
        self._pace.stop()
        if self.report is None:
            logger.warning(
                "the probe made no report: of the steps it saw (%d) none was due%s",
                self._step,
                "" if self._optimizers else " (without optimizer= call probe.step())",
            )
        self._observer.recorder.detach()
        self._watch.detach()
        self._outlets.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to report as if it had not been stopped.

        Plain data and tensors: ``torch.load(..., weights_only=True)`` reads it. Take it between
        two steps, together with the model's and the optimizer's; of a step that has begun, nothing
        is kept. Size: the sums of the window that is open, if one is, and W₀ or the whole
        initial network where it is held. With
        several processes each has its own, and where only one process's is loaded everywhere, the
        sums of the others in that window are left out.
        """
        return {
            "format": FORMAT,
            "configuration": self._configuration,
            "step": self._step,
            "faults": self.faults,
            "report": None if self.report is None else self.report.to_dict(),
            "rank": [self._ranks.rank, self._ranks.count],
            "clock": self._clock.state_dict(),
            "initial": [[*key, cosine] for key, cosine in self._initial.items()],
            "initial_weights": {}
            if self._initial_weights is None
            else self._initial_weights.state_dict(),
            "initial_network": {}
            if self._initial_network is None
            else self._initial_network.state_dict(),
            "collector": self._resumed or self._collector.state_dict(),
            "pace": self._pace.state_dict(),
            "sinks": self._outlets.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: before :meth:`attach`, or between two steps.

        What ``log_dir`` and ``sinks`` hold of later steps, from a run that went on after the
        checkpoint, is superseded. A ``writer`` must be opened with ``purge_step``, the step of the
        state. The schedule, ``budget``, ``window`` and the sinks may be others than before.

        Args:
            state: What ``state_dict()`` returned, of a probe of the same layers and settings.

        Raises:
            ConfigurationError: naming what differs, if the state is of another model or of other
                settings, or is none.
        """
        check_state(state, self._configuration)
        self._step, self._none_before = state["step"], 0
        self.faults = state["faults"]
        self.report = None if state["report"] is None else Report.from_dict(state["report"])
        self._clock.load_state_dict(state["clock"])
        self._fresh = False
        self._initial = {(layer, label): cosine for layer, label, cosine in state["initial"]}
        if self._initial_weights is not None:
            self._initial_weights.load_state_dict(state.get("initial_weights", {}))
        if self._initial_network is not None:
            self._initial_network.load_state_dict(state.get("initial_network", {}))
        self._resumed = state["collector"]
        self._pace.load_state_dict(state.get("pace", {}), self._step)
        if list(state["rank"]) != [self._ranks.rank, self._ranks.count]:
            # another process's sums would be counted twice
            self._resumed = without_sums(state["collector"])
        self._outlets.resume(self._step, state["sinks"])
        if self._attached:
            self._collector.forget_step()
            self._collector.start()
            self._take_up()
            self._arm()

    def _take_up(self) -> None:
        """Go on with the window of the state that was loaded."""
        if self._resumed is not None:
            self._collector.resume(self._resumed)
            self._resumed = None

    def __enter__(self) -> FeatureProbe:
        """Attach, unless it is attached already, as by an integration's ``attach``."""
        return self if self._attached else self.attach()

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
        if self._optimizers:
            raise ConfigurationError(
                "steps are counted from the optimizer; call step() only on a probe without one"
            )
        self._guard("collecting a step", self._collect, None)
        self._advance()

    def verify(
        self,
        batch: Any = None,
        loss_fn: LossFunction | None = None,
        *,
        forward: Forward | None = None,
    ) -> Verification:
        """Whether the probe's bookkeeping fits this loop, from the steps of ``verify_steps``.

        Three sources of each layer's gradient are compared that are not made from one another: what
        its calls delivered (Σ gᵀh), what the optimizer got (``.grad``), and what the optimizer's
        steps say by the identities of :mod:`feature_probe.optimizers.identities`. So a wrong number
        of examples, λ, loss scale, accumulation or number of processes shows. Gradient clipping is
        named, and no failure. What cannot be checked says why.

        Args:
            batch: To be evaluated whole and in two halves, in evaluation mode and without a trace,
                which alone shows whether the loss is a mean or a sum.
            loss_fn: ``loss_fn(output, target) -> scalar`` for a batch ``(input, target)``.
            forward: ``(model, batch) -> (output, loss)`` for batches of any other shape.

        Returns:
            The result; ``print`` it. With several processes each gets the same, but for the loss.

        Raises:
            ConfigurationError: without ``verify_steps``, before the first step has ended, or for a
                batch without a loss. Of several processes all must call this.
        """
        return self._self_test.result(self._collector.evidence, batch, loss_fn, forward)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._guard("collecting a step", self._collect, optimizer)
        if optimizer in self._stepped:
            self._guard("reading the optimizer", self._clock.advance, optimizer)
        else:  # the report at this step's end is of the ages before it
            self._stepped.append(optimizer)

    def _advance(self) -> None:
        if self._collector.evidence is not None:
            self._guard("verifying a step", self._collector.evidence.stepped)
        for optimizer in self._stepped:
            self._guard("reading the optimizer", self._clock.advance, optimizer)
        self._stepped.clear()
        alone = not self._collector.verifying
        self._guard("pacing the reports", self._pace.stepped, self._in_window, alone)
        self._step += 1
        self._guard("asking the schedule", self._arm)

    def _arm(self) -> None:
        """Follow the next step's passes if it is in a window; step 0's are always checked."""
        in_window = self._step == 0 or self._due_from(self._step)
        self._in_window = in_window
        self._collector.expect(in_window=in_window)
        recorder = self._observer.recorder
        if in_window or self._collector.verifying:
            recorder.arm()
        elif recorder.armed:
            recorder.disarm()

    def _collect(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Add the finished step to the window, and report if it is due."""
        if not self._collector.count(optimizer):
            return
        if not self._is_complete(optimizer):
            return
        self._validated = True
        # what a closure evaluates from here on belongs to no step
        self._observer.recorder.disarm()
        skipped = self._collector.steps_not_taken() if self._is_due(self._step) else 0
        self._step -= skipped
        due = self._is_due(self._step) and not (skipped and self._collector.skipped_now())
        if due:
            start, self._met = self._pace.mark(), False
            self._guard("making a report", self._report)
            self._pace.reported(start, self._step, met=self._met)
            self._collector.reported()
        if due or not self._due_from(self._step + 1):
            self._collector.start()

    def _is_complete(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Whether the step has ended. A step that could not be read has: other ranks report it."""
        try:
            return self._collector.ready(optimizer, keep_weights=self._is_due(self._step))
        except Exception as error:
            if self._ranks.count == 1:
                raise
            self._on_fault(error, "collecting a step")
            self._collector.leave_out()
            return not self._optimizers or optimizer is self._optimizers[-1]

    def _due_from(self, step: int) -> bool:
        """Whether one of the steps from ``step`` to the end of a window that begins now is due.

        Each is asked for once, up to the first that is.
        """
        for ahead in range(max(step, self._none_before), self._step + self._window_steps):
            self._none_before = ahead
            if self._is_due(ahead):
                return True
            self._none_before = ahead + 1
        return False

    def _is_due(self, step: int) -> bool:
        """Ask the schedule; where it fails, which is one fault a step, nothing is due."""
        try:
            return self._pace.is_due(step)
        except Exception as error:
            if step not in self._unanswered:
                self._unanswered = {other for other in self._unanswered if other >= self._step}
                self._unanswered.add(step)
                self._on_fault(error, "asking the schedule")
            return False

    def _report(self) -> None:
        own = self._collector.window
        own.settle()
        reduced = self._ranks.reduce(
            own,
            self._assembler.targets,
            self._observer,
            self._step,
            kept=self._collector.weights,
        )
        self._met = True
        window = reduced.window
        settings = {
            "source": "loop",
            "window": window.steps,
            "jacobian": self._settings.jacobian.kind,
            "num_probes": self._settings.jacobian.num_probes,
            "positions": self._settings.positions,
            "loss_reduction": self._settings.loss_reduction,
            "left_out": window.left_out,
            "discarded": window.discarded,
            "faults": self.faults,
            "weight_decay": "; ".join(self.preflight()),
            **self._ranks.settings,
            **self._pace.settings,
        }
        weights = {i: weight for i, weight in enumerate(reduced.weights) if weight is not None}
        report = self._assembler.report(
            window,
            self._step,
            settings,
            keep=self._keep,
            weights=weights,
            depths=reduced.depths,
            initial=self._initial,
        )
        if self._step == 0:
            self._initial = {(r.layer, r.label): r.cosine for r in report.records}
        # with those of making it
        report = replace(report, settings={**settings, "faults": self.faults})
        if self._ranks.is_writer:
            self._outlets.write(report)
            if self.report is None:
                self._tell_gaps(report, reduced.elsewhere)
        self.report = report

    def _tell_gaps(self, report: Report, elsewhere: Sequence[str]) -> None:
        if elsewhere:
            logger.warning(
                "used on other ranks only, so not in the report: %s", ", ".join(elsewhere)
            )
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
        self._collector.spoiled = True
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


def _configuration(
    targets: Sequence[Target],
    relations: Sequence[Relation],
    powers: Sequence[float],
    settings: ObserverSettings,
) -> dict[str, Any]:
    """What a window's sums, and the columns of its report, depend on."""
    return {
        "layers": {t.name: [t.groups, t.d_out, t.d_in] for t in targets},
        "relations": [relation.name for relation in relations],
        "powers": list(powers),
        "jacobian": settings.jacobian.kind,
        "num_probes": settings.jacobian.num_probes,
        "positions": settings.positions,
        "loss_reduction": settings.loss_reduction,
        "max_dim": settings.max_dim,
        "seed": settings.seed,
    }
