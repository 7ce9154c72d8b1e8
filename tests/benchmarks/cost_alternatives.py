"""The same statistics, or the nearest that a package has, by other code in the same run.

Some take the place of the loop's own forward and backward passes, others run beside them. Each has
a model of its own, in evaluation mode (per-example gradients do not go through BatchNorm's batch
statistics); so have the plain step and the probe that they are compared with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from cost_layers import power
from cost_models import Training
from cost_parts import WINDOW, probed
from cost_timing import Mode, interleaved, seconds
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import FeatureProbe

#: Outputs, and examples of a batch, for the straightforward code; None: all.
FITTING: Mapping[str, tuple[int, int | None]] = {
    "mlp": (10, None),
    "small": (10, None),
    "resnet18": (10, 2),
}
_DECAY = 5e-4
_POWER = 0.5


def prepared(name: str, examples: int | None = None) -> Training:
    """A training in evaluation mode without in-place activations, on a batch of so many."""
    training = Training(name)
    training.model.eval()
    for module in training.model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    training.batches = [(x[:examples], y[:examples]) for x, y in training.batches]
    return training


@dataclass(frozen=True)
class Alternative:
    """Other code that collects statistics.

    Attributes:
        title: What it is.
        collects: What it has in the end.
        package: What it comes from, "" if written here.
        beside: Whether the loop's own passes run too.
        make: Makes the collecting pass of a training; raises where it cannot run.
    """

    title: str
    collects: str
    package: str
    beside: bool
    make: Callable[[Training], Callable[[], object]]


def rows_of(module: nn.Module, out: Tensor) -> Tensor:
    """``[n, ..., d_out]`` or ``[n, ..., d_out, height, width]`` to ``[n·…·positions, d_out]``."""
    if isinstance(module, nn.Conv2d):
        out = out.movedim(-3, -1)
    return out.reshape(-1, out.shape[-1])


def _inputs(module: nn.Module, x: Tensor) -> Tensor:
    """h as ``[n·positions, d_in]``: patches of a convolution."""
    if isinstance(module, nn.Conv2d):
        size, pad, stride = module.kernel_size, module.padding, module.stride
        patches = F.unfold(x, size, padding=pad, stride=stride)  # type: ignore[arg-type]
        return patches.mT.reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])


class Straightforward:
    """Per-example Jacobians by torch.func, d_in × d_in matrices of every layer, dense ``eigh``.

    Args:
        training: What is measured.
        outputs: How many of the outputs, the first ones, are differentiated.
    """

    def __init__(self, training: Training, outputs: int) -> None:
        self._training, self._outputs = training, outputs
        self.layers = {t.name: t.module for t in FeatureProbe.targets(training.model)}
        self.matrices: dict[str, dict[str, Tensor]] = {}

    def __call__(self) -> None:
        """FACT, AGOP and eNFA of every layer, of one batch."""
        x, y = self._training.batches[0]
        inputs, zeros = self._forward(x)
        jacobian = torch.func.jacrev(lambda shift, one: self._output(shift, one)[: self._outputs])
        slope = torch.func.grad(
            lambda shift, one, label: F.cross_entropy(self._output(shift, one), label)
        )
        with torch.no_grad():  # of the parameters
            J = torch.func.vmap(jacobian, in_dims=(None, 0))(zeros, x)
            g = torch.func.vmap(slope, in_dims=(None, 0, 0))(zeros, x, y)
        for name, module in self.layers.items():
            W = module.weight.detach().flatten(1)
            along, down = (rows_of(module, one[name]) @ W for one in (J, g))
            self.matrices[name] = {
                "gram": W.T @ W,
                "fact": -(down.T @ inputs[name]) / (_DECAY * len(x)),
                "nfa": along.T @ along / len(x),
                "enfa": down.T @ down / len(x),
            }

    def report(self) -> dict[str, dict[str, float]]:
        """Cosines by layer and relation, powers by dense eigendecompositions."""
        return {name: dense_scores(found) for name, found in self.matrices.items()}

    def report_seconds(self) -> float:
        """:meth:`report` with one layer of each shape timed, and counted as often as it occurs."""
        spent: dict[int, float] = {}
        for found in self.matrices.values():
            if (size := len(found["gram"])) not in spent:
                spent[size] = seconds(
                    lambda found=found: dense_scores(found), self._training.device
                )
        return sum(spent[len(found["gram"])] for found in self.matrices.values())

    def _forward(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every layer's inputs, and a zero to be added to its output for one example."""
        inputs: dict[str, Tensor] = {}
        zeros: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                inputs[name] = _inputs(module, args[0])
                zeros[name] = torch.zeros_like(out[:1])

            return module.register_forward_hook(hook)

        handles = [keep(name, module) for name, module in self.layers.items()]
        with torch.no_grad():
            self._training.model(x)
        for handle in handles:
            handle.remove()
        return inputs, zeros

    def _output(self, shift: Mapping[str, Tensor], one: Tensor) -> Tensor:
        """f of one example, with something added to every layer's output."""
        handles = [
            module.register_forward_hook(lambda _, __, out, name=name: out + shift[name])
            for name, module in self.layers.items()
        ]
        try:
            out: Tensor = self._training.model(one[None])[0]
        finally:
            for handle in handles:
                handle.remove()
        return out


