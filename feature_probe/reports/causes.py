"""Causes: why a verdict says little, in plain words, and what can be done about it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.record import Record
from feature_probe.theory.relations import RELATIONS

#: Verdicts that say something of the layer, as opposed to why nothing is said.
FINDINGS = ("holds", "approaching", "aligned", "at chance", "below chance")
#: Decay age from which the initial weight counts as forgotten: e⁻³ is 5 % of it.
RIPE = 3.0
_LONGEST = 25
#: A run that would have to be this many times longer should rather be run otherwise, where it is
#: not shorter than this many steps.
_FAR, _SHORT = 20, 1000
#: What a text speaks of, the first that fits; the rest is quoted.
_MARKS: tuple[tuple[str, str], ...] = (
    ("fault", r"\bfault\b"),
    ("infinite", r"not finite"),
    ("trivial", r"^trivial\b"),
    ("loop only", r"measured in the loop"),
    ("unseen", r"frozen weights do not show"),
    ("computed", r"computed from other parameters"),
    ("frozen", r"\bfrozen\b(?! weights)"),
    ("invariant", r"\bpartly\b.* FACT cannot hold"),
    ("partly", r"\bpartly\b"),
    ("invariant", r"scale-invarian"),
    ("given", r"λ was given"),
    ("changed", r"changed inside the window"),
    ("decoupled", r"\bdecoupled\b"),
    ("coupled", r"\bcoupled\b"),
    ("no decay", r"no weight decay|λ = 0"),
    ("unknown decay", r"weight decay not known"),
    ("unheld", r"not held by the optimizer"),
    ("too large", r"\bmax_dim\b"),
    ("biased", r"\bbias|below rank"),
    ("underflow", r"underflow"),
    ("shared", r"used in several places"),
    ("untrained", r"networks without training|at initialisation$"),
    ("noise", r"\bnoise\b|longer window"),
    ("no interval", r"no interval|^clipped"),
    ("random", r"random ([Jj]acobian|probe)"),
    ("unused", r"never called|no product with this weight"),
    ("no gradient", r"no gradient"),
)
#: What symbols stand for where a text is quoted.
_PLAIN: tuple[tuple[str, str], ...] = (
    (r"^cannot tell: ", ""),
    (r"‖λW \+ G‖ is ([\d.e+-]+) of ‖λW‖", r"gradient and decay differ by \1 times the decay"),
    (r"‖WᵀW‖", "the weight's own matrix"),
    (r"‖W‖", "the size of the weight"),
    (r"λ", "weight decay"),
    (r"\b[Nn]a[Nn]\b", "undefined"),
    (r"\s+", " "),
    (r"\.{2,}|…", " …"),
    (r"[.!?]+(\s|$)", r";\1"),
)


@dataclass(frozen=True)
class Situation:
    """All that a report says of one layer."""

    records: Sequence[Record]
    diagnosis: Diagnosis
    settings: Mapping[str, object]
    step: int

    @property
    def in_loop(self) -> bool:
        """Whether it was measured in a training loop, and not at frozen weights."""
        return self.settings.get("source") != "measure"

    def asked(self, *relations: str) -> list[Record]:
        """The records of some relations."""
        return [record for record in self.records if record.relation in relations]


@dataclass(frozen=True)
class Reason:
    """Why a verdict says little.

    Attributes:
        cause: Which kind of reason, the key of what can be done; "other" where it is quoted.
        words: What follows "because".
    """

    cause: str
    words: str


def reason_of(record: Record, situation: Situation) -> Reason:
    """Why a record's verdict says little."""
    if record.verdict == "trivial":
        return _trivial(record.because or record.premise)
    if record.verdict == "not yet":
        return _unripe(record, situation)
    status = "" if record.status == "ok" else record.status
    return reason_in(record.because or record.premise or status, record, situation)


def reason_in(text: str, record: Record, situation: Situation) -> Reason:
    """The reason that a text gives, or where it is empty what is known of the layer."""
    cause = next((cause for cause, mark in _MARKS if re.search(mark, text)), "other")
    if not text:
        cause = _known_cause(record, situation.diagnosis)
    if cause == "trivial":
        return _trivial(text)
    quoted = plain(text) or {
        "not applicable": "what it presupposes is not given",
        "cannot tell": "the data do not say",
    }.get(record.verdict, "there is no number")
    return Reason(cause, _words(cause, record, situation) or quoted)


def plain(text: str) -> str:
    """A text as a part of a sentence: no full stop, no symbols where words will do, not long."""
    for symbol, word in _PLAIN:
        text = re.sub(symbol, word, text)
    words = text.strip(" ;,").split()
    return " ".join(words) if len(words) <= _LONGEST else " ".join([*words[:_LONGEST], "…"])


