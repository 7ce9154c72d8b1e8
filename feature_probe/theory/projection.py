"""Fixed random subspaces of ℝᵈ, in which K and E of a layer with very many outputs are measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from feature_probe.theory.rotations import Mixing

#: Most outputs whose K and E are held in full, unless told otherwise.
MAX_DIM = 4096
_SEED = 0
#: Entries that are transformed at once, so that the copies on the way stay bounded.
_CHUNK = 2**23


@dataclass(frozen=True)
class Subspace:
    """P = √(d/m)·SQᵀ: m random coordinates, S, of a fixed random rotation Q of ℝᵈ.

    The rows of P are orthogonal and E[PᵀP] = 1, so that (PW)ᵀ(PKPᵀ)(PW) stands for WᵀKW and
    (PW)ᵀ(PW) for WᵀW with about the relative error 1/√m of each product of two vectors. Nothing but
    d signs is stored; P is the same in every process, on every device and in every run.

    Attributes:
        size: d.
        dimension: m < d.
    """

    size: int
    dimension: int

    @classmethod
    def within(cls, size: int, limit: int) -> Subspace | None:
        """The subspace of a layer with ``size`` outputs, None where they are within the limit."""
        return cls(size, limit) if size > limit else None

    @property
    def note(self) -> str:
        """What a record says."""
        return f"in a random subspace of {self.dimension} of {self.size} output rows (max_dim)"

    def rows(self, rows: Tensor) -> Tensor:
        """Pr of rows ``[..., d]``: ``[..., m]``, float32 or wider."""
        flat = rows.detach().reshape(-1, self.size)
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()
        step = max(1, _CHUNK // self.size)
        with torch.no_grad():
            parts = [
                self._apply(flat[start : start + step].mT).mT for start in range(0, len(flat), step)
            ]
        return torch.cat(parts).reshape(*rows.shape[:-1], self.dimension)

    def matrix(self, matrix: Tensor) -> Tensor:
        """PM of ``[..., d, k]``: ``[..., m, k]``, float32 or wider."""
        return self.rows(matrix.mT).mT

    def _apply(self, columns: Tensor) -> Tensor:
        rotation, kept = _rotation(self.size, self.dimension, columns.device, columns.dtype)
        scale = (self.size / self.dimension) ** 0.5
        chosen: Tensor = rotation.forth(columns)[kept] * scale
        return chosen


@lru_cache(maxsize=16)
def _rotation(
    size: int, dimension: int, device: torch.device, dtype: torch.dtype
) -> tuple[Mixing, Tensor]:
    """Q and the coordinates kept, drawn on the CPU, where the numbers are the same everywhere."""
    generator = torch.Generator().manual_seed(_SEED)
    rotation = Mixing((size, 1), generator, torch.empty(0, dtype=dtype))
    kept = torch.randperm(size, generator=generator)[:dimension].sort().values
    return rotation.to(device), kept.to(device)
