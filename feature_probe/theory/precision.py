"""Whether the user's settings let float32 products be less than that."""

from __future__ import annotations

import torch


def reduced_precision(device: torch.device) -> bool:
    """Whether the user's settings allow float32 matrix products below float32 precision."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    setting: str | None = getattr(matmul, "fp32_precision", None)
    if setting is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return setting not in ("none", "ieee")
