"""Named models with data and loss, and how a report is compared with the oracle on them."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import Report, measure


def readable(value: object) -> str:
    """A test's name for a value: without its address, which differs between processes."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


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


class Conv1D(nn.Module):
    """What transformers' Conv1D is, for machines without transformers: found by its path."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class Tokens(nn.Module):
    """An embedding, a tanh over positions that mixes them, and a head."""

    def __init__(self, positions: int, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, **options)
        self.mix = nn.Linear(4 * positions, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.embedding(x))
        return self.head(torch.tanh(self.mix(y.reshape(len(x), -1))))


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
    """A model and the shape of one example; the layers are all modules the oracle knows."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sharing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    classes: int = 0  # > 0: cross-entropy over the last axis, else mean squared error
    reducible: bool = True
    vocabulary: int = 0  # > 0: the input is indices below it


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


def transposed(dim: int, space: tuple[int, ...], c_in: int, c_out: int, **options: Any) -> Case:
    """A transposed convolution under test, then tanh and a Linear head."""
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    shape = (c_in, *space)
    return Case(lambda: sequential(kind(c_in, c_out, **options), like=shape), shape)


#: Layer types beyond Linear and Conv that are measured without being asked for.
TYPE_CASES: dict[str, Case] = {
    "transposed1d": transposed(1, (5,), 3, 2, kernel_size=3),
    "transposed1d wide to narrow": transposed(1, (4,), 7, 1, kernel_size=2, stride=2),
    "transposed1d stride padding": transposed(1, (5,), 3, 2, kernel_size=3, stride=2, padding=1),
    "transposed1d output padding": transposed(
        1, (4,), 3, 2, kernel_size=3, stride=3, padding=1, output_padding=2
    ),
    "transposed1d output padding, nothing cropped": transposed(
        1, (4,), 3, 2, kernel_size=2, stride=3, output_padding=1
    ),
    "transposed1d output padding beyond the stride": transposed(
        1, (5,), 3, 2, kernel_size=2, dilation=3, output_padding=2
    ),
    "transposed1d dilation": transposed(
        1, (5,), 2, 3, kernel_size=3, stride=2, dilation=2, padding=3
    ),
    "transposed1d crops more than a tap": transposed(1, (6,), 3, 2, kernel_size=2, padding=2),
    "transposed1d groups": transposed(1, (5,), 4, 6, kernel_size=2, stride=2, groups=2),
    "transposed1d depthwise": transposed(1, (5,), 3, 3, kernel_size=3, groups=3, padding=1),
    "transposed2d": transposed(2, (3, 4), 3, 2, kernel_size=2),
    "transposed2d no bias": transposed(2, (3, 3), 3, 2, kernel_size=2, stride=2, bias=False),
    "transposed2d of a generator": transposed(2, (3, 3), 4, 1, kernel_size=4, stride=2, padding=1),
    "transposed2d asymmetric": transposed(
        2, (3, 4), 2, 3, kernel_size=(2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1)
    ),
    "transposed2d groups, every option": transposed(
        2,
        (3, 4),
        4,
        6,
        kernel_size=(3, 2),
        groups=2,
        stride=(2, 3),
        padding=(1, 0),
        output_padding=(1, 2),
        dilation=(1, 2),
        bias=False,
    ),
    "transposed3d": transposed(3, (2, 3, 2), 2, 1, kernel_size=2, stride=2),
    "transposed3d asymmetric": transposed(
        3,
        (2, 2, 3),
        4,
        2,
        kernel_size=(1, 2, 3),
        groups=2,
        stride=(1, 2, 2),
        padding=(0, 1, 1),
        output_padding=(0, 1, 0),
    ),
    "transposed into conv": Case(
        lambda: sequential(
            nn.Conv2d(2, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3), like=(2, 3, 3)
        ),
        (2, 3, 3),
    ),
    "Conv1D [n,d]": Case(lambda: sequential(Conv1D(5, 4), like=(4,)), (4,)),
    "Conv1D [n,s,d]": Case(lambda: sequential(Conv1D(5, 4), like=(3, 4)), (3, 4)),
    "Conv1D after Conv1D": Case(
        lambda: sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6), like=(3, 4)), (3, 4)
    ),
}

#: Embeddings: measured where their rule is registered.
EMBEDDING_CASES: dict[str, Case] = {
    "embedding [n]": Case(lambda: Tokens(1), (), vocabulary=6),
    "embedding [n,s]": Case(lambda: Tokens(3), (3,), vocabulary=6),
    "embedding [n,a,b]": Case(lambda: Tokens(4), (2, 2), vocabulary=6),
    "embedding padding index": Case(lambda: Tokens(3, padding_idx=2), (3,), vocabulary=6),
    "embedding sparse": Case(lambda: Tokens(3, sparse=True), (3,), vocabulary=6),
    "embedding sparse, padding index": Case(
        lambda: Tokens(3, sparse=True, padding_idx=-1), (3,), vocabulary=6
    ),
}

ALL_CASES = CASES | TYPE_CASES | EMBEDDING_CASES


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
    if case.vocabulary:
        x = torch.randint(case.vocabulary, (n, *case.shape))
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
        if oracle.is_layer(module) and (name in case.sharing or name not in shared)
    }
    return Problem(model, x, y, loss_fn, layers)


@functools.cache
def solved(name: str) -> tuple[Problem, dict[str, oracle.Rows]]:
    """The case and the oracle's rows, once per test session."""
    problem = build(ALL_CASES[name])
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
