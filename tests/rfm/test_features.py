"""FACT and AGOP of kernel machines against their definitions, pair by pair and by autograd."""

from __future__ import annotations

import kernel_oracle as oracle
import pytest
import torch
from torch import Tensor

from feature_probe import FeatureProbeError
from feature_probe.rfm import (
    Exponential,
    FeatureMap,
    FeatureSums,
    Gaussian,
    Laplace,
    LpExponential,
    Polynomial,
    feature_sums,
    next_features,
    solve,
)

RIDGE = 1e-2
POINTS, INPUTS, OUTPUTS = 14, 4, 3


def problem(diagonal: bool) -> tuple[Tensor, Tensor, FeatureMap]:
    """Points away from the origin, targets and a W that is no multiple of the identity."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, INPUTS, generator=draw, dtype=torch.float64) + 0.3
    y = torch.randn(POINTS, OUTPUTS, generator=draw, dtype=torch.float64)
    factor = torch.randn(INPUTS, INPUTS, generator=draw, dtype=torch.float64)
    root = factor @ factor.T
    root = root / root.norm()
    return x, y, FeatureMap(root.diagonal().clone() if diagonal else root)


def full(root: Tensor) -> Tensor:
    """W as a matrix."""
    return torch.diag(root) if root.dim() == 1 else root


def shown(matrix: Tensor, diagonal: bool) -> Tensor:
    """What is left of a matrix where M is diagonal."""
    return matrix.diagonal() if diagonal else matrix


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", oracle.KERNELS)
def test_fact_and_agop_are_their_definitions(name: str, diagonal: bool) -> None:
    """Every kernel, W in full and diagonal; also with the origin moved and in blocks of rows."""
    kernel = oracle.KERNELS[name]
    x, y, features = problem(diagonal)
    root = full(features.root)
    matrix = oracle.gram(name, root, x)
    torch.testing.assert_close(
        kernel.values(features(x), features(x)), matrix, rtol=1e-12, atol=1e-12
    )
    dual = torch.linalg.solve(matrix + POINTS * RIDGE * torch.eye(POINTS, dtype=torch.float64), y)
    torch.testing.assert_close(
        solve(kernel, features(x), y, RIDGE).dual, dual, rtol=1e-9, atol=1e-9
    )
    jacobian = oracle.jacobians(name, root, x, dual)
    expected = {
        "fact": oracle.fact(x, y, matrix @ dual, jacobian, RIDGE),
        "agop": oracle.agop(jacobian),
    }
    origins = [None, x.mean(0)] if kernel.form == "distance" else [None]
    for origin in origins:
        for memory in (1, 2**30):
            moved = FeatureMap(features.root, origin)
            sums = feature_sums(kernel, moved, x, dual, memory=memory)
            found = {"fact": sums.fact(features), "agop": sums.agop(features)}
            for kind, matrix_found in found.items():
                wanted = shown(expected[kind], diagonal)
                error = (matrix_found - wanted).norm() / wanted.norm()
                assert float(error) < 1e-10, (kind, origin is None, memory)


def test_blocks_of_rows_are_blocks() -> None:
    """With little memory no array of all pairs is made."""
    x = torch.randn(200, 3)
    sizes: list[tuple[int, ...]] = []

    class Watched(Gaussian):
        def values(self, u: Tensor, v: Tensor) -> Tensor:
            sizes.append((len(u), len(v)))
            return super().values(u, v)

    features = FeatureMap.identity(3, False, x)
    feature_sums(Watched(2.0), features, x, torch.randn(200, 2), memory=200 * 4 * 6 * 20)
    assert len(sizes) > 1
    assert max(rows for rows, _ in sizes) < 50
    assert sum(rows for rows, _ in sizes) == 200


@pytest.mark.parametrize("name", ["laplace", "gaussian", "quadratic"])
def test_dual_weights_are_the_losss_slopes(name: str) -> None:
    """Lemma F.2: α_i = −ℓ'(f(x_i), y_i)/(nλ) with nλ on the diagonal, not with λ as printed."""
    kernel = oracle.KERNELS[name]
    x, y, features = problem(False)
    u = features(x)
    dual = solve(kernel, u, y, RIDGE).dual
    slopes = kernel.values(u, u) @ dual - y
    torch.testing.assert_close(dual, -slopes / (POINTS * RIDGE), rtol=1e-9, atol=1e-9)
    as_printed = solve(kernel, u, y, RIDGE / POINTS).dual  # (K + λI)⁻¹y
    slopes = kernel.values(u, u) @ as_printed - y
    assert float((as_printed + slopes / (POINTS * RIDGE)).norm() / as_printed.norm()) > 0.5


