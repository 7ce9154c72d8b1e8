"""Fixtures of every test, and what lets a CUDA build of torchvision import beside torch+cpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision_stub  # noqa: F401  (lets a CUDA torchvision import beside CPU torch)

torch.set_num_threads(1)


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
