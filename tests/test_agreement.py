"""Scores against dense formulas and Monte Carlo, their invariances, and when they are NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feature_probe.theory.agreement import Agreement, compare, undefined
from feature_probe.theory.factored import Factored, framed_rows

SCORES = ("pearson", "cosine", "trace_free_cosine", "chance_cosine")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def full(matrix: Tensor) -> Factored:
    """Dense blocks ``[groups, d, d]`` as a factored matrix."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return Factored(identity.expand(len(matrix), -1, -1), matrix)


def gram(groups: int, k: int, d: int, seed: int = 0) -> Tensor:
    """WᵀW of a random W, dense."""
    rows = normal(groups, k, d, seed=seed)
    return rows.mT @ rows


def related(a: Tensor, noise: float, seed: int = 1) -> Tensor:
    """``a`` and some noise, not symmetric."""
    return a + noise * normal(*a.shape, seed=seed)


#: Measured and predicted blocks ``[groups, d, d]``.
PAIRS: dict[str, tuple[Tensor, Tensor]] = {
    "independent Grams": (gram(1, 4, 6), gram(1, 3, 6, seed=1)),
    "related": (gram(1, 4, 6), related(gram(1, 4, 6), 0.5)),
    "not symmetric": (gram(1, 4, 6), normal(1, 6, 6, seed=3)),
    "opposite": (gram(1, 4, 6), -related(gram(1, 4, 6), 0.1)),
    "wide": (gram(1, 40, 5), gram(1, 50, 5, seed=2)),
    "rank one": (gram(1, 1, 5), gram(1, 1, 5, seed=2)),
    "two by two": (gram(1, 3, 2), gram(1, 3, 2, seed=2)),
    "groups": (gram(3, 4, 5), gram(3, 2, 5, seed=1)),
    "groups, related": (gram(3, 4, 5), related(gram(3, 4, 5), 0.5)),
    "groups of unequal scale": (
        gram(2, 4, 3) * torch.tensor([1.0, 30.0])[:, None, None],
        gram(2, 4, 3, seed=1) * torch.tensor([5.0, 0.1])[:, None, None],
    ),
    "zero in one group": (gram(2, 4, 3) * torch.tensor([1.0, 0.0])[:, None, None], gram(2, 4, 3)),
}
ALL_PAIRS = pytest.mark.parametrize("name", PAIRS)


def scores(name: str) -> Agreement:
    """The library's scores of a named pair."""
    a, x = PAIRS[name]
    return compare(full(a), full(x))


def numbers(agreement: Agreement) -> tuple[float, ...]:
    """The scores that do not carry a unit."""
    return tuple(getattr(agreement, name) for name in SCORES)


# --------------------------------------------------------------------------- dense formulas


@ALL_PAIRS
def test_pearson_is_numpys(name: str) -> None:
    """Pearson is numpy's r over the entries inside the blocks, and only those."""
    a, x = (matrix.flatten().numpy() for matrix in PAIRS[name])
    assert math.isclose(scores(name).pearson, np.corrcoef(a, x)[0, 1], abs_tol=1e-12)


@ALL_PAIRS
def test_cosine_and_scale(name: str) -> None:
    """The cosine is of the entries as a vector; the scale is numpy's least squares A ≈ c·X."""
    a, x = (matrix.flatten().numpy() for matrix in PAIRS[name])
    cosine = a @ x / (np.linalg.norm(a) * np.linalg.norm(x))
    assert math.isclose(scores(name).cosine, cosine, abs_tol=1e-12)
    fit = np.linalg.lstsq(x[:, None], a, rcond=None)[0][0]
    assert math.isclose(scores(name).scale, fit, rel_tol=1e-10)


@ALL_PAIRS
def test_trace_free_cosine(name: str) -> None:
    """The trace-free cosine is that of the blocks less their mean diagonal."""
    parts = []
    for matrix in PAIRS[name]:
        blocks = [m.numpy() - np.trace(m.numpy()) / len(m) * np.eye(len(m)) for m in matrix]
        parts.append(np.concatenate([block.ravel() for block in blocks]))
    a, x = parts
    expected = a @ x / (np.linalg.norm(a) * np.linalg.norm(x))
    assert math.isclose(scores(name).trace_free_cosine, expected, abs_tol=1e-12)


@ALL_PAIRS
def test_nothing_is_undefined(name: str) -> None:
    """These pairs have all scores, and no reason; 2 × 2 have one entry off the diagonal, twice."""
    alone = "off-diagonal Pearson undefined: no two different entries off the diagonal"
    assert scores(name).reason == (alone if name == "two by two" else "")
    assert all(math.isfinite(number) for number in (*numbers(scores(name)), scores(name).scale))


