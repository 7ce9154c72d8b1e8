"""Layer rules and layers that multiply by something else than their weight attribute."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import timm.layers
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from feature_probe import (
    ConfigurationError,
    FeatureProbe,
    LinearRule,
    Report,
    measure,
    register_layer_rule,
    unregister_layer_rule,
)
from feature_probe.layers.rules import find_rule, known_layer_types

LAMBDA = 0.05
RELATIONS = ("fact", "bfact", "nfa", "enfa", "bnfa", "benfa")
MATRICES = ("nfm", "bnfm", *RELATIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance, mean over examples."""
    return (output - target).square().sum(1).mean() / 2


def run_measure(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Report:
    """Every relation at s = 1, two uneven batches, λ given for all layers."""
    settings: dict[str, Any] = {
        "relations": RELATIONS,
        "powers": 1.0,
        "weight_decay": LAMBDA,
        "progress": False,
        **options,
    }
    return measure(model, [(x[:2], y[:2]), (x[2:], y[2:])], squared_error, **settings)


# --------------------------------------------------------------------------- registering


class TransposedLinear(nn.Module):
    """The example of the documentation: weight stored as [d_in, d_out]."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TransposedLinearRule(LinearRule):
    """The rule of the documentation."""

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT[None]


@pytest.fixture
def registered() -> Iterator[None]:
    """The documented registration, undone afterwards."""
    register_layer_rule(TransposedLinear, TransposedLinearRule())
    try:
        yield
    finally:
        unregister_layer_rule(TransposedLinear)


def transposed_pair() -> tuple[nn.Sequential, nn.Sequential]:
    """The same network with nn.Linear and with TransposedLinear in the middle."""
    torch.manual_seed(1)
    plain = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    middle = TransposedLinear(5, 6)
    with torch.no_grad():
        middle.weight.copy_(plain[2].weight.T)
    first, last = copy.deepcopy(plain[0]), copy.deepcopy(plain[4])
    return plain, nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("registered")
def test_a_registered_layer_is_measured_like_linear(frozen: bool) -> None:
    """The documented rule gives the matrices and scores of nn.Linear, frozen weights included."""
    plain, transposed = transposed_pair()
    x, y = normal(5, 4), normal(5, 2, seed=1)
    for model in (plain, transposed):
        model[2].weight.requires_grad_(not frozen)
    expected, got = (run_measure(model, x, y) for model in (plain, transposed))
    assert got.layers == expected.layers == ("0", "2", "4")
    for layer in got.layers:
        for kind in MATRICES:
            torch.testing.assert_close(got.matrix(layer, kind), expected.matrix(layer, kind))
    for one, two in zip(got.records, expected.records, strict=True):
        assert one.cosine == pytest.approx(two.cosine, abs=1e-12)
        assert one.residual == pytest.approx(two.residual, rel=1e-10, nan_ok=True)
        assert (one.status, one.premise) == (two.status, two.premise)


@pytest.mark.usefixtures("registered")
def test_a_registered_layer_in_the_loop() -> None:
    """In a training loop, too, it is measured like nn.Linear."""
    reports = []
    for model in transposed_pair():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
        probe = FeatureProbe(
            model, optimizer=optimizer, every=1, window=1, jacobian="exact", strict=True
        )
        with probe:
            squared_error(model(normal(5, 4)), normal(5, 2, seed=1)).backward()
            optimizer.step()
        reports.append(probe.report)
    plain, transposed = reports
    assert plain is not None
    assert transposed is not None
    for one, two in zip(transposed.records, plain.records, strict=True):
        assert (one.layer, one.label) == (two.layer, two.label)
        assert one.cosine == pytest.approx(two.cosine, abs=1e-10)


@pytest.mark.usefixtures("registered")
def test_an_instance_of_a_subclass_has_the_rule_of_its_parent() -> None:
    """A plain subclass is taken too; a subclass registered for itself keeps its own rule."""

    class Sub(TransposedLinear):
        """Nothing changed."""

    assert find_rule(Sub(2, 3)) == find_rule(TransposedLinear(2, 3))
    own = TransposedLinearRule()
    register_layer_rule(Sub, own)
    try:
        assert find_rule(Sub(2, 3)) == (Sub, own)
        assert find_rule(TransposedLinear(2, 3)) != (Sub, own)
    finally:
        unregister_layer_rule(Sub)


class SummedByHand(nn.Module):
    """A transposed linear layer without any product that could be recognised."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., None] * self.weight).sum(-2)


def test_without_its_rule_the_layer_is_not_measured() -> None:
    """Registering is undone by unregistering: the layer is then a gap in the coverage."""
    plain, model = transposed_pair()
    model[2] = SummedByHand(model[2].weight)
    x, y = normal(5, 4), normal(5, 2, seed=1)
    register_layer_rule(SummedByHand, TransposedLinearRule())
    assert SummedByHand in known_layer_types()
    report, expected = run_measure(model, x, y), run_measure(plain, x, y)
    assert report.layers == ("0", "2", "4")
    for kind in MATRICES:
        torch.testing.assert_close(report.matrix("2", kind), expected.matrix("2", kind))
    unregister_layer_rule(SummedByHand)
    assert SummedByHand not in known_layer_types()
    report = run_measure(model, x, y)
    assert report.layers == ("0", "4")
    (gap,) = report.coverage.gaps()
    assert gap.parameter == "2.weight"
    assert "SummedByHand" in gap.reason


def test_unregistering_what_is_not_registered() -> None:
    """A type without a rule of exactly its own is refused, subclasses of known types included."""
    with pytest.raises(ConfigurationError, match=r"no rule is registered for .*TransposedLinear"):
        unregister_layer_rule(TransposedLinear)
    with pytest.raises(ConfigurationError, match="no rule is registered"):
        unregister_layer_rule(StdConv2d)


@pytest.mark.parametrize("given", [TransposedLinear(2, 2), int, "Linear", None], ids=repr)
def test_registering_what_is_no_module_class(given: Any) -> None:
    """An instance, another class or a name is refused, with what was given."""
    with pytest.raises(ConfigurationError, match=r"must be an nn\.Module class"):
        register_layer_rule(given, TransposedLinearRule())


# --------------------------------------------------------------------------- effective weights


def one_hot_weight(layer: nn.Module, like: Tensor) -> Tensor:
    """The matrix from patches to outputs, read off by running the layer on one-hot inputs.

    The input has the size of the kernel and no padding reaches it, so the layer has one position.
    """
    shape = like.shape[1:]
    count = math.prod(shape)
    basis = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    with torch.no_grad():
        zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
        return (layer(basis) - zero).reshape(count, -1).T


def jacobian_square(model: nn.Sequential, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """K and its J by explicit Jacobians of what follows the layer, one example at a time.

    Returns:
        K ``[d_out, d_out]``, mean over examples, and J as ``[n, c, d_out, positions]``.
    """
    tail = model[index + 1 :]
    jacobians = []
    for example in x:
        z = model[: index + 1](example[None]).detach()
        jacobian = torch.autograd.functional.jacobian(lambda z: tail(z)[0], z)
        jacobians.append(jacobian.reshape(len(jacobian), z.shape[1], -1))
    stacked = torch.stack(jacobians)
    return torch.einsum("ncip,ncjp->ij", stacked, stacked) / len(x), stacked


def std_conv(kind: Callable[..., nn.Module]) -> nn.Sequential:
    """A standardised convolution on 3 × 3 patches, one of them its only kernel position."""
    torch.manual_seed(2)
    return nn.Sequential(
        kind(2, 4, 3, padding=0, bias=True), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)
    ).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_a_weight_standardised_convolution(kind: Callable[..., nn.Module], training: bool) -> None:
    """W is the standardised weight that the layer multiplies by; K is of explicit Jacobians."""
    model = std_conv(kind).train(training)
    x, y = normal(5, 2, 4, 5), normal(5, 2, seed=1)
    model(x)
    weight = one_hot_weight(model[0], x[:, :, :3, :3])
    assert float((weight - model[0].weight.detach().flatten(1)).norm()) > 0.1
    report = run_measure(model, x, y, eval_mode=False)
    k, jacobian = jacobian_square(model, x, 0)
    torch.testing.assert_close(report.matrix("0", "nfm"), weight.T @ weight)
    torch.testing.assert_close(report.matrix("0", "bnfm"), weight @ weight.T)
    torch.testing.assert_close(report.matrix("0", "bnfa"), k)
    torch.testing.assert_close(report.matrix("0", "nfa"), weight.T @ k @ weight)
    # gᵀh by hand: g = (f − y)ᵀJ, h the patches
    g = torch.einsum("nc,ncip->nip", (model(x) - y).detach(), jacobian)
    patches = F.unfold(x, 3)
    gradient = torch.einsum("nip,njp->ij", g, patches) / len(x)
    torch.testing.assert_close(report.matrix("0", "fact"), -weight.T @ gradient / LAMBDA)
    torch.testing.assert_close(report.matrix("0", "bfact"), -weight @ gradient.T / LAMBDA)
    record = report.record("0", "fact")
    assert record.status == "ok"
    assert "computed" in record.premise
    assert report.record("3", "fact").premise == ""


def test_a_standardised_convolution_with_groups_and_stride() -> None:
    """Groups, stride, dilation and padding of the functional call are followed."""
    torch.manual_seed(2)
    layer = StdConv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=True)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x, y = normal(3, 4, 7, 6), normal(3, 2, seed=1)
    model(x)
    report = run_measure(model, x, y)
    # the same network with the standardised weight as a plain parameter
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2).double()
    blocks = [
        one_hot_weight(plain_slice(layer, block), normal(1, 2, 3, 3)).reshape(3, 2, 3, 3)
        for block in range(2)
    ]
    with torch.no_grad():
        plain.weight.copy_(torch.cat(blocks))
        plain.bias.copy_(layer.bias)
    expected = run_measure(nn.Sequential(plain, *model[1:]), x, y)
    for kind in MATRICES:
        torch.testing.assert_close(report.matrix("0", kind), expected.matrix("0", kind))


