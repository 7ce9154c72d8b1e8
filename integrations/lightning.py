"""Lightning: a callback that probes the network inside a LightningModule while it is fitted.

::

    from feature_probe.integrations.lightning import FeatureProbeCallback

    trainer = Trainer(callbacks=[FeatureProbeCallback()])
    trainer.fit(module, loader)

What it finds goes to the trainer's loggers, and to ``log_dir`` and ``sinks`` where given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from feature_probe import ConfigurationError, FeatureProbe, Report
from feature_probe.sinks import Sink, TensorBoardSink
from feature_probe.sinks.scalars import to_lightning

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
except ImportError as error:
    raise ImportError(
        "feature_probe.integrations.lightning needs Lightning: pip install feature-probe[lightning]"
    ) from error

#: Which module's forward pass is watched: its name in the LightningModule, or a function of that.
Network = str | Callable[[LightningModule], nn.Module] | None


class FeatureProbeCallback(Callback):
    """Attaches a :class:`feature_probe.FeatureProbe` while a model is fitted.

    The probe is made when training starts, with the optimizers that hold the network's parameters;
    its hooks come off at the end, after an exception and after an interrupt. Steps are optimizer
    steps: accumulated batches make one. Its state is in Lightning's checkpoints.

    Attributes:
        probe: The probe of the latest ``fit``, or None before it.
    """

    def __init__(self, network: Network = None, *, log: bool = True, **options: Any) -> None:
        """Remember what to probe, and how.

        Args:
            network: The module whose ``forward`` gives f: its name in the LightningModule, or a
                function of the LightningModule. None: the only child that has parameters; where
                there are several, the LightningModule itself, whose ``training_step`` must then
                call ``self(batch)``.
            log: Write to the trainer's loggers: the full dashboard to TensorBoardLogger, scalars to
                all others.
            options: Any option of :class:`feature_probe.FeatureProbe` but model and optimizer.
        """
        super().__init__()
        self.probe: FeatureProbe | None = None
        self._network = network
        self._log = log
        self._options = options
        self._resumed: dict[str, Any] = {}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._first_forward: RemovableHandle | None = None

    @property
    def report(self) -> Report | None:
        """The latest report, or None."""
        return None if self.probe is None else self.probe.report

    @property
    def state_key(self) -> str:
        """Callbacks for several networks of one module have each its own state."""
        return self._generate_state_key(network=str(self._network))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the probe and attach it.

        Raises:
            ConfigurationError: for anything that cannot be probed as asked.
        """
        network = find_network(pl_module, self._network)
        if network is pl_module and trainer.strategy.model is not pl_module:
            raise ConfigurationError(
                f"{type(trainer.strategy).__name__} calls training_step through the forward of "
                f"{type(pl_module).__name__}, so that this forward's output is no f; put the "
                "network into one attribute, self.net = ..., and probe that"
            )
        self._optimizers = _optimizers_of(network, trainer.optimizers)
        options = dict(self._options)
        sinks = [*self._loggers(trainer), *options.pop("sinks", ())]
        if not trainer.is_global_zero:
            sinks, options = [], options | {"log_dir": None, "writer": None}
        self.probe = FeatureProbe(network, optimizer=self._optimizers, sinks=sinks, **options)
        if self._resumed:
            self.probe.load_state_dict(self._resumed)
        self._first_forward = network.register_forward_pre_hook(self._on_first_forward)
        self.probe.attach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check before the first step that the network is the one that is trained.

        Raises:
            ConfigurationError: if ``training_step`` went around the network's ``forward``.
        """
        if self._first_forward is not None and any(optimizer is o for o in self._optimizers):
            raise ConfigurationError(
                f"{type(pl_module).__name__}.training_step never called the network that is probed "
                f"({self._network or 'found by itself'}), or only parts of it; say which module it "
                "calls: FeatureProbeCallback(network='name')"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the probe."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach the probe: what stops training must not leave hooks behind."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the probe, if nothing else has: the tuner stops without an exception."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The probe's state, for the checkpoint."""
        return self._resumed if self.probe is None else self.probe.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a checkpoint's state for the probe that is made when training starts."""
        self._resumed = dict(state_dict)

    def _on_first_forward(self, module: nn.Module, args: Any) -> None:
        self._forget_first_forward()

    def _forget_first_forward(self) -> None:
        if self._first_forward is not None:
            self._first_forward.remove()
            self._first_forward = None

    def _detach(self) -> None:
        self._forget_first_forward()
        self._resumed = {}
        if self.probe is not None:
            self.probe.detach()

    def _loggers(self, trainer: Trainer) -> list[Sink]:
        if not self._log or not trainer.is_global_zero:
            return []
        return [
            TensorBoardSink(writer=logger.experiment)
            if isinstance(logger, TensorBoardLogger)
            else to_lightning(logger)
            for logger in trainer.loggers
        ]


def find_network(module: LightningModule, network: Network = None) -> nn.Module:
    """The module whose forward pass is watched; see :class:`FeatureProbeCallback`.

    Raises:
        ConfigurationError: if there is none by that name, or none can be chosen without one.
    """
    if isinstance(network, str):
        names = [name for name, _ in module.named_modules()]
        if network not in names:
            listed = ", ".join(name for name in names if name and "." not in name)
            raise ConfigurationError(
                f"{type(module).__name__} has no module {network!r}; it has {listed}"
            )
        return module.get_submodule(network)
    if network is not None:
        return network(module)
    children = {name: child for name, child in module.named_children() if _has_parameters(child)}
    owned = sum(1 for child in children.values() for _ in child.parameters())
    if len(children) == 1 and owned == sum(1 for _ in module.parameters()):
        (only,) = children.values()
        if _is_callable(only):
            return only
    if _is_callable(module):
        return module
    raise ConfigurationError(
        f"{type(module).__name__} has several networks ({', '.join(children)}) and no forward() of "
        "its own; say which is probed: FeatureProbeCallback(network='name')"
    )


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_callable(module: nn.Module) -> bool:
    """Whether a module has a forward pass: containers of modules have none."""
    plain = (nn.Module.forward, LightningModule.forward)
    return type(module).forward not in plain


def _optimizers_of(
    network: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    owned = {id(parameter) for parameter in network.parameters()}
    found = [
        optimizer
        for optimizer in optimizers
        if any(id(p) in owned for group in optimizer.param_groups for p in group["params"])
    ]
    if not found:
        raise ConfigurationError(
            f"none of the trainer's {len(optimizers)} optimizers holds a parameter of the network "
            f"({type(network).__name__}) that is to be probed"
        )
    return found
