"""The Trainer callback in real trainings, against the bare loop and against one without it."""

from __future__ import annotations

import builtins
import gc
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import OPTIONS, Kept, Outcome, assert_same_reports, assert_same_weights, hooks_of
from torch import Tensor
from torch.utils.data import DataLoader

from feature_probe import ConfigurationError, FeatureProbe
from feature_probe.sinks.scalars import to_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from feature_probe.integrations.transformers import (  # noqa: E402
    FeatureProbeCallback,
    model_output,
)

BATCH_SIZE, BATCHES, CLASSES = 4, 8, 3


class StopTrainingError(Exception):
    """Ends a training in the middle."""


def make_bert() -> Any:
    """A BERT of one layer in float64 that classifies, without dropout."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config).double()
    # Its loss does not use the count of labels in a step that Trainer would otherwise rely on
    # when it accumulates: with this, Trainer divides the loss.
    model.accepts_loss_kwargs = False
    return model


def make_data() -> list[dict[str, Tensor]]:
    """Sentences of five tokens with a class, always the same."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(20, (BATCH_SIZE * BATCHES, 5), generator=generator)
    labels = torch.randint(CLASSES, (BATCH_SIZE * BATCHES,), generator=generator)
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


class Trainer(transformers.Trainer):
    """The Trainer, with batches in the order of the data, stopped where a test says."""

    stop_at: int | None = None

    def get_train_dataloader(self) -> Any:
        """In order, so that the bare loop sees the same batches."""
        return self.accelerator.prepare(DataLoader(make_data(), batch_size=BATCH_SIZE))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise at the given step."""
        if self.state.global_step == self.stop_at:
            raise StopTrainingError
        return super().training_step(*args, **kwargs)


def make_trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A Trainer on the CPU with SGD, silent, that saves nothing unless asked."""
    settings = {
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "num_train_epochs": 1, "per_device_train_batch_size": BATCH_SIZE,
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "weight_decay": 1e-2, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    return Trainer(make_bert(), arguments, callbacks=list(callbacks))


def bare_loop(accumulate: int = 1) -> Outcome:
    """What the Trainer does, in PyTorch: decay on matrices, clipping, the loss over a step."""
    model, kept = make_bert(), Kept()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-2}, {"params": rest, "weight_decay": 0.0}], lr=0.1
    )
    options = OPTIONS | {"output": model_output, "sinks": [kept]}
    with FeatureProbe(model, optimizer=optimizer, **options):
        for i, batch in enumerate(DataLoader(make_data(), batch_size=BATCH_SIZE), start=1):
            (model(**batch).loss / accumulate).backward()
            if i % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return Outcome(model.state_dict(), kept.reports)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_is_the_bare_loop(tmp_path: Path, accumulate: int) -> None:
    """Weights are bitwise those without the callback, reports those of the bare loop."""
    options = {"gradient_accumulation_steps": accumulate}
    plain = make_trainer(tmp_path, **options)
    plain.train()
    kept = Kept()
    callback = FeatureProbeCallback(sinks=[kept], **OPTIONS)
    probed = make_trainer(tmp_path, callback, **options)
    probed.train()
    assert_same_weights(probed.model.state_dict(), plain.model.state_dict())
    expected = bare_loop(accumulate)
    for name, weight in expected.weights.items():
        assert torch.allclose(probed.model.state_dict()[name], weight, rtol=1e-12), name
    assert_same_reports(kept.reports, expected.reports)
    assert "bert.encoder.layer.0.intermediate.dense" in kept.reports[-1].layers
    assert callback.report is kept.reports[-1]


def test_nothing_remains_after_training(tmp_path: Path) -> None:
    """Hooks are off and sinks closed when train() returns, without the with statement."""
    kept = Kept()
    trainer = make_trainer(tmp_path, FeatureProbeCallback(sinks=[kept], **OPTIONS))
    before = hooks_of(trainer.model)
    trainer.train()
    assert hooks_of(trainer.model, trainer.optimizer.optimizer) == before
    assert kept.closed == 1


@pytest.mark.parametrize("step", [0, 3])
def test_nothing_remains_after_an_exception(tmp_path: Path, step: int) -> None:
    """An exception inside train() takes the hooks off at the end of the with statement."""
    trainer, kept = make_trainer(tmp_path), Kept()
    before = hooks_of(trainer.model)
    trainer.stop_at = step
    with FeatureProbeCallback(sinks=[kept], **OPTIONS) as callback:
        trainer.add_callback(callback)
        with pytest.raises(StopTrainingError):
            trainer.train()
    assert hooks_of(trainer.model, trainer.optimizer.optimizer) == before
    assert kept.closed == 1


def test_a_forgotten_callback_lets_go(tmp_path: Path) -> None:
    """Without the with statement, hooks go when the Trainer of a failed training does."""
    kept = Kept()
    trainer = make_trainer(tmp_path, FeatureProbeCallback(sinks=[kept], **OPTIONS))
    trainer.stop_at, model = 3, trainer.model
    with pytest.raises(StopTrainingError):
        trainer.train()
    assert kept.closed == 0
    del trainer
    gc.collect()
    assert kept.closed == 1
    assert hooks_of(model) == 0


