"""`relations`: predictions, residuals and layer scalars against dense algebra; exact identities."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feature_probe import RELATIONS, ConfigurationError, FeatureProbeError, measure
from feature_probe.theory.agreement import compare
from feature_probe.theory.factored import Factored
from feature_probe.theory.matrices import LayerMatrices
from feature_probe.theory.relations import (
    GRAM_MATRICES,
    LayerStatistics,
    Sum,
    clamp_tolerance,
    parse_powers,
    parse_relations,
)

CLAMP = 10 * torch.finfo(torch.float64).eps
LAMBDA = 0.03
POWERS = (1 / 3, 0.5, 1.0, 2.0)
SCORES = (
    "pearson",
    "cosine",
    "trace_free_cosine",
    "chance_cosine",
    "scale",
    "off_diagonal_pearson",
    "spearman",
    "chance_spread",
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def statistics(
    groups: int, d_out: int, d_in: int, *, rank: int | None = None, decay: float | None = LAMBDA
) -> LayerStatistics:
    """Random W, G, U, K and E; K and E of the given rank (full if None)."""
    rows = d_out + 3 if rank is None else rank
    k_rows, e_rows = normal(groups, rows, d_out, seed=2), normal(groups, rows, d_out, seed=3)
    return LayerStatistics(
        weight=normal(groups, d_out, d_in),
        gradient=normal(groups, d_out, d_in, seed=1),
        jacobian=k_rows.mT @ k_rows,
        loss=e_rows.mT @ e_rows,
        weight_decay=decay,
        tolerance=CLAMP,
        update=normal(groups, d_out, d_in, seed=4),
    )


CASES: dict[str, LayerStatistics] = {
    "wide": statistics(1, 4, 9),
    "tall": statistics(1, 9, 4),
    "square": statistics(1, 5, 5),
    "one output": statistics(1, 1, 4),
    "one input": statistics(1, 4, 1),
    "low rank": statistics(1, 7, 9, rank=3),
    "groups, wide": statistics(3, 2, 5),
    "groups, tall": statistics(2, 6, 3),
    "no decay": statistics(1, 4, 9, decay=0.0),
    "decay not known": statistics(1, 4, 9, decay=None),
}
ALL_CASES = pytest.mark.parametrize("name", CASES)
#: Those of W itself; others are tested in test_init_centered.py and test_initial_network.py.
PLAIN = [name for name, relation in RELATIONS.items() if relation.basis == "weight"]
ALL_RELATIONS = pytest.mark.parametrize("relation", PLAIN)


def dense_power(matrix: Tensor, power: float) -> Tensor:
    """Power of PSD blocks, eigenvalues at or below the clamp dropped."""
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.where(values > CLAMP * values[:, -1:], values.clamp_min(0) ** power, 0.0)
    return vectors @ torch.diag_embed(values) @ vectors.mT


def dense_root(matrix: Tensor) -> Tensor:
    """√(XXᵀ) = U S Uᵀ of X = U S Vᵀ."""
    u, s, _ = torch.linalg.svd(matrix)
    return u @ torch.diag_embed(s) @ u.mT


def dense_prediction(given: LayerStatistics, relation: str, power: float) -> Tensor:
    """What the equation in the table says, written out."""
    w, g, k, e, u = given.weight, given.gradient, given.jacobian, given.loss, given.update
    assert g is not None
    assert k is not None
    assert e is not None
    assert u is not None
    scale = given.weight_decay or 1.0
    formulas: dict[str, Callable[[], Tensor]] = {
        "fact": lambda: -w.mT @ g / scale,
        "bfact": lambda: -w @ g.mT / scale,
        "fact_sym": lambda: dense_root(-w.mT @ g / scale),
        "bfact_sym": lambda: dense_root(-w @ g.mT / scale),
        "update_fact": lambda: -w.mT @ u / scale,
        "update_bfact": lambda: -w @ u.mT / scale,
        "nfa": lambda: dense_power(w.mT @ k @ w, power),
        "enfa": lambda: dense_power(w.mT @ e @ w, power),
        "bnfa": lambda: dense_power(k, power),
        "benfa": lambda: dense_power(e, power),
    }
    return formulas[relation]()


def dense_gram(given: LayerStatistics, relation: str) -> Tensor:
    """WᵀW or WWᵀ."""
    w = given.weight
    return w.mT @ w if RELATIONS[relation].side == "forward" else w @ w.mT


def powers_of(relation: str) -> tuple[float | None, ...]:
    """The powers a relation is asked with."""
    return POWERS if RELATIONS[relation].has_power else (None,)


# --------------------------------------------------------------------------- predictions


@ALL_RELATIONS
@ALL_CASES
def test_predictions_equal_the_equations(name: str, relation: str) -> None:
    """Every prediction equals its equation with dense matrices, at every power."""
    matrices = LayerMatrices(CASES[name], framed=False)
    for power in powers_of(relation):
        expected = dense_prediction(CASES[name], relation, power or 1.0)
        got = matrices.prediction(RELATIONS[relation], power).dense()
        assert got.shape == expected.shape
        assert float((got - expected).norm()) < 1e-10 * float(expected.norm()), power


@ALL_RELATIONS
@ALL_CASES
def test_grams_are_the_weights(name: str, relation: str) -> None:
    """The measured side is WᵀW for forward and WWᵀ for backward relations."""
    expected = dense_gram(CASES[name], relation)
    got = LayerMatrices(CASES[name], framed=False).gram(RELATIONS[relation]).dense()
    assert float((got - expected).norm()) < 1e-13 * float(expected.norm())


@ALL_RELATIONS
@ALL_CASES
def test_scores_do_not_depend_on_the_frame(name: str, relation: str) -> None:
    """In coordinates of W's row space every score is that of the dense matrices."""
    given = CASES[name]
    for power in powers_of(relation):
        framed = LayerMatrices(given)
        got = compare(
            framed.gram(RELATIONS[relation]), framed.prediction(RELATIONS[relation], power)
        )
        a, x = dense_gram(given, relation), dense_prediction(given, relation, power or 1.0)
        identity = torch.eye(a.shape[-1], dtype=a.dtype).expand(len(a), -1, -1)
        expected = compare(Factored(identity, a), Factored(identity, x))
        assert got.reason == expected.reason
        for score in SCORES:
            one, two = getattr(got, score), getattr(expected, score)
            assert one == pytest.approx(two, rel=1e-9, abs=1e-10, nan_ok=True), score


