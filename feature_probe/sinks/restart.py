"""How an event file says that a run was resumed, so that no step is drawn twice."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def mark_restart(writer: SummaryWriter, step: int) -> None:
    """Make TensorBoard drop what it has read so far of ``step`` and later steps of this run.

    What ``SummaryWriter(purge_step=step)`` writes, for a writer that is open already, and twice:
    the loader behind TensorBoard's page takes the first mark in a folder for the run's beginning,
    and drops nothing.
    """
    # Not at the top: importing feature_probe must not import TensorBoard.
    from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]  # noqa: PLC0415
        Event,
        SessionLog,
    )

    file_writer = writer._get_file_writer()  # type: ignore[no-untyped-call]
    file_writer.add_event(Event(step=step, file_version="brain.Event:2"))
    for _ in range(2):
        file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def follow_mark(writer: SummaryWriter) -> bool:
    """See to it that the mark of a user's ``purge_step`` is heeded (:func:`mark_restart`).

    Returns:
        False if there is no mark, and the folder holds earlier event files: a resumed run's steps
        would be drawn twice.
    """
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]  # noqa: PLC0415
        event_file_loader,
    )

    writer.flush()
    folder = str(writer.log_dir)
    if "://" in folder:
        return True  # listing it would need the cloud's own client
    files = sorted(Path(folder).glob("*tfevents*"), key=lambda path: path.stat().st_mtime)
    if len(files) < 2:
        return True
    # purge_step= writes the mark right after the file's version, in this order
    first = list(islice(event_file_loader.EventFileLoader(str(files[-1])).Load(), 4))
    marks = [event for event in first if event.HasField("session_log")]
    if len(marks) == 1 and first[-1] is marks[0]:  # nothing written since would be dropped
        mark_restart(writer, marks[0].step)
    return bool(marks)
