"""Algorithm 1 of the FACT paper on tensors: solve, form the matrices, update W, and again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, boolean, finite_number
from feature_probe.rfm.features import (
    RULES,
    FeatureMap,
    FeatureSums,
    Rescaling,
    Rule,
    blocks,
    feature_sums,
    next_features,
)
from feature_probe.rfm.kernels import Kernel
from feature_probe.rfm.solvers import SOLVERS, Solution, Solver, solve

_MEDIAN_OF = 1000
#: k that still tells of likeness, and of how many points that is asked.
_ALIKE, _ALIKE_OF = 1e-6, 200


@dataclass(frozen=True)
class Settings:
    """What an RFM does, checked.

    Attributes:
        rule: See :func:`feature_probe.rfm.next_features`.
        power: s of "nfa".
        geometric_averaging: Of "fact".
        rescaling: Of M between iterations.
        ridge: λ ≥ 0.
        iterations: T, updates of W.
        diagonal: Whether M is diagonal.
        solver: Which.
        memory: Bytes.
        tolerance: Of the iterative solver.
        patience: Iterations without a better validation score after which to stop; None: never.
        measured: Whether both FACT and AGOP are formed at every iteration, the last included.
    """

    rule: Rule
    power: float = 1.0
    geometric_averaging: bool = False
    rescaling: Rescaling | None = None
    ridge: float = 1e-3
    iterations: int = 5
    diagonal: bool = False
    solver: Solver = "auto"
    memory: int = 2**32
    tolerance: float = 1e-4
    patience: int | None = None
    measured: bool = False

    def __post_init__(self) -> None:
        _one_of("update", self.rule, RULES)
        _one_of("solver", self.solver, SOLVERS)
        _one_of("rescale", self.rescaling, (None, "trace", "max"))
        finite_number("power", self.power, positive=True)
        finite_number("ridge", self.ridge, positive=False)
        finite_number("tolerance", self.tolerance, positive=True)
        finite_number("memory", self.memory, positive=True)
        _count("iterations", self.iterations, least=0)
        for name in ("geometric_averaging", "diagonal"):
            boolean(name, getattr(self, name))
        # of "none" all is allowed: it is the baseline of the same settings
        if self.geometric_averaging and self.rule not in ("fact", "none"):
            raise ConfigurationError(
                f'geometric_averaging=True is of update="fact"; update is {self.rule!r}'
            )
        if self.power != 1 and self.rule not in ("nfa", "none"):
            raise ConfigurationError(f'power= is of update="nfa"; update is {self.rule!r}')
        if self.patience is not None:
            _count("patience", self.patience, least=1)


@dataclass(frozen=True)
class Machine:
    """A kernel machine on mapped points.

    Attributes:
        kernel: k.
        features: W.
        x: Training points, ``[n, d]``.
        dual: α, ``[n, c]``.
        memory: Bytes that a block of kernel values may take.
    """

    kernel: Kernel
    features: FeatureMap
    x: Tensor
    dual: Tensor
    memory: int

    def __call__(self, x: Tensor) -> Tensor:
        """f at points ``[m, d]``, to ``[m, c]``."""
        found = x.new_empty(len(x), self.dual.shape[1])
        own = self.features(self.x)
        for rows in blocks(len(x), len(own), x.dtype, self.memory):
            found[rows] = self.kernel.values(self.features(x[rows]), own) @ self.dual
        return found


@dataclass(frozen=True)
class Iteration:
    """One iteration of an RFM: the machine at W_t, before W is updated.

    Attributes:
        number: t, from 0: the plain kernel machine.
        machine: The predictor f_t.
        sums: FACT's and AGOP's sums, as far as the update, or ``measured``, asks for them.
        solution: How α was found.
        validation_score: Score on the validation points, None without them.
        seconds: Solving, scoring and the sums took; the update of W, d × d algebra, is not in it.
    """

    number: int
    machine: Machine
    sums: FeatureSums
    solution: Solution = field(repr=False)
    validation_score: float | None
    seconds: float

    @property
    def fact(self) -> Tensor:
        """FACT, ``[d, d]`` or ``[d]``."""
        return self.sums.fact(self.machine.features)

    @property
    def agop(self) -> Tensor:
        """AGOP, ``[d, d]`` or ``[d]``."""
        return self.sums.agop(self.machine.features)


#: A score of predictions ``[m, c]``, higher is better.
Score = Callable[[Tensor], float]


def iterate(
    settings: Settings,
    kernel: Kernel,
    x: Tensor,
    targets: Tensor,
    *,
    validation: tuple[Tensor, Score] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Iteration]:
    """Algorithm 1 (FACT paper, §4.1): T updates, T + 1 machines.

    Args:
        settings: What is done.
        kernel: k.
        x: Training points, ``[n, d]``.
        targets: Y, ``[n, c]``, in the same dtype on the same device.
        validation: Points ``[m, d]``, and how predictions there are scored.
        generator: For the iterative solver, on the CPU.

    Yields:
        Every iteration as it is done; it ends early where the validation score has not grown for
        ``patience`` iterations.
    """
    origin = x.mean(0) if kernel.form == "distance" else None
    features = FeatureMap.identity(x.shape[1], settings.diagonal, x, origin)
    best, since = -float("inf"), 0
    isolated = False
    for number in range(settings.iterations + 1):
        start = time.perf_counter()
        solution = solve(
            kernel,
            features(x),
            targets,
            settings.ridge,
            solver=settings.solver,
            memory=settings.memory,
            tolerance=settings.tolerance,
            generator=generator,
        )
        machine = Machine(kernel, features, x, solution.dual, settings.memory)
        if number > 0 and not isolated and _isolated(kernel, features, x):
            isolated = True
            warnings.warn(
                f"iteration {number}: M has grown until the kernel sees no two points as alike, so "
                "that predictions away from the training points are 0; standardise y, or take "
                'rescale="trace" or another bandwidth',
                RuntimeWarning,
                stacklevel=4,
            )
        score = None if validation is None else validation[1](machine(validation[0]))
        sums = _sums(settings, machine, last=number == settings.iterations)
        yield Iteration(number, machine, sums, solution, score, time.perf_counter() - start)
        if score is not None:
            best, since = (score, 0) if score > best else (best, since + 1)
            if settings.patience is not None and since >= settings.patience:
                return
        if number < settings.iterations:
            features = next_features(
                settings.rule,
                features,
                sums,
                power=settings.power,
                geometric_averaging=settings.geometric_averaging,
                rescaling=settings.rescaling,
            )


def _sums(settings: Settings, machine: Machine, last: bool) -> FeatureSums:
    rule = settings.rule
    return feature_sums(
        machine.kernel,
        machine.features,
        machine.x,
        machine.dual,
        fact=settings.measured or (rule.startswith("fact") and not last),
        agop=settings.measured or (rule == "nfa" and not last),
        memory=settings.memory,
    )


def _isolated(kernel: Kernel, features: FeatureMap, x: Tensor) -> bool:
    """Whether half of some points have no other among them with k above 1e-6."""
    if kernel.form != "distance":
        return False
    some = features(x[:: max(1, len(x) // _ALIKE_OF)])
    values = kernel.values(some, some).fill_diagonal_(0)
    return float(values.amax(1).median()) < _ALIKE


def median_bandwidth(kernel: Kernel, x: Tensor, generator: torch.Generator | None) -> float:
    """The median distance of two different training points, of a thousand of them at most.

    Raises:
        ConfigurationError: if more than half of all pairs coincide.
    """
    chosen = x[torch.randperm(len(x), generator=generator)[:_MEDIAN_OF].to(x.device)]
    centred = chosen - chosen.mean(0)
    distances = kernel.distance(centred, centred)
    above = torch.ones_like(distances, dtype=torch.bool).triu_(1)
    pairs = distances[above]
    found = float(pairs.median()) if len(pairs) else 0.0
    if found <= 0:
        raise ConfigurationError(
            'bandwidth="median": at least half of all pairs of points coincide; give a number'
        )
    return found


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        shown = ", ".join(repr(one) for one in known)
        raise ConfigurationError(f"{name} must be one of {shown}; got {value!r}")


def _count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigurationError(f"{name} must be an integer of at least {least}, got {value!r}")
