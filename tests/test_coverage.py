"""Coverage: what a report speaks for, and why not for the rest."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import Coverage, FeatureProbe, ParameterCoverage, Report, measure

LAMBDA = 0.05


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Attention(nn.Module):
    """An embedding, torch's own attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


class Functional(nn.Module):
    """One layer used by its weight only, one never, one from the second step on, one as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 5)
        self.by_weight = nn.Linear(5, 6)
        self.unused = nn.Linear(6, 7)
        self.loose = nn.Parameter(torch.randn(5, 2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(self.used(x), self.by_weight.weight, self.by_weight.bias))
        return self.head(x)


def entries(report: Report) -> dict[str, ParameterCoverage]:
    """Coverage by parameter name."""
    return {entry.parameter: entry for entry in report.coverage.parameters}


def run_measure(model: nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> Report:
    """All four default relations at frozen weights."""
    settings: dict[str, Any] = {"weight_decay": LAMBDA, "progress": False, **options}
    return measure(model, [batch], nn.functional.mse_loss, **settings)


def run_loop(model: nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> Report:
    """All four default relations in one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
    probe = FeatureProbe(model, optimizer=optimizer, every=1, window=1, strict=True, **options)
    with probe:
        F.mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    assert probe.report is not None
    return probe.report


RUNS = pytest.mark.parametrize("run", [run_measure, run_loop])


def attention_batch() -> tuple[Tensor, Tensor]:
    """Six sequences of five tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(7, (6, 5), generator=generator), normal(6, 3)


def functional_batch() -> tuple[Tensor, Tensor]:
    """Six rows."""
    return normal(6, 4), normal(6, 2, seed=1)


@RUNS
def test_torchs_attention(run: Any) -> None:
    """The packed projection is no layer, the output projection is used by weight: both named."""
    found = entries(run(Attention().double(), attention_batch()))
    assert set(found) == {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    packed = found["attention.in_proj_weight"]
    assert (packed.layer, packed.measured, packed.elements) == (None, "none", 48)
    assert "MultiheadAttention" in packed.reason
    projection = found["attention.out_proj.weight"]
    assert (projection.layer, projection.measured) == ("attention.out_proj", "gradient only")
    assert "never called as a module" in projection.reason
    assert found["embed.weight"].measured == "none"
    assert "Embedding" in found["embed.weight"].reason
    head = found["head.weight"]
    assert (head.layer, head.measured, head.reason) == ("head", "all", "")


@RUNS
def test_the_out_projection_has_fact_from_its_gradient(run: Any) -> None:
    """A layer whose weight was used without calling it has FACT, and a reason for NFA."""
    report = run(Attention().double(), attention_batch())
    fact = report.record("attention.out_proj", "fact")
    assert fact.status == "ok"
    assert math.isfinite(fact.cosine)
    for relation in ("nfa", "enfa"):
        record = report.record("attention.out_proj", relation, 1.0)
        assert math.isnan(record.cosine)
        assert "never called as a module" in record.status


@RUNS
def test_a_weight_used_without_its_layer(run: Any) -> None:
    """F.linear(x, layer.weight): FACT only; a layer never used: nothing; a loose matrix: none."""
    found = entries(run(Functional().double(), functional_batch()))
    assert [(name, entry.measured) for name, entry in found.items()] == [
        ("loose", "none"),
        ("used.weight", "all"),
        ("by_weight.weight", "gradient only"),
        ("unused.weight", "none"),
        ("head.weight", "all"),
    ]
    assert "never called as a module" in found["by_weight.weight"].reason
    assert found["unused.weight"].layer == "unused"
    assert found["unused.weight"].reason
    assert found["loose"].layer is None
    assert "Functional" in found["loose"].reason


@RUNS
def test_an_excluded_layer(run: Any) -> None:
    """What include and exclude leave out is said to be left out."""
    for selection in ({"exclude": "used"}, {"include": ["head", "by_weight"]}):
        found = entries(run(Functional().double(), functional_batch(), **selection))
        used = found["used.weight"]
        assert (used.layer, used.measured) == (None, "none")
        assert used.reason == "left out by include/exclude"
        assert found["head.weight"].measured == "all"


@RUNS
def test_only_what_was_asked_counts(run: Any) -> None:
    """With FACT alone a weight used without its layer is fully measured; with NFA alone not."""
    fact = run(Functional().double(), functional_batch(), relations="fact")
    assert entries(fact)["by_weight.weight"].measured == "all"
    nfa = run(Functional().double(), functional_batch(), relations="nfa")
    assert entries(nfa)["by_weight.weight"].measured == "none"


@RUNS
def test_wide_layers_are_gradient_only(run: Any) -> None:
    """Beyond max_dim there is no K and E, and the reason gives both numbers."""
    found = entries(run(Functional().double(), functional_batch(), max_dim=4))
    used = found["used.weight"]
    assert used.measured == "gradient only"
    assert used.reason == "d_out 5 exceeds max_dim 4"
    assert found["head.weight"].measured == "all"


@RUNS
def test_shares_add_up(run: Any) -> None:
    """The shares of the three degrees are over all matrix entries and add up to 1."""
    coverage = run(Functional().double(), functional_batch()).coverage
    assert coverage.elements == 4 * 5 + 5 * 6 + 6 * 7 + 5 * 2 + 6 * 2
    assert math.isclose(coverage.share(), 32 / 114)
    assert math.isclose(coverage.share(("gradient only",)), 30 / 114)
    assert math.isclose(coverage.share(("none",)), 52 / 114)
    assert math.isclose(coverage.share(("all", "gradient only", "none")), 1.0)
    assert coverage.share(()) == 0.0
    assert {entry.parameter for entry in coverage.gaps()} == {
        "loose",
        "by_weight.weight",
        "unused.weight",
    }


def test_vectors_do_not_count() -> None:
    """Biases and norms are no matrices."""
    found = entries(run_measure(Attention().double(), attention_batch()))
    assert not any("bias" in name or "norm" in name for name in found)


def test_tied_and_parametrized_weights_are_covered() -> None:
    """A tied weight is listed once, a parametrization's own matrices belong to its layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[3])
    found = entries(run_measure(model.double(), functional_batch()))
    assert {(entry.layer, entry.measured) for entry in found.values()} == {
        ("0", "all"),
        ("3", "all"),
    }
    assert sum(entry.elements for entry in found.values()) == 16 + 8 + 2


