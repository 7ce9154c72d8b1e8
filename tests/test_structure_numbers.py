"""Structural quantities at frozen weights: each against its definition, written out with numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from feature_probe import (
    ConfigurationError,
    NotMeasuredError,
    Report,
    Structure,
    egop,
    measure,
    principal_angles,
    subspace_overlap,
)
from feature_probe.theory.structure import imbalance, spectrum_shape

Matrix = npt.NDArray[np.float64]

RELATIONS = ("fact", "nfa", "enfa", "bnfa", "benfa")
POWERS = (0.1, 0.25, 1 / 3, 0.5, 1.0, 2.0)


def mlp() -> nn.Sequential:
    """A chain whose layers widen and narrow, float64."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()


def conv() -> nn.Sequential:
    """Convolutions of one and of two groups, and one of a single pixel, float64."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, bias=False), nn.Tanh(), nn.Conv1d(4, 6, 1),
        nn.Tanh(), nn.Conv1d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip


MODELS: dict[str, Callable[[], nn.Sequential]] = {"mlp": mlp, "conv": conv}


def data(outputs: int, n: int = 30) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, outputs, generator=generator, dtype=torch.float64)


def squares(out: Tensor, target: Tensor) -> Tensor:
    """Mean over examples of half the squared distance."""
    return (out - target).square().sum(1).mean() / 2


def measured(model: nn.Sequential, structure: bool | Structure = True, **options: object) -> Report:
    """All relations that have a power, and one that has none."""
    last = model[-1]
    assert isinstance(last, nn.Linear)
    settings: dict[str, object] = {"relations": RELATIONS, "progress": False} | options
    return measure(
        model, [data(last.out_features)], squares, weight_decay=0.1, structure=structure, **settings
    )  # type: ignore[arg-type]


def dense(blocks: Tensor) -> Matrix:
    """The whole block-diagonal matrix, zeros outside the blocks included."""
    return np.asarray(scipy.linalg.block_diag(*blocks.detach().numpy()))


def truth(model: nn.Sequential) -> dict[str, dict[str, Matrix]]:
    """By layer WᵀW, WWᵀ, AGOP, K, WᵀEW and E from per-example derivatives, in full."""
    x, y = data(model[-1].out_features)  # type: ignore[arg-type]
    names = {name: (name,) for name, module in model.named_modules() if oracle.is_layer(module)}
    found = oracle.collect(model, oracle.one_by_one((x, y)), oracle.supervised(squares), names)
    return {
        name: {
            "nfm": dense(oracle.nfm(rows)),
            "bnfm": dense(oracle.bnfm(rows)),
            "nfa": dense(oracle.mean_gradient_square(rows, "output", "input")),
            "bnfa": dense(oracle.mean_gradient_square(rows, "output", "output")),
            "enfa": dense(oracle.mean_gradient_square(rows, "loss", "input")),
            "benfa": dense(oracle.mean_gradient_square(rows, "loss", "output")),
        }
        for name, rows in found.items()
    }


def cosine(a: Matrix, b: Matrix) -> float:
    """Cosine of two matrices."""
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def powered(matrix: Matrix, power: float) -> Matrix:
    """Power of a PSD matrix, eigenvalues that are rounding dropped."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-14 * values[-1]
    return np.asarray((vectors[:, kept] * values[kept] ** power) @ vectors[:, kept].T)


@pytest.mark.parametrize("name", MODELS)
def test_sweep_is_the_cosine_at_every_power(name: str) -> None:
    """C(s) of every relation with a power, grouped or not, is that of dense matrices."""
    model = MODELS[name]()
    report = measured(model, Structure(powers=POWERS))
    for layer, matrices in truth(model).items():
        structure = report.structure(layer)
        assert [sweep.relation for sweep in structure.sweeps] == ["nfa", "enfa", "bnfa", "benfa"]
        for sweep in structure.sweeps:
            gram = matrices["bnfm" if sweep.relation.startswith("b") else "nfm"]
            assert sweep.powers == POWERS
            expected = [cosine(gram, powered(matrices[sweep.relation], s)) for s in POWERS]
            np.testing.assert_allclose(sweep.cosines, expected, rtol=1e-7)
            record = report.record(layer, sweep.relation, 0.5)
            assert record.cosine == pytest.approx(sweep.cosines[POWERS.index(0.5)], abs=1e-12)


