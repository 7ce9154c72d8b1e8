"""`measure` and the probe in the loop against the brute-force oracle: properties × named cases."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import FeatureProbe, Report, measure

# torch's own remark about speed, on the models under test
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

POWERS = (0.5, 1.0, 1 / 3, 2.0)
LAMBDA = 0.03
N = 7  # examples; more rows than d_out in every case below


# --------------------------------------------------------------------------- models


class Reused(nn.Module):
    """One Linear called three times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x)) + 0.5 * x
        return self.head(x)


class Tied(nn.Module):
    """Two Linears that share one Parameter, with other layers between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.between = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(torch.tanh(self.between(x)))))


class InPlace(nn.Module):
    """Outputs of layers, views among them, changed in place in every common way."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(4, 5)  # on [n, s, d]: the output is a view
        self.flat = nn.Linear(10, 6)
        self.skip = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x)
        y *= 1.5
        y[:, 0] = 0.0
        y = F.relu(y, inplace=True)
        z = self.flat(y[:, :2].flatten(1) + y[:, 1:].flatten(1))
        kept = torch.tanh(z)
        z += kept
        w = self.skip(kept)
        w += z
        w.relu_()
        return self.head(w)


class InPlaceConv(nn.Module):
    """A residual block with ReLU(inplace) and +=, as in torchvision's ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        y = self.conv2(x)
        y += x
        y = self.relu(y)
        return self.head(y.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention by three Linears: positions mix, each layer has one row per token."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 3)
        self.key = nn.Linear(4, 3, bias=False)
        self.value = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).mT, dim=-1)
        return self.head((weights @ self.value(x)).mean(1))


class Folded(nn.Module):
    """Positions folded into the first axis, as window attention does: [n·s, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.head = nn.Linear(15, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x.reshape(-1, 4)))
        return self.head(y.reshape(len(x), -1))


class Transposed(nn.Module):
    """A Linear fed a non-contiguous view of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.head = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu_(self.inner(x.mT)).flatten(1))


class TwoHeads(nn.Module):
    """One input into two layers, and a layer whose output also is the model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return left + torch.tanh(left) * torch.sigmoid(self.right(x))


def sequential(*layers: nn.Module, like: tuple[int, ...]) -> nn.Sequential:
    """The layers, tanh, flatten and a Linear head with two outputs."""
    body = nn.Sequential(*layers)
    width = body(torch.zeros(1, *like, dtype=torch.get_default_dtype())).numel()
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2))


@dataclass(frozen=True)
class Case:
    """A model and the shape of one example; the layers are all its Linear and Conv modules."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sharing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    classes: int = 0  # > 0: cross-entropy over the last axis, else mean squared error
    reducible: bool = True


def conv(dim: int, space: tuple[int, ...], c_in: int, c_out: int, **options: Any) -> Case:
    """A convolution under test, then tanh and a Linear head."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    shape = (c_in, *space)
    return Case(lambda: sequential(kind(c_in, c_out, **options), like=shape), shape)


