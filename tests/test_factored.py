"""`factored` against the same formulas on dense matrices, in float64, on named inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feature_probe.theory.factored import Factored, framed_rows
from feature_probe.theory.spectra import gram_spectrum, polar_root, symmetric_spectrum

CLAMP = 10 * torch.finfo(torch.float64).eps
POWERS = (1 / 3, 0.5, 1.0, 2.0)
SCALES = (1e-10, 1e-5, 1e8, 1e15)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def deficient(groups: int, k: int, d: int, rank: int, seed: int = 0) -> Tensor:
    """``[groups, k, d]`` of the given rank."""
    return normal(groups, k, rank, seed=seed) @ normal(groups, rank, d, seed=seed + 1)


#: Factors (L, R), each ``[groups, k, d]``; X = LᵀR is not symmetric unless both are one tensor.
FACTORS: dict[str, tuple[Tensor, Tensor]] = {
    "k < d": (normal(1, 3, 7), normal(1, 3, 7, seed=1)),
    "k > d": (normal(1, 9, 4), normal(1, 9, 4, seed=1)),
    "k = d": (normal(1, 5, 5), normal(1, 5, 5, seed=1)),
    "one row": (normal(1, 1, 6), normal(1, 1, 6, seed=1)),
    "one column": (normal(1, 4, 1), normal(1, 4, 1, seed=1)),
    "groups, k < d": (normal(3, 2, 5), normal(3, 2, 5, seed=1)),
    "groups, k > d": (normal(3, 6, 2), normal(3, 6, 2, seed=1)),
    "rank 0": (torch.zeros(1, 3, 5, dtype=torch.float64), normal(1, 3, 5)),
    "rank 0 in one group": (normal(2, 3, 4) * torch.tensor([1.0, 0.0])[:, None, None],) * 2,
    "rank deficient": (deficient(1, 6, 5, 2), deficient(1, 6, 5, 3, seed=4)),
    "gram, k < d": (normal(1, 3, 6),) * 2,
    "gram, k > d": (normal(2, 6, 3),) * 2,
    "symmetric, indefinite": (normal(1, 4, 5), normal(1, 4, 5) * torch.tensor([1.0, -2, 3, -1])[
        None, :, None]),
    **{f"scale {c:g}": (normal(1, 3, 7) * c, normal(1, 3, 7, seed=1)) for c in SCALES},
    **{f"groups, scale {c:g}": (normal(2, 7, 3) * c,) * 2 for c in SCALES},
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", FACTORS)


def factored(name: str) -> Factored:
    """The named input."""
    return Factored(*FACTORS[name])


def dense(name: str) -> Tensor:
    """The named input in full, block by block."""
    left, right = FACTORS[name]
    return torch.stack([a.T @ b for a, b in zip(left, right, strict=True)])


def partner(name: str) -> tuple[Factored, Tensor]:
    """Another matrix of the same blocks, with another number of rows: factored and in full."""
    groups, k, d = FACTORS[name][0].shape
    left, right = normal(groups, k + 2, d, seed=7), normal(groups, k + 2, d, seed=8)
    return Factored(left, right), torch.einsum("gki,gkj->gij", left, right)


def close(actual: Tensor, expected: Tensor, scale: Tensor, tolerance: float = 1e-12) -> None:
    """Equal to rounding, relative to the size of what was added up."""
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(scale), (actual, expected)


# --------------------------------------------------------------------------- Factored


@NAMES
def test_dense(name: str) -> None:
    """`dense` is LᵀR of every block."""
    close(factored(name).dense(), dense(name), dense(name).norm())


@NAMES
def test_shape_properties(name: str) -> None:
    """`groups` and `size` are the number and the side of the blocks; `is_gram` is identity."""
    left, right = FACTORS[name]
    assert (factored(name).groups, factored(name).size) == (left.shape[0], left.shape[2])
    assert factored(name).is_gram is (left is right)


@NAMES
def test_inner(name: str) -> None:
    """⟨X, Y⟩ is the sum of the products of entries inside the blocks, and symmetric in X and Y."""
    x, (other, y) = factored(name), partner(name)
    size = dense(name).norm() * y.norm()
    close(x.inner(other), (dense(name) * y).sum(), size)
    close(other.inner(x), (dense(name) * y).sum(), size)


@NAMES
def test_inner_with_a_gram(name: str) -> None:
    """⟨X, Y⟩ with a Gram matrix Y is right, whether X is one or not."""
    groups, k, d = FACTORS[name][0].shape
    rows = normal(groups, k + 1, d, seed=9)
    y = rows.mT @ rows
    expected = (dense(name) * y).sum()
    close(factored(name).inner(Factored.gram(rows)), expected, dense(name).norm() * y.norm())


@NAMES
def test_squared_norm(name: str) -> None:
    """‖X‖² is the sum of squares, never negative."""
    norm = factored(name).squared_norm()
    assert norm >= 0
    close(norm, dense(name).square().sum(), dense(name).square().sum())


@NAMES
def test_traces_and_total(name: str) -> None:
    """Traces are by block, the total is over the entries inside all blocks."""
    x, full = factored(name), dense(name)
    left, right = FACTORS[name]
    size = left.norm() * right.norm() * x.size
    close(x.traces(), torch.stack([block.diag().sum() for block in full]), size)
    close(x.total(), full.sum(), size)


@NAMES
def test_a_known_inner_gram_of_the_left_factor_is_used(name: str) -> None:
    """With LLᵀ given, inner products of matrices that share L are the same."""
    left, right = FACTORS[name]
    x = Factored(left, right, left_gram=left @ left.mT)
    y = Factored(left, normal(*right.shape, seed=5))
    gram = Factored(left, left, left_gram=left @ left.mT)
    for other in (y, Factored.gram(left), partner(name)[0]):
        size = dense(name).norm() * other.dense().norm()
        close(x.inner(other), (dense(name) * other.dense()).sum(), size)
        size = gram.dense().norm() * other.dense().norm()
        close(gram.inner(other), (gram.dense() * other.dense()).sum(), size)


@NAMES
def test_thin(name: str) -> None:
    """`thin` is the same matrix with at most d rows; a Gram matrix that is thin stays one."""
    x = factored(name)
    thin = x.thin()
    assert thin.left.shape[1] == thin.right.shape[1] <= x.size
    close(thin.dense(), dense(name), dense(name).norm())
    close(thin.inner(x), dense(name).square().sum(), dense(name).square().sum())
    if x.left.shape[1] <= x.size:
        assert thin is x


def test_thin_of_many_rows_is_rank_free() -> None:
    """A factor with more rows than columns costs no more than the dense block afterwards."""
    thin = Factored.gram(normal(2, 50, 3)).thin()
    assert thin.left.shape == thin.right.shape == (2, 3, 3)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_moderated(scale: float) -> None:
    """2ᵉ·Y is the matrix exactly, and Y has ordinary entries and the right LLᵀ, if it has one."""
    left, right = normal(1, 3, 7), normal(1, 3, 7, seed=1)
    for x in (
        Factored(left * scale, right, left_gram=(left * scale) @ (left * scale).mT),
        Factored(left * scale, left * scale * 2),
        Factored.gram(left * scale),
    ):
        y, exponent = x.moderated
        assert 1e-3 < float(y.squared_norm().sqrt()) < 1e3
        close(y.inner(y), y.dense().square().sum(), y.dense().square().sum())
        assert y.is_gram == x.is_gram
        root = 2.0 ** (exponent // 2)
        assert torch.equal(y.left.sign(), x.left.sign())
        factor = x.left.abs().max() / y.left.abs().max()
        other = x.right.abs().max() / y.right.abs().max()
        assert math.isclose(float(factor / root * (other / root)), 2.0 ** (exponent % 2))


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 3),
    k=st.integers(1, 6),
    l=st.integers(1, 6),
    d=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_dense(groups: int, k: int, l: int, d: int, seed: int) -> None:  # noqa: E741
    """Every function equals its dense formula, whatever the numbers of rows, columns and blocks."""
    x = Factored(normal(groups, k, d, seed=seed), normal(groups, k, d, seed=seed + 1))
    y = Factored(normal(groups, l, d, seed=seed + 2), normal(groups, l, d, seed=seed + 3))
    for a in (x, x.thin()):
        for b in (y, y.thin()):
            torch.testing.assert_close(
                a.inner(b), (x.dense() * y.dense()).sum(), rtol=1e-10, atol=1e-10
            )
        torch.testing.assert_close(a.total(), x.dense().sum(), rtol=1e-10, atol=1e-10)
        trace = torch.einsum("gii->g", x.dense())
        torch.testing.assert_close(a.traces(), trace, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------- frames

WIDE = [name for name in FACTORS if FACTORS[name][0].shape[1] < FACTORS[name][0].shape[2]]


@pytest.mark.parametrize("name", WIDE)
def test_in_a_frame_everything_is_as_in_full(name: str) -> None:
    """Inner products, norms, traces, totals and size are the same in coordinates of the span."""
    rows = FACTORS[name][0]
    small, frame = framed_rows(rows)
    groups, k, d = rows.shape
    assert small.shape == (groups, k, k)
    mixing = normal(groups, k, k, seed=11)
    framed = [Factored.gram(small, frame), Factored(small, mixing @ small, frame)]
    full = [Factored.gram(rows), Factored(rows, mixing @ rows)]
    size = max(m.dense().norm() for m in full)
    for a, b in zip(framed, full, strict=True):
        assert (a.groups, a.size) == (groups, d)
        close(a.squared_norm(), b.squared_norm(), size**2)
        close(a.traces(), b.traces(), size * d)
        close(a.total(), b.total(), size * d)
        close(a.thin().total(), b.total(), size * d)
        assert a.thin().size == d
    close(framed[0].inner(framed[1]), full[0].inner(full[1]), size**2)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", WIDE)
def test_powers_in_a_frame(name: str, power: float) -> None:
    """A power taken in the frame has the norm, traces and total of the power taken in full."""
    rows = FACTORS[name][0]
    small, frame = framed_rows(rows)
    framed = gram_spectrum(small, CLAMP).power(power, frame)
    full = gram_spectrum(rows, CLAMP).power(power)
    size = full.dense().norm()
    close(framed.squared_norm(), full.squared_norm(), size**2, 1e-10)
    close(framed.traces(), full.traces(), size * framed.size, 1e-10)
    close(framed.total(), full.total(), size * framed.size, 1e-10)


def test_a_framed_matrix_has_no_dense_form() -> None:
    """The basis of a frame is not kept, so there is nothing to write the matrix out in."""
    rows, frame = framed_rows(normal(1, 2, 5))
    with pytest.raises(ValueError, match="no dense form"):
        Factored.gram(rows, frame).dense()


# --------------------------------------------------------------------------- Spectrum


def dense_power(matrix: Tensor, power: float, tolerance: float = CLAMP) -> tuple[Tensor, int]:
    """Power of symmetric blocks by their eigenvectors one at a time, and how many were kept."""
    blocks, kept = [], 0
    for block in matrix:
        values, vectors = torch.linalg.eigh(block)
        out = torch.zeros_like(block)
        for value, vector in zip(values, vectors.T, strict=True):
            if value > 0 and value > tolerance * values.max():
                out += value**power * torch.outer(vector, vector)
                kept += 1
        blocks.append(out)
    return torch.stack(blocks), kept


def rotation(d: int, seed: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def with_spectrum(*spectra: list[float]) -> Tensor:
    """PSD blocks with the given eigenvalues and random eigenvectors."""
    blocks = []
    for seed, values in enumerate(spectra):
        q = rotation(len(values), seed)
        blocks.append(q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T)
    return torch.stack(blocks)


PSD: dict[str, tuple[Tensor, int]] = {
    "full rank": (with_spectrum([5.0, 2.0, 0.5, 1e-3]), 4),
    "multiple of the identity": (with_spectrum([3.0, 3.0, 3.0]), 3),
    "rank deficient": (with_spectrum([5.0, 2.0, 0.0, 0.0, 0.0]), 2),
    "below the clamp": (with_spectrum([5.0, 2.0, 1e-3, 1e-18, 1e-20]), 3),
    "slightly negative": (with_spectrum([5.0, 1.0, -1e-17, -1e-18]), 2),
    "rank 0": (torch.zeros(1, 4, 4, dtype=torch.float64), 0),
    "one by one": (torch.full((1, 1, 1), 2.5, dtype=torch.float64), 1),
    "groups": (with_spectrum([3.0, 1.0, 0.2], [7.0, 2.0, 1e-2]), 6),
    "groups of unequal rank": (with_spectrum([3.0, 0, 0, 0], [7.0, 2.0, 1e-2, 0], [0.0] * 4), 4),
    "groups of unequal scale": (with_spectrum([3e15, 1e15], [7e-10, 2e-10]), 4),
    **{f"scale {c:g}": (with_spectrum([5.0, 2.0, 0.5, 0.0]) * c, 3) for c in SCALES},
}


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", PSD)
def test_powers_of_a_symmetric_matrix(name: str, power: float) -> None:
    """Xˢ equals the sum over the kept eigenvectors, block by block."""
    matrix, count = PSD[name]
    spectrum = symmetric_spectrum(matrix, CLAMP)
    expected, kept = dense_power(matrix, power)
    assert spectrum.kept == kept == count
    raised = spectrum.power(power)
    assert raised.is_gram
    for actual, block in zip(raised.dense(), expected, strict=True):
        close(actual, block, block.norm())


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 8, 3), (1, 4, 4), (3, 2, 5), (3, 5, 2)], ids=str)
def test_powers_of_a_gram_matrix(shape: tuple[int, int, int], power: float) -> None:
    """(BᵀB)ˢ from the rows of B is the same on the small side, wide or tall."""
    rows = normal(*shape)
    spectrum = gram_spectrum(rows, CLAMP)
    expected, kept = dense_power(rows.mT @ rows, power)
    assert spectrum.kept == kept
    close(spectrum.power(power).dense(), expected, expected.norm(), 1e-11)


@pytest.mark.parametrize("power", POWERS)
def test_powers_of_gram_matrices_of_unequal_rank(power: float) -> None:
    """Blocks that keep fewer eigenvalues than others, or none, are right beside them."""
    rows = normal(3, 2, 6) * torch.tensor([[1, 1], [1, 0], [0, 0]])[..., None]
    spectrum = gram_spectrum(rows, CLAMP)
    assert spectrum.kept == 3
    expected, _ = dense_power(rows.mT @ rows, power)
    close(spectrum.power(power).dense(), expected, expected.norm(), 1e-11)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("k", "d"), [(4, 9), (9, 4)])
def test_powers_of_a_rank_deficient_gram_matrix(k: int, d: int, scale: float, power: float) -> None:
    """The null space of B stays null, at any scale."""
    rows = deficient(1, k, d, 2) * scale
    spectrum = gram_spectrum(rows, CLAMP)
    assert spectrum.kept == 2
    expected, _ = dense_power(rows.mT @ rows, power)
    close(spectrum.power(power).dense(), expected, expected.norm(), 1e-11)


def test_eigenvectors_are_orthonormal_and_sorted() -> None:
    """Kept eigenvectors are orthonormal rows, eigenvalues fall, dropped ones are zero rows."""
    matrix, _ = PSD["groups of unequal rank"]
    spectrum = symmetric_spectrum(matrix, CLAMP)
    assert spectrum.values.shape == (3, 3)
    for values, vectors in zip(spectrum.values, spectrum.vectors, strict=True):
        kept = int((values > 0).sum())
        close(vectors[:kept] @ vectors[:kept].T, torch.eye(kept).double(), torch.tensor(1.0))
        assert torch.equal(vectors[kept:], torch.zeros_like(vectors[kept:]))
        assert torch.equal(values, values.sort(descending=True).values)


def test_dropped_eigenvalues_are_exactly_zero() -> None:
    """What falls at or below τ times the largest becomes 0, not a floor, in every power."""
    matrix = torch.diag(torch.tensor([4.0, 1.0, 4e-3, 3.9e-3, 0.0], dtype=torch.float64))[None]
    spectrum = symmetric_spectrum(matrix, 1e-3)
    assert torch.equal(spectrum.values, torch.tensor([[4.0, 1.0]], dtype=torch.float64))
    assert spectrum.kept == 2
    for power in POWERS:
        diagonal = spectrum.power(power).dense()[0].diag()
        assert torch.equal(diagonal[2:], torch.zeros(3, dtype=torch.float64))


def test_the_clamp_is_relative_to_the_block() -> None:
    """An eigenvalue is dropped beside a large one of its own block, not of another block."""
    matrix = torch.diag_embed(torch.tensor([[1.0, 1e-4], [1e-4, 1e-5]], dtype=torch.float64))
    spectrum = symmetric_spectrum(matrix, 1e-3)
    assert torch.equal(
        spectrum.values, torch.tensor([[1.0, 0.0], [1e-4, 1e-5]], dtype=torch.float64)
    )


@pytest.mark.parametrize("power", POWERS)
def test_rows_square_to_the_power(power: float) -> None:
    """`rows` is M with Xˢ = MᵀM."""
    spectrum = symmetric_spectrum(PSD["groups"][0], CLAMP)
    m = spectrum.rows(power)
    close(m.mT @ m, spectrum.power(power).dense(), torch.tensor(10.0))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("scale", SCALES)
def test_powers_are_homogeneous(scale: float, power: float) -> None:
    """(cX)ˢ = cˢXˢ, and the scale does not decide what is kept."""
    matrix = PSD["below the clamp"][0]
    plain, scaled = (symmetric_spectrum(c * matrix, CLAMP) for c in (1.0, scale))
    assert plain.kept == scaled.kept == 3
    expected = plain.power(power).dense() * scale**power
    close(scaled.power(power).dense(), expected, expected.norm())


def test_only_the_symmetric_part_counts() -> None:
    """Rounding makes sums slightly asymmetric; the antisymmetric part does not matter."""
    matrix = PSD["full rank"][0]
    skew = normal(4, 4)
    skewed = symmetric_spectrum(matrix + (skew - skew.T), CLAMP).power(0.5).dense()
    close(skewed, symmetric_spectrum(matrix, CLAMP).power(0.5).dense(), matrix.norm())


# --------------------------------------------------------------------------- polar root


def scipy_root(name: str) -> Tensor:
    """√(XXᵀ) by scipy's Schur method on the dense product."""
    return torch.stack(
        [torch.from_numpy(scipy.linalg.sqrtm((x @ x.T).numpy()).real) for x in dense(name)]
    )