def test_sweep_of_the_init_centred_nfa() -> None:
    """W − W₀ takes the place of W, on both sides; before the first step there is nothing."""
    model, before = mlp(), mlp()
    with torch.no_grad():
        model[2].weight.add_(torch.randn(5, 8, dtype=torch.float64))  # type: ignore[operator, union-attr]
    names = ("nfa", "init_centered_nfa")
    structure = Structure(powers=POWERS)
    report = measured(model, structure, relations=names, initial_weights=before)
    k = truth(model)["2"]["bnfa"]
    change = (model[2].weight - before[2].weight).detach().numpy()  # type: ignore[operator, union-attr]
    agop = change.T @ k @ change
    sweep = report.structure("2").sweep("init_centered_nfa")
    expected = [cosine(change.T @ change, powered(agop, s)) for s in POWERS]
    np.testing.assert_allclose(sweep.cosines, expected, rtol=1e-7)
    unmoved = report.structure("0").sweep("init_centered_nfa")
    assert unmoved.status == "W = W₀: the weight has not changed since initialisation"
    assert all(math.isnan(value) for value in unmoved.cosines)


def test_best_power_is_the_top_of_a_fine_sweep() -> None:
    """No s of a fine grid is better than best_power, and the nearest one is almost as good."""
    powers = tuple(np.exp(np.linspace(math.log(0.02), math.log(4), 400)))
    report = measured(mlp(), Structure(powers=powers))
    sweeps = [sweep for layer in report.layers for sweep in report.structure(layer).sweeps]
    peaks = [sweep for sweep in sweeps if not math.isnan(sweep.best_power)]
    assert len(peaks) >= 4
    for sweep in peaks:
        top = int(np.argmax(sweep.cosines))
        assert sweep.best_cosine >= sweep.cosines[top]
        assert sweep.best_cosine == pytest.approx(sweep.cosines[top], abs=1e-4)
        assert sweep.best_power == pytest.approx(sweep.powers[top], rel=0.02)
    for sweep in sweeps:
        if math.isnan(sweep.best_power):
            assert sweep.status not in ("ok", "")


def test_best_power_is_the_records_where_it_is_above_chance() -> None:
    """The record's fitted power is the same number or, within chance, NaN, and the status says."""
    report = measured(mlp())
    compared = {"ok": 0, "within chance": 0}
    for layer in report.layers:
        for sweep in report.structure(layer).sweeps:
            fitted = report.record(layer, sweep.relation, 1.0).fitted_power
            if sweep.status == "ok":
                assert fitted == pytest.approx(sweep.best_power, rel=1e-6)
            else:
                assert math.isnan(fitted)
            if sweep.status in compared:
                compared[sweep.status] += 1
    assert compared["ok"] > 0
    assert compared["within chance"] > 0


def balanced(depth: int = 3, width: int = 6) -> nn.Sequential:
    """A linear network with W_l W_lᵀ = W_{l+1}ᵀ W_{l+1}: singular vectors handed on."""
    generator = torch.Generator().manual_seed(7)
    bases = [
        torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        for _ in range(depth + 1)
    ]
    values = torch.diag(torch.linspace(0.6, 1.4, width, dtype=torch.float64))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).double()
    with torch.no_grad():
        for layer, (before, after) in enumerate(pairwise(bases)):
            model[layer].weight.copy_(after @ values @ before.T)  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_balanced_linear_networks_have_power_one_over_depth(depth: int) -> None:
    """Thm 3.1: in layer l of L the best s times L − l + 1 is 1, with cosine 1; imbalance is 0."""
    report = measured(balanced(depth), relations="nfa")
    for layer in range(depth):
        structure = report.structure(str(layer))
        assert structure.depth == depth - layer
        sweep = structure.sweep("nfa")
        assert sweep.depth_product == pytest.approx(1.0, rel=1e-9)
        assert sweep.best_power == pytest.approx(1 / (depth - layer), rel=1e-9)
        assert sweep.best_cosine == pytest.approx(1.0, rel=1e-12)
        if layer < depth - 1:
            assert structure.next_layer == str(layer + 1)
            assert structure.imbalance < 1e-14
        else:
            assert (structure.next_layer, structure.balance_note) == ("", "the last layer")
            assert math.isnan(structure.imbalance)