def test_training_again_after_an_exception_detaches_the_old_probe(tmp_path: Path) -> None:
    """A second train() with the same callback ends the first probe and starts anew."""
    kept = Kept()
    trainer = make_trainer(tmp_path, FeatureProbeCallback(sinks=[kept], **OPTIONS))
    trainer.stop_at = 3
    with pytest.raises(StopTrainingError):
        trainer.train()
    trainer.stop_at = None
    trainer.train()
    assert [report.step for report in kept.reports] == [0, 2, 0, 2, 4, 6]
    assert (kept.closed, hooks_of(trainer.model)) == (2, 0)


def test_reports_go_where_the_trainer_reports_to(tmp_path: Path) -> None:
    """Through to_trainer, medians are in the log history and reach the other callbacks."""
    heard: list[dict[str, float]] = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """What TensorBoardCallback, WandbCallback and the others get."""
            heard.append(logs)

    trainer = make_trainer(tmp_path, Listener())
    with FeatureProbeCallback(sinks=[to_trainer(trainer)], **OPTIONS) as callback:
        trainer.add_callback(callback)
        trainer.train()
    tag = "feature_probe/nfa^0.5_median_cosine"
    found = [(row["step"], row[tag]) for row in trainer.state.log_history if tag in row]
    assert [step for step, _ in found] == [0, 2, 4, 6]
    assert [logs[tag] for logs in heard if tag in logs] == [value for _, value in found]


def test_another_process_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main process makes files and calls sinks; the others measure all the same."""
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda trainer: False)
    kept = Kept()
    callback = FeatureProbeCallback(log_dir=tmp_path / "run", sinks=[kept], **OPTIONS)
    make_trainer(tmp_path, callback).train()
    assert callback.report is not None
    assert kept.reports == []
    assert not (tmp_path / "run").exists()


def test_a_resumed_training_reports_like_one_not_stopped(tmp_path: Path) -> None:
    """Stopped in mid-window and resumed from the checkpoint, the same reports come."""
    options = {"save_strategy": "steps", "save_steps": 3}
    whole, first, second = Kept(), Kept(), Kept()
    make_trainer(
        tmp_path / "whole", FeatureProbeCallback(sinks=[whole], **OPTIONS), **options
    ).train()
    trainer = make_trainer(
        tmp_path / "run", FeatureProbeCallback(sinks=[first], **OPTIONS), **options
    )
    trainer.stop_at = 4
    with pytest.raises(StopTrainingError):
        trainer.train()
    resumed = make_trainer(
        tmp_path / "run", FeatureProbeCallback(sinks=[second], **OPTIONS), **options
    )
    resumed.train(resume_from_checkpoint=True)
    assert [report.step for report in first.reports] == [0, 2]
    assert_same_reports(first.reports + second.reports, whole.reports)


def test_a_checkpoint_without_our_state_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resuming a training that was not probed goes on, with a warning."""
    options = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, **options).train()
    kept = Kept()
    resumed = make_trainer(tmp_path, FeatureProbeCallback(sinks=[kept], **OPTIONS), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "training goes on at step 6, but there is no" in caplog.text
    assert [report.step for report in kept.reports] == [0]


def test_a_state_that_cannot_be_saved_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while our state is saved is logged, and training ends as ever."""
    save = torch.save

    def fail(state: Any, path: Any, *args: Any, **options: Any) -> None:
        if "feature_probe" in str(path):
            raise OSError(28, "No space left on device")
        save(state, path, *args, **options)

    monkeypatch.setattr(torch, "save", fail)
    trainer = make_trainer(
        tmp_path, FeatureProbeCallback(**OPTIONS), save_strategy="steps", save_steps=4
    )
    trainer.train()
    assert trainer.state.global_step == BATCHES
    assert "No space left on device" in caplog.text


def test_the_output_that_is_f() -> None:
    """Logits, else the last hidden state, else an error that names what there is."""
    x = torch.zeros(2, 3)
    assert model_output(x) is x
    assert model_output({"loss": x[0], "logits": x}) is x
    assert model_output({"last_hidden_state": x, "pooler_output": x[0]}) is x
    with pytest.raises(ConfigurationError, match="dict with start_logits, end_logits, and neither"):
        model_output({"start_logits": x, "end_logits": x})


def test_several_devices_in_one_process_are_refused(tmp_path: Path) -> None:
    """nn.DataParallel is refused before training, with the way round."""
    callback = FeatureProbeCallback()
    arguments = make_trainer(tmp_path).args
    arguments._n_gpu = 2
    state = transformers.TrainerState()
    with pytest.raises(ConfigurationError, match="start one process a device with torchrun"):
        callback.on_train_begin(arguments, state, transformers.TrainerControl())


def test_without_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Importing the integration names the extra."""
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "feature_probe.integrations.transformers")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install feature-probe\[transformers\]"):
        importlib.import_module("feature_probe.integrations.transformers")