@pytest.mark.parametrize("name", ["k > d", "k = d", "groups, k > d", "one column"])
def test_polar_root_is_scipys(name: str) -> None:
    """√(XXᵀ) of matrices of full rank is scipy's matrix square root."""
    rows = polar_root(*FACTORS[name]).rows
    # forming XXᵀ squares the condition number, which is below 1e3 in these
    close(rows.mT @ rows, scipy_root(name), dense(name).norm(), 1e-10)


@NAMES
def test_polar_root_squares_to_the_product(name: str) -> None:
    """The root T = rowsᵀrows is symmetric PSD with T² = XXᵀ, at any rank and scale."""
    x = dense(name)
    rows = polar_root(*FACTORS[name]).rows
    root = rows.mT @ rows
    product = x @ x.mT
    close(root @ root, product, product.norm())
    close(root, root.mT, root.norm())
    assert float(torch.linalg.eigvalsh(root).min()) >= -1e-12 * float(root.norm())


@NAMES
def test_polar_root_of_a_gram_matrix_is_itself(name: str) -> None:
    """√(XXᵀ) = X where X is symmetric PSD."""
    gram = Factored.gram(FACTORS[name][0])
    rows = polar_root(gram.left, gram.right).rows
    close(rows.mT @ rows, gram.dense(), gram.dense().norm())


