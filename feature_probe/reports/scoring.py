"""One layer's statistics turned into records: relations, scores, controls and statuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.reports.report import Record
from feature_probe.theory.agreement import Agreement, compare, shared_weight_cosine, undefined
from feature_probe.theory.relations import LayerMatrices, LayerStatistics, Relation, Sum

logger = logging.getLogger(__name__)

#: Called with what failed and where, in words that follow "while"; may raise it.
OnFault = Callable[[Exception, str], None]
_NAN = float("nan")
_LONGEST_MESSAGE = 200


@dataclass(frozen=True)
class LayerFacts:
    """What a record says beside the scores.

    Attributes:
        layer: Name.
        step: Optimizer steps taken before the measured weights.
        examples: n behind the sums.
        rows: Rows behind the sums.
        premises: Why relations needing a sum may not be expected to hold, by the sum's name.
    """

    layer: str
    step: int
    examples: int
    rows: int
    premises: Mapping[str, str]


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
    matrices = LayerMatrices(statistics)
    missing = {needs: _missing(statistics, needs) for needs in {r.needs for r in relations}}

    def scores(relation: Relation, power: float | None) -> _Scores:
        if missing[relation.needs]:
            return _Scores(undefined(missing[relation.needs]))
        try:
            return _scores(statistics, matrices, relation, power)
        except Exception as error:  # one number's failure must not cost the others
            on_fault(error, f"scoring layer {facts.layer!r}")
            return _Scores(undefined(fault_status(error)))

    return [
        _record(facts, relation, power, statistics.weight_decay, scores(relation, power))
        for relation, power in _asked(relations, powers)
    ]


def faulty_layer(
    facts: LayerFacts, error: Exception, relations: Sequence[Relation], powers: Sequence[float]
) -> list[Record]:
    """The records of a layer whose sums or weight could not even be read: all NaN, with why."""
    scores = _Scores(undefined(fault_status(error)))
    return [
        _record(facts, relation, power, _NAN, scores)
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
    shared: float = _NAN
    residual: float = _NAN
    stationarity: float = _NAN
    decay_ratio: float = _NAN
    kept: int | None = None


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
    decay: float | None,
    scores: _Scores,
) -> Record:
    agreement = scores.agreement
    return Record(
        layer=facts.layer,
        relation=relation.name,
        power=power,
        step=facts.step,
        pearson=agreement.pearson,
        cosine=agreement.cosine,
        trace_free_cosine=agreement.trace_free_cosine,
        chance_cosine=agreement.chance_cosine,
        shared_weight_cosine=scores.shared,
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
        status=_status(relation, decay, agreement.reason),
    )


def _scores(
    statistics: LayerStatistics,
    matrices: LayerMatrices,
    relation: Relation,
    power: float | None,
) -> _Scores:
    agreement = compare(matrices.gram(relation), matrices.prediction(relation, power))
    if relation.is_equality:
        return _Scores(
            agreement,
            residual=matrices.residual(relation),
            stationarity=matrices.stationarity(),
            decay_ratio=matrices.decay_ratio(),
        )
    shared = _NAN
    if relation.side == "forward":
        shared = shared_weight_cosine(
            matrices.input_rows[0],
            matrices.curvature_values(relation.needs),
            1.0 if power is None else power,
            statistics.tolerance,
        )
    return _Scores(agreement, shared, kept=matrices.spectrum(relation).kept)


def _status(relation: Relation, decay: float | None, reason: str) -> str:
    notes = [reason] if reason else []
    if relation.is_equality and decay is None:
        notes.append("weight decay not known: direction only")
    elif relation.is_equality and decay == 0:
        notes.append("no weight decay: direction only")
    return "; ".join(notes) or "ok"


def _missing(statistics: LayerStatistics, needs: Sum) -> str:
    """Why the relations that need a sum cannot be scored; "" if they can."""
    if not _finite(statistics.weight):
        return "not finite: the weight holds NaN or infinity"
    tensor = statistics.sum(needs)
    if tensor is None:
        return statistics.missing.get(needs, "not measured")
    if not _finite(tensor):
        return f"not finite: the {needs} sum holds NaN or infinity"
    return ""


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
