"""Hugging Face Accelerate: a probe for what ``accelerator.prepare`` returned.

::

    from feature_probe.integrations.accelerate import attach

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    probe = attach(accelerator, model, optimizer, log_dir="runs/mlp", every=100)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_fn(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    probe.detach()

This module does not import accelerate: the Accelerator brings all that is asked of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from feature_probe import ConfigurationError, FeatureProbe

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    checkpoint: bool = True,
    **options: Any,
) -> FeatureProbe:
    """Attach a probe to a prepared model.

    Call it in every process: each measures its own data, and the main process writes. Steps are
    those the optimizer really takes: micro-batches of ``accumulate`` and steps that mixed precision
    skips are none.

    Args:
        accelerator: The Accelerator.
        model: What ``accelerator.prepare`` made of the model.
        optimizer: What it made of the optimizer, or of several.
        checkpoint: Whether the probe's state goes into ``accelerator.save_state`` and comes back
            with ``load_state``, which must then come after this call, in a run that attaches, too.
        options: Any option of :class:`feature_probe.FeatureProbe` but model and optimizer.

    Returns:
        The probe, attached. Call ``detach()`` at the end, in a ``finally`` where the process goes
        on after an exception.

    Raises:
        ConfigurationError: if this is no Accelerator, or for what cannot be probed as asked.
    """
    needed = ("unwrap_model", "register_for_checkpointing", "is_main_process")
    lacking = [name for name in needed if not hasattr(accelerator, name)]
    if lacking:
        raise ConfigurationError(
            f"the first argument must be an accelerate.Accelerator, got "
            f"{type(accelerator).__name__}, which has no {lacking[0]} "
            "(pip install feature-probe[accelerate])"
        )
    if not accelerator.is_main_process:
        options |= {"log_dir": None, "writer": None, "sinks": ()}
    probe = FeatureProbe(accelerator.unwrap_model(model), optimizer=optimizer, **options)
    if checkpoint:
        accelerator.register_for_checkpointing(probe)
    return probe.attach()