@NAMES
def test_polar_root_and_gram_in_one_basis(name: str) -> None:
    """Q S Qᵀ − Q R₁R₁ᵀ Qᵀ in an orthonormal basis Q: root − LᵀL has the norm of S − R₁R₁ᵀ."""
    polar = polar_root(*FACTORS[name])
    left = FACTORS[name][0]
    root, gram = polar.rows.mT @ polar.rows, left.mT @ left
    small = polar.triangle @ polar.triangle.mT
    size = root.norm() + gram.norm()
    close(torch.linalg.vector_norm(polar.root - small), torch.linalg.vector_norm(root - gram), size)
    close(small.norm(), gram.norm(), size)
    close(polar.root.norm(), root.norm(), size)


def test_polar_root_keeps_small_singular_values() -> None:
    """A singular value 1e-9 of the largest is right to 1e-6; forming XXᵀ would lose it."""
    u, v = rotation(4, 1), rotation(4, 2)
    s = torch.diag(torch.tensor([1.0, 0.5, 1e-3, 1e-9], dtype=torch.float64))
    polar = polar_root((u @ s).mT[None], v.mT[None])
    values = torch.linalg.eigvalsh(polar.root[0])
    assert math.isclose(float(values[0]), 1e-9, rel_tol=1e-6)


def test_a_polar_root_is_not_the_symmetric_part() -> None:
    """The comparison sees the difference between √(XXᵀ), √(XᵀX) and X itself."""
    x = dense("k > d")[0]
    rows = polar_root(*FACTORS["k > d"]).rows
    found = (rows.mT @ rows)[0]
    others: list[Callable[[], Tensor]] = [
        lambda: x,
        lambda: (x + x.T) / 2,
        lambda: torch.from_numpy(scipy.linalg.sqrtm((x.T @ x).numpy()).real),
    ]
    for other in others:
        assert float((found - other()).norm()) > 0.1 * float(x.norm())
