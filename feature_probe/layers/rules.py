"""Layer rules: how a module's weight, outputs and gradients become canonical arrays.

A rule turns one layer type into matrices on rows: the weight as ``[groups, d_out, d_in]`` and an
output-shaped tensor as rows ``[n, positions, groups, d_out]``. Everything after it is written once.
Rules sit in a registry that users extend for their own layer types::

    class Projection(nn.Module):                        # weight stored as [d_in, d_out]
        def forward(self, x):
            return torch.einsum("...i,io->...o", x, self.kernel)

    class ProjectionRule(TransposedLinearRule):         # z = W h with W = kernelᵀ
        parameter = "kernel"

    register_layer_rule(Projection, ProjectionRule())

A type of a package that need not be installed is named by its path: that is how transformers'
Conv1D has its rule (``"transformers.pytorch_utils.Conv1D"``) without transformers being imported.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe.errors import ConfigurationError
from feature_probe.layers.products import (
    conv_gradient as conv_gradient,  # also for who knows layers
)
from feature_probe.layers.products import linear_gradient as linear_gradient
from feature_probe.layers.transposed import ConvTransposeRule

Shape = tuple[int, int, int]


class LayerRule(Protocol):
    """What the probe must know about a layer type that multiplies its input by a weight matrix."""

    @property
    def parameter(self) -> str:
        """Name of the attribute that holds the weight."""

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight as W with z = W h, shape ``[groups, d_out, d_in]``."""

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """∂L/∂W from the gradient of the stored weight, shape ``[groups, d_out, d_in]``."""

    def rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """An output-shaped tensor as rows, shape ``[n, positions, groups, d_out]``."""

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """∂L/∂W = Σ g hᵀ from the layer's input and ∂L/∂output, ``[groups, d_out, d_in]``."""


class LinearRule:
    """``nn.Linear`` on ``[..., d_in]``; the first axis is the example, the others positions."""

    parameter = "weight"

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """``weight [d_out, d_in]`` as one group."""
        return weight[None]

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient has the weight's layout."""
        return self.matrix(module, gradient)

    def rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """``[n, ..., d_out]`` as ``[n, positions, 1, d_out]``; ``[d_out]`` is one example."""
        examples = output.shape[0] if output.dim() > 1 else 1
        return output.reshape(examples, -1, 1, output.shape[-1])

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """gᵀh over all rows."""
        return linear_gradient(inputs, output_gradient)

    def declared_shape(self, module: Any) -> Shape:
        """The shape of W by what the module says of itself, where W is computed."""
        return 1, module.out_features, module.in_features


class TransposedLinearRule(LinearRule):
    """``z = h @ weight`` with ``weight [d_in, d_out]``, as in transformers' Conv1D: W = weightᵀ."""

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """``weight [d_in, d_out]`` as one group ``[1, d_out, d_in]``."""
        return weight.mT[None]

    def declared_shape(self, module: Any) -> Shape:
        """By the names that Conv1D gives its sizes."""
        return 1, module.nf, module.nx


class ConvRule:
    """``nn.Conv1d/2d/3d`` as a matrix on patches: a row per example and output position.

    W is ``weight.reshape(groups, d_out, -1)``: an input patch is ordered by channel, then by kernel
    offset. A grouped convolution is block-diagonal, one block a group.
    """

    parameter = "weight"

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """``weight [C_out, C_in/groups, *kernel]`` as ``[groups, C_out/groups, d_in]``."""
        groups = _conv(module).groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient has the weight's layout."""
        return self.matrix(module, gradient)

    def rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """``[n, C, *spatial]`` as ``[n, positions, groups, C/groups]``; no n is one example."""
        conv = _conv(module)
        if output.dim() == len(conv.kernel_size) + 1:
            output = output[None]
        channels_last = output.movedim(1, -1)
        return channels_last.reshape(
            output.shape[0], -1, conv.groups, output.shape[1] // conv.groups
        )

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """Σ g hᵀ over patches, by the convolution's own weight-gradient kernel."""
        conv = _conv(module)
        if inputs.dim() == len(conv.kernel_size) + 1:
            inputs, output_gradient = inputs[None], output_gradient[None]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
        weight = conv_gradient(
            padded, output_gradient, conv.weight.shape, conv.stride, conv.dilation, conv.groups
        )
        return self.gradient_matrix(module, weight)

    def declared_shape(self, module: Any) -> Shape:
        """The shape of W by the convolution's channels, groups and kernel."""
        groups, taps = module.groups, math.prod(module.kernel_size)
        return groups, module.out_channels // groups, module.in_channels // groups * taps


