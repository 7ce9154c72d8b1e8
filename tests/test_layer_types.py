"""Layer types beyond Linear and Conv: transposed convolutions, Conv1D, embeddings; by oracle."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from cases import (
    ALL_CASES,
    EMBEDDING_CASES,
    LAMBDA,
    TYPE_CASES,
    Case,
    N,
    Problem,
    assert_all_agree,
    assert_close,
    assert_matrices_agree,
    assert_scores_agree,
    build,
    exactly,
    measured,
    readable,
    sequential,
    solved,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from feature_probe import ConfigurationError, FeatureProbe, register_layer_rule
from feature_probe.layers.embeddings import EmbeddingRule
from feature_probe.layers.rules import (
    LinearRule,
    TransposedLinearRule,
    find_rule,
    known_layer_names,
    known_layer_types,
    layer_shape,
    unregister_layer_rule,
)
from feature_probe.layers.targets import find_targets

NAMES = [*TYPE_CASES, *EMBEDDING_CASES]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.fixture(autouse=True)
def embeddings() -> Iterator[None]:
    """Embeddings are measured in this file, and nowhere else."""
    register_layer_rule(nn.Embedding, EmbeddingRule())
    try:
        yield
    finally:
        unregister_layer_rule(nn.Embedding)


# --------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("name", NAMES)
def test_oracle_rows_are_the_layers_rows(name: str) -> None:
    """W·rows, folded up where the layer folds, is the layer's own output without bias."""
    problem, rows = solved(name)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in problem.layers}
    handles = [
        problem.model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: calls[layer].append(
                (inputs[0].detach(), output.detach())
            )
        )
        for layer in problem.layers
    ]
    problem.model(problem.x[:1].clone())
    for handle in handles:
        handle.remove()
    for layer, layer_rows in rows.items():
        module = problem.model.get_submodule(layer)
        ((x, output),) = calls[layer]
        z = torch.einsum("pgi,goi->pgo", layer_rows.h[0], layer_rows.weight)
        bias = getattr(module, "bias", None)
        if bias is not None:
            last = isinstance(module, nn.Linear) or oracle.is_conv1d(module)
            output = output - bias.detach().reshape(-1, *[1] * (0 if last else output.dim() - 2))
        if isinstance(module, TRANSPOSED):
            found = oracle.fold(module, z, x.shape[2:], output.shape)
        else:
            found, output = z, oracle.output_rows(module, output)
        torch.testing.assert_close(found, output, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_oracle_fact_is_the_gradient_form(name: str) -> None:
    """The oracle's FACT and bFACT equal −WᵀG/λ and −WGᵀ/λ with autograd's full-batch G."""
    problem, rows = solved(name)
    problem.model.zero_grad()
    problem.loss_fn(problem.model(problem.x.clone()), problem.y).backward()
    for layer, layer_rows in rows.items():
        module = problem.model.get_submodule(layer)
        weight, gradient = layer_rows.weight, module.weight.grad.to_dense()
        gradient = oracle.stored_matrix(module, gradient)
        assert_close(oracle.fact(layer_rows, LAMBDA), -weight.mT @ gradient / LAMBDA, 1e-12, layer)
        assert_close(oracle.bfact(layer_rows, LAMBDA), -weight @ gradient.mT / LAMBDA, 1e-12, layer)
    problem.model.zero_grad()


# --------------------------------------------------------------------------- measure


@pytest.mark.parametrize("relation", oracle.RELATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_relations_equal_the_oracle(name: str, relation: str) -> None:
    """Every relation's matrix and scores, at four powers, equal those of the definitions."""
    _, rows = solved(name)
    report = measured(name, "expand")
    assert set(report.layers) == set(rows)
    for layer in rows:
        assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=LAMBDA)
        assert_scores_agree(report, layer, rows[layer], relation)


@pytest.mark.parametrize("relation", ["nfa", "enfa", "bnfa", "benfa", "fact"])
@pytest.mark.parametrize("name", NAMES)
def test_reduced_positions_equal_the_oracle(name: str, relation: str) -> None:
    """positions="reduce" sums an example's columns first, for K and E but not for FACT."""
    _, rows = solved(name)
    report = measured(name, "reduce")
    for layer in rows:
        options = {"positions": "reduce", "weight_decay": LAMBDA}
        assert_matrices_agree(report, layer, rows[layer], relation, **options)
        assert_scores_agree(report, layer, rows[layer], relation, **options)


@pytest.mark.parametrize("name", NAMES)
def test_counts(name: str) -> None:
    """Rows are examples times input positions, and every layer is covered."""
    _, rows = solved(name)
    report = measured(name, "expand")
    for record in report.records:
        assert record.n_examples == N, record
        assert record.n_rows == rows[record.layer].n_rows, record
    assert report.coverage.share() == 1.0


@pytest.mark.parametrize(
    "name", ["transposed2d groups, every option", "Conv1D [n,s,d]", "embedding padding index"]
)
@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5)], ids=str)
def test_any_split_equals_the_oracle(name: str, sizes: tuple[int, ...]) -> None:
    """Streaming over an uneven split of the data gives the same as all at once."""
    problem, rows = solved(name)
    batches = list(zip(problem.x.split(sizes), problem.y.split(sizes), strict=True))
    assert_all_agree(exactly(problem, batches), rows)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_equal_the_oracle(name: str) -> None:
    """With no weight to train G is formed from inputs and output gradients: the same numbers."""
    _, rows = solved(name)
    problem = build(ALL_CASES[name])
    problem.model.requires_grad_(False)
    report = exactly(problem, [(problem.x, problem.y)])
    for layer in rows:
        for relation in ("fact", "bfact", "nfa", "enfa"):
            assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=LAMBDA)


