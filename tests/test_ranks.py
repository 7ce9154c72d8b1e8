"""Ranks, their correlation and the sample of entries, against scipy and by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from feature_probe.theory.ranks import (
    MOST_ENTRIES,
    Floats,
    average_ranks,
    entry_sample,
    rank_correlation,
    upper_entries,
)

GENERATOR = np.random.default_rng(0)
VECTORS: dict[str, Floats] = {
    "no ties": GENERATOR.normal(size=50),
    "ties": GENERATOR.integers(0, 5, size=60).astype(float),
    "signed zeros": np.array([0.0, -0.0, 1.0, -1.0]),
    "constant": np.full(4, 2.5),
    "two": np.array([3.0, 1.0]),
    "one": np.array([7.0]),
}


@pytest.mark.parametrize("name", VECTORS)
def test_ranks_are_scipys(name: str) -> None:
    """Ranks count from 1 and ties share the mean of theirs, as in scipy.stats.rankdata."""
    assert np.array_equal(average_ranks(VECTORS[name]), scipy.stats.rankdata(VECTORS[name]))


def test_rank_correlation() -> None:
    """It is Pearson's r of the ranks: 1 for one order, −1 for the opposite, NaN for a constant."""
    ranks = average_ranks(VECTORS["no ties"])
    others = average_ranks(GENERATOR.normal(size=50))
    expected = np.corrcoef(ranks, others)[0, 1]
    assert math.isclose(rank_correlation(ranks, others), expected, rel_tol=1e-12)
    assert rank_correlation(ranks, ranks) == 1.0
    assert rank_correlation(ranks, 51 - ranks) == -1.0
    assert math.isnan(rank_correlation(ranks, np.full(50, 25.5)))


@pytest.mark.parametrize(
    ("groups", "size", "blocks", "columns"),
    [
        (1, 10, 1, 10),
        (1, 199, 1, 199),
        (1, 200, 1, 199),
        (1, 4608, 1, 199),
        (4, 200, 1, 199),
        (400, 9, 400, 9),
        (442, 9, 442, 9),
        (443, 9, 442, 9),
        (200_000, 1, MOST_ENTRIES, 1),
        (3, 140, 2, 140),
    ],
)
def test_sample(groups: int, size: int, blocks: int, columns: int) -> None:
    """Everything up to 19,900 entries, otherwise distinct rising indices, always the same."""
    sample, again = entry_sample(groups, size), entry_sample(groups, size)
    for one, other, total, count in (
        (sample.blocks, again.blocks, groups, blocks),
        (sample.columns, again.columns, size, columns),
    ):
        assert np.array_equal(one, other)
        assert len(one) == count
        assert (np.diff(one) > 0).all()
        assert one[0] >= 0
        assert one[-1] < total
    assert len(sample.blocks) * columns * (columns + 1) // 2 <= MOST_ENTRIES


def test_upper_entries() -> None:
    """Entries with i ≤ j, block by block, row by row, unchanged but for rounding."""
    blocks = GENERATOR.normal(size=(2, 3, 3))
    expected = [b[i, j] for b in blocks for i in range(3) for j in range(i, 3)]
    assert np.allclose(upper_entries(blocks), expected, rtol=0, atol=2e-12)


def test_upper_entries_round_by_block() -> None:
    """What differs by rounding becomes equal, on the scale of its own block."""
    one = np.array([[1.0, 1 / 3], [0.0, 1e-17]])
    two = np.array([[1.0, 1 / 3 + 1e-16], [0.0, -1e-18]])
    first, second = upper_entries(one[None]), upper_entries(two[None])
    assert np.array_equal(first, second)
    assert first[2] == 0
    small = upper_entries(np.stack([one, 1e-17 * np.array([[3.0, 2.0], [0.0, 1.0]])]))
    assert len(set(small[3:])) == 3
    assert not upper_entries(np.zeros((1, 2, 2))).any()
