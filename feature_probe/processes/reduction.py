"""Several processes: every rank sums what it sees, and the sums meet in one round per report.

Nothing is communicated on a step. At a report, on all ranks of the process group: one exchange of
small headers, one ``all_reduce`` per dtype of what adds up, and, where parameters are sharded, one
``all_gather`` of the shards. Every rank then holds the same window.

What adds up follows from whose mean the optimised loss is. With W ranks that each reduce their loss
by a mean over their own examples, DDP and FSDP2 minimise the mean of the W losses:

* g of a rank is the gradient of its own loss, so times its own n it is per example: K and E are
  plain sums over ranks, as n is.
* ``param.grad`` is averaged already and the same on all ranks: it is not reduced again.
* G formed from a rank's own gᵀh is averaged.

The report is that of one process which accumulates the ranks' batches as micro-batches. Frozen
weights (``measure``) have no training loop: there everything is a sum over all examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from feature_probe.capture.sharding import data_meshes, full, is_sharded
from feature_probe.errors import ConfigurationError
from feature_probe.processes.headers import Header, Held, Key, Layer, Union
from feature_probe.processes.packing import add_up
from feature_probe.sums.moments import Moments
from feature_probe.sums.window import Window
from feature_probe.theory.relations import Sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

#: What ``process_group=`` takes.
GroupChoice: TypeAlias = "ProcessGroup | Literal['auto'] | None"


@dataclass(frozen=True)
class Part:
    """What one target brings to the exchange.

    Attributes:
        name: The target's name, by which the ranks' sums are matched.
        held: How its gradient sums become one.
        weight: Its weight, sharded or not; None where there is none to be had.
        depth: Its number from the output in a chain of layers; None where this rank saw no chain.
    """

    name: str
    held: Held
    weight: Tensor | None = None
    depth: int | None = None


@dataclass(frozen=True)
class Reduced:
    """What every rank holds after the exchange.

    Attributes:
        window: The sums of all ranks, for this rank's targets in their order.
        weights: The weight of each target, whole; None where there is none to be had.
        depths: Where the layers are one chain on all ranks: the number of each from the output.
        elsewhere: Targets that only other ranks have met.
    """

    window: Window
    weights: list[Tensor | None]
    depths: Mapping[str, int]
    elsewhere: tuple[str, ...] = ()


def resolve_group(model: nn.Module, given: GroupChoice) -> ProcessGroup | None:
    """The process group whose ranks make one report together; None for this process alone.

    Args:
        model: The model as it was given, in its wrappers.
        given: "auto": the group of the DDP wrapper or of the sharded parameters' mesh, else the
            default group; None where there is one process only. None: this process alone.

    Raises:
        ConfigurationError: for what is no group of this process, a model whose weights this process
            cannot have by itself, or parameters split in a way the probe cannot follow.
    """
    meshes = data_meshes(model)
    if given is None:
        if any(mesh.size() > 1 for mesh in meshes):
            raise ConfigurationError(
                "process_group=None, this process alone, has no whole weight of a sharded model: "
                "leave process_group at 'auto'"
            )
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if given == "auto":
            return None
        raise ConfigurationError(
            f"process_group={given!r}, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group() first, or leave process_group at 'auto'"
        )
    group = _training_group(model, meshes) if given == "auto" else given
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigurationError(
            f"process_group must be 'auto', None or a process group this process belongs to, "
            f"got {given!r}"
        )
    return group if dist.get_world_size(group) > 1 else None


def is_writer(group: ProcessGroup | None) -> bool:
    """Whether this process writes its group's reports: the group's first rank does, alone."""
    return group is None or dist.get_rank(group) == 0


def reduce_window(
    window: Window, parts: Sequence[Part], group: ProcessGroup | None, step: int
) -> Reduced:
    """Add up the windows of all ranks, and make sharded tensors whole. All ranks must call it.

    Targets are matched by name: ranks may have met them in another order, or not all of them. A sum
    that a rank does not hold counts as zero; a sum that one rank could not measure is a problem on
    all. ``steps``, ``left_out`` and ``discarded`` count steps, which the ranks take together: the
    largest number of any rank.

    Args:
        window: This rank's sums, settled; must not be used afterwards.
        parts: What the other ranks must know of this rank's targets, in the window's order.
        group: The ranks; None: this process alone.
        step: The step of the report.

    Raises:
        FeatureProbeError: on every rank alike, if what the ranks bring does not belong together.
        Exception: what the process group raises where a rank does not answer in the group's time.
    """
    if group is None:
        names = [part.name for part in parts]
        depths = {part.name: part.depth for part in parts if part.depth is not None}
        return Reduced(window, _make_whole(window, parts, names, names), depths)
    device = _device(window, parts, group)
    union = Union(_exchange(_own_header(window, parts, step), group, device))
    union.check()
    with torch.no_grad():
        return _combine(window, parts, union, group, device)


def broadcast_numbers(numbers: Sequence[int], group: ProcessGroup) -> list[int]:
    """The numbers of the group's first rank, on all ranks. All must call it."""
    on_cpu = "cpu:" in str(dist.get_backend_config(group))
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    held = torch.tensor(numbers, device=device)
    dist.broadcast(held, src=dist.get_global_rank(group, 0), group=group)
    return [int(number) for number in held.tolist()]