@pytest.mark.parametrize("relation", ["nfa", "enfa", "bnfa", "benfa"])
@pytest.mark.parametrize("name", ["wide", "tall", "low rank", "groups, wide", "groups, tall"])
def test_number_of_kept_eigenvalues(name: str, relation: str) -> None:
    """The spectrum keeps the rank of the prediction, whether framed or not."""
    rank = int(torch.linalg.matrix_rank(dense_prediction(CASES[name], relation, 1.0)).sum())
    for framed in (True, False):
        matrices = LayerMatrices(CASES[name], framed=framed)
        assert matrices.spectrum(RELATIONS[relation]).kept == rank


def test_asking_twice_in_any_order_gives_the_same() -> None:
    """What is shared between powers and relations does not depend on who asked first."""
    forwards, backwards = LayerMatrices(CASES["wide"]), LayerMatrices(CASES["wide"])
    questions = [(RELATIONS[name], power) for name in PLAIN for power in powers_of(name)]
    first = {question: forwards.prediction(*question).squared_norm() for question in questions}
    for question in reversed(questions):
        assert torch.equal(backwards.prediction(*question).squared_norm(), first[question])


def test_the_clamp_is_of_the_sums() -> None:
    """With float32 sums an eigenvalue of 1e-7 of the largest is noise; with float64 it counts."""
    k = torch.diag(torch.tensor([1.0, 0.5, 1e-7], dtype=torch.float64))[None]
    for dtype, kept in ((torch.float32, 2), (torch.float64, 3)):
        given = LayerStatistics(
            normal(1, 3, 4), None, k.to(dtype), None, None, clamp_tolerance(dtype)
        )
        assert LayerMatrices(given).spectrum(RELATIONS["bnfa"]).kept == kept
    assert clamp_tolerance(torch.float32) == pytest.approx(1.2e-6, rel=0.02)


