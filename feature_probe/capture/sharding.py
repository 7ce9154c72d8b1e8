"""Sharded tensors (DTensor, as FSDP2 leaves them): recognised, and made whole in one collective.

A DTensor is known by its type alone, looked up where it would have been imported already: a run
without one does not pay for importing them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feature_probe.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

#: Bytes to which every shard is padded, so that each can be read back as any dtype.
_ALIGNMENT = 16


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor: one process holds a part of it, or one of its replicas."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The submodules that ``fully_shard`` was applied to, the model included."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return (module for module in model.modules() if kind is not None and isinstance(module, kind))


def data_meshes(model: nn.Module) -> list[DeviceMesh]:
    """The meshes over which ``fully_shard`` has split the model's parameters; none without it.

    Raises:
        ConfigurationError: if a parameter is split so that no rank computes with the whole of it
            (tensor parallelism), or by the first generation of FSDP.
    """
    flat = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if flat is not None and any(isinstance(module, flat) for module in model.modules()):
        raise ConfigurationError(
            "FullyShardedDataParallel flattens the weights the probe would measure; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    gathers = any(True for _ in fsdp_modules(model))
    meshes: list[DeviceMesh] = []
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            continue
        splits = sum(type(p).__name__ != "Replicate" for p in parameter.placements)
        if splits > 1 or (splits == 1 and not gathers):
            raise ConfigurationError(
                f"parameter {name!r} is placed {parameter.placements} (tensor parallel): its layer "
                "sees a part of the weight, so K and E have no whole gradients; the probe follows "
                "DistributedDataParallel and fully_shard, so measure() a checkpoint instead"
            )
        if parameter.device_mesh not in meshes:
            meshes.append(parameter.device_mesh)
    return meshes


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard`` put its sharded parameters back in place; no communication.

    A forward pass without a backward one leaves the root's parameters gathered: plain tensors that
    no optimizer holds. A model without ``fully_shard`` is left alone.
    """
    for module in fsdp_modules(model):
        module.reshard()


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Backward passes inside leave gradients that wait for their reduction alone.

    Every backward pass through a ``fully_shard`` model ends by reducing what is there: between the
    micro-batches of ``set_requires_gradient_sync(False)``, a product of the probe would have the
    gradients so far reduced early, which rounds otherwise than all at once.
    """
    held = [
        (group, group.reduce_grads)
        for module in fsdp_modules(model)
        for group in _parameter_groups(module)
    ]
    for group, _ in held:
        group.reduce_grads = False
    try:
        yield
    finally:
        for group, reduces in held:
            group.reduce_grads = reduces


def _parameter_groups(module: Any) -> list[Any]:
    """What ``set_requires_gradient_sync`` sets the flag of; there is no public way to read it."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if hasattr(group, "reduce_grads")]


