"""From sums to a report: normalise, find out what is missing and why, score every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from feature_probe.coverage import Coverage, Measured, ParameterCoverage
from feature_probe.decay import WeightDecay
from feature_probe.layers import find_rule
from feature_probe.moments import sum_dtype
from feature_probe.observer import Observer, Window
from feature_probe.relations import LayerStatistics, Relation, Sum, clamp_tolerance
from feature_probe.report import Record, Report
from feature_probe.scoring import LayerFacts, score_layer
from feature_probe.targets import Target

NO_GRADIENT = "no gradient reached"
NEVER_CALLED = "the layer was never called as a module"
#: K within this relative distance of a multiple of the identity makes every NFA score a property
#: of the weight alone.
_TRIVIAL = 1e-6


@dataclass(frozen=True)
class Assembler:
    """Makes reports of what one observer saw.

    Attributes:
        model: The probed module.
        targets: Its measured layers.
        observer: What was seen and what could not be.
        decay: Where λ comes from.
        relations: The asked relations.
        powers: The asked powers.
        gradient_scale: Factor on the mean gradient: the training batch size where the loss is a
            sum and the mean is over examples, else 1.
    """

    model: nn.Module
    targets: Sequence[Target]
    observer: Observer
    decay: WeightDecay
    relations: Sequence[Relation]
    powers: Sequence[float]
    gradient_scale: float = 1.0

    def report(
        self, window: Window, step: int, settings: Mapping[str, Any], *, keep: bool
    ) -> Report:
        """Score every layer.

        Args:
            window: The sums; their tensors become the report's.
            step: Optimizer steps taken before the weights as they stand now.
            settings: What the report says about how it was measured.
            keep: Whether the report holds the matrices, with a copy of the weights.
        """
        records: list[Record] = []
        statistics_by_layer: dict[str, LayerStatistics] = {}
        for index, target in enumerate(self.targets):
            statistics = self._statistics(index, window, keep)
            facts = LayerFacts(
                layer=target.name,
                step=step,
                examples=window.examples,
                rows=window.layers[index].rows,
                premises=self._premises(index, statistics),
            )
            records += score_layer(facts, statistics, self.relations, self.powers)
            statistics_by_layer[target.name] = statistics
        coverage = self._coverage(list(statistics_by_layer.values()))
        return Report(step, records, coverage, settings, statistics_by_layer if keep else {})

    def _statistics(self, index: int, window: Window, copy: bool) -> LayerStatistics:
        target, moments = self.targets[index], window.layers[index]
        weight = self._weight(index)
        scale = self.gradient_scale * self.decay.sign(target)
        gradient = _mean(moments.gradient, moments.gradient_weight, scale)
        jacobian, loss = (_mean(t, window.examples) for t in (moments.jacobian, moments.loss))
        if gradient is not None and index not in self.observer.reached and not gradient.any():
            gradient = None  # zeroed in place by the user, never filled
        dtypes = [t.dtype for t in (gradient, jacobian, loss) if t is not None]
        problems = self.observer.problems
        return LayerStatistics(
            weight=weight.clone() if copy else weight,
            gradient=None if (index, "gradient") in problems else gradient,
            jacobian=None if (index, "jacobian") in problems else jacobian,
            loss=None if (index, "loss") in problems else loss,
            weight_decay=self.decay.value(target, self._computed(index)),
            tolerance=clamp_tolerance(dtypes[0] if dtypes else sum_dtype(weight.dtype)),
            missing=self._missing(index, window),
        )

    def _weight(self, index: int) -> Tensor:
        target = self.targets[index]
        weight = self.observer.recorder.weights.get(index, target.parameter)
        if weight is None:  # computed by the layer, which never ran
            return torch.full((target.groups, target.d_out, target.d_in), float("nan"))
        return target.rule.matrix(target.module, weight.detach())

    def _frozen(self, index: int) -> bool:
        parameter = self.targets[index].parameter
        return parameter is not None and not parameter.requires_grad

    def _computed(self, index: int) -> bool:
        target, weights = self.targets[index], self.observer.recorder.weights
        if target.parameter is None:
            return True
        return index in weights and weights[index] is not target.parameter

    def _missing(self, index: int, window: Window) -> dict[Sum, str]:
        """Why each absent sum is absent."""
        recorder, problems = self.observer.recorder, self.observer.problems
        if window.left_out and window.examples == 0:
            general = "left out after a fault in the probe (see the log)"
        elif index in recorder.problems:
            general = recorder.problems[index]
        elif not recorder.fired:
            general = "the model itself was never called (model(x), not model.forward(x))"
        elif index not in recorder.fired:
            general = NEVER_CALLED
        elif index not in self.observer.reached and self._frozen(index):
            general = f"{NO_GRADIENT}: frozen, like all below it (measure() can see it)"
        else:
            general = NO_GRADIENT
        missing: dict[Sum, str] = {}
        asked = {relation.needs for relation in self.relations}
        for needs in ("gradient", "jacobian", "loss"):
            if needs not in asked:
                missing[needs] = "not asked for"
            elif (index, needs) in problems:
                missing[needs] = problems[index, needs]
            elif needs == "gradient" and general == NEVER_CALLED:
                missing[needs] = f"{NO_GRADIENT}; {NEVER_CALLED}"
            else:
                missing[needs] = general
        return missing

    def _premises(self, index: int, statistics: LayerStatistics) -> dict[str, str]:
        target = self.targets[index]
        premises = {}
        decay = self.decay.premise(target, self._computed(index))
        if decay:
            premises["gradient"] = decay
        if target.groups == target.d_out == 1:
            premises["jacobian"] = premises["loss"] = (
                "trivial: with one output row any gradients give a full forward score"
            )
        elif index in self.observer.output_layers or _is_multiple_of_identity(statistics.jacobian):
            premises["jacobian"] = (
                "trivial: K is a multiple of the identity (last linear layer), so the score is a "
                "property of the weight alone"
            )
        return premises

    def _coverage(self, statistics: Sequence[LayerStatistics]) -> Coverage:
        measured_by = {
            id(parameter): index
            for index, target in enumerate(self.targets)
            for module in target.modules
            for parameter in weight_parameters(module)
        }
        entries = []
        for name, parameter in self.model.named_parameters():
            if parameter.dim() < 2:
                continue
            index = measured_by.get(id(parameter))
            size = parameter.numel()
            if index is None:
                entry = ParameterCoverage(name, size, None, "none", self._unmeasured(name))
            else:
                layer = self.targets[index].name
                entry = ParameterCoverage(name, size, layer, *self._degree(statistics[index]))
            entries.append(entry)
        return Coverage(tuple(entries))

    def _degree(self, statistics: LayerStatistics) -> tuple[Measured, str]:
        asked = dict.fromkeys(relation.needs for relation in self.relations)
        absent = [needs for needs in asked if statistics.sum(needs) is None]
        if not absent:
            return "all", ""
        reason = statistics.missing.get(absent[-1], NO_GRADIENT)
        partial = "gradient" in asked and "gradient" not in absent
        return ("gradient only" if partial else "none"), reason

    def _unmeasured(self, parameter: str) -> str:
        owner = self.model.get_submodule(parameter.rpartition(".")[0])
        if find_rule(owner) is not None:
            return "left out by include/exclude"
        return f"{type(owner).__name__} is no layer type the probe measures"


def weight_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters a layer's weight is made of: its own, and those of its parametrizations."""
    held = list(module.parameters(recurse=False))
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.Module):
        held += list(parametrizations.parameters())
    return held


def _mean(total: Tensor | None, count: float, scale: float = 1.0) -> Tensor | None:
    if total is None or count == 0:
        return None
    return total * (scale / count)


def _is_multiple_of_identity(matrix: Tensor | None) -> bool:
    if matrix is None or matrix.shape[-1] < 2:
        return False
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    gap = torch.linalg.vector_norm(matrix - mean[:, None, None] * identity)
    return bool(gap <= _TRIVIAL * torch.linalg.vector_norm(matrix))
