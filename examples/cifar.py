"""CIFAR-10 for the examples, from files already on disk. Nothing is downloaded."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: All that a batch of CIFAR-10 is made of: a dictionary of lists and one array.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Arrays(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle may otherwise call whatever it names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a batch of CIFAR-10")
        return super().find_class(module, name)


def load_cifar10(root: str | Path) -> tuple[Tensor, Tensor]:
    """Load the 50,000 training images as tensors on the CPU.

    Args:
        root: A folder in torchvision's layout, which holds cifar-10-batches-py/data_batch_1 to 5.

    Returns:
        x [n, 3072] float32 in [0, 1], y [n] int64.

    Raises:
        FileNotFoundError: If a file is missing under `root`.
        ValueError: If a file is not a batch of CIFAR-10.
    """
    images, labels = [], []
    for number in range(1, 6):
        path = Path(root) / "cifar-10-batches-py" / f"data_batch_{number}"
        try:
            content = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            images.append(np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3072))
            labels.append(np.asarray(content[b"labels"], dtype=np.int64).reshape(len(images[-1])))
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a batch of CIFAR-10 ({error})") from error
    x = torch.from_numpy(np.concatenate(images).astype(np.float32) / 255.0)
    return x, torch.from_numpy(np.concatenate(labels))