CASES: dict[str, Case] = {
    "linear [n,d]": Case(lambda: sequential(nn.Linear(4, 5), like=(4,)), (4,)),
    "linear wide to narrow": Case(lambda: sequential(nn.Linear(9, 3), like=(9,)), (9,)),
    "linear no bias": Case(lambda: sequential(nn.Linear(4, 5, bias=False), like=(4,)), (4,)),
    "linear [n,s,d]": Case(lambda: sequential(nn.Linear(4, 5), like=(3, 4)), (3, 4)),
    "linear [n,s,d] no bias": Case(
        lambda: sequential(nn.Linear(4, 5, bias=False), like=(3, 4)), (3, 4)
    ),
    "linear [n,a,b,d]": Case(lambda: sequential(nn.Linear(4, 5), like=(2, 3, 4)), (2, 3, 4)),
    "linear not contiguous": Case(Transposed, (3, 4)),
    "linear folded [n*s,d]": Case(Folded, (3, 4), reducible=False),
    "three layers": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
        ),
        (4,),
        classes=3,
    ),
    "output [n,s,V]": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (3, 4), classes=3
    ),
    # softmax does not see a shift of all keys: their gradients add up to zero over positions
    "attention": Case(Attention, (5, 4), reducible=False),
    "two heads": Case(TwoHeads, (4,)),
    "called three times": Case(Reused, (4,)),
    "called three times on [n,s,d]": Case(
        lambda: nn.Sequential(Reused(), nn.Flatten(), nn.Linear(6, 2)), (3, 4)
    ),
    "tied weights": Case(Tied, (4,), sharing={"first": ("first", "second")}),
    "in place": Case(InPlace, (3, 4)),
    "in place conv": Case(InPlaceConv, (2, 4, 4)),
    "batch norm in eval": Case(
        lambda: sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(True), like=(2, 4, 4)),
        (2, 4, 4),
    ),
    "conv1d": conv(1, (6,), 2, 3, kernel_size=3),
    "conv1d stride padding dilation": conv(
        1, (9,), 2, 3, kernel_size=3, stride=2, padding=2, dilation=2
    ),
    "conv1d same, even kernel": conv(1, (6,), 2, 3, kernel_size=4, padding="same"),
    "conv1d same, even kernel, dilation": conv(
        1, (7,), 2, 3, kernel_size=2, padding="same", dilation=3
    ),
    "conv1d same, even kernel, reflect": conv(
        1, (6,), 2, 3, kernel_size=4, padding="same", padding_mode="reflect"
    ),
    "conv1d valid": conv(1, (6,), 2, 3, kernel_size=3, padding="valid"),
    "conv1d circular": conv(1, (5,), 2, 3, kernel_size=3, padding=2, padding_mode="circular"),
    "conv1d replicate": conv(1, (5,), 2, 3, kernel_size=3, padding=2, padding_mode="replicate"),
    "conv1d groups": conv(1, (6,), 4, 6, kernel_size=3, groups=2),
    "conv1d depthwise": conv(1, (6,), 3, 3, kernel_size=3, groups=3, padding=1),
    "conv2d": conv(2, (4, 4), 2, 4, kernel_size=3),
    "conv2d no bias": conv(2, (4, 4), 2, 4, kernel_size=3, bias=False),
    "conv2d 1x1": conv(2, (3, 3), 5, 3, kernel_size=1),
    "conv2d asymmetric": conv(
        2, (5, 6), 2, 3, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)
    ),
    "conv2d same, even kernel": conv(2, (3, 4), 2, 3, kernel_size=(2, 4), padding="same"),
    "conv2d same, circular": conv(
        2, (3, 4), 2, 3, kernel_size=(2, 3), padding="same", padding_mode="circular"
    ),
    "conv2d valid, stride": conv(2, (5, 5), 2, 3, kernel_size=2, padding="valid", stride=2),
    "conv2d reflect": conv(
        2, (4, 4), 2, 3, kernel_size=3, padding=(2, 1), padding_mode="reflect", stride=2
    ),
    "conv2d replicate": conv(
        2, (3, 4), 2, 3, kernel_size=3, padding=(1, 2), padding_mode="replicate"
    ),
    "conv2d circular": conv(
        2, (4, 3), 2, 3, kernel_size=3, padding=(1, 2), padding_mode="circular"
    ),
    "conv2d groups": conv(2, (3, 4), 4, 6, kernel_size=2, groups=2),
    "conv2d groups, every option": conv(
        2,
        (5, 5),
        4,
        6,
        kernel_size=(2, 3),
        groups=2,
        stride=(1, 2),
        padding=1,
        dilation=(2, 1),
        padding_mode="reflect",
        bias=False,
    ),
    "conv2d depthwise": conv(2, (4, 4), 3, 3, kernel_size=3, groups=3),
    "conv2d depthwise multiplier": conv(2, (4, 4), 2, 6, kernel_size=2, groups=2, padding=1),
    "conv3d": conv(3, (3, 3, 2), 2, 3, kernel_size=2),
    "conv3d asymmetric": conv(
        3, (3, 4, 4), 1, 3, kernel_size=(2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 1), dilation=1
    ),
    "conv3d same, even kernel": conv(3, (2, 3, 2), 1, 3, kernel_size=2, padding="same"),
    "conv3d replicate groups": conv(
        3, (2, 2, 3), 2, 4, kernel_size=2, padding=1, padding_mode="replicate", groups=2
    ),
    "conv3d circular": conv(
        3, (2, 3, 2), 2, 3, kernel_size=(1, 2, 2), padding=(0, 1, 1), padding_mode="circular"
    ),
    "conv3d reflect": conv(
        3, (3, 2, 3), 1, 2, kernel_size=2, padding=(1, 0, 1), padding_mode="reflect"
    ),
}


# --------------------------------------------------------------------------- shared pieces


@dataclass(frozen=True)
class Problem:
    """A case made concrete: model in eval mode, batch, loss and the layers expected of it."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    layers: dict[str, tuple[str, ...]]

    def rows(self) -> dict[str, oracle.Rows]:
        """The oracle's rows at the model's present weights."""
        return oracle.collect(
            self.model,
            oracle.one_by_one((self.x, self.y)),
            oracle.supervised(self.loss_fn),
            self.layers,
        )


def token_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over examples and positions."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def build(case: Case, n: int = N, seed: int = 1) -> Problem:
    """The case's model with random weights and buffers, and a random batch."""
    torch.manual_seed(seed)
    model = case.model().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    x = torch.randn(n, *case.shape, dtype=torch.float64)
    output = model(x.clone())
    if case.classes:
        y = torch.randint(case.classes, output.shape[:-1])
        loss_fn: Callable[[Tensor, Tensor], Tensor] = token_cross_entropy
    else:
        y = torch.randn(output.shape, dtype=torch.float64)
        loss_fn = nn.MSELoss()
    shared = {module for modules in case.sharing.values() for module in modules}
    layers = {
        name: case.sharing.get(name, (name,))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and (name in case.sharing or name not in shared)
    }
    return Problem(model, x, y, loss_fn, layers)


