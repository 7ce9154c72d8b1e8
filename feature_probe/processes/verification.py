"""The self-test's evidence of several processes: Ĝ is averaged over them, as DDP averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from feature_probe.sums.facts import StepFacts
from feature_probe.sums.verification import LayerEvidence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAN = float("nan")


@dataclass(frozen=True)
class _Header:
    """What one process tells of a layer."""

    reason: str
    steps: tuple[StepFacts, ...]
    size: int


def averaged(
    layers: Mapping[str, LayerEvidence], group: ProcessGroup | None
) -> dict[str, LayerEvidence]:
    """The evidence of all processes, the same on each; every one of them must call this.

    Ĝ and what is linear in it become means over the processes, P, W and the optimizer's steps are
    the same on all. A layer that not every process has followed over the same steps gets a reason.

    Args:
        layers: This process's, by name; left as they are.
        group: The processes; None: this one alone.
    """
    if group is None:
        return dict(layers)
    own = {name: _header(layer) for name, layer in layers.items()}
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    found = {name: _joined(layer, name, gathered) for name, layer in layers.items()}
    shared = sorted(name for name in layers if _agree([h.get(name) for h in gathered]))
    sums = [found[name].formed for name in shared]
    for name, total in zip(shared, _mean([s for s in sums if s is not None], group), strict=True):
        found[name].formed = total
    return found


def _header(layer: LayerEvidence) -> _Header:
    size = 0 if layer.formed is None else layer.formed.numel()
    return _Header(layer.reason, tuple(layer.steps), size)


def _agree(headers: Sequence[_Header | None]) -> bool:
    """Whether every process has the same steps of a layer."""
    known = [header for header in headers if header is not None and header.size]
    return len(known) == len(headers) and len({(len(h.steps), h.size) for h in known}) == 1


def _joined(layer: LayerEvidence, name: str, gathered: Sequence[Any]) -> LayerEvidence:
    headers = [header.get(name) for header in gathered]
    reason = next((h.reason for h in headers if h is not None and h.reason), "")
    if not _agree(headers):
        reason = reason or "not every process followed it over the same steps"
        return replace(layer, reason=reason)
    steps = [_mean_facts(together) for together in zip(*(h.steps for h in headers), strict=True)]
    return replace(layer, reason=reason, steps=steps)


def _mean_facts(facts: Sequence[StepFacts]) -> StepFacts:
    count = len(facts)
    return replace(
        facts[0],
        formed=_NAN,
        gap=_NAN,
        clamped=_NAN,
        dot=sum(f.dot for f in facts) / count,
        pull=sum(f.pull for f in facts) / count,
        examples_dot=sum(f.examples_dot for f in facts),
        examples_gap=sum(f.examples_gap for f in facts),
        own=sum(f.own for f in facts),
        reach=max(f.reach for f in facts),
    )


def _mean(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The mean of each over the processes, by one exchange."""
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten().cpu() for tensor in tensors])
    if "cpu:" not in str(dist.get_backend_config(group)):
        flat = flat.to(torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(flat, group=group)
    mean = flat.cpu() / dist.get_world_size(group)
    parts = torch.split(mean, [tensor.numel() for tensor in tensors])
    return [part.view(t.shape).to(t.device) for part, t in zip(parts, tensors, strict=True)]
