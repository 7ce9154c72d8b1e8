"""After the probe is gone nothing of it is left: no hook, no tensor, no reference to the model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from feature_probe import FeatureProbe

#: Torch's hooks that are called for every module of the process.
GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_hooks",
    "_global_module_registration_hooks",
)


class Net(nn.Module):
    """Layers with and without a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.bare = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two outputs of three positions."""
        h = self.body(x)
        h, _ = self.attention(h, h, h)
        return (h @ self.bare).mean(1)


def global_hooks() -> int:
    """How many hooks torch calls for every module."""
    return sum(len(getattr(torch_module, name)) for name in GLOBAL_HOOKS)


def hooks_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many hooks are on the modules, parameters and optimizer."""
    count = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    for part in model.modules():
        count += len(part._forward_hooks) + len(part._forward_pre_hooks)
        count += len(part._backward_hooks) + len(part._backward_pre_hooks)
    for parameter in model.parameters():
        count += len(parameter._backward_hooks or ())
        count += len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    return count


def live_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that are alive, gradients apart: those are only seen once asked for."""
    optimizer.zero_grad()
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, nn.Parameter)
    }
    return sum(storages.values())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of training."""
    optimizer.zero_grad()
    F.mse_loss(model(torch.randn(4, 3, 6)), torch.randn(4, 2)).backward()
    optimizer.step()


def attached(every: int = 3) -> tuple[Net, torch.optim.Optimizer, FeatureProbe]:
    """A model in training, with a probe in mid-window."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probe = FeatureProbe(model, optimizer=optimizer, every=every, window=2, strict=True)
    probe.attach()
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer, probe


def test_no_hook_is_left_after_detach() -> None:
    """On modules, parameters, the optimizer and torch itself, also from mid-window."""
    before = global_hooks()
    model, optimizer, probe = attached()
    assert hooks_on(model, optimizer) > 0 < global_hooks() - before
    probe.detach()
    assert hooks_on(model, optimizer) == 0
    assert global_hooks() == before
    step(model, optimizer)


def test_no_memory_is_left_after_detach() -> None:
    """The tensors that are alive are those of a run that never had a probe."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step(model, optimizer)
    before = live_bytes(optimizer)
    with FeatureProbe(model, optimizer=optimizer, every=3, window=2) as probe:
        for _ in range(3):
            step(model, optimizer)
        assert live_bytes(optimizer) > before
    del probe
    assert live_bytes(optimizer) <= before


def detach(probe: FeatureProbe) -> None:
    """The probe is detached after the user let go of the model."""
    probe.detach()


def forget(probe: FeatureProbe) -> None:
    """The probe is never detached."""


@pytest.mark.parametrize("end", [detach, forget])
def test_the_model_may_be_dropped_first(end: Callable[[FeatureProbe], None]) -> None:
    """Then the probe, detached or just forgotten: neither keeps the other alive, nor a hook."""
    before = global_hooks()
    model, optimizer, probe = attached()
    gone = [weakref.ref(thing) for thing in (model, model.bare, optimizer, probe)]
    del model, optimizer
    end(probe)
    del probe
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert global_hooks() == before
