"""Spearman's rank correlation over the entries of block-diagonal matrices, or a fixed sample.

Plain arrays in, plain numbers out; which entries are taken is decided here, so that both sides of a
comparison, and every comparison of a layer, use the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Columns of a block up to which all its entries are ranked.
MOST_COLUMNS = 199
#: Most entries ranked: those with i ≤ j of one block of that side.
MOST_ENTRIES = MOST_COLUMNS * (MOST_COLUMNS + 1) // 2
#: Entries of a block closer than its largest times 2⁻⁴⁰ differ by rounding: they count as equal.
_GRID_BITS = 40
_SEED = 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """The entries that are ranked: i ≤ j among ``columns``, in each of ``blocks``.

    Attributes:
        blocks: Indices of the blocks taken, rising.
        columns: Indices of the rows and columns taken in each of them, rising.
    """

    blocks: NDArray[np.int64]
    columns: NDArray[np.int64]


def entry_sample(groups: int, size: int) -> Sample:
    """Which entries of ``groups`` blocks of side ``size`` are ranked: at most 19,900.

    All of them where they are no more. Otherwise the principal submatrix of 199 indices, drawn at
    random, of a block with more columns than that (the diagonal then weighs 2/200 of the entries
    instead of 2/(d + 1)), and of the blocks as many, drawn at random, as fit: good to 0.01. The
    draws are those of a generator of their own with a fixed seed: one layer has one sample, always.
    """
    generator = np.random.default_rng(_SEED)
    columns = _drawn(size, min(size, MOST_COLUMNS), generator)
    entries = len(columns) * (len(columns) + 1) // 2
    return Sample(_drawn(groups, min(groups, MOST_ENTRIES // entries), generator), columns)


def _drawn(total: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    if count == total:
        return np.arange(total, dtype=np.int64)
    return np.sort(generator.choice(total, size=count, replace=False)).astype(np.int64)


def upper_entries(blocks: Floats) -> Floats:
    """The entries with i ≤ j of blocks ``[b, m, m]``, as one vector, rounding taken off.

    Each block's entries are rounded to a grid of 2⁻⁴⁰ of its largest, so that equal numbers that
    were computed along different ways are ties and the zeros of an eigenvalue problem are zero.
    """
    rows, columns = np.triu_indices(blocks.shape[-1])
    entries = blocks[:, rows, columns]
    _, exponents = np.frexp(np.abs(entries).max(axis=1, keepdims=True, initial=0.0))
    rounded: Floats = np.ldexp(
        np.rint(np.ldexp(entries, _GRID_BITS - exponents)), exponents - _GRID_BITS
    )
    return rounded.ravel()


def average_ranks(values: Floats) -> Floats:
    """Ranks 1..m of a vector, ties sharing the mean of theirs. Cost: one sort."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


def rank_correlation(ranks: Floats, others: Floats) -> float:
    """Pearson's r of two vectors of ranks; NaN where one of them is constant."""
    one, other = ranks - ranks.mean(), others - others.mean()
    norm = float(np.sqrt((one @ one) * (other @ other)))
    if norm == 0:
        return float("nan")
    return max(-1.0, min(1.0, float(one @ other) / norm))
