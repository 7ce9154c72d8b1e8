"""Weights outside a layer's forward: names, ties, what is left out by name, faults, precision."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LAMBDA, assert_close, assert_matrices_agree
from products import Product, Stored, Tape, build, rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from feature_probe import ConfigurationError, FeatureProbe, Report, measure, register_layer_rule
from feature_probe.capture.resolution import WeightResolver
from feature_probe.layers.embeddings import EmbeddingRule
from feature_probe.layers.rules import LinearRule, unregister_layer_rule


def loop(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> FeatureProbe:
    """The probe after one followed step with exact Jacobians; the options override."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=LAMBDA)
    settings: dict[str, Any] = {"powers": 1.0, "jacobian": "exact", "strict": True, **options}
    probe = FeatureProbe(
        model, optimizer=optimizer, every=1, window=1, keep_matrices=True, **settings
    )
    with probe:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return probe


def looped(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Report:
    """The report of one followed step."""
    report = loop(model, x, y, **options).report
    assert report is not None
    return report


def measured(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Report:
    """The report at frozen weights."""
    settings: dict[str, Any] = {"powers": 1.0, "weight_decay": LAMBDA, **options}
    return measure(model, [(x, y)], F.mse_loss, progress=False, **settings)


RUNS = pytest.mark.parametrize("run", [measured, looped])


# --------------------------------------------------------------------------- names


@RUNS
@pytest.mark.parametrize(
    ("name", "selection", "layers"),
    [
        ("self", {"include": "attention.in_proj.*"}, ["q", "k", "v"]),
        ("self", {"include": ["*.q", "*.k"]}, ["q", "k"]),
        ("self", {"include": nn.MultiheadAttention, "exclude": "*.k"}, ["q", "v"]),
        ("h @ w", {"include": "w"}, ["w"]),
        ("h @ w", {"exclude": ["first", "head"]}, ["w"]),
        ("h @ w", {"exclude": "w"}, ["first", "head"]),
    ],
    ids=str,
)
def test_selection(run: Any, name: str, selection: dict[str, Any], layers: list[str]) -> None:
    """include and exclude act on attention's projections and on loose parameters by name."""
    report = run(*build(name), **selection)
    assert [layer.rpartition(".")[2] for layer in report.layers] == layers
    left_out = {gap.parameter for gap in report.coverage.gaps()}
    reasons = {gap.reason for gap in report.coverage.gaps()} - {""}
    assert reasons == {"left out by include/exclude"}
    assert "head.weight" in left_out or "w" in left_out


@RUNS
def test_weight_decay_by_name(run: Any) -> None:
    """λ may be given for a projection and for a loose parameter; another name is refused."""
    for name, layer in (("self", "attention.in_proj.k"), ("h @ w", "w")):
        report = run(*build(name), weight_decay={layer: 0.25, "head": 0.5})
        assert report.record(layer, "fact").weight_decay == 0.25
        assert report.record("head", "fact").weight_decay == 0.5
    with pytest.raises(ConfigurationError, match=r"'attention.in_proj.x', which is not measured"):
        run(*build("self"), weight_decay={"attention.in_proj.x": 0.25})


def test_the_optimizers_decay_is_found_by_parameter() -> None:
    """λ of a projection is that of the packed weight's group."""
    model, x, y = build("self")
    packed = model.attention.in_proj_weight
    others = [p for p in model.parameters() if p is not packed]
    optimizer = torch.optim.SGD(
        [{"params": [packed], "weight_decay": 0.3}, {"params": others, "weight_decay": 0.1}], lr=0.1
    )
    report = measure(model, [(x, y)], F.mse_loss, optimizer=optimizer, powers=1.0, progress=False)
    for letter in "qkv":
        assert report.record(f"attention.in_proj.{letter}", "fact").weight_decay == 0.3
    assert report.record("attention.out_proj", "fact").weight_decay == 0.1


def test_loose_parameters_follow_in_the_order_of_use() -> None:
    """Layers known beforehand come first, weights found in use after them."""
    model, x, y = build("h @ w")
    assert [target.name for target in FeatureProbe.targets(model)] == ["first", "head"]
    assert measured(model, x, y).layers == ("first", "head", "w")


@pytest.mark.parametrize(
    "use",
    [
        lambda w, v: w @ v,
        torch.mv,
        lambda w, v: v @ w.t(),
        lambda w, v: F.linear(v, w),
    ],
    ids=["@", "mv", "row", "linear"],
)
@RUNS
def test_one_vector(run: Any, use: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A product with a vector is one row of one example: K, E and G by hand."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(use(self.w, x[0]))[None]

    model = Net().double()
    w = model.w.detach().clone()
    x, y = torch.randn(1, 5).double(), torch.randn(1, 3).double()
    report = run(model, x, y, relations=("fact", "bnfa", "benfa"))
    z = w @ x[0]
    slope = torch.cos(z)
    g = 2 / 3 * (torch.sin(z) - y[0]) * slope
    assert_close(report.matrix("w", "bnfa", power=1.0), torch.diag(slope**2), 1e-12, "K")
    assert_close(report.matrix("w", "benfa", power=1.0), torch.outer(g, g), 1e-12, "E")
    fact = -w.T @ torch.outer(g, x[0]) / LAMBDA
    assert_close(report.matrix("w", "fact"), fact, 1e-12, "fact")
    assert report.coverage.share() == 1.0


# --------------------------------------------------------------------------- ties


class Autoencoder(nn.Module):
    """A decoder that is its encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 3)
        self.raw = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.raw) @ self.raw.t()
        code = torch.tanh(self.encoder(x))
        return F.linear(code, self.encoder.weight.t())


def autoencoder(tape: Tape, held: Stored, x: Tensor) -> Tensor:
    """One example, written out."""
    x = tape("raw.T", torch.tanh(tape("raw", x)))
    return tape("encoder.weight.T", torch.tanh(tape("encoder", x) + held["encoder.bias"]))


def autoencoder_weights(held: Stored) -> dict[str, Tensor]:
    """The four matrices, of two parameters."""
    encoder, raw = held["encoder.weight"], held["raw"]
    flipped = torch.stack(list(raw.unbind(1)))
    return {
        "encoder": encoder,
        "encoder.weight.T": torch.stack(list(encoder.unbind(1))),
        "raw": flipped,
        "raw.T": raw,
    }


@RUNS
def test_a_weight_used_transposed_as_well(run: Any) -> None:
    """Each side is a layer with K and E of its own products; G is the whole gradient in both."""
    torch.manual_seed(1)
    model = Autoencoder().double()
    x = torch.randn(6, 5).double()
    product = Product(Autoencoder, (5,), autoencoder_weights, autoencoder)
    expected = rows(product, model, x, x)
    F.mse_loss(model(x), x).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = run(model, x, x)
    assert set(report.layers) == set(expected)
    assert report.coverage.share() == 1.0
    wholes = autoencoder_weights(gradients)
    for layer, layer_rows in expected.items():
        for relation in ("nfa", "enfa"):
            assert_matrices_agree(report, layer, layer_rows, relation)
        w, g = layer_rows.weight[0], wholes[layer]
        assert_close(report.matrix(layer, "fact"), -w.T @ g / LAMBDA, 1e-9, layer)


class Language(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.how = how
        if how == "layer":
            self.output = nn.Linear(4, 6, bias=False)
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embedding(tokens)))
        return self.output(x) if self.how == "layer" else F.linear(x, self.embedding.weight)


@RUNS
@pytest.mark.parametrize("how", ["layer", "function"])
def test_an_output_layer_tied_to_the_embedding(run: Any, how: str) -> None:
    """As in GPT-2: K and E of the output layer's products, G with the embedding's gradient."""
    torch.manual_seed(1)
    model = Language(how).double()
    tokens = torch.randint(6, (5, 3))
    y = torch.randn(5, 3, 6).double()
    output = model(tokens)
    F.mse_loss(output, y).backward()
    gradient = model.embedding.weight.grad.clone()
    model.zero_grad()
    report = run(model, tokens, y)
    layer = "output" if how == "layer" else "embedding.weight"
    assert set(report.layers) == {"mix", layer}
    assert report.coverage.share() == 1.0
    w = model.embedding.weight.detach() if run is measured else None
    if w is not None:
        assert_close(report.matrix(layer, "fact"), -w.T @ gradient / LAMBDA, 1e-9, layer)
        torch.testing.assert_close(report.matrix(layer, "nfa", power=1.0), 3 * w.T @ w)
        g = 2 * (output.detach() - y) / y[0].numel()  # by example
        benfa = torch.einsum("nso,nsp->op", g, g) / len(y)
        enfa = report.matrix(layer, "enfa", power=1.0)
        assert_close(enfa, w.T @ benfa @ w, 1e-9, layer)
    record = report.record(layer, "nfa", 1.0)
    assert record.n_rows == 15
    assert "trivial" in record.premise


class Flipped(nn.Module):
    """A layer of the user's own, with its weight as ``[d_in, d_out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class FlippedRule(LinearRule):
    """Its rule, as in the README."""

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """W is the transpose."""
        return weight.mT[None]


class UsesRules(nn.Module):
    """Weights of layers with a rule of their own, used by functions on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = Flipped()
        self.embedding = nn.Embedding(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stored(x))
        x = torch.tanh(x @ self.stored.weight)  # the layer once more
        x = torch.tanh(F.linear(x, self.stored.weight))  # its other side
        return F.linear(torch.softmax(x @ self.embedding.weight, 1), self.embedding.weight)


@RUNS
def test_layers_with_other_rules(run: Any) -> None:
    """Which side of a weight a layer is, is read off its rule: calls add up, the rest is named."""
    register_layer_rule(Flipped, FlippedRule())
    register_layer_rule(nn.Embedding, EmbeddingRule())
    try:
        torch.manual_seed(0)
        model = UsesRules().double()
        report = run(model, torch.randn(5, 4).double(), torch.randn(5, 4).double())
    finally:
        unregister_layer_rule(Flipped)
        unregister_layer_rule(nn.Embedding)
    found = {layer: report.record(layer, "nfa", 1.0).n_rows for layer in report.layers}
    assert found == {"stored": 10, "embedding": 5, "stored.weight": 5, "embedding.weight": 5}
    assert report.coverage.share() == 1.0


# --------------------------------------------------------------------------- left out by name


UNFOLLOWED: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "einsum": ("einsum", lambda x, w, v: torch.einsum("ni,oi->no", x, w)),
    "bmm": ("bmm", lambda x, w, v: torch.bmm(x[None], w.t()[None])[0]),
    "tensordot": ("tensordot", lambda x, w, v: torch.tensordot(x, w, ([1], [1]))),
    "two parameters": ("matmul", lambda x, w, v: x.sum(1, keepdim=True) * (w @ v).sum(0)),
    "some inputs only": ("linear", lambda x, w, v: F.linear(x[:, :2], w[:, :2])),
    "three axes": ("matmul", lambda x, w, v: (x @ w.view(2, -1, 4).mT).transpose(0, 1).flatten(1)),
}


class Unfollowed(nn.Module):
    """Two loose matrices used by a function, and a head."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.v = nn.Parameter(torch.randn(4, 6))
        self.inner = nn.Linear(4, 6)
        self.use = use
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        loose = self.use(x, self.w, self.v)
        return self.head(torch.tanh(loose + self.use(x, self.inner.weight, self.v)))


@RUNS
@pytest.mark.parametrize("name", UNFOLLOWED)
def test_products_that_are_not_followed_are_named(run: Any, name: str) -> None:
    """A weight in such a product has a reason that names the function; never a wrong number."""
    function, use = UNFOLLOWED[name]
    torch.manual_seed(0)
    model = Unfollowed(use).double()
    report = run(model, torch.randn(7, 4).double(), torch.randn(7, 2).double())
    found = {entry.parameter: entry for entry in report.coverage.parameters}
    expected = f"used in {function}, in a form that is not followed"
    assert (found["w"].measured, found["w"].reason) == ("none", f"Unfollowed: {expected}")
    assert (found["inner.weight"].measured, found["inner.weight"].reason) == (
        "gradient only",
        expected,
    )
    assert found["head.weight"].measured == "all"
    assert "w" not in report.layers


def test_vectors_in_the_shape_of_a_matrix_do_not_count() -> None:
    """A class token or a scale [1, C, 1, 1] is no matrix; a Linear with one output is."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.table = nn.Parameter(torch.randn(5, 4))
            self.single = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.single(torch.tanh(x + self.token + self.table))

    model = Net().double()
    report = measured(model, torch.randn(3, 5, 4).double(), torch.randn(3, 5, 1).double())
    found = {entry.parameter: entry for entry in report.coverage.parameters}
    assert set(found) == {"table", "single.weight"}
    assert "Net" in found["table"].reason
    left_out = measured(
        nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3)).double(),
        torch.randn(3, 4).double(),
        torch.randn(3, 3).double(),
        exclude="0",
    )
    assert [entry.parameter for entry in left_out.coverage.parameters] == ["0.weight", "1.weight"]


def test_frozen_weights_in_a_checkpoint() -> None:
    """There no leaf can be injected: left out with that reason, and the rest is measured."""
    model, x, y = build("self, checkpointed")
    model.requires_grad_(False)
    report = measured(model, x, y)
    for record in report.select("attention.in_proj.q"):
        assert math.isnan(record.cosine)
        assert "frozen, like all below it, in a checkpoint" in record.status
    assert math.isfinite(report.record("head", "enfa", 1.0).cosine)


# --------------------------------------------------------------------------- faults and modes


class DeliberateError(RuntimeError):
    """What the tests break the probe with."""


@pytest.mark.parametrize("name", ["self", "encoder, positions first", "h @ w", "in a checkpoint"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_fault_in_a_functional_call_leaves_nothing_behind(
    name: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mode stays active and no hook on a module; without strict the step is the user's own."""

    def fail(*_: Any) -> Any:
        raise DeliberateError("on purpose")

    monkeypatch.setattr(WeightResolver, "resolve", fail)
    model, x, y = build(name)
    if strict:
        with pytest.raises(DeliberateError):
            loop(model, x, y, strict=True)
    else:
        plain, *_ = build(name)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, weight_decay=LAMBDA)
        F.mse_loss(plain(x), y).backward()
        optimizer.step()
        assert loop(model, x, y, strict=False).faults > 0
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(own, other)
    assert _get_current_function_mode_stack() == []
    model(x)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Counting(TorchFunctionMode):
    """A mode of the user's, who counts calls of F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count and go on."""
        self.calls += func is F.linear
        return func(*args, **(kwargs or {}))


def test_modes_of_the_users_stay_on() -> None:
    """A mode around the loop sees its calls; one entered in forward survives a detach there."""
    model, x, y = build("a layer's weight")
    outer, inner = Counting(), Counting()
    with outer:
        loop(model, x, y)
        assert _get_current_function_mode_stack() == [outer]
    assert outer.calls == 1 + 1  # the functional product and the head
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=LAMBDA)
    probe = FeatureProbe(model, optimizer=optimizer, every=1, window=1)
    seen: list[list[Any]] = []

    def detached(module: nn.Module, args: Any) -> None:
        with inner:
            probe.detach()
            seen.append(_get_current_function_mode_stack())

    model.head.register_forward_pre_hook(detached)
    probe.attach()
    model(x)
    assert seen == [[inner]]
    assert _get_current_function_mode_stack() == []


def test_a_model_that_raises_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is gone when the user's exception arrives, and nothing at the next module."""

    def fail(*_: Any) -> Any:
        raise DeliberateError("on purpose")

    class Raising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            if (x @ self.w).sum() < torch.inf:
                raise ValueError("the user's own")
            return x

    monkeypatch.setattr(WeightResolver, "resolve", fail)
    model, x = Raising(), torch.randn(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = FeatureProbe(model, optimizer=optimizer, every=1, window=1)
    with probe, pytest.raises(ValueError, match="the user's own"):
        model(x)
    assert probe.faults == 1
    assert _get_current_function_mode_stack() == []
    nn.Tanh()(x)
    assert not torch.nn.modules.module._global_forward_hooks


class FrozenEncoder(nn.Module):
    """torch's encoder in evaluation mode and frozen, with padding, under a head that is trained."""

    def __init__(self, stem: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.stem = nn.Linear(8, 8) if stem else nn.Identity()
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 2)
        self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[1:, 3:] = True
        inner = self.encoder(self.stem(x), src_key_padding_mask=padding)
        return self.head(inner.mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("stem", [False, True])
def test_a_frozen_encoder_runs_as_without_the_probe(stem: bool) -> None:
    """torch's fused path, of which padding shows, stays on; below a trained stem all is seen."""
    states, probe = [], None
    for probed in (False, True):
        torch.manual_seed(2)
        model = FrozenEncoder(stem).train()
        x, y = torch.randn(4, 5, 8), torch.randn(4, 2)
        if probed:
            probe = loop(model, x, y)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=LAMBDA)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        states.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    assert probe is not None
    assert probe.report is not None
    assert _get_current_function_mode_stack() == []
    for layer in ("self_attn.in_proj.q", "self_attn.out_proj", "linear1"):
        record = probe.report.record(f"encoder.layers.1.{layer}", "enfa", 1.0)
        assert math.isfinite(record.cosine) == stem
        assert stem or "no gradient reached: frozen" in record.status
    assert math.isfinite(probe.report.record("head", "enfa", 1.0).cosine)


# --------------------------------------------------------------------------- precision, dropout


@pytest.mark.parametrize("name", ["self", "cross, positions first", "encoder", "h @ w", "w @ x"])
def test_under_autocast(name: str) -> None:
    """In bfloat16 the numbers are finite and near those of float32."""
    reports = []
    for enabled in (False, True):
        model, x, y = (part.float() for part in build(name))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=LAMBDA)
        probe = FeatureProbe(
            model, optimizer=optimizer, every=1, window=1, powers=1.0, jacobian="exact",
            keep_matrices=True, strict=True,
        )  # fmt: skip
        with probe:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                output = model(x)
            F.mse_loss(output.float(), y).backward()
            optimizer.step()
        assert probe.report is not None
        reports.append(probe.report)
    plain, cast = reports
    assert cast.layers == plain.layers
    assert cast.coverage.share() == plain.coverage.share()
    for layer in plain.layers:
        for relation in ("nfa", "enfa"):
            expected = plain.matrix(layer, relation, power=1.0)
            found = cast.matrix(layer, relation, power=1.0)
            assert (found - expected).norm() < 0.08 * expected.norm(), (layer, relation)


class WrittenOut(nn.Module):
    """Attention with weights and dropout, of Linears that hooks see."""

    def __init__(self, attends: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)
        source = attends.attention
        with torch.no_grad():
            for place, layer in enumerate((self.q, self.k, self.v)):
                layer.weight.copy_(source.in_proj_weight[4 * place : 4 * place + 4])
                layer.bias.copy_(source.in_proj_bias[4 * place : 4 * place + 4])
            self.out.load_state_dict(source.out_proj.state_dict())
            self.head.load_state_dict(attends.head.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (
            layer(x).view(n, length, 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        scores = (q / 2**0.5) @ k.mT
        weights = F.dropout(torch.softmax(scores, -1).flatten(0, 1), 0.4, training=self.training)
        mixed = (weights.view(n, 2, length, length) @ v).transpose(1, 2).reshape(n, length, 4)
        return self.head(torch.tanh(self.out(mixed)).mean(1))


def test_attention_with_dropout() -> None:
    """With dropout the numbers are those of the same attention written out in layers."""
    model, x, y = build("self with weights")
    model.attention.dropout = 0.4
    other = WrittenOut(model).double()
    reports = []
    for net in (model, other):
        torch.manual_seed(5)
        reports.append(looped(net.train(), x, y))
    names = [*(f"attention.in_proj.{letter}" for letter in "qkv"), "attention.out_proj", "head"]
    for name, twin in zip(names, ("q", "k", "v", "out", "head"), strict=True):
        for relation, power in (("fact", None), ("bfact", None), ("nfa", 1.0), ("enfa", 1.0)):
            found = reports[0].matrix(name, relation, power)
            assert_close(found, reports[1].matrix(twin, relation, power), 1e-9, name)


# --------------------------------------------------------------------------- computed weights


WRAPPERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "old spectral norm": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "structured pruning": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_computed_weights(name: str) -> None:
    """W is what was multiplied by and G its gradient; state is bit-identical without the probe."""
    x, y = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    states = []
    for probed in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Linear(6, 2)).double()
        model[2] = WRAPPERS[name](model[2])
        seen: dict[str, Tensor] = {}

        def kept(m: nn.Module, args: Any, z: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen.update(h=args[0].detach(), z=z.detach(), bias=m.bias.detach().clone())

        model[2].register_forward_hook(kept)
        if probed:
            last, bias = (p.detach().clone() for p in model[3].parameters())
            report = looped(model, x, y)
            w = torch.linalg.lstsq(seen["h"], seen["z"] - seen["bias"]).solution.T
            error = seen["z"] @ last.T + bias - y
            g = (2 / y.numel() * error @ last).T @ seen["h"]
            close = {"rtol": 1e-7, "atol": 1e-8}
            torch.testing.assert_close(report.matrix("2", "nfm"), w.T @ w, **close)
            torch.testing.assert_close(report.matrix("2", "fact"), -w.T @ g, **close)
            assert report.coverage.share() == 1.0
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=LAMBDA)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
