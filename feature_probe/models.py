"""The module whose ``forward`` does the work, under the wrappers people train with."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from feature_probe.errors import ConfigurationError


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel wrapper; the model itself otherwise.

    Raises:
        ConfigurationError: for what is no module, and for wrappers the probe cannot see through.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    if isinstance(model, DataParallel):
        raise ConfigurationError(
            "nn.DataParallel runs copies of the model, which the probe does not see; "
            "use DistributedDataParallel, or probe a run on one device"
        )
    if type(model).__name__ == "OptimizedModule":
        raise ConfigurationError(
            "a torch.compile'd model runs without Python hooks; probe an uncompiled run of it"
        )
    return model
