"""The fitted power against dense matrices and scipy, where it is recovered, and when it is NaN."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import scipy.optimize  # type: ignore[import-untyped]
import torch
from torch import Tensor

from feature_probe.theory.power import FittedPower, fitted_power, power_cosine

Matrix = npt.NDArray[np.float64]

SIDE = 24
#: Eigenvalues of AGOP, largest first.
SPECTRA: dict[str, Matrix] = {
    "harmonic": 1 / np.arange(1.0, SIDE + 1),
    "geometric": 0.75 ** np.arange(float(SIDE)),
    "few large": np.where(np.arange(SIDE) < 4, 1.0, 0.05) * np.linspace(1.0, 0.5, SIDE),
}
#: Angle of the rotation between the bases of WᵀW and AGOP, noise on WᵀW, tolerance on log ŝ.
RELATED = {
    "noise": (0.0, 0.0005, 0.02),
    "small rotation": (0.01, 0.0, 0.02),
    "moderate rotation": (0.03, 0.0, 0.1),
}


def haar(seed: int, side: int = SIDE) -> Matrix:
    """A random rotation."""
    normal = np.random.default_rng(seed).standard_normal((side, side))
    return np.asarray(np.linalg.qr(normal)[0])


def in_basis(basis: Matrix, values: Matrix) -> Matrix:
    """The symmetric matrix with these eigenvectors (columns) and eigenvalues."""
    return np.asarray((basis * values) @ basis.T)


def rotated(angle: float, seed: int) -> Matrix:
    """A rotation by about ``angle`` of every axis."""
    normal = np.random.default_rng(seed).standard_normal((SIDE, SIDE))
    return np.asarray(scipy.linalg.expm(angle * (normal - normal.T) / math.sqrt(2)))


def related_pair(spectrum: str, power: float, kind: str) -> tuple[Matrix, Matrix]:
    """AGOP, and a WᵀW near AGOPˢ."""
    angle, noise, _ = RELATED[kind]
    basis = haar(0)
    normal = np.random.default_rng(2).standard_normal((SIDE, SIDE))
    gram = in_basis(rotated(angle, 1) @ basis, SPECTRA[spectrum] ** power)
    return in_basis(basis, SPECTRA[spectrum]), gram + noise * (normal @ normal.T) / SIDE


def measured(agops: list[Matrix], grams: list[Matrix]) -> tuple[Tensor, Tensor, float]:
    """What the library is given: eigenvalues and quotients ``[groups, d]``, and ‖WᵀW‖."""
    values, vectors = np.linalg.eigh(np.stack(agops))
    quotients = np.einsum("gdj,gde,gej->gj", vectors, np.stack(grams), vectors)
    norm = math.sqrt(sum(float((gram**2).sum()) for gram in grams))
    return torch.from_numpy(values), torch.from_numpy(quotients), norm


def blocks(pair: tuple[Matrix, Matrix]) -> tuple[list[Matrix], list[Matrix]]:
    """One pair as lists of blocks."""
    return [pair[0]], [pair[1]]


def dense_cosine(agop: Matrix, gram: Matrix, power: float) -> float:
    """The cosine of dense matrices, with scipy's own matrix power."""
    raised = scipy.linalg.fractional_matrix_power(agop, power).real
    return float((raised * gram).sum() / (np.linalg.norm(raised) * np.linalg.norm(gram)))


def best_power(agop: Matrix, gram: Matrix) -> tuple[float, float]:
    """The best power and its cosine: a coarse scan of dense cosines, then scipy."""

    def loss(log_power: float) -> float:
        return -dense_cosine(agop, gram, math.exp(log_power))

    coarse = np.linspace(math.log(0.02), math.log(4), 40)
    best = float(coarse[int(np.argmin([loss(float(point)) for point in coarse]))])
    found = scipy.optimize.minimize_scalar(
        loss, bounds=(best - 0.15, best + 0.15), method="bounded", options={"xatol": 1e-9}
    )
    return math.exp(found.x), -float(found.fun)


def fit(agop: Matrix, gram: Matrix) -> FittedPower:
    """The library's fit."""
    return fitted_power(*measured([agop], [gram]))


# --------------------------------------------------------------------------- against scipy


@pytest.mark.parametrize("power", [0.02, 0.3, 0.5, 1.0, 2.7])
@pytest.mark.parametrize("kind", RELATED)
def test_the_cosine_is_that_of_dense_matrices(kind: str, power: float) -> None:
    """C(s) equals the cosine of WᵀW with scipy's fractional matrix power."""
    agop, gram = related_pair("harmonic", 0.7, kind)
    cosine = power_cosine(*measured([agop], [gram]), power)
    assert cosine == pytest.approx(dense_cosine(agop, gram, power), rel=1e-10)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kind", RELATED)
