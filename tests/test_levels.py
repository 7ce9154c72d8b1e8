"""The level by chance with shared weights: mean and spread against sampled rotations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from feature_probe.theory.agreement import compare
from feature_probe.theory.factored import Factored
from feature_probe.theory.levels import shared_weight_level
from feature_probe.theory.spectra import symmetric_spectrum

CLAMP = 10 * torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def kept(values: Tensor) -> Tensor:
    """Eigenvalues of K ``[groups, k]`` as a layer gives them: sorted, cut to the kept ones."""
    return symmetric_spectrum(torch.diag_embed(values), CLAMP).values


def level(weight: Tensor, values: Tensor, power: float, seed: int = 0) -> float:
    """The mean alone."""
    return shared_weight_level(weight, values, power, CLAMP, seed=seed).cosine


def rotations(groups: int, d: int, count: int, seed: int = 0) -> Tensor:
    """Haar-random orthogonal matrices ``[count, groups, d, d]``."""
    q, r = torch.linalg.qr(normal(count, groups, d, d, seed=seed))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def decaying(groups: int, k: int) -> Tensor:
    """Eigenvalues 1/(1 + i)."""
    return (1 / torch.arange(1, k + 1, dtype=torch.float64)).expand(groups, -1)


def monte_carlo(weight: Tensor, values: Tensor, power: float, draws: int) -> Tensor:
    """cos(WᵀW, (WᵀQKQᵀW)ˢ) of random Q, dense, block-diagonal Q for groups."""
    groups, k, _ = weight.shape
    actual = weight.mT @ weight
    cosines = []
    for q in rotations(groups, k, draws, seed=123):
        x = weight.mT @ q @ torch.diag_embed(values) @ q.mT @ weight
        if power != 1:
            eigenvalues, vectors = torch.linalg.eigh(x)
            largest = eigenvalues[:, -1:]
            eigenvalues = torch.where(eigenvalues > CLAMP * largest, eigenvalues, 0.0).clamp_min(0)
            x = vectors @ torch.diag_embed(eigenvalues**power) @ vectors.mT
        cosines.append(float((actual * x).sum() / (actual.norm() * x.norm())))
    return torch.tensor(cosines)


@pytest.mark.parametrize(("k", "d"), [(16, 784), (256, 256), (512, 61)])
def test_level_in_closed_form(k: int, d: int) -> None:
    """At s = 1 the closed form is the mean over random K eigenvectors."""
    weight = normal(1, k, d)
    values = decaying(1, k)
    # on the d_out side: ⟨WᵀW, WᵀMW⟩ = tr L²M and ‖WᵀMW‖² = tr MLML, L = WWᵀ
    gram_out = weight[0] @ weight[0].T
    cosines = []
    for q in rotations(1, k, 24, seed=1)[:, 0]:
        m = (q * values[0]) @ q.T
        lm = gram_out @ m
        cosines.append(float((gram_out * lm.T).sum() / gram_out.norm() / (lm * lm.T).sum().sqrt()))
    expected = sum(cosines) / len(cosines)
    got = level(weight, kept(values), 1.0)
    assert abs(got - expected) < 0.01
    chance = compare(Factored.gram(weight), Factored.gram(values.sqrt()[..., None] * weight))
    assert abs(expected - chance.chance_cosine) > 0.03


def test_the_papers_control_at_full_size() -> None:
    """0.67 at 16 × 784 and 0.40 at 256 × 256, s = 1."""
    for k, d, expected in ((16, 784, 0.67), (256, 256, 0.40)):
        got = level(normal(1, k, d), kept(decaying(1, k)), 1.0)
        assert abs(got - expected) < 0.02


@pytest.mark.parametrize("power", [0.5, 1 / 3, 2.0])
@pytest.mark.parametrize("shape", [(1, 16, 60), (1, 32, 32), (1, 48, 8), (2, 12, 10)], ids=str)
def test_level_at_other_powers(shape: tuple[int, int, int], power: float) -> None:
    """At s ≠ 1 the mean of the few draws is that of 150 others, within their spread."""
    weight, values = normal(*shape), decaying(*shape[:2])
    cosines = monte_carlo(weight, values, power, 150)
    got = level(weight, kept(values), power)
    assert abs(got - float(cosines.mean())) < 5 * float(cosines.std()) / math.sqrt(5)
    assert abs(got - float(cosines.mean())) < 0.05


def test_level_of_groups() -> None:
    """At s = 1 the closed form adds up the blocks."""
    weight = normal(3, 10, 8) * torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    values = decaying(3, 10) * torch.tensor([1.0, 0.3, 2.0])[:, None]
    cosines = monte_carlo(weight, values, 1.0, 800)
    got = level(weight, kept(values), 1.0)
    assert abs(got - float(cosines.mean())) < 0.015


def test_level_where_k_has_lost_eigenvalues() -> None:
    """K of low rank: dropped eigenvalues count as zeros of a d_out × d_out matrix."""
    weight = normal(1, 24, 12)
    values = torch.cat([decaying(1, 4), torch.zeros(1, 20, dtype=torch.float64)], dim=1)
    for power in (1.0, 0.5):
        cosines = monte_carlo(weight, values, power, 300)
        got = level(weight, kept(values), power)
        # the closed form is a ratio of expectations, low by up to 0.02 in narrow layers
        bound = 0.02 if power == 1.0 else 5 * float(cosines.std()) / math.sqrt(8)
        assert abs(got - float(cosines.mean())) < bound


def test_level_of_a_spherical_k() -> None:
    """K = c·I has no eigenvectors to draw: the level is the score itself, at every power."""
    weight = normal(1, 6, 9)
    values = torch.full((1, 6), 2.5, dtype=torch.float64)
    rows = Factored.gram(values.sqrt()[..., None] * weight)
    at_one = compare(Factored.gram(weight), rows).cosine
    assert math.isclose(level(weight, values, 1.0), at_one, rel_tol=1e-12)
    s = torch.linalg.svdvals(weight[0])
    half = float((s**3).sum() / (s**4).sum().sqrt() / (s**2).sum().sqrt())
    assert math.isclose(level(weight, values, 0.5), half, rel_tol=1e-10)


def test_level_repeats_by_seed_and_leaves_the_random_state() -> None:
    """The draws are the seed's own; the global generator is not used."""
    weight, values = normal(1, 8, 6), decaying(1, 8)
    state = torch.random.get_rng_state()
    one, again, other = (level(weight, values, 0.5, seed) for seed in (3, 3, 4))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_level_of_many_rows_has_fewer_draws() -> None:
    """In wide layers the spread of one draw is small enough for one draw to do."""
    weight, values = normal(1, 140, 20), decaying(1, 140)
    cosines = monte_carlo(weight, values, 0.5, 20)
    assert float(cosines.std()) < 0.02
    got = level(weight, kept(values), 0.5)
    assert abs(got - float(cosines.mean())) < 4.5 * float(cosines.std())


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(
    ("weight", "values"),
    [
        (normal(3, 1, 5), torch.ones(3, 1, dtype=torch.float64)),
        (normal(1, 4, 5), torch.zeros(1, 4, dtype=torch.float64)),
        (torch.zeros(1, 4, 5, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)),
    ],
    ids=["blocks of one row", "K is zero", "W is zero"],
)
def test_level_undefined(weight: Tensor, values: Tensor, power: float) -> None:
    """NaN where there is nothing to rotate or nothing to compare."""
    assert math.isnan(level(weight, kept(values), power))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_one_row_agrees_whatever_k_is(power: float) -> None:
    """With one output row every K gives WᵀKW ∝ WᵀW, so the level to beat is 1."""
    values = torch.full((1, 1), 0.3, dtype=torch.float64)
    assert level(normal(1, 1, 5), values, power) == 1.0