def test_entries_outside_the_blocks_are_no_data() -> None:
    """A block-diagonal matrix written out with its zeros has another Pearson: they do not count."""
    a, x = PAIRS["groups"]
    padded = [torch.block_diag(*matrix)[None] for matrix in (a, x)]
    inside, outside = scores("groups"), compare(full(padded[0]), full(padded[1]))
    assert math.isclose(inside.cosine, outside.cosine, abs_tol=1e-12)
    assert abs(inside.pearson - outside.pearson) > 0.01


def test_of_itself() -> None:
    """A matrix agrees with itself fully, at scale 1, and the scores do not exceed 1."""
    a = full(gram(2, 3, 5))
    agreement = compare(a, a)
    for name in ("pearson", "cosine", "trace_free_cosine"):
        assert 1 - 1e-14 < getattr(agreement, name) <= 1
    assert math.isclose(agreement.scale, 1.0, rel_tol=1e-14)
    assert agreement.chance_cosine < 0.9


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3), d=st.integers(2, 5))
def test_scores_stay_within_one(seed: int, groups: int, d: int) -> None:
    """Cosine, Pearson, trace-free and chance cosine lie in [−1, 1] for nearly equal matrices."""
    a = gram(groups, 2, d, seed=seed)
    agreement = compare(full(a), full(a * (seed + 0.1) / 7))
    assert all(-1 <= number <= 1 for number in numbers(agreement)[:3])
    assert agreement.chance_cosine <= 1 + 1e-15


# --------------------------------------------------------------------------- further views


@ALL_PAIRS
def test_off_diagonal_pearson_is_numpys(name: str) -> None:
    """The off-diagonal Pearson is numpy's r over the entries with i ≠ j inside the blocks."""
    d = PAIRS[name][0].shape[-1]
    away = ~torch.eye(d, dtype=torch.bool)
    a, x = (matrix[:, away].flatten().numpy() for matrix in PAIRS[name])
    got = scores(name).off_diagonal_pearson
    if name == "two by two":
        assert math.isnan(got)
    else:
        assert math.isclose(got, np.corrcoef(a, x)[0, 1], abs_tol=1e-11)


@ALL_PAIRS
def test_spearman_is_scipys(name: str) -> None:
    """Spearman is scipy's over the entries with i ≤ j inside the blocks, ties included."""
    a, x = (
        np.concatenate([block.numpy()[np.triu_indices(len(block))] for block in matrix])
        for matrix in PAIRS[name]
    )
    expected = scipy.stats.spearmanr(a, x).statistic
    assert math.isclose(scores(name).spearman, expected, abs_tol=1e-12)


def test_spearman_of_a_monotone_function_is_one() -> None:
    """Spearman sees the order alone, Pearson the values too."""
    a = gram(1, 4, 6)
    agreement = compare(full(a), full(a.pow(3)))
    assert agreement.spearman == 1.0
    assert agreement.pearson < 0.99


def test_spearman_of_wide_blocks_is_of_a_sample() -> None:
    """Of 600 columns 199 are taken, the same of both sides: near the value over all entries."""
    a, x = gram(1, 5, 600), related(gram(1, 5, 600), 2.0)
    upper = np.triu_indices(600)
    expected = scipy.stats.spearmanr(a[0].numpy()[upper], x[0].numpy()[upper]).statistic
    got = compare(full(a), full(x)).spearman
    assert 0.3 < expected < 0.8
    assert got != expected
    assert abs(got - expected) < 0.02
    assert compare(full(a), full(a * 3)).spearman == 1.0


def test_spearman_of_many_blocks_is_of_a_sample() -> None:
    """Of 3000 blocks of 9 × 9 (45 entries each) 442 are taken, the same of both sides."""
    a = gram(3000, 2, 9)
    x = related(a, 2.0)
    upper = np.triu_indices(9)
    one, two = (matrix.numpy()[:, upper[0], upper[1]].ravel() for matrix in (a, x))
    expected = scipy.stats.spearmanr(one, two).statistic
    assert abs(compare(full(a), full(x)).spearman - expected) < 0.01
    assert compare(full(a), full(a * 3)).spearman == 1.0


def test_rounding_is_no_order() -> None:
    """Zeros that an eigenvalue problem leaves at 1e-17 tie, so that Spearman has nothing to say."""
    a = gram(1, 4, 6)
    identity = torch.eye(6, dtype=torch.float64)[None]
    exact = compare(full(a), full(identity)).spearman
    noisy = compare(full(a), full(identity + 1e-16 * normal(1, 6, 6))).spearman
    assert math.isclose(exact, noisy, rel_tol=1e-12)