def number(value: float) -> str:
    """A positive number with two digits, as one would say it."""
    if value < 0.01:
        return "less than 0.01" if value > 0 else "0"
    return f"{value:.2g}" if value < 10 else f"{float(f'{value:.2g}'):,.0f}"


def share_left(age: float) -> str:
    """What weight decay alone would leave of the initial weight at a decay age."""
    percent = 100 * math.exp(-max(age, 0.0))
    if percent < 0.1:
        return "less than 0.1 %"
    return f"{percent:.1f} %" if percent < 1 else f"{percent:.0f} %"


def actions(situation: Situation, causes: Collection[str]) -> list[str]:
    """What can be done, the most useful first."""
    said = [
        advice if isinstance(advice, str) else advice(situation)
        for cause, advice in _ADVICE.items()
        if cause in causes
    ]
    return list(dict.fromkeys(text for text in said if text))


def _trivial(text: str) -> Reason:
    if "one output row" in text:
        return Reason("trivial", "with one output any gradients give the full score")
    words = "the output reacts equally in all directions there, as in a last layer"
    return Reason("trivial", f"{words}, so that only the weight itself is scored")


def _unripe(record: Record, situation: Situation) -> Reason:
    """Why an equality does not hold yet: the clock, else the balance, else as said."""
    age, distance = situation.diagnosis.decay_age, situation.diagnosis.stationarity
    if age < RIPE:
        return Reason(
            "unripe",
            f"the decay age is {number(age)} of the {RIPE:g} or so that it takes: weight decay "
            f"alone would still have left {share_left(age)} of the initial weight",
        )
    if math.isfinite(distance):
        words = f"gradient and weight decay differ by {number(distance)} times the decay"
        return Reason("unripe", words)
    return Reason("unripe", plain(record.because) or "training has not had the time")


def _known_cause(record: Record, diagnosis: Diagnosis) -> str:
    """What is known of the layer that keeps an equality from being judged."""
    relation = RELATIONS[record.relation]
    if not relation.is_equality or record.verdict == "undefined":
        return "other"
    if diagnosis.weight_decay == 0 or diagnosis.decay_form == "none":
        return "no decay"
    if relation.needs == "update":
        return "coupled" if diagnosis.decay_form == "coupled" else "other"
    if diagnosis.decay_form == "decoupled":
        return "decoupled"
    if diagnosis.scale_invariance in ("rows", "groups", "layer"):
        return "invariant"
    return "noise" if diagnosis.noise >= diagnosis.stationarity / 2 else "other"


def _words(cause: str, record: Record, situation: Situation) -> str:
    """A cause in plain words; "" where its text is to be quoted."""
    diagnosis = situation.diagnosis
    noise = "minibatch noise hides the rest"
    if math.isfinite(diagnosis.noise) and math.isfinite(diagnosis.stationarity):
        noise = (
            f"minibatch noise alone puts gradient and decay {number(diagnosis.noise)} apart, "
            f"in units of the decay, where {number(diagnosis.stationarity)} is seen"
        )
    return {
        "infinite": "its weight or its gradients hold values that are not finite",
        "computed": "the weight is computed from other parameters, on which the decay acts",
        "frozen": "the weight is frozen and nothing trains it",
        "partly": "rescaling the weight hardly changes the loss (a normalisation follows it), so "
        "that gradient and weight decay may not balance",
        "invariant": "rescaling the weight does not change the loss (it is scale-invariant: a "
        "normalisation follows it), so that gradient and weight decay cannot balance",
        "changed": "weight decay was changed within the window",
        "decoupled": f"{diagnosis.optimizer or 'the optimizer'} applies weight decay beside the "
        "gradient (decoupled), so that at rest its update balances the decay, not the gradient",
        "coupled": "weight decay acts through the gradient here (coupled), so that the gradient "
        "balances it at rest, not the update",
        "no decay": "there is no weight decay, and nothing balances the gradient at rest",
        "unknown decay": "the weight decay is not known",
        "unheld": "no optimizer that the probe knows trains this weight",
        "unseen": "gradient and weight decay do not balance at these weights, which alone do not "
        "show whether they could (before a normalisation they cannot)",
        "loop only": "frozen weights take no step, and no update is to be seen",
        "biased": f"{record.n_examples:,} examples are too few for it: the score is biased low",
        "underflow": "the gradients are so small that their squares vanish in float32",
        "shared": "the weight is used in several places, and the level by chance is not known",
        "untrained": _like_untrained(record),
        "noise": noise,
    }.get(cause, "")


def _like_untrained(record: Record) -> str:
    if math.isnan(record.initial_cosine):
        return "it is above chance, but no further than in networks that were never trained"
    return "it is above chance, but hardly higher than it was before training"


