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
    """Layers used as usual, by weight and never; loose matrices in a product and in none."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 5)
        self.by_weight = nn.Linear(5, 6)
        self.unused = nn.Linear(6, 7)
        self.product = nn.Parameter(torch.randn(6, 3))
        self.loose = nn.Parameter(torch.randn(5, 2))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(self.used(x), self.by_weight.weight, self.by_weight.bias))
        return self.head(torch.tanh(x @ self.product) * self.loose.norm())


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
    """The packed projection is three layers, the output projection one; the embedding is named."""
    found = entries(run(Attention().double(), attention_batch()))
    assert set(found) == {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    packed = found["attention.in_proj_weight"]
    parts = ", ".join(f"attention.in_proj.{letter}" for letter in "qkv")
    assert (packed.layer, packed.measured, packed.elements) == (parts, "all", 48)
    for name in ("attention.out_proj", "head"):
        entry = found[f"{name}.weight"]
        assert (entry.layer, entry.measured, entry.reason) == (name, "all", "")
    assert found["embed.weight"].measured == "none"
    assert "Embedding" in found["embed.weight"].reason


@RUNS
def test_attentions_projections_have_every_relation(run: Any) -> None:
    """The four layers of torch's attention have a finite score in all four relations."""
    report = run(Attention().double(), attention_batch())
    for layer in ("in_proj.q", "in_proj.k", "in_proj.v", "out_proj"):
        for relation in ("fact", "bfact", "nfa", "enfa"):
            power = 1.0 if relation.endswith("nfa") else None
            record = report.record(f"attention.{layer}", relation, power)
            assert record.status == "ok", (layer, relation)
            assert math.isfinite(record.cosine)
            assert record.n_rows == 6 * 5


@RUNS
def test_a_weight_used_without_its_layer(run: Any) -> None:
    """F.linear(x, layer.weight) and x @ w are measured; a layer never used and a norm are not."""
    found = entries(run(Functional().double(), functional_batch()))
    assert [(name, entry.layer, entry.measured) for name, entry in found.items()] == [
        ("product", "product", "all"),
        ("loose", None, "none"),
        ("used.weight", "used", "all"),
        ("by_weight.weight", "by_weight", "all"),
        ("unused.weight", "unused", "none"),
        ("head.weight", "head", "all"),
    ]
    assert found["unused.weight"].reason == (
        "the layer was never called, as a module or through its weight"
    )
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


class Unseen(nn.Module):
    """A Linear whose weight is used in a product that is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.einsum("ni,oi->no", x, self.unseen.weight)))


class Partly(Unseen):
    """Besides one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(6, 7)


@RUNS
def test_only_what_was_asked_counts(run: Any) -> None:
    """Of a product that is not followed there is G: all of FACT, nothing of NFA."""
    fact = run(Unseen().double(), functional_batch(), relations="fact")
    assert entries(fact)["unseen.weight"].measured == "all"
    both = run(Unseen().double(), functional_batch())
    assert entries(both)["unseen.weight"].measured == "gradient only"
    nfa = run(Unseen().double(), functional_batch(), relations="nfa")
    assert entries(nfa)["unseen.weight"].measured == "none"


@RUNS
def test_wide_layers_are_covered(run: Any) -> None:
    """Beyond max_dim K and E are those of a subspace: measured all the same."""
    found = entries(run(Functional().double(), functional_batch(), max_dim=4))
    assert found["used.weight"].measured == "all"
    assert found["head.weight"].measured == "all"


@RUNS
def test_shares_add_up(run: Any) -> None:
    """The shares of the three degrees are over all matrix entries and add up to 1."""
    coverage = run(Partly().double(), functional_batch()).coverage
    assert coverage.elements == 4 * 6 + 6 * 2 + 6 * 7
    assert math.isclose(coverage.share(), 12 / 78)
    assert math.isclose(coverage.share(("gradient only",)), 24 / 78)
    assert math.isclose(coverage.share(("none",)), 42 / 78)
    assert math.isclose(coverage.share(("all", "gradient only", "none")), 1.0)
    assert coverage.share(()) == 0.0
    assert {entry.parameter for entry in coverage.gaps()} == {"unseen.weight", "unused.weight"}


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
    report = run_measure(Partly().double(), functional_batch())
    first, *rest = report.coverage.summary().split("\n")
    assert first == "measured: 15.4% of 78 matrix entries, FACT/bFACT only: 30.8%"
    assert len(rest) == len({entry.reason for entry in report.coverage.gaps()})
    assert any("unseen.weight" in line for line in rest)
    assert any("unused.weight" in line and "never called" in line for line in rest)
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
