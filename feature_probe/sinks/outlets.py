"""Outlets: the places a probe's reports go, each kept from harming the others and the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from feature_probe.errors import ConfigurationError
from feature_probe.reports.report import Report
from feature_probe.sinks import JSONLSink, ResumableSink, Sink, TensorBoardSink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

#: Name of the record file beside the event files of ``log_dir``.
JSONL_NAME = "feature_probe.jsonl"


class Outlets:
    """Opens sinks, writes to them, resumes them and closes them.

    Args:
        log_dir: Folder for event files and records, or None.
        writer: The user's ``SummaryWriter`` instead, or None.
        sinks: More sinks.
        on_fault: Called with what a sink raised and where; may raise it.
        writes: False on all processes but the one that writes: no file is touched.

    Raises:
        ConfigurationError: for something that is no sink or no writer, or for both a folder and a
            writer.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None,
        writer: SummaryWriter | None,
        sinks: Iterable[Sink],
        on_fault: Callable[[Exception, str], None],
        *,
        writes: bool = True,
    ) -> None:
        if log_dir is not None and writer is not None:
            raise ConfigurationError("give log_dir or writer, not both")
        self._folder = None if log_dir is None else os.fspath(log_dir)
        self._writer = _checked_writer(writer)
        self._given = _checked_sinks(sinks)
        self._on_fault = on_fault
        self._writes = writes
        self._sinks: list[Sink] = []
        self._resumed: Sequence[Mapping[str, Any]] | None = None

    def open(self, step: int) -> None:
        """Open what is to be opened, and let it go on from what :meth:`resume` was given.

        A sink that fails otherwise than by its configuration is left out: it is a fault.

        Args:
            step: The next step.

        Raises:
            ConfigurationError: if a sink cannot work where it was told to; none is open then.
        """
        self._sinks = []
        try:
            for make in self._makers():
                self._open(make)
            self._sinks += self._given
            self._go_on(step)
        except Exception:
            self._shut()
            raise

    def write(self, report: Report) -> None:
        """Hand a report to every sink."""
        for sink in self._sinks if self._writes else ():
            self._guard(f"writing to {_name(sink)}", sink.write, report)

    def close(self) -> None:
        """Close every sink; opened again, they go on from here."""
        if self._sinks:
            self._resumed = self.state_dict()
        self._shut()

    def state_dict(self) -> list[dict[str, Any]]:
        """What every resumable sink needs, in order; while closed, what it needed then."""
        if not self._sinks or not self._writes:
            return [dict(state) for state in self._resumed or ()]
        return [
            {"sink": _name(sink), "state": self._saved(sink)}
            for sink in self._sinks
            if isinstance(sink, ResumableSink)
        ]

    def resume(self, step: int, states: Sequence[Mapping[str, Any]]) -> None:
        """Let the sinks go on where :meth:`state_dict` was taken, now or when they are opened."""
        self._resumed = states
        if self._sinks:
            self._go_on(step)

    def _go_on(self, step: int) -> None:
        """Each resumable sink gets the state of the first of its kind that is left."""
        if self._resumed is None or not self._writes:
            return
        left: dict[str, list[Mapping[str, Any]]] = {}
        for kept in self._resumed:
            left.setdefault(kept["sink"], []).append(kept["state"])
        self._resumed = None
        for sink in self._sinks:
            if isinstance(sink, ResumableSink):
                states = left.get(_name(sink))
                state = states.pop(0) if states else {}
                self._guard(f"resuming {_name(sink)}", sink.resume, step, state)

    def _saved(self, sink: ResumableSink) -> dict[str, Any]:
        try:
            return sink.state_dict()
        except Exception as error:  # a checkpoint without one sink is better than none
            self._on_fault(error, f"saving the state of {_name(sink)}")
            return {}

    def _shut(self) -> None:
        sinks, self._sinks = self._sinks, []
        with ExitStack() as closing:  # all of them, also where a strict probe raises
            for sink in reversed(sinks):
                closing.callback(self._guard, f"closing {_name(sink)}", sink.close)

    def _open(self, make: partial[Any]) -> None:
        try:
            self._sinks.append(make())
        except ConfigurationError:
            raise
        except Exception as error:  # TensorBoard fails: the records are still written
            self._on_fault(error, f"opening {getattr(make.func, '__name__', 'a sink')}")

    def _makers(self) -> Iterator[partial[Any]]:
        if not self._writes:
            return
        if self._writer is not None:
            yield partial(TensorBoardSink, writer=self._writer)
        if self._folder is None:
            return
        records = os.path.join(self._folder, JSONL_NAME)
        if os.path.exists(records) and self._resumed is None:
            logger.warning("%s holds an earlier run: its records are appended to", self._folder)
        yield partial(TensorBoardSink, self._folder)
        yield partial(JSONLSink, records)

    def _guard(self, where: str, work: Callable[..., Any], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:  # one sink's failure must not cost the others
            self._on_fault(error, where)


def _name(sink: Sink | ResumableSink) -> str:
    return type(sink).__name__


def _checked_sinks(sinks: Iterable[Sink]) -> tuple[Sink, ...]:
    given: object = sinks
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ConfigurationError(f"sinks must be a list of sinks, got {given!r}")
    listed = tuple(given)
    for sink in listed:
        if not (callable(getattr(sink, "write", None)) and callable(getattr(sink, "close", None))):
            raise ConfigurationError(f"a sink needs write(report) and close(), got {sink!r}")
    return listed


def _checked_writer(writer: SummaryWriter | None) -> SummaryWriter | None:
    if writer is not None and not callable(getattr(writer, "add_custom_scalars", None)):
        raise ConfigurationError(
            f"writer must be a torch.utils.tensorboard.SummaryWriter, got {writer!r}; "
            "for a folder use log_dir="
        )
    return writer
