"""Reports made by hand, for every test of a sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest

from feature_probe.reports.coverage import Coverage, ParameterCoverage
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.record import Record
from feature_probe.reports.report import Report
from feature_probe.theory.relations import LayerStatistics

NAN = float("nan")
RELATIONS = (("fact", None), ("bfact", None), ("nfa", 0.5), ("enfa", 0.5))


def record(layer: str, relation: str, power: float | None, step: int, **changes: Any) -> Record:
    """A record whose numbers are all different, with what the test changes."""
    shared = relation in ("nfa", "enfa")
    numbers: dict[str, Any] = {
        "pearson": 0.6, "cosine": 0.7, "trace_free_cosine": 0.5, "chance_cosine": 0.3,
        "shared_weight_cosine": 0.4 if shared else NAN, "residual": NAN if shared else 0.8,
        "scale": 2.0 if shared else NAN, "weight_decay": 1e-3,
        "stationarity": NAN if shared else 1.5, "decay_ratio": NAN if shared else 0.9,
        "cosine_low": NAN, "cosine_high": NAN, "premise": "", "n_examples": 64, "n_rows": 128,
        "n_kept": 7 if shared else None, "status": "ok",
        "verdict": "aligned" if shared else "approaching",
    }  # fmt: skip
    return Record(layer, relation, power, step, **(numbers | changes))


def diagnosis(layer: str, **changes: Any) -> Diagnosis:
    """A diagnosis whose numbers are all different, with what the test changes."""
    given: dict[str, Any] = {
        "optimizer": "SGD", "decay_form": "coupled", "weight_decay": 1e-3, "decay_age": 2.5,
        "window_age": 0.25, "drift": 0.125, "stationarity": 1.5, "noise": 1.375,
        "decay_ratio": 0.375, "fluctuation": 0.5, "norm_drift": -0.0625, "norm_span": 0.75,
        "scale_invariance": "none", "invariance_statistic": 1.25, "state": "approaching",
        "because": "its stationarity is 1.5",
    }  # fmt: skip
    return Diagnosis(layer, **(given | changes))


@pytest.fixture
def make_report() -> Callable[..., Report]:
    """Build a report: layers × four relations, cosine −0.1 + 0.1·layer + 0.01·relation.

    ``changes`` maps (layer, relation) to changed fields of the record, ``diagnosed`` a layer to
    those of its diagnosis; ``diagnosed=None``: there are no diagnoses.
    """

    def build(
        step: int = 100,
        layers: Sequence[str] = ("conv", "blocks.0.fc_1", "head"),
        changes: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
        statistics: Mapping[str, LayerStatistics] | None = None,
        diagnosed: Mapping[str, Mapping[str, Any]] | None = MappingProxyType({}),
    ) -> Report:
        records = []
        for i, layer in enumerate(layers):
            for j, (relation, power) in enumerate(RELATIONS):
                numbers: dict[str, Any] = {"cosine": -0.1 + 0.1 * i + 0.01 * j}
                numbers |= dict((changes or {}).get((layer, relation), {}))
                records.append(record(layer, relation, power, step, **numbers))
        covered = [ParameterCoverage(f"{layer}.weight", 10, layer, "all", "") for layer in layers]
        gap = ParameterCoverage("embed.weight", 10, None, "none", "an Embedding is not measured")
        coverage = Coverage((*covered, gap))
        diagnoses = [
            diagnosis(layer, **(diagnosed or {}).get(layer, {}))
            for layer in (layers if diagnosed is not None else ())
        ]
        return Report(
            step, records, coverage, {"jacobian": "exact"}, diagnoses,
            statistics=dict(statistics or {}),
        )  # fmt: skip

    return build