def plain_slice(layer: nn.Module, block: int) -> Callable[[Tensor], Tensor]:
    """One group of a convolution as a function of its own channels on one patch."""

    def run(patch: Tensor) -> Tensor:
        # a dilated kernel on a 5 × 5 field, one patch entry at each of its taps
        field = patch.new_zeros(len(patch), 4, 7, 7)
        field[:, 2 * block : 2 * block + 2, 1:6:2, 1:6:2] = patch
        with torch.no_grad():
            # stride 2, padding 1: output position 1 has its first tap at index 1
            return layer(field)[:, 3 * block : 3 * block + 3, 1, 1]

    return run


def test_timm_conv2d_same_pads_like_tensorflow() -> None:
    """Conv2dSame pads unevenly before F.conv2d: it equals an explicit pad before nn.Conv2d."""
    torch.manual_seed(2)
    layer = timm.layers.Conv2dSame(2, 4, 3, stride=2).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x, y = normal(5, 2, 6, 6), normal(5, 2, seed=1)
    model(x)
    plain = nn.Conv2d(2, 4, 3, stride=2).double()
    plain.load_state_dict(layer.state_dict())
    padded = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), plain, *model[1:])
    torch.testing.assert_close(padded(x), model(x))
    for frozen in (False, True):
        layer.weight.requires_grad_(not frozen)
        plain.weight.requires_grad_(not frozen)
        report, expected = run_measure(model, x, y), run_measure(padded, x, y)
        for kind in MATRICES:
            torch.testing.assert_close(report.matrix("0", kind), expected.matrix("1", kind))
        assert report.record("0", "fact").premise == expected.record("1", "fact").premise