def test_the_fit_is_scipys(spectrum: str, kind: str) -> None:
    """ŝ and C(ŝ) are what scipy finds on dense matrices; R² is the explained share."""
    agop, gram = related_pair(spectrum, 0.6, kind)
    power, cosine = best_power(agop, gram)
    found = fit(agop, gram)
    assert found.power == pytest.approx(power, rel=1e-5)
    assert found.cosine == pytest.approx(cosine, rel=1e-10)
    raised = scipy.linalg.fractional_matrix_power(agop, found.power).real.reshape(-1, 1)
    residual = np.linalg.lstsq(raised, gram.reshape(-1), rcond=None)[1]
    assert found.r_squared == pytest.approx(1 - float(residual[0]) / (gram**2).sum(), rel=1e-9)


def test_blocks_are_fitted_with_one_power() -> None:
    """Several blocks of unequal scale give the fit of the dense block-diagonal matrices."""
    agops, grams = [], []
    for seed, scale in enumerate((1.0, 0.3, 5.0)):
        basis, values = haar(seed, 8), scale * SPECTRA["harmonic"][:8]
        noise = np.random.default_rng(seed).standard_normal((8, 8))
        agops.append(in_basis(basis, values))
        grams.append(in_basis(basis, values**0.6) + 0.02 * noise @ noise.T)
    found = fitted_power(*measured(agops, grams))
    power, cosine = best_power(scipy.linalg.block_diag(*agops), scipy.linalg.block_diag(*grams))
    assert (found.power, found.cosine) == pytest.approx((power, cosine), rel=1e-5)


@pytest.mark.parametrize("kind", RELATED)
def test_the_flat_range_is_where_the_cosine_is_within_a_hundredth(kind: str) -> None:
    """The ends of the flat range are those of a fine scan."""
    agop, gram = related_pair("harmonic", 0.7, kind)
    given = measured([agop], [gram])
    found = fitted_power(*given)
    scan = np.linspace(0.02, 4, 2000)
    inside = [s for s in scan if power_cosine(*given, float(s)) >= found.cosine - 0.01]
    assert found.flat_low == pytest.approx(min(inside), abs=2e-3)
    assert found.flat_high == pytest.approx(max(inside), abs=2e-3)
    assert 0.02 < found.flat_low < found.power < found.flat_high < 4


@pytest.mark.parametrize(("power", "end"), [(0.7, 0.02), (3.5, 4.0)])
def test_the_flat_range_ends_where_the_search_does(power: float, end: float) -> None:
    """A range that is flat beyond 0.02 or 4 is given up to these."""
    values = torch.linspace(1.0, 0.7, 20, dtype=torch.float64)
    quotients = values**power
    found = fitted_power(values, quotients, float(quotients.norm()))
    assert found.power == pytest.approx(power, rel=1e-5)
    assert end in (found.flat_low, found.flat_high)
    assert found.flat_high - found.flat_low < 3.5


# --------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", RELATED)
def test_a_power_is_recovered(spectrum: str, power: float, kind: str) -> None:
    """36 related pairs give back the power that they were made with."""
    found = fit(*related_pair(spectrum, power, kind))
    assert found.reason == ""
    assert abs(math.log(found.power / power)) < RELATED[kind][2]
    assert found.cosine > 0.9


@pytest.mark.parametrize("power", [0.021, 1 / 3, 3.99])
def test_an_exact_power_is_recovered(power: float) -> None:
    """WᵀW = c·AGOPˢ gives s, a cosine of 1 and an R² of 1, up to the ends of the range."""
    values = torch.from_numpy(SPECTRA["harmonic"])
    quotients = 3 * values**power
    found = fitted_power(values, quotients, float(quotients.norm()))
    assert found.power == pytest.approx(power, rel=1e-5)
    assert (found.cosine, found.r_squared) == pytest.approx((1.0, 1.0), abs=1e-12)


def random_rotation_level(values: Matrix, power: float) -> float:
    """tr Aˢ tr N/(d‖Aˢ‖‖N‖) for N with the spectrum of A."""
    raised = values**power
    norms = np.linalg.norm(raised) * np.linalg.norm(values)
    return float(raised.sum() * values.sum() / (len(values) * norms))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("side", [8, SIDE])