def dense_scores(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosines with WᵀW of d_in × d_in matrices."""
    gram = found["gram"]
    predicted = {
        "fact": found["fact"],
        "nfa^0.5": power(found["nfa"], _POWER, 1e-6),
        "enfa^0.5": power(found["enfa"], _POWER, 1e-6),
    }
    return {
        name: float((gram * one).sum() / (gram.norm() * one.norm()))
        for name, one in predicted.items()
    }


def _backpack(training: Training) -> Callable[[], object]:
    import backpack  # noqa: PLC0415  (only where it is installed)
    from backpack.extensions import BatchGrad  # noqa: PLC0415

    model = training.model
    # residual sums are in place, which the package's hooks allow in the converted graph alone
    model = backpack.extend(model, use_converter=not isinstance(model, nn.Sequential))
    loss_function = backpack.extend(nn.CrossEntropyLoss())
    x, y = training.batches[0]

    def work() -> None:
        training.optimizer.zero_grad()
        with backpack.backpack(BatchGrad()):
            loss_function(model(x), y).backward()
        training.optimizer.step()

    return work


def _opacus(training: Training) -> Callable[[], object]:
    from opacus import GradSampleModule  # noqa: PLC0415  (only where it is installed)

    model = GradSampleModule(training.model.train())
    x, y = training.batches[0]

    def work() -> None:
        training.optimizer.zero_grad()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        training.optimizer.step()

    return work


def _curvlinops(training: Training) -> Callable[[], object]:
    from curvlinops import KFACLinearOperator  # noqa: PLC0415  (only where it is installed)

    weights = [
        parameter
        for target in FeatureProbe.targets(training.model)
        for parameter in target.module.parameters(recurse=False)
    ]

    def work() -> None:
        operator = KFACLinearOperator(
            training.model, nn.CrossEntropyLoss(), weights, [training.batches[0]],
            check_deterministic=False, fisher_type="mc",
        )  # fmt: skip
        operator.compute_kronecker_factors()

    return work


def _kronfluence(training: Training) -> Callable[[], object]:
    from kronfluence.analyzer import prepare_model  # noqa: PLC0415  (only where it is installed)
    from kronfluence.arguments import FactorArguments  # noqa: PLC0415
    from kronfluence.factor.covariance import (  # noqa: PLC0415
        fit_covariance_matrices_with_loader,
    )
    from kronfluence.task import Task  # noqa: PLC0415
    from kronfluence.utils.state import State  # noqa: PLC0415

    class Sampled(Task):  # type: ignore[misc]
        """Labels drawn from what the model says, as for the true Fisher matrix."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            """The summed loss."""
            out = model(batch[0])
            with torch.no_grad():
                drawn = torch.multinomial(out.softmax(-1), 1).flatten()
            return F.cross_entropy(out, drawn if sample else batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            """Not asked for."""
            raise NotImplementedError

    task = Sampled()
    model = prepare_model(training.model, task)

    def work() -> None:
        fit_covariance_matrices_with_loader(
            model, State(cpu=True), task, [training.batches[0]], FactorArguments(),
            disable_tqdm=True,
        )  # fmt: skip

    return work


PACKAGES: Mapping[str, Alternative] = {
    "backpack": Alternative(
        "BackPACK, BatchGrad", "per-example weight gradients", "backpack-for-pytorch", False,
        _backpack,
    ),
    "opacus": Alternative(
        "Opacus, GradSampleModule", "per-example weight gradients", "opacus", False, _opacus
    ),
    "curvlinops": Alternative(
        "curvlinops, KFAC", "hhᵀ and one sampled ggᵀ", "curvlinops-for-pytorch", True, _curvlinops
    ),
    "kronfluence": Alternative(
        "Kronfluence, covariances", "hhᵀ and one sampled ggᵀ", "kronfluence", True, _kronfluence
    ),
}  # fmt: skip


def _mode(work: Callable[[], object], training: Training) -> Mode:
    return Mode(lambda: seconds(work, training.device), WINDOW - 1)


def _references(name: str, examples: int | None) -> dict[str, Mode]:
    """A plain step and the probe's, on the same batch; the probe's last step has the report."""
    plain, ours = prepared(name, examples), prepared(name, examples)
    probed(ours, window=WINDOW, every=lambda step: step % (WINDOW + 1) == WINDOW)
    return {
        "plain": _mode(plain.step, plain),
        "feature_probe": Mode(lambda: seconds(ours.step, ours.device), WINDOW),
    }


def alternatives(
    name: str, rounds: int, limit: float, packages: Sequence[str] = tuple(PACKAGES)
) -> dict[str, Any]:
    """Seconds of every alternative on a model, and why those missing are.

    Args:
        name: In :data:`FITTING`.
        rounds: Interleaved rounds.
        limit: Seconds, half of them for the straightforward code.
        packages: In :data:`PACKAGES`.
    """
    modes, left_out = _references(name, None), {}
    for package in packages:
        training = prepared(name)
        try:
            work = PACKAGES[package].make(training)
            work()
        except Exception as error:  # of whatever kind: it is told, and the others are timed
            left_out[package] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        else:
            modes[package] = _mode(work, training)
    return {
        "seconds": interleaved(modes, rounds, limit / 2),
        "left_out": left_out,
        "versions": {p: version(PACKAGES[p].package) for p in packages if p not in left_out},
        "straightforward": straightforward(name, rounds, limit / 2),
    }


def straightforward(name: str, rounds: int, limit: float) -> dict[str, Any]:
    """Seconds of :class:`Straightforward` beside the probe's on as many examples."""
    outputs, examples = FITTING[name]
    training = prepared(name, examples)
    work = Straightforward(training, outputs)
    modes = _references(name, examples) | {"straightforward": _mode(work, training)}
    return {
        "outputs": outputs,
        "examples": len(training.batches[0][0]),
        "seconds": interleaved(modes, rounds, limit),
        "report": work.report_seconds(),
    }


def quietly() -> None:
    """Warnings of other people's packages, and of what they make torch do, are not ours to fix."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
    for package in ("opacus", "backpack", "curvlinops", "kronfluence", "torch", "einconv"):
        warnings.filterwarnings("ignore", module=package)