SLOPES = {
    "exponential": (Exponential(2.5), lambda t: torch.exp(t / 2.5**2) / 2.5**2),
    "quadratic": (Polynomial(1.2), lambda t: 2 * t / 1.2**4),
    "cubic": (Polynomial(2.0, degree=3, offset=1.0), lambda t: 3 / 4 * (1 + t / 4) ** 2),
}


@pytest.mark.parametrize("name", SLOPES)
def test_proposition_5_1(name: str) -> None:
    """FACT·M = MXᵀ(k'(S) ∘ ααᵀ)XM and AGOP the same with τ = k'(S)ᵀk'(S)/n; FACT·M ⪰ 0."""
    kernel, slope = SLOPES[name]
    x, y, features = problem(False)
    dual = solve(kernel, features(x), y, RIDGE).dual
    sums = feature_sums(kernel, features, x, dual)
    m = features.matrix
    similarity = slope(x @ m @ x.T)
    tau = similarity.T @ similarity / POINTS
    outer = dual @ dual.T
    product = m @ x.T @ (similarity * outer) @ x @ m
    torch.testing.assert_close(sums.fact(features) @ m, product, rtol=1e-9, atol=1e-9)
    agop = m @ x.T @ (tau * outer) @ x @ m
    torch.testing.assert_close(sums.agop(features), agop, rtol=1e-9, atol=1e-9)
    values = torch.linalg.eigvalsh(product)
    assert float(values[0]) > -1e-10 * float(values[-1])


def random_sums(diagonal: bool) -> tuple[FeatureMap, FeatureSums]:
    """W, T and K with nothing special about them but K ⪰ 0."""
    _, _, features = problem(diagonal)
    draw = torch.Generator().manual_seed(1)
    slope = torch.randn(INPUTS, INPUTS, generator=draw, dtype=torch.float64)
    factor = torch.randn(INPUTS, 9, generator=draw, dtype=torch.float64)
    jacobian = factor @ factor.T
    if diagonal:
        slope, jacobian = slope.diagonal(), jacobian.diagonal()
    return features, FeatureSums(slope, jacobian)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_nfa_update(power: float, diagonal: bool) -> None:
    """W ← AGOP^{s/2}, so that M = AGOPˢ."""
    features, sums = random_sums(diagonal)
    after = next_features("nfa", features, sums, power=power)
    agop = full(sums.agop(features))
    torch.testing.assert_close(full(after.root), oracle.power(agop, power / 2))
    torch.testing.assert_close(full(after.matrix), oracle.power(agop, power))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("averaging", [False, True])
def test_the_fact_updates(averaging: bool, diagonal: bool) -> None:
    """W ← (FFᵀ)^{1/4}, and (F M M Fᵀ)^{1/8} averaged."""
    features, sums = random_sums(diagonal)
    after = next_features("fact", features, sums, geometric_averaging=averaging)
    f, m = full(sums.fact(features)), full(features.matrix)
    squared = f @ m @ m @ f.T if averaging else f @ f.T
    root = full(after.root)
    torch.testing.assert_close(root, root.T)
    assert float(torch.linalg.eigvalsh(root)[0]) >= 0  # the root, then, if its power is right:
    raised = torch.linalg.matrix_power(root, 8 if averaging else 4)
    torch.testing.assert_close(raised, squared, rtol=1e-9, atol=1e-9 * float(squared.norm()))