# --------------------------------------------------------------------------- spread


def steep(weight: Tensor, exponent: float) -> Tensor:
    """W with columns of falling length."""
    return weight * torch.arange(1, weight.shape[-1] + 1).double() ** -exponent


ONE_OVER = decaying(1, 256)
#: W and the eigenvalues of K, and how many rotations tell the spread.
SPREADS: dict[str, tuple[Tensor, Tensor, int]] = {
    "narrow": (normal(1, 12, 30), decaying(1, 12), 400),
    "two outputs": (normal(1, 2, 5), torch.tensor([[1.0, 0.4]]).double(), 400),
    "groups": (normal(3, 10, 8), decaying(3, 10), 400),
    "rank 10 of 256": (normal(1, 256, 256), ONE_OVER[:, :10], 40),
    "rank 1 of 100": (steep(normal(1, 100, 100), 0.5), torch.ones(1, 1).double(), 120),
    "wide": (normal(1, 150, 150), decaying(1, 150), 40),
}
MORE_SPREADS: dict[str, tuple[Tensor, Tensor, int]] = {
    "wide, slow": (normal(1, 150, 150), torch.linspace(1, 0.1, 150).double()[None], 60),
    "wide, steep W": (steep(normal(1, 150, 150), 0.5), decaying(1, 150), 60),
    "wide, few inputs": (normal(1, 300, 120), decaying(1, 300), 60),
    "wide, many inputs": (normal(1, 150, 250), decaying(1, 150), 60),
    "wide, rank 100": (normal(1, 200, 200), decaying(1, 100), 60),
    "wide, two groups": (normal(2, 120, 150), decaying(2, 120), 60),
}