def _combine(
    window: Window, parts: Sequence[Part], union: Union, group: ProcessGroup, device: torch.device
) -> Reduced:
    """Add up what the headers say adds up, and put it in the places of this rank's targets."""
    weights = _make_whole(window, parts, union.sharded_weights, union.sharded_gradients)
    layers = {part.name: window.layer(index) for index, part in enumerate(parts)}
    own = {part.name: part.weight for part in parts}
    rank = dist.get_rank(group)

    def held(key: Key) -> Tensor | None:
        name, kind = key
        if rank not in union.sources(key):
            return None
        total: Tensor | None = own[name] if kind == "weight" else getattr(layers[name], kind)
        return total

    sums = dict(add_up(union.slots, held, device, lambda flat: dist.all_reduce(flat, group=group)))
    total = union.counts(list(layers))
    for merged, (name, moments) in zip(total.layers, layers.items(), strict=True):
        _fill(merged, moments, name, sums)
    weights = [
        sums.get((part.name, "weight")) if weight is None else weight
        for part, weight in zip(parts, weights, strict=True)
    ]
    elsewhere = tuple(name for name in union.names if name not in layers)
    return Reduced(total, weights, union.depths, elsewhere)


def _fill(total: Moments, own: Moments, name: str, sums: Mapping[Key, Tensor]) -> None:
    """Put the sums beside the counts; what did not travel is the same on all ranks."""
    home = next((t.device for t in (own.loss, own.jacobian, own.gradient) if t is not None), None)

    def summed(kind: Sum) -> Tensor | None:
        found = sums.get((name, kind))
        return found if found is None or home is None else found.to(home)

    total.gradient = own.gradient if (name, "gradient") not in sums else summed("gradient")
    total.jacobian, total.loss = summed("jacobian"), summed("loss")
    total.jacobian_change = summed("jacobian_change")


def _training_group(model: nn.Module, meshes: Sequence[DeviceMesh]) -> ProcessGroup:
    """The group that the model's gradients are averaged over."""
    for mesh in meshes:
        if mesh.ndim == 1:
            own: ProcessGroup = mesh.get_group()
            return own
        if mesh.size() != dist.get_world_size():
            raise ConfigurationError(
                f"the parameters are sharded over {mesh}, which is neither one-dimensional nor all "
                "processes: give process_group=, the group of the ranks that train together"
            )
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            wrapped: ProcessGroup = module.process_group
            return wrapped
    default = dist.group.WORLD
    if default is None:
        raise ConfigurationError("torch.distributed has no default process group")
    return default


def _own_header(window: Window, parts: Sequence[Part], step: int) -> Header:
    """This rank's header; where it fails, one that says so, for the others wait for it."""
    try:
        checksums = _checksums([part.weight for part in parts])
        layers = {
            part.name: Layer.of(
                window.layer(index), part.held, part.weight, checksums[index], part.depth
            )
            for index, part in enumerate(parts)
        }
        problems: dict[Key, str] = {
            (parts[index].name, kind): text for (index, kind), text in window.problems.items()
        }
    except Exception as error:  # told to all ranks instead of leaving them waiting
        return Header(step, failure=f"{type(error).__name__}: {error}")
    return Header(
        step=step,
        layers=layers,
        problems=problems,
        steps=window.steps,
        examples=window.examples,
        left_out=window.left_out,
        discarded=window.discarded,
    )


def _checksums(weights: Sequence[Tensor | None]) -> list[tuple[float, ...]]:
    """Sum and norm of each parameter that is not sharded, by one wait for the device.

    What is computed from parameters may differ between ranks (a mask of their own).
    """
    pairs = {}
    for index, weight in enumerate(weights):
        if isinstance(weight, nn.Parameter) and not is_sharded(weight):
            values = weight.detach().double()
            pairs[index] = torch.stack([values.sum(), torch.linalg.vector_norm(values)])
    found: list[tuple[float, ...]] = [()] * len(weights)
    if pairs:
        home = next(iter(pairs.values())).device
        rows = torch.stack([pair.to(home) for pair in pairs.values()]).tolist()
        for index, row in zip(pairs, rows, strict=True):
            found[index] = tuple(row)
    return found


def _exchange(header: Header, group: ProcessGroup, device: torch.device) -> list[Header]:
    """The headers of all ranks, in their order."""
    received: list[Any] = [None] * dist.get_world_size(group)
    # with NCCL objects travel over the current device, which need not be the model's
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(received, header, group=group)
    return received


def _make_whole(
    window: Window, parts: Sequence[Part], weights: Sequence[str], gradients: Sequence[str]
) -> list[Tensor | None]:
    """Make whole, in one round, sharded gradient sums of the window, in place, and weights.

    Args:
        window: This rank's sums.
        parts: Its targets.
        weights: Names of those whose weights are gathered, in the same order on every rank.
        gradients: The same for the gradient sums.

    Returns:
        The weights; NaN where a sharded one was not gathered, as not all ranks know of it.
    """
    weight = {part.name: part.weight for part in parts}
    moments = {part.name: window.layer(index) for index, part in enumerate(parts)}
    shards = [weight[name] for name in weights] + [moments[name].gradient for name in gradients]
    whole = full(shards)
    weight |= dict(zip(weights, whole[: len(weights)], strict=True))
    for name, gradient in zip(gradients, whole[len(weights) :], strict=True):
        moments[name].gradient = gradient
    for held in moments.values():
        if is_sharded(held.gradient):
            held.gradient = None
    return [_undefined(w) if is_sharded(w) else w for w in weight.values()]


def _undefined(sharded: Tensor) -> Tensor:
    """What stands for a weight that was not gathered."""
    return torch.full(sharded.shape, float("nan"), dtype=sharded.dtype)


def _device(window: Window, parts: Sequence[Part], group: ProcessGroup) -> torch.device:
    """Where this rank's buffers are: with its sums if its group can send from there."""
    tensors = [m.loss if m.jacobian is None else m.jacobian for m in window.layers]
    tensors += [part.weight for part in parts]
    held = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    if f"{held.type}:" in str(dist.get_backend_config(group)):
        return held
    return torch.device("cuda", torch.cuda.current_device())
