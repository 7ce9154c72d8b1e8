"""What the estimators share: parameters, checked inputs, and the run over the iterations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from feature_probe.errors import ConfigurationError, FeatureProbeError, boolean, finite_number
from feature_probe.reports.record import Record
from feature_probe.reports.scoring import log_fault
from feature_probe.rfm.encoding import Columns, Place, plain
from feature_probe.rfm.features import Rescaling, Rule
from feature_probe.rfm.kernels import Kernel, KernelFunction, make_kernel
from feature_probe.rfm.machine import Iteration, Machine, Score, Settings, iterate, median_bandwidth
from feature_probe.rfm.reporting import report
from feature_probe.rfm.sklearn_base import HAS_SKLEARN, BaseEstimator
from feature_probe.rfm.solvers import Solver
from feature_probe.sinks.base import Sink
from feature_probe.sinks.outlets import Outlets
from feature_probe.theory.relations import parse_powers

if HAS_SKLEARN:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import validate_data

_GIB = 2**30
_BANDWIDTH = 10.0
_CATEGORIES = "give the indices of columns of names as categorical="
#: Called after each iteration; True ends the fit.
Callback = Callable[[Iteration], bool | None]


@dataclass(frozen=True)
class HistoryEntry:
    """What is kept of an iteration.

    Attributes:
        number: t; 0 is the plain kernel machine, W = I.
        validation_score: R² or accuracy on the validation points; None without them.
        seconds: The iteration took.
        solver: "cholesky" or "iterative".
        solver_residual: Relative residual of the iterative solution's worst column; 0 of a direct
            one.
        records: Agreement of M_t with FACT, √(FACT·FACTᵀ) and AGOPˢ; empty unless asked for.
        feature_matrix: M_t, ``[d, d]`` or ``[d]``; None unless asked for.
    """

    number: int
    validation_score: float | None
    seconds: float
    solver: str
    solver_residual: float
    records: Sequence[Record]
    feature_matrix: Any


class EstimatorBase(BaseEstimator):  # type: ignore[misc]
    """What regressor and classifier share; the parameters are RecursiveFeatureMachine's."""

    def __init__(
        self,
        update: Rule = "fact",
        kernel: str | Kernel | KernelFunction = "laplace",
        bandwidth: float | str | None = None,
        ridge: float = 1e-3,
        iterations: int = 5,
        *,
        power: float = 1.0,
        geometric_averaging: bool = False,
        rescale: Rescaling | None = None,
        diagonal: bool = False,
        categorical: Sequence[int] = (),
        validation_fraction: float = 0.0,
        patience: int | None = None,
        solver: Solver = "auto",
        memory: float = 4.0,
        tolerance: float = 1e-4,
        history: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
        progress: bool = False,
        device: Any = None,
        dtype: Any = None,
        random_state: int | None = 0,
    ) -> None:
        self.update = update
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.ridge = ridge
        self.iterations = iterations
        self.power = power
        self.geometric_averaging = geometric_averaging
        self.rescale = rescale
        self.diagonal = diagonal
        self.categorical = categorical
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.solver = solver
        self.memory = memory
        self.tolerance = tolerance
        self.history = history
        self.log_dir = log_dir
        self.sinks = sinks
        self.callbacks = callbacks
        self.progress = progress
        self.device = device
        self.dtype = dtype
        self.random_state = random_state

    # -- fitting ---------------------------------------------------------------------------------

    def _fit(
        self,
        x: Any,
        y: np.ndarray[Any, Any],
        validation: tuple[Any, Any] | None,
    ) -> None:
        """Run the iterations on checked inputs.

        Args:
            x: ``[n, columns]``.
            y: Targets, ``[n, c]``.
            validation: Checked inputs, and targets as :meth:`_score` takes them.
        """
        called: object = self.callbacks
        if not isinstance(called, Sequence) or not all(map(callable, called)):
            raise ConfigurationError(f"callbacks must be a sequence of functions, got {called!r}")
        for name in ("history", "progress"):
            boolean(name, getattr(self, name))
        place = Place.of(x, self.device, self.dtype)
        generator = self._generator()
        measured = bool(self.history or self.sinks or self.log_dir is not None)
        settings = self._settings(measured)
        self.columns_ = Columns.of(plain(x), self.categorical) if len(self.categorical) else None
        points = self._encoded(x, place)
        targets = place.tensor(y)
        held: tuple[Tensor, Score] | None = None
        if validation is not None:
            held = self._encoded(validation[0], place), lambda f: self._score(f, validation[1])
        kernel = self._kernel(points, generator)
        outlets = Outlets(self.log_dir, None, self.sinks, log_fault)
        outlets.open(0)
        self.history_: list[HistoryEntry] = []
        best: Iteration | None = None
        bar = tqdm(total=settings.iterations + 1, desc="RFM", disable=not self.progress)
        try:
            for iteration in iterate(
                settings, kernel, points, targets, validation=held, generator=generator
            ):
                records: Sequence[Record] = ()
                if measured:
                    found = report(iteration, settings, parse_powers((self.power,)))
                    outlets.write(found)
                    records = found.records
                self.history_.append(self._entry(iteration, records, place))
                score = iteration.validation_score
                if best is None or _better(score, best.validation_score):
                    best = iteration
                bar.update()
                if score is not None:
                    bar.set_postfix(validation=f"{score:.4f}")
                # every callback is called, whatever the others say
                said = [callback(iteration) for callback in self.callbacks]
                if any(isinstance(one, (bool, np.bool_)) and one for one in said):
                    break
        finally:
            bar.close()
            outlets.close()
        assert best is not None
        self.machine_: Machine = best.machine
        self.n_iter_ = best.number
        self.place_ = place
        self.feature_matrix_ = place.give_back(best.machine.features.matrix)

    def _entry(self, iteration: Iteration, records: Sequence[Record], place: Place) -> HistoryEntry:
        matrix = place.give_back(iteration.machine.features.matrix) if self.history else None
        return HistoryEntry(
            iteration.number,
            iteration.validation_score,
            iteration.seconds,
            iteration.solution.solver,
            iteration.solution.residual,
            records if self.history else (),
            matrix,
        )

    def _settings(self, measured: bool) -> Settings:
        finite_number("memory", self.memory, positive=True)
        return Settings(
            rule=self.update,
            power=self.power,
            geometric_averaging=self.geometric_averaging,
            rescaling=self.rescale,
            ridge=self.ridge,
            iterations=self.iterations,
            diagonal=self.diagonal,
            solver=self.solver,
            memory=int(self.memory * _GIB),
            tolerance=self.tolerance,
            patience=self.patience,
            measured=measured,
        )

    def _generator(self) -> torch.Generator:
        seed = self.random_state
        if seed is None:
            seed = int(np.random.default_rng().integers(2**31))
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise ConfigurationError(f"random_state must be an integer or None, got {seed!r}")
        return torch.Generator().manual_seed(int(seed))

    def _kernel(self, x: Tensor, generator: torch.Generator) -> Kernel:
        kernel, bandwidth = make_kernel(self.kernel), self.bandwidth
        if bandwidth is None:
            bandwidth = kernel.bandwidth if isinstance(self.kernel, Kernel) else _BANDWIDTH
        if bandwidth == "median":
            bandwidth = median_bandwidth(kernel, x, generator)
        try:
            finite_number("bandwidth", bandwidth, positive=True)
        except ConfigurationError:
            raise ConfigurationError(
                f'bandwidth must be a positive number, "median" or None; got {bandwidth!r}'
            ) from None
        return kernel.with_bandwidth(float(bandwidth))

    def _divided(
        self, x: Any, targets: np.ndarray[Any, Any], validation: tuple[Any, Any] | None
    ) -> tuple[Any, np.ndarray[Any, Any], tuple[Any, Any] | None]:
        """Points and targets to train on, and those given, or held out, to validate on."""
        if validation is not None:
            return x, targets, self._validation(validation)
        split = self._split(targets)
        if split is None:
            return x, targets, None
        train, apart = split
        return x[train], targets[train], (x[apart], targets[apart])

    def _validation(self, given: Any) -> tuple[Any, np.ndarray[Any, Any]]:
        """What was given as ``validation=``, checked."""
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ConfigurationError(
                "validation must be a pair: X and y of the points to choose by"
            )
        x, y = self._checked(given[0], reset=False), plain(given[1])
        if len(x) != len(y) or len(x) < 2:
            raise ConfigurationError(
                "validation must have as many rows of X as of y, and two of them at least; got "
                f"{len(x)} and {len(y)}"
            )
        return x, y

    def _held_out(self, targets: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
        """Whether each point is held out, ``[n]``, drawn at random."""
        count = len(targets)
        order = torch.randperm(count, generator=self._generator()).numpy()
        found = np.zeros(count, dtype=bool)
        found[order[: max(2, round(share * count))]] = True
        return found

    def _split(self, targets: np.ndarray[Any, Any]) -> tuple[Any, Any] | None:
        """Indices to train on and to validate on, of ``validation_fraction``."""
        share = self.validation_fraction
        finite_number("validation_fraction", share, positive=False)
        if share >= 1:
            raise ConfigurationError(f"validation_fraction must be in [0, 1), got {share!r}")
        if share == 0:
            if self.patience is not None:
                raise ConfigurationError(
                    "patience= needs validation points: give validation_fraction= or validation="
                )
            return None
        held = self._held_out(targets, share)
        for left, use in ((~held, "train on"), (held, "validate on")):
            if left.sum() < 2:
                raise ConfigurationError(
                    f"validation_fraction={share!r} of {len(targets)} points leaves fewer than 2 "
                    f"to {use}"
                )
        return np.flatnonzero(~held), np.flatnonzero(held)

    # -- inputs ----------------------------------------------------------------------------------

    def _checked(self, x: Any, reset: bool) -> Any:
        """X as ``[n, columns]``: a tensor as it is, anything else as an array."""
        chosen: object = self.categorical
        if isinstance(chosen, str) or not isinstance(chosen, (Sequence, np.ndarray)):
            raise ConfigurationError(f"categorical must be column indices, as [0]; got {chosen!r}")
        if isinstance(x, Tensor):
            return self._checked_plain(x, reset)
        if HAS_SKLEARN:
            kind = None if len(self.categorical) else [np.float64, np.float32]
            try:
                return validate_data(
                    self, x, reset=reset, dtype=kind, ensure_all_finite=kind is not None,
                    ensure_min_samples=2 if reset else 1,
                )  # fmt: skip
            except ValueError as error:
                if "could not convert string" in str(error):
                    raise ConfigurationError(f"{error}; {_CATEGORIES}") from None
                raise
        found = plain(x)
        if not len(self.categorical) and found.dtype not in (np.float32, np.float64):
            try:
                found = found.astype(float)
            except (TypeError, ValueError) as error:
                raise ConfigurationError(f"X must be numbers: {error}; {_CATEGORIES}") from None
        return self._checked_plain(found, reset)

    def _checked_plain(self, x: Any, reset: bool) -> Any:
        shape = tuple(x.shape)
        if len(shape) != 2:
            raise ConfigurationError(f"X must be two-dimensional, [n, d]; got shape {shape}")
        if shape[0] < (2 if reset else 1) or shape[1] < 1:
            least = 2 if reset else 1
            raise ConfigurationError(
                f"X has {shape[0]} sample(s) and {shape[1]} feature(s); at least {least} and 1 are "
                "required"
            )
        if isinstance(x, Tensor):
            if x.is_complex():
                raise ConfigurationError("Complex data not supported")
            finite = bool(x.isfinite().all())
        else:
            finite = x.dtype.kind in "OUS" or bool(np.isfinite(x).all())
        if not finite:
            raise ConfigurationError("X contains NaN or infinity")
        if reset:
            self.n_features_in_ = shape[1]
        elif shape[1] != self.n_features_in_:
            raise ConfigurationError(
                f"X has {shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return x

    def _encoded(self, x: Any, place: Place) -> Tensor:
        found = place.tensor(x if self.columns_ is None else self.columns_(plain(x)))
        if not bool(found.isfinite().all()):
            raise ConfigurationError("X contains NaN or infinity")
        return found

    # -- predictions -----------------------------------------------------------------------------

    def _values(self, x: Any) -> Tensor:
        """f at points, ``[m, c]``."""
        if not hasattr(self, "machine_"):
            raise _not_fitted(self)
        return self.machine_(self._encoded(self._checked(x, reset=False), self.place_))

    def _score(self, values: Tensor, targets: Any, weights: Any = None) -> float:
        raise NotImplementedError

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "machine_")


def _better(score: float | None, best: float | None) -> bool:
    """The later of two iterations is kept unless a score says otherwise."""
    return score is None or best is None or score > best


def _not_fitted(estimator: Any) -> Exception:
    message = f"this {type(estimator).__name__} is not fitted yet: call fit first"
    return NotFittedError(message) if HAS_SKLEARN else FeatureProbeError(message)
