"""MNIST for the examples: a shipped subset, or the whole from files already on disk.

Nothing is downloaded. The subset (5,000 training and 1,000 test images) is in examples/data.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUBSET = Path(__file__).resolve().parent / "data" / "mnist_small.npz"
_PREFIX = {"train": "train", "test": "t10k"}


def load_mnist(root: str | Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load MNIST as tensors on the CPU.

    Args:
        root: None for the shipped subset; or a folder in torchvision's layout, which holds
            MNIST/raw/train-images-idx3-ubyte and the other three files, packed (.gz) or not.

    Returns:
        x_train [n, 1, 28, 28] float32 in [0, 1], y_train [n] int64, and the same for the test.

    Raises:
        FileNotFoundError: If a file is missing under `root`.
        ValueError: If a file under `root` is not in MNIST's format.
    """
    if root is None:
        with np.load(SUBSET, allow_pickle=False) as data:
            parts = [(data[f"{split}_images"], data[f"{split}_labels"]) for split in _PREFIX]
    else:
        parts = [read_raw(Path(root), split) for split in _PREFIX]
    (x_train, y_train), (x_test, y_test) = parts
    return _pixels(x_train), _classes(y_train), _pixels(x_test), _classes(y_test)


def read_raw(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 [n, 28, 28] and labels uint8 [n] of "train" or "test" under root/MNIST/raw.

    Raises:
        FileNotFoundError: If a file is there neither packed nor unpacked.
        ValueError: If a file is not in MNIST's format, or the two are of different lengths.
    """
    raw = root / "MNIST" / "raw"
    images = _read_idx(raw / f"{_PREFIX[split]}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(raw / f"{_PREFIX[split]}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{raw}: {len(images)} {split} images but {len(labels)} labels")
    return images, labels


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Parse an IDX file of bytes: 0, 0, 8 (uint8), the number of axes, their lengths, the data."""
    packed = path.with_name(path.name + ".gz")
    if path.exists():
        data = path.read_bytes()
    elif packed.exists():
        data = gzip.decompress(packed.read_bytes())
    else:
        raise FileNotFoundError(
            f"{path}: not there, nor with .gz; give the folder that holds MNIST/raw, "
            "as torchvision lays it out"
        )
    header = 4 + 4 * dimensions
    shape = tuple(int(length) for length in np.frombuffer(data[4:header], dtype=">u4"))
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != header + int(np.prod(shape)):
        raise ValueError(f"{path}: not an IDX file of bytes with {dimensions} axes")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 [n, 28, 28] -> float32 [n, 1, 28, 28] in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 255.0).unsqueeze(1)


def _classes(labels: np.ndarray) -> Tensor:
    """uint8 [n] -> int64 [n]."""
    return torch.from_numpy(labels.astype(np.int64))