def test_what_the_further_views_cannot_say() -> None:
    """Blocks of one entry have none off the diagonal; constant ones have no order."""
    single = compare(full(gram(4, 2, 1)), full(gram(4, 3, 1, seed=1)))
    assert math.isnan(single.off_diagonal_pearson)
    assert "off-diagonal" in single.reason
    assert single.chance_spread == 0
    assert math.isclose(single.chance_cosine, single.cosine)
    ones = torch.ones(1, 4, 4, dtype=torch.float64)
    constant = compare(full(gram(1, 3, 4)), full(ones))
    assert math.isnan(constant.spearman)
    assert "Pearson and Spearman undefined" in constant.reason
    diagonal = compare(
        full(gram(1, 3, 4)), full(torch.diag_embed(torch.arange(1.0, 5)[None]).double())
    )
    assert math.isnan(diagonal.off_diagonal_pearson)
    assert math.isfinite(diagonal.spearman)


@ALL_PAIRS
def test_chance_spread_is_that_over_rotations(name: str) -> None:
    """The closed form is the standard deviation over random rotations of the blocks' bases."""
    a, x = PAIRS[name]
    q = rotations(len(a), a.shape[-1], 4000)
    cosines = torch.einsum("gij,ngij->n", a, q @ x @ q.mT) / (a.norm() * x.norm())
    # heavy tails in small blocks: five standard errors of a standard deviation
    kurtosis = float(((cosines - cosines.mean()) / cosines.std()).pow(4).mean())
    allowed = 5 * math.sqrt((kurtosis - 1) / 4 / len(cosines))
    assert math.isclose(scores(name).chance_spread, float(cosines.std()), rel_tol=allowed)


def test_chance_spread_of_matrices_that_are_not_symmetric() -> None:
    """Antisymmetric parts of both sides add to the spread what the closed form says."""
    a, x = normal(2, 4, 4), normal(2, 4, 4, seed=1)
    q = rotations(2, 4, 4000)
    cosines = torch.einsum("gij,ngij->n", a, q @ x @ q.mT) / (a.norm() * x.norm())
    got = compare(full(a), full(x)).chance_spread
    assert math.isclose(got, float(cosines.std()), rel_tol=0.06)


def test_single_entries_in_a_frame_need_a_lift() -> None:
    """A matrix in a frame has no diagonal of its own, and says so."""
    rows, frame = framed_rows(normal(1, 2, 5))
    with pytest.raises(ValueError, match="no single entries unless it is lifted"):
        compare(Factored.gram(rows, frame), Factored.gram(rows, frame))


VIEWS = (*SCORES, "off_diagonal_pearson", "spearman", "chance_spread")


@pytest.mark.parametrize("scale", [1e-200, 1e-180, 1e150, 1e200])
@ALL_PAIRS
def test_no_scale_is_too_small_or_too_large(name: str, scale: float) -> None:
    """Entries of 1e-200 and 1e200 give the scores of ordinary ones; only `scale` may be lost."""
    a, x = PAIRS[name]
    plain = [getattr(scores(name), view) for view in VIEWS]
    for one, other in ((a * scale, x), (a, x * scale), (a * scale, x * scale)):
        agreement = compare(full(one), full(other))
        got = [getattr(agreement, view) for view in VIEWS]
        assert got == pytest.approx(plain, abs=1e-12, nan_ok=True)
    assert math.isclose(agreement.scale, scores(name).scale, rel_tol=1e-12)


def test_a_scale_out_of_range_is_nan() -> None:
    """Where floating point has no such c it is NaN, not 0 or infinity, and the cosine stands."""
    a, x = PAIRS["related"]
    for one, other in ((a * 1e200, x * 1e-200), (a * 1e-200, x * 1e200)):
        agreement = compare(full(one), full(other))
        assert math.isnan(agreement.scale)
        assert "scale out of the range" in agreement.reason
        assert math.isclose(agreement.cosine, scores("related").cosine)


# --------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 7.0, 1e15])
@ALL_PAIRS
def test_positive_scale_changes_nothing(name: str, scale: float) -> None:
    """No score but `scale` depends on a positive factor of either side."""
    a, x = PAIRS[name]
    plain = scores(name)
    for one, other, expected in (
        (a * scale, x, plain.scale * scale),
        (a, x * scale, plain.scale / scale),
    ):
        scaled = compare(full(one), full(other))
        assert numbers(scaled) == pytest.approx(numbers(plain), abs=1e-12)
        assert math.isclose(scaled.scale, expected, rel_tol=1e-12)