@functools.cache
def solved(name: str) -> tuple[Problem, dict[str, oracle.Rows]]:
    """The case and the oracle's rows, once per test session."""
    problem = build(CASES[name])
    return problem, problem.rows()


@functools.cache
def measured(name: str, positions: str) -> Report:
    """`measure` with every relation and power, once per test session."""
    problem, _ = solved(name)
    return exactly(problem, [(problem.x, problem.y)], positions=positions)


def exactly(problem: Problem, batches: Sequence[Any], **options: Any) -> Report:
    """`measure` with every relation; the options override."""
    settings = {"weight_decay": LAMBDA, "relations": oracle.RELATIONS, "powers": POWERS}
    return measure(
        problem.model, batches, problem.loss_fn, progress=False, **{**settings, **options}
    )


def powers_of(relation: str) -> tuple[float | None, ...]:
    """The powers measured for a relation; one None where it has none."""
    return (None,) if relation in oracle.EQUALITIES else POWERS


def blocks(matrix: Tensor) -> Tensor:
    """``[groups, d, d]`` whether or not the report dropped a single group's axis."""
    return matrix if matrix.dim() == 3 else matrix[None]


def assert_matrices_agree(
    report: Report,
    layer: str,
    rows: oracle.Rows,
    relation: str,
    tolerance: float = 1e-9,
    **options: Any,
) -> None:
    """The report's matrices of one relation, at every power, are the oracle's."""
    backward = relation in oracle.BACKWARD_RELATIONS
    gram = blocks(report.matrix(layer, "bnfm" if backward else "nfm"))
    assert_close(gram, oracle.claimed(rows, relation), tolerance, f"{layer} gram")
    for power in {record.power for record in report.select(layer, relation)}:
        expected = oracle.prediction(rows, relation, power, **options)
        found = blocks(report.matrix(layer, relation, power))
        assert_close(found, expected, tolerance, f"{layer} {relation} {power}")


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Equal shapes, and a small error relative to the expected norm."""
    assert found.shape == expected.shape, f"{what}: {found.shape} != {expected.shape}"
    error = float((found - expected).norm() / expected.norm())
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def assert_scores_agree(
    report: Report,
    layer: str,
    rows: oracle.Rows,
    relation: str,
    tolerance: float = 1e-9,
    weight_decay: float = LAMBDA,
    **options: Any,
) -> None:
    """The report's scores of one relation, at every power, are the oracle's; NaN where it has."""
    equality = relation in oracle.EQUALITIES
    records = report.select(layer, relation)
    assert records
    for record in records:
        x = oracle.prediction(rows, relation, record.power, weight_decay=weight_decay, **options)
        a = oracle.claimed(rows, relation)
        expected = oracle.scores(a, x, equality=equality, weight_decay=weight_decay)
        for name, value in vars(expected).items():
            found = getattr(record, name)
            where = f"{layer} {record.label} {name}: {found} != {value}, {record.status!r}"
            if math.isnan(value):
                assert math.isnan(found), where
            else:
                scale = max(1.0, abs(value))
                assert abs(found - value) <= tolerance * scale, where


def assert_all_agree(
    report: Report, rows: dict[str, oracle.Rows], tolerance: float = 1e-9, **options: Any
) -> None:
    """Every relation of every layer, matrices and scores."""
    assert set(report.layers) == set(rows)
    options.setdefault("weight_decay", LAMBDA)
    for layer, layer_rows in rows.items():
        for relation in {record.relation for record in report.records}:
            assert_matrices_agree(report, layer, layer_rows, relation, tolerance, **options)
            assert_scores_agree(report, layer, layer_rows, relation, tolerance, **options)


# --------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("name", CASES)
def test_oracle_rows_are_the_layers_rows(name: str) -> None:
    """W·rows is the layer's output without bias, so the oracle's patches are the right ones."""
    problem, rows = solved(name)
    outputs: dict[str, list[Tensor]] = {layer: [] for layer in problem.layers}

    def keep(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            bias = 0.0
            if module.bias is not None:
                shape = (-1,) if isinstance(module, nn.Linear) else (-1, *[1] * (output.dim() - 2))
                bias = module.bias.detach().reshape(shape)
            outputs[layer].append(oracle.output_rows(module, output.detach() - bias))

        return hook

    handles = [
        problem.model.get_submodule(module).register_forward_hook(keep(layer))
        for layer, modules in problem.layers.items()
        for module in modules
    ]
    problem.model(problem.x[:1].clone())
    for handle in handles:
        handle.remove()
    for layer, layer_rows in rows.items():
        z = torch.einsum("pgi,goi->pgo", layer_rows.h[0], layer_rows.weight)
        torch.testing.assert_close(z, torch.cat(outputs[layer]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_oracle_fact_is_the_gradient_form(name: str) -> None:
    """The oracle's FACT and bFACT equal −WᵀG/λ and −WGᵀ/λ with autograd's full-batch G."""
    problem, rows = solved(name)
    problem.model.zero_grad()
    problem.loss_fn(problem.model(problem.x.clone()), problem.y).backward()
    for layer, layer_rows in rows.items():
        weight = layer_rows.weight
        gradient = problem.model.get_submodule(layer).weight.grad.reshape(weight.shape)
        forward = -weight.mT @ gradient / LAMBDA
        backward = -weight @ gradient.mT / LAMBDA
        assert_close(oracle.fact(layer_rows, LAMBDA), forward, 1e-12, layer)
        assert_close(oracle.bfact(layer_rows, LAMBDA), backward, 1e-12, layer)
    problem.model.zero_grad()


def test_oracle_agop_of_the_first_layer_is_the_input_gradient_form() -> None:
    """On a plain network, AGOP of the first layer is (1/n) Σ ∇_x f ∇_x fᵀ by torch.func."""
    problem, rows = solved("three layers")
    jacobian = torch.func.vmap(torch.func.jacrev(problem.model))(problem.x)
    expected = torch.einsum("nci,ncj->ij", jacobian, jacobian) / N
    found = oracle.mean_gradient_square(rows["0"], "output", "input")[0]
    assert_close(found, expected.detach(), 1e-12, "AGOP")


# --------------------------------------------------------------------------- measure


@pytest.mark.parametrize("relation", oracle.RELATIONS)
@pytest.mark.parametrize("name", CASES)
def test_matrices_equal_the_oracle(name: str, relation: str) -> None:
    """Every relation's matrix, at four powers, equals the sum of outer products."""
    _, rows = solved(name)
    report = measured(name, "expand")
    assert set(report.layers) == set(rows)
    for layer in rows:
        assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=LAMBDA)