def test_imbalance_is_its_definition() -> None:
    """‖WWᵀ − W₊ᵀW₊‖ over the root of the sum of both squares, of an unbalanced network."""
    model = mlp()
    report = measured(model)
    weights = [model[layer].weight.detach().numpy() for layer in (0, 2, 4)]
    for layer, one, other in zip(("0", "2"), weights, weights[1:], strict=False):
        a, b = one @ one.T, other.T @ other
        gap = np.linalg.norm(a - b)
        structure = report.structure(layer)
        assert structure.imbalance_norm == pytest.approx(gap, rel=1e-12)
        size = math.sqrt(np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2)
        assert structure.imbalance == pytest.approx(gap / size, rel=1e-12)
        assert 0.1 < structure.imbalance < 1


@pytest.mark.parametrize("scale", [1e-160, 1e-10, 1e15, 1e160])
def test_imbalance_is_free_of_scale(scale: float) -> None:
    """Also far from 1, where the squares leave the range of floating point."""
    torch.manual_seed(5)
    one, other = torch.randn(2, 4, 4, dtype=torch.float64)
    expected = imbalance(one, other)
    found = imbalance(scale * one, scale * other)
    assert found.relative == pytest.approx(expected.relative, rel=1e-12)
    if 1e-100 < scale < 1e100:
        assert found.norm == pytest.approx(scale**2 * expected.norm, rel=1e-12)
    assert imbalance(one, 1e-200 * other).relative == pytest.approx(1.0)


def test_imbalance_of_two_scales() -> None:
    """Weights on both sides of the size from which on they are scaled first."""
    torch.manual_seed(6)
    one, other = torch.randn(2, 4, 4, dtype=torch.float64)
    for a, b in ((2.0**-66, 2.0**-62), (2.0**-62, 2.0**-66), (2.0**66, 2.0**63)):
        for first, second in ((a * one, b * other), (b * one, a * other)):
            output, inputs = first @ first.T, second.T @ second
            gap = (output - inputs).norm()
            found = imbalance(first, second)
            assert found.norm == pytest.approx(float(gap), rel=1e-12)
            size = (output.square().sum() + inputs.square().sum()).sqrt()
            assert found.relative == pytest.approx(float(gap / size), rel=1e-12)


