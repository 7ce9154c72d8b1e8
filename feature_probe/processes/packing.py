"""Flat buffers: tensors of every rank added up in one collective per dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a flat buffer; the same on every rank.

    Attributes:
        shape: Of the tensor.
        dtype: In which it travels.
        symmetric: ``[groups, d, d]`` of symmetric matrices, of which one half travels.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool

    @property
    def numel(self) -> int:
        """Elements it takes."""
        if not self.symmetric:
            return torch.Size(self.shape).numel()
        groups, size, _ = self.shape
        return groups * _half(size) * (size + 1)

    def pack(self, tensor: Tensor) -> Tensor:
        """The elements that travel, flat."""
        tensor = tensor.to(self.dtype)
        return (pack_symmetric(tensor) if self.symmetric else tensor).reshape(-1)

    def unpack(self, elements: Tensor) -> Tensor:
        """The tensor, in memory of its own."""
        if self.symmetric:
            return unpack_symmetric(elements, self.shape)
        return elements.reshape(self.shape).clone()


def add_up(
    slots: Mapping[Key, Slot],
    held: Callable[[Key], Tensor | None],
    device: torch.device,
    all_reduce: Callable[[Tensor], object],
) -> Iterator[tuple[Key, Tensor]]:
    """Sum tensors over ranks, one collective per dtype.

    Args:
        slots: What travels, alike and in the same order on every rank.
        held: This rank's tensor, or None where it adds nothing.
        device: Where the flat buffers are.
        all_reduce: Sums its argument over the ranks, in place.

    Yields:
        The sums, by key.
    """

    def dtype_name(key: Key) -> str:
        return str(slots[key].dtype)

    for _, group in groupby(sorted(slots, key=dtype_name), key=dtype_name):
        keys = list(group)
        sizes = [slots[key].numel for key in keys]
        flat = torch.zeros(sum(sizes), dtype=slots[keys[0]].dtype, device=device)
        for key, place in zip(keys, flat.split_with_sizes(sizes), strict=True):
            tensor = held(key)
            if tensor is not None:
                place.copy_(slots[key].pack(tensor))
        all_reduce(flat)
        for key, elements in zip(keys, flat.split_with_sizes(sizes), strict=True):
            yield key, slots[key].unpack(elements)


def pack_symmetric(matrices: Tensor) -> Tensor:
    """Symmetric ``[groups, d, d]`` in half the room: ``[groups, ⌈d/2⌉, d + 1]``.

    Row i holds row i of the upper triangle and, in the place that it leaves free, row d−1−i.
    """
    size = matrices.shape[-1]
    half = _half(size)
    packed = matrices.new_zeros(len(matrices), half, size + 1)
    packed[:, :, :size] = matrices.flip(-2, -1)[:, :half].tril()
    packed[:, :, 1:] += matrices[:, :half].triu()
    return packed


def unpack_symmetric(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The matrices that :func:`pack_symmetric` packed, exactly symmetric; any shape will do."""
    groups, size, _ = shape
    half = _half(size)
    packed = packed.reshape(groups, half, size + 1)
    upper = packed.new_empty(groups, size, size)
    upper[:, size - half :] = packed[:, :, :size].tril().flip(-2, -1)
    upper[:, :half] = packed[:, :, 1:].triu()
    return upper + upper.triu(1).mT


def _half(size: int) -> int:
    return (size + 1) // 2
