"""Fixtures of every test, and what lets a CUDA build of torchvision import beside torch+cpu."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def _define_torchvision_operators() -> torch.library.Library | None:
    """Declare the two operators that torchvision's Python half expects of its compiled half.

    The only torchvision wheels at hand are CUDA builds: their ``_C.so`` does not load beside
    torch+cpu, and ``import torchvision`` (hence ``import timm``) fails for want of two schemas.
    Nothing is declared where torchvision is missing or its compiled half loads.

    Returns:
        The library that holds the schemas; they vanish when it does.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    compiled = sorted(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for path in compiled:
            torch.ops.load_library(str(path))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_TORCHVISION = _define_torchvision_operators()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Modules and tensors made in the test are float64 without saying so."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)