@pytest.mark.parametrize("sum_name", ["gradient", "update", "jacobian", "loss"])
def test_an_absent_sum_is_refused(sum_name: str) -> None:
    """A prediction from a sum that was not measured raises; its scalars are NaN."""
    matrices = LayerMatrices(replace(CASES["wide"], **{sum_name: None}))
    for relation in map(RELATIONS.__getitem__, PLAIN):
        if relation.needs == sum_name:
            with pytest.raises(ValueError, match="not measured"):
                matrices.prediction(relation, None)
        else:
            matrices.prediction(relation, None)
    slopes: tuple[Sum, ...] = ("gradient", "update")
    for needs in slopes:
        missing = sum_name == needs
        assert math.isnan(matrices.stationarity(needs)) == missing
        assert math.isnan(matrices.decay_ratio(needs)) == missing


# --------------------------------------------------------------------------- residual and scalars

EQUALITIES = [name for name, relation in RELATIONS.items() if relation.is_equality]


@pytest.mark.parametrize("relation", EQUALITIES)
@pytest.mark.parametrize("name", ["wide", "tall", "square", "groups, wide", "groups, tall"])
def test_residual_is_the_dense_one(name: str, relation: str) -> None:
    """‖X − A‖/‖A‖ equals the dense formula where that is accurate."""
    a, x = dense_gram(CASES[name], relation), dense_prediction(CASES[name], relation, 1.0)
    got = LayerMatrices(CASES[name]).residual(RELATIONS[relation])
    assert math.isclose(got, float((x - a).norm() / a.norm()), rel_tol=1e-10)


def nearly_stationary(shape: tuple[int, int, int], distance: float) -> LayerStatistics:
    """G = −λW + λ·distance·(random of W's size)."""
    w, noise = normal(*shape), normal(*shape, seed=5)
    gradient = LAMBDA * (distance * noise / noise.norm() * w.norm() - w)
    return LayerStatistics(w, gradient, None, None, LAMBDA, CLAMP, update=gradient)


@pytest.mark.parametrize("relation", ["fact", "bfact"])
@pytest.mark.parametrize("shape", [(1, 8, 20), (1, 20, 8), (3, 4, 6)], ids=str)
def test_a_residual_of_1e_minus_11_is_right(shape: tuple[int, int, int], relation: str) -> None:
    """Near stationarity the residual is right to 1 %; through inner products it is 0 or 1e-8."""
    given = nearly_stationary(shape, 1e-11)
    w, g = given.weight, given.gradient
    assert g is not None
    gap = w + g / LAMBDA
    difference = w.mT @ gap if relation == "fact" else w @ gap.mT
    expected = float(difference.norm() / dense_gram(given, relation).norm())
    assert 1e-12 < expected < 1e-10
    matrices = LayerMatrices(given)
    assert math.isclose(matrices.residual(RELATIONS[relation]), expected, rel_tol=1e-2)
    a, x = matrices.gram(RELATIONS[relation]), matrices.prediction(RELATIONS[relation], None)
    squared = a.squared_norm() - 2 * a.inner(x) + x.squared_norm()
    naive = math.sqrt(abs(float(squared)) / float(a.squared_norm()))
    assert abs(naive - expected) > 0.9 * expected


@pytest.mark.parametrize("relation", ["fact_sym", "bfact_sym"])
@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9])
def test_residuals_of_the_symmetrised_forms_are_small_too(relation: str, distance: float) -> None:
    """√(FACT·FACTᵀ) − WᵀW falls with the distance, well below the floor of inner products."""
    given = nearly_stationary((1, 8, 20), distance)
    got = LayerMatrices(given).residual(RELATIONS[relation])
    assert 0.01 * distance < got < 3 * distance


@pytest.mark.parametrize("relation", EQUALITIES)
def test_at_a_stationary_point_every_residual_vanishes(relation: str) -> None:
    """G = −λW: residual at rounding, stationarity 0, decay ratio 1."""
    for shape in ((1, 8, 20), (1, 20, 8), (2, 3, 3)):
        matrices = LayerMatrices(nearly_stationary(shape, 0.0))
        assert matrices.residual(RELATIONS[relation]) < 1e-13
        assert matrices.stationarity() < 1e-14
        assert math.isclose(matrices.decay_ratio(), 1.0, rel_tol=1e-13)