@pytest.mark.parametrize("relation", oracle.RELATIONS)
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_oracle(name: str, relation: str) -> None:
    """Every score equals the one computed from dense matrices, NaN in the same places."""
    _, rows = solved(name)
    report = measured(name, "expand")
    for layer in rows:
        assert_scores_agree(report, layer, rows[layer], relation)


@pytest.mark.parametrize("relation", ["nfa", "enfa", "bnfa", "benfa", "fact"])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].reducible])
def test_reduced_positions_equal_the_oracle(name: str, relation: str) -> None:
    """positions="reduce" sums over positions and calls first, for K and E but not for FACT."""
    _, rows = solved(name)
    report = measured(name, "reduce")
    for layer in rows:
        options = {"positions": "reduce", "weight_decay": LAMBDA}
        assert_matrices_agree(report, layer, rows[layer], relation, **options)
        assert_scores_agree(report, layer, rows[layer], relation, **options)


def test_reduced_positions_differ_from_expanded_ones() -> None:
    """The two treatments of positions give different matrices where there are positions."""
    expanded = measured("linear [n,s,d]", "expand").matrix("0", "nfa")
    reduced = measured("linear [n,s,d]", "reduce").matrix("0", "nfa")
    assert float((expanded - reduced).norm() / expanded.norm()) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_counts(name: str) -> None:
    """n_examples, n_rows, n_kept and the status of an ordinary measurement are right."""
    _, rows = solved(name)
    report = measured(name, "expand")
    assert report.records
    for record in report.records:
        layer = rows[record.layer]
        assert record.n_examples == N, record
        assert record.n_rows == layer.n_rows, record
        assert record.weight_decay == LAMBDA
        if record.relation not in oracle.EQUALITIES and record.power != 1.0:
            blocks_ = oracle.prediction(layer, record.relation, 1.0)
            assert record.n_kept == oracle.kept_eigenvalues(blocks_), record


@pytest.mark.parametrize("relation", ["nfa", "enfa"])
@pytest.mark.parametrize("name", ["linear [n,d]", "linear wide to narrow", "conv2d", "attention"])
def test_shared_weight_cosine(name: str, relation: str) -> None:
    """The level of K with random eigenvectors is that of a Monte Carlo with rotations of its own.

    These layers are narrow, where the closed form at s = 1 would be up to 0.025 low.
    """
    _, rows = solved(name)
    report = measured(name, "expand")
    of = "output" if relation == "nfa" else "loss"
    checked = 0
    for layer, layer_rows in rows.items():
        k_matrix = oracle.mean_gradient_square(layer_rows, of, "output")[0]
        for power in (0.5, 1.0):
            sampled = oracle.rotated_cosines(layer_rows.weight[0], k_matrix, power, 300, seed=3)
            found = report.record(layer, relation, power).shared_weight_cosine
            # both are means of about 300 rotations: five standard errors of their difference
            allowed = 5 * float(sampled.std()) * (1 / 256 + 1 / 300) ** 0.5 + 1e-6
            assert abs(found - float(sampled.mean())) < allowed, (layer, power)
        checked += 1
    assert checked == len(report.layers)