class Language(nn.Module):
    """An embedding whose weight is the head's, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x)).cumsum(1)))


def test_an_embedding_tied_to_the_head() -> None:
    """Two matrices, W and its transpose: each has its own rows, and the gradient of their sum."""
    problem = build(Case(Language, (3,), vocabulary=6))
    rows = problem.rows()
    report = exactly(problem, [(problem.x, problem.y)])
    assert set(report.layers) == {"embedding", "mix", "head"}
    for layer in rows:
        for relation in ("nfa", "enfa", "bnfa", "benfa"):
            assert_matrices_agree(report, layer, rows[layer], relation)
    problem.loss_fn(problem.model(problem.x), problem.y).backward()
    weight, gradient = problem.model.head.weight.detach(), problem.model.head.weight.grad
    for layer, w, g in (("head", weight, gradient), ("embedding", weight.T, gradient.T)):
        assert_close(report.matrix(layer, "fact"), -w.T @ g / LAMBDA, 1e-12, layer)
        assert_close(report.matrix(layer, "bfact"), -w @ g.T / LAMBDA, 1e-12, layer)


# --------------------------------------------------------------------------- computed weights


@pytest.mark.parametrize(
    "name",
    [
        "transposed1d stride padding",
        "transposed1d output padding beyond the stride",
        "transposed2d groups, every option",
        "transposed3d asymmetric",
        "Conv1D [n,s,d]",
    ],
)
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_computed_weight(name: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """With a normalised weight the effective one is measured: as with it as a parameter."""
    wrapped, plain = build(ALL_CASES[name]), build(ALL_CASES[name])
    wrap(wrapped.model[0])
    with torch.no_grad():
        wrapped.model(wrapped.x)  # what works by a hook computes its weight there
        plain.model[0].weight.copy_(wrapped.model[0].weight)
    rows = plain.rows()
    report = exactly(wrapped, [(wrapped.x, wrapped.y)])
    assert set(report.layers) == set(rows)
    for layer in rows:
        for relation in oracle.RELATIONS:
            assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=LAMBDA)


# --------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    "name",
    [
        "transposed1d output padding",
        "transposed2d of a generator",
        "transposed2d groups, every option",
        "Conv1D [n,s,d]",
        "embedding [n,s]",
        "embedding sparse, padding index",
    ],
)
def test_in_the_loop(name: str) -> None:
    """A step of a training loop gives the oracle's matrices, and trains as without the probe."""
    problem = build(ALL_CASES[name])
    rows = problem.rows()
    states = []
    for probed in (False, True):
        model = copy.deepcopy(problem.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = FeatureProbe(
            model, optimizer=optimizer, every=1, window=1, relations=oracle.RELATIONS, powers=1.0,
            jacobian="exact", weight_decay=LAMBDA, keep_matrices=True, strict=True,
        )  # fmt: skip
        if probed:
            probe.attach()
        problem.loss_fn(model(problem.x), problem.y).backward()
        optimizer.step()
        states.append(model.state_dict())
        if probed:
            probe.detach()
            report = probe.report
            assert report is not None
            # E is exact here; K by random signs over the examples
            for layer in rows:
                for relation in ("fact", "bfact", "enfa", "benfa", "fact_sym", "bfact_sym"):
                    assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=LAMBDA)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


