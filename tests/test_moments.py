"""The streaming sums: splits, merging, precision of every input type, and what they hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feature_probe.sums.moments import Moments
from feature_probe.sums.outer import add_gram_, sum_dtype
from feature_probe.theory.precision import reduced_precision

KINDS = ("jacobian", "loss")


def rows_of(count: int, groups: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows ``[rows, groups, d]`` with a mean, so that sums grow."""
    generator = torch.Generator().manual_seed(count + d)
    return (torch.randn(count, groups, d, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def dense_gram(rows: Tensor) -> Tensor:
    """Σ r rᵀ per group in float64."""
    exact = rows.double()
    return torch.einsum("rgi,rgj->gij", exact, exact)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def medium_precision() -> Iterator[None]:
    """The user allows bf16 passes in float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --------------------------------------------------------------------------- splits and merging


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    groups=st.integers(1, 3),
    d=st.integers(1, 4),
)
def test_any_split_of_rows_equals_one_shot(
    kind: str, sizes: list[int], groups: int, d: int
) -> None:
    """Rows added in parts, empty ones included, sum to Σ r rᵀ of all of them."""
    rows = rows_of(sum(sizes), groups, d)
    parts, merged = Moments(), Moments()
    for part in rows.split(sizes):
        parts.add_outer(kind, part)
        single = Moments()
        single.add_outer(kind, part)
        merged.merge(single)
    for moments in (parts, merged):
        total = getattr(moments, kind)
        torch.testing.assert_close(total, dense_gram(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_beyond_one_chunk(groups: int) -> None:
    """More rows than are cast at once add up to the same sum."""
    rows = rows_of(40_000, groups, 2)
    moments = Moments()
    moments.add_outer("loss", rows)
    assert moments.loss is not None
    assert relative(moments.loss, dense_gram(rows)) < 1e-13


def filled(seed: int) -> Moments:
    """Moments with every sum."""
    generator = torch.Generator().manual_seed(seed)
    moments = Moments(jacobian_rows=seed, loss_rows=2 * seed)
    moments.add_gradient(torch.randn(2, 3, 4, generator=generator).double(), weight=seed + 0.5)
    for kind in KINDS:
        moments.add_outer(kind, torch.randn(5, 2, 3, generator=generator).double())
    return moments


def merged(*parts: Moments) -> Moments:
    """The parts merged from left to right, none of them changed."""
    total = Moments()
    for part in parts:
        total.merge(copy.deepcopy(part))
    return total


def assert_equal(a: Moments, b: Moments) -> None:
    """The same sums to rounding, the same counts exactly."""
    for name in ("gradient", "jacobian", "loss"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-13, atol=1e-13)
    assert a.gradient_weight == pytest.approx(b.gradient_weight)
    assert (a.jacobian_rows, a.loss_rows) == (b.jacobian_rows, b.loss_rows)


def test_merging_is_associative_and_commutative() -> None:
    """The order and grouping of merges do not matter, and an empty part changes nothing."""
    a, b, c = filled(1), filled(2), filled(3)
    left = merged(merged(a, b), c)
    assert_equal(left, merged(a, merged(b, c)))
    assert_equal(left, merged(c, b, a))
    assert_equal(left, merged(Moments(), a, Moments(), b, c, Moments()))
    assert left.rows == 12
    assert left.gradient_weight == pytest.approx(1.5 + 2.5 + 3.5)
    gradients = [part.gradient for part in (a, b, c)]
    torch.testing.assert_close(left.gradient, sum(gradients))


def test_merging_nothing_is_nothing() -> None:
    """An empty sum stays None: nothing added is not a sum of zeros."""
    empty = merged(Moments(), Moments())
    assert (empty.gradient, empty.jacobian, empty.loss) == (None, None, None)
    assert (empty.gradient_weight, empty.rows, empty.nbytes()) == (0.0, 0, 0)
    partly = merged(Moments(), filled(1))
    assert partly.jacobian is not None


def test_rows_is_the_larger_count() -> None:
    """`rows` counts the passes behind whichever sum saw more."""
    assert Moments(jacobian_rows=3, loss_rows=5).rows == 5
    assert Moments(jacobian_rows=7).rows == 7


# --------------------------------------------------------------------------- scale and gradient


@pytest.mark.parametrize("scale", [0.5, 3.0, 1e-3])
@pytest.mark.parametrize("groups", [1, 2])
def test_scale_is_on_the_rows(groups: int, scale: float) -> None:
    """A factor on the rows enters squared, and only for the rows it was given with."""
    first, second = rows_of(7, groups, 3), rows_of(5, groups, 3)
    moments = Moments()
    moments.add_outer("jacobian", first, scale)
    moments.add_outer("jacobian", second)
    expected = scale**2 * dense_gram(first) + dense_gram(second)
    torch.testing.assert_close(moments.jacobian, expected, rtol=1e-12, atol=1e-12)


def test_scale_keeps_small_gradients_from_underflow() -> None:
    """Float32 rows of 1e-25 square to zero; scaled first, they do not."""
    rows = torch.full((4, 1, 2), 1e-25)
    plain, scaled = Moments(), Moments()
    plain.add_outer("loss", rows)
    scaled.add_outer("loss", rows, 1e20)
    assert plain.loss is not None
    assert scaled.loss is not None
    assert not plain.loss.any()
    torch.testing.assert_close(scaled.loss, torch.full((1, 2, 2), 4e-10), rtol=1e-5, atol=0.0)


def test_gradients_add_with_their_weights() -> None:
    """Σ w·G and Σ w."""
    a, b = rows_of(2, 3, 4), rows_of(2, 3, 4) * 2
    moments = Moments()
    moments.add_gradient(a, weight=2.0)
    moments.add_gradient(b, weight=0.5)
    torch.testing.assert_close(moments.gradient, 2 * a + 0.5 * b)
    assert moments.gradient_weight == 2.5


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_given_is_neither_kept_nor_changed(dtype: torch.dtype, weight: float) -> None:
    """The tensor may be the live ``param.grad``: it is copied, and later adding leaves it alone."""
    parameter = torch.nn.Parameter(rows_of(2, 3, 4, dtype))
    parameter.grad = rows_of(2, 3, 4, dtype).clone()
    before = parameter.grad.clone()
    moments = Moments()
    for _ in range(2):
        moments.add_gradient(parameter.grad, weight)
        assert moments.gradient is not None
        assert moments.gradient.data_ptr() != parameter.grad.data_ptr()
        assert torch.equal(parameter.grad, before)
    kept = moments.gradient.clone()
    parameter.grad.zero_()
    assert torch.equal(moments.gradient, kept)
    assert torch.equal(kept, (2 * weight * before.double()).to(kept.dtype))


def test_rows_that_require_grad_build_no_graph() -> None:
    """The sums are no part of a graph, and the rows given stay as they are."""
    rows = rows_of(4, 1, 3).requires_grad_()
    before = rows.detach().clone()
    moments = Moments()
    moments.add_outer("jacobian", rows, 2.0)
    moments.add_gradient(rows)
    for total in (moments.jacobian, moments.gradient):
        assert total is not None
        assert not total.requires_grad
    assert torch.equal(rows.detach(), before)


# --------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_dtype_of_the_sums(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    """Sums are float32, or float64 for float64 data."""
    assert sum_dtype(given_dtype) == expected
    moments = Moments()
    moments.add_gradient(rows_of(2, 3, 4, given_dtype))
    for kind in KINDS:
        moments.add_outer(kind, rows_of(4, 2, 3, given_dtype))
    for total in (moments.gradient, moments.jacobian, moments.loss):
        assert total is not None
        assert total.dtype == expected


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_rows_are_summed_in_float32(dtype: torch.dtype, groups: int) -> None:
    """100,000 rows in 400 batches: within 1e-5 of float64 sums of the very same rows."""
    rows = rows_of(100_000, groups, 3, dtype)
    moments = Moments()
    for part in rows.split(250):
        moments.add_outer("loss", part)
    assert moments.loss is not None
    assert moments.loss.dtype == torch.float32
    assert relative(moments.loss, dense_gram(rows)) < 1e-5


def test_a_bfloat16_accumulator_would_stall() -> None:
    """The same sum held in bfloat16 is off by per cents: the check above is no formality."""
    rows = rows_of(100_000, 1, 3, torch.bfloat16)
    stalled = torch.zeros(1, 3, 3, dtype=torch.bfloat16)
    for part in rows.split(250):
        stalled += torch.einsum("rgi,rgj->gij", part, part)
    assert relative(stalled, dense_gram(rows)) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_are_summed_in_float32(dtype: torch.dtype) -> None:
    """1,000 gradients of one size: a bfloat16 sum would stall at 256 of them."""
    gradient = torch.full((1, 2, 2), 0.1, dtype=dtype)
    moments = Moments()
    for _ in range(1000):
        moments.add_gradient(gradient)
    assert moments.gradient is not None
    assert relative(moments.gradient, 1000 * gradient.double()) < 1e-5


def test_float64_rows_keep_float64_precision() -> None:
    """Sums of float64 rows are right to 1e-14, also beside a large common part."""
    rows = rows_of(1000, 2, 3) + 1e4
    moments = Moments()
    moments.add_outer("jacobian", rows)
    assert moments.jacobian is not None
    assert relative(moments.jacobian, dense_gram(rows)) < 1e-14


@pytest.mark.parametrize("groups", [1, 2])
def test_under_autocast_sums_keep_their_precision(groups: int) -> None:
    """Autocast to bfloat16 around the call does not reach the product."""
    rows = rows_of(500, groups, 16, torch.float32)
    moments = Moments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments.add_outer("jacobian", rows)
    assert moments.jacobian is not None
    assert relative(moments.jacobian, dense_gram(rows)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.usefixtures("medium_precision")
def test_reduced_precision_products_do_not_reach_the_sums(groups: int, dtype: torch.dtype) -> None:
    """With float32 products allowed in bf16 passes the sums are still right to 1e-6."""
    rows = rows_of(2000, groups, 64, dtype)
    moments = Moments()
    moments.add_outer("loss", rows, 2.0)
    assert moments.loss is not None
    assert moments.loss.dtype == torch.float32
    assert relative(moments.loss, 4 * dense_gram(rows)) < 1e-6
    assert torch.get_float32_matmul_precision() == "medium"


def test_reduced_precision_is_recognised() -> None:
    """The setting is read each time, and is "highest" by default."""
    device = torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not reduced_precision(device)
    for setting in ("medium", "high"):
        torch.set_float32_matmul_precision(setting)
        try:
            assert reduced_precision(device)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert not reduced_precision(device)


def test_add_gram_in_place() -> None:
    """`add_gram_` adds to the tensor given, which keeps its storage."""
    total = torch.ones(2, 3, 3, dtype=torch.float64)
    pointer, rows = total.data_ptr(), rows_of(6, 2, 3)
    add_gram_(total, rows)
    assert total.data_ptr() == pointer
    torch.testing.assert_close(total, 1 + dense_gram(rows))


# --------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 4), (torch.float64, 8)], ids=str)
def test_nbytes(dtype: torch.dtype, size: int) -> None:
    """Bytes of the sums that are there, in the type they are held in."""
    moments = Moments()
    assert moments.nbytes() == 0
    moments.add_gradient(rows_of(2, 3, 5, dtype))
    assert moments.nbytes() == 2 * 3 * 5 * size
    moments.add_outer("jacobian", rows_of(7, 2, 3, dtype))
    assert moments.nbytes() == (30 + 2 * 9) * size
    moments.add_outer("loss", rows_of(7, 2, 3, dtype))
    assert moments.nbytes() == (30 + 2 * 2 * 9) * size


def few(*counts: int, width: int = 64, groups: int = 2) -> list[Tensor]:
    """Rows ``[count, groups, width]``, in float64."""
    generator = torch.Generator().manual_seed(len(counts))
    shape = (groups, width)
    return [
        torch.randn((count, *shape), generator=generator, dtype=torch.float64) for count in counts
    ]


def outer(rows: list[Tensor]) -> Tensor:
    """Σ r rᵀ per group, row by row."""
    return sum(torch.einsum("gi,gj->gij", row, row) for block in rows for row in block)  # type: ignore[return-value]


@pytest.mark.parametrize("counts", [(16,), (4, 4, 8), (17,), (4, 8, 5), (8, 8, 1, 30)])
def test_few_rows_are_kept_as_they_are(counts: tuple[int, ...]) -> None:
    """Up to d/4 rows take their own bytes, more take those of the sum; the sum is the same."""
    rows = few(*counts)
    moments, parts = Moments(), [Moments() for _ in counts]
    for block, part in zip(rows, parts, strict=True):
        moments.add_outer("loss", block, 0.5)
        part.add_outer("loss", block, 0.5)
    kept = sum(counts) <= 16
    size = 8 * 2 * (64 * sum(counts) if kept else 64 * 64)
    assert moments.nbytes() == size
    merged = Moments()
    for part in parts:
        merged.merge(part)
    assert merged.nbytes() == size
    for found in (moments, merged):
        torch.testing.assert_close(found.loss, 0.25 * outer(rows), rtol=1e-12, atol=1e-12)
        assert found.nbytes() == 8 * 2 * 64 * 64
        assert found.jacobian is None


def test_kept_rows_are_copies_and_are_scaled_like_their_sum() -> None:
    """What was given may change afterwards; a factor acts on rows and on sums alike."""
    (rows,) = few(6)
    expected = 3 * outer([rows])
    for factor in (3.0, torch.tensor(3.0)):
        moments, given = Moments(), rows.clone()
        moments.add_outer("jacobian", given)
        given.zero_()
        moments.scale_outer(factor, "jacobian")
        moments.scale_outer(100.0, "loss")
        torch.testing.assert_close(moments.jacobian, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taken", [True, False])
def test_kept_rows_of_a_step_that_may_be_skipped(taken: bool) -> None:
    """Masked rows are zeros whatever they held, NaN included."""
    (rows,) = few(6)
    moments = Moments()
    moments.add_outer("loss", rows if taken else rows * float("nan"))
    masked = moments.masked(torch.tensor(taken))
    torch.testing.assert_close(masked.loss, outer([rows]) * taken, rtol=1e-12, atol=1e-12)


def test_a_state_keeps_kept_rows() -> None:
    """Bit for bit what it would have been without stopping, and independent of the original."""
    one, two = few(6, 6)
    whole, stopped = Moments(), Moments()
    for moments in (whole, stopped):
        moments.add_outer("loss", one)
    resumed = Moments.from_state(stopped.state_dict()).map(torch.clone)
    assert resumed.nbytes() == stopped.nbytes() == 8 * 2 * 64 * 6
    for moments in (whole, resumed):
        moments.add_outer("loss", two)
    assert resumed.loss is not None
    assert torch.equal(resumed.loss, whole.loss)
    torch.testing.assert_close(stopped.loss, outer([one]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [512, 700])
def test_wide_sums_are_whole_when_read(width: int) -> None:
    """Formed above the diagonal alone, they are symmetric and right wherever they come out."""
    rows = [rows_of(count, 1, width, torch.float32) for count in (600, 601, 602)]
    one, other = Moments(), Moments()
    one.add_outer("loss", rows[0])
    other.add_outer("loss", rows[1])
    back = Moments.from_state(one.state_dict())
    back.merge(other)
    back.add_outer("loss", rows[2])
    assert back.loss is not None
    assert torch.equal(back.loss, back.loss.mT)
    assert relative(back.loss, dense_gram(torch.cat(rows))) < 1e-5
