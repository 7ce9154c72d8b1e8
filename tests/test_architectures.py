"""Published architectures in small: every weight matrix measured right, or listed with a reason.

The oracle swaps the functions that multiply by a weight (F.linear, F.conv2d, torch.addmm) for ones
that add a zero leaf to what they return, runs one example at a time and differentiates by the
leaves: K and E of every parameter from their definitions, whatever module made the call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import assert_close, blocks
from timm.models import beit, efficientnet, nfnet, resnet
from timm.models import convnext as timm_convnets
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer as TVSwin
from torchvision.models import VisionTransformer as TVVisionTransformer
from torchvision.models import convnext as tv_convnets
from torchvision.models import resnet as tv_resnets

from feature_probe import FeatureProbe, Report, measure

LAMBDA = 0.05
N = 3


def logits(output: Any) -> Tensor:
    """The tensor in what a model returned."""
    return output if isinstance(output, Tensor) else output.logits


@dataclass(frozen=True)
class Architecture:
    """A small model of a published kind.

    Attributes:
        make: Makes it.
        inputs: A batch of N examples.
        gaps: Matrices that no layer measures, by the end of their name, each with a word of why.
        tied: Layers whose parameter another, unmeasured use shares: G is not Σ g hᵀ of theirs.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    gaps: dict[str, str] = field(default_factory=dict)
    tied: tuple[str, ...] = ()


def images(size: int) -> Callable[[], Tensor]:
    """N random images."""
    return lambda: torch.randn(N, 3, size, size)


def tokens() -> Tensor:
    """N sequences of five tokens."""
    return torch.randint(11, (N, 5))


def tv_vit() -> nn.Module:
    """torchvision's ViT: torch's own packed attention."""
    model = TVVisionTransformer(16, 8, 1, 2, 8, 12, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # zero otherwise, and all gradients with it
    return model


def tv_resnet() -> nn.Module:
    """torchvision's ResNet of basic blocks, the first two stages."""
    model = tv_resnets.ResNet(tv_resnets.BasicBlock, [1, 1, 1, 1], num_classes=3)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 3)
    return model


def tv_convnext() -> nn.Module:
    """torchvision's ConvNeXt."""
    stages = [tv_convnets.CNBlockConfig(6, 8, 1), tv_convnets.CNBlockConfig(8, None, 1)]
    return tv_convnets.ConvNeXt(stages, 0.0, 1.0, num_classes=3)


def tv_swin() -> nn.Module:
    """torchvision's Swin: windows by function, weights of qkv and proj used by F.linear."""
    return TVSwin([2, 2], 8, [2, 1], [2, 2], [2, 2], 1.5, 0.0, 0.0, 0.0, num_classes=3)


def timm_resnet() -> nn.Module:
    """timm's ResNet."""
    return resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(6, 8, 10, 12), stem_width=6
    )


def timm_vit() -> nn.Module:
    """timm's ViT: one Linear for q, k and v."""
    return VisionTransformer(16, 8, num_classes=3, embed_dim=8, depth=2, num_heads=2)


def timm_beit() -> nn.Module:
    """timm's BEiT: the weight of qkv by F.linear, with a bias put together from parts."""
    return beit.Beit(
        16, 8, num_classes=3, embed_dim=8, depth=1, num_heads=2, init_values=0.1,
        use_rel_pos_bias=True,
    )  # fmt: skip


def timm_convnext() -> nn.Module:
    """timm's ConvNeXt as in atto."""
    return timm_convnets.ConvNeXt(
        num_classes=3, depths=(1, 1, 1, 1), dims=(4, 6, 6, 8), conv_mlp=True
    )


def timm_efficientnet() -> nn.Module:
    """timm's EfficientNet: depthwise convolutions, squeeze and excitation."""
    kinds = ["ds_r1_k3_s1_e1_c8_se0.25", "ir_r1_k3_s2_e4_c8_se0.25", "ir_r2_k5_s2_e4_c12_se0.25"]
    return efficientnet.EfficientNet(
        decode_arch_def([[kind] for kind in kinds]), num_classes=3, stem_size=8, num_features=16
    )


def timm_mixer() -> nn.Module:
    """timm's MLP-Mixer: Linears over positions."""
    return MlpMixer(num_classes=3, img_size=16, patch_size=8, num_blocks=1, embed_dim=8)


def timm_swin() -> nn.Module:
    """timm's Swin."""
    return SwinTransformer(
        16, 2, num_classes=3, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4
    )