# --------------------------------------------------------------------------- rules by hand


def rule_of(module: nn.Module) -> Any:
    """The module's rule."""
    found = find_rule(module)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("layer", "space"),
    [
        (nn.ConvTranspose1d(2, 3, 3, stride=4, padding=1, output_padding=2), (5,)),
        (nn.ConvTranspose2d(4, 6, (2, 3), groups=2, stride=(2, 1), dilation=(1, 2)), (3, 4)),
        (nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1, groups=2), (2, 3, 2)),
    ],
    ids=str,
)
def test_an_example_without_batch_axis(layer: nn.Module, space: tuple[int, ...]) -> None:
    """An unbatched input is one example: the rows and Σ g hᵀ of a batch of one."""
    layer = layer.double()
    x = torch.randn(1, layer.in_channels, *space, dtype=torch.float64)
    g = torch.randn(layer(x).shape, dtype=torch.float64)
    rule = rule_of(layer)
    rows, alone = rule.rows(layer, g), rule.rows(layer, g[0])
    assert rows.shape[:3] == (1, math.prod(space), layer.groups)
    assert torch.equal(rows, alone)
    layer(x).backward(g)
    expected = rule.gradient_matrix(layer, layer.weight.grad)
    for inputs, output in ((x, g), (x[0], g[0])):
        found = rule.input_gradient_matrix(layer, inputs, output)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [9, 10, 11])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_an_output_size_given_to_forward(size: int, own: int) -> None:
    """Rows follow the output that was made, whatever the module's own output padding is."""
    layer = nn.ConvTranspose1d(2, 2, 3, stride=3, padding=1, output_padding=own).double()
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    output = layer(x, output_size=[size + 1])
    assert output.shape[-1] == size + 1
    g = torch.randn(output.shape, dtype=torch.float64)
    rows = rule_of(layer).rows(layer, g)
    assert rows.shape == (2, 4, 1, 6)
    output.backward(g)
    found = torch.einsum("npgo,npi->goi", rows, x.movedim(1, -1))
    expected = rule_of(layer).matrix(layer, layer.weight.grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_a_cropped_entry_has_no_gradient() -> None:
    """What padding crops of a column is in no output: its row entry is zero, the rest is read."""
    layer = nn.ConvTranspose1d(1, 1, 3, stride=3, padding=1)
    g = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])  # columns 0 1 2 | 3 4 5, entries 0 and 5 cropped
    rows = rule_of(layer).rows(layer, g)
    assert rows[0, :, 0].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 0.0]]


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"sparse": True}], ids=str)
def test_the_gradient_of_an_embedding_from_its_indices(options: dict[str, Any]) -> None:
    """Indices that repeat are added up, of any integer type; the padding index gets nothing."""
    layer = nn.Embedding(5, 3, dtype=torch.float64, **options)
    rule = EmbeddingRule()
    x = torch.tensor([[0, 1, 1], [4, 0, 1]], dtype=torch.int32)
    g = torch.randn(2, 3, 3, dtype=torch.float64)
    layer(x).backward(g)
    expected = layer.weight.grad.to_dense().T[None]
    found = rule.input_gradient_matrix(layer, x, g)
    assert not found.is_sparse
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)
    dense = rule.gradient_matrix(layer, layer.weight.grad)
    torch.testing.assert_close(dense, expected, rtol=1e-14, atol=0.0)
    if "padding_idx" in options:
        assert not found[..., 1].any()


# --------------------------------------------------------------------------- finding the rule


