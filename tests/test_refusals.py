"""What is refused or left out, by name, with the reason and the way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.nn.intrinsic import qat as intrinsic_qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, parametrize, prune

from feature_probe import register_layer_rule, unregister_layer_rule
from feature_probe.layers.embeddings import EmbeddingRule
from feature_probe.layers.refusals import refusal, unmeasured_reason


def of_package(path: str, base: type[nn.Module] = nn.Linear) -> type[nn.Module]:
    """A subclass that says it is of another package: ``package.module.Class``."""
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module})


def with_weight(weight: Tensor) -> nn.Linear:
    """A Linear that holds another weight, as loaders of quantised checkpoints leave it."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class AffineQuantizedTensor(Tensor):
    """A wrapped weight of torchao's, by name."""


AffineQuantizedTensor.__module__ = "torchao.dtypes.affine"


def wrapped() -> nn.Linear:
    """A Linear whose floating-point weight is torchao's quantised tensor."""
    return with_weight(torch.randn(4, 4).as_subclass(AffineQuantizedTensor))


def observed() -> nn.Linear:
    """A Linear that fake-quantises its weight by an attribute of its own."""
    layer = nn.Linear(4, 4)
    layer.weight_fake_quant = nn.Identity()
    return layer


def parametrized() -> nn.Linear:
    """A Linear whose weight passes through a fake quantiser by parametrization."""
    layer = nn.Linear(4, 4)
    quantiser = of_package("torchao.quantization.FakeQuantizer", nn.Identity)()
    parametrize.register_parametrization(layer, "weight", quantiser)
    return layer


@pytest.fixture
def qconfig() -> Any:
    """A quantisation-aware configuration of torch's own."""
    return get_default_qat_qconfig("fbgemm")


def test_torchs_own_quantisation_aware_layers(qconfig: Any) -> None:
    """Each of torch.ao's trainable quantised types is refused with its full path."""
    linear = qat.Linear(4, 4, qconfig=qconfig)
    conv = qat.Conv2d(2, 3, 3, qconfig=qconfig)
    fused = intrinsic_qat.ConvBnReLU2d(2, 3, 3, qconfig=qconfig)
    for layer in (linear, conv, fused):
        reason = refusal(layer)
        assert reason is not None
        assert reason.startswith(f"{type(layer).__name__} (torch.ao.nn.")
        assert "exclude=" in reason
        assert "before it is quantised" in reason


@pytest.mark.parametrize(
    "path",
    [
        "bitsandbytes.nn.modules.Linear8bitLt",
        "bitsandbytes.nn.modules.Linear4bit",
        "torchao.quantization.qat.linear.FakeQuantizedLinear",
        "torchao.float8.float8_linear.Float8Linear",
        "brevitas.nn.quant_linear.QuantLinear",
    ],
)
def test_quantising_packages_by_path(path: str) -> None:
    """A layer of such a package is refused, and so is a subclass of it from anywhere."""
    kind = of_package(path)
    derived = of_package("mine.layers.Mine", kind)
    for layer in (kind(4, 4), derived(4, 4)):
        reason = refusal(layer)
        assert reason is not None
        assert type(layer).__name__ in reason
        assert "quantised" in reason


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: with_weight(torch.zeros(4, 4, dtype=torch.int8)), "int8"),
        (lambda: with_weight(torch.zeros(8, 1, dtype=torch.uint8)), "uint8"),
        (lambda: with_weight(torch.zeros(4, 4, dtype=torch.float8_e4m3fn)), "float8_e4m3fn"),
        (lambda: with_weight(torch.zeros(4, 4, dtype=torch.complex64)), "complex64"),
        (wrapped, "AffineQuantizedTensor"),
        (observed, "quantised weight"),
        (parametrized, "quantised weight"),
    ],
)
def test_weights_that_are_no_plain_numbers(make: Callable[[], nn.Module], word: str) -> None:
    """What the weight is, not only the class, decides; the reason names it."""
    reason = refusal(make())
    assert reason is not None
    assert word in reason
    assert "exclude=" in reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.Linear(4, 4, dtype=torch.bfloat16),
        lambda: nn.Linear(4, 4, dtype=torch.half),
        lambda: nn.Conv2d(2, 3, 3),
        lambda: nn.ConvTranspose1d(2, 3, 3),
        lambda: nn.MultiheadAttention(4, 2).out_proj,
        lambda: StdConv2d(2, 3, 3),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", amount=0.5),
        lambda: nn.Linear(4, 4, device="meta"),
        lambda: nn.ReLU(),
        lambda: with_weight(torch.zeros(4, 4)),
    ],
)
def test_ordinary_layers_are_not_refused(make: Callable[[], nn.Module]) -> None:
    """Nothing that can be measured right is refused."""
    assert refusal(make()) is None


