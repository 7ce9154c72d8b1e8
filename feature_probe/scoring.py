"""One layer's statistics turned into records: relations, scores, controls and statuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.agreement import Agreement, compare, shared_weight_cosine, undefined
from feature_probe.relations import LayerMatrices, LayerStatistics, Relation, Sum
from feature_probe.report import Record

_NAN = float("nan")


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


def score_layer(
    facts: LayerFacts,
    statistics: LayerStatistics,
    relations: Sequence[Relation],
    powers: Sequence[float],
) -> list[Record]:
    """The records of one layer, relations in the order given, each with its powers.

    A number that cannot be computed is NaN and the status says why; nothing here raises for data.
    """
    matrices = LayerMatrices(statistics)
    missing = {needs: _missing(statistics, needs) for needs in {r.needs for r in relations}}
    return [
        _record(facts, statistics, matrices, relation, power, missing[relation.needs])
        for relation in relations
        for power in (powers if relation.has_power else (None,))
    ]


@dataclass(frozen=True)
class _Scores:
    agreement: Agreement
    shared: float = _NAN
    residual: float = _NAN
    stationarity: float = _NAN
    decay_ratio: float = _NAN
    kept: int | None = None


def _record(
    facts: LayerFacts,
    statistics: LayerStatistics,
    matrices: LayerMatrices,
    relation: Relation,
    power: float | None,
    missing: str,
) -> Record:
    if missing:
        scores = _Scores(undefined(missing))
    else:
        try:
            scores = _scores(statistics, matrices, relation, power)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            scores = _Scores(undefined(f"linear algebra failed: {error}"))
    agreement, decay = scores.agreement, statistics.weight_decay
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
