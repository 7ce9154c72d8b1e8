"""Ways to the same numbers: kept rows, matrices turned as they are, halves of products, threads."""

from __future__ import annotations

import dataclasses
import math
import statistics as numbers

import pytest
import torch
from torch import Tensor

from feature_probe import FeatureProbe
from feature_probe.reports.scoring import LayerFacts, score_layer
from feature_probe.theory.factored import row_products
from feature_probe.theory.levels import ChanceLevels, TurnedWeight, shared_weight_level
from feature_probe.theory.relations import LayerStatistics, parse_relations
from feature_probe.theory.spectra import symmetric_values
from feature_probe.theory.threads import calm

CLAMP = 10 * torch.finfo(torch.float64).eps
NAMES = ("fact", "bfact", "fact_sym", "bfact_sym", "nfa", "enfa", "bnfa", "benfa")
#: Of the levels by chance, which are drawn.
DRAWN = ("shared_weight_cosine", "chance_spread", "chance_arctanh_spread")
SHAPES = [(1, 40, 90), (1, 40, 40), (1, 90, 12), (2, 16, 9), (1, 150, 20)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer(shape: tuple[int, int, int], rank: int) -> LayerStatistics:
    """A layer whose K and E come from so many rows."""
    rows = [normal(shape[0], rank, shape[1], seed=seed) for seed in (1, 2)]
    return LayerStatistics(
        weight=normal(*shape), gradient=normal(*shape, seed=3), jacobian=rows[0].mT @ rows[0],
        loss=rows[1].mT @ rows[1], weight_decay=0.1, tolerance=CLAMP,
        rows={"jacobian": rows[0], "loss": rows[1]},
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_rows_give_the_numbers_of_the_sum(shape: tuple[int, int, int]) -> None:
    """Every number of every record but the levels by chance, and those where they use the same."""
    known = layer(shape, rank=5)
    facts, asked = LayerFacts("l", 1, 1, 1), parse_relations(NAMES)
    with_rows, without = (
        score_layer(facts, each, asked, (0.5, 1.0))
        for each in (known, dataclasses.replace(known, rows={}))
    )
    tall = shape[1] > max(shape[2], 128)
    for one, other in zip(with_rows, without, strict=True):
        for name, value in dataclasses.asdict(one).items():
            expected = getattr(other, name)
            if not isinstance(value, float):
                assert value == expected, name
            elif not (tall and name in DRAWN):
                assert value == pytest.approx(expected, rel=1e-8, abs=1e-10, nan_ok=True), name
            elif not math.isnan(value):
                assert value == pytest.approx(expected, abs=0.1), name


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(1, 30, 12), (2, 20, 6), (1, 200, 30)], ids=str)
def test_a_matrix_turned_as_it_is_has_the_level_of_its_eigenvalues(
    shape: tuple[int, int, int], power: float
) -> None:
    """Mean over seeds and spread, as its eigenvectors are any."""
    weight, root = normal(*shape), normal(shape[0], shape[1], shape[1], seed=1)
    k = root.mT @ torch.diag_embed(torch.linspace(1, 9, shape[1]).double() ** -2) @ root
    values, found, expected = symmetric_values(k, CLAMP), [], []
    for seed in range(12):
        found.append(ChanceLevels(TurnedWeight(weight, seed=seed), k, CLAMP).at(power))
        expected.append(shared_weight_level(weight, values, power, CLAMP, seed=seed))
    means = [numbers.fmean(each.cosine for each in levels) for levels in (found, expected)]
    spreads = [numbers.fmean(each.spread for each in levels) for levels in (found, expected)]
    assert means[0] == pytest.approx(means[1], abs=2 * spreads[1] / math.sqrt(12) + 1e-3)
    assert spreads[0] == pytest.approx(spreads[1], rel=0.25)


@pytest.mark.parametrize("count", [3, 511, 512, 515])
def test_products_of_rows_are_whole(count: int) -> None:
    """RRᵀ, of two blocks, and symmetric to the bit where half is mirrored."""
    rows = normal(2, count, 7)
    found = row_products(rows)
    assert torch.allclose(found, rows @ rows.mT, rtol=0, atol=1e-12)
    if count >= 512:
        quarter = -(-count // 4)
        above = found[:, :quarter, quarter:]
        assert torch.equal(above, found[:, quarter:, :quarter].mT)


@pytest.fixture
def two_threads() -> object:
    """Two threads for a test, and what there was before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_decompositions_run_in_one_thread() -> None:
    """And the user's number is there again afterwards, after an exception too."""
    with calm(torch.zeros(8, 8)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with calm(torch.zeros(2, 2000, 2000)):
        assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="inside"), calm(torch.zeros(8, 8)):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_report_leaves_the_threads_alone() -> None:
    """After training with a report at every step."""
    model = torch.nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with FeatureProbe(model, optimizer=optimizer, every=1, window=1, strict=True):
        for _ in range(2):
            model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
            assert torch.get_num_threads() == 2
