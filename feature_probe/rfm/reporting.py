"""An iteration of an RFM as a report: its W as a layer's, scored by the probe's own relations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from feature_probe.reports.coverage import Coverage, ParameterCoverage
from feature_probe.reports.report import Report
from feature_probe.reports.scoring import LayerFacts, score_layer
from feature_probe.rfm.machine import Iteration, Settings
from feature_probe.theory.relations import LayerStatistics, clamp_tolerance, parse_relations

#: The name of W in records.
LAYER = "W"
_RELATIONS = ("fact", "fact_sym", "nfa")
_NO_VERDICT = "an RFM's update made W: read the cosine beside its level by chance"


def report(iteration: Iteration, settings: Settings, powers: Sequence[float]) -> Report:
    """How far M_t = W_tᵀW_t agrees with FACT and AGOP of its own machine.

    f(x) = g(Wx) is a network whose first layer is W: WᵀT is its FACT, so that T stands for −G/λ.

    Args:
        iteration: With both sums.
        settings: Of the run.
        powers: s of AGOPˢ.
    """
    machine = iteration.machine
    weight, slope, jacobian = (
        _square(part)[None]
        for part in (machine.features.root, iteration.sums.slope, iteration.sums.jacobian)
        if part is not None
    )
    count = len(machine.x)
    statistics = LayerStatistics(
        weight=weight,
        gradient=-slope,
        jacobian=jacobian,
        loss=None,
        weight_decay=1.0,
        tolerance=clamp_tolerance(weight.dtype),
    )
    facts = LayerFacts(LAYER, iteration.number, examples=count, rows=count)
    records = score_layer(facts, statistics, parse_relations(_RELATIONS), powers)
    shape = weight.shape[1] * weight.shape[2]
    return Report(
        step=iteration.number,
        records=[
            replace(record, weight_decay=settings.ridge, because=record.because or _NO_VERDICT)
            for record in records
        ],
        coverage=Coverage((ParameterCoverage(LAYER, shape, LAYER, "all", ""),)),
        settings={"source": "rfm", "update": settings.rule, "ridge": settings.ridge},
    )


def _square(part: Tensor) -> Tensor:
    return torch.diag(part) if part.dim() == 1 else part
