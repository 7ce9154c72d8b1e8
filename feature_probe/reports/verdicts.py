"""A record's verdict: what its score may be taken to say, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.premises import Premise
from feature_probe.reports.record import Record
from feature_probe.theory.relations import RELATIONS

#: Cosine from which on, and residual up to which, an equality counts as holding at rest.
_HOLDS, _OFF = 0.95, 0.15
#: Share of the way from the level by chance to 1 that a score must have gone to be called aligned.
GAIN = 0.1
#: Spreads of the level by chance, on Fisher's scale, that it must lie above that. Networks without
#: training reach 4.5: before a LayerNorm the gradients know of W, random directions do not. Where
#: K is nearly of rank 1 the scale has heavy tails, and 5.7 was seen by chance.
_SPREADS = 6.0
#: The same below chance.
_BELOW = 4.0
#: The same where the score lies as far above that of step 0, too, which knows of all that; without
#: it, from here on a score is not called a matter of chance.
_CLEAR = 3.0
#: Examples per row below which a score that is not above chance may be one that is biased low.
_ENOUGH = 10
#: What frozen weights leave open.
_UNSEEN = (
    "frozen weights do not show whether they are scale-invariant, and so kept from it: the "
    "training loop does"
)


@dataclass(frozen=True)
class Standing:
    """What a verdict rests on beside the record.

    Attributes:
        diagnosis: Of the layer.
        premise: The strongest premise against the relation, None if there is none.
        rows: d_out of a block.
    """

    diagnosis: Diagnosis
    premise: Premise | None
    rows: int


def judged(record: Record, standing: Standing) -> Record:
    """The record with its verdict and the reason for it."""
    effect: str = "" if standing.premise is None else standing.premise.effect
    verdict: str
    if standing.premise is not None and effect == "not applicable":
        verdict, because = effect, standing.premise.text
    elif math.isnan(record.cosine):
        verdict, because = "undefined", record.status
    elif standing.premise is not None and effect == "trivial":
        verdict, because = effect, standing.premise.text
    elif RELATIONS[record.relation].is_equality:
        verdict, because = _equality(record, standing)
    else:
        verdict, because = _proportionality(record, standing)
    return replace(record, verdict=verdict, because=because)


def _equality(record: Record, standing: Standing) -> tuple[str, str]:
    """FACT and its kin: has the layer come to rest, and do the matrices agree?"""
    state, why = standing.diagnosis.state, standing.diagnosis.because
    if math.isnan(record.weight_decay):
        return "cannot tell", "weight decay not known: give the optimizer or weight_decay="
    if record.weight_decay == 0:
        return "not applicable", "no weight decay: nothing balances the gradient at rest"
    if standing.premise is not None and standing.premise.effect == "cannot tell":
        return "cannot tell", standing.premise.text
    agrees = record.cosine >= _HOLDS and record.residual <= _OFF
    if agrees and state == "at stationarity":
        return "holds", f"cosine {record.cosine:.3f}, off by {record.residual:.1%}; {why}"
    if standing.premise is not None:
        return "cannot tell", standing.premise.text
    if state == "at stationarity":
        said = f"off by {record.residual:.2g} of ‖WᵀW‖"
        if math.isnan(record.residual):
            said = f"cosine {record.cosine:.2f}"
        return "cannot tell", f"{said}, though {why}: a longer window tells noise from motion"
    unseen = record.form == "snapshot" and standing.diagnosis.scale_invariance == "unknown"
    # what agrees as well as this is not kept from it
    if unseen and not (agrees and state == "approaching"):
        return "cannot tell", f"{why}; {_UNSEEN}" if state in ("approaching", "far") else why
    if state == "approaching":
        return "approaching", why
    return ("not yet" if state == "far" else "cannot tell"), why


def _proportionality(record: Record, standing: Standing) -> tuple[str, str]:
    """NFA and its kin: is the score above what the same weight gets by chance?"""
    level, spread = record.level_by_chance, record.chance_spread
    initial, cosine = record.initial_cosine, record.cosine
    moves = RELATIONS[record.relation].basis in ("gradient", "motion")
    if moves:  # it is asked for at initialisation above all
        initial = math.nan
    shared = standing.premise is not None and standing.premise.effect == "cannot tell"
    if standing.premise is not None and shared and math.isnan(initial):
        return "cannot tell", standing.premise.text
    if math.isnan(level) or math.isnan(spread):
        return "cannot tell", "the level by chance is not known"
    said = f"cosine {cosine:.2f}, by chance {level:.2f} ± {spread:.2f}"
    scale = record.chance_arctanh_spread
    if math.isnan(scale):
        scale = spread / max(1 - level**2, 1e-12)
    if not math.isnan(initial):
        said += f", at initialisation {initial:.2f}"
        if _is_above(cosine, max(level, initial), scale, _CLEAR):
            return "aligned", said
    if not shared and _is_above(cosine, level, scale, _SPREADS):
        return "aligned", said
    if record.n_examples < _ENOUGH * standing.rows:
        return "cannot tell", (
            f"{said}, but {record.n_examples} examples for {standing.rows} rows bias it low"
        )
    if _spreads(cosine, level, scale) <= -_BELOW and level - cosine >= GAIN * level:
        return "below chance", said
    if not shared and _is_above(cosine, level, scale, _CLEAR):
        return "cannot tell", f"{said}: {_no_further(initial, moves)}"
    return "at chance", said


def _no_further(initial: float, moves: bool) -> str:
    """Why a score that is clearly above chance is not called aligned."""
    if moves:
        return "above it, but where K is nearly of rank 1 chance alone may reach as far"
    if math.isnan(initial):
        return "no further above it than networks without training can be"
    return "above chance, but hardly above what it was at initialisation"


def _is_above(cosine: float, floor: float, scale: float, spreads: float) -> bool:
    """Whether a score lies above a floor by so many spreads and by a share of the way to 1."""
    return _spreads(cosine, floor, scale) >= spreads and cosine - floor >= GAIN * (1 - floor)


def _spreads(cosine: float, level: float, scale: float) -> float:
    """How many spreads a cosine lies from a level, on Fisher's scale, where 1 is far away."""
    near = 1 - 1e-9
    apart = math.atanh(_within(cosine, near)) - math.atanh(_within(level, near))
    if scale > 0 or apart == 0:
        return apart / scale if apart else 0.0
    return math.copysign(math.inf, apart)


def _within(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))