class DoubledConv(nn.Conv2d):
    """A subclass whose effective weight is twice its parameter."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (2, 4), "padding": "same"},
        {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 1)},
        {"kernel_size": (3, 2), "padding": (0, 2), "stride": (1, 2)},
        {"kernel_size": (2, 3), "padding": (2, 1), "padding_mode": "circular"},
        {"kernel_size": 2, "padding": "valid", "groups": 2},
        {"kernel_size": (2, 4), "padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_geometry_of_an_intercepted_convolution(options: dict[str, Any]) -> None:
    """gᵀh follows padding, stride and dilation of the call: it is G of a plain convolution."""
    torch.manual_seed(2)
    layer, plain = DoubledConv(2, 4, **options).double(), nn.Conv2d(2, 4, **options).double()
    with torch.no_grad():
        plain.weight.copy_(2 * layer.weight)
        plain.bias.copy_(layer.bias)
    x = normal(5, 2, 4, 5)
    tail = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(plain(x)[0].numel(), 2)).double()
    y = normal(5, 2, seed=1)
    report = run_measure(nn.Sequential(layer, *tail), x, y)
    expected = run_measure(nn.Sequential(plain, *tail), x, y)
    for kind in MATRICES:
        torch.testing.assert_close(report.matrix("0", kind), expected.matrix("0", kind))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_the_decay_of_a_standardised_weight_is_not_known(kind: Callable[..., nn.Module]) -> None:
    """The optimizer's λ acts on the parameter, not on the standardised weight."""
    model = std_conv(kind)
    x, y = normal(5, 2, 4, 5), normal(5, 2, seed=1)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
    report = run_measure(model, x, y, weight_decay=None, optimizer=optimizer)
    assert math.isnan(report.record("0", "fact").weight_decay)
    assert math.isnan(report.record("0", "fact").residual)
    assert report.record("3", "fact").weight_decay == LAMBDA


