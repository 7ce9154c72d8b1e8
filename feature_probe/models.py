"""The module whose ``forward`` does the work, under the wrappers people train with."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from feature_probe.errors import ConfigurationError


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel, in any nesting.

    Raises:
        ConfigurationError: for what is no module, and for wrappers the probe cannot see through.
    """
    return layers_of_wrapping(model)[-1]


def layers_of_wrapping(model: nn.Module) -> list[nn.Module]:
    """The module and what is inside it, from the outermost wrapper to the module itself.

    Raises:
        ConfigurationError: for what is no module, and for wrappers the probe cannot see through.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = [model]
    while True:
        outer = layers[-1]
        if is_compiled(outer):
            inner = outer._orig_mod
        elif isinstance(outer, DistributedDataParallel):
            inner = outer.module
        elif isinstance(outer, DataParallel):
            raise ConfigurationError(
                "nn.DataParallel runs copies of the model, which the probe does not see; "
                "use DistributedDataParallel, or probe a run on one device"
            )
        else:
            return layers
        if not isinstance(inner, nn.Module):  # torch.compile of something else
            return layers
        layers.append(inner)


def is_compiled(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile(module)`` returned; imports nothing to find out."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def plain_name(name: str) -> str:
    """The name without torch.compile in it: ``blocks.0._orig_mod.fc`` is ``blocks.0.fc``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