def test_summary() -> None:
    """One line of shares, then a line per reason with its parameters, four of them at most."""
    report = run_measure(Functional().double(), functional_batch())
    first, *rest = report.coverage.summary().split("\n")
    assert first == "measured: 28.1% of 114 matrix entries, FACT/bFACT only: 26.3%"
    assert len(rest) == len({entry.reason for entry in report.coverage.gaps()})
    assert any("by_weight.weight" in line and "never called" in line for line in rest)
    assert str(report.coverage) == report.coverage.summary()
    many = Coverage(
        tuple(ParameterCoverage(f"p{i}", 1000, None, "none", "because") for i in range(6))
    )
    assert many.summary() == (
        "measured: 0.0% of 6,000 matrix entries\n  because: p0, p1, p2, p3 and 2 more"
    )


def test_full_coverage_is_one_line() -> None:
    """Without gaps there is nothing to explain."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    coverage = run_measure(model, functional_batch()).coverage
    assert coverage.summary() == "measured: 100.0% of 30 matrix entries"
    assert coverage.gaps() == ()


def test_round_trip() -> None:
    """`to_dict` is JSON and `from_dict` its inverse."""
    coverage = run_measure(Functional().double(), functional_batch()).coverage
    data = json.loads(json.dumps(coverage.to_dict(), allow_nan=False))
    assert Coverage.from_dict(data) == coverage
    assert data["share"] == coverage.share()


def test_a_model_without_matrices() -> None:
    """Nothing to measure is NaN, not 0 or 1, and None in JSON."""
    empty = Coverage(())
    assert math.isnan(empty.share())
    assert empty.to_dict()["share"] is None
    assert Coverage.from_dict(empty.to_dict()) == empty
    assert "0 matrix entries" in empty.summary()