@pytest.mark.parametrize(
    "name", ["linear [n,d]", "linear [n,s,d]", "conv2d groups", "tied weights"]
)
@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5), (1,) * 7, (6, 1)], ids=str)
def test_any_split_equals_one_shot(name: str, sizes: tuple[int, ...]) -> None:
    """Streaming over an uneven split of the data gives the one-shot report."""
    problem, _ = solved(name)
    whole = measured(name, "expand")
    parts = exactly(problem, list(zip(problem.x.split(sizes), problem.y.split(sizes), strict=True)))
    for one, other in zip(whole.records, parts.records, strict=True):
        assert (one.layer, one.label, one.status) == (other.layer, other.label, other.status)
        assert (one.n_examples, one.n_rows) == (other.n_examples, other.n_rows)
        matrix = blocks(whole.matrix(one.layer, one.relation, one.power))
        streamed = blocks(parts.matrix(one.layer, one.relation, one.power))
        # the square root loses half of the digits next to a zero eigenvalue
        assert_close(streamed, matrix, 1e-12 if one.power in (None, 1.0, 2.0) else 1e-10, one.label)
        for score in ("pearson", "cosine", "residual", "scale"):
            a, b = getattr(one, score), getattr(other, score)
            assert (math.isnan(a) and math.isnan(b)) or math.isclose(
                a, b, rel_tol=1e-9, abs_tol=1e-10
            )


def test_weight_decay_scales_fact_only() -> None:
    """λ divides FACT and bFACT, moves the residual, and leaves the cosine and the NFA alone."""
    problem, rows = solved("three layers")
    for weight_decay in (0.01, 0.5):
        report = exactly(problem, [(problem.x, problem.y)], weight_decay=weight_decay)
        assert_all_agree(report, rows, weight_decay=weight_decay)
        assert {record.weight_decay for record in report.records} == {weight_decay}


def test_weight_decay_by_layer() -> None:
    """A dict gives each layer its own λ."""
    problem, rows = solved("three layers")
    by_layer = {"0": 0.1, "2": 0.02, "4": 0.3}
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=by_layer)
    for layer, weight_decay in by_layer.items():
        for relation in oracle.RELATIONS:
            options = {"weight_decay": weight_decay}
            assert_matrices_agree(report, layer, rows[layer], relation, **options)
            assert_scores_agree(report, layer, rows[layer], relation, **options)


def test_weight_decay_from_the_optimizer_groups() -> None:
    """Without weight_decay, λ is that of each parameter's own group."""
    problem, rows = solved("three layers")
    groups = [
        {"params": list(problem.model[0].parameters()), "weight_decay": 0.1},
        {"params": list(problem.model[2].parameters())},
        {"params": list(problem.model[4].parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.07)
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=None, optimizer=optimizer)
    for layer, weight_decay in {"0": 0.1, "2": 0.07, "4": 0.0}.items():
        assert report.record(layer, "fact").weight_decay == weight_decay
        assert_matrices_agree(report, layer, rows[layer], "fact", weight_decay=weight_decay)
        assert_scores_agree(report, layer, rows[layer], "fact", weight_decay=weight_decay)


@pytest.mark.parametrize("relation", oracle.EQUALITIES)
def test_no_weight_decay(relation: str) -> None:
    """At λ = 0 FACT stands for −WᵀG: cosines defined, no residual, and the status says why."""
    problem, rows = solved("three layers")
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=0.0)
    for layer in rows:
        record = report.record(layer, relation)
        assert math.isnan(record.residual)
        assert "no weight decay" in record.status
        assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=0.0)
        assert_scores_agree(report, layer, rows[layer], relation, weight_decay=0.0)


def test_unknown_weight_decay_is_nan() -> None:
    """Without weight_decay and optimizer λ is unknown: NaN in the record, no residual, a reason."""
    problem, rows = solved("linear [n,d]")
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=None)
    for layer in rows:
        record = report.record(layer, "fact")
        assert math.isnan(record.weight_decay)
        assert math.isnan(record.residual)
        assert record.status != "ok"
        assert report.record(layer, "nfa", 1.0).status == "ok"
        assert_scores_agree(report, layer, rows[layer], "fact", weight_decay=0.0)


@pytest.mark.parametrize("training_batch_size", [1, 4, 32])
def test_summed_loss(training_batch_size: int) -> None:
    """With reduction "sum", ℓ_i is not divided by n and G is B times the mean gradient."""
    problem, _ = solved("linear [n,s,d]")
    summed = Problem(
        problem.model, problem.x, problem.y, nn.MSELoss(reduction="sum"), problem.layers
    )
    report = exactly(
        summed,
        [(problem.x[:3], problem.y[:3]), (problem.x[3:], problem.y[3:])],
        loss_reduction="sum",
        training_batch_size=training_batch_size,
    )
    assert_all_agree(report, summed.rows(), times=training_batch_size)