@pytest.mark.parametrize("averaging", [False, True])
def test_w_that_agrees_with_fact_stays(averaging: bool) -> None:
    """FACT = WᵀW is a fixed point of both updates (App. E); none of W unless they agree."""
    _, _, features = problem(False)
    fixed = FeatureSums(features.root, None)  # WᵀT = WᵀW
    after = next_features("fact", features, fixed, geometric_averaging=averaging)
    torch.testing.assert_close(after.root, features.root, rtol=1e-6, atol=1e-6)
    twice = FeatureSums(2 * features.root, None)
    after = next_features("fact", features, twice, geometric_averaging=averaging)
    assert float((after.root - features.root).norm()) > 0.05


def test_the_inner_product_form_is_the_averaged_one_where_it_is_defined() -> None:
    """M ← (FACT·M)^{1/2} (§5) for the exponential kernel; refused where FACT·M is not ⪰ 0."""
    x, y, features = problem(False)
    kernel = Exponential(2.5)
    dual = solve(kernel, features(x), y, RIDGE).dual
    sums = feature_sums(kernel, features, x, dual)
    short = next_features("fact_inner_product", features, sums)
    averaged = next_features("fact", features, sums, geometric_averaging=True)
    torch.testing.assert_close(short.root, averaged.root, rtol=1e-6, atol=1e-6)
    product = sums.fact(features) @ features.matrix
    torch.testing.assert_close(short.matrix, oracle.power((product + product.T) / 2, 0.5))
    _, other = random_sums(False)
    with pytest.raises(FeatureProbeError, match="positive semi-definite"):
        next_features("fact_inner_product", features, other)


@pytest.mark.parametrize(("rescaling", "size"), [("trace", 1.0), ("max", 1.0)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_rescaling(rescaling: str, size: float, diagonal: bool) -> None:
    """tr(M)/d or the largest entry of M is 1 afterwards; the direction is the same."""
    features, sums = random_sums(diagonal)
    plain = next_features("nfa", features, sums).matrix
    found = next_features("nfa", features, sums, rescaling=rescaling).matrix  # type: ignore[arg-type]
    m = full(found)
    value = m.trace() / INPUTS if rescaling == "trace" else m.abs().max()
    assert float(value) == pytest.approx(size)
    torch.testing.assert_close(found / found.norm(), plain / plain.norm())


def test_none_leaves_w() -> None:
    """Plain kernel regression."""
    features, sums = random_sums(False)
    assert next_features("none", features, sums) is features


def test_sums_that_overflow_are_refused() -> None:
    """A matrix that is not finite is no update."""
    features, sums = random_sums(False)
    assert sums.slope is not None
    with pytest.raises(FeatureProbeError, match="not finite"):
        next_features("fact", features, FeatureSums(sums.slope * float("inf"), None))


@pytest.mark.parametrize("kernel", [Laplace(1.0), LpExponential(1.0), LpExponential(1.0, 1.5, 1.0)])
def test_coincident_points_have_no_gradient(kernel: Laplace) -> None:
    """A point given three times, in float32 far from the origin: as without rounding."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    x = torch.cat([x, x[:1], x[:1]])
    dual = torch.randn(8, 2, generator=draw, dtype=torch.float64)
    features = FeatureMap.identity(3, False, x)
    wanted = feature_sums(kernel, features, x, dual)
    far = x.float() + 3
    narrow = FeatureMap.identity(3, False, far, origin=far.mean(0))
    found = feature_sums(kernel, narrow, far, dual.float())
    assert wanted.jacobian is not None
    assert found.jacobian is not None
    error = (found.jacobian.double() - wanted.jacobian).norm() / wanted.jacobian.norm()
    assert float(error) < 1e-5
