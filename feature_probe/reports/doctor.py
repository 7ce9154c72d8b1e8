"""Doctor: judges a layer by its premises, its trajectory and the optimizer that moves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from feature_probe.layers.targets import Target
from feature_probe.optimizers.clock import DecayClock
from feature_probe.reports.decay import WeightDecay
from feature_probe.reports.diagnosis import Diagnosis, State
from feature_probe.reports.premises import Circumstances, Premise, premises
from feature_probe.reports.record import Record
from feature_probe.reports.stationarity import Motion, judge, motion, step_scalars
from feature_probe.reports.verdicts import Standing, judged
from feature_probe.sums.trajectory import Path, Trajectory
from feature_probe.sums.window import Window
from feature_probe.theory.invariance import StepScalars, scale_invariance
from feature_probe.theory.matrices import LayerMatrices, to_algebra
from feature_probe.theory.relations import RELATIONS, LayerStatistics, Sum

_NAN = float("nan")
_FROZEN = "frozen weights take no step: the update form is measured in the loop"


@dataclass(frozen=True)
class Doctor:
    """What is needed to judge layers.

    Attributes:
        decay: Where λ comes from, and how it acts.
        trajectory: The layers' paths; None at frozen weights (``measure``).
        clock: Decay ages; None likewise.
    """

    decay: WeightDecay
    trajectory: Trajectory | None = None
    clock: DecayClock | None = None

    @property
    def in_training(self) -> bool:
        """Whether the sums are of a window of a training loop."""
        return self.trajectory is not None

    def update(self, target: Target, weight: Tensor, decay: float | None) -> Tensor | None:
        """U, where the layer's decay is decoupled and the window shows it."""
        if self.decay.form(target) != "decoupled":
            return None
        return self._path(target).update(weight, decay or 0.0)

    def motion(self, target: Target, weight: Tensor) -> tuple[Tensor | None, str]:
        """W − W_t since the window's first step, float64, or None with the reason."""
        if not self.in_training:
            return None, "frozen weights do not move: it is measured in the loop"
        path = self._path(target)
        if path.start is None or path.steps == 0:
            return None, "the path of the weight was not followed (sharded, or no gradient)"
        if path.steps < 2:
            return None, "the weights' motion shows in a window of two steps or more"
        now = to_algebra(weight)
        return now - to_algebra(path.start).to(now.device), ""

    def no_update(self, target: Target) -> str:
        """Why there is no U."""
        if not self.in_training:
            return _FROZEN
        premise = self.decay.update_premise(target)
        if premise:
            return premise
        if self._path(target).steps == 0:
            return "the path of the weight was not followed (sharded, or no gradient)"
        return "an update shows in a window of two steps or more"

    def examine(
        self,
        target: Target,
        statistics: LayerStatistics,
        window: Window,
        known: Circumstances,
    ) -> tuple[dict[Sum, Premise], Diagnosis]:
        """The premises that a layer does not meet, and its diagnosis. Waits for the device."""
        path, form = self._path(target), self.decay.form(target)
        behaviour, decay = self.decay.behaviour(target), statistics.weight_decay
        age, age_note = self._age(target)
        weight = to_algebra(statistics.weight)
        squared_norm = float(weight.square().sum())
        moved = motion(
            path,
            weight,
            squared_norm,
            statistics.gradient,
            decay,
            clock=1.0 if behaviour is None else behaviour.clock,
            age=age,
            momentum=self.decay.momentum(target),
        )
        if window.left_out:  # the path has a gap, on this rank or another
            moved = Motion()
        scalars = step_scalars(path, target.d_in)
        invariance = None if scalars is None else scale_invariance(scalars)
        known = replace(
            known,
            gradient=self.decay.gradient_premise(target),
            update=self.decay.update_premise(target),
            decays=moved.decays,
            invariance=invariance,
            balanced=_NAN if scalars is None or not decay else _balanced(scalars, decay),
        )
        found = premises(known, statistics)
        slope: Sum = "update" if form == "decoupled" else "gradient"
        stationarity = _stationarity(statistics, slope)
        scale = (decay or 0.0) * math.sqrt(squared_norm)
        noise = moved.gradient_noise / scale if slope == "gradient" and scale > 0 else _NAN
        state, because = self._state(
            found.get(slope),
            statistics,
            stationarity,
            noise,
            age,
            moved,
            "U" if slope == "update" else "G",
        )
        if not math.isnan(age):
            path.note(age, squared_norm)
        return found, Diagnosis(
            layer=target.name,
            optimizer=self._optimizer(target),
            decay_form=form,
            weight_decay=_NAN if decay is None else decay,
            decay_age=age,
            decay_age_note=age_note,
            window_age=moved.window_age,
            drift=moved.drift,
            stationarity=stationarity,
            noise=noise,
            decay_ratio=moved.decay_ratio,
            fluctuation=moved.fluctuation,
            norm_drift=moved.norm_drift,
            norm_span=moved.norm_span,
            scale_invariance="unknown" if invariance is None else invariance.kind,
            invariance_statistic=_NAN if invariance is None else invariance.statistic,
            invariance_note=self._unseen if invariance is None else invariance.reason,
            state=state,
            because=because,
        )

    def judge(
        self,
        record: Record,
        diagnosis: Diagnosis,
        found: Mapping[Sum, Premise],
        target: Target,
        initial: Mapping[tuple[str, str], float],
    ) -> Record:
        """The record with its verdict."""
        needs = RELATIONS[record.relation].needs
        record = replace(record, initial_cosine=initial.get((record.layer, record.label), _NAN))
        if needs == "gradient" and self.in_training:
            record = replace(record, decay_ratio=diagnosis.decay_ratio)
        return judged(record, Standing(diagnosis, found.get(needs), target.d_out))

    @property
    def _unseen(self) -> str:
        return "no step was followed" if self.in_training else "seen in the loop only"

    def _path(self, target: Target) -> Path:
        return Path() if self.trajectory is None else self.trajectory.path(target)

    def _optimizer(self, target: Target) -> str:
        holder = self.decay.holder(target)
        return "" if holder is None else type(holder).__name__

    def _age(self, target: Target) -> tuple[float, str]:
        if self.clock is None or target.parameter is None:
            return _NAN, "frozen weights have no history" if self.clock is None else "no parameter"
        return self.clock.age(target.parameter), self.clock.why_unknown(target.parameter)

    def _state(
        self,
        premise: Premise | None,
        statistics: LayerStatistics,
        stationarity: float,
        noise: float,
        age: float,
        moved: Motion,
        letter: str,
    ) -> tuple[State, str]:
        if premise is not None and premise.effect == "not applicable":
            return "not applicable", premise.text
        if statistics.weight_decay is None:
            return "cannot tell", "weight decay not known"
        if statistics.weight_decay == 0:
            return "not applicable", "no weight decay: nothing balances the gradient at rest"
        return judge(stationarity, noise, age, moved, snapshot=not self.in_training, slope=letter)


def _balanced(scalars: StepScalars, decay: float) -> float:
    """−Σ⟨W, G⟩/λΣ‖W‖²."""
    squares = decay * float(scalars.weight.sum())
    return -float(scalars.dot.sum()) / squares if squares > 0 else _NAN


def _stationarity(statistics: LayerStatistics, slope: Sum) -> float:
    if statistics.sum(slope) is None:
        return _NAN
    return LayerMatrices(statistics).stationarity(slope)
