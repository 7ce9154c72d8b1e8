"""Marks in the course of a run, and the seconds between two of them, without waiting for a device.

On CUDA the host runs ahead of the device: the time between two returns of ``optimizer.step()`` says
little there, and a mark is an event on the device's stream, read when a report waits for it anyway.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Timer(Protocol):
    """Makes marks and tells the seconds between them."""

    def mark(self) -> Any:
        """Now, in the order of the work given to the device; None where that has no time."""

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to a later one; may wait until the device has come to ``end``."""


class HostTimer:
    """The host's clock: right where the host does the work, or waits for it."""

    def mark(self) -> float:
        """Seconds of a clock that never goes back."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """The difference."""
        return end - start


class CudaTimer:
    """Events on the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Remember the device."""
        self._device = device

    def mark(self) -> torch.cuda.Event | None:
        """An event that is recorded when the device comes to it; None in a graph's capture."""
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(self._device):
            event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """The device's time between two events; waits for the later one."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def timer_on(device: torch.device) -> Timer:
    """The timer for a model on ``device``."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()