@ALL_PAIRS
def test_negation_turns_every_sign(name: str) -> None:
    """Negating the prediction negates every score."""
    a, x = PAIRS[name]
    assert numbers(compare(full(a), full(-x))) == pytest.approx(
        tuple(-number for number in numbers(scores(name))), abs=1e-12
    )


def rotations(groups: int, d: int, count: int, seed: int = 0) -> Tensor:
    """Haar-random orthogonal matrices ``[count, groups, d, d]``."""
    q, r = torch.linalg.qr(normal(count, groups, d, d, seed=seed))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


@ALL_PAIRS
def test_rotation_of_the_basis(name: str) -> None:
    """One rotation of both sides leaves the cosines and changes Pearson."""
    a, x = PAIRS[name]
    q = rotations(len(a), a.shape[-1], 1, seed=5)[0]
    turned = compare(full(q @ a @ q.mT), full(q @ x @ q.mT))
    plain = scores(name)
    for score in ("cosine", "trace_free_cosine", "chance_cosine", "scale"):
        assert math.isclose(getattr(turned, score), getattr(plain, score), abs_tol=1e-11), score
    assert abs(turned.pearson - plain.pearson) > 1e-5


@ALL_PAIRS
def test_transposing_both_changes_nothing(name: str) -> None:
    """The scores are those of the transposes, and but for `scale` of the sides exchanged."""
    a, x = PAIRS[name]
    plain = numbers(scores(name))
    assert numbers(compare(full(a.mT), full(x.mT))) == pytest.approx(plain, abs=1e-12)
    assert numbers(compare(full(x), full(a))) == pytest.approx(plain, abs=1e-12)


@ALL_PAIRS
def test_any_factorisation_gives_the_same_scores(name: str) -> None:
    """The scores are of the matrix, not of the factors it is given by."""
    a, x = PAIRS[name]
    d = a.shape[-1]
    mixing = normal(d + 2, d, seed=9)
    inverse = torch.linalg.pinv(mixing)
    again = Factored((x @ inverse).mT, mixing.expand(len(x), -1, -1))
    torch.testing.assert_close(again.dense(), x)
    assert numbers(compare(full(a), again)) == pytest.approx(numbers(scores(name)), abs=1e-11)


# --------------------------------------------------------------------------- levels by chance


@pytest.mark.parametrize("name", [name for name in PAIRS if "group" not in name])
def test_cosine_splits_into_trace_and_shape(name: str) -> None:
    """MATH §3: cos = t_A t_X + √(1−t_A²) √(1−t_X²) cos₀ with t = tr/(√d‖·‖), for one block."""
    a, x = (matrix[0] for matrix in PAIRS[name])
    t_a, t_x = (float(m.trace() / (len(m) ** 0.5 * m.norm())) for m in (a, x))
    got = scores(name)
    shape = math.sqrt(1 - t_a**2) * math.sqrt(1 - t_x**2) * got.trace_free_cosine
    assert math.isclose(got.cosine, t_a * t_x + shape, abs_tol=1e-12)
    assert math.isclose(got.chance_cosine, t_a * t_x, abs_tol=1e-12)


@ALL_PAIRS
def test_chance_cosine_is_the_mean_over_rotations(name: str) -> None:
    """The closed form is the Monte Carlo mean over random rotations of the blocks' bases."""
    a, x = PAIRS[name]
    q = rotations(len(a), a.shape[-1], 4000)
    turned = q @ x @ q.mT
    cosines = torch.einsum("gij,ngij->n", a, turned) / (a.norm() * x.norm())
    error = float(cosines.std() / len(cosines) ** 0.5)
    assert error < 0.01
    assert abs(scores(name).chance_cosine - float(cosines.mean())) < 4.5 * error


def test_chance_cosine_of_groups_is_not_the_global_formula() -> None:
    """The traces multiply block by block; the product of the whole traces is another number."""
    a, x = PAIRS["groups of unequal scale"]
    traces = [float(torch.einsum("gii->", matrix)) for matrix in (a, x)]
    wrong = traces[0] * traces[1] / (6 * float(a.norm() * x.norm()))
    assert abs(scores("groups of unequal scale").chance_cosine - wrong) > 0.05


# --------------------------------------------------------------------------- NaN with a reason


def assert_all_nan(agreement: Agreement) -> None:
    """Every number is NaN and a reason is given."""
    assert agreement.reason
    assert all(math.isnan(number) for number in (*numbers(agreement), agreement.scale))


def poisoned(value: float) -> Tensor:
    """A Gram matrix with one entry spoilt."""
    matrix = gram(1, 3, 4)
    matrix[0, 1, 2] = value
    return matrix


