"""Hugging Face transformers: a callback that probes the model a Trainer trains.

::

    from feature_probe.integrations.transformers import FeatureProbeCallback
    from feature_probe.sinks.scalars import to_trainer

    trainer = Trainer(model, args, train_dataset=data)
    with FeatureProbeCallback(every=100, log_dir="runs/bert", sinks=[to_trainer(trainer)]) as probe:
        trainer.add_callback(probe)
        trainer.train()

The ``with`` is for exceptions only: a Trainer tells its callbacks when training begins and ends,
but not that it failed. ``Trainer(callbacks=[FeatureProbeCallback(...)])`` alone will do where an
exception ends the process anyway; else ``close()`` it, or train again, which does that too.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from feature_probe import ConfigurationError, FeatureProbe, Report

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "feature_probe.integrations.transformers needs transformers: "
        "pip install feature-probe[transformers]"
    ) from error

logger = logging.getLogger(__name__)

#: The fields of a model's output that can be f, the first that is there.
_OUTPUTS = ("logits", "last_hidden_state")


class FeatureProbeCallback(TrainerCallback):
    """Attaches a :class:`feature_probe.FeatureProbe` while a Trainer trains.

    The probe is made when training begins, on the model inside the Trainer's wrappers and the
    optimizer inside Accelerate's. Steps are the Trainer's: accumulated batches make one. The state
    is in the checkpoints, one small file a process, ``feature_probe_<process>.pt``.

    Attributes:
        probe: The probe of the latest ``train()``, or None before it.
    """

    def __init__(
        self, *, resume_from: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        """Remember how to probe.

        Args:
            resume_from: The checkpoint's folder, where ``resume_from_checkpoint`` names one outside
                the output folder; Trainer does not pass it on.
            options: Any option of :class:`feature_probe.FeatureProbe` but model and optimizer.
                ``output`` defaults to the logits, or the last hidden state.
        """
        self.probe: FeatureProbe | None = None
        self._resume_from = resume_from
        self._options: dict[str, Any] = {"output": model_output, **options}
        self._finalizer: weakref.finalize[[], FeatureProbeCallback] | None = None

    @property
    def report(self) -> Report | None:
        """The latest report, or None."""
        return None if self.probe is None else self.probe.report

    def __enter__(self) -> FeatureProbeCallback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off, if training ended without saying so."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the probe and attach it.

        Raises:
            ConfigurationError: for anything that cannot be probed as asked.
        """
        self.close()
        if args.n_gpu > 1:
            raise ConfigurationError(
                f"this Trainer runs copies of the model on {args.n_gpu} devices (nn.DataParallel), "
                "which the probe does not see; start one process a device with torchrun, or show "
                "it one device with CUDA_VISIBLE_DEVICES"
            )
        options = dict(self._options)
        if not state.is_world_process_zero:
            options |= {"log_dir": None, "writer": None, "sinks": ()}
        self.probe = FeatureProbe(kwargs["model"], optimizer=kwargs["optimizer"], **options)
        if state.global_step:
            self._resume(args, state)
        self.probe.attach()
        # Of the probe, not of this object, which must be free to go.
        self._finalizer = weakref.finalize(self, self.probe.detach)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the probe's state beside the Trainer's; a failure is logged and costs nothing."""
        if self.probe is None:
            return
        path = _state_file(_checkpoint(args, state), args)
        try:
            torch.save(self.probe.state_dict(), path)
        except (OSError, RuntimeError) as error:  # torch.save raises both for a full disk
            logger.warning("the probe's state was not saved to %s: %s", path, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the probe."""
        self.close()

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.probe is not None
        folder = Path(self._resume_from or _checkpoint(args, state))
        path = _state_file(folder, args)
        if path.is_file():
            self.probe.load_state_dict(torch.load(path, weights_only=True))
        else:
            logger.warning(
                "training goes on at step %d, but there is no %s: the probe counts from 0 "
                "(FeatureProbeCallback(resume_from=...) says where the checkpoint is)",
                state.global_step,
                path,
            )


def model_output(output: Any) -> Tensor:
    """f of a transformers model: its logits, else its last hidden state.

    Raises:
        ConfigurationError: for an output that has neither.
    """
    if isinstance(output, Tensor):
        return output
    fields: Mapping[str, Any] = output if isinstance(output, Mapping) else {}
    for name in _OUTPUTS:
        if isinstance(fields.get(name), Tensor):
            found: Tensor = fields[name]
            return found
    listed = ", ".join(fields) or "no names"
    raise ConfigurationError(
        f"the model returns a {type(output).__name__} with {listed}, and neither "
        f"{' nor '.join(_OUTPUTS)}; say which tensor is f: output=lambda output: ..."
    )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _state_file(folder: Path, args: TrainingArguments) -> Path:
    return folder / f"feature_probe_{args.process_index}.pt"
