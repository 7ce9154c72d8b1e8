"""The examples run, and what they print and write can be used."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data.make_mnist_small import balanced_subset
from mnist import load_mnist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import feature_probe

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LAYERS = ["1", "3", "5", "7"]


def _write_idx(path: Path, array: np.ndarray, packed: bool) -> None:
    """Write bytes in MNIST's format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    data = header + array.astype(np.uint8).tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    """A few images in torchvision's layout, the test files packed."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", 7), ("t10k", 3)):
        images = random.integers(0, 256, (count, 28, 28))
        _write_idx(raw / f"{prefix}-images-idx3-ubyte", images, packed=prefix == "t10k")
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count), packed=prefix == "t10k")
    return tmp_path


def test_shipped_subset_is_balanced_mnist() -> None:
    """The subset has 500 training and 100 test images of each digit, with pixels in [0, 1]."""
    x_train, y_train, x_test, y_test = load_mnist()
    assert x_train.shape == (5000, 1, 28, 28)
    assert x_test.shape == (1000, 1, 28, 28)
    assert x_train.dtype == x_test.dtype == torch.float32
    assert (x_train.min(), x_train.max()) == (0.0, 1.0)
    assert y_train.bincount().tolist() == [500] * 10
    assert y_test.bincount().tolist() == [100] * 10
    assert x_train.mean().item() == pytest.approx(0.1307, abs=0.003)  # of the whole of MNIST


def test_mnist_is_read_from_a_folder(mnist_root: Path) -> None:
    """Files in torchvision's layout are read, packed or not."""
    x_train, y_train, x_test, y_test = load_mnist(mnist_root)
    random = np.random.default_rng(0)
    expected = random.integers(0, 256, (7, 28, 28))
    assert torch.equal(x_train * 255, torch.from_numpy(expected).unsqueeze(1).float())
    assert (y_train.tolist(), y_test.tolist()) == (list(range(7)), [0, 1, 2])
    assert x_test.shape == (3, 1, 28, 28)


def test_missing_mnist_says_where_it_was_looked_for(tmp_path: Path) -> None:
    """A folder without the files is refused, with the layout it should have."""
    with pytest.raises(FileNotFoundError, match="the folder that holds MNIST/raw"):
        load_mnist(tmp_path)


def test_broken_mnist_is_refused(mnist_root: Path) -> None:
    """A truncated file and files of different lengths are refused."""
    images = mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    data = images.read_bytes()
    images.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="not an IDX file of bytes with 3 axes"):
        load_mnist(mnist_root)
    _write_idx(images, np.zeros((6, 28, 28)), packed=False)
    with pytest.raises(ValueError, match="6 train images but 7 labels"):
        load_mnist(mnist_root)


def test_subset_is_drawn_without_chance() -> None:
    """The same labels give the same subset, of the asked number of every class, in mixed order."""
    labels = np.arange(1000) % 10
    chosen = balanced_subset(labels, per_class=7, seed=0)
    assert np.array_equal(chosen, balanced_subset(labels, per_class=7, seed=0))
    assert np.bincount(labels[chosen]).tolist() == [7] * 10
    assert len(set(chosen.tolist())) == 70
    assert not np.array_equal(labels[chosen], np.sort(labels[chosen]))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What `quickstart.py --fast` prints, and the folder of its run."""
    logs = tmp_path_factory.mktemp("logs")
    done = subprocess.run(
        [sys.executable, "-W", "error", "quickstart.py", "--fast", "--log-dir", str(logs)],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(Path(feature_probe.__file__).parents[1])},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    (run,) = logs.iterdir()
    return done.stdout, run


def test_quickstart_prints_every_layer(quickstart: tuple[str, Path]) -> None:
    """The table has a row of finite cosines for each layer."""
    rows = re.findall(r"^(\d+) +(-?\d\.\d{3} .*)$", quickstart[0], flags=re.MULTILINE)
    assert [layer for layer, _ in rows] == LAYERS
    cosines = [float(n) for _, cells in rows for n in re.findall(r"-?\d\.\d{2,3}\b", cells)]
    assert len(cosines) >= 8 * len(LAYERS)
    assert all(-1.001 <= cosine <= 1.001 for cosine in cosines)


def test_quickstart_says_how_to_go_on(quickstart: tuple[str, Path]) -> None:
    """The accuracy of a network that learned, and the line that opens the dashboard."""
    (accuracy,) = re.findall(r"^test accuracy: (\d\.\d+)$", quickstart[0], flags=re.MULTILINE)
    assert float(accuracy) > 0.5
    assert f"tensorboard --logdir {quickstart[1].parent}" in quickstart[0]


def test_quickstart_writes_json_lines(quickstart: tuple[str, Path]) -> None:
    """The JSON lines hold every record of the run: all steps, all layers, finite cosines."""
    lines = (quickstart[1] / "feature_probe.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    relations = {(record["relation"], record["power"]) for record in records}
    assert {name for name, _ in relations} == {"fact", "bfact", "nfa", "enfa"}
    seen = [(r["step"], r["layer"], r["relation"], r["power"]) for r in records]
    assert len(set(seen)) == len(seen) == 3 * len(LAYERS) * len(relations)
    assert {record["step"] for record in records} == {0, 20, 40}
    assert {record["layer"] for record in records} == set(LAYERS)
    assert all(math.isfinite(record["cosine"]) for record in records)


def test_quickstart_writes_event_files(quickstart: tuple[str, Path]) -> None:
    """TensorBoard reads back a curve of finite numbers and a picture for every relation."""
    events = EventAccumulator(str(quickstart[1])).Reload()
    tags = events.Tags()
    for label in ("fact", "bfact", "nfa^0.5", "nfa^1", "enfa^0.5", "enfa^1"):
        curve = events.Scalars(f"feature_probe/{label}_median_cosine")
        assert [event.step for event in curve] == [0, 20, 40]
        assert all(math.isfinite(event.value) for event in curve)
        assert [tag for tag in tags["images"] if tag.endswith(f"/{label}")], f"no {label} picture"
    assert [tag for tag in tags["tensors"] if "summary" in tag]
