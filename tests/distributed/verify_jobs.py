"""The self-test in training loops of several processes, with numbers that can be made wrong."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from feature_probe import FeatureProbe
from feature_probe.sums.ledger import Ledger
from feature_probe.sums.window import Window

_COMMIT = Ledger.commit


def train(
    *, wrapper: str = "ddp", wrong: str = "", clip: float = 0.0, micro: int = 1, alone: bool = False
) -> dict[str, Any]:
    """Six steps on this rank's own batches, and what the self-test says of them.

    Args:
        wrapper: "ddp", or "fsdp".
        wrong: "sum": Ĝ is added up over the ranks; "model": the loss is multiplied by the number of
            ranks, and the gradient divided by it; "": nothing.
        clip: Norm to clip at; 0: not.
        micro: Micro-batches of a step.
        alone: Whether the probe is told of this process alone.
    """
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    options: dict[str, Any] = {"process_group": None} if alone else {}
    factor = dist.get_world_size() if wrong == "model" else 1
    with (
        patch.object(Ledger, "commit", _added_up if wrong == "sum" else _COMMIT),
        FeatureProbe(
            model, optimizer=optimizer, relations="fact", strict=True, verify_steps=5, **options
        ) as probe,
    ):
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(micro):
                x, y = (torch.randn(4, n, generator=generator).double() for n in (6, 3))
                (F.mse_loss(model(x), y) / micro * factor).backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= factor
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    result = probe.verify()
    return {
        "passed": result.passed,
        "failed": sorted({check.name for check in result.failures}),
        "text": str(result),
        "factors": [check.factor for check in result.checks if check.name == "gradient"],
    }


def _added_up(self: Ledger, *args: Any, **options: Any) -> Window:
    """Stands for Ledger.commit: gᵀh times the number of ranks, so that their mean is a sum."""
    window = _COMMIT(self, *args, **options)
    for moments in window.layers:
        if moments.gradient is not None:
            moments.gradient.mul_(dist.get_world_size())
    return window
