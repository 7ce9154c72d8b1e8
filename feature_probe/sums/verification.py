"""Evidence for the self-test: the first steps of a training, with three sources for each gradient.

Of every layer and step: Ĝ = Σ gᵀh of its calls over the loss scale, P, what the optimizer got in
``param.grad``, and what the optimizer's step itself says (:mod:`feature_probe.sums.implied`). None
of them is made from another, so that a wrong factor in one shows. Numbers of a step wait for the
device; about 60 bytes an entry of the weights are held, on the CPU once the steps are over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from feature_probe.capture.sharding import is_sharded
from feature_probe.layers.targets import Discovery, Target
from feature_probe.sums.facts import StepFacts, step_facts
from feature_probe.sums.implied import Implied, Rule, wide
from feature_probe.sums.staging import Followed
from feature_probe.sums.stepping import StepScale, unwrap_optimizer


@dataclass
class LayerEvidence:
    """One layer's steps.

    Attributes:
        reason: Why Ĝ cannot be compared with P, or "".
        coarse: Whether its gradients are of less precision than float32 (autocast, TF32).
        dtype: Of the weight.
        steps: The numbers of each step.
        formed: Σ Ĝ ``[groups, d_out, d_in]``; these sums are float64 where the device has it.
        given: Σ P.
        weights: Σ W, before each step.
        sign: −1 where the optimizer maximises.
        implied: What the optimizer's steps say.
    """

    reason: str = ""
    coarse: bool = False
    dtype: torch.dtype = torch.float32
    steps: list[StepFacts] = field(default_factory=list)
    formed: Tensor | None = None
    given: Tensor | None = None
    weights: Tensor | None = None
    sign: float = 1.0
    implied: Implied = field(default_factory=Implied)

    def close(self) -> None:
        """No more steps: sums go to the CPU."""
        self.implied.close()
        for name in ("formed", "given", "weights"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.cpu())


class Evidence:
    """What the first steps show, layer by layer.

    Args:
        model: The probed module.
        discovery: Its measured layers.
        reduction: "mean" or "sum", as declared.
        wanted: Steps to follow; 0: none.

    Attributes:
        layers: By name.
        steps: Steps followed.
        fault: What failed inside; then nothing more is followed.
    """

    def __init__(self, model: nn.Module, discovery: Discovery, reduction: str, wanted: int) -> None:
        self.layers: dict[str, LayerEvidence] = {}
        self.steps = 0
        self.fault: Exception | None = None
        self._untold: Exception | None = None
        self.wanted = wanted
        self._model = model
        self._discovery = discovery
        #: the modules that hold each parameter, by its id
        self._holders: dict[int, list[tuple[str, nn.Module]]] = {}
        self._mean = reduction == "mean"
        self._open: dict[str, tuple[Target, Optimizer | None, Mapping[str, Any]]] = {}
        self._read = False

    @property
    def active(self) -> bool:
        """Whether the next step is to be followed."""
        return self.fault is None and self.steps < self.wanted

    def read(
        self,
        index: int,
        target: Target,
        formed: Tensor | None,
        followed: Followed,
        scale: StepScale,
        optimizer: Optimizer | None,
        group: Mapping[str, Any],
        unusable: str,
        problem: str,
    ) -> None:
        """A layer's gradients as its optimizer is about to use them.

        Args:
            index: Its number.
            target: The layer, with a parameter.
            formed: Ĝ ``[groups, d_out, d_in]``; None if no call of it delivered a gradient.
            followed: What else is known of the step's calls.
            scale: Of the step.
            optimizer: Which; None: there is none to be seen.
            group: Its group.
            unusable: Why the layer's own gradient is not that of its W, or "".
            problem: Why its calls may not all have been followed, if they were not; or "".
        """
        parameter = target.parameter
        if parameter is None or (scale.taken is not None and not bool(scale.taken)):
            return
        self._read = True
        layer = self.layers.setdefault(target.name, LayerEvidence())
        layer.reason = layer.reason or unusable or self._shared(target)
        if layer.reason or parameter.grad is None:
            return
        if formed is None or index in followed.missing:
            layer.reason = problem or "not all of its calls could be followed"
            return
        given = _unscaled(target.gradient_matrix(_dense(parameter.grad.detach())), scale)
        weight = target.matrix(parameter.detach())
        layer.coarse |= index in followed.coarse or _tf32(parameter)
        layer.dtype, layer.sign = parameter.dtype, -1.0 if group.get("maximize") else 1.0
        _add(layer, wide(formed), wide(given), wide(weight))
        by_example = self._mean_of_examples(followed, index)
        tensors = wide(formed), wide(given), wide(weight), by_example
        layer.steps.append(step_facts(*tensors, followed.reach[index], scale, followed))
        rule = Rule.of(optimizer, group)
        layer.implied.begin(rule, weight, _state(rule, target, optimizer))
        self._open[target.name] = target, optimizer, group

    def stop(self, error: Exception) -> None:
        """Gather no more, after a failure of the self-test's own."""
        self.fault = self._untold = error

    def stepped(self) -> None:
        """The optimizers have changed the weights.

        Raises:
            Exception: once, what failed inside since the last call.
        """
        read, self._read = self._read, False
        opened, self._open = self._open, {}
        fault, self._untold = self._untold, None
        if fault is not None:
            raise fault
        if not self.active:
            return
        for name, (target, optimizer, group) in opened.items():
            parameter = target.parameter
            if parameter is not None and optimizer is not None:
                weight = target.matrix(parameter.detach())
                rule = Rule.of(optimizer, group)
                self.layers[name].implied.end(weight, _state(rule, target, optimizer))
        self.steps += int(read)
        if self.steps >= self.wanted:
            self.finish()

    def missed(self) -> None:
        """A step ends that was not followed to its end."""
        self._open, self._read = {}, False
        for layer in self.layers.values():
            layer.implied.missed()

    def finish(self) -> None:
        """Follow no more steps."""
        self.wanted = self.steps
        for layer in self.layers.values():
            layer.close()

    def _shared(self, target: Target) -> str:
        """Why P holds more than this target's products, or ""."""
        parameter = target.parameter
        if parameter is None:
            return ""
        if is_sharded(parameter):
            return "its parameter is sharded: no process has the gradient whole"
        others = [
            other.name
            for other in self._discovery.targets
            if other is not target and other.parameter is parameter and _overlap(other, target)
        ]
        if others:
            return f"its parameter is used as {others[0]} too"
        own = {id(module) for module in target.modules}
        elsewhere = [name for name, module in self._held(parameter) if id(module) not in own]
        if elsewhere:
            return f"its parameter is shared with {elsewhere[0]}, which is not measured"
        used = self._discovery.not_followed(parameter)
        return f"its parameter is also used in {used}, which is not followed" if used else ""

    def _held(self, parameter: Tensor) -> list[tuple[str, nn.Module]]:
        if not self._holders:
            for name, module in self._model.named_modules():
                for held in module._parameters.values():
                    self._holders.setdefault(id(held), []).append((name, module))
        return self._holders.get(id(parameter), [])

    def _mean_of_examples(self, followed: Followed, index: int) -> Tensor | None:
        total = followed.weighted.get(index)
        if total is None or (self._mean and len(set(followed.sizes)) != 1):
            return None
        return wide(total) / sum(followed.sizes) if self._mean else wide(total)


