"""What the probe should have said of every record of a run, and how what it said compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from feature_probe import Record
from verdict_lab.training import Outcome, Setting, train
from verdict_lab.truth import DECAY, Invariance, balances, chances, is_at_rest, scale_invariance

STAGES = ("early", "window", "learned", "frozen")
NEEDS_WORK = ("not yet", "approaching")


@dataclass(frozen=True)
class Judged:
    """A verdict and what it should have been.

    Attributes:
        run: Name of the run.
        stage: One of :data:`STAGES`.
        layer: Name.
        label: Relation and power.
        verdict: The probe's.
        because: Its reason.
        cosine: Its score.
        residual: Its residual.
        expected: The right verdicts; empty where the truth is open.
        words: Of which the reason must hold one.
    """

    run: str
    stage: str
    layer: str
    label: str
    verdict: str
    because: str
    cosine: float
    residual: float
    expected: tuple[str, ...]
    words: tuple[str, ...] = ("",)

    @property
    def kind(self) -> str:
        """Either "open", "right", "false alarm", "miss", "wrong reason" or "undecided"."""
        if not self.expected:
            return "open"
        if self.verdict in self.expected:
            told = any(word in self.because for word in self.words)
            return "right" if told else "wrong reason"
        if self.verdict in ("holds", "aligned", "not applicable", "trivial"):
            return "false alarm"
        return "miss" if set(self.expected) & {"holds", "aligned"} else "undecided"


Expected = tuple[tuple[str, ...], tuple[str, ...]]
OPEN: Expected = ((), ("",))


def judge_run(setting: Setting) -> list[Judged]:
    """Train a run and hold every verdict to the truth."""
    torch.set_num_threads(1)
    outcome = train(setting)
    expect = _truths(outcome)
    return [
        Judged(
            setting.name, stage, r.layer, r.label, r.verdict, r.because, r.cosine, r.residual,
            *expect(stage, r),
        )
        for stage in STAGES
        for r in outcome.reports[stage].records
    ]  # fmt: skip


def _truths(outcome: Outcome) -> Callable[[str, Record], Expected]:
    """What is expected of any record of a run."""
    setting, data = outcome.setting, outcome.data
    layers = list(outcome.followers["late"].layers)
    invariance = {
        (stage, layer): scale_invariance(stood[-1], data, layer)
        for stage, stood in outcome.networks.items()
        for layer in layers
    }
    balance = balances(outcome.networks["frozen"][-1], data, layers, setting.decay or 1.0)
    chance = {
        stage: chances(outcome.networks[stood], data, layers, (0.5, 1.0))
        for stage, stood in (("learned", "window"), ("frozen", "frozen"))
    }

    def expect(stage: str, record: Record) -> Expected:
        layer = record.layer
        if record.relation in ("nfa", "enfa"):
            if layer == layers[-1] and record.relation == "nfa":
                return ("trivial",), ("multiple of the identity",)
            aligned = chance[stage][layer, record.relation, record.power or 1.0].aligned
            if aligned is None:
                return OPEN
            return (("aligned",) if aligned else ("at chance", "below chance")), ("by chance",)
        form = DECAY[setting.optimizer]
        gradient = record.relation in ("fact", "bfact")
        if layer == setting.frozen:
            return ("not applicable",), ("frozen",)
        if not setting.decay or setting.only not in ("", layer):
            return ("not applicable",), ("no weight decay",)
        if gradient is (form == "decoupled"):
            return ("not applicable",), (f"{form} weight decay",)
        if gradient and invariance[stage, layer] != "none":
            return _invariant(stage, invariance[stage, layer])
        if stage == "frozen":
            b = balance[layer]
            if b.cosine >= 0.95 and b.residual <= 0.15 and b.distance <= 0.2:
                return ("holds",), ("cosine",)
            return OPEN if b.distance < 0.3 else ((*NEEDS_WORK, "cannot tell"), ("balance",))
        rest = is_at_rest(*_motion(outcome, stage, layer, coupled=gradient))
        if rest == "between":
            return OPEN
        return (("holds",), ("off by",)) if rest == "reached" else (NEEDS_WORK, ("of ‖λW‖",))

    return expect


def _invariant(stage: str, kind: Invariance) -> Expected:
    if kind == "partly":
        return OPEN
    verdicts = {
        "frozen": ("cannot tell",),
        "whole": ("not applicable",),
        "nearly": ("not applicable", "cannot tell"),
    }["frozen" if stage == "frozen" else kind]
    return verdicts, ("scale-invarian",)


def _motion(
    outcome: Outcome, stage: str, layer: str, *, coupled: bool
) -> tuple[float, float | None]:
    """Movement of the mean weight per unit of decay age, and balance, after a stage."""
    follower = outcome.followers["early" if stage == "early" else "late"]
    weight, gradient = follower.mean(layer, 0), follower.mean(layer, 1)
    moved = follower.mean(layer, 0, 3) - follower.mean(layer, 0, 0)
    units = 3 * follower.length / outcome.setting.unit
    decay = outcome.setting.decay
    balance = float((decay * weight + gradient).norm() / (decay * weight).norm())
    return float(moved.norm() / weight.norm()) / units, balance if coupled else None
