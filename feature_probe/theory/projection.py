"""Subspaces of ℝ^d_out, in which K and E of a layer with very many outputs are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from feature_probe.theory.precision import reduced_precision
from feature_probe.theory.rotations import Mixing
from feature_probe.theory.threads import calm

#: Most outputs whose K and E are held in full, unless told otherwise.
MAX_DIM = 4096
_SEED = 0
#: Entries that are transformed at once, so that the copies on the way stay bounded.
_CHUNK = 2**23
#: Share of the dimensions that W's columns may take.
_MOST = 0.75


@dataclass(frozen=True, eq=False)
class Subspace:
    """P = [Qᵀ; √(d/r)·R(1 − QQᵀ)]: the span of W's columns, and r random directions beside it.

    R are r coordinates of a fixed random rotation of ℝᵈ. With W = QT the forward matrices are
    exact: (PW)ᵀ(PW) = WᵀW and (PW)ᵀ(PKPᵀ)(PW) = WᵀKW; so is the cosine of a W that has moved a
    little since, to second order. What K has beside the span is sketched: E[PᵀP] = 1, so that its
    trace is right on average, but its norm is too large by up to (tr K)²/r, and backward cosines
    are those of the sketch. Without Q, where W's columns are too many, P is random altogether, and
    the product of two vectors has a relative error of about 1/√m.

    Nothing but Q and d signs is stored; R is the same in every process, on every device, in every
    run.

    Attributes:
        size: d.
        dimension: m < d, columns of Q and r together.
        frame: Q, ``[groups, d, k]``, or None.
    """

    size: int
    dimension: int
    frame: Tensor | None = None

    @classmethod
    def within(cls, size: int, limit: int, weight: Tensor | None = None) -> Subspace | None:
        """The subspace of a layer, None where its outputs are within the limit.

        Args:
            size: d, its outputs by block.
            limit: m.
            weight: W, ``[groups, d, d_in]``; None: not to be had.
        """
        if size <= limit:
            return None
        if weight is None or not cls.has_frame(size, weight.shape[2], limit):
            return cls(size, limit)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if not math.isfinite(float(torch.linalg.vector_norm(wide))):
            return cls(size, limit)
        with calm(wide):
            frame: Tensor = torch.linalg.qr(wide).Q
        return cls(size, limit, frame)

    @staticmethod
    def has_frame(size: int, columns: int, limit: int) -> bool:
        """Whether a layer with so many outputs and inputs by block is given Q."""
        return size > limit and columns <= _MOST * limit

    def nbytes(self) -> int:
        """Bytes of Q."""
        return 0 if self.frame is None else self.frame.numel() * self.frame.element_size()

    @property
    def note(self) -> str:
        """What a record says."""
        sort = "a random subspace" if self.frame is None else "W's columns and random directions"
        return f"in {sort}: {self.dimension} of {self.size} output dimensions (max_dim)"

    def rows(self, rows: Tensor) -> Tensor:
        """Pr of rows ``[..., groups, d]``: ``[..., groups, m]``, float32 or wider."""
        groups = rows.shape[-2]
        flat = rows.detach().reshape(-1, groups, self.size)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        step = max(1, _CHUNK // (groups * self.size))
        with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
            parts = [self._apply(flat[at : at + step]) for at in range(0, len(flat), step)]
        return torch.cat(parts).reshape(*rows.shape[:-1], self.dimension)

    def matrix(self, matrix: Tensor) -> Tensor:
        """PM of ``[groups, d, k]``: ``[groups, m, k]``, float32 or wider."""
        return self.rows(matrix.permute(2, 0, 1)).permute(1, 2, 0)

    def _apply(self, rows: Tensor) -> Tensor:
        """Pr of ``[n, groups, d]``."""
        beside = self._sketch(rows)
        if self.frame is None or self._turned is None:
            return beside
        # their switches are global and are not ours to turn
        wide = torch.float64 if reduced_precision(rows.device) else rows.dtype
        frame, turned = (t.to(rows.device, wide) for t in (self.frame, self._turned))
        inside = rows.transpose(0, 1).to(wide) @ frame
        both = torch.cat([inside, beside.transpose(0, 1) - inside @ turned.mT], dim=-1)
        return both.transpose(0, 1).to(rows.dtype)

    def _sketch(self, rows: Tensor) -> Tensor:
        """√(d/r)·Rr of ``[n, groups, d]``."""
        count = self.dimension - (0 if self.frame is None else self.frame.shape[2])
        rotation, kept = _rotation(self.size, count, rows.device, rows.dtype)
        turned = rotation.forth(rows.permute(1, 2, 0))[:, kept]
        sketch: Tensor = turned.permute(2, 0, 1) * math.sqrt(self.size / count)
        return sketch

    @cached_property
    def _turned(self) -> Tensor | None:
        """√(d/r)·RQ, ``[groups, r, k]``."""
        if self.frame is None:
            return None
        return self._sketch(self.frame.permute(2, 0, 1)).permute(1, 2, 0)


@lru_cache(maxsize=16)
def _rotation(
    size: int, count: int, device: torch.device, dtype: torch.dtype
) -> tuple[Mixing, Tensor]:
    """The rotation and the coordinates kept, drawn on the CPU: the same numbers everywhere."""
    generator = torch.Generator().manual_seed(_SEED)
    rotation = Mixing((size, 1), generator, torch.empty(0, dtype=dtype))
    kept = torch.randperm(size, generator=generator)[:count].sort().values
    return rotation.to(device), kept.to(device)