@ALL_RELATIONS
@pytest.mark.parametrize("name", ["no decay", "decay not known"])
def test_without_decay_there_is_no_residual(name: str, relation: str) -> None:
    """λ = 0 or unknown: residual, stationarity and decay ratio are NaN."""
    matrices = LayerMatrices(CASES[name])
    assert math.isnan(matrices.residual(RELATIONS[relation]))
    assert math.isnan(matrices.stationarity())
    assert math.isnan(matrices.decay_ratio())


@pytest.mark.parametrize("relation", ["nfa", "enfa", "bnfa", "benfa"])
def test_proportionalities_have_no_residual(relation: str) -> None:
    """Where only proportionality is claimed the residual is NaN."""
    assert math.isnan(LayerMatrices(CASES["wide"]).residual(RELATIONS[relation]))


@pytest.mark.parametrize("slope", ["gradient", "update"])
@pytest.mark.parametrize("name", ["wide", "tall", "groups, wide", "groups, tall"])
def test_stationarity_and_decay_ratio(name: str, slope: Sum) -> None:
    """‖λW + G‖/‖λW‖, and −⟨W,G⟩/(λ‖W‖²) = tr FACT/tr WᵀW; the same with U for G."""
    given = CASES[name]
    w, g = given.weight, given.sum(slope)
    assert g is not None
    matrices = LayerMatrices(given)
    stationarity = float((LAMBDA * w + g).norm() / (LAMBDA * w).norm())
    assert math.isclose(matrices.stationarity(slope), stationarity, rel_tol=1e-12)
    prefix = "" if slope == "gradient" else "update_"
    traces = [
        float(torch.einsum("gii->", matrix))
        for matrix in (dense_prediction(given, f"{prefix}fact", 1.0), dense_gram(given, "fact"))
    ]
    assert math.isclose(matrices.decay_ratio(slope), traces[0] / traces[1], rel_tol=1e-10)
    # tr FACT = tr bFACT = −⟨W,G⟩/λ
    expected = -float((w * g).sum()) / LAMBDA
    for relation in (f"{prefix}fact", f"{prefix}bfact"):
        trace = matrices.prediction(RELATIONS[relation], None).traces().sum()
        assert math.isclose(float(trace), expected, rel_tol=1e-10)


# --------------------------------------------------------------------------- R², fitted power

PROPORTIONALITIES = [name for name in PLAIN if not RELATIONS[name].is_equality]
SIZED = pytest.mark.parametrize(
    "name", ["wide", "tall", "square", "low rank", "groups, wide", "groups, tall"]
)


@pytest.mark.parametrize("relation", EQUALITIES)
@SIZED
def test_r_squared_of_an_equality(name: str, relation: str) -> None:
    """1 − ‖X − N‖²/‖N − mean N‖² over the entries inside the blocks."""
    n, x = dense_gram(CASES[name], relation), dense_prediction(CASES[name], relation, 1.0)
    expected = 1 - float((x - n).square().sum() / (n - n.mean()).square().sum())
    got = LayerMatrices(CASES[name]).r_squared(RELATIONS[relation])
    assert math.isclose(got, expected, rel_tol=1e-10)


@pytest.mark.parametrize("relation", EQUALITIES)
def test_r_squared_is_one_at_a_stationary_point(relation: str) -> None:
    """G = −λW: the prediction explains all; a little off it is as little less, to rounding."""
    exact = LayerMatrices(nearly_stationary((1, 8, 20), 0.0)).r_squared(RELATIONS[relation])
    assert math.isclose(exact, 1.0, rel_tol=1e-14)
    near = LayerMatrices(nearly_stationary((1, 8, 20), 1e-3))
    assert 1e-8 < 1 - near.r_squared(RELATIONS[relation]) < 1e-4