def _conv(module: nn.Module) -> Any:
    """The module as the convolution the rule was registered for."""
    return module


#: By class, or by the dotted path of a class whose package need not be installed.
_RULES: dict[type[nn.Module] | str, LayerRule] = {
    nn.Linear: LinearRule(),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvRule()),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeRule()
    ),
    "transformers.pytorch_utils.Conv1D": TransposedLinearRule(),
}


def register_layer_rule(layer_type: type[nn.Module] | str, rule: LayerRule) -> None:
    """Teach the probe a layer type; its subclasses are taken too. Replaces an earlier rule.

    Args:
        layer_type: The module class, or its dotted path ``"package.module.Class"``, so that a
            package need not be imported before it is used. Its ``forward`` must be linear in the
            weight that the rule names (plus a bias), returning one tensor.
        rule: How weight, output and gradients become canonical arrays.

    Raises:
        ConfigurationError: if ``layer_type`` is neither a subclass of ``nn.Module`` nor a dotted
            path, or ``rule`` is no rule (a class instead of an instance, say).
    """
    if not (_is_module_class(layer_type) or _is_dotted_path(layer_type)):
        raise ConfigurationError(
            "layer_type must be an nn.Module class or the dotted path of one "
            f"('package.module.Class'), got {layer_type!r}"
        )
    if isinstance(rule, type) or not all(hasattr(rule, name) for name in _RULE_MEMBERS):
        raise ConfigurationError(
            f"rule must be a LayerRule instance with {', '.join(_RULE_MEMBERS)}, got {rule!r}"
        )
    _RULES[layer_type] = rule


def unregister_layer_rule(layer_type: type[nn.Module] | str) -> None:
    """Forget a rule given to :func:`register_layer_rule`.

    Raises:
        ConfigurationError: if there is none for exactly this type or path.
    """
    if layer_type not in _RULES:
        raise ConfigurationError(f"no rule is registered for {layer_type!r}")
    del _RULES[layer_type]


def known_layer_types() -> tuple[type[nn.Module], ...]:
    """The layer types that have a rule and are registered as classes."""
    return tuple(kind for kind in _RULES if not isinstance(kind, str))


def known_layer_names() -> tuple[str, ...]:
    """The names of all layer types that have a rule: of a class its name, else its path."""
    return tuple(kind if isinstance(kind, str) else kind.__name__ for kind in _RULES)


def class_path(kind: type) -> str:
    """The dotted path a class can be registered by."""
    return f"{kind.__module__}.{kind.__qualname__}"


def find_rule(module: nn.Module) -> tuple[type[nn.Module], LayerRule] | None:
    """The registered type nearest in the module's class hierarchy, and its rule."""
    for kind in type(module).__mro__:
        for key in (kind, class_path(kind)):
            if key in _RULES:
                return kind, _RULES[key]
    return None


def layer_shape(module: nn.Module, rule: LayerRule) -> Shape:
    """``groups, d_out, d_in`` of a layer's W, without computing W.

    A parameter (or the plain tensor that pruning and the older weight norm leave in its place) is
    asked for its shape. A parametrization is not evaluated, as that may change it: there the shape
    is what the module's sizes say, by the rule's ``declared_shape`` if it has one.

    Raises:
        ConfigurationError: if neither is there.
    """
    held = module._parameters.get(rule.parameter)
    weight = vars(module).get(rule.parameter) if held is None else held
    if isinstance(weight, Tensor):
        groups, d_out, d_in = rule.matrix(module, _plain(weight.detach())).shape
        return groups, d_out, d_in
    declared = getattr(rule, "declared_shape", None)
    if declared is not None:
        try:
            groups, d_out, d_in = declared(module)
            return groups, d_out, d_in
        except AttributeError:  # a rule made for another type's attributes
            pass
    raise ConfigurationError(
        f"the weight {rule.parameter!r} of {type(module).__name__} is computed, not held as a "
        "parameter of the module, and its shape cannot be known without computing it; hold it as "
        f"a parameter, or give {type(rule).__name__} a declared_shape(module) that returns "
        "(groups, d_out, d_in)"
    )


_RULE_MEMBERS = ("parameter", "matrix", "gradient_matrix", "rows", "input_gradient_matrix")


def _is_module_class(given: object) -> bool:
    return isinstance(given, type) and issubclass(given, nn.Module)


def _is_dotted_path(given: object) -> bool:
    if not isinstance(given, str):
        return False
    parts = given.split(".")
    return len(parts) > 1 and all(part.isidentifier() or part == "<locals>" for part in parts)


def _plain(weight: Tensor) -> Tensor:
    """A sharded, quantised or otherwise wrapped weight as an empty plain one of its shape."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
