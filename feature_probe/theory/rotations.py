"""Random rotations of ℝᵈ and random frames, from normal numbers or from fast transforms."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from feature_probe.theory.threads import calm

#: Dimension from which on rotations are products of signs and transforms: they mix as Haar's do
#: there.
_WIDE = 128


def random_frames(
    draws: int, groups: int, size: int, count: int, generator: torch.Generator, like: Tensor
) -> Tensor:
    """The first ``count`` columns of random rotations, ``[draws, groups, size, count]``.

    From the QR decomposition of normal numbers (Haar's measure up to signs of columns) below 128
    dimensions; above it the columns of a :class:`Mixing`.

    Args:
        draws: How many for each group.
        groups: How many groups.
        size: d.
        count: Columns of each, at most d.
        generator: On the device of ``like``.
        like: Of the dtype and on the device of the frames.
    """
    if size < _WIDE:
        normal = torch.randn(
            draws, groups, size, count, generator=generator, dtype=like.dtype, device=like.device
        )
        with calm(normal):
            frames: Tensor = torch.linalg.qr(normal).Q
        return frames
    columns = torch.eye(size, count, dtype=like.dtype, device=like.device)
    return Mixing((draws, groups, size, 1), generator, like).back(columns)


class Mixing:
    """Q = D₁HD₂HD₃H with random signs D and the Hartley transform H: d·log d operations a vector.

    It mixes as well as Haar's rotations do in many dimensions. Vectors lie along the last axis but
    one.

    Args:
        shape: Of the signs, ``[..., d, 1]``; it is broadcast against the vectors.
        generator: On the device of ``like``.
        like: Of the dtype and on the device of the vectors.
    """

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> None:
        self._signs = [random_signs(shape, generator, like) for _ in range(3)]

    def to(self, device: torch.device) -> Mixing:
        """The same rotation on another device."""
        moved = copy(self)
        moved._signs = [signs.to(device) for signs in self._signs]
        return moved

    def forth(self, z: Tensor) -> Tensor:
        """Qᵀz."""
        for signs in self._signs:
            z = hartley(signs * z)
        return z

    def back(self, z: Tensor) -> Tensor:
        """Qz."""
        for signs in reversed(self._signs):
            z = signs * hartley(z)
        return z


def random_signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Independent ±1, in the dtype of ``like``."""
    bits = torch.randint(2, shape, generator=generator, device=like.device)
    return bits.to(like.dtype) * 2 - 1


def hartley(z: Tensor) -> Tensor:
    """An orthogonal symmetric transform along the last axis but one, in d·log d operations."""
    size = z.shape[-2]
    waves: Tensor = torch.fft.rfft(z, dim=-2, norm="ortho")
    mirrored = (waves.real + waves.imag)[..., 1 : (size + 1) // 2, :].flip(-2)
    return torch.cat([waves.real - waves.imag, mirrored], dim=-2)