def _add(layer: LayerEvidence, formed: Tensor, given: Tensor, weight: Tensor) -> None:
    if layer.formed is None or layer.given is None or layer.weights is None:
        layer.formed, layer.given, layer.weights = formed.clone(), given.clone(), weight.clone()
    else:
        layer.formed += formed
        layer.given += given
        layer.weights += weight


def _state(rule: Rule | str, target: Target, optimizer: Optimizer | None) -> Tensor | None:
    """The optimizer's momentum of a layer, as a matrix."""
    if isinstance(rule, str) or optimizer is None:
        return None
    state: Mapping[Any, Any] = optimizer.state
    held = state.get(target.parameter, {}).get(rule.state)
    return target.matrix(held.detach()) if isinstance(held, Tensor) else None


def _unscaled(gradient: Tensor, scale: StepScale) -> Tensor:
    plain = isinstance(scale.gradient, float) and scale.gradient == 1.0
    return gradient if plain else wide(gradient) / scale.gradient


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient


def _overlap(one: Target, other: Target) -> bool:
    if one.part is None or other.part is None:
        return True
    return one.part[0] < other.part[1] and other.part[0] < one.part[1]


def _tf32(parameter: Tensor) -> bool:
    """Whether its products may run in TF32, as convolutions on CUDA do by default."""
    return parameter.device.type == "cuda" and parameter.dtype != torch.float64


def wrapper_name(given: Any) -> str:
    """The class that an optimizer was given inside, the outermost; "" if it was given as it is."""
    listed = given if isinstance(given, (list, tuple)) else [given]
    wrapped = [held for held in listed if unwrap_optimizer(held) is not held]
    return type(wrapped[0]).__name__ if wrapped else ""
