"""SelfTest: what ``FeatureProbe.verify`` does. It wires the self-test's parts together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from feature_probe.capture.evaluation import Forward, LossFunction, runner
from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.layers.targets import Discovery
from feature_probe.processes.ranks import Ranks
from feature_probe.processes.verification import averaged
from feature_probe.reports.decay import WeightDecay
from feature_probe.reports.judgement import Setting, broken, judge
from feature_probe.reports.loss_reduction import judge_loss
from feature_probe.reports.verification import Check, Verification
from feature_probe.sums.halving import Run, halve
from feature_probe.sums.observer import ObserverSettings
from feature_probe.sums.verification import Evidence


@dataclass(frozen=True)
class SelfTest:
    """What the self-test of one probe needs.

    Attributes:
        steps: How many steps are followed for it; 0: none.
        model: The probed module.
        discovery: Its layers.
        decay: Where λ comes from.
        settings: By which conventions the probe sums.
        ranks: The processes that report together.
        wrapper: Class of what the optimizer was given inside, or "".

    Raises:
        ConfigurationError: if ``steps`` counts nothing.
    """

    steps: int
    model: nn.Module
    discovery: Discovery
    decay: WeightDecay
    settings: ObserverSettings
    ranks: Ranks
    wrapper: str

    def __post_init__(self) -> None:
        given: object = self.steps
        if given is False or given != 0:
            positive_integer("verify_steps", given)

    def evidence(self) -> Evidence | None:
        """A place for the first steps' evidence; None if there is to be no self-test."""
        if not self.steps:
            return None
        return Evidence(self.model, self.discovery, self.settings.loss_reduction, self.steps)

    def result(
        self,
        evidence: Evidence | None,
        batch: Any,
        loss_fn: LossFunction | None,
        forward: Forward | None,
    ) -> Verification:
        """See :meth:`feature_probe.FeatureProbe.verify`.

        Raises:
            ConfigurationError: as there.
        """
        if evidence is None:
            raise ConfigurationError(
                "verify() compares what the first steps showed: give verify_steps=20, say, to "
                "FeatureProbe before it is attached"
            )
        if batch is not None and loss_fn is None and forward is None:
            raise ConfigurationError("verify(batch=...) needs the loss: give loss_fn= or forward=")
        run = runner(loss_fn, forward, loss_needed=False)
        if not evidence.steps and evidence.fault is None:
            raise ConfigurationError(
                "verify() needs a training step: none has ended since the probe was attached"
            )
        checks = judge(averaged(evidence.layers, self.ranks.group), self._setting())
        if evidence.fault is not None:
            checks.append(broken(evidence.fault))
        if batch is not None:
            checks += self._halved(batch, run)
        return Verification(tuple(checks), evidence.steps)

    def _setting(self) -> Setting:
        self.decay.refresh()
        elsewhere = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Setting(
            ranks=self.ranks.count,
            alone="process_group=None: the other processes' part of the gradient is not seen"
            if elsewhere and self.ranks.count == 1
            else "",
            wrapper=self.wrapper,
            decays={t.name: self.decay.value(t, computed=True) for t in self.discovery.targets},
            own={t.name: self.decay.own_value(t) for t in self.discovery.targets},
        )

    def _halved(self, batch: Any, run: Run) -> list[Check]:
        """The checks of the loss on one batch; not made where the user's code raises."""
        try:
            halves = halve(self.model, batch, run, self.settings.output)
        except ConfigurationError:
            raise
        except Exception as error:
            return [Check("loss", "", None, message=f"{type(error).__name__}: {error}")]
        return judge_loss(halves, self.settings.loss_reduction)
