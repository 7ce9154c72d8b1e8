"""Where reports go: TensorBoard, a file of JSON lines, a text stream, or any :class:`Sink`."""

from feature_probe.sinks.base import ResumableSink, Sink
from feature_probe.sinks.console import ConsoleSink
from feature_probe.sinks.jsonl import JSONLSink
from feature_probe.sinks.scalars import (
    ScalarSink,
    to_lightning,
    to_mlflow,
    to_trainer,
    to_wandb,
)
from feature_probe.sinks.tensorboard import TensorBoardSink

__all__ = [
    "ConsoleSink",
    "JSONLSink",
    "ResumableSink",
    "ScalarSink",
    "Sink",
    "TensorBoardSink",
    "to_lightning",
    "to_mlflow",
    "to_trainer",
    "to_wandb",
]
