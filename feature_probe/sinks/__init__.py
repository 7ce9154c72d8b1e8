"""Where reports go: TensorBoard, a file of JSON lines, a text stream, or any :class:`Sink`."""

from feature_probe.sinks.base import Sink
from feature_probe.sinks.console import ConsoleSink
from feature_probe.sinks.jsonl import JSONLSink
from feature_probe.sinks.tensorboard import TensorBoardSink

__all__ = ["ConsoleSink", "JSONLSink", "Sink", "TensorBoardSink"]