def test_gradient_descent_keeps_the_balance() -> None:
    """Lemma 3.1 (Arora): small steps leave imbalance near 0, and near its start where it is not."""
    for factor, bound in ((1.0, 1e-4), (1.5, None)):
        model = balanced(3)
        with torch.no_grad():
            model[0].weight.mul_(factor)  # type: ignore[operator, union-attr]
        before = measured(model, relations="nfa").structure("0").imbalance_norm
        x, y = data(6)
        start = float(squares(model(x), y).detach())
        for _ in range(400):
            model.zero_grad()
            squares(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 2e-4 * parameter.grad  # type: ignore[operator]
        assert float(squares(model(x), y).detach()) < 0.8 * start
        report = measured(model, relations="nfa")
        if bound is not None:
            assert before < 1e-14
            assert report.structure("0").imbalance < bound
            assert report.structure("0").sweep("nfa").depth_product == pytest.approx(1, abs=1e-3)
        else:
            assert before > 1
            after = report.structure("0").imbalance_norm
            assert after == pytest.approx(before, rel=1e-3)


def test_where_there_is_no_balance_the_note_says_why() -> None:
    """Shapes that do not fit, groups, layers that are not measured, and no chain at all."""
    structure = measured(conv()).structure
    assert structure("1").imbalance > 0  # four outputs, and a kernel of one pixel after it
    assert structure("3").balance_note == "grouped: blocks are not followed one by one"
    assert structure("3").next_layer == "5"
    wide = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    note = measured(wide).structure("1").balance_note
    assert note == "shapes do not fit: 4 outputs, 8 inputs of 4"
    partial = measured(mlp(), include=["0", "4"]).structure("0")
    assert partial.balance_note.startswith("not all matrices between the layers are measured: 2.w")
    assert partial.depth is None
    assert math.isnan(partial.sweep("nfa").depth_product)
    given = Structure(depths={"0": 3, "4": 1})
    partial = measured(mlp(), given, include=["0", "4"]).structure("0")
    sweep = partial.sweep("nfa")
    assert (partial.depth, partial.next_layer) == (3, "")
    assert partial.balance_note == "the next layer is not among depths="
    rest = measured(mlp(), Structure(depths={"0": 2, "2": 1})).structure
    assert rest("0").imbalance == measured(mlp()).structure("0").imbalance
    assert (rest("2").balance_note, rest("4").balance_note) == (
        "the last layer", "not among depths="
    )  # fmt: skip
    assert sweep.depth_product == pytest.approx(3 * sweep.best_power)


class Residual(nn.Module):
    """No chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """The first layer and the second of it."""
        h = self.first(x)
        return h + torch.tanh(self.second(h))


def test_without_a_chain_there_is_no_depth() -> None:
    """A residual connection: no L, so no s·L and nothing that follows."""
    report = measure(Residual().double(), [data(6)], squares, structure=True, progress=False)
    structure = report.structure("first")
    assert (structure.depth, structure.balance_note) == (None, "the layers are no chain")
    assert math.isnan(structure.sweep("nfa").depth_product)
    assert not math.isnan(structure.sweep("nfa").cosines[0])


@pytest.mark.parametrize("name", MODELS)
def test_spectra_are_those_of_the_dense_matrices(name: str) -> None:
    """Decay, ranks and spread of WᵀW, AGOP and K from numpy's eigenvalues, zeros included."""
    model = MODELS[name]()
    report = measured(model, Structure(eigenvalues=5))
    for layer, matrices in truth(model).items():
        for label, key in (("nfm", "nfm"), ("agop", "nfa"), ("ptk", "bnfa")):
            values = np.linalg.eigvalsh(matrices[key])[::-1].clip(0)
            shares = values[values > 0] / values.sum()
            found = report.structure(layer).spectrum(label)
            assert found.size == len(values)
            assert found.status == "ok"
            expected = values[:5] / values[0]
            np.testing.assert_allclose(found.decay, expected, rtol=1e-9, atol=1e-13)
            entropy = -(shares * np.log(shares)).sum()
            assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-9)
            square = (values**2).sum()
            assert found.participation_ratio == pytest.approx(values.sum() ** 2 / square, rel=1e-9)
            assert found.stable_rank == pytest.approx(values.sum() / values[0], rel=1e-9)
            spread = values.std() / values.mean()
            assert found.variation == pytest.approx(spread, rel=1e-9, abs=1e-12)
    weight = model[-1].weight.detach().numpy()  # type: ignore[union-attr]
    singular = np.linalg.svd(weight, compute_uv=False)
    last = report.structure(report.layers[-1]).spectrum("nfm")
    np.testing.assert_allclose(last.decay[:3], (singular / singular[0])[:3] ** 2, rtol=1e-9)


def test_shape_of_known_spectra() -> None:
    """A multiple of the identity, one of rank one and two equal ones have known ranks."""
    whole = spectrum_shape(torch.full((4,), 3.0), 4, 10)
    assert whole.decay == (1.0,) * 4
    assert (whole.effective_rank, whole.participation_ratio) == pytest.approx((4.0, 4.0))
    assert whole.variation == pytest.approx(0.0, abs=1e-12)
    one = spectrum_shape(torch.tensor([5.0]), 9, 3)
    assert one.decay == (1.0, 0.0, 0.0)
    assert (one.effective_rank, one.participation_ratio, one.stable_rank) == (1.0, 1.0, 1.0)
    assert one.variation == pytest.approx(math.sqrt(9 / 1 - 1))
    two = spectrum_shape(torch.tensor([[1e-200], [1e-200]], dtype=torch.float64), 2, 1)
    assert two.effective_rank == pytest.approx(2.0)
    assert spectrum_shape(torch.zeros(3), 3, 2).reason == "matrix is zero"
    assert spectrum_shape(torch.tensor([1.0, math.inf]), 3, 2).reason == "not finite"


def chain_monomial(r: int) -> Callable[[Tensor], Tensor]:
    """y = Σ_k x_k x_{k+1} over k mod r."""
    return lambda x: (x[:, :r] * x[:, :r].roll(-1, 1)).sum(1)


