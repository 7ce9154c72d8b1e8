"""TEMPORARY placeholder by the lead so that the package imports; the sinks helper replaces it."""

from feature_probe.sinks.base import Sink


class TensorBoardSink:
    def __init__(self, log_dir=None, *, writer=None): ...
    def write(self, report): ...
    def close(self): ...


class JSONLSink(TensorBoardSink): ...


__all__ = ["JSONLSink", "Sink", "TensorBoardSink"]
