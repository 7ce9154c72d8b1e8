"""From sums to a report: normalise, find out what is missing and why, score every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from feature_probe.layers.refusals import unmeasured_reason
from feature_probe.layers.targets import Discovery, Target
from feature_probe.models import plain_name
from feature_probe.reports.coverage import Coverage, Measured, ParameterCoverage
from feature_probe.reports.decay import WeightDecay
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.doctor import Doctor
from feature_probe.reports.intervals import Parts, with_intervals
from feature_probe.reports.premises import Circumstances, texts
from feature_probe.reports.record import Record
from feature_probe.reports.report import Report
from feature_probe.reports.scoring import (
    LayerFacts,
    OnFault,
    fault_status,
    faulty_layer,
    log_fault,
    score_layer,
)
from feature_probe.reports.structuring import Structuring
from feature_probe.sums.initial import InitialWeights
from feature_probe.sums.observer import Observer
from feature_probe.sums.outer import sum_dtype
from feature_probe.sums.window import Window
from feature_probe.theory.relations import Basis, LayerStatistics, Relation, Sum, clamp_tolerance

NO_GRADIENT = "no gradient reached"
NEVER_CALLED = "the layer was never called, as a module or through its weight"
NEVER_SEEN = (
    "the model itself was never called from plain Python (model(x), not model.forward(x) and not "
    "inside a compiled function; torch.compile(model) itself can be followed)"
)
NEVER_USED = "no product with this weight was seen"
#: Degrees of coverage, the worst last.
_ORDER: tuple[Measured, ...] = ("all", "gradient only", "none")


@dataclass(frozen=True)
class Assembler:
    """Makes reports of what one observer saw.

    Attributes:
        model: The probed module.
        discovery: Its measured layers.
        observer: What was seen and what could not be.
        decay: Where λ comes from.
        relations: The asked relations.
        powers: The asked powers.
        gradient_scale: Factor on the mean gradient: the training batch size where the loss is a
            sum and the mean is over examples, else 1.
        on_fault: Called with what failed and where; may raise it. The report is made without it.
        doctor: Who judges the layers.
        initial_weights: W₀, where a relation asks for it.
        structuring: Finds the structural quantities, where they are asked for.
    """

    model: nn.Module
    discovery: Discovery
    observer: Observer
    decay: WeightDecay
    relations: Sequence[Relation]
    powers: Sequence[float]
    doctor: Doctor
    gradient_scale: float = 1.0
    on_fault: OnFault = log_fault
    initial_weights: InitialWeights | None = None
    structuring: Structuring | None = None

    @property
    def targets(self) -> Sequence[Target]:
        """The measured layers, those found in use included."""
        return self.discovery.targets

    def report(
        self,
        window: Window,
        step: int,
        settings: Mapping[str, Any],
        *,
        keep: bool,
        weights: Mapping[int, Tensor] | None = None,
        depths: Mapping[str, int] | None = None,
        initial: Mapping[tuple[str, str], float] | None = None,
        parts: Parts | None = None,
    ) -> Report:
        """Score every layer.

        Args:
            window: The sums; their tensors become the report's.
            step: Optimizer steps taken before the weights as they stand now.
            settings: What the report says about how it was measured.
            keep: Whether the report holds the matrices, with a copy of the weights.
            weights: Stored weights, by target, to be used in place of those as they stand now.
            depths: Where the layers are a chain: the number of each from the output, by name.
            initial: The cosines at step 0, by layer and label, where they were seen.
            parts: The window in groups, for intervals; None: there are none.
        """
        self.decay.refresh()
        # a matrix that is not measured may lie between the layers
        unseen = self._unseen() if depths else []
        chain = {} if depths is None or unseen else depths
        records: list[Record] = []
        diagnoses: list[Diagnosis] = []
        statistics_by_layer: dict[str, LayerStatistics] = {}
        for index, target in enumerate(self.targets):
            facts = self._facts(index, window, step, chain.get(target.name))
            diagnosis = Diagnosis(target.name)
            try:
                statistics = self._statistics(index, window, keep, weights or {})
                found, diagnosis = self.doctor.examine(
                    target, statistics, window, self._circumstances(index, window)
                )
                facts = replace(facts, premises=texts(found))
                scored = score_layer(facts, statistics, self.relations, self.powers, self.on_fault)
                rest = () if parts is None else parts.left_out(index)
                scored = with_intervals(
                    scored,
                    [self._statistics(index, part, False, weights or {}) for part in rest],
                    parts,
                    index,
                    self.observer.width(index),
                    frozen=not self.doctor.in_training,
                )
                records += [
                    self.doctor.judge(record, diagnosis, found, target, initial or {})
                    for record in scored
                ]
            except Exception as error:  # one layer's failure must not cost the others
                self.on_fault(error, f"scoring layer {target.name!r}")
                records += faulty_layer(facts, error, self.relations, self.powers)
                statistics = self._nothing(target, fault_status(error))
            diagnoses.append(diagnosis)
            statistics_by_layer[target.name] = statistics
        coverage = self._coverage(list(statistics_by_layer.values()))
        structures = (
            ()
            if self.structuring is None
            else self.structuring.layers(
                statistics_by_layer, records, depths or {}, unseen, self.on_fault
            )
        )
        return Report(
            step,
            records,
            coverage,
            settings,
            diagnoses,
            statistics=statistics_by_layer if keep else {},
            structures=structures,
        )

    def _statistics(
        self, index: int, window: Window, copy: bool, weights: Mapping[int, Tensor]
    ) -> LayerStatistics:
        target, moments = self.targets[index], window.layer(index)
        weight = self._weight(index, weights)
        scale = self.gradient_scale * self.decay.sign(target)
        gradient = _mean(moments.gradient, moments.gradient_weight, scale)
        if gradient is not None and self.observer.recorder.reader.uses_parameter(index):
            gradient = target.gradient_matrix(gradient)
        rows: dict[Sum, Tensor] = {
            kind: kept / math.sqrt(window.examples)
            for kind, kept in moments.kept_rows().items()
            if window.examples
        }
        jacobian, loss, change = (
            _mean(t, window.examples)
            for t in (moments.jacobian, moments.loss, moments.jacobian_change)
        )
        if gradient is not None and index not in self.observer.reached and not gradient.any():
            gradient = None  # zeroed in place by the user, never filled
        decay = self.decay.value(target, self._computed(index))
        update = None if window.left_out else self.doctor.update(target, weight, decay)
        dtypes = [t.dtype for t in (gradient, jacobian, loss, change) if t is not None]
        problems = self.observer.problems | window.problems
        bases, no_basis = self._bases(index, weight, bool(window.left_out))
        return LayerStatistics(
            weight=weight.clone() if copy else weight,
            gradient=None if (index, "gradient") in problems else gradient,
            jacobian=None if (index, "jacobian") in problems else jacobian,
            loss=None if (index, "loss") in problems else loss,
            weight_decay=decay,
            tolerance=clamp_tolerance(dtypes[0] if dtypes else sum_dtype(weight.dtype)),
            missing=self._missing(index, window),
            update=update,
            jacobian_change=None if (index, "jacobian_change") in problems else change,
            bases=bases,
            no_basis=no_basis,
            rows=rows,
            subspace=self.observer.subspace(index),
        )

    def _bases(
        self, index: int, weight: Tensor, gap: bool
    ) -> tuple[dict[Basis, Tensor], dict[Basis, str]]:
        """What is asked to take the place of W, and why it cannot; ``gap``: steps were left out."""
        target, initial = self.targets[index], self.initial_weights
        found: dict[Basis, tuple[Tensor | None, str]] = {}
        asked = {relation.basis for relation in self.relations}
        if self._computed(index):
            reason = "the weight is computed from other parameters"
            found |= {"change": (None, f"W₀ is not known: {reason}")}
            found |= {"initial": found["change"], "motion": (None, f"its path is not: {reason}")}
        else:
            if "change" in asked and initial is not None:
                found["change"] = initial.change(target, weight)
            if "initial" in asked and initial is not None:
                found["initial"] = initial.matrix(target)
            if "motion" in asked:
                found["motion"] = self.doctor.motion(target, weight)
                if gap:
                    found["motion"] = None, "the window has a gap: steps were left out"
        bases = {basis: matrix for basis, (matrix, _) in found.items() if matrix is not None}
        return bases, {basis: reason for basis, (_, reason) in found.items() if reason}

    def _nothing(self, target: Target, reason: str) -> LayerStatistics:
        return LayerStatistics(
            weight=torch.full((target.groups, target.d_out, target.d_in), float("nan")),
            gradient=None,
            jacobian=None,
            loss=None,
            weight_decay=None,
            tolerance=0.0,
            missing=dict.fromkeys(get_args(Sum), reason),
        )

    def _weight(self, index: int, weights: Mapping[int, Tensor]) -> Tensor:
        target = self.targets[index]
        used = self.observer.recorder.reader.weights.get(index, target.parameter)
        weight = weights.get(index, used)
        if weight is None:  # computed by the layer, which never ran
            return torch.full((target.groups, target.d_out, target.d_in), float("nan"))
        return target.matrix(weight.detach())

    def _frozen(self, index: int) -> bool:
        parameter = self.targets[index].parameter
        return parameter is not None and not parameter.requires_grad

    def _computed(self, index: int) -> bool:
        target, weights = self.targets[index], self.observer.recorder.reader.weights
        if target.parameter is None:
            return True
        return index in weights and weights[index] is not target.parameter

    def _missing(self, index: int, window: Window) -> dict[Sum, str]:
        """Why each absent sum is absent."""
        recorder, problems = self.observer.recorder, self.observer.problems | window.problems
        if window.left_out and window.examples == 0:
            general = "left out after a fault in the probe (see the log)"
        elif index in recorder.reader.problems:
            general = recorder.reader.problems[index]
        elif not recorder.reader.fired:
            general = NEVER_SEEN
        elif index not in recorder.reader.fired:
            general = NEVER_USED if self.targets[index].functional else NEVER_CALLED
            general = self._not_followed(self.targets[index].parameter) or general
        elif index not in self.observer.reached and self._frozen(index):
            general = f"{NO_GRADIENT}: frozen, like all below it (measure() can see it)"
        else:
            general = NO_GRADIENT
        missing: dict[Sum, str] = {}
        asked = {needs for relation in self.relations for needs in relation.sums}
        for needs in get_args(Sum):
            if needs not in asked:
                missing[needs] = "not asked for"
            elif needs == "update":
                missing[needs] = self.doctor.no_update(self.targets[index])
            elif (index, needs) in problems:
                missing[needs] = problems[index, needs]
            elif needs == "gradient" and general in (NEVER_CALLED, NEVER_USED):
                missing[needs] = f"{NO_GRADIENT}; {general}"
            else:
                missing[needs] = general
        return missing

    def _facts(self, index: int, window: Window, step: int, depth: int | None) -> LayerFacts:
        return LayerFacts(
            self.targets[index].name,
            step,
            window.examples,
            window.layer(index).rows,
            form="window" if self.doctor.in_training else "snapshot",
            depth=depth,
        )

    def _circumstances(self, index: int, window: Window) -> Circumstances:
        target = self.targets[index]
        users = [other for other in self.targets if other.parameter is target.parameter]
        parts = {other.part for other in users}
        return Circumstances(
            computed=self._computed(index),
            frozen=self._frozen(index),
            output=index in self.observer.output_layers,
            shared=bool(target.aliases)
            or index in self.observer.repeated
            or (target.parameter is not None and len(users) > len(parts)),
            rows=target.groups * target.d_out,
            sampling=self.observer.sampling_error(self.observer.width(index), window.examples),
        )

    def _unseen(self) -> list[str]:
        """Matrix parameters of which nothing is measured."""
        measured = {id(p) for target in self.targets for p in weight_parameters(target)}
        return [
            plain_name(name)
            for name, p in self.model.named_parameters()
            if p.dim() > 1 and id(p) not in measured and not self._is_vector(p)
        ]

    def _coverage(self, statistics: Sequence[LayerStatistics]) -> Coverage:
        measured_by: dict[int, list[int]] = {}
        for index, target in enumerate(self.targets):
            for parameter in weight_parameters(target):
                measured_by.setdefault(id(parameter), []).append(index)
        entries = []
        for name, parameter in self.model.named_parameters():
            shown, indices = plain_name(name), measured_by.get(id(parameter))
            if parameter.dim() < 2 or (indices is None and self._is_vector(parameter)):
                continue
            size = parameter.numel()
            if indices is None:
                entry = ParameterCoverage(shown, size, None, "none", self._unmeasured(name))
            else:
                layers = ", ".join(self.targets[index].name for index in indices)
                degrees = [self._degree(statistics[index]) for index in indices]
                worst = max(degrees, key=lambda degree: _ORDER.index(degree[0]))
                entry = ParameterCoverage(shown, size, layers, *worst)
            entries.append(entry)
        return Coverage(tuple(entries))

    def _degree(self, statistics: LayerStatistics) -> tuple[Measured, str]:
        asked = dict.fromkeys(
            needs for r in self.relations for needs in sorted(r.sums) if needs != "update"
        )
        absent = [needs for needs in asked if statistics.sum(needs) is None]
        if not absent:
            return "all", ""
        reason = statistics.missing.get(absent[-1], NO_GRADIENT)
        partial = "gradient" in asked and "gradient" not in absent
        return ("gradient only" if partial else "none"), reason

    def _unmeasured(self, name: str) -> str:
        parameter = self.model.get_parameter(name)
        if self.discovery.is_left_out(parameter):
            return "left out by include/exclude"
        owner = self.model.get_submodule(name.rpartition(".")[0])
        use = self._not_followed(parameter)
        return f"{type(owner).__name__}: {use}" if use else unmeasured_reason(owner)

    def _not_followed(self, parameter: nn.Parameter | None) -> str:
        """In which product a weight was used that is not followed, or ""."""
        functions = "" if parameter is None else self.discovery.not_followed(parameter)
        return f"used in {functions}, in a form that is not followed" if functions else ""

    def _is_vector(self, parameter: nn.Parameter) -> bool:
        """Whether it is a matrix in shape only (a token, a scale per channel), and no layer's."""
        alone = parameter.numel() == max(parameter.shape)
        return alone and not self.discovery.is_left_out(parameter)


def weight_parameters(target: Target) -> list[nn.Parameter]:
    """The parameters a layer's weight is made of: its own, and those of its parametrizations."""
    if target.functional:
        return [] if target.parameter is None else [target.parameter]
    held: list[nn.Parameter] = []
    for module in target.modules:
        held += module.parameters(recurse=False)
        parametrizations = getattr(module, "parametrizations", None)
        if isinstance(parametrizations, nn.Module):
            held += parametrizations.parameters()
    return list({id(parameter): parameter for parameter in held}.values())


def _mean(total: Tensor | None, count: float, scale: float = 1.0) -> Tensor | None:
    if total is None or count == 0:
        return None
    return total * (scale / count)
