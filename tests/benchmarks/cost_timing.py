"""Clocks of the cost benchmark: interleaved rounds, and memory in a process of its own."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

#: With these glibc gives large blocks back when they are freed, so that what a process has is
#: what it holds.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
#: Rounds that are measured however long they take.
_FEWEST = 3


#: What tells the time. A test that shares its cores with others takes processor time.
clock: Callable[[], float] = time.perf_counter


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the work takes, on the device too."""
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Mode:
    """One of the ways of taking a step that are compared.

    Attributes:
        step: Takes a step and says how many seconds count.
        timed: Steps of a turn that count; one before them, which finds the caches as another mode
            left them, does not.
    """

    step: Callable[[], float]
    timed: int

    def turn(self) -> list[float]:
        """Seconds of the steps that count."""
        self.step()
        return [self.step() for _ in range(self.timed)]


def interleaved(
    modes: Mapping[str, Mode], rounds: int, limit: float = math.inf
) -> dict[str, list[list[float]]]:
    """Seconds by mode, round and step: in every round each mode has a turn, in random order.

    Args:
        modes: By name.
        rounds: How many; fewer where so many take long.
        limit: Seconds after which no round is begun, but for the first three.
    """
    order = random.Random(0)
    names = list(modes)
    start = time.perf_counter()
    for name in names:
        modes[name].turn()
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for done in range(rounds):
        if done >= _FEWEST and time.perf_counter() - start > limit:
            break
        order.shuffle(names)
        for name in names:
            found[name].append([round(each, 7) for each in modes[name].turn()])
    return found


class Memory:
    """Bytes in use, now and at their peak: of this process, or on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> int:
        """Bytes in use."""
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        return _resident("VmRSS")

    def peak_of(self, work: Callable[[], object]) -> int:
        """Most bytes in use while the work is done."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        self.now()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
        work()
        return _resident("VmHWM")


def _resident(entry: str) -> int:
    """Bytes of this process, now (VmRSS) or at their peak (VmHWM); Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {entry} in /proc/self/status")


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """What ``work(*args)`` returns in a process of its own, which holds only what it uses."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send, args=(there, work, args))
    before = {name: os.environ.get(name) for name in _EXACT_MALLOC}
    os.environ.update(_EXACT_MALLOC)
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _send(pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    pipe.send(work(*args))
