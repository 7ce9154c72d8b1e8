"""Reports in TensorBoard's own tabs, without a plugin of ours."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from feature_probe.errors import ConfigurationError, FeatureProbeError, NotMeasuredError
from feature_probe.report import SCORES, Record, Report
from feature_probe.sinks.heatmap import render_heatmap, render_matrices
from feature_probe.sinks.history import StepHistory
from feature_probe.sinks.series import (
    ROOT,
    band_scalars,
    by_label,
    custom_scalars_layout,
    histogram,
    layer_scalars,
)
from feature_probe.sinks.summary import summary_markdown
from feature_probe.sinks.wording import SCORE_NAMES, layer_name, question

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: The matrices of a matrix picture: caption, relation or Gram matrix, power.
_MATRICES = (
    ("W^T W", "nfm", None),
    ("FACT", "fact", None),
    ("AGOP^0.5", "nfa", 0.5),
    ("eNFA^0.5", "enfa", 0.5),
)
#: Pictures and the table are written again when the run has this many times as many reports.
_GROWTH = 1.2


class TensorBoardSink:
    """Writes every report to TensorBoard's stock tabs.

    - Scalars, Time Series: ``feature_probe/<label>_median_<score>`` and, for the charts,
      ``feature_probe.bands/...``: median and 10th and 90th percentile over layers of the score and
      of the trace-free cosine, the chance level of the cosine, and the stationarity.
    - Custom Scalars: the same as bands, accounts against each other, cosine against chance.
    - Images: ``feature_probe.heatmaps/<score>/<label>``, layers × all steps so far.
    - Distributions, Histograms: ``feature_probe.distributions/<score>/<label>``, over layers.
    - Text: ``feature_probe/summary``, the last table, what its numbers mean, and its gaps.

    An undefined score is left out of percentiles and histograms, grey in pictures, a dash in the
    table, and never 0. Pictures and table are written at the first five reports, then whenever the
    run has 20 % more of them, and on ``close``: TensorBoard keeps few of them anyway, and so
    the event file does not grow with the square of the run.

    Attributes:
        log_dir: Folder of the event file.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        writer: SummaryWriter | None = None,
        layer_scalars: bool = False,
        matrices: Iterable[str] | str = (),
        score: str = "cosine",
        layout: bool = True,
    ) -> None:
        """Open the event file, or take the user's writer.

        Args:
            log_dir: Folder for an event file of our own.
            writer: The user's ``SummaryWriter`` instead: written to and flushed, never closed, as a
                second event file beside the user's would stop TensorBoard reading the first.
            layer_scalars: Also one series per layer and relation, in groups of cards by layer,
                ``feature_probe.layers.<layer>/...``: many beyond about a dozen layers.
            matrices: Names or glob patterns of layers whose matrices WᵀW, FACT, √AGOP and √eNFA are
                drawn; needs ``keep_matrices=True`` in the probe. Time cubic, memory quadratic in
                the layer's width.
            score: "cosine", "pearson" or "trace_free_cosine".
            layout: Whether to write the Custom Scalars page. A run has only one: False where the
                user's writer has its own (:func:`feature_probe.sinks.series.custom_scalars_layout`
                gives the charts to merge).

        Raises:
            ConfigurationError: unless exactly one of ``log_dir`` and ``writer`` is given, for an
                unknown score, if TensorBoard is not installed, or if ``log_dir`` cannot be written.
        """
        if score not in SCORES:
            raise ConfigurationError(f"unknown score {score!r}; choose from {', '.join(SCORES)}")
        if log_dir is not None and writer is None:
            self._writer = _open(os.fspath(log_dir))
        elif log_dir is None and writer is not None:
            self._writer = writer
        else:
            raise ConfigurationError("give exactly one of log_dir and writer")
        self._owns_writer = writer is None
        self.log_dir = str(self._writer.log_dir)
        self._layer_scalars, self._score = layer_scalars, score
        self._patterns = (matrices,) if isinstance(matrices, str) else tuple(matrices)
        self._writes_layout = layout
        self._laid_out: tuple[str, ...] = ()
        self._histories: dict[str, StepHistory] = {}
        self._seen, self._next_snapshot = 0, 1
        self._pending: Report | None = None
        self._has_checked_matrices = False

    def dashboard_hint(self) -> str:
        """The line to type into a shell to look at what is written."""
        return f"tensorboard --logdir {shlex.quote(self.log_dir)}"

    def write(self, report: Report) -> None:
        """Write one report and flush.

        Raises:
            ConfigurationError: once, if ``matrices`` matches no layer.
            NotMeasuredError: once, if ``matrices`` are asked for and the report holds none.
            FeatureProbeError: if the user's writer has been closed.
        """
        if not self._owns_writer and self._is_closed():
            # Writing would silently open a second event file beside the user's finished one.
            raise FeatureProbeError(
                f"the SummaryWriter given for {self.log_dir!r} has been closed: close it after "
                "the probe is detached"
            )
        self._write_numbers(report)
        self._seen += 1
        has_matrices = bool(self._patterns)
        # Without matrices to draw, none are kept alive until the next picture.
        self._pending = report if has_matrices else replace(report, statistics={})
        if self._seen >= self._next_snapshot:
            self._next_snapshot = max(self._seen + 1, math.ceil(self._seen * _GROWTH))
            self._write_snapshot()
        self._writer.flush()
        if has_matrices:
            self._check_matrices(report)

    def close(self) -> None:
        """Write the last pictures; close our own event file, flush the user's."""
        if not self._is_closed():
            if self._pending is not None:
                self._write_snapshot()
            self._writer.flush()
        if self._owns_writer:
            self._writer.close()

    def _write_numbers(self, report: Report) -> None:
        if self._writes_layout and self._laid_out != report.labels:
            self._writer.add_custom_scalars(custom_scalars_layout(report.labels, self._score))
            self._laid_out = report.labels
        scalars = band_scalars(report, self._score)
        if self._layer_scalars:
            scalars |= layer_scalars(report, self._score)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, report.step)
        for label, records in by_label(report).items():
            scores = {layer_name(r.layer): float(getattr(r, self._score)) for r in records}
            self._histories.setdefault(label, StepHistory()).add(report.step, scores)
            self._write_histogram(label, list(scores.values()), report.step)

    def _write_histogram(self, label: str, scores: list[float], step: int) -> None:
        bins = histogram(scores)
        if bins is not None:
            self._writer.add_histogram_raw(
                f"{ROOT}.distributions/{self._score}/{label}",
                min=bins.low,
                max=bins.high,
                num=bins.count,
                sum=bins.total,
                sum_squares=bins.squares,
                bucket_limits=bins.limits,
                bucket_counts=bins.counts,
                global_step=step,
            )

    def _write_snapshot(self) -> None:
        """What is large and cumulative: the table, the heatmaps, the matrices."""
        report, self._pending = self._pending, None
        assert report is not None
        text = summary_markdown(report, self._score)
        self._writer.add_text(f"{ROOT}/summary", text, report.step)
        for label, records in by_label(report).items():
            picture = _heatmap(records, self._histories[label], self._score)
            tag = f"{ROOT}.heatmaps/{self._score}/{label}"
            self._writer.add_image(tag, picture, report.step, dataformats="HWC")
        for layer in self._matrix_layers(report):
            found, groups = _layer_matrices(report, layer)
            if found:
                title = f"layer {layer_name(layer)}: do these agree? (step {report.step:,})"
                subtitle = f"group 1 of {groups}" if groups > 1 else ""
                picture = render_matrices(found, title=title, subtitle=subtitle)
                tag = f"{ROOT}.matrices/{layer_name(layer).replace('/', '.')}"
                self._writer.add_image(tag, picture, report.step, dataformats="HWC")

    def _matrix_layers(self, report: Report) -> list[str]:
        return [
            layer
            for layer in report.layers
            if any(_matches(layer, pattern) for pattern in self._patterns)
        ]

    def _check_matrices(self, report: Report) -> None:
        if self._has_checked_matrices:
            return
        self._has_checked_matrices = True
        wanted = self._matrix_layers(report)
        if not wanted:
            raise ConfigurationError(
                f"matrices={self._patterns!r} matches no layer; layers: {', '.join(report.layers)}"
            )
        report.matrix(wanted[0], "nfm")

    def _is_closed(self) -> bool:
        # SummaryWriter.close() sets file_writer to None; its next use would open a new file.
        return getattr(self._writer, "file_writer", self._writer) is None