def timm_normalizer_free() -> nn.Module:
    """timm's NF-ResNet: convolutions that standardise their weight."""
    config = nfnet.NfCfg(
        depths=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_type="3x3", stem_chs=8, ch_div=4,
        num_features=8,
    )  # fmt: skip
    return nfnet.NormFreeNet(config, num_classes=3)


def gpt2() -> nn.Module:
    """transformers' GPT-2: Conv1D layers, an output layer tied to the embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """transformers' BERT with a classifier."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


ARCHITECTURES: dict[str, Architecture] = {
    "torchvision vit": Architecture(tv_vit, images(16), {"pos_embedding": "Encoder"}),
    "torchvision resnet": Architecture(tv_resnet, images(32)),
    "torchvision convnext": Architecture(tv_convnext, images(16)),
    "torchvision swin": Architecture(
        tv_swin, images(16), {"relative_position_bias_table": "ShiftedWindowAttention"}
    ),
    "timm resnet": Architecture(timm_resnet, images(32)),
    "timm vit": Architecture(timm_vit, images(16), {"pos_embed": "VisionTransformer"}),
    "timm beit": Architecture(
        timm_beit, images(16), {"relative_position_bias_table": "Attention", "pos_embed": "Beit"}
    ),
    "timm convnext": Architecture(timm_convnext, images(32)),
    "timm efficientnet": Architecture(timm_efficientnet, images(32)),
    "timm mixer": Architecture(timm_mixer, images(16)),
    "timm swin": Architecture(
        timm_swin, images(16), {"relative_position_bias_table": "WindowAttention"}
    ),
    "timm nfnet": Architecture(timm_normalizer_free, images(32)),
    "gpt2": Architecture(gpt2, tokens, {"wpe.weight": "Embedding"}, tied=("lm_head",)),
    "bert": Architecture(
        bert,
        tokens,
        dict.fromkeys(
            (
                "word_embeddings.weight",
                "position_embeddings.weight",
                "token_type_embeddings.weight",
            ),
            "Embedding",
        ),
    ),
}