def test_conv1d_of_transformers() -> None:
    """The real class has the rule, and gives what a Linear with the transposed weight gives."""
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(1)
    model = sequential(kind(5, 4), like=(3, 4)).double()
    plain = nn.Linear(4, 5).double()
    with torch.no_grad():
        plain.weight.copy_(model[0].weight.T)
        plain.bias.copy_(model[0].bias.normal_())
    x, y = torch.randn(N, 3, 4, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    reports = []
    for layers in (model, nn.Sequential(plain, *model[1:])):
        problem = Problem(layers, x, y, nn.MSELoss(), {})
        reports.append(exactly(problem, [(x, y)]))
    for relation in ("nfm", "bnfm", "fact", "bfact"):
        torch.testing.assert_close(*(report.matrix("0", relation) for report in reports))
    for relation in ("nfa", "enfa", "bnfa", "benfa"):
        torch.testing.assert_close(*(report.matrix("0", relation, 1.0) for report in reports))


def test_conv1d_is_found_by_its_path_alone() -> None:
    """A class of the same name elsewhere is none; a subclass of the real path is one."""

    class Conv1D(nn.Module):
        """The name alone."""

    class Sub(type(ALL_CASES["Conv1D [n,d]"].model()[0])):  # type: ignore[misc]
        """A subclass without changes."""

    assert find_rule(Conv1D()) is None
    kind, rule = find_rule(Sub(2, 3)) or (None, None)
    assert kind is Sub.__mro__[1]
    assert type(rule) is TransposedLinearRule


class Projection(nn.Module):
    """The example of the documentation: a transposed weight under another name."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, self.kernel)


class ProjectionRule(TransposedLinearRule):
    """The rule of the documentation."""

    parameter = "kernel"


@pytest.mark.parametrize("key", [Projection, f"{Projection.__module__}.Projection"], ids=str)
def test_registering_by_class_or_by_path(key: type[nn.Module] | str) -> None:
    """Both ways give the rule of the example, and it can be taken back."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), Projection(4, 2)).double()
    register_layer_rule(key, ProjectionRule())
    try:
        assert [(t.name, t.d_out, t.d_in) for t in find_targets(model)] == [
            ("0", 4, 3),
            ("1", 2, 4),
        ]
        assert (Projection in known_layer_types()) is (key is Projection)
        assert ("Projection" if key is Projection else key) in known_layer_names()
    finally:
        unregister_layer_rule(key)
    assert find_rule(model[1]) is None


def test_a_class_goes_before_its_path() -> None:
    """Where both are registered the class wins; a subclass's path wins over its parent's class."""

    class Child(Projection):
        """Found by path."""

    path = f"{Child.__module__}.{Child.__qualname__}"
    by_class, by_path, by_child = ProjectionRule(), ProjectionRule(), ProjectionRule()
    rules = {Projection: by_class, f"{Projection.__module__}.Projection": by_path, path: by_child}
    for key, rule in rules.items():
        register_layer_rule(key, rule)
    try:
        assert find_rule(Projection(2, 3)) == (Projection, by_class)
        assert find_rule(Child(2, 3)) == (Child, by_child)
    finally:
        for key in rules:
            unregister_layer_rule(key)


@pytest.mark.parametrize("given", ["Conv1D", "", "a..b", "a.b-c", "a.b.", 3], ids=repr)
def test_a_path_that_is_none(given: Any) -> None:
    """A bare name and a broken path are refused, with what was given and what is allowed."""
    with pytest.raises(ConfigurationError, match=r"package\.module\.Class.*got"):
        register_layer_rule(given, LinearRule())


@pytest.mark.parametrize("given", [LinearRule, None, nn.Linear(2, 2), object()], ids=readable)
def test_a_rule_that_is_none(given: Any) -> None:
    """A class instead of an instance, or an object without the methods, is refused by name."""
    with pytest.raises(ConfigurationError, match=r"LayerRule instance with parameter, matrix"):
        register_layer_rule(Projection, given)
    assert Projection not in known_layer_types()


def test_unregistering_an_unknown_path() -> None:
    """A path without a rule is refused."""
    with pytest.raises(ConfigurationError, match=r"no rule is registered for 'a\.b\.C'"):
        unregister_layer_rule("a.b.C")


def test_what_is_measured_by_default() -> None:
    """Without any registering: Linear, convolutions both ways, Conv1D; no embedding."""
    unregister_layer_rule(nn.Embedding)
    try:
        assert set(known_layer_types()) == {
            nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED
        }  # fmt: skip
        assert set(known_layer_names()) == {
            "Linear",
            *(f"Conv{dim}d" for dim in (1, 2, 3)),
            *(f"ConvTranspose{dim}d" for dim in (1, 2, 3)),
            "transformers.pytorch_utils.Conv1D",
        }
        assert find_rule(nn.Embedding(3, 2)) is None
    finally:
        register_layer_rule(nn.Embedding, EmbeddingRule())


# --------------------------------------------------------------------------- shapes

SHAPES: list[tuple[Callable[[], nn.Module], tuple[int, int, int]]] = [
    (lambda: nn.Linear(4, 7), (1, 7, 4)),
    (lambda: nn.Conv1d(4, 6, 5), (1, 6, 20)),
    (lambda: nn.Conv2d(4, 6, (2, 3), groups=2), (2, 3, 12)),
    (lambda: nn.Conv3d(2, 4, 3), (1, 4, 54)),
    (lambda: nn.ConvTranspose1d(4, 6, 5), (1, 30, 4)),
    (lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2), (2, 18, 2)),
    (lambda: nn.ConvTranspose3d(2, 4, 3, groups=2), (2, 54, 1)),
    (lambda: nn.Embedding(9, 4), (1, 4, 9)),
    (lambda: ALL_CASES["Conv1D [n,d]"].model()[0], (1, 5, 4)),
]