@pytest.mark.parametrize("relation", PROPORTIONALITIES)
@SIZED
def test_r_squared_of_a_proportionality(name: str, relation: str) -> None:
    """1 − min_c ‖N − c·X‖²/‖N‖² by least squares, at every power."""
    matrices, n = LayerMatrices(CASES[name]), dense_gram(CASES[name], relation)
    for power in POWERS:
        x = dense_prediction(CASES[name], relation, power)
        fit = (n * x).sum() / x.square().sum()
        expected = 1 - float((n - fit * x).square().sum() / n.square().sum())
        got = matrices.r_squared(RELATIONS[relation], power)
        assert math.isclose(got, expected, rel_tol=1e-9), power


def test_r_squared_undefined() -> None:
    """NaN without λ, for a zero side, and for a Gram matrix whose entries are all equal."""
    for name in ("no decay", "decay not known"):
        for relation in EQUALITIES:
            assert math.isnan(LayerMatrices(CASES[name]).r_squared(RELATIONS[relation]))
    given = CASES["square"]
    assert given.jacobian is not None
    zero_weight = LayerMatrices(replace(given, weight=torch.zeros_like(given.weight)))
    zero_sum = LayerMatrices(replace(given, jacobian=torch.zeros_like(given.jacobian)))
    for matrices in (zero_weight, zero_sum):
        assert math.isnan(matrices.r_squared(RELATIONS["nfa"], 0.5))
        assert math.isnan(matrices.r_squared(RELATIONS["bnfa"], 0.5))
    for relation in EQUALITIES:
        assert math.isnan(zero_weight.r_squared(RELATIONS[relation]))
    constant = LayerMatrices(replace(given, weight=torch.ones_like(given.weight)))
    assert math.isnan(constant.r_squared(RELATIONS["fact"]))


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("relation", PROPORTIONALITIES)
@SIZED
def test_power_inputs(name: str, relation: str, framed: bool) -> None:
    """Eigenvalues, vᵀNv and ‖N‖ give the dense cosine at any power; their sums are traces."""
    matrices, n = LayerMatrices(CASES[name], framed=framed), dense_gram(CASES[name], relation)
    values, quotients, norm = matrices.power_inputs(RELATIONS[relation])
    x = dense_prediction(CASES[name], relation, 1.0)
    expected = torch.linalg.eigvalsh(x).flatten()
    expected = expected[expected > 1e-10 * expected.max()]
    torch.testing.assert_close(values.sort().values, expected.sort().values)
    assert quotients.shape == values.shape
    assert math.isclose(norm, float(n.norm()), rel_tol=1e-12)
    for power in (*POWERS, 0.1, 3.0):
        x = dense_prediction(CASES[name], relation, power)
        raised = values**power
        cosine = float((raised * quotients).sum() / raised.norm()) / norm
        assert math.isclose(cosine, float((n * x).sum() / (n.norm() * x.norm())), rel_tol=1e-9)


# --------------------------------------------------------------------------- range of numbers


def rescaled(given: LayerStatistics, **factors: float) -> LayerStatistics:
    """The statistics with some of them multiplied."""
    changes: dict[str, Any] = {
        name: getattr(given, name) * factor for name, factor in factors.items()
    }
    return replace(given, **changes)


FACTORS: dict[str, Callable[[float], dict[str, float]]] = {
    "weight": lambda c: {"weight": c},
    "gradient and update": lambda c: {"gradient": c, "update": c},
    "jacobian and loss": lambda c: {"jacobian": c, "loss": c},
    "weight and gradient": lambda c: {"weight": c, "gradient": c, "update": c},
}


@pytest.mark.parametrize("scale", [1e-200, 1e-180, 1e150, 1e200])
@pytest.mark.parametrize("what", FACTORS)
@pytest.mark.parametrize("name", ["wide", "tall", "groups, wide"])
def test_scores_at_any_scale(name: str, what: str, scale: float) -> None:
    """Entries of 1e-200 or 1e200 in W, G, U, K or E give the scores of ordinary ones."""
    given = CASES[name]
    ordinary = LayerMatrices(given)
    extreme = LayerMatrices(rescaled(given, **FACTORS[what](scale)))
    for relation in map(RELATIONS.__getitem__, PLAIN):
        for power in powers_of(relation.name):
            plain, got = (
                compare(matrices.gram(relation), matrices.prediction(relation, power))
                for matrices in (ordinary, extreme)
            )
            for score in (score for score in SCORES if score != "scale"):
                one, two = getattr(got, score), getattr(plain, score)
                assert one == pytest.approx(two, rel=1e-9, abs=1e-10, nan_ok=True), score
            if relation.has_power:
                squared = extreme.r_squared(relation, power)
                assert math.isclose(squared, ordinary.r_squared(relation, power), rel_tol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e-180, 1e150, 1e200])