def squared(output: Any, target: Tensor) -> Tensor:
    """Mean squared error of whatever holds the logits."""
    return F.mse_loss(logits(output), target)


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in evaluation mode, no parameter at zero, and a batch; all in float64."""
    torch.manual_seed(4)
    case = ARCHITECTURES[name]
    model, x = case.make().double().eval(), case.inputs()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.add_(0.2 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_(std=0.3)
        y = torch.randn_like(logits(model(x)))
    return model, x, y


@functools.cache
def reported(name: str) -> Report:
    """`measure` of the output-side relations: their matrices at power 1 are K and E."""
    return measured(*build(name))


def measured(model: nn.Module, x: Tensor, y: Tensor) -> Report:
    """`measure` on one batch."""
    return measure(
        model, [(x, y)], squared, relations=("fact", "bnfa", "benfa"), powers=1.0,
        weight_decay=LAMBDA, output=logits, progress=False,
    )  # fmt: skip


# --------------------------------------------------------------------------- the oracle


class Leaves:
    """Zero leaves on the output of every product with a parameter, in one run of one example."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Tensor, int, bool]] = []
        self.owner: int | None = None

    def after(self, weight: Tensor, output: Tensor, groups: int, convolved: bool) -> Tensor:
        """The output with a leaf, if the weight is a parameter or made of the layer's own."""
        key = id(weight) if isinstance(weight, nn.Parameter) else self.owner
        if key is None:
            return output
        leaf = torch.zeros_like(output, requires_grad=True)
        self.found.append((key, leaf, groups, convolved))
        return output + leaf

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """The three functions swapped."""
        linear, conv, addmm = F.linear, F.conv2d, torch.addmm

        def watched_linear(input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
            return self.after(weight, linear(input, weight, bias), 1, False)

        def watched_conv(
            input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1,
        ) -> Tensor:  # fmt: skip
            output = conv(input, weight, bias, stride, padding, dilation, groups)
            return self.after(weight, output, groups, True)

        def watched_addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return self.after(b, addmm(bias, a, b), 1, False)

        def owned(module: nn.Module, _: Any) -> None:
            weight = module._parameters.get("weight")
            self.owner = None if weight is None else id(weight)

        handle = nn.modules.module.register_module_forward_pre_hook(owned)
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", watched_linear)
            patch.setattr(F, "conv2d", watched_conv)
            patch.setattr(torch, "addmm", watched_addmm)
            yield
        handle.remove()


def brute_force(
    model: nn.Module, x: Tensor, y: Tensor, monkeypatch: pytest.MonkeyPatch
) -> dict[int, tuple[Tensor, Tensor]]:
    """K and E ``[groups, d_out, d_out]`` of every parameter that multiplies, by its id."""
    sums: dict[tuple[int, bool], Tensor] = {}
    for example, target in zip(x.split(1), y.split(1), strict=True):
        leaves = Leaves()
        with leaves.watching(monkeypatch):
            f = logits(model(example))
        places = [leaf for _, leaf, _, _ in leaves.found]
        scalars = [(squared(f, target), True), *((value, False) for value in f.reshape(-1))]
        for scalar, of_loss in scalars:
            gradients = torch.autograd.grad(
                scalar, places, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            for (i, _, groups, convolved), gradient in zip(leaves.found, gradients, strict=True):
                last = gradient.movedim(1, -1) if convolved else gradient
                rows = last.reshape(-1, groups, last.shape[-1] // groups)
                gram = torch.einsum("pgi,pgj->gij", rows, rows) / len(x)
                sums[i, of_loss] = sums.get((i, of_loss), torch.zeros_like(gram)) + gram
    return {i: (sums[i, False], sums[i, True]) for i, of_loss in sums if of_loss}


# --------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_is_measured_or_named(name: str) -> None:
    """Only what is listed here is not measured, and its reason names the module type."""
    report = reported(name)
    gaps = {gap.parameter: gap for gap in report.coverage.gaps()}
    for parameter, gap in gaps.items():
        words = [w for end, w in ARCHITECTURES[name].gaps.items() if parameter.endswith(end)]
        assert len(words) == 1, f"{parameter}: {gap.reason}"
        assert words[0] in gap.reason
        assert gap.measured == "none"
    for end in ARCHITECTURES[name].gaps:
        assert any(parameter.endswith(end) for parameter in gaps), end


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_jacobians_and_loss_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and E of every layer are those of the definitions, example by example."""
    model, x, y = build(name)
    expected = brute_force(model, x, y, monkeypatch)
    targets = FeatureProbe.targets(model)
    assert len(targets) > 3
    report = reported(name)
    for target in targets:
        stored = target.parameter
        for relation, gram in zip(("bnfa", "benfa"), expected[id(stored)], strict=True):
            part = slice(*target.part) if target.part else slice(None)
            found = blocks(report.matrix(target.name, relation, 1.0))
            where = f"{target.name} {relation}"
            if gram[:, part, part].norm() < 1e-25:  # keys under a softmax of one position
                assert found.norm() < 1e-25, where
            else:
                assert_close(found, gram[:, part, part], 1e-9, where)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients(name: str) -> None:
    """Σ g hᵀ of the uses, formed with every weight frozen, is the gradient that autograd has."""
    model, x, y = build(name)
    frozen = copy.deepcopy(model).requires_grad_(False)
    by_uses = measured(frozen, x, y)
    squared(model(x), y).backward()
    report = reported(name)
    assert by_uses.layers == report.layers
    for target in FeatureProbe.targets(model):
        found = blocks(report.matrix(target.name, "fact"))
        stored = target.parameter
        if stored is not None and stored.grad is not None and not target.intercepted:
            w, g = target.matrix(stored.detach()), target.gradient_matrix(stored.grad)
            assert_close(found, -w.mT @ g / LAMBDA, 1e-9, target.name)
        if target.name not in ARCHITECTURES[name].tied:
            assert_close(blocks(by_uses.matrix(target.name, "fact")), found, 1e-9, target.name)


def test_the_loop_takes_a_model_output() -> None:
    """output= picks the logits out of transformers' ModelOutput in the loop as well."""
    model, x, y = build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=LAMBDA)
    probe = FeatureProbe(
        model, optimizer=optimizer, every=1, window=1, output=lambda out: out.logits,
        relations=("fact", "bnfa", "benfa"), powers=1.0, jacobian="exact", keep_matrices=True,
        strict=True,
    )  # fmt: skip
    with probe:
        squared(model(x), y).backward()
        optimizer.step()
    assert probe.report is not None
    expected = reported("bert")
    for layer in expected.layers:
        for relation in ("bnfa", "benfa"):
            found = probe.report.matrix(layer, relation, 1.0)
            assert_close(found, expected.matrix(layer, relation, 1.0), 1e-9, layer)
