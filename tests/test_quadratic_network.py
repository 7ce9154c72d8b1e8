"""Predictions for f(x) = aᵀ(Wx)², against free cumulants, and networks drawn many times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError
from feature_probe.theory.quadratic_network import (
    QuadraticPrediction,
    expected_alignment_speed,
    expected_moments,
    network_moments,
    predict_alignment,
)

Partition = list[list[int]]


def partitions(size: int) -> list[Partition]:
    """All set partitions of 0 … size−1, by restricted growth strings."""
    found = []
    for names in itertools.product(range(size), repeat=size):
        if all(name <= max(names[:i], default=-1) + 1 for i, name in enumerate(names)):
            blocks = [[i for i in range(size) if names[i] == name] for name in set(names)]
            found.append(blocks)
    return found


def non_crossing(blocks: Partition) -> bool:
    """No a < b < c < d with a, c in one block and b, d in another."""
    return not any(
        a < b < c < d
        for one, other in itertools.permutations(blocks, 2)
        for a, c in itertools.combinations(one, 2)
        for b, d in itertools.combinations(other, 2)
    )


def free_cumulants(moments: Sequence[float]) -> list[float]:
    """κ_1 …, from m_j = Σ over non-crossing partitions of Π κ_|block|."""
    cumulants: list[float] = []
    for order, moment in enumerate(moments, start=1):
        rest = sum(
            math.prod(cumulants[len(block) - 1] for block in blocks)
            for blocks in partitions(order)
            if len(blocks) > 1 and non_crossing(blocks)
        )
        cumulants.append(moment - rest)
    return cumulants


def free_word(letters: list[np.ndarray], moments: Sequence[float]) -> float:
    """tr[R c_1 R c_2 …] of R free from the c's: Σ_π κ_π[R] · tr_Kr(π)[c] (Nica and Speicher).

    The Kreweras complement Kr(π) has the largest blocks of the c's that do not cross π; as a
    permutation it is π⁻¹ after the cycle (1 2 … m).
    """
    cumulants = free_cumulants(moments)
    size, total = len(letters), 0.0
    for blocks in partitions(size):
        if not non_crossing(blocks):
            continue
        before = {}
        for block in blocks:
            for i, place in enumerate(block):
                before[place] = block[i - 1]
        term = math.prod(cumulants[len(block) - 1] for block in blocks)
        left = set(range(size))
        while left:
            start = place = min(left)
            product = np.eye(len(letters[0]))
            while True:
                left.discard(place)
                product = product @ letters[place]
                place = before[(place + 1) % size]
                if place == start:
                    break
            term *= np.trace(product) / len(product)
        total += term
    return total


def data(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs with a decaying spectrum, in a random basis, and labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    x = x * (1 / (1 + torch.arange(d) / 4)).sqrt() @ basis / math.sqrt(n)
    return x, torch.tanh(3 * x[:, 0] * math.sqrt(n)) + 0.3


MOMENTS = (1.1, 3.9, 23.0, 190.0)


@pytest.fixture(scope="module")
def letters() -> dict[str, np.ndarray]:
    """A and B of a data set, by NumPy."""
    x, y = (t.numpy() for t in data(9, 6, 0))
    labelled = x.T @ np.diag(y) @ x
    return {"A": labelled @ labelled, "B": x.T @ x}


@pytest.mark.parametrize(
    ("word", "which"),
    [("ABA", "numerator"), ("AA", "nfm_square"), ("BABA", "agop_square")],
)
def test_the_traces_are_those_of_free_probability(
    word: str, which: str, letters: dict[str, np.ndarray]
) -> None:
    """Eq. 20, 22 and 28, the last with its correction, against the sum over free cumulants."""
    found = getattr(predict_alignment(*data(9, 6, 0), MOMENTS), which)
    assert found == pytest.approx(free_word([letters[c] for c in word], MOMENTS), rel=1e-10)


def test_equation_28_as_printed_is_not(letters: dict[str, np.ndarray]) -> None:
    """Its last term is zero as printed; tr[B]²·tr[Ā²]·tr[R²]² is what is missing."""
    found = predict_alignment(*data(9, 6, 0), MOMENTS)
    exact = free_word([letters[c] for c in "BABA"], MOMENTS)
    assert found.agop_square_as_printed < 0.95 * exact
    a, b = letters["A"], letters["B"]
    centred = a - np.trace(a) / 6 * np.eye(6)
    missing = (np.trace(b) / 6) ** 2 * np.trace(centred @ centred) / 6 * MOMENTS[1] ** 2
    assert found.agop_square_as_printed + missing == pytest.approx(exact, rel=1e-10)
    assert found.cosine_as_printed > found.cosine


def test_isotropic_inputs_give_equation_6() -> None:
    """With XᵀX = I the numerator is tr(A)²·tr(R³) + tr(R)·tr(R²)·tr(Ā²)."""
    x = torch.linalg.qr(data(9, 6, 1)[0]).Q
    y = data(9, 6, 2)[1]
    labelled = (x.T @ torch.diag(y) @ x).numpy()
    a = labelled @ labelled
    mean = np.trace(a) / 6
    variance = np.trace(a @ a) / 6 - mean**2
    r1, r2, r3, _ = MOMENTS
    equation_6 = mean**2 * r3 + r1 * r2 * variance
    assert predict_alignment(x, y, MOMENTS).numerator == pytest.approx(equation_6, rel=1e-10)


def drawn(
    n: int, d: int, k: int, draws: int, seed: int
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """A data set, and 𝒥 of networks drawn independently of it, with R."""
    x, y = data(n, d, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    found = []
    for _ in range(draws):
        weight = torch.randn(k, d, generator=generator, dtype=torch.float64) / math.sqrt(k)
        readout = torch.randn(k, generator=generator, dtype=torch.float64)
        found.append((weight, readout))
    return x, y, found


def test_large_networks_have_the_predicted_traces_and_cosine() -> None:
    """At n = k = d = 400 each trace over 12 networks, and their cosine, is as predicted."""
    size = 400
    x, y, networks = drawn(size, size, size, 12, 5)
    seen = []
    for weight, readout in networks:
        jacobian = x @ weight.T * readout  # the factor 2 is dropped, as in the paper
        gradient = jacobian.T @ (y[:, None] * x)
        nfm, agop = gradient.T @ gradient, gradient.T @ (jacobian.T @ jacobian) @ gradient
        seen.append(
            [float((p * q).sum()) / size for p, q in ((nfm, agop), (nfm, nfm), (agop, agop))]
        )
    found = predict_alignment(x, y, expected_moments(size, size))
    predicted = np.array([found.numerator, found.nfm_square, found.agop_square])
    errors = np.std(seen, axis=0, ddof=1) / math.sqrt(len(seen))
    assert (np.abs(np.mean(seen, axis=0) - predicted) < 4 * errors).all()
    cosines = [row[0] / math.sqrt(row[1] * row[2]) for row in seen]
    assert np.mean(cosines) == pytest.approx(found.cosine, abs=0.012)
    assert abs(np.mean(cosines) - found.cosine_as_printed) > 3 * abs(
        np.mean(cosines) - found.cosine
    )


@pytest.mark.parametrize(("width", "dimension"), [(5, 3), (3, 8), (1, 1)])
def test_expected_moments_are_those_of_networks_drawn(width: int, dimension: int) -> None:
    """Each of the four within 4.5 standard errors of 200,000 networks."""
    rng = np.random.default_rng(width)
    draws = 200_000
    weight = rng.standard_normal((draws, width, dimension)) / math.sqrt(width)
    rows = weight * rng.standard_normal((draws, width, 1))
    matrix = rows.transpose(0, 2, 1) @ rows
    power, exact = matrix, expected_moments(width, dimension).numpy()
    for moment in exact:
        traces = np.trace(power, axis1=1, axis2=2) / dimension
        assert abs(traces.mean() - moment) < 4.5 * traces.std() / math.sqrt(draws)
        power = power @ matrix


def test_expected_moments_of_one_unit_and_one_input() -> None:
    """k = d = 1: R = a²w², E[R^j] = ((2j−1)!!)²."""
    assert expected_moments(1, 1).tolist() == [1.0, 9.0, 225.0, 11025.0]


@pytest.mark.parametrize("ratio", [1, 3])
def test_expected_moments_tend_to_the_free_compound_poisson_law(ratio: int) -> None:
    """Its free cumulants are (d/k)^(j−1)·(2j−1)!!; finite sizes differ by O(1/k)."""
    limit = [ratio ** (j - 1) * math.prod(range(2 * j - 1, 0, -2)) for j in range(1, 5)]
    gaps = []
    for width in (1000, 10_000):
        cumulants = free_cumulants(expected_moments(width, ratio * width).tolist())
        gaps.append(max(abs(a / b - 1) for a, b in zip(cumulants, limit, strict=True)))
    assert gaps[0] < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("width", [2, 6])
def test_proposition_10_is_the_mean_of_networks_drawn(width: int) -> None:
    """E[GᵀG] and E[GᵀKG] by autograd's G and K, within 4.5 standard errors; not as printed."""
    n, d, draws = 5, 3, 40_000
    x, y = data(n, d, 7)
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(draws, width, d, generator=generator, dtype=torch.float64)
    weight = (weight / math.sqrt(width)).requires_grad_()
    readout = torch.randn(draws, width, generator=generator, dtype=torch.float64)
    z = torch.einsum("nd,mkd->mnk", x, weight)
    output = torch.einsum("mnk,mk->mn", z.square(), readout)
    loss = (output - output.detach() - y).square().sum() / 2 / n
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (jacobian,) = torch.autograd.grad(output.sum(), z)
    kernel = jacobian.mT @ jacobian / n
    sides = gradient.mT @ gradient, gradient.mT @ kernel @ gradient
    speed = expected_alignment_speed(x, y, width)
    for samples, exact in zip(sides, (speed.nfm, speed.agop), strict=True):
        error = samples.std(0) / math.sqrt(draws)
        assert ((samples.mean(0) - exact).abs() < 4.5 * error).all()
    labelled = x.T @ torch.diag(y) @ x
    gram = x.T @ x
    printed = 3 * gram.trace() * labelled @ labelled + 6 * labelled @ gram @ labelled
    error = (sides[1].std(0) / math.sqrt(draws)).diagonal()
    gap = (sides[1].mean(0) - 16 / n**3 * printed).diagonal().abs()
    assert (gap > 10 * error).all()