@pytest.mark.parametrize("name", ["wide", "tall", "groups, wide"])
def test_residuals_at_any_scale(name: str, scale: float) -> None:
    """W and G in tiny or huge units, and λ with G, leave residual, R² and both scalars alone."""
    given = CASES[name]
    ordinary = LayerMatrices(given)
    small = min(scale, 1e-100) * LAMBDA
    for other in (
        rescaled(given, weight=scale, gradient=scale, update=scale),
        replace(rescaled(given, gradient=small, update=small), weight_decay=LAMBDA * small),
    ):
        extreme = LayerMatrices(other)
        for relation in map(RELATIONS.__getitem__, EQUALITIES):
            assert math.isclose(
                extreme.residual(relation), ordinary.residual(relation), rel_tol=1e-9
            )
            assert math.isclose(
                extreme.r_squared(relation), ordinary.r_squared(relation), rel_tol=1e-9
            )
            for scalar in ("stationarity", "decay_ratio"):
                one, two = (getattr(m, scalar)(relation.needs) for m in (extreme, ordinary))
                assert math.isclose(one, two, rel_tol=1e-9), scalar


def test_a_gradient_far_from_balance_has_a_huge_residual() -> None:
    """G of 1e200 against W of 1: the residual is 1e200-fold, and infinite where that overflows."""
    given = CASES["wide"]
    ordinary = dense_prediction(given, "fact", 1.0).norm() / dense_gram(given, "fact").norm()
    huge = LayerMatrices(rescaled(given, gradient=1e200)).residual(RELATIONS["fact"])
    assert math.isclose(huge, 1e200 * float(ordinary), rel_tol=1e-9)
    beyond = LayerMatrices(rescaled(given, gradient=1e200, weight=1e-200))
    assert math.isinf(beyond.residual(RELATIONS["fact"]))
    assert math.isinf(beyond.stationarity())


def test_dense_matrices_keep_their_scale() -> None:
    """What is scaled inside comes out in its own units, where floating point has them."""
    given = rescaled(CASES["wide"], weight=1e-100, jacobian=1e180, gradient=1e-120)
    matrices = LayerMatrices(given, framed=False)
    for name, power, factor in (("fact", None, 1e-220), ("nfa", 1.0, 1e-20), ("bnfa", 0.5, 1e90)):
        expected = dense_prediction(CASES["wide"], name, power or 1.0) * factor
        got = matrices.prediction(RELATIONS[name], power).dense()
        assert float((got / factor - expected / factor).norm()) < 1e-9 * float(
            (expected / factor).norm()
        )
    gram = matrices.gram(RELATIONS["fact"]).dense()
    torch.testing.assert_close(gram * 1e200, dense_gram(CASES["wide"], "fact"))


# --------------------------------------------------------------------------- the table


