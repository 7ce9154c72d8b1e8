"""What the probe should have said of every record of a run, and how what it said compares."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from feature_probe import Record
from verdict_lab.training import Outcome, Setting, train
from verdict_lab.truth import (
    DECAY,
    Balance,
    Chance,
    Invariance,
    Rest,
    Window,
    balances,
    chances,
    is_at_rest,
    scale_invariance,
)

STAGES = ("early", "window", "learned", "frozen")
NEEDS_WORK = ("not yet", "approaching")
#: Examples per output row below which a score that is not above chance may be biased low.
ENOUGH = 10
#: |Change of ln ‖W‖| per unit of decay age up to which a weight only turns, and the same before the
#: stage, up to which it was at rest already.
STEADY, GROWING = 0.2, 0.07
#: Followed steps from which on scale invariance is to be found.
SEEN = 8
#: ‖λW + G‖/‖λW‖ of the full gradient up to which frozen weights are at rest.
AT_REST = 0.2


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
        long: The same score over two units of decay age at rest, by brute force; NaN elsewhere.
        at_rest: Whether brute force finds the layer at rest; False where there is no such thing.
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
    long: float = float("nan")
    at_rest: bool = False

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


@dataclass(frozen=True)
class Truth:
    """All that brute force says of one run.

    Attributes:
        setting: The run's.
        layers: Names, in order.
        rows: Output rows by layer.
        invariance: By stage and layer.
        balance: At frozen weights, by layer.
        chance: By stage, layer, relation and power.
        windows: What the windows of the stages hold, by stage and layer; "long" is that of two
            units of decay age after the second.
        motion: ‖change of the mean weight‖/‖W‖ per unit of decay age after a stage,
            ‖λW + G‖/‖λW‖ of the means, and |change of ln ‖W‖| per unit, by stage and layer.
        growth_before: The last of these in the unit of decay age before the second stage, by layer.
    """

    setting: Setting
    layers: list[str]
    rows: dict[str, int]
    invariance: dict[tuple[str, str], Invariance]
    balance: dict[str, Balance]
    chance: dict[tuple[str, str, str, float], Chance]
    windows: dict[tuple[str, str], Window]
    motion: dict[tuple[str, str], tuple[float, float, float]]
    growth_before: dict[str, float]

    @classmethod
    def of(cls, outcome: Outcome) -> Truth:
        """Work it out."""
        setting, data, networks = outcome.setting, outcome.data, outcome.networks
        weights = outcome.followers["late"].layers
        layers = list(weights)
        trained, untrained = networks["frozen"].eval(), networks["untrained"]
        windows = {
            (stage, layer): _window(outcome, name, layer, setting.decay or 1.0)
            for stage, name in (
                ("early", "early window"), ("window", "window"), ("long", "late"),
            )
            for layer in layers
        }  # fmt: skip
        decay = setting.decay or 1.0
        return cls(
            setting,
            layers,
            {layer: len(weight) for layer, weight in weights.items()},
            {
                (stage, layer): scale_invariance(
                    networks[stage], data, layer,
                    0.0 if stage == "frozen" else windows[stage, layer].balanced,
                )
                for stage in ("early", "window", "frozen")
                for layer in layers
            },
            balances(trained, data, layers, decay),
            {
                (stage, *key): chance
                for stage, states, first in (
                    ("learned", outcome.states, untrained),
                    ("frozen", [(trained, *data)], copy.deepcopy(untrained).eval()),
                )
                for key, chance in chances(states, layers, (0.5, 1.0), (first, *data)).items()
            },
            windows,
            {
                (stage, layer): _motion(outcome, stage, layer, decay)
                for stage in ("early", "window")
                for layer in layers
            },
            {layer: _growth(outcome, "before", layer) for layer in layers},
        )  # fmt: skip

    @cached_property
    def form(self) -> str:
        """How decay acts."""
        return DECAY[self.setting.optimizer]

    def expect(self, stage: str, record: Record) -> Expected:
        """The right verdicts on a record, and words of the right reasons."""
        layer, setting = record.layer, self.setting
        if record.relation in ("nfa", "enfa"):
            return self._alignment(stage, record)
        gradient = record.relation in ("fact", "bfact")
        if layer == setting.frozen:
            return ("not applicable",), ("frozen",)
        if not setting.decay or setting.only not in ("", layer):
            return ("not applicable",), ("no weight decay",)
        if gradient is (self.form == "decoupled"):
            return ("not applicable",), (f"{self.form} weight decay",)
        if not gradient and stage != "frozen" and setting.window == 1:
            return ("undefined",), ("two steps or more",)
        if gradient and self.invariance[stage, layer] != "none":
            if stage != "frozen" and self.setting.followed(stage) < SEEN:
                return (*NEEDS_WORK, "cannot tell"), ("of ‖λW‖",)
            return _invariant(stage, self.invariance[stage, layer])
        if stage == "frozen":
            b = self.balance[layer]
            if b.cosine >= 0.95 and b.residual <= 0.15 and b.distance <= AT_REST:
                return ("holds",), ("cosine",)
            return OPEN if b.distance < 0.3 else ((*NEEDS_WORK, "cannot tell"), ("balance",))
        return self._rest(stage, record)

    def long(self, stage: str, record: Record) -> float:
        """The score over two units of decay age."""
        cosines = self.windows["long", record.layer].cosines
        return cosines.get(record.label, float("nan")) if stage == "window" else float("nan")

    def at_rest(self, stage: str, record: Record) -> bool:
        """Whether further training, or at frozen weights the full gradient, finds it at rest."""
        if stage == "frozen":
            return self.balance[record.layer].distance <= AT_REST
        return stage == "window" and self._rest_of(stage, record) == "reached"

    def _rest_of(self, stage: str, record: Record) -> Rest:
        movement, balance, _ = self.motion[stage, record.layer]
        coupled = record.relation in ("fact", "bfact")
        return is_at_rest(movement, balance if coupled else None)

    def _alignment(self, stage: str, record: Record) -> Expected:
        if record.layer == self.layers[-1] and record.relation == "nfa":
            return ("trivial",), ("multiple of the identity",)
        chance = self.chance[stage, record.layer, record.relation, record.power or 1.0]
        if chance.aligned is None:
            return OPEN
        if chance.aligned:
            return ("aligned",), ("by chance",)
        if record.n_examples < ENOUGH * self.rows[record.layer]:
            return ("at chance", "below chance", "cannot tell"), ("by chance",)
        return ("at chance", "below chance"), ("by chance",)

    def _rest(self, stage: str, record: Record) -> Expected:
        window, label = self.windows[stage, record.layer], record.label
        rest = self._rest_of(stage, record)
        if rest == "between" or (rest == "reached" and self.growth_before[record.layer] > GROWING):
            return OPEN
        if rest == "not reached":
            if self.setting.unaged and not window.distance > 2 * window.noise:
                return (*NEEDS_WORK, "cannot tell"), ("of ‖λW‖",)
            if stage == "window" and self.motion[stage, record.layer][2] <= STEADY:
                return (*NEEDS_WORK, "cannot tell"), ("of ‖λW‖",)  # it turns at one size
            return NEEDS_WORK, ("of ‖λW‖",)
        if window.cosines[label] >= 0.96 and window.residuals[label] <= 0.13:
            return ("holds",), ("off by",)
        if window.residuals[label] > 0.17:
            return ("cannot tell",), ("longer window", "minibatch noise")
        return OPEN


def judge_run(setting: Setting) -> list[Judged]:
    """Train a run and hold every verdict to the truth."""
    torch.set_num_threads(1)
    outcome = train(setting)
    truth = Truth.of(outcome)
    return [
        judge(truth, stage, record) for stage in STAGES for record in outcome.reports[stage].records
    ]


def judge(truth: Truth, stage: str, r: Record) -> Judged:
    """Hold one verdict to the truth."""
    return Judged(
        truth.setting.name, stage, r.layer, r.label, r.verdict, r.because, r.cosine, r.residual,
        *truth.expect(stage, r), truth.long(stage, r), truth.at_rest(stage, r),
    )  # fmt: skip


def _invariant(stage: str, kind: Invariance) -> Expected:
    if kind == "partly":
        return OPEN
    verdicts = {
        "frozen": ("cannot tell",),
        "whole": ("not applicable",),
        "nearly": ("not applicable", "cannot tell"),
    }["frozen" if stage == "frozen" else kind]
    return verdicts, ("scale-invarian",)


def _motion(outcome: Outcome, stage: str, layer: str, decay: float) -> tuple[float, float, float]:
    """Movement of the mean weight per unit of decay age, balance, and growth, after a stage."""
    name = "early" if stage == "early" else "late"
    follower = outcome.followers[name]
    weight, gradient = follower.mean_weight(layer), follower.slope(layer, update=False)
    moved = follower.mean_weight(layer, 3) - follower.mean_weight(layer, 0)
    balance = float((decay * weight + gradient).norm() / (decay * weight).norm())
    moved_by = float(moved.norm() / weight.norm()) / _units(outcome, name)
    return moved_by, balance, _growth(outcome, name, layer)


def _growth(outcome: Outcome, name: str, layer: str) -> float:
    """|Change of ln ‖W‖| per unit of decay age, from the first quarter to the last."""
    first, last = (outcome.followers[name].segments[i].norms[layer] for i in (0, 3))
    return abs(math.log(last / first)) / 2 / _units(outcome, name) if first and last else math.nan


def _units(outcome: Outcome, name: str) -> float:
    """Decay age from the first quarter to the last of what a follower saw."""
    follower = outcome.followers[name]
    rate = follower.rates / follower.steps / outcome.setting.lr
    return 3 * follower.length * rate / outcome.setting.unit


def _window(outcome: Outcome, name: str, layer: str, decay: float) -> Window:
    """Of the last weight of a window; of the mean one where the window is long."""
    follower = outcome.followers[name]
    update = DECAY[outcome.setting.optimizer] == "decoupled"
    last = follower.segments[-1].latest[layer]
    return Window.of(
        follower.mean_weight(layer) if name == "late" else last,
        follower.slope(layer, update=update),
        follower.mean_square(layer),
        follower.balanced(layer),
        follower.steps,
        decay,
        "update_" if update else "",
    )
