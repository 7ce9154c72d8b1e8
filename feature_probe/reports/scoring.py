"""One layer's statistics turned into records: relations, scores, controls and statuses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from feature_probe.reports.record import Record
from feature_probe.theory.agreement import Agreement, compare, undefined
from feature_probe.theory.levels import ChanceLevel, ChanceLevels, TurnedWeight
from feature_probe.theory.matrices import LayerMatrices
from feature_probe.theory.power import FittedPower, fitted_power, power_cosine
from feature_probe.theory.projection import Subspace
from feature_probe.theory.relations import Basis, LayerStatistics, Relation, Sum

logger = logging.getLogger(__name__)

#: Called with what failed and where, in words that follow "while"; may raise it.
OnFault = Callable[[Exception, str], None]
_NAN = float("nan")
_LONGEST_MESSAGE = 200
#: What stands for W in some relations, in words, and what it means where it is zero.
_BASES: Mapping[Basis, str] = {
    "change": "W − W₀",
    "initial": "W₀",
    "gradient": "the gradient sum",
    "motion": "the window's motion of W",
}
_ZERO: Mapping[Basis, str] = {
    "change": "W = W₀: the weight has not changed since initialisation",
    "gradient": "the gradient is zero",
    "motion": "the weight has not moved in this window",
}


@dataclass(frozen=True)
class LayerFacts:
    """What a record says beside the scores.

    Attributes:
        layer: Name.
        step: Optimizer steps taken before the measured weights.
        examples: n behind the sums.
        rows: Rows behind the sums.
        premises: Why relations needing a sum may not be expected to hold, by the sum's name.
        form: Of FACT: "snapshot" or "window".
        depth: L − l + 1, the layer's number from the output in a chain of layers; None elsewhere.
    """

    layer: str
    step: int
    examples: int
    rows: int
    premises: Mapping[Sum, str] = field(default_factory=dict)
    form: str = "snapshot"
    depth: int | None = None


def log_fault(error: Exception, where: str) -> None:
    """Tell the log of a failure that the records name too."""
    logger.warning("fault while %s", where, exc_info=error)


def score_layer(
    facts: LayerFacts,
    statistics: LayerStatistics,
    relations: Sequence[Relation],
    powers: Sequence[float],
    on_fault: OnFault = log_fault,
) -> list[Record]:
    """The records of one layer, relations in the order given, each with its powers.

    A number that cannot be computed is NaN and the status says why; nothing here raises for data.
    Where the computation itself fails (linear algebra, memory), that record alone says "fault: ..."
    and ``on_fault`` is told.
    """
    inputs = {(relation.needs, relation.basis) for relation in relations}
    missing = {(needs, basis): _missing(statistics, needs, basis) for needs, basis in inputs}

    shared: dict[tuple[Basis, bool], LayerMatrices] = {}

    def matrices(relation: Relation) -> LayerMatrices:
        # those of the relations with a power may lie in a subspace
        key = (relation.basis, relation.has_power and statistics.subspace is not None)
        if key not in shared:
            shared[key] = LayerMatrices(statistics.seen_by(relation))
        return shared[key]

    @cache
    def turned(seen: LayerMatrices) -> TurnedWeight:
        return TurnedWeight(seen.input_rows[0], gram=seen.weight_gram)

    @cache
    def levels(seen: LayerMatrices, needs: Sum) -> ChanceLevels:
        return ChanceLevels(turned(seen), seen.curvature_to_turn(needs), statistics.tolerance)

    @cache
    def fit(relation: Relation) -> Fit:
        seen = matrices(relation)
        return _fit(seen, relation, levels(seen, relation.needs).mean)

    def scores(relation: Relation, power: float | None) -> _Scores:
        if reason := missing[relation.needs, relation.basis]:
            return _Scores(undefined(reason))
        try:
            seen = matrices(relation)
            return _scores(seen, relation, power, fit, levels, facts.depth)
        except Exception as error:  # one number's failure must not cost the others
            on_fault(error, f"scoring layer {facts.layer!r}")
            return _Scores(undefined(fault_status(error)))

    return [
        _record(facts, relation, power, statistics, scores(relation, power))
        for relation, power in _asked(relations, powers)
    ]


def faulty_layer(
    facts: LayerFacts, error: Exception, relations: Sequence[Relation], powers: Sequence[float]
) -> list[Record]:
    """The records of a layer whose sums or weight could not even be read: all NaN, with why."""
    status = fault_status(error)
    return [
        replace(
            _record(facts, relation, power, None, _Scores(undefined(status))),
            verdict="undefined",
            because=status,
        )
        for relation, power in _asked(relations, powers)
    ]


def fault_status(error: Exception) -> str:
    """The status of a number that a failure of the probe cost: one line, and not a long one."""
    said = " ".join(str(error).split())
    shown = f"{said[:_LONGEST_MESSAGE]}..." if len(said) > _LONGEST_MESSAGE else said
    # torch's own LinAlgError is called _LinAlgError
    return f"fault: {type(error).__name__.lstrip('_')}" + (f": {shown}" if shown else "")


@dataclass(frozen=True)
class _Scores:
    agreement: Agreement
    shared: ChanceLevel | None = None
    residual: float = _NAN
    r_squared: float = _NAN
    stationarity: float = _NAN
    decay_ratio: float = _NAN
    kept: int | None = None
    fitted: FittedPower | None = None
    depth_cosine: float = _NAN


def _asked(
    relations: Sequence[Relation], powers: Sequence[float]
) -> Iterator[tuple[Relation, float | None]]:
    for relation in relations:
        for power in powers if relation.has_power else (None,):
            yield relation, power


def _record(
    facts: LayerFacts,
    relation: Relation,
    power: float | None,
    statistics: LayerStatistics | None,
    scores: _Scores,
) -> Record:
    """``statistics`` None: they could not be read."""
    agreement, shared, fitted = scores.agreement, scores.shared, scores.fitted
    decay = _NAN if statistics is None else statistics.weight_decay
    subspace = None if statistics is None else statistics.subspace
    has_depth = relation.has_power and facts.depth is not None
    return Record(
        layer=facts.layer,
        relation=relation.name,
        power=power,
        step=facts.step,
        pearson=agreement.pearson,
        cosine=agreement.cosine,
        trace_free_cosine=agreement.trace_free_cosine,
        chance_cosine=agreement.chance_cosine,
        shared_weight_cosine=_NAN if shared is None else shared.cosine,
        residual=scores.residual,
        scale=_NAN if relation.is_equality else agreement.scale,
        weight_decay=_NAN if decay is None else decay,
        stationarity=scores.stationarity,
        decay_ratio=scores.decay_ratio,
        cosine_low=_NAN,
        cosine_high=_NAN,
        premise=facts.premises.get(relation.needs, ""),
        n_examples=facts.examples,
        n_rows=facts.rows,
        n_kept=scores.kept,
        status=_status(relation, decay, _told(agreement), subspace),
        off_diagonal_pearson=agreement.off_diagonal_pearson,
        spearman=agreement.spearman,
        r_squared=scores.r_squared,
        chance_spread=agreement.chance_spread if shared is None else shared.spread,
        chance_arctanh_spread=_NAN if shared is None else shared.arctanh_spread,
        fitted_power=_NAN if fitted is None else fitted.power,
        fitted_power_low=_NAN if fitted is None else fitted.flat_low,
        fitted_power_high=_NAN if fitted is None else fitted.flat_high,
        fitted_cosine=_NAN if fitted is None else fitted.cosine,
        depth_power=1 / facts.depth if has_depth and facts.depth else _NAN,
        depth_cosine=scores.depth_cosine,
        form=_form(relation, facts.form),
    )


def _form(relation: Relation, form: str) -> str:
    """Which form of FACT a record is of."""
    return {"gradient": form, "update": "update"}.get(relation.needs, "")


def _scores(
    matrices: LayerMatrices,
    relation: Relation,
    power: float | None,
    fit: Callable[[Relation], Fit],
    levels: Callable[[LayerMatrices, Sum], ChanceLevels],
    depth: int | None,
) -> _Scores:
    agreement = compare(
        matrices.gram(relation),
        matrices.prediction(relation, power),
        matrices.inner(relation, power),
    )
    r_squared = matrices.r_squared(relation, power)
    if relation.is_equality:
        return _Scores(
            agreement,
            residual=matrices.residual(relation),
            r_squared=r_squared,
            stationarity=matrices.stationarity(relation.needs),
            decay_ratio=matrices.decay_ratio(relation.needs),
        )
    shared = None
    if relation.side == "forward":
        chance = levels(matrices, relation.needs)
        shared = chance.at(1.0 if power is None else power)
    fitted = fit(relation)
    return _Scores(
        agreement,
        shared,
        r_squared=r_squared,
        kept=matrices.spectrum(relation).kept,
        fitted=fitted.power,
        depth_cosine=_NAN if depth is None else fitted.cosine(1 / depth),
    )


@dataclass(frozen=True)
class Fit:
    """The power that fits best, and the cosine at any other.

    Attributes:
        power: ŝ and its cosine.
        cosine: C(s).
    """

    power: FittedPower
    cosine: Callable[[float], float]


def _fit(matrices: LayerMatrices, relation: Relation, shared: Callable[[float], float]) -> Fit:
    """``shared``: the level of the forward relation by chance."""
    values, quotients, norm = matrices.power_inputs(relation)

    def level(power: float) -> float:
        if relation.side == "forward":
            return shared(power)
        return compare(matrices.gram(relation), matrices.prediction(relation, power)).chance_cosine

    return Fit(
        fitted_power(values, quotients, norm, level),
        lambda power: power_cosine(values, quotients, norm, power),
    )


def _told(agreement: Agreement) -> str:
    """Why a number is missing; that a 2 × 2 matrix has one entry off its diagonal is no news."""
    if math.isnan(agreement.pearson) or math.isnan(agreement.trace_free_cosine):
        return agreement.reason
    return ""


def _status(relation: Relation, decay: float | None, reason: str, subspace: Subspace | None) -> str:
    notes = [reason] if reason else []
    if relation.has_power and subspace is not None:
        notes.append(subspace.note)
    if relation.is_equality and decay is None:
        notes.append("weight decay not known: direction only")
    elif relation.is_equality and decay == 0:
        notes.append("no weight decay: direction only")
    return "; ".join(notes) or "ok"


def _missing(statistics: LayerStatistics, needs: Sum, basis: Basis) -> str:
    """Why the relations of a sum, and of what stands for W, cannot be scored; "" if they can."""
    if not _finite(statistics.weight):
        return "not finite: the weight holds NaN or infinity"
    tensor = statistics.sum(needs)
    if tensor is None:
        return statistics.missing.get(needs, "not measured")
    if not _finite(tensor):
        return f"not finite: the {needs} sum holds NaN or infinity"
    matrix = statistics.in_place_of_weight(basis)
    if matrix is None:
        return statistics.why_no(basis)
    if not _finite(matrix):
        return f"not finite: {_BASES.get(basis, basis)} holds NaN or infinity"
    return _ZERO[basis] if basis in _ZERO and not bool(matrix.any()) else ""


def _finite(tensor: Tensor) -> bool:
    """Nothing of the tensor's size is written, unlike by ``torch.isfinite``."""
    if not tensor.numel():
        return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))