def _compare_untrained(situation: Situation) -> str:
    """How to get a score from before training, where there is none."""
    if all(math.isfinite(r.initial_cosine) for r in situation.asked("nfa", "enfa")):
        return "train on, and see whether it leaves its score from before training"
    if situation.in_loop:
        return "probe from step 0 on, so that there is an initial score to compare with"
    return "measure its weights from before training in the same way, and give that as initial="


def _train_on(situation: Situation) -> str:
    """Until when, and for how many steps at the rate of the window, else of the run."""
    diagnosis, window = situation.diagnosis, situation.settings.get("window")
    age, steps = diagnosis.decay_age, situation.step
    if age >= RIPE:
        return "train on, with a lower learning rate towards the end"
    until = f"train on until the decay age is about {RIPE:g}"
    if not math.isfinite(age):
        clock = "learning rate × weight decay, over 1 − momentum, summed over all steps"
        return f"{until} ({clock}), with a lower learning rate towards the end"
    rate = age / steps if steps > 0 else 0.0
    if isinstance(window, int) and window > 0 and diagnosis.window_age > 0:
        rate = diagnosis.window_age / window
    if not rate > 0:
        return until
    left = (RIPE - age) / rate
    text = f"{until}: about {number(max(left, 1.0))} more steps at the present rate"
    if left > _FAR * max(steps, _SHORT):
        text += " (sooner with a larger learning rate or weight decay)"
    return text


def _read_update(situation: Situation) -> str:
    names = {"fact": "update_fact", "bfact": "update_bfact"}
    wanted = [names[r.relation] for r in situation.asked("fact", "bfact")] or ["update_fact"]
    seen = {r.relation for r in situation.asked(*wanted) if r.verdict != "undefined"}
    named = " and ".join(dict.fromkeys(wanted))
    if seen >= set(wanted):
        return f"read {named} in place of those of the gradient"
    where = "" if situation.in_loop else "in the training loop "
    return f"ask {where}for {named} (relations=) and read that in place of those of the gradient"


def _without_balance(situation: Situation) -> str:
    """To read what needs no balance of gradient and decay, where there is some of it."""
    others = [r for r in situation.records if not RELATIONS[r.relation].is_equality]
    aligned = [record.label for record in others if record.verdict == "aligned"]
    told = aligned or [record.label for record in others if record.verdict in FINDINGS]
    if told:
        named, verb = " and ".join(told[:2]), "needs" if len(told) == 1 else "need"
        return f"judge this layer by {named}, which {verb} no such balance"
    return "" if others else "ask for nfa and enfa (relations=), which need no such balance"


def _widen(situation: Situation) -> str:
    """What averages minibatch noise out."""
    window = situation.settings.get("window")
    if not situation.in_loop:
        return "lower the learning rate at the end of training"
    now = f" than {window:,} steps" if isinstance(window, int) and window > 0 else ""
    return f"take a longer window (window=){now}, of several epochs, or use measure()"


def _leave_frozen(situation: Situation) -> str:
    score = "; measure() scores it as it stands" if situation.in_loop else ""
    return f"nothing for as long as the weight is frozen{score}"


#: What can be done about a cause, the most useful first.
_ADVICE: Mapping[str, str | Callable[[Situation], str]] = {
    "fault": "look the fault up in the log, and repeat with strict=True to see where it is",
    "infinite": "find out where training left the finite numbers (learning rate, mixed precision) "
    "before reading on",
    "unused": "check that the forward pass uses this layer; report.coverage says what is not "
    "measured",
    "no gradient": "check that the loss depends on this layer, or use measure()",
    "too large": "raise max_dim if memory allows",
    "decoupled": _read_update,
    "coupled": "read fact in place of update_fact",
    "invariant": _without_balance,
    "computed": _without_balance,
    "no decay": "train with weight decay if fact is to be tested",
    "unknown decay": "give the optimizer, or weight_decay=",
    "unheld": "give the probe the optimizer that trains this layer",
    "given": "leave weight_decay= to the optimizer, or use measure() with a loss without that term",
    "changed": "choose a window in which weight decay stays the same",
    "unripe": _train_on,
    "noise": _widen,
    "window": "use measure() on all the data, which is the definition",
    "biased": "use measure() on more data, ten examples or more for each output of the layer",
    "random": 'use measure(jacobian="exact"), which needs no random probes',
    "underflow": "use measure() in float64",
    "shared": "probe from step 0 on, so that there is an initial score to compare with",
    "untrained": _compare_untrained,
    "frozen": _leave_frozen,
    "unseen": "put the probe into the training loop, whose steps show that",
    "loop only": "put the probe into the training loop, which sees the updates",
    "trivial": "leave those scores out of comparisons between layers",
}