def test_custom_forward_on_dict_batches() -> None:
    """forward= runs any batch; the report equals the oracle's through the same callable."""
    problem, rows = solved("three layers")

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(batch["features"])
        return output, F.cross_entropy(output, batch["label"])

    loader = [
        {"label": y, "features": x}
        for x, y in zip(problem.x.split(4), problem.y.split(4), strict=True)
    ]
    report = measure(
        problem.model,
        loader,
        forward=forward,
        weight_decay=LAMBDA,
        relations=oracle.RELATIONS,
        powers=POWERS,
        progress=False,
    )
    assert_all_agree(report, rows)


def test_output_picks_the_tensor() -> None:
    """output= picks f out of what the model returns; here the second of two."""

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"other": x.exp(), "logits": self.inner(x)}

    problem, rows = solved("three layers")
    report = measure(
        Pair(problem.model),
        [(problem.x, problem.y)],
        lambda out, y: F.cross_entropy(out["logits"], y),
        output=lambda out: out["logits"],
        weight_decay=LAMBDA,
        relations=oracle.RELATIONS,
        powers=POWERS,
        progress=False,
    )
    assert_all_agree(report, {f"inner.{layer}": rows[layer] for layer in rows})


def test_include_and_exclude_select_layers() -> None:
    """A selection changes which layers are reported, not their numbers."""
    problem, rows = solved("three layers")
    report = exactly(problem, [(problem.x, problem.y)], include=["0", "4"], exclude="4")
    assert report.layers == ("0",)
    assert_all_agree(report, {"0": rows["0"]})


def test_measure_leaves_the_model_as_it_was() -> None:
    """Modes, parameters, buffers, gradients and random states are untouched by measure."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(True), nn.Linear(5, 2)
    ).double()
    model.train()
    model[3].eval()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    nn.functional.mse_loss(model(x), y).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for eval_mode in (True, False):
        measure(
            model,
            [(x, y)],
            nn.MSELoss(),
            weight_decay=0.1,
            relations=oracle.RELATIONS,
            eval_mode=eval_mode,
            progress=False,
        )
        assert [module.training for module in model.modules()] == modes
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), (name, eval_mode)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, gradient)
            assert p.requires_grad
        assert torch.equal(torch.get_rng_state(), state), eval_mode


# --------------------------------------------------------------------------- frozen, unused


def right_or_a_reason(
    report: Report, rows: dict[str, oracle.Rows], required: Sequence[tuple[str, str]]
) -> None:
    """Each record is the oracle's or all NaN with a reason; the required ones must be numbers."""
    for record in report.records:
        if math.isnan(record.cosine):
            assert (record.layer, record.relation) not in required, record
            assert record.status not in ("", "ok"), record
            for score in ("pearson", "trace_free_cosine", "residual", "scale"):
                assert math.isnan(getattr(record, score)), record
        else:
            options = {"weight_decay": LAMBDA}
            assert_scores_agree(
                report, record.layer, rows[record.layer], record.relation, **options
            )


@pytest.mark.parametrize("frozen", ["0", "2", "4"])
def test_a_frozen_layer(frozen: str) -> None:
    """Other layers keep their numbers; the frozen one's are right or NaN with a reason."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    for parameter in problem.model.get_submodule(frozen).parameters():
        parameter.requires_grad_(False)
    report = exactly(problem, [(problem.x, problem.y)])
    required = [(layer, r) for layer in rows if layer != frozen for r in oracle.RELATIONS]
    right_or_a_reason(report, rows, required)
    assert set(report.layers) - {frozen} == set(rows) - {frozen}


def test_all_layers_frozen() -> None:
    """A model without anything to train gives no number, or a refusal, never a zero."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    problem.model.requires_grad_(False)
    report = exactly(problem, [(problem.x, problem.y)])
    right_or_a_reason(report, rows, [])


class Unused(nn.Module):
    """A layer that is never called, one whose output is dropped, one behind detach."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 5)
        self.never_called = nn.Linear(4, 5)
        self.dropped = nn.Linear(4, 5)
        self.detached = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.head(torch.tanh(self.used(x)) + self.detached(x).detach())


@pytest.mark.parametrize("layer", ["never_called", "dropped", "detached"])
def test_a_layer_without_gradient_says_so(layer: str) -> None:
    """A layer no gradient reached is NaN with a status that says so, never zero."""
    reasons = ["no gradient reached", "never called"][: 2 if layer == "never_called" else 1]
    case = Case(Unused, (4,))
    problem = build(case)
    report = exactly(problem, [(problem.x, problem.y)])
    records = report.select(layer)
    assert {record.relation for record in records} == set(oracle.RELATIONS)
    for record in records:
        assert any(reason in record.status for reason in reasons), record
        for score in ("pearson", "cosine", "trace_free_cosine", "residual", "scale"):
            assert math.isnan(getattr(record, score)), record


def test_layers_beside_an_unused_one_are_right() -> None:
    """An unused layer does not disturb the others."""
    problem = build(Case(Unused, (4,)))
    rows = {layer: problem.rows()[layer] for layer in ("used", "head")}
    report = exactly(problem, [(problem.x, problem.y)], include=["used", "head"])
    assert_all_agree(report, rows)
    report = exactly(problem, [(problem.x, problem.y)])
    right_or_a_reason(report, rows, [(layer, r) for layer in rows for r in oracle.RELATIONS])


class Gated(nn.Module):
    """A branch behind a gate that starts at zero, as the residual branches of timm's ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.branch = nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + self.gate * self.branch(x)