ZERO = torch.zeros(1, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "x", "reason"),
    [
        (gram(1, 3, 1), gram(1, 2, 1), "1 × 1"),
        (ZERO, gram(1, 3, 4), "weight is zero"),
        (gram(1, 3, 4), ZERO, "predicted matrix is zero"),
        (ZERO, ZERO, "weight is zero"),
        (poisoned(math.nan), gram(1, 3, 4), "not finite"),
        (gram(1, 3, 4), poisoned(math.nan), "not finite"),
        (gram(1, 3, 4), poisoned(math.inf), "not finite"),
        (poisoned(-math.inf), gram(1, 3, 4), "not finite"),
    ],
    ids=["1x1", "W zero", "X zero", "both zero", "NaN in A", "NaN in X", "inf in X", "inf in A"],
)
def test_nothing_is_defined(a: Tensor, x: Tensor, reason: str) -> None:
    """Where no score is defined all are NaN, with the reason."""
    agreement = compare(full(a), full(x))
    assert_all_nan(agreement)
    assert reason in agreement.reason


@pytest.mark.parametrize("swap", [False, True], ids=["X constant", "A constant"])
def test_constant_entries_have_no_pearson(swap: bool) -> None:
    """A matrix of equal entries has no variance: Pearson is NaN, the cosine is not."""
    constant, other = full(torch.full((1, 4, 4), 0.3, dtype=torch.float64)), full(gram(1, 3, 4))
    agreement = compare(constant, other) if swap else compare(other, constant)
    assert math.isnan(agreement.pearson)
    assert "Pearson" in agreement.reason
    assert "equal" in agreement.reason
    defined = (agreement.cosine, agreement.trace_free_cosine, agreement.chance_cosine)
    assert all(map(math.isfinite, (*defined, agreement.scale)))


@pytest.mark.parametrize("factor", [1.0, 1e-10, 1e15, -2.0])
@pytest.mark.parametrize("swap", [False, True], ids=["X spherical", "A spherical"])
def test_a_multiple_of_the_identity_has_no_trace_free_cosine(swap: bool, factor: float) -> None:
    """c·I is all trace: the trace-free cosine is NaN, cosine and Pearson are not."""
    sphere = full(factor * torch.eye(4, dtype=torch.float64)[None])
    other = full(gram(1, 3, 4))
    agreement = compare(sphere, other) if swap else compare(other, sphere)
    assert math.isnan(agreement.trace_free_cosine)
    assert "identity" in agreement.reason
    assert math.isclose(agreement.cosine, agreement.chance_cosine, rel_tol=1e-12)
    assert math.isfinite(agreement.pearson)


def test_a_multiple_of_the_identity_up_to_rounding() -> None:
    """Rounding around c·I, or around equal entries, is not shape: NaN, not some number."""
    identity = torch.eye(6, dtype=torch.float64)
    for seed in range(20):
        q = rotations(1, 6, 1, seed=seed)[0]
        sphere = 3.7 * q @ q.mT
        assert not torch.equal(sphere, 3.7 * identity[None])
        assert math.isnan(compare(full(gram(1, 3, 6)), full(sphere)).trace_free_cosine)
        constant = 3.7 * (1 + 1e-15 * normal(1, 6, 6, seed=seed))
        assert math.isnan(compare(full(gram(1, 3, 6)), full(constant)).pearson)


def test_blocks_of_side_one() -> None:
    """Blocks of one entry each: Pearson and cosine over the blocks, no trace-free cosine."""
    a = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    x = torch.tensor([2.0, 5.0, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    agreement = compare(full(a), full(x))
    assert math.isclose(agreement.pearson, np.corrcoef(a.flatten(), x.flatten())[0, 1])
    assert math.isclose(agreement.cosine, agreement.chance_cosine)
    assert math.isnan(agreement.trace_free_cosine)
    assert "trace-free" in agreement.reason


def test_undefined_keeps_its_reason() -> None:
    """`undefined` is NaN throughout, with the words given."""
    assert_all_nan(undefined("for a test"))
    assert undefined("for a test").reason == "for a test"


@pytest.mark.parametrize(
    "make",
    [lambda m: full(m), lambda m: Factored.gram(m), lambda m: Factored.gram(m).thin()],
    ids=["dense", "gram", "thin"],
)
def test_zero_is_zero_in_every_form(make: Callable[[Tensor], Factored]) -> None:
    """A zero prediction is recognised however it is factored."""
    agreement = compare(full(gram(1, 3, 4)), make(ZERO))
    assert agreement.reason == "predicted matrix is zero"
