"""What cannot be measured right, by name: layers refused, and layers left out, each with why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feature_probe.layers.rules import LayerRule, class_path, find_rule

#: Packages whose layers compute with a quantised or fake-quantised weight.
_QUANTISING = (
    "torch.ao.nn.qat.",
    "torch.ao.nn.intrinsic.qat.",
    "torch.ao.nn.quantized.",
    "torch.ao.quantization.",
    "torchao.",
    "bitsandbytes.",
    "brevitas.",
    "pytorch_quantization.",
    "modelopt.torch.quantization.",
)

#: Attributes by which a layer of any other package shows that it fake-quantises its weight.
_FAKE_QUANTISERS = ("weight_fake_quant", "weight_fake_quantizer", "weight_quantizer")

#: The way round a quantised layer.
_WAY_ROUND = (
    "leave it out with exclude= (a glob of names, or the class for all of its kind), or measure "
    "the model before it is quantised"
)

_FUSED = "all its products run in one kernel, where no gradient of a pre-activation is seen"
_ELEMENTWISE = "multiplies entry by entry; its weight is no matrix, whatever its shape"

#: Why the layer types of torch.nn that hold a weight of two axes or more have no rule.
_UNMEASURED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (
        (nn.Bilinear,),
        "is bilinear in two inputs: it has no matrix W with z = W h",
    ),
    ((nn.RNNBase,), f"is fused over time: {_FUSED}"),
    ((nn.RNNCellBase,), f"is fused: {_FUSED}"),
    (
        (nn.Embedding,),
        "is measured only when asked for: register_layer_rule(nn.Embedding, EmbeddingRule())",
    ),
    (
        (nn.EmbeddingBag,),
        "sums the embeddings of a bag in one kernel (an nn.Embedding and a sum can be measured)",
    ),
    ((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU), _ELEMENTWISE),
    (
        (nn.ParameterList, nn.ParameterDict),
        "only holds parameters; no product with them was recognised",
    ),
)


def refusal(module: nn.Module, rule: LayerRule | None = None) -> str | None:
    """Why a layer that has a rule must not be measured, and the way round; None if it may be.

    Numbers would come out, but not of the relation's definitions: a quantised weight has no
    gradient of its own, a fake-quantised one gets that of another function than the forward.

    Args:
        module: Any module; one without a rule is never refused, as it is not measured anyway.
        rule: The rule it is measured by; the registered one if None.
    """
    found = find_rule(module)
    if rule is None and found is not None:
        rule = found[1]
    if rule is None:
        return None
    name = type(module).__name__
    for reason in (_quantised(module, rule.parameter), _embedding_options(module)):
        if reason is not None:
            return f"{name} {reason}"
    return None


def unmeasured_reason(module: nn.Module) -> str:
    """Why the weights that a module holds are not measured, though it holds matrices.

    Args:
        module: The owner of a parameter with two axes or more, without a rule.
    """
    name = type(module).__name__
    for types, reason in _UNMEASURED:
        if isinstance(module, types):
            return f"{name} {reason}"
    if _is_quantising(module):
        return f"{name} is a quantised layer: {_WAY_ROUND}"
    return (
        f"{name} is no layer type the probe measures, and no product with this parameter was "
        "recognised: a table that is added or looked up has none; a layer type is taught by "
        "register_layer_rule"
    )


def _quantised(module: nn.Module, parameter: str) -> str | None:
    if _is_quantising(module):
        return (
            f"({class_path(type(module))}) trains or holds a quantised weight, so its gradient is "
            f"not that of what it computes; {_WAY_ROUND}"
        )
    # a computed weight is not read here: reading it can change the module
    held = module._parameters.get(parameter)
    weight = vars(module).get(parameter) if held is None else held
    if not isinstance(weight, Tensor):
        return None
    if type(weight).__module__.startswith(_QUANTISING):
        return f"holds its {parameter} as a quantised {type(weight).__name__}; {_WAY_ROUND}"
    if not weight.is_floating_point() or weight.dtype.itemsize < torch.half.itemsize:
        return (
            f"holds its {parameter} as {_dtype(weight)}; only real floating-point weights of 16 "
            f"bits or more are measured; {_WAY_ROUND}"
        )
    return None


def _is_quantising(module: nn.Module) -> bool:
    """Whether it, or what its weights pass through, is of a quantising package."""
    lists = getattr(module, "parametrizations", None)
    inside = lists.modules() if isinstance(lists, nn.Module) else ()
    for part in (module, *inside):
        if any(class_path(kind).startswith(_QUANTISING) for kind in type(part).__mro__):
            return True
    return any(getattr(module, name, None) is not None for name in _FAKE_QUANTISERS)


def _embedding_options(module: nn.Module) -> str | None:
    if not isinstance(module, nn.Embedding):
        return None
    if module.scale_grad_by_freq:
        return (
            "with scale_grad_by_freq=True divides its gradient by how often an index occurs, so it "
            "is not the loss's gradient; exclude= it, or set scale_grad_by_freq=False"
        )
    if module.max_norm is not None:
        return (
            f"with max_norm={module.max_norm:g} shortens its vectors inside forward, so its weight "
            "is projected and does not come to rest where gradient and decay balance; exclude= "
            "it, or set max_norm=None"
        )
    return None


def _dtype(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