@pytest.mark.parametrize("r", [3, 4, 5, 7])
def test_egop_of_the_chain_monomial(r: int) -> None:
    """∂y/∂x_j = x_{j−1} + x_{j+1}: for white inputs j and k share neighbours."""
    n, d = 64, r + 2
    generator = torch.Generator().manual_seed(2)
    q = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64)).Q
    inputs = math.sqrt(n) * q  # (1/n) Σ x xᵀ = I exactly, so that no sampling error is left
    expected = np.zeros((d, d))
    for j in range(r):
        for k in range(r):
            neighbours = [{(i - 1) % r, (i + 1) % r} for i in (j, k)]
            expected[j, k] = len(neighbours[0] & neighbours[1])
    found = egop(chain_monomial(r), inputs, batch_size=10)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_egop_of_several_outputs_in_batches() -> None:
    """Σ_i J_iᵀJ_i/n with the Jacobians of autograd, whatever the batches and the inputs' shape."""
    model, (x, _) = mlp(), data(4)
    expected = np.zeros((6, 6))
    for one in x:
        jacobian = torch.autograd.functional.jacobian(model, one).numpy()
        expected += jacobian.T @ jacobian / len(x)
    for size in (1, 7, 1000):
        np.testing.assert_allclose(egop(model, x, size).numpy(), expected, rtol=1e-12)
    shaped = egop(lambda image: model(image.flatten(1)), x.view(-1, 2, 3))
    np.testing.assert_allclose(shaped.numpy(), expected, rtol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        np.testing.assert_allclose(egop(model, x).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (lambda x: x.sum(), torch.randn(4, 3), "one row per example"),
        (lambda x: x.sum(1).tolist(), torch.randn(4, 3), "one row per example"),
        (lambda x: x[:2], torch.randn(4, 3), "one row per example"),
        (lambda x: x.detach().sum(1), torch.randn(4, 3), "does not depend on its input"),
        (lambda x: x.sum(1), torch.ones(4, 3, dtype=torch.long), "floating-point"),
        (lambda x: x, torch.randn(4), "floating-point"),
        (lambda x: x, torch.randn(0, 4), "floating-point"),
    ],
)
def test_egop_refuses(function: Callable[[Tensor], Tensor], inputs: Tensor, message: str) -> None:
    """What has no gradient outer product says why."""
    with pytest.raises(ConfigurationError, match=message):
        egop(function, inputs)


def pair(d: int = 7) -> tuple[Tensor, Tensor]:
    """Two PSD matrices."""
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    return a @ a.T, b @ b.T


def test_subspaces_are_those_of_scipy() -> None:
    """Overlap and principal angles against numpy's eigenvectors and scipy's subspace_angles."""
    a, b = pair()
    for rank in (1, 3, 6):
        u, v = (np.linalg.eigh(matrix.numpy())[1][:, -rank:] for matrix in (a, b))
        expected = np.linalg.norm(u.T @ v) ** 2 / rank
        assert subspace_overlap(a, b, rank) == pytest.approx(expected, rel=1e-10)
        angles = np.sort(scipy.linalg.subspace_angles(u, v))
        np.testing.assert_allclose(principal_angles(a, b, rank).numpy(), angles, atol=1e-10)
        assert np.cos(angles) @ np.cos(angles) / rank == pytest.approx(expected, rel=1e-10)
    assert subspace_overlap(a, b, 7) == pytest.approx(1.0)
    assert subspace_overlap(a, a, 3) == pytest.approx(1.0)


def test_small_angles_keep_their_digits() -> None:
    """A rotation by 10⁻⁹, whose cosine is 1, and one by a right angle."""
    values = torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64)
    for angle in (1e-9, math.pi / 2):
        c, s = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64)
        angles = principal_angles(torch.diag(values), turn @ torch.diag(values) @ turn.T, 2)
        np.testing.assert_allclose(angles.numpy(), [0.0, angle], atol=1e-15, rtol=1e-6)


def test_subspaces_of_blocks_are_those_of_the_whole() -> None:
    """Block-diagonal matrices: eigenvalues of all blocks compete, vectors of others do not meet."""
    blocks = [torch.stack(pair(4)), torch.stack(pair(4)).flip(0) * 1.5 + torch.eye(4)]
    whole = [torch.from_numpy(dense(block)) for block in blocks]
    for rank in (2, 3, 5):
        expected = subspace_overlap(whole[0], whole[1], rank)
        assert 0.01 < expected < 0.99
        assert subspace_overlap(blocks[0], blocks[1], rank) == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(
            principal_angles(blocks[0], blocks[1], rank),
            principal_angles(whole[0], whole[1], rank),
            atol=1e-7,
        )


def test_undefined_subspaces_are_nan() -> None:
    """Equal eigenvalues at the cut, or fewer positive ones than the rank."""
    identity = torch.eye(4, dtype=torch.float64)
    a, _ = pair(4)
    assert math.isnan(subspace_overlap(identity, a, 2))
    assert subspace_overlap(identity, a, 4) == pytest.approx(1.0)
    low = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0]))
    assert math.isnan(subspace_overlap(low, a.float(), 3))
    assert principal_angles(low, a.float(), 3).isnan().all()


