"""The Lightning callback in real fits, against the bare loop and against a fit without it."""

from __future__ import annotations

import builtins
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import (
    OPTIONS,
    Kept,
    assert_same_reports,
    assert_same_weights,
    bare_loop,
    hooks_of,
    make_batches,
    make_model,
    make_optimizer,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from feature_probe import ConfigurationError

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from feature_probe.integrations.lightning import (  # noqa: E402
    FeatureProbeCallback,
    find_network,
)

# Lightning walks batches with a function of PyTorch's that is on its way out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)


class StopFitError(Exception):
    """Ends a fit in the middle."""


class Module(lightning.LightningModule):
    """The network in one attribute, as most users write it."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.net = make_model()
        self._stop_at = stop_at

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross entropy of a batch."""
        if index == self._stop_at:
            raise StopFitError
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on all parameters."""
        return make_optimizer(self.net)


class Direct(Module):
    """Layers straight in the LightningModule, called through its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = self.net[0], self.net[1:]
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        """f."""
        return self.rest(self.first(x))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross entropy of a batch, through self(x)."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on all parameters."""
        return make_optimizer(self)


def fit(module: Any, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Any:
    """One epoch over the batches, with as little around it as Lightning allows."""
    settings = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})
    loader = DataLoader(make_batches(), batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_is_the_bare_loop(accumulate: int) -> None:
    """Weights are bitwise those of a fit without the callback, reports those of the bare loop."""
    plain, probed, kept = Module(), Module(), Kept()
    fit(plain, accumulate_grad_batches=accumulate)
    callback = FeatureProbeCallback(sinks=[kept], **OPTIONS)
    fit(probed, callback, accumulate_grad_batches=accumulate)
    assert_same_weights(probed.state_dict(), plain.state_dict())
    expected = bare_loop(accumulate)
    assert_same_weights(probed.net.state_dict(), expected.weights)
    assert_same_reports(kept.reports, expected.reports)
    assert callback.report is kept.reports[-1]


def test_a_module_that_is_the_network_itself() -> None:
    """Layers in the LightningModule itself, called as self(x), are measured alike."""
    kept = Kept()
    fit(Direct(), FeatureProbeCallback(sinks=[kept], **OPTIONS))
    assert kept.reports[-1].layers == ("first", "rest.2", "rest.4")
    ours = [record.cosine for report in kept.reports for record in report.records]
    theirs = [r.cosine for report in bare_loop().reports for r in report.records]
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_nothing_remains_after_a_fit() -> None:
    """Hooks are off and sinks closed when fit returns."""
    module, kept = Module(), Kept()
    before = hooks_of(module)
    trainer = fit(module, FeatureProbeCallback(sinks=[kept], **OPTIONS))
    assert hooks_of(module, *trainer.optimizers) == before
    assert kept.closed == 1


@pytest.mark.parametrize("step", [0, 3])
def test_nothing_remains_after_an_exception(step: int) -> None:
    """An exception in training_step takes the hooks off, and is the user's own."""
    module, kept = Module(stop_at=step), Kept()
    before = hooks_of(module)
    callback = FeatureProbeCallback(sinks=[kept], **OPTIONS)
    with pytest.raises(StopFitError):
        fit(module, callback)
    assert hooks_of(module) == before
    assert not callback.probe.is_attached
    assert kept.closed == 1


def test_a_callback_can_be_used_again() -> None:
    """A second fit with the same callback starts anew and reports alike."""
    kept = Kept()
    callback = FeatureProbeCallback(sinks=[kept], **OPTIONS)
    for _ in range(2):
        fit(Module(), callback)
    half = len(kept.reports) // 2
    assert_same_reports(kept.reports[:half], kept.reports[half:])


# The folder of the first half's checkpoint is that of the second half's.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_fit_reports_like_one_not_stopped(tmp_path: Path) -> None:
    """Stopped in mid-window and resumed from Lightning's checkpoint, the same reports come."""
    options = OPTIONS | {"every": 3, "window": 3}  # step 8, where the second epoch begins: mid
    whole, first, second = Kept(), Kept(), Kept()
    module = Module()
    fit(module, FeatureProbeCallback(sinks=[whole], **options), max_epochs=2)
    for kept, epochs, path in ((first, 1, None), (second, 2, tmp_path / "step=8.ckpt")):
        resumed = Module()
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        callback = FeatureProbeCallback(sinks=[kept], **options)
        fit(resumed, callback, keep, max_epochs=epochs, ckpt_path=path, enable_checkpointing=True)
    assert_same_weights(resumed.state_dict(), module.state_dict())
    assert [report.step for report in second.reports] == [9, 12, 15]
    assert_same_reports(first.reports + second.reports, whole.reports)


def test_states_of_several_callbacks_are_kept_apart() -> None:
    """Two callbacks for two networks have each its own place in a checkpoint."""
    keys = {FeatureProbeCallback(name).state_key for name in (None, "net", "other")}
    assert len(keys) == 3


def test_reports_go_to_the_trainers_loggers(tmp_path: Path) -> None:
    """A TensorBoardLogger gets the dashboard, another logger the numbers, without being asked."""
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    fit(Module(), FeatureProbeCallback(**OPTIONS), logger=loggers)
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    tag = "feature_probe/fact_median_cosine"
    assert [event.step for event in events.Scalars(tag)] == [0, 2, 4, 6]
    assert "feature_probe.heatmaps/cosine/fact" in events.Tags()["images"]
    header, *rows = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()
    assert tag in header.split(",")
    assert len(rows) == 4


def test_loggers_can_be_left_alone(tmp_path: Path) -> None:
    """With log=False nothing of ours is in the trainer's loggers."""
    logger = CSVLogger(tmp_path)
    callback = FeatureProbeCallback(log=False, **OPTIONS)
    fit(Module(), callback, logger=logger)
    assert callback.report is not None
    assert not (Path(logger.log_dir) / "metrics.csv").exists()


def test_another_process_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank zero makes files and calls sinks; the others measure all the same."""
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", False)
    kept = Kept()
    callback = FeatureProbeCallback(log_dir=tmp_path / "run", sinks=[kept], **OPTIONS)
    fit(Module(), callback, logger=CSVLogger(tmp_path / "csv"))
    assert callback.report is not None
    assert kept.reports == []
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_not_called_is_told_before_the_first_step() -> None:
    """training_step around the probed forward is an error, and no weight has changed."""

    class Around(Direct):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            """Goes around forward."""
            return nn.functional.cross_entropy(self.rest(self.first(batch[0])), batch[1])

    module = Around()
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match="never called the network that is probed"):
        fit(module, FeatureProbeCallback(**OPTIONS))
    assert_same_weights(module.state_dict(), weights)


def test_the_network_is_found_or_asked_for() -> None:
    """One child with all parameters, the module itself, a name, a function, or an error."""
    module = Module()
    assert find_network(module) is module.net
    assert find_network(module, "net.2") is module.net[2]
    assert find_network(module, lambda m: m.net[4]) is module.net[4]
    direct = Direct()
    assert find_network(direct) is direct
    with pytest.raises(ConfigurationError, match="has no module 'model'; it has net"):
        find_network(module, "model")
    module.other = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=r"several networks \(net, other\) and no forward"):
        find_network(module)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    """A network that no optimizer of the trainer's updates cannot be followed."""
    module = Module()
    module.frozen = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="none of the trainer's 1 optimizers holds"):
        fit(module, FeatureProbeCallback("frozen", **OPTIONS))


def test_without_lightning_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Importing the integration names the extra."""
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "feature_probe.integrations.lightning")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install feature-probe\[lightning\]"):
        importlib.import_module("feature_probe.integrations.lightning")
