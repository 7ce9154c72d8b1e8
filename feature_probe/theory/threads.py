"""How many threads a decomposition gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Side up to which a decomposition runs in one thread.
_ONE_THREAD = 1024


@contextmanager
def calm(matrix: Tensor) -> Iterator[None]:
    """One thread for the decomposition of a small matrix on the CPU; as many as before afterwards.

    LAPACK's steps wait for each other often. Where another process has one of the cores, as a data
    loader does, they wait for a thread that does not run: with two threads on two busy cores
    ``eigh`` takes up to fifty times as long at 512 × 512. Alone, the second thread gains nothing at
    256 and a third of the time at 1024.

    Args:
        matrix: What is decomposed, ``[..., d, d]`` or ``[..., k, d]``.
    """
    threads = torch.get_num_threads()
    if threads == 1 or matrix.device.type != "cpu" or min(matrix.shape[-2:]) > _ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
