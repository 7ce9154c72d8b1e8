"""Intervals of measure(jackknife=...): the groups, against measuring every subset by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import ConfigurationError, Report, measure

N, BATCH, GROUPS = 96, 8, 4
LAMBDA = 0.1


def network() -> nn.Sequential:
    """5 → 6 → 3, float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Twelve batches of eight."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (N,), generator=generator)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def measured(data: list[tuple[Tensor, Tensor]], **options: Any) -> Report:
    """Everything at the network's weights."""
    settings: dict[str, Any] = {"weight_decay": LAMBDA, "progress": False}
    return measure(network(), data, F.cross_entropy, **(settings | options))


def key(report: Report) -> dict[tuple[str, str], float]:
    """Cosines by layer and relation."""
    return {(record.layer, record.label): record.cosine for record in report.records}


@pytest.mark.parametrize("population", [None, 2 * N])
def test_intervals_are_those_of_leaving_every_group_out(population: int | None) -> None:
    """θ̂ − (1−f)(m−1)(θ̄ − θ̂) ± t SE, each θ₍₋ᵦ₎ measured on the other groups' batches."""
    data = batches()
    report = measured(data, jackknife=GROUPS, population=population)
    left_out = [
        key(measured([batch for i, batch in enumerate(data) if i % GROUPS != group]))
        for group in range(GROUPS)
    ]
    free = 1 - (0 if population is None else N / population)
    quantile = 2.3533634348018264  # of Student's t with 3 degrees of freedom, at 0.95
    assert key(report) == pytest.approx(key(measured(data)), rel=1e-12)
    for record in report.records:
        if record.relation in ("fact", "bfact"):  # no interval covers what a sample leaves of FACT
            assert math.isnan(record.cosine_low)
            assert "FACT of a sample" in record.interval_note
            continue
        values = torch.tensor(
            [found[record.layer, record.label] for found in left_out], dtype=torch.float64
        )
        mean, m = float(values.mean()), GROUPS
        corrected = record.cosine - free * (m - 1) * (mean - record.cosine)
        error = math.sqrt(free * (m - 1) / m * float((values - mean).square().sum()))
        low, high = corrected - quantile * error, corrected + quantile * error
        assert record.cosine_corrected == pytest.approx(corrected, rel=1e-9)
        assert record.cosine_low == pytest.approx(max(low, -1), rel=1e-8)
        assert record.cosine_high == pytest.approx(min(high, 1), rel=1e-8)
        assert "4 groups" in record.interval_note or "m = 4" in record.interval_note


def test_without_being_asked_there_is_no_interval() -> None:
    """The numbers are NaN, and the note says how to get them."""
    for record in measured(batches()).records:
        assert math.isnan(record.cosine_low)
        assert math.isnan(record.cosine_high)
        assert math.isnan(record.cosine_corrected)
        assert "measure(jackknife=8)" in record.interval_note


def test_the_whole_data_set_leaves_nothing_uncertain() -> None:
    """population = n: intervals of width zero at the score itself."""
    for record in measured(batches(), jackknife=8, population=N).records:
        assert record.cosine_low == pytest.approx(record.cosine)
        assert record.cosine_high == pytest.approx(record.cosine)


def test_few_examples_for_the_width_are_said_to_bias_low() -> None:
    """Fewer than ten examples a row: no coverage is claimed."""
    notes = {r.interval_note for r in measured(batches()[:8], jackknife=8).select("0", "nfa")}
    assert len(notes) >= 1
    assert all("biased low" in note or "cannot tell" in note for note in notes)


def test_random_jacobians_claim_no_coverage() -> None:
    """K of random probes scatters beyond what the data set's size accounts for."""
    report = measured(batches(), jackknife=8, jacobian="random", population=N)
    record = report.record("0", "nfa", 0.5)
    assert "random" in record.interval_note
    assert record.cosine_low < record.cosine_high


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"jackknife": 1}, "two groups or more"),
        ({"jackknife": 0}, "positive integer"),
        ({"jackknife": 20}, "at least as many batches"),
        ({"jackknife": 8, "population": 10}, "fewer than the 96 examples"),
    ],
    ids=["one", "zero", "too many", "population"],
)
def test_bad_requests(options: dict[str, Any], match: str) -> None:
    """What cannot be done says what can."""
    with pytest.raises(ConfigurationError, match=match):
        measured(batches(), **options)
