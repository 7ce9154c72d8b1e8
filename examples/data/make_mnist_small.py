"""Draw mnist_small.npz, a seeded class-balanced subset, from the whole of MNIST.

    python examples/data/make_mnist_small.py ROOT            # write mnist_small.npz
    python examples/data/make_mnist_small.py ROOT --check    # only say whether it is the same

ROOT is a folder in torchvision's layout (ROOT/MNIST/raw/train-images-idx3-ubyte, ...).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mnist import read_raw  # noqa: E402  (examples/ is not a package)

PER_CLASS = {"train": 500, "test": 100}
SEED = 0


def balanced_subset(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Map labels [n] to the positions of `per_class` examples of each class, in random order."""
    random = np.random.RandomState(seed)  # its stream is frozen: the same in every NumPy
    order = random.permutation(len(labels))
    chosen = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return random.permutation(np.concatenate(chosen))


def small_mnist(root: Path) -> dict[str, np.ndarray]:
    """The arrays of mnist_small.npz: images uint8 [n, 28, 28], labels uint8 [n]."""
    arrays = {}
    for split, per_class in PER_CLASS.items():
        images, labels = read_raw(root, split)
        chosen = balanced_subset(labels, per_class, SEED)
        arrays[f"{split}_images"] = images[chosen]
        arrays[f"{split}_labels"] = labels[chosen]
    return arrays


def main() -> int:
    """Write the file, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--check", action="store_true", help="compare with the file that is there")
    arguments = parser.parse_args()

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **small_mnist(arguments.root))
    data, path = buffer.getvalue(), HERE / "mnist_small.npz"
    if not arguments.check:
        path.write_bytes(data)
    same = path.read_bytes() == data
    print(f"{path}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    print("the same" if same else "DIFFERENT from the file that is there")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