class NamedLinear(nn.Linear):
    """A subclass that changes nothing of the computation."""

    def extra_repr(self) -> str:
        return "named"


def test_a_plain_subclass_is_its_parent() -> None:
    """A subclass without its own forward is measured like its parent, by param.grad."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    named = nn.Sequential(NamedLinear(4, 5), nn.Tanh(), NamedLinear(5, 2)).double()
    named.load_state_dict(model.state_dict())
    assert not any(target.intercepted for target in FeatureProbe.targets(named))
    x, y = normal(5, 4), normal(5, 2, seed=1)
    report, expected = run_measure(named, x, y), run_measure(model, x, y)
    assert [r.to_dict() for r in report.records] == [r.to_dict() for r in expected.records]


class ScaledInput(nn.Linear):
    """A subclass that scales its input: the weight is the parameter, h is not the argument."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(3 * x, self.weight, self.bias)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_subclass_that_changes_its_input(frozen: bool) -> None:
    """G is of the input that the weight multiplied, whether by param.grad or by gᵀh."""
    torch.manual_seed(2)
    model = nn.Sequential(ScaledInput(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model[0].weight.requires_grad_(not frozen)
    x, y = normal(5, 4), normal(5, 2, seed=1)
    report = run_measure(model, x, y)
    weight = model[0].weight.detach()
    _, jacobian = jacobian_square(model, x, 0)
    g = torch.einsum("nc,ncip->ni", (model(x) - y).detach(), jacobian)
    gradient = g.T @ (3 * x) / len(x)
    torch.testing.assert_close(report.matrix("0", "fact"), -weight.T @ gradient / LAMBDA)


# --------------------------------------------------------------------------- parametrized weights


class Doubled(nn.Module):
    """A parametrization without state."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def weight_normed(layer: nn.Linear) -> nn.Linear:
    """torch's weight_norm."""
    return parametrizations.weight_norm(layer)


def spectrally_normed(layer: nn.Linear) -> nn.Linear:
    """torch's spectral_norm, which moves its buffers with every forward pass in training mode."""
    return parametrizations.spectral_norm(layer)


def doubled(layer: nn.Linear) -> nn.Linear:
    """A parametrization of one's own."""
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def pruned(layer: nn.Linear) -> nn.Linear:
    """torch's pruning: weight is a plain attribute, computed in a forward pre-hook."""
    return prune.random_unstructured(layer, "weight", amount=0.4)


def legacy_weight_normed(layer: nn.Linear) -> nn.Linear:
    """The older weight_norm, by forward pre-hook."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


WRAPPERS = {
    "weight norm": weight_normed,
    "spectral norm": spectrally_normed,
    "own parametrization": doubled,
    "pruning": pruned,
    "old weight norm": legacy_weight_normed,
}


def wrapped_net(name: str) -> nn.Sequential:
    """Three Linears, the one in the middle with a computed weight."""
    torch.manual_seed(3)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)]
    model = nn.Sequential(*layers).double()
    model[2] = WRAPPERS[name](model[2])
    return model


def train_once(
    model: nn.Sequential, x: Tensor, y: Tensor, *, probed: bool, steps: int = 1
) -> tuple[FeatureProbe | None, Tensor, Tensor]:
    """Steps of SGD, with or without the probe.

    Returns:
        The probe, and of the last step: the weight that the middle layer multiplied by (read off
        its forward by hand-made linearity) and the gradient gᵀh of it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=LAMBDA)
    probe = None
    if probed:
        probe = FeatureProbe(
            model, optimizer=optimizer, every=1, window=1, jacobian="exact", weight_decay=LAMBDA,
            relations=RELATIONS, powers=1.0, keep_matrices=True, strict=True,
        )  # fmt: skip
    weight = gradient = torch.empty(0)
    with probe or nullcontext():
        for _ in range(steps):
            optimizer.zero_grad()
            h = model[:2](x)
            h.retain_grad()
            seen: dict[str, Tensor] = {}
            handles = [
                model[2].register_forward_hook(lambda m, a, z, seen=seen: seen.update(h=a[0], z=z))
            ]
            output = model(x)
            handles[0].remove()
            seen["z"].retain_grad()
            squared_error(output, y).backward()
            g = seen["z"].grad
            assert g is not None
            gradient = g.T @ seen["h"].detach()
            bias = model[2].bias.detach()
            rows = seen["h"].detach()
            # 5 inputs, 8 examples: the weight is the only solution of z − b = W h
            weight = torch.linalg.lstsq(rows, seen["z"].detach() - bias).solution.T
            optimizer.step()
    return probe, weight, gradient


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_computed_weight_in_the_loop(name: str) -> None:
    """W is what the layer multiplied by at that step and G is gᵀh of it, by hand."""
    x, y = normal(8, 4), normal(8, 2, seed=1)
    model = wrapped_net(name)
    probe, weight, gradient = train_once(model, x, y, probed=True, steps=3)
    assert probe is not None
    assert probe.faults == 0
    report = probe.report
    assert report is not None
    assert report.step == 2
    close = {"rtol": 1e-8, "atol": 1e-9}  # least squares stands behind the expected weight
    torch.testing.assert_close(report.matrix("2", "nfm"), weight.T @ weight, **close)
    torch.testing.assert_close(report.matrix("2", "fact"), -weight.T @ gradient / LAMBDA, **close)
    torch.testing.assert_close(report.matrix("2", "bfact"), -weight @ gradient.T / LAMBDA, **close)
    assert "computed" in report.record("2", "fact").premise
    assert report.coverage.share() == 1.0


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_computed_weight_trains_as_without_the_probe(name: str) -> None:
    """Parameters and buffers, those of the power iteration included, are bit-identical."""
    x, y = normal(8, 4), normal(8, 2, seed=1)
    states = []
    for probed in (False, True):
        model = wrapped_net(name)
        train_once(model, x, y, probed=probed, steps=3)
        states.append(model.state_dict())
    plain, probed_state = states
    assert plain.keys() == probed_state.keys()
    for key, value in plain.items():
        assert torch.equal(value, probed_state[key]), key
    fresh = wrapped_net(name).state_dict()
    moved = [key for key, value in plain.items() if not torch.equal(value, fresh[key])]
    assert any(key.startswith("2.") for key in moved)
    if name == "spectral norm":
        assert any("_u" in key for key in moved)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_computed_weight_at_frozen_weights(name: str) -> None:
    """`measure` gives what the same network with the weight written out as a parameter gives."""
    x, y = normal(8, 4), normal(8, 2, seed=1)
    model = wrapped_net(name).eval()
    plain = nn.Linear(5, 6).double()
    with torch.no_grad():
        model(x)  # the hook-based wrappers compute the weight there
        plain.weight.copy_(model[2].weight)
        plain.bias.copy_(model[2].bias)
    expected = run_measure(nn.Sequential(*model[:2], plain, *model[3:]), x, y)
    report = run_measure(model, x, y)
    for layer in ("0", "2", "4"):
        for kind in MATRICES:
            torch.testing.assert_close(report.matrix(layer, kind), expected.matrix(layer, kind))


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_optimizers_decay_is_not_that_of_a_computed_weight(name: str) -> None:
    """λ of the groups acts on other parameters: the direction is scored, the residual is NaN."""
    x, y = normal(8, 4), normal(8, 2, seed=1)
    model = wrapped_net(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
    report = run_measure(model, x, y, weight_decay=None, optimizer=optimizer)
    record = report.record("2", "fact")
    assert math.isfinite(record.cosine)
    assert math.isnan(record.residual)
    assert math.isnan(record.weight_decay)
    assert "weight decay not known" in record.status
    assert report.record("0", "fact").weight_decay == LAMBDA


# --------------------------------------------------------------------------- what cannot be read


class Twice(nn.Linear):
    """A subclass with two products in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight, self.bias)


class ByHand(nn.Linear):
    """A subclass without any functional call."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(("kind", "calls"), [(Twice, 2), (ByHand, 0)])
def test_a_subclass_that_cannot_be_read_is_reported_by_name(
    kind: type[nn.Linear], calls: int
) -> None:
    """Two products in one forward, or none: the reason names the class, other layers are right."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), kind(4, 4), nn.Linear(4, 2)).double()
    x, y = normal(6, 3), normal(6, 2, seed=1)
    report = run_measure(model, x, y)
    for record in report.select(layer="1"):
        if record.relation in ("nfa", "enfa", "bnfa", "benfa"):
            assert math.isnan(record.cosine)
            assert kind.__name__ in record.status
            assert f"{calls} linear or convolution calls" in record.status
    for record in report.select(layer="0"):
        assert math.isfinite(record.cosine), record
    (gap,) = [entry for entry in report.coverage.parameters if entry.layer == "1"]
    assert gap.measured != "all"
    assert kind.__name__ in gap.reason


@pytest.mark.parametrize("kind", [Twice, ByHand])
def test_a_subclass_that_cannot_be_read_in_the_loop(kind: type[nn.Linear]) -> None:
    """In the loop there is no fault and training goes on; the other layers are measured."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), kind(4, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
    probe = FeatureProbe(model, optimizer=optimizer, every=1, window=1, strict=True)
    with probe:
        squared_error(model(normal(6, 3)), normal(6, 2, seed=1)).backward()
        optimizer.step()
    assert probe.faults == 0
    assert probe.report is not None
    assert kind.__name__ in probe.report.record("1", "nfa", 1.0).status
    assert math.isfinite(probe.report.record("0", "nfa", 1.0).cosine)
