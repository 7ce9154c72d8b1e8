"""The alignment-reversing data set: what its construction promises, and what it does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError
from feature_probe.theory.alignment_reversing import (
    _left_singular_vectors,
    alignment_reversing_data,
)
from feature_probe.theory.quadratic_network import expected_moments, predict_alignment

N = D = 40


def made(balance: float, seed: int = 0, **options: float) -> tuple[Tensor, Tensor]:
    """A data set of 40 examples in 40 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return alignment_reversing_data(N, D, balance, generator=generator, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("balance", [0.1, 0.3, 0.5])
def test_without_noise_the_second_gram_is_the_squared_pseudo_inverse(balance: float) -> None:
    """X₂ᵀX₂ = (X₁ᵀX₁)⁺², and X₁ᵀX₁·X₂ᵀX₂·X₁ᵀX₁ the projector on the span of X₁ (App. F)."""
    x, y = made(balance, noise=0.0)
    first = round(balance * N)
    assert (y[:first] == 1 + 1e-5).all()
    assert (y[first:] == 1e-5).all()
    gram = x[:first].T.numpy() @ x[:first].numpy()
    other = x[first:].T.numpy() @ x[first:].numpy()
    inverse = np.linalg.pinv(gram, rcond=1e-10)
    np.testing.assert_allclose(other, inverse @ inverse, rtol=1e-6, atol=1e-9 * abs(other).max())
    projector = np.linalg.pinv(x[:first].numpy(), rcond=1e-10) @ x[:first].numpy()
    np.testing.assert_allclose(gram @ other @ gram, projector, atol=1e-6)


def test_the_second_set_holds_the_largest_directions_where_it_has_few_rows() -> None:
    """γ = 0.8: eight rows, the inverse on the eight largest singular vectors alone."""
    x, _ = made(0.8, noise=0.0)
    values, vectors = np.linalg.eigh((x[:32].T @ x[:32]).numpy())
    kept, of = vectors[:, -8:], values[-8:]
    expected = kept @ np.diag(of**-2.0) @ kept.T
    np.testing.assert_allclose((x[32:].T @ x[32:]).numpy(), expected, rtol=1e-6, atol=1e-12)


def test_a_floor_raises_small_singular_values() -> None:
    """Those below a hundredth of the largest, the zeros among them, are inverted as that."""
    x, _ = made(0.25, noise=0.0, floor=0.01)
    values = np.linalg.eigvalsh((x[:10].T @ x[:10]).numpy())
    raised = np.maximum(values, 0.01 * values.max())
    other = np.linalg.eigvalsh((x[10:].T @ x[10:]).numpy())[::-1]
    taken = np.sort(raised)[::-1][:30]  # as many as it has rows, the largest first
    np.testing.assert_allclose(other[:30], np.sort(taken**-2.0)[::-1], rtol=1e-6)
    assert abs(other[30:]).max() < 1e-9 * other[0]


def test_the_inverse_as_printed_is_made_of_rounding_and_the_pseudo_inverse_is_not() -> None:
    """X₁ changed by 10⁻¹⁴: S₁⁻¹ of γn < d points elsewhere, its pseudo-inverse does not."""
    x, _ = made(0.25, noise=0.0)
    relative = torch.randn(10, D, generator=torch.Generator().manual_seed(1)).double()
    moved = x[:10] * (1 + 1e-14 * relative)
    grams = [rows.T.numpy() @ rows.numpy() for rows in (x[:10], moved)]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))

    printed = []
    for gram in grams:
        left, values, _ = np.linalg.svd(gram)
        printed.append((left * values**-2.0) @ left.T)
    assert cosine(*printed) < 0.9
    stable = [np.linalg.pinv(gram, rcond=1e-10) for gram in grams]
    assert cosine(*stable) > 1 - 1e-10


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_left_singular_vectors_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    """Up to sign, the largest singular value's first."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    found = _left_singular_vectors(rows).numpy()
    expected = np.linalg.svd(rows.numpy(), full_matrices=False)[0]
    assert found.shape == expected.shape
    np.testing.assert_allclose(abs((found * expected).sum(0)), 1, rtol=1e-10)


def test_the_covariance_is_that_of_the_text() -> None:
    """Σ = 11ᵀ + ε₁I of the rows of label 1, times scale², within 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    x, _ = alignment_reversing_data(
        40_000, 3, 0.9, generator=generator, common=2.0, own=0.5, noise=0.0, scale=3.0
    )
    rows = x[:36_000].numpy()
    products = rows[:, :, None] * rows[:, None, :]
    expected = 9 * (2 * np.ones((3, 3)) + 0.5 * np.eye(3))
    error = products.std(0) / math.sqrt(len(rows))
    assert (abs(products.mean(0) - expected) < 5 * error).all()


def test_noise_is_added_to_all_inputs() -> None:
    """The same draws with and without it differ by ε₂ N(0, 1)."""
    quiet, noisy = made(0.3, noise=0.0)[0], made(0.3, noise=0.05)[0]
    difference = noisy - quiet
    assert float(difference.std()) == pytest.approx(0.05, rel=0.1)
    assert abs(float(difference.mean())) < 0.005


def test_the_same_generator_gives_the_same_data() -> None:
    """Bit for bit, and others with another seed; the global generator is not touched."""
    before = torch.get_rng_state()
    first, again, other = made(0.3), made(0.3), made(0.3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_alignment_is_reversed_where_the_grams_are_of_one_size() -> None:
    """With X₁ᵀX₁ ≈ Σ and 1 of unit length the cosine falls far; as printed it stays near 1."""
    size = 200
    moments = expected_moments(size, size)

    def cosine(balance: float, **options: float) -> float:
        generator = torch.Generator().manual_seed(0)
        data = alignment_reversing_data(size, size, balance, generator=generator, **options)  # type: ignore[arg-type]
        return predict_alignment(*data, moments).cosine

    assert cosine(0.4, common=1 / size, scale=size**-0.5) < 0.8
    assert cosine(0.4) > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": 0.0}, "balance must leave both sets a row, got 0.0"),
        ({"balance": 1.0}, "balance must leave both sets a row, got 1.0 of 40"),
        ({"balance": 0.3, "common": -1.0}, "common must not be negative, got -1.0"),
        ({"balance": 0.3, "noise": -1.0}, "noise must not be negative"),
        ({"balance": 0.3, "own": 0.0}, "own must be positive, got 0.0"),
        ({"balance": 0.3, "scale": 0.0}, "scale must be positive"),
        ({"balance": 0.3, "floor": 0.0}, r"floor must be in \(0, 1\], got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    """The error says what was given."""
    with pytest.raises(ConfigurationError, match=message):
        made(**options)


def test_the_dtype_is_what_was_asked_for() -> None:
    """float32, rounded from the float64 construction."""
    generator = torch.Generator().manual_seed(0)
    x, y = alignment_reversing_data(N, D, 0.3, generator=generator, dtype=torch.float32)
    assert x.dtype == y.dtype == torch.float32
    assert torch.equal(x, made(0.3)[0].float())
