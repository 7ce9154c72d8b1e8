"""Reports in TensorBoard's own tabs, without a plugin of ours."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_probe.errors import ConfigurationError, FeatureProbeError
from feature_probe.reports.record import SCORES
from feature_probe.reports.report import Report
from feature_probe.sinks.history import StepHistory
from feature_probe.sinks.pictures import (
    heatmap_picture,
    matrix_picture,
    state_picture,
    verdict_picture,
)
from feature_probe.sinks.restart import follow_mark, mark_restart
from feature_probe.sinks.series import (
    ROOT,
    band_scalars,
    by_label,
    custom_scalars_layout,
    histogram,
    layer_scalars,
    stationarity_by_layer,
)
from feature_probe.sinks.structure import structure_layout, structure_scalars, sweep_pictures
from feature_probe.sinks.summary import summary_markdown
from feature_probe.sinks.thinning import PARTS, Part, Thinning
from feature_probe.sinks.verdicts import speaking
from feature_probe.sinks.wording import layer_name

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class TensorBoardSink:
    """Writes every report to TensorBoard's stock tabs.

    - Scalars, Time Series: ``feature_probe/<label>_median_<score>`` and, for the charts,
      ``feature_probe.bands/...``: median and 10th and 90th percentile over layers of the score and
      of the trace-free cosine, the chance level of the cosine, and the stationarity;
      ``feature_probe/median_<...>`` of decay age and λ̂/λ, without and with its fluctuation;
      ``feature_probe.verdicts/...``: for which share of how many applicable layers it is true.
    - Custom Scalars: the same as bands, accounts against each other, cosine against chance.
    - Images: ``feature_probe.heatmaps/<score>/<label>``, layers × all steps so far;
      ``.../verdict/<label>`` and ``.../state`` likewise, in the colours of verdicts and states.
    - Distributions, Histograms: ``feature_probe.distributions/<score>/<label>``, over layers.
    - Text: ``feature_probe/summary``, the last table, what its numbers mean, and its gaps.

    Of a report with structural quantities (``structure=True``) also, by layer, scalars
    ``feature_probe.structure.<quantity>/<layer>`` and pictures of cosines, layers × powers,
    ``feature_probe.sweeps/<relation>``.

    A score that is undefined or, by its verdict, not applicable or trivial is left out of
    percentiles and histograms, and grey in pictures. An undefined one is a dash in the table, and
    never 0. Pictures and table are written at the first five reports, then whenever the
    run has 20 % more of them; distributions and curves in full for the first 50 and 1000 reports,
    then thinned (:mod:`feature_probe.sinks.thinning`): TensorBoard shows no more of them anyway,
    and so the event file grows with the logarithm of the run. On ``close`` all parts of the last
    report are there.

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
        structure_charts: bool = False,
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
            structure_charts: Whether that page also has charts of the structural quantities, a line
                a layer.

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
        self._charts_structure = structure_charts
        self._laid_out: tuple[str, ...] = ()
        self._histories: dict[str, StepHistory] = {}
        self._states = StepHistory()
        self._thinning = Thinning()
        self._latest: Report | None = None
        self._owed: list[Part] = []
        self._has_failed = False
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
            OSError: if the disk does not take it; the next report goes to a new event file.
        """
        if not self._owns_writer and self._is_closed():
            # Writing would silently open a second event file beside the user's finished one.
            raise FeatureProbeError(
                f"the SummaryWriter given for {self.log_dir!r} has been closed: close it after "
                "the probe is detached"
            )
        due = self._remember(report)
        if self._has_failed:
            self._replace_writer()
        try:
            self._write_parts(report, due)
        except Exception:
            self._has_failed = self._owns_writer
            raise
        if self._patterns:
            self._check_matrices(report)

    def close(self) -> None:
        """Write what thinning held back of the last report; close our event file, flush theirs."""
        try:
            if self._latest is not None and not self._is_closed() and not self._has_failed:
                owed, self._owed = self._owed, []
                self._write_parts(self._latest, owed)
        finally:
            if self._owns_writer:
                self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The pictures' columns and how far thinning has come."""
        return {
            "thinning": self._thinning.state_dict(),
            "histories": {label: kept.state_dict() for label, kept in self._histories.items()},
            "states": self._states.state_dict(),
        }

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Make TensorBoard drop what it has of ``step`` and later, and draw on in the pictures.

        In our own event file only. A user's writer must be opened with ``purge_step=step``, as
        their own curves may count in something else than steps; if it was not, and the folder
        holds an earlier run, a warning says so.
        """
        if self._owns_writer:
            mark_restart(self._writer, step)
        elif not self._is_closed() and not follow_mark(self._writer):
            logger.warning(
                "the run in %s is resumed at step %d by a SummaryWriter without purge_step: "
                "TensorBoard will show later steps twice; open it with SummaryWriter(..., "
                "purge_step=%d)",
                self.log_dir, step, step,
            )  # fmt: skip
        self._laid_out, self._latest = (), None
        self._thinning = Thinning.from_state(state.get("thinning", {}))
        histories = state.get("histories", {})
        self._histories = {label: StepHistory.from_state(kept) for label, kept in histories.items()}
        states = state.get("states")
        self._states = StepHistory() if states is None else StepHistory.from_state(states)

    def _remember(self, report: Report) -> list[Part]:
        """Take the report into the pictures; the parts of it that are due."""
        for label, records in by_label(report).items():
            scores = {layer_name(r.layer): float(getattr(r, self._score)) for r in records}
            verdicts = {layer_name(r.layer): r.verdict for r in records}
            self._histories.setdefault(label, StepHistory()).add(report.step, scores, verdicts)
        if report.diagnoses:
            distances = stationarity_by_layer(report)
            numbers = {layer_name(layer): number for layer, number in distances.items()}
            states = {layer_name(found.layer): found.state for found in report.diagnoses}
            self._states.add(report.step, numbers, states)
        # Without matrices to draw, none are kept alive until the next picture.
        self._latest = report if self._patterns else replace(report, statistics={})
        due = self._thinning.next()
        self._owed = [part for part in PARTS if part not in due]
        return due

    def _write_parts(self, report: Report, parts: Iterable[Part]) -> None:
        if self._writes_layout and self._laid_out != report.labels:
            charts = custom_scalars_layout(report.labels, self._score)
            if self._charts_structure:
                charts |= structure_layout(report)
            self._writer.add_custom_scalars(charts)
            self._laid_out = report.labels
        write = {
            "scalars": self._write_scalars,
            "histograms": self._write_histograms,
            "pictures": self._write_pictures,
        }
        for part in parts:
            write[part](report)
        self._writer.flush()

    def _replace_writer(self) -> None:
        """Go on in a new event file: a writer whose thread has died refuses everything after."""
        with suppress(Exception):
            self._writer.close()
        self._writer = _open(self.log_dir)
        self._laid_out, self._has_failed = (), False

    def _write_scalars(self, report: Report) -> None:
        scalars = band_scalars(report, self._score) | structure_scalars(report)
        if self._layer_scalars:
            scalars |= layer_scalars(report, self._score)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, report.step)

    def _write_histograms(self, report: Report) -> None:
        for label, records in by_label(report).items():
            scores = [float(getattr(record, self._score)) for record in speaking(records)]
            self._write_histogram(label, scores, report.step)

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

    def _write_pictures(self, report: Report) -> None:
        """What is large and cumulative: the table, the heatmaps, the matrices."""
        text = summary_markdown(report, self._score)
        self._writer.add_text(f"{ROOT}/summary", text, report.step)
        pictures = {}
        for label, records in by_label(report).items():
            history = self._histories[label]
            pictures[f"{self._score}/{label}"] = heatmap_picture(records, history, self._score)
            pictures[f"verdict/{label}"] = verdict_picture(records, history)
        if report.diagnoses:
            pictures["state"] = state_picture(self._states)
        tags = {f"{ROOT}.heatmaps/{name}": picture for name, picture in pictures.items()}
        for tag, picture in (tags | sweep_pictures(report)).items():
            self._writer.add_image(tag, picture, report.step, dataformats="HWC")
        for layer in self._matrix_layers(report):
            matrices = matrix_picture(report, layer)
            if matrices is not None:
                tag = f"{ROOT}.matrices/{layer_name(layer).replace('/', '.')}"
                self._writer.add_image(tag, matrices, report.step, dataformats="HWC")

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