_GRAMS = {
    "weight": "WᵀW",
    "change": "W_cᵀW_c",
    "initial": "W₀ᵀW₀",
    "gradient": "GᵀG",
    "motion": "ΔWᵀΔW",
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_says_what_it_is(relation: str) -> None:
    """Name, symbol, an equation with its measured side, and a source in the papers."""
    entry = RELATIONS[relation]
    assert entry.name == relation
    assert entry.symbol
    measured = _GRAMS[entry.basis]
    assert entry.equation.startswith(measured if entry.side == "forward" else "WWᵀ")
    assert ("∝" in entry.equation) != entry.is_equality
    assert ("ˢ" in entry.equation) == entry.has_power
    starts = ("C-NFA",) if entry.basis != "weight" else ("Thm", "Remark", "App.", "§")
    assert entry.source.startswith(starts)
    assert entry.label(None) == relation
    assert entry.label(0.5) == f"{relation}^0.5"
    assert entry.label(1.0) == f"{relation}^1"


def test_gram_names_have_their_sides() -> None:
    """`nfm` is WᵀW and `bnfm` is WWᵀ; neither is the name of a relation."""
    assert {name: relation.side for name, relation in GRAM_MATRICES.items()} == {
        "nfm": "forward",
        "bnfm": "backward",
        "init_centered_nfm": "forward",
        "initial_nfm": "forward",
    }
    assert not set(GRAM_MATRICES) & set(RELATIONS)


def test_parse_relations() -> None:
    """One name, or several in the order given, each once."""
    assert [r.name for r in parse_relations("nfa")] == ["nfa"]
    assert [r.name for r in parse_relations(["nfa", "fact", "nfa"])] == ["nfa", "fact"]
    assert [r.name for r in parse_relations(iter(RELATIONS))] == list(RELATIONS)


@pytest.mark.parametrize("names", ["FACT", ["nfa", "agop"], ["nfa^0.5"], [None]], ids=str)
def test_an_unknown_relation_lists_the_known(names: Any) -> None:
    """The message names what was given and every name allowed."""
    with pytest.raises(ConfigurationError, match="unknown relation") as error:
        parse_relations(names)
    assert all(name in str(error.value) for name in RELATIONS)


def test_no_relation() -> None:
    """An empty selection is refused, with the names there are."""
    with pytest.raises(ConfigurationError, match=r"no relation given; choose from fact"):
        parse_relations([])


def test_parse_powers() -> None:
    """One power, or several in the order given, each once, as floats."""
    assert parse_powers(1) == (1.0,)
    assert parse_powers([1, 0.5, 1.0]) == (1.0, 0.5)
    assert all(type(power) is float for power in parse_powers([1, 2]))


@pytest.mark.parametrize("powers", [0.0, -1, [0.5, math.nan], [math.inf]], ids=str)
def test_powers_must_be_positive_and_finite(powers: Any) -> None:
    """Zero, negative, NaN and infinite powers are refused."""
    with pytest.raises(ConfigurationError, match="positive and finite"):
        parse_powers(powers)


@pytest.mark.parametrize("powers", [True, [True], ["1"], [None]], ids=str)
def test_powers_must_be_numbers(powers: Any) -> None:
    """What is no number is refused as such, with what was given."""
    with pytest.raises(ConfigurationError, match="must be numbers"):
        parse_powers(powers)


def test_no_power() -> None:
    """An empty list of powers is refused."""
    with pytest.raises(ConfigurationError, match="powers is empty"):
        parse_powers(())


def test_errors_are_of_the_package_and_of_python() -> None:
    """A caller may catch them as FeatureProbeError or as ValueError."""
    assert issubclass(ConfigurationError, FeatureProbeError)
    assert issubclass(ConfigurationError, ValueError)


# --------------------------------------------------------------------------- MATH §12


class SumOfRelu(nn.Module):
    """f(x) = x₁⁺ + x₂⁺ with the identity as first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False).double()
        nn.init.eye_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x)).sum(1, keepdim=True)


def test_sum_of_two_relus() -> None:
    """AGOP = ¼[[2,1],[1,2]] against WᵀW = I on the four sign patterns (MATH §12)."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    report = measure(
        SumOfRelu(), [x[:1], x[1:]], relations="nfa", powers=(1.0, 0.5), progress=False
    )
    agop = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(report.matrix("layer", "nfa", 1.0), agop)
    torch.testing.assert_close(report.matrix("layer", "nfm"), torch.eye(2, dtype=torch.float64))
    record = report.record("layer", "nfa", 1.0)
    assert math.isclose(record.cosine, 4 / math.sqrt(2 * 10), rel_tol=1e-12)
    assert math.isnan(record.trace_free_cosine)
    assert "identity" in record.status
    assert math.isclose(record.scale, 4 * 4 / 10, rel_tol=1e-12)  # ⟨I, X⟩/‖X‖², X = ¼[[2,1],[1,2]]