@pytest.mark.parametrize(
    ("first", "second", "rank", "message"),
    [
        (torch.eye(3), torch.eye(4), 1, "differ in shape"),
        (torch.eye(3), torch.eye(3), 4, "more than the 3 rows"),
        (torch.eye(3), torch.eye(3), 0, "positive integer"),
        (torch.ones(3, 3).triu(), torch.eye(3), 1, "must be symmetric"),
        (torch.ones(3, 2), torch.ones(3, 2), 1, r"must be \[d, d\]"),
        (torch.full((2, 2), math.nan), torch.eye(2), 1, "NaN or infinity"),
        (torch.eye(2, dtype=torch.complex64), torch.eye(2), 1, "must be real"),
    ],
)
def test_subspaces_refuse(first: Tensor, second: Tensor, rank: int, message: str) -> None:
    """Bad arguments, each with its words."""
    with pytest.raises(ConfigurationError, match=message):
        subspace_overlap(first, second, rank)


def low_rank(d: int, rank: int, seed: int) -> Tensor:
    """A PSD matrix of a rank."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, d, generator=generator, dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("name", MODELS)
def test_references(name: str) -> None:
    """Cosine, levels by chance and overlap of WᵀW and AGOP with a given matrix, in full numpy."""
    model = MODELS[name]()
    matrices = truth(model)
    layer, rank = ("0", 2) if name == "mlp" else ("5", 3)
    size = 6  # of one block: 6 inputs, or 3 channels of a kernel of 2
    shape = 1 if name == "mlp" else 2
    given = torch.stack([low_rank(size, 2, seed) for seed in range(shape)])
    structure = Structure(references={layer: given[0] if shape == 1 else given}, rank=rank)
    found = measured(model, structure).structure(layer)
    whole, d = dense(given), shape * size
    for label, key in (("nfm", "nfm"), ("agop", "nfa")):
        agreement = found.reference(label)
        assert agreement.status == "ok"
        assert agreement.cosine == pytest.approx(cosine(matrices[layer][key], whole), rel=1e-9)
        u, v = (np.linalg.eigh(m)[1][:, -rank:] for m in (matrices[layer][key], whole))
        expected = np.linalg.norm(u.T @ v) ** 2 / rank
        assert agreement.overlap == pytest.approx(expected, rel=1e-7)
        assert agreement.chance_overlap == rank / d
        traces = sum(
            np.trace(matrices[layer][key][i : i + size, i : i + size])
            * np.trace(whole[i : i + size, i : i + size])
            for i in range(0, d, size)
        )
        norms = np.linalg.norm(matrices[layer][key]) * np.linalg.norm(whole)
        assert agreement.chance_cosine == pytest.approx(traces / size / norms, rel=1e-9)


def test_the_rank_of_a_reference_is_found() -> None:
    """Without rank= that of the matrix; a reference that is WᵀW itself agrees fully."""
    model = mlp()
    weight = model[2].weight.detach()
    found = measured(model, Structure(references={"2": weight.T @ weight})).structure("2")
    agreement = found.reference("nfm")
    assert agreement.rank == 5
    assert agreement.cosine == pytest.approx(1.0, rel=1e-12)
    assert agreement.overlap == pytest.approx(1.0, rel=1e-9)
    assert found.reference("agop").cosine < 0.999
    per_layer = Structure(references={"0": low_rank(6, 3, 0).numpy()}, rank={"0": 2})
    assert measured(model, per_layer).structure("0").reference("nfm").rank == 2
    with pytest.raises(NotMeasuredError, match="'nfm' here; there are: none"):
        measured(model, per_layer).structure("2").reference("nfm")


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no layer": (lambda: Structure(references={"9": torch.eye(6)}), "no measured layer: 0, 2, 4"),
    "shape": (lambda: Structure(references={"0": torch.eye(5)}), r"must be \[6, 6\], got \[5, 5\]"),
    "symmetric": (lambda: Structure(references={"0": torch.ones(6, 6).triu()}), "be symmetric"),
    "no matrix": (lambda: Structure(references={"0": "egop"}), "must be a matrix"),
    "no mapping": (lambda: Structure(references=[torch.eye(6)]), "must map"),  # type: ignore[arg-type]
    "zero": (lambda: Structure(references={"0": torch.zeros(6, 6)}), "no positive eigenvalue"),
    "full rank": (lambda: Structure(references={"0": low_rank(6, 6, 0)}), "has full rank"),
    "rank": (lambda: Structure(references={"0": low_rank(6, 2, 0)}, rank=7), "must be below 6"),
    "rank beyond": (lambda: Structure(references={"0": low_rank(6, 2, 0)}, rank=3), "2 eigenv"),
    "tie": (lambda: Structure(references={"0": torch.eye(6)}, rank=2), "next eigenvalue"),
    "no reference": (lambda: Structure(rank=2), "there are none"),
    "rank of nothing": (
        lambda: Structure(references={"0": low_rank(6, 2, 0)}, rank={"2": 2}), "has no reference"
    ),
    "rank zero": (lambda: Structure(references={"0": low_rank(6, 2, 0)}, rank=0), "rank must be"),
    "powers": (lambda: Structure(powers=(0.5, -1.0)), "positive and finite"),
    "eigenvalues": (lambda: Structure(eigenvalues=0), "eigenvalues must be"),
    "depth": (lambda: Structure(depths={"7": 1}), "depths names '7'"),
    "depth zero": (lambda: Structure(depths={"0": 0}), "rank or depth of '0'"),
    "depth twice": (lambda: Structure(depths={"0": 1, "2": 1}), "all be different"),
    "type": (lambda: "yes", "True, False or a Structure"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    """Before anything is measured, each in words of its own."""
    make, message = BAD[name]
    with pytest.raises(ConfigurationError, match=message):
        measured(mlp(), make())  # type: ignore[arg-type]


def test_what_was_not_measured_is_nan_with_the_reason() -> None:
    """No K, weights that are not finite, a weight of zeros, and a single output."""
    enfa = measured(mlp(), relations=("fact", "enfa")).structure("0")
    assert enfa.spectrum("ptk").status == enfa.spectrum("agop").status == "not asked for"
    assert enfa.spectrum("nfm").status == "ok"
    assert [sweep.relation for sweep in enfa.sweeps] == ["enfa"]
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    report = measured(model, Structure(references={"2": low_rank(8, 2, 0)}))
    broken = report.structure("2")
    assert "NaN or infinity" in broken.balance_note
    assert {part.status for part in broken.spectra} == {
        "not finite: the weight holds NaN or infinity"
    }
    assert all("not finite" in part.status for part in (*broken.sweeps, *broken.references))
    assert all(math.isnan(value) for sweep in broken.sweeps for value in sweep.cosines)
    assert math.isnan(report.structure("0").imbalance)
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator, union-attr]
    zero = measured(model).structure("0")
    assert zero.spectrum("nfm").status == "matrix is zero"
    assert math.isnan(zero.spectrum("nfm").effective_rank)
    assert zero.sweep("nfa").status == "weight is zero"
    assert zero.imbalance == 1.0


def test_a_failure_costs_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear algebra that fails in one spectrum is its status, and the rest is there."""
    real = torch.linalg.svdvals

    def fail(matrix: Tensor) -> Tensor:
        if matrix.shape[-2:] == (8, 6):
            raise RuntimeError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    report = measured(mlp())
    assert report.structure("0").spectrum("nfm").status == "fault: RuntimeError: did not converge"
    assert report.structure("0").spectrum("agop").status == "ok"
    assert report.structure("2").spectrum("nfm").status == "ok"


def test_plain_data_and_back() -> None:
    """Through JSON and back nothing is lost, NaN included; without structure there is no entry."""
    report = measured(mlp(), Structure(references={"0": low_rank(6, 2, 0)}))
    text = json.dumps(report.to_dict(), allow_nan=False)
    back = Report.from_dict(json.loads(text))
    assert repr(list(back.structures)) == repr(list(report.structures))
    assert math.isnan(back.structure("4").imbalance)
    plain = measured(mlp(), structure=False)
    assert "structures" not in plain.to_dict()
    assert plain.structures == ()
    assert repr(replace(report, structures=()).to_dict()) == repr(plain.to_dict())
    with pytest.raises(NotMeasuredError, match="ask for it with structure=True"):
        plain.structure("0")
    with pytest.raises(NotMeasuredError, match="layers: 0, 2, 4"):
        report.structure("nowhere")