def test_a_gradient_that_is_zero_is_not_a_missing_one() -> None:
    """Behind a closed gate G, K and E are zero: NaN, the status says zero, coverage is full."""
    problem = build(Case(Gated, (4,)))
    rows = problem.rows()
    report = exactly(problem, [(problem.x, problem.y)])
    for record in report.select("branch"):
        assert "zero" in record.status, record
        assert math.isnan(record.cosine), record
        assert record.n_rows == N
    for relation in oracle.RELATIONS:
        assert_matrices_agree(report, "trunk", rows["trunk"], relation, weight_decay=LAMBDA)
    assert report.coverage.share() == 1.0


def test_reduced_positions_without_an_example_axis_are_refused_by_status() -> None:
    """Where [n·s, d] hides the examples, "reduce" gives NaN with a reason; FACT is as ever."""
    _, rows = solved("linear folded [n*s,d]")
    report = measured("linear folded [n*s,d]", "reduce")
    for record in report.select("inner"):
        if record.relation in oracle.EQUALITIES:
            assert record.status == "ok", record
        else:
            assert "reduce" in record.status, record
            assert math.isnan(record.cosine), record
    for relation in oracle.EQUALITIES:
        assert_matrices_agree(report, "inner", rows["inner"], relation, weight_decay=LAMBDA)


# --------------------------------------------------------------------------- in the loop

LOOP_CASES = [
    "linear [n,d]",
    "linear [n,s,d]",
    "three layers",
    "output [n,s,V]",
    "called three times",
    "tied weights",
    "in place",
    "in place conv",
    "attention",
    "linear folded [n*s,d]",
    "conv1d same, even kernel",
    "conv2d groups, every option",
    "conv3d",
]


def train_step(problem: Problem, optimizer: torch.optim.Optimizer) -> None:
    """One ordinary step on the problem's batch."""
    optimizer.zero_grad()
    problem.loss_fn(problem.model(problem.x.clone()), problem.y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", LOOP_CASES)
def test_in_the_loop_with_window_one_is_the_definition(name: str) -> None:
    """window=1 with exact Jacobians: the definitions on that minibatch at those weights."""
    problem = build(CASES[name])
    problem.model.train()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05, weight_decay=LAMBDA)
    probe = FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    )
    generator = torch.Generator().manual_seed(9)
    with probe:
        for step in range(3):
            x = torch.randn(problem.x.shape, generator=generator, dtype=torch.float64)
            problem = Problem(problem.model, x, problem.y, problem.loss_fn, problem.layers)
            state = {k: v.clone() for k, v in problem.model.state_dict().items()}
            train_step(problem, optimizer)
            report = probe.report
            assert report is not None
            assert report.step == step
            assert probe.faults == 0
            frozen = build(CASES[name])  # the oracle runs a model of its own, unknown to the probe
            frozen.model.load_state_dict(state)
            rows = Problem(frozen.model, x, problem.y, problem.loss_fn, problem.layers).rows()
            assert_all_agree(report, rows)
            for record in report.records:
                assert record.n_examples == N
                assert record.n_rows == rows[record.layer].n_rows
                assert record.weight_decay == LAMBDA
                assert record.step == step


def test_in_the_loop_summed_loss() -> None:
    """loss_reduction="sum": G is the minibatch's summed gradient and g_i is not rescaled."""
    problem = build(CASES["linear [n,s,d]"])
    problem = Problem(
        problem.model, problem.x, problem.y, nn.MSELoss(reduction="sum"), problem.layers
    )
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01, weight_decay=LAMBDA)
    rows = problem.rows()
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        loss_reduction="sum",
        keep_matrices=True,
    ) as probe:
        train_step(problem, optimizer)
    assert_all_agree(probe.report, rows, times=N)


