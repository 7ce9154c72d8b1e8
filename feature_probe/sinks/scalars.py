"""Reports as plain numbers for any logger: Lightning's, Trainer's, Weights & Biases, MLflow.

One seam: ``log(numbers by tag, step)``. The tags are those of
:class:`~feature_probe.sinks.tensorboard.TensorBoardSink`; an undefined number has no entry, and
what is not applicable or trivial is in no median.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, Protocol

from feature_probe.errors import ConfigurationError
from feature_probe.reports.record import SCORES
from feature_probe.reports.report import Report
from feature_probe.sinks.series import ROOT, band_scalars, layer_scalars
from feature_probe.sinks.structure import structure_scalars

#: How much of a report is logged: medians over layers, their bands, chance levels and shares of
#: verdicts too, or also every layer's own scores.
Detail = Literal["medians", "bands", "layers"]
_DETAILS = ("medians", "bands", "layers")
#: Takes numbers by tag, its own to keep, and the step they belong to.
ScalarLog = Callable[[dict[str, float], int], object]
#: The axis of our curves in Weights & Biases.
WANDB_STEP = f"{ROOT}/step"


class ScalarSink:
    """Hands the numbers of every report to a function ``log(numbers by tag, step)``.

    ::

        FeatureProbe(model, optimizer=optimizer, sinks=[ScalarSink(my_logger.log)])

    Ready-made: :func:`to_lightning`, :func:`to_trainer`, :func:`to_wandb`, :func:`to_mlflow`.
    """

    def __init__(self, log: ScalarLog, *, detail: Detail = "bands", score: str = "cosine") -> None:
        """Remember the function.

        Args:
            log: Called once a report with a dictionary of floats and ``report.step``.
            detail: "medians" over layers, of scores and of how far training has come; "bands": also
                the 10th and 90th percentiles, chance levels, the trace-free cosine and shares of
                verdicts, and every layer's structure, if the report has it; "layers": also every
                layer's scores.
            score: "cosine", "pearson" or "trace_free_cosine".

        Raises:
            ConfigurationError: if ``log`` cannot be called, or for an unknown detail or score.
        """
        if not callable(log):
            raise ConfigurationError(f"log must be a function of (numbers, step), got {log!r}")
        if detail not in _DETAILS:
            raise ConfigurationError(
                f"unknown detail {detail!r}; choose from {', '.join(_DETAILS)}"
            )
        if score not in SCORES:
            raise ConfigurationError(f"unknown score {score!r}; choose from {', '.join(SCORES)}")
        self._log, self._detail, self._score = log, detail, score

    def write(self, report: Report) -> None:
        """Log one report; nothing where all of it is undefined."""
        numbers = report_scalars(report, self._detail, self._score)
        if numbers:
            self._log(numbers, report.step)

    def close(self) -> None:
        """Nothing to do: the logger belongs to whoever made it."""


def report_scalars(
    report: Report, detail: Detail = "bands", score: str = "cosine"
) -> dict[str, float]:
    """The numbers of a report by tag, as :class:`ScalarSink` logs them."""
    numbers = band_scalars(report, score)
    if detail == "medians":
        return {tag: value for tag, value in numbers.items() if tag.startswith(f"{ROOT}/")}
    numbers |= structure_scalars(report)
    return numbers | layer_scalars(report, score) if detail == "layers" else numbers


class LightningLogger(Protocol):
    """What is needed of a ``lightning.pytorch.loggers.Logger``."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> object:
        """Record metrics at a step."""


class Trainer(Protocol):
    """What is needed of a ``transformers.Trainer``."""

    def log(self, logs: dict[str, float]) -> object:
        """Hand numbers to everything in ``report_to``, at the trainer's present step."""


class WandbRun(Protocol):
    """What is needed of a ``wandb.Run``."""

    def define_metric(self, name: str, *, step_metric: str | None = None) -> Any:
        """Say which axis a metric is drawn over."""

    def log(self, data: dict[str, Any], *, step: int | None = None) -> object:
        """Record numbers, in a row of their own or in that of a step."""


def to_lightning(logger: LightningLogger, *, detail: Detail = "bands") -> ScalarSink:
    """A sink that writes to a Lightning logger (CSV, TensorBoard, MLflow, Weights & Biases, ...).

    :class:`feature_probe.integrations.lightning.FeatureProbeCallback` does this by itself for the
    trainer's loggers.

    Raises:
        ConfigurationError: if this is no Lightning logger.
    """
    log_metrics = _method(logger, "log_metrics", "a Lightning logger")
    return ScalarSink(lambda numbers, step: log_metrics(numbers, step=step), detail=detail)


def to_trainer(trainer: Trainer, *, detail: Detail = "medians") -> ScalarSink:
    """A sink that writes to whatever is in ``report_to`` of a Hugging Face Trainer.

    Through ``trainer.log``, which also prints and keeps in ``trainer.state.log_history`` what it
    is given: hence only the medians, unless more is asked for. The step is the trainer's.

    Raises:
        ConfigurationError: if this is no Trainer.
    """
    log = _method(trainer, "log", "a transformers.Trainer")
    return ScalarSink(lambda numbers, step: log(numbers), detail=detail)


def to_wandb(run: WandbRun, *, detail: Detail = "bands", shared_steps: bool = False) -> ScalarSink:
    """A sink that writes to a Weights & Biases run, online or offline: ``to_wandb(wandb.init())``.

    The curves have an axis of their own, ``feature_probe/step``, and every report is a row of its
    own, which moves the run's counter of rows on by one.

    Args:
        run: The run.
        detail: See :class:`ScalarSink`.
        shared_steps: For loops that log with ``run.log(..., step=optimizer steps)``: reports go to
            the rows of these steps. W&B drops what comes with a step below its counter: theirs,
            if reports have rows of their own.

    Raises:
        ConfigurationError: if this is no run.
    """
    log = _method(run, "log", "a wandb.Run")
    define = _method(run, "define_metric", "a wandb.Run")
    define(WANDB_STEP)
    define(f"{ROOT}*", step_metric=WANDB_STEP)

    def log_row(numbers: dict[str, float], step: int) -> None:
        log({**numbers, WANDB_STEP: step}, step=step if shared_steps else None)

    return ScalarSink(log_row, detail=detail)


def to_mlflow(run_id: str | None = None, *, detail: Detail = "bands") -> ScalarSink:
    """A sink that writes to an MLflow run, on a server or in local files.

    MLflow takes few signs in a name: what it does not take, as in ``nfa^0.5``, becomes ``_``.

    Args:
        run_id: The run; None is whichever is active when a report is written.
        detail: See :class:`ScalarSink`.

    Raises:
        ImportError: if MLflow is not installed.
    """
    try:
        import mlflow  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError as error:
        raise ImportError("to_mlflow() needs MLflow: pip install feature-probe[mlflow]") from error

    def log(numbers: dict[str, float], step: int) -> None:
        named = {re.sub(r"[^\w\-. :/]", "_", tag, flags=re.ASCII): n for tag, n in numbers.items()}
        mlflow.log_metrics(named, step=step, run_id=run_id)

    return ScalarSink(log, detail=detail)


def _method(owner: object, name: str, expected: str) -> Callable[..., object]:
    found = getattr(owner, name, None)
    if not callable(found):
        raise ConfigurationError(f"expected {expected}, got {owner!r}, which has no {name}()")
    return found  # type: ignore[no-any-return]
