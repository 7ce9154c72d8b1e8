"""Process groups that live as long as the test session, started by the first test that asks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # jobs are imported by name in processes

from rank_pool import Pool

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """The pool of so many ranks; a new one where a test has broken the last."""
    held: dict[int, Pool] = {}

    def pool(ranks: int) -> Pool:
        if ranks not in held or not held[ranks].alive:
            held[ranks] = Pool(ranks, tmp_path_factory.mktemp("ranks"))
        return held[ranks]

    yield pool
    for pool_ in held.values():
        pool_.close()


@pytest.fixture
def two(pools: Callable[[int], Pool]) -> Pool:
    """Two processes."""
    return pools(2)


@pytest.fixture
def four(pools: Callable[[int], Pool]) -> Pool:
    """Four processes."""
    return pools(4)


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> Pool:
    """Two processes, then four."""
    return pools(request.param)