class Counted(nn.Module):
    """A parametrization that counts how often the weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return 2 * weight


@pytest.mark.parametrize(("make", "shape"), SHAPES, ids=lambda v: str(v() if callable(v) else v))
def test_shapes(make: Callable[[], nn.Module], shape: tuple[int, int, int]) -> None:
    """Parameter, parametrization, pruning's attribute: one shape, and nothing is evaluated."""
    layer = make()
    rule = rule_of(layer)
    assert layer_shape(layer, rule) == shape
    assert rule.matrix(layer, layer.weight).shape == shape
    counted = Counted()
    nn.utils.parametrize.register_parametrization(layer, "weight", counted)
    before = counted.count
    assert layer_shape(layer, rule) == shape
    assert counted.count == before
    pruned = prune.random_unstructured(make(), "weight", amount=0.5)
    assert layer_shape(pruned, rule) == shape
    assert layer_shape(parametrizations.weight_norm(make()), rule) == shape


def test_the_shape_of_a_pruned_weight_without_declared_sizes() -> None:
    """Pruning leaves a plain tensor where the parameter was: its shape will do."""
    layer = prune.random_unstructured(Projection(4, 2), "kernel", amount=0.5)
    assert layer_shape(layer, ProjectionRule()) == (1, 2, 4)


class Sharded(Tensor):
    """A weight whose every operation would talk to other processes."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in ("__get__", "detach", "requires_grad_", "_make_subclass", "__repr__"):
            raise AssertionError(f"{name} on a sharded weight")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("make", [lambda: nn.ConvTranspose2d(4, 6, 2), lambda: nn.Linear(4, 3)])
def test_a_wrapped_weight_is_asked_for_its_shape_alone(make: Callable[[], nn.Module]) -> None:
    """No operation runs on a weight that is not a plain tensor."""
    layer = make()
    rule = rule_of(layer)
    expected = layer_shape(layer, rule)
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Sharded)
    with pytest.raises(AssertionError, match="on a sharded weight"):
        rule.matrix(layer, layer.weight)
    assert layer_shape(layer, rule) == expected


def test_a_computed_weight_of_unknown_shape() -> None:
    """A rule whose type does not say its sizes needs a parameter, or a declared_shape."""

    class Declared(ProjectionRule):
        """Says the shape."""

        def declared_shape(self, module: Any) -> tuple[int, int, int]:
            return 1, module.d_out, 4

    layer = Projection(4, 2)
    assert layer_shape(layer, ProjectionRule()) == (1, 2, 4)
    nn.utils.parametrize.register_parametrization(layer, "kernel", Counted())
    with pytest.raises(ConfigurationError, match=r"'kernel' of \w*Projection is computed") as told:
        layer_shape(layer, ProjectionRule())
    assert "declared_shape" in str(told.value)
    layer.d_out = 2
    assert layer_shape(layer, Declared()) == (1, 2, 4)