def _open(folder: str) -> SummaryWriter:
    try:
        # Here and not at the top: importing feature_probe must not import TensorBoard.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            f"cannot write to log_dir={folder!r} without TensorBoard: pip install tensorboard"
        ) from error
    try:
        if "://" not in folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        return SummaryWriter(folder)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to log_dir={folder!r}: {error}; give a folder that can be written to"
        ) from error


def _matches(layer: str, pattern: str) -> bool:
    # A name may hold brackets, which a glob pattern would read as a choice of letters.
    return layer == pattern or fnmatchcase(layer_name(layer), pattern)


def _heatmap(records: list[Record], history: StepHistory, score: str) -> NDArray[np.uint8]:
    chance = None
    if score == "cosine":
        levels = {layer_name(record.layer): record.level_by_chance for record in records}
        chance = np.array([levels.get(layer, math.nan) for layer in history.layers])
    return render_heatmap(
        history.array(),
        layers=history.layers,
        steps=history.steps,
        title=question(records[0]),
        subtitle=f"{SCORE_NAMES[score]}: 1 = same up to a factor, 0 = unrelated",
        chance=chance,
    )


def _layer_matrices(report: Report, layer: str) -> tuple[dict[str, NDArray[np.float64]], int]:
    """The matrices that were kept and measured, of the first group, and the number of groups."""
    found: dict[str, NDArray[np.float64]] = {}
    groups = 1
    for caption, kind, power in _MATRICES:
        try:
            matrix = report.matrix(layer, kind, power).numpy(force=True)
        except NotMeasuredError:
            continue
        groups = matrix.shape[0] if matrix.ndim == 3 else 1
        found[caption] = matrix[0] if matrix.ndim == 3 else matrix
    return found, groups