def test_the_moments_of_a_network_are_means_of_its_eigenvalues() -> None:
    """tr(R^j)/d against the eigenvalues of R."""
    weight, readout = data(7, 4, 3)
    values = np.linalg.eigvalsh(((weight.T * readout**2) @ weight).numpy())
    expected = [float(np.mean(values**j)) for j in range(1, 5)]
    assert network_moments(weight, readout).tolist() == pytest.approx(expected, rel=1e-10)


def test_undefined_predictions_are_nan() -> None:
    """Labels of zero give no cosine; nor does a negative square."""
    x, y = data(9, 6, 0)
    assert math.isnan(predict_alignment(x, 0 * y, MOMENTS).cosine)
    assert math.isnan(QuadraticPrediction(1.0, 1.0, 1.0, -1.0).cosine_as_printed)


def test_the_scale_of_data_and_labels_does_not_matter() -> None:
    """Also in float32, whose range eighth powers would leave."""
    x, y = data(9, 6, 0)
    usual = predict_alignment(x, y, MOMENTS).cosine
    assert predict_alignment(1e7 * x, 1e3 * y, MOMENTS).cosine == pytest.approx(usual, rel=1e-9)
    single = predict_alignment(1e7 * x.float(), y.float(), MOMENTS).cosine
    assert single == pytest.approx(usual, rel=1e-5)  # float32 inputs, rounded


def test_arguments_that_do_not_fit_are_refused() -> None:
    """The errors say what was given."""
    x, y = data(9, 6, 0)
    with pytest.raises(ConfigurationError, match=r"labels \[n\].*\(8,\)"):
        predict_alignment(x, y[:-1], MOMENTS)
    with pytest.raises(ConfigurationError, match=r"j = 1 … 4, got 3"):
        predict_alignment(x, y, MOMENTS[:3])
    with pytest.raises(ConfigurationError, match="width must be a positive"):
        expected_alignment_speed(x, y, 0)
    with pytest.raises(ConfigurationError, match="dimension must be a positive"):
        expected_moments(3, -1)
    with pytest.raises(ConfigurationError, match=r"readout \[k\].*\(9, 6\) and \(9, 1\)"):
        network_moments(x, y[:, None])