def balanced_net(widths: tuple[int, ...]) -> nn.Sequential:
    """A deep linear net with W_{l+1}ᵀW_{l+1} = W_l W_lᵀ, singular values shared by the layers."""
    rank = min(widths)
    singular = torch.linspace(0.5, 1.5, rank, dtype=torch.float64)
    frames = [torch.linalg.qr(normal(width, rank, seed=i)).Q for i, width in enumerate(widths)]
    layers = []
    for below, above in pairwise(frames):
        layer = nn.Linear(len(below), len(above), bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(above @ torch.diag(singular) @ below.T)
        layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("widths", [(5, 5, 5, 5), (6, 4, 5, 3), (3, 7, 4)], ids=str)
def test_a_balanced_deep_linear_net(widths: tuple[int, ...]) -> None:
    """AGOP_l = (W_lᵀW_l)^{L−l+1} for any data, so that NFA holds at s = 1/(L−l+1) (MATH §12)."""
    model = balanced_net(widths)
    depth = len(model)
    powers = sorted({1 / (depth - layer) for layer in range(depth)} | {1.0})
    report = measure(
        model, [normal(3, widths[0], seed=9)], relations="nfa", powers=powers, progress=False
    )
    for index in range(depth):
        exponent = depth - index
        nfm = report.matrix(str(index), "nfm")
        agop = report.matrix(str(index), "nfa", 1.0)
        torch.testing.assert_close(
            agop, torch.linalg.matrix_power(nfm, exponent), rtol=1e-10, atol=1e-12
        )
        record = report.record(str(index), "nfa", 1 / exponent)
        assert math.isclose(record.cosine, 1.0, rel_tol=1e-12)
        assert math.isclose(record.scale, 1.0, rel_tol=1e-10)
        assert record.n_kept == min(widths)


@pytest.mark.parametrize(("k", "d"), [(300, 100), (100, 100), (60, 240)])
def test_independent_gaussian_grams(k: int, d: int) -> None:
    """The cosine of two independent Gaussian Gram matrices is 1/(1 + d/k), all of it by chance."""
    a, x = (Factored.gram(normal(1, k, d, seed=seed)).thin() for seed in (1, 2))
    agreement = compare(a, x)
    # ‖WᵀW‖² = kd(k + d + 1): relative deviation of order 1/d
    assert math.isclose(agreement.cosine, 1 / (1 + d / k), rel_tol=0.03)
    assert math.isclose(agreement.chance_cosine, agreement.cosine, abs_tol=0.01)
    assert abs(agreement.trace_free_cosine) < 0.05


def test_trace_of_fact_through_measure() -> None:
    """The traces of FACT and bFACT are −⟨W, G⟩/λ, G by plain autograd (MATH §12)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = normal(8, 4), normal(8, 2, seed=1)
    report = measure(
        model, [(x[:3], y[:3]), (x[3:], y[3:])], nn.MSELoss(), weight_decay=LAMBDA, progress=False
    )
    nn.MSELoss()(model(x), y).backward()
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        expected = -float((weight.detach() * weight.grad).sum()) / LAMBDA
        for kind in ("fact", "bfact"):
            assert math.isclose(float(report.matrix(name, kind).trace()), expected, rel_tol=1e-10)
        ratio = expected / float(weight.detach().square().sum())
        assert math.isclose(report.record(name, "fact").decay_ratio, ratio, rel_tol=1e-10)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1.2e-3, 0.8e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_a_residual_does_not_lose_digits_to_cancellation(
    shape: tuple[int, int], gap: float
) -> None:
    """‖Wᵀ(W + G/λ)‖ to 1e-9 of itself, however close W is to rest."""
    generator = torch.Generator().manual_seed(0)
    weight, difference = (
        torch.randn(1, *shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    decay = 2.0**-10
    gradient = (gap * difference - weight) * decay
    matrices = LayerMatrices(LayerStatistics(weight, gradient, None, None, decay, 1e-12))
    left = weight + gradient / decay
    for name, rows, other in (("fact", weight, left), ("bfact", weight.mT, left.mT)):
        expected = float((rows.mT @ other).norm() / (rows.mT @ rows).norm())
        assert math.isclose(matrices.residual(RELATIONS[name]), expected, rel_tol=1e-9)