def test_independent_bases_have_no_power(spectrum: str, side: int) -> None:
    """Pairs that share a spectrum but no basis: of 40 many have a peak, a few are beyond chance."""
    values = SPECTRA[spectrum][:: SIDE // side]
    agop, found, peaks = np.diag(values), 0, 0
    for seed in range(40):
        given = measured([agop], [in_basis(haar(seed, side), values)])
        peaks += not math.isnan(fitted_power(*given).power)
        fitted = fitted_power(*given, lambda s: random_rotation_level(values, s))
        found += not math.isnan(fitted.power)
    assert peaks >= 5
    assert found <= 3


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kind", RELATED)
def test_a_related_pair_is_beyond_chance(spectrum: str, kind: str) -> None:
    """The level takes no power from bases that are related."""
    given = measured(*blocks(related_pair(spectrum, 1.0, kind)))
    with_level = fitted_power(*given, lambda s: random_rotation_level(SPECTRA[spectrum], s))
    assert with_level == fitted_power(*given)
    assert with_level.reason == ""


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e150, 1e300])
def test_the_fit_has_no_scale(scale: float) -> None:
    """AGOP and WᵀW can be as small or as large as float64 goes."""
    values, quotients, norm = measured(*blocks(related_pair("harmonic", 0.7, "noise")))
    plain = astuple(fitted_power(values, quotients, norm))[:5]
    for given in (
        (values * scale, quotients, norm),
        (values, quotients * scale, norm * scale),
        (values * scale, quotients / scale, norm / scale),
    ):
        assert astuple(fitted_power(*given))[:5] == pytest.approx(plain, rel=1e-6)


def test_dropped_eigenvalues_play_no_part() -> None:
    """Zeros among the eigenvalues change nothing, whatever their quotients."""
    values, quotients, norm = measured(*blocks(related_pair("harmonic", 0.7, "noise")))
    padded = torch.cat([values, torch.zeros(1, 5)], dim=1)
    beside = torch.cat([quotients, torch.full((1, 5), math.nan)], dim=1)
    assert fitted_power(padded, beside, norm) == fitted_power(values, quotients, norm)


# --------------------------------------------------------------------------- undefined

EXACT = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
RISING = torch.tensor([1.0, 1e-5, 1e-8, 1e-9], dtype=torch.float64)
NAN = math.nan


@pytest.mark.parametrize(
    ("values", "quotients", "norm", "reason"),
    [
        (EXACT[:2], EXACT[:2], 2.0, "2 eigenvalues kept, a power needs 3"),
        (1 + 0.1 * EXACT, EXACT, 2.0, "eigenvalues too close"),
        (RISING, torch.tensor([1.0, 0, 0, 0]), 1.0, "no peak inside 0.02 < s < 4.0: best at s = 4"),
        (EXACT, EXACT.flip(0), 2.0, "no peak inside 0.02 < s < 4.0: best at s = 0.02"),
        (EXACT, EXACT, 0.0, "weight is zero"),
        (0 * EXACT, EXACT, 1.0, "predicted matrix is zero"),
        (EXACT, EXACT * NAN, 1.0, "not finite"),
        (EXACT * NAN, EXACT, 1.0, "not finite"),
        (EXACT, EXACT, math.inf, "not finite"),
    ],
)
def test_what_has_no_power_is_nan(
    values: Tensor, quotients: Tensor, norm: float, reason: str
) -> None:
    """Each way to be undefined gives five NaN and its reason."""
    found = fitted_power(values, quotients, norm)
    assert all(math.isnan(number) for number in astuple(found)[:5])
    assert found.reason.startswith(reason)


def test_a_fit_within_chance_is_nan() -> None:
    """The level is asked for at ŝ, with two standard deviations; a NaN level decides nothing."""
    given = measured(*blocks(related_pair("harmonic", 0.7, "moderate rotation")))
    plain = fitted_power(*given)
    margin = 2 * math.sqrt(2) / SIDE
    edge = (plain.cosine - margin) / (1 - margin)
    asked: list[float] = []

    def level(power: float) -> float:
        asked.append(power)
        return edge + 1e-6

    within = fitted_power(*given, level)
    assert asked == [plain.power]
    assert math.isnan(within.power)
    assert within.reason.startswith(f"cosine {plain.cosine:.3g} at s = {plain.power:.3g}, within")
    assert fitted_power(*given, lambda _: edge - 1e-6) == plain
    assert fitted_power(*given, lambda _: math.nan) == plain


def test_an_undefined_cosine_is_nan() -> None:
    """Nothing kept, or no weight: there is no cosine at any power."""
    assert math.isnan(power_cosine(0 * EXACT, EXACT, 1.0, 0.5))
    assert math.isnan(power_cosine(EXACT, EXACT, 0.0, 0.5))


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
def test_a_power_that_is_none_is_refused(power: float) -> None:
    """Powers are positive and finite."""
    with pytest.raises(ValueError, match="power must be positive and finite"):
        power_cosine(EXACT, EXACT, 1.0, power)


def test_eigenvalues_without_their_quotients_are_refused() -> None:
    """Values and quotients come in pairs."""
    with pytest.raises(ValueError, match=r"\(4,\) values, \(3,\) quotients"):
        fitted_power(EXACT, EXACT[:3], 1.0)
