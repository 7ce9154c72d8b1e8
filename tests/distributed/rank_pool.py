"""Processes that stay up for a whole test session and run one job after another, on all ranks.

Starting Python and torch costs seconds; a collective on loopback, well under a millisecond. So a
pool is started once per number of ranks, and every test sends it functions of `rank_jobs`.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: Seconds after which a collective that a rank does not take part in fails.
TIMEOUT = 20.0
#: Seconds after which a pool is given up.
PATIENCE = 90.0
#: What the processes share, imported once.
PRELOADED = ["torch.distributed.tensor", "torch.distributed.fsdp"]


class RankError(AssertionError):
    """A job raised on some rank; the text holds its traceback."""


class Pool:
    """A process group of so many processes.

    Args:
        ranks: How many.
        folder: An empty folder, for the file by which they find each other.
        backend: Of torch.distributed.
        timeout: Seconds after which a collective fails.
    """

    def __init__(
        self, ranks: int, folder: Path, backend: str = "gloo", timeout: float = TIMEOUT
    ) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._connections: list[Connection] = []
        self._processes = []
        self.alive = True
        for rank in range(ranks):
            here, there = context.Pipe()
            meeting = f"file://{folder / 'rendezvous'}"
            arguments = (rank, ranks, meeting, backend, timeout, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def __call__(self, job: Callable[..., Any], *args: Any, **keywords: Any) -> list[Any]:
        """Run ``job(*args, **keywords)`` on every rank and return what each gave, by rank.

        Raises:
            RankError: if it raised on any rank; the pool is of no use afterwards.
        """
        answers = self.attempt(job, *args, **keywords)
        failed = [f"rank {r}: {text}" for r, (ok, text) in enumerate(answers) if not ok]
        if failed:
            self.close()
            raise RankError("\n".join(failed))
        return [value for _, value in answers]

    def attempt(
        self, job: Callable[..., Any], *args: Any, **keywords: Any
    ) -> list[tuple[bool, Any]]:
        """The same, with whether it went well, and the traceback where it did not, by rank."""
        message = pickle.dumps((job, args, keywords))
        for connection in self._connections:
            connection.send_bytes(message)
        return [self._answer(connection) for connection in self._connections]

    def _answer(self, connection: Connection) -> tuple[bool, Any]:
        try:
            if connection.poll(PATIENCE):
                answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
                return answer
            return False, f"no answer in {PATIENCE} s"
        except EOFError:
            return False, "the process ended"

    def close(self) -> None:
        """End the processes."""
        self.alive = False
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(
    rank: int, ranks: int, meeting: str, backend: str, timeout: float, connection: Connection
) -> None:
    """What each process does: run what it is sent until the other end closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # noqa: PLC0415  (after the number of threads is set)
    import torch.distributed as dist  # noqa: PLC0415

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        backend,
        init_method=meeting,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            job, args, keywords = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            answer = True, job(*args, **keywords)
        except BaseException:  # told to the test, whatever it is
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    os._exit(0)  # without goodbyes: other ranks may be gone