class GatheredParameters:
    """The tensors that a ``fully_shard`` model computes with in place of its parameters.

    A sharded parameter gets its gradient when the ranks reduce theirs. Under
    ``set_requires_gradient_sync(False)`` that is not in every backward pass, and only these tensors
    tell of the others, by hooks; and a rank's own gradient is theirs alone.

    Args:
        model: The model.
        on_accumulated: Called when one of them has been given a gradient.
    """

    def __init__(self, model: nn.Module, on_accumulated: Callable[[Tensor], None]) -> None:
        self._model = model
        self._on_accumulated = on_accumulated
        self._sharded: dict[tuple[nn.Module, str], Tensor] = {}
        self._gathered: dict[Tensor, nn.Parameter] = {}
        self._handles: dict[nn.Parameter, RemovableHandle] = {}

    def begin(self) -> None:
        """Learn which parameters are sharded; :meth:`watch` does nothing where none is."""
        if any(True for _ in fsdp_modules(self._model)):
            reshard(self._model)
            self._sharded = {
                (module, name): parameter
                for module in self._model.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None and is_sharded(parameter)
            }

    def watch(self, module: nn.Module) -> None:
        """Learn what a module's parameters are now that it runs."""
        if not self._sharded:
            return
        for name, parameter in module._parameters.items():
            sharded = self._sharded.get((module, name))
            if parameter is None or sharded is None or sharded is parameter:
                continue
            self._gathered[sharded] = parameter
            if parameter.requires_grad and parameter not in self._handles:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles[parameter] = register(self._on_accumulated)

    def standing_for(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the model computed with: for a sharded parameter the gathered one."""
        return self._gathered.get(parameter, parameter)

    def end(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._sharded.clear()
        self._gathered.clear()


def full(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Every tensor whole, on every rank: DTensors gathered, plain tensors (and None) as they are.

    The shards of all of them travel as bytes in one ``all_gather`` per device mesh (with
    ``fully_shard`` there is one), so every rank must give the same tensors in the same order. A
    DTensor on a mesh of several dimensions, or with a partial or strided placement, is gathered
    by its own ``full_tensor()``, one collective each.
    """
    whole = list(tensors)
    by_mesh: dict[DeviceMesh, dict[int, DTensor]] = {}
    for index, tensor in enumerate(whole):
        if not is_sharded(tensor):
            continue
        if _is_plain(tensor):
            by_mesh.setdefault(tensor.device_mesh, {})[index] = tensor
        else:
            whole[index] = tensor.full_tensor().detach()
    with torch.no_grad():
        for mesh, sharded in by_mesh.items():
            gathered = _gather(mesh, list(sharded.values()))
            for index, made in zip(sharded, gathered, strict=True):
                whole[index] = made
    return whole


def _is_plain(tensor: DTensor) -> bool:
    """One mesh dimension, and nothing but a shard or a replica along it."""
    # _StridedShard subclasses Shard in some versions, but is laid out otherwise
    return tensor.device_mesh.ndim == 1 and all(
        type(placement).__name__ in ("Shard", "Replicate") for placement in tensor.placements
    )


@dataclass(frozen=True)
class _Sharded:
    """What every rank must know of a sharded tensor to lay out the bytes of all shards alike."""

    axis: int
    local: Tensor
    shapes: list[torch.Size]

    @classmethod
    def of(cls, tensor: DTensor, axis: int, ranks: int) -> _Sharded:
        shapes = [_shard_shape(tensor.shape, axis, rank, ranks) for rank in range(ranks)]
        return cls(axis, tensor.to_local().detach().contiguous(), shapes)

    def nbytes(self, rank: int) -> int:
        """Bytes of a rank's shard."""
        return self.shapes[rank].numel() * self.local.dtype.itemsize

    def padded(self, rank: int) -> int:
        """Bytes of a rank's shard with what aligns the next one."""
        return -(-self.nbytes(rank) // _ALIGNMENT) * _ALIGNMENT

    def whole(self, received: Sequence[Tensor]) -> Tensor:
        """The tensor, from the bytes that each rank sent for it."""
        shards = [
            sent[: self.nbytes(rank)].view(self.local.dtype).view(self.shapes[rank])
            for rank, sent in enumerate(received)
        ]
        return torch.cat(shards, dim=self.axis).to(self.local.device)


def _gather(mesh: DeviceMesh, tensors: Sequence[DTensor]) -> list[Tensor]:
    """Full tensors of DTensors on one 1-D mesh."""
    ranks, here = mesh.size(), mesh.get_local_rank()
    whole = [tensor.to_local().detach() for tensor in tensors]
    axes = [_sharded_axis(tensor) for tensor in tensors]
    sharded = {
        index: _Sharded.of(tensors[index], axis, ranks)
        for index, axis in enumerate(axes)
        if axis is not None
    }
    if not sharded:
        return whole
    sizes = [[part.padded(rank) for part in sharded.values()] for rank in range(ranks)]
    # parameters may be offloaded to a device that the mesh's group does not speak for
    sent = torch.zeros(max(map(sum, sizes)), dtype=torch.uint8, device=_device(mesh, sharded))
    start = 0
    for part, size in zip(sharded.values(), sizes[here], strict=True):
        sent[start : start + part.nbytes(here)] = part.local.flatten().view(torch.uint8)
        start += size
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent, group=mesh.get_group())
    pieces = [
        buffer[: sum(size)].split_with_sizes(size)
        for buffer, size in zip(received, sizes, strict=True)
    ]
    for position, (index, part) in enumerate(sharded.items()):
        whole[index] = part.whole([piece[position] for piece in pieces])
    return whole


def _device(mesh: DeviceMesh, sharded: Mapping[int, _Sharded]) -> torch.device:
    local = next(iter(sharded.values())).local.device
    return local if local.type == mesh.device_type else torch.device(mesh.device_type)


def _sharded_axis(tensor: DTensor) -> int | None:
    """The dimension along which a tensor is sharded; None where every rank holds all of it."""
    axis: int | None = getattr(tensor.placements[0], "dim", None)
    return axis


def _shard_shape(shape: torch.Size, axis: int, rank: int, ranks: int) -> torch.Size:
    """Shape of one rank's shard: rows are dealt out in equal chunks, the last ones shorter."""
    chunk = -(-shape[axis] // ranks)
    held = max(0, min(chunk, shape[axis] - rank * chunk))
    return torch.Size([*shape[:axis], held, *shape[axis + 1 :]])
