"""The whole network as it was before training, run beside the one that is probed.

The double- and the PTK-centred NFA (C-NFA paper, App. B) compare each Jacobian J with J⁰, that of
the network at initialisation, at the same example and for the same vector v. W₀ of one layer says
nothing of it: all initial parameters and buffers are needed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from feature_probe.capture.passes import Call, ForwardPass, InitialPass, tensors_in
from feature_probe.capture.recorder import Recorder
from feature_probe.capture.shadow import ShadowPass, World
from feature_probe.capture.sharding import is_sharded
from feature_probe.errors import ConfigurationError
from feature_probe.layers.targets import Discovery, Selection
from feature_probe.models import plain_name
from feature_probe.sums.initial import Given, Store, given_state, without_prefix


class InitialNetwork:
    """A copy of a model as it was, whose passes are recorded.

    Args:
        model: The probed module, unwrapped.
        given: What it was: a state dict, a file of one, or the model itself; None: as it stands at
            :meth:`take`.
        include: As for the probe.
        exclude: Likewise.
        store: "device": beside the model; "cpu": in main memory, moved for each pass.
        inject_leaf: Whether frozen layers are measured too, as by ``measure``.

    Raises:
        ConfigurationError: if the model is sharded or cannot be copied, for ``store="half"``, and
            for a state dict that lacks a parameter or a buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Given = None,
        include: Selection = None,
        exclude: Selection = None,
        *,
        store: Store = "device",
        inject_leaf: bool = False,
    ) -> None:
        if store == "half":
            raise ConfigurationError(
                "double_centered_nfa and ptk_centered_nfa subtract two Jacobians, which float16 "
                "does not resolve: give initial_store='device' or 'cpu'"
            )
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ConfigurationError(
                "double_centered_nfa and ptk_centered_nfa need the whole initial network, which "
                "is not kept of sharded parameters (fully_shard)"
            )
        self._model, self._store, self._inject_leaf = model, store, inject_leaf
        self._selection = include, exclude
        self._copy: nn.Module | None = None
        self._recorder: Recorder | None = None
        self._targets: Discovery | None = None
        self._is_given = given is not None
        if given is not None:
            self._keep(given_copy(model, given))

    @property
    def module(self) -> nn.Module:
        """The network as it was.

        Raises:
            RuntimeError: before it is taken.
        """
        if self._copy is None:
            raise RuntimeError("the initial network was not taken yet")
        return self._copy

    def take(self) -> None:
        """Copy the model as it stands, unless what it was is known already."""
        if self._copy is None:
            self._keep(_copied(self._model))

    def state_dict(self) -> dict[str, Tensor]:
        """Its parameters and buffers by name; empty before it is taken."""
        return {} if self._copy is None else dict(self._copy.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The way back from :meth:`state_dict`; what was given to this object comes first."""
        if state and not self._is_given:
            self._keep(given_copy(self._model, state))

    def shadow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShadowPass:
        """A pass with these arguments, and the random state as it stands, for :meth:`follow`."""
        self._agree()
        return ShadowPass(self.module, args, kwargs)

    def follow(self, shadow: ShadowPass) -> InitialPass:
        """Run and record a pass; the caller releases it."""
        problem = shadow.problem()
        if problem is not None:
            return InitialPass(problem=problem)
        return self._record(shadow.run, shadow.aside)

    @contextlib.contextmanager
    def beside(self, batch: Any) -> Iterator[Callable[[Callable[[nn.Module], Any]], InitialPass]]:
        """For a batch that the caller runs himself: a function that runs it on the initial network.

        The random state is that of entering; the function takes what to do with a model, and
        returns the recorded pass, with the model's output as what that returned.
        """
        self._agree()
        world = World(self.module)
        inputs = [(tensor, tensor._version) for tensor in tensors_in(batch)]

        def run(work: Callable[[nn.Module], Any]) -> InitialPass:
            if any(tensor._version != version for tensor, version in inputs):
                return InitialPass(problem="the batch was modified in place by the model")

            def inside() -> Any:
                with world.entered():
                    return work(self.module)

            return self._record(inside, world.entered)

        yield run

    def _record(self, run: Callable[[], Any], aside: Callable[[], Any]) -> InitialPass:
        recorder, discovery = self._recorder, self._targets
        if recorder is None or discovery is None:
            raise RuntimeError("the initial network was not taken yet")
        recorder.begin(running=False)
        try:
            output = run()
        except BaseException:
            recorder.end(raised=True)
            raise
        forward = recorder.end()
        if forward is None:
            return InitialPass(problem="the initial network's pass could not be recorded")
        names = [target.name for target in discovery.targets]
        return InitialPass.of(forward, names, output, aside, self._put_back)

    def _put_back(self) -> None:
        """To where it is kept between passes; the graph of one holds what it needs."""
        if self._store == "cpu":
            self.module.to("cpu")

    def _keep(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = None
        self._copy = module.to("cpu") if self._store == "cpu" else module
        self._targets = Discovery(module, *self._selection)
        self._recorder = Recorder(
            module, self._targets, _Silent(), keep_inputs=False, inject_leaf=self._inject_leaf
        )

    def _agree(self) -> None:
        """Give the copy the model's device, its training flags and what of it is trained."""
        home = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        own = next((p.device for p in self.module.parameters()), home)
        if own != home:
            self.module.to(home)
        flags = {plain_name(name): m.training for name, m in self._model.named_modules()}
        for name, module in self.module.named_modules():
            module.training = flags.get(plain_name(name), module.training)
        trained = {plain_name(n): p.requires_grad for n, p in self._model.named_parameters()}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(trained.get(plain_name(name), parameter.requires_grad))


class _Silent:
    """Takes no notice of passes; what fails in a hook is raised to who asked for the pass."""

    def on_begin(self) -> None:
        """Nothing."""

    def on_forward(self, forward: ForwardPass, output: Any) -> None:
        """Nothing."""

    def on_backward(self, forward: ForwardPass) -> None:
        """Nothing."""

    def on_gradient(
        self, forward: ForwardPass, call: Call, gradient: Tensor, task: int | None = None
    ) -> None:
        """Nothing."""

    def on_unfollowed(self, reason: str) -> None:
        """Nothing."""

    def on_accumulated(self, parameter: Tensor | None) -> None:
        """Nothing."""

    def on_fault(self, error: Exception, where: str) -> None:
        """Raise it."""
        raise error


def given_copy(model: nn.Module, given: Given) -> nn.Module:
    """The model as it was, in modules of its own.

    Raises:
        ConfigurationError: if it cannot be copied, or if what was given lacks a parameter or a
            persistent buffer, or has one of another shape.
    """
    if isinstance(given, nn.Module):
        return _copied(given)
    copied = _copied(model)
    own = {plain_name(name): name for name in copied.state_dict()}
    found = {plain_name(name): value for name, value in given_state(given).items()}
    found = dict(without_prefix(found, list(own)))
    lacking = [name for name in own if name not in found]
    if lacking:
        raise ConfigurationError(
            "double_centered_nfa and ptk_centered_nfa need the whole initial network, and "
            f"initial_weights lacks {', '.join(lacking[:5])}"
            + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        )
    try:
        copied.load_state_dict({own[name]: found[name] for name in own})
    except RuntimeError as error:
        raise ConfigurationError(f"initial_weights does not fit the model: {error}") from error
    return copied


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the user's modules raise
        raise ConfigurationError(
            "double_centered_nfa and ptk_centered_nfa need a copy of the model as it was, and "
            f"copy.deepcopy(model) raised {type(error).__name__}: {error}"
        ) from error