def test_what_is_not_measured_is_not_refused() -> None:
    """A quantised module without a rule costs nobody the run: it is left out with a reason."""
    layer = of_package("bitsandbytes.nn.modules.Other", nn.Module)()
    assert refusal(layer) is None
    assert "Other is a quantised layer" in unmeasured_reason(layer)


def test_refusing_evaluates_no_parametrization() -> None:
    """A parametrized weight is not computed: spectral norm's power iteration does not move."""
    layer = parametrizations.spectral_norm(nn.Linear(4, 4))
    before = layer.parametrizations.weight[0]._u.clone()
    assert refusal(layer) is None
    assert torch.equal(layer.parametrizations.weight[0]._u, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ()),
        ({"padding_idx": 0, "sparse": True}, ()),
        ({"scale_grad_by_freq": True}, ("scale_grad_by_freq=False", "not the loss's gradient")),
        ({"max_norm": 1.5}, ("max_norm=1.5", "projected")),
    ],
    ids=str,
)
def test_embeddings(options: dict[str, Any], words: tuple[str, ...]) -> None:
    """Where they are measured, the options that change gradient or weight are refused."""
    layer = nn.Embedding(5, 3, **options)
    assert refusal(layer) is None
    assert "register_layer_rule(nn.Embedding" in unmeasured_reason(layer)
    register_layer_rule(nn.Embedding, EmbeddingRule())
    try:
        reason = refusal(layer)
    finally:
        unregister_layer_rule(nn.Embedding)
    assert (reason is None) is not words
    for word in words:
        assert reason is not None
        assert word in reason
    if words:
        assert "exclude=" in str(reason)
    assert refusal(layer, EmbeddingRule()) == reason


class Own(nn.Module):
    """A module of the user's with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Bilinear(2, 3, 4), ("Bilinear is bilinear in two inputs",)),
        (nn.LSTM(2, 3), ("LSTM is fused", "over time")),
        (nn.GRU(2, 3), ("GRU is fused", "over time")),
        (nn.RNN(2, 3), ("RNN is fused", "over time")),
        (nn.LSTMCell(2, 3), ("LSTMCell is fused",)),
        (nn.Embedding(4, 3), ("Embedding is measured only when asked for", "EmbeddingRule()")),
        (nn.EmbeddingBag(4, 3), ("EmbeddingBag sums",)),
        (nn.LayerNorm((3, 4)), ("LayerNorm multiplies entry by entry",)),
        (nn.RMSNorm((3, 4)), ("RMSNorm multiplies entry by entry",)),
        (nn.ParameterList([torch.zeros(2, 2)]), ("ParameterList only holds parameters",)),
        (Own(), ("Own is no layer type the probe measures", "register_layer_rule")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_reasons_of_what_is_left_out(module: nn.Module, words: tuple[str, ...]) -> None:
    """Each type is named with a reason of its own, and is not refused."""
    assert refusal(module) is None
    reason = unmeasured_reason(module)
    for word in words:
        assert word in reason
    assert reason == reason.strip()