def assert_spread(weight: Tensor, values: Tensor, power: float, draws: int) -> None:
    """The level's spread is the standard deviation of sampled rotations within a factor 1.5."""
    padding = values.new_zeros(len(values), weight.shape[1] - values.shape[1])
    sampled = monte_carlo(weight, torch.cat([values, padding], dim=1), power, draws)
    got = shared_weight_level(weight, values, power, CLAMP)
    assert 1 / 1.5 < got.spread / float(sampled.std()) < 1.5
    # a single draw makes the mean at s = ½ where the layer is wide
    assert abs(got.cosine - float(sampled.mean())) < 4 * got.spread + 0.01


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("name", SPREADS)
def test_spread_is_that_of_sampled_rotations(name: str, power: float) -> None:
    """The spread is the standard deviation over rotations, sampled or by its gradient."""
    weight, values, draws = SPREADS[name]
    assert_spread(weight, values, power, draws)


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("name", MORE_SPREADS)
def test_spread_of_wide_layers(name: str, power: float) -> None:
    """The same where one draw of the level is large."""
    weight, values, draws = MORE_SPREADS[name]
    assert_spread(weight, values, power, draws)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [9, 130])
def test_nothing_to_turn_has_no_spread(k: int, power: float) -> None:
    """K = c·I is the same in every basis: the spread is zero."""
    values = torch.full((1, k), 0.7, dtype=torch.float64)
    assert shared_weight_level(normal(1, k, k + 3), values, power, CLAMP).spread < 1e-12
    assert shared_weight_level(normal(1, 1, 4), values[:, :1], power, CLAMP).spread == 0


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(("k", "d"), [(10, 14), (150, 150), (150, 40)])
@pytest.mark.parametrize("scale", [1e-200, 1e-90, 1e90, 1e200])
def test_level_at_any_scale(k: int, d: int, scale: float, power: float) -> None:
    """Tiny and huge weights and eigenvalues have the level of ordinary ones."""
    weight, values = normal(1, k, d), decaying(1, k)
    plain = shared_weight_level(weight, values, power, CLAMP)
    for scaled in (
        shared_weight_level(weight * scale, values, power, CLAMP),
        shared_weight_level(weight, values * scale, power, CLAMP),
    ):
        assert math.isclose(scaled.cosine, plain.cosine, rel_tol=1e-9)
        assert math.isclose(scaled.spread, plain.spread, rel_tol=1e-6)


@pytest.mark.parametrize(("k", "d"), [(6, 8), (150, 150)])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_level_is_nan_with_its_spread(k: int, d: int, power: float) -> None:
    """Where the level is undefined so is its spread."""
    weight, values = normal(1, k, d), decaying(1, k)
    for one, other in ((weight * 0, values), (weight, values * 0)):
        got = shared_weight_level(one, other, power, CLAMP)
        assert math.isnan(got.cosine)
        assert math.isnan(got.spread)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 72, 24), (1, 200, 30), (1, 400, 512)], ids=str)
def test_a_weight_that_has_collapsed(shape: tuple[int, int, int], power: float) -> None:
    """Nearly of rank 2, where a ratio of expectations is far too low (0.76 for 0.87)."""
    groups, k, d = shape
    weight = normal(groups, k, 2) @ normal(groups, 2, d, seed=1) / d**0.5
    weight = weight + 1e-3 * normal(groups, k, d, seed=2) / d**0.5
    values = torch.zeros(1, k, dtype=torch.float64)
    values[0, :6] = torch.tensor([0.41, 0.28, 0.12, 0.08, 0.07, 0.02])
    thin = torch.linalg.qr(weight[0]).Q if k > d else torch.eye(k, dtype=torch.float64)
    r = thin.T @ weight[0]
    cosines = []
    for seed in range(300):
        # the first six columns of a rotation, seen from the column space of W
        frame = torch.linalg.qr(normal(k, 6, seed=1000 + seed)).Q
        half = values[0, :6].sqrt()[:, None] * (frame.T @ thin @ r)
        _, sizes, basis = torch.linalg.svd(half, full_matrices=False)
        sizes = torch.where(sizes**2 > CLAMP * sizes[0] ** 2, sizes ** (2 * power), 0.0)
        projected = (basis @ r.T).square().sum(1)
        cosines.append(float(projected @ sizes / sizes.norm() / (r @ r.T).norm()))
    expected = torch.tensor(cosines)
    found = shared_weight_level(weight, kept(values), power, CLAMP)
    assert abs(found.cosine - expected.mean()) < (0.02 if k < 400 else 0.06)
    assert found.spread == pytest.approx(float(expected.std()), rel=0.25 if k < 400 else 0.5)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_spread_of_arctanh_is_that_of_samples(power: float) -> None:
    """Few outputs and an uneven weight: the cosines crowd below 1, and arctanh spreads them."""
    weight = normal(1, 4, 16) * torch.tensor([1.0, 0.5, 0.3, 0.2]).double()[:, None]
    values = torch.tensor([[1.0, 0.5, 0.33, 0.25]]).double()
    cosines = monte_carlo(weight, values, power, 3000)
    found = shared_weight_level(weight, kept(values), power, CLAMP)
    assert found.arctanh_spread == pytest.approx(float(cosines.atanh().std()), rel=0.2)
    wide = shared_weight_level(normal(1, 300, 300), kept(decaying(1, 300)), power, CLAMP)
    assert wide.arctanh_spread == pytest.approx(wide.spread / (1 - wide.cosine**2))