def test_in_the_loop_maximize_turns_the_sign() -> None:
    """An optimizer that maximises minimises −loss: G, FACT and bFACT change sign, E does not."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    optimizer = torch.optim.SGD(
        problem.model.parameters(), lr=0.05, weight_decay=LAMBDA, maximize=True
    )
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        train_step(problem, optimizer)
    assert_all_agree(probe.report, rows, times=-1.0)


def test_in_the_loop_weight_decay_of_each_group() -> None:
    """λ is read from the group of each parameter; a group without decay says so."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    optimizer = torch.optim.SGD(
        [
            {"params": list(problem.model[0].parameters()), "weight_decay": 0.2},
            {"params": list(problem.model[2].parameters()), "weight_decay": 0.0},
            {"params": list(problem.model[4].parameters())},
        ],
        lr=0.05,
        weight_decay=0.05,
    )
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=("fact", "bfact"),
        keep_matrices=True,
    ) as probe:
        train_step(problem, optimizer)
    for layer, weight_decay in {"0": 0.2, "2": 0.0, "4": 0.05}.items():
        record = probe.report.record(layer, "fact")
        assert record.weight_decay == weight_decay
        assert ("no weight decay" in record.status) == (weight_decay == 0.0)
        for relation in ("fact", "bfact"):
            options = {"weight_decay": weight_decay}
            assert_matrices_agree(probe.report, layer, rows[layer], relation, **options)
            assert_scores_agree(probe.report, layer, rows[layer], relation, **options)


def test_manual_stepping_without_an_optimizer() -> None:
    """probe.step() after backward does what the optimizer's hook does."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    with FeatureProbe(
        problem.model,
        every=1,
        window=1,
        weight_decay=LAMBDA,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        problem.loss_fn(problem.model(problem.x), problem.y).backward()
        probe.step()
    assert probe.report.step == 0
    assert_all_agree(probe.report, rows)


def test_a_window_at_frozen_weights_is_the_definition_on_the_union() -> None:
    """At lr = 0 a window of three minibatches is one measurement on the twelve examples."""
    problem = build(CASES["three layers"], n=12)
    rows = problem.rows()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0, weight_decay=LAMBDA)
    probe = FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=lambda step: step == 4,
        window=3,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    )
    batches = list(zip(problem.x.split(4), problem.y.split(4), strict=True))
    with probe:
        for step in range(5):
            x, y = batches[(step + 1) % 3] if step >= 2 else batches[0]
            part = Problem(problem.model, x, y, problem.loss_fn, problem.layers)
            train_step(part, optimizer)
            assert (probe.report is not None) == (step == 4)
    assert probe.report.step == 4
    assert {record.n_examples for record in probe.report.records} == {12}
    assert_all_agree(probe.report, rows)


def test_a_window_takes_means_and_the_last_weights() -> None:
    """G is the mean over steps, K and E are means over examples, W is the last step's."""
    problem = build(CASES["three layers"], n=12)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.2, weight_decay=LAMBDA)
    sizes = (2, 7, 3)
    steps = []
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=lambda step: step == 2,
        window=3,
        relations=oracle.RELATIONS,
        powers=(1.0,),
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        for x, y in zip(problem.x.split(sizes), problem.y.split(sizes), strict=True):
            part = Problem(problem.model, x, y, problem.loss_fn, problem.layers)
            twin = build(CASES["three layers"])
            twin.model.load_state_dict(problem.model.state_dict())
            steps.append(Problem(twin.model, x, y, problem.loss_fn, problem.layers).rows())
            train_step(part, optimizer)
    report = probe.report
    assert {record.n_examples for record in report.records} == {12}
    for layer in problem.layers:
        w = steps[-1][layer].weight[0]
        assert float((w - steps[0][layer].weight[0]).norm() / w.norm()) > 1e-3
        gradients = [
            torch.einsum("npgo,npgi->oi", rows[layer].g, rows[layer].h) / rows[layer].n
            for rows in steps
        ]
        g = sum(gradients) / len(steps)
        sums = {
            of: sum(
                rows[layer].n * oracle.mean_gradient_square(rows[layer], of, "output")[0]
                for rows in steps
            )
            / 12
            for of in ("output", "loss")
        }
        expected = {
            "nfm": w.T @ w,
            "fact": -w.T @ g / LAMBDA,
            "bfact": -w @ g.T / LAMBDA,
            "nfa": w.T @ sums["output"] @ w,
            "enfa": w.T @ sums["loss"] @ w,
            "bnfa": sums["output"],
            "benfa": sums["loss"],
        }
        for kind, matrix in expected.items():
            assert_close(report.matrix(layer, kind), matrix, 1e-10, f"{layer} {kind}")


def test_gradient_accumulation_keeps_fact() -> None:
    """Two half-weighted backward passes before a step: G, FACT and the counts are the batch's."""
    problem = build(CASES["three layers"], n=8)
    rows = problem.rows()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05, weight_decay=LAMBDA)
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=("fact", "bfact", "fact_sym", "bfact_sym", "nfa", "bnfa"),
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        for x, y in zip(problem.x.split(4), problem.y.split(4), strict=True):
            (problem.loss_fn(problem.model(x), y) / 2).backward()
        optimizer.step()
    assert {record.n_examples for record in probe.report.records} == {8}
    assert_all_agree(probe.report, rows)
