"""Recursive Feature Machines as estimators, in scikit-learn's manner."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from feature_probe.errors import ConfigurationError, FeatureProbeError
from feature_probe.reports.record import Record
from feature_probe.rfm.base import HAS_SKLEARN, BaseEstimator, ClassifierMixin, RegressorMixin
from feature_probe.rfm.encoding import Columns, LabelEncoding, Place, encoded_labels, plain
from feature_probe.rfm.features import Rescaling, Rule
from feature_probe.rfm.kernels import Kernel, KernelFunction, make_kernel
from feature_probe.rfm.machine import Iteration, Machine, Score, Settings, iterate, median_bandwidth
from feature_probe.rfm.reporting import report
from feature_probe.rfm.solvers import Solver
from feature_probe.sinks.base import Sink
from feature_probe.sinks.outlets import Outlets
from feature_probe.theory.relations import parse_powers

if HAS_SKLEARN:
    from sklearn.utils.validation import validate_data

_GIB = 2**30
_BANDWIDTH = 10.0
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
        solver_residual: Relative residual of the iterative solution; 0 of a direct one.
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


class _RecursiveFeatureMachine(BaseEstimator):  # type: ignore[misc]
    """What regressor and classifier share."""

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
        random_state: int = 0,
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
        place: Place,
        validation: tuple[Any, Any] | None,
    ) -> None:
        """Run the iterations on checked inputs.

        Args:
            x: ``[n, columns]``.
            y: Targets, ``[n, c]``.
            place: Where.
            validation: Checked inputs, and targets as :meth:`_score` takes them.
        """
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
        outlets = Outlets(self.log_dir, None, self.sinks, _raise)
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
                if best is None or score is None or score > (best.validation_score or -np.inf):
                    best = iteration
                bar.update()
                if score is not None:
                    bar.set_postfix(validation=f"{score:.4f}")
                # every callback is called, whatever the others say
                if any([callback(iteration) for callback in self.callbacks]):  # noqa: C419
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
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise ConfigurationError(f"random_state must be an integer, got {seed!r}")
        return torch.Generator().manual_seed(int(seed))

    def _kernel(self, x: Tensor, generator: torch.Generator) -> Kernel:
        kernel, bandwidth = make_kernel(self.kernel), self.bandwidth
        if bandwidth is None:
            bandwidth = kernel.bandwidth if isinstance(self.kernel, Kernel) else _BANDWIDTH
        if bandwidth == "median":
            bandwidth = median_bandwidth(kernel, x, generator)
        if not isinstance(bandwidth, (int, float)) or isinstance(bandwidth, bool):
            raise ConfigurationError(
                f'bandwidth must be a positive number, "median" or None, got {bandwidth!r}'
            )
        return kernel.with_bandwidth(float(bandwidth))

    def _split(self, count: int, labels: np.ndarray[Any, Any] | None) -> tuple[Any, Any] | None:
        """Indices to train on and to validate on, of ``validation_fraction``."""
        share = self.validation_fraction
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ConfigurationError(f"validation_fraction must be in [0, 1), got {share!r}")
        if share == 0:
            if self.patience is not None:
                raise ConfigurationError(
                    "patience= needs validation points: give validation_fraction= or validation="
                )
            return None
        order = torch.randperm(count, generator=self._generator()).numpy()
        held = max(1, round(share * count))
        if count - held < 2:
            raise ConfigurationError(
                f"validation_fraction={share!r} of {count} points leaves fewer than 2 to train on"
            )
        return order[held:], order[:held]

    # -- inputs ----------------------------------------------------------------------------------

    def _checked(self, x: Any, reset: bool) -> Any:
        """X as ``[n, columns]``: a tensor as it is, anything else as an array."""
        if isinstance(x, Tensor):
            return self._checked_plain(x, reset)
        if HAS_SKLEARN:
            kind = None if len(self.categorical) else [np.float64, np.float32]
            return validate_data(
                self, x, reset=reset, dtype=kind, ensure_all_finite=kind is not None,
                ensure_min_samples=2 if reset else 1,
            )  # fmt: skip
        found = plain(x)
        if not len(self.categorical) and found.dtype not in (np.float32, np.float64):
            try:
                found = found.astype(float)
            except (TypeError, ValueError) as error:
                raise ConfigurationError(f"X must be numbers: {error}") from None
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

    def _score(self, values: Tensor, targets: Any) -> float:
        raise NotImplementedError

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "machine_")


class RecursiveFeatureMachine(RegressorMixin, _RecursiveFeatureMachine):  # type: ignore[misc]
    """Kernel ridge regression that learns its features (FACT paper, §4; Algorithm 1).

    f(x) = Σ_j k(Wx, Wx_j) α_j with α = (K + nλI)⁻¹Y; W starts at the identity and is updated
    ``iterations`` times. Works on NumPy arrays and on tensors, on the device and in the dtype of
    the inputs (float32 and float64), and gives back what it was given. An estimator in
    scikit-learn's manner; without scikit-learn installed it works by itself, but for ``clone`` and
    searches over parameters.

    Args:
        update: "fact": W ← (FACT·FACTᵀ)^{1/4}; "nfa": W ← AGOP^{s/2}; "fact_inner_product":
            M ← (FACT·M)^{1/2}, for kernels of the inner product (§5); "none": plain kernel ridge
            regression.
        kernel: "laplace", "gaussian", "lp_exponential", "quadratic", "exponential"; a
            :class:`Kernel`, for its other parameters; or a function of ``u/L [n, d]`` and
            ``v/L [m, d]`` to ``[n, m]``, differentiated by autograd.
        bandwidth: L, as kernels.py defines it; "median": the median distance of training points;
            None: 10, or the kernel's own where a :class:`Kernel` is given.
        ridge: λ ≥ 0. nλ is added to K's diagonal: a package whose ``reg`` is added as it is has
            reg = nλ.
        iterations: T, updates of W: T + 1 machines are solved for.
        power: s of "nfa"; s = 1 on tabular data, 1/2 in §5.
        geometric_averaging: With "fact": W ← (FACT·M·M·FACTᵀ)^{1/8} (§4.2), steadier.
        rescale: Divide M between iterations by tr(M)/d ("trace") or its largest entry ("max"); not
            part of Algorithm 1.
        diagonal: Weigh features only: M is diagonal.
        categorical: Columns that hold categories: each becomes columns of zeros and ones; a
            category not seen in training becomes zeros.
        validation_fraction: Share of the points, drawn at random, that is held out: the iteration
            that scores best there is kept. The paper finds that iterating past convergence becomes
            unstable on sparse parities.
        patience: Stop after so many iterations without a better score there.
        solver: "cholesky", "iterative" (preconditioned conjugate gradients), or "auto": the first
            where K twice fits in ``memory``.
        memory: GiB that arrays of n columns may take.
        tolerance: Relative residual of the iterative solver.
        history: Keep every M_t and its agreement with FACT and AGOP in ``history_``; both matrices
            are then formed at every iteration.
        log_dir: Folder for TensorBoard and JSON lines of those agreements, as of FeatureProbe.
        sinks: More places for them.
        callbacks: Called with each :class:`Iteration`; True ends the fit.
        progress: Show a bar.
        device: Where to compute; None: where the inputs are.
        dtype: float32 or float64; None: that of the inputs.
        random_state: Seed of the validation split, the median's sample and the iterative solver.

    Attributes:
        feature_matrix_: M = WᵀW, ``[d, d]``, or ``[d]`` where it is diagonal.
        machine_: The fitted :class:`Machine`.
        history_: One :class:`HistoryEntry` an iteration.
        n_iter_: Updates that led to the machine that is kept.
        n_features_in_: Columns of X.

    Raises:
        ConfigurationError: a ValueError, from ``fit``, for parameters or data that do not fit.
        FeatureProbeError: where the kernel matrix is singular or a matrix overflows.
    """

    def fit(
        self, X: Any, y: Any, *, validation: tuple[Any, Any] | None = None
    ) -> RecursiveFeatureMachine:
        """Fit.

        Args:
            X: ``[n, d]``.
            y: ``[n]``, or ``[n, c]`` for several outputs.
            validation: X and y of points to choose the iteration by.
        """
        if y is None:
            raise ConfigurationError("requires y to be passed, but the target y is None")
        x = self._inputs(X, y)
        targets = self._targets(y, len(x))
        self._flat = targets.ndim == 1
        wide = targets.reshape(len(targets), -1)
        place = Place.of(X if isinstance(X, Tensor) else x, self.device, self.dtype)
        held = None
        if validation is not None:
            held = self._checked(validation[0], reset=False), plain(validation[1])
        elif (split := self._split(len(x), None)) is not None:
            train, apart = split
            held = x[apart], targets[apart]
            x, wide = x[train], wide[train]
        self._fit(x, wide, place, held)
        return self

    def _inputs(self, X: Any, y: Any) -> Any:
        return self._checked(X, reset=True)

    def _targets(self, y: Any, count: int) -> np.ndarray[Any, Any]:
        found = plain(y)
        try:
            found = found.astype(float)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"y must be numbers: {error}") from None
        if found.ndim not in (1, 2) or len(found) != count:
            raise ConfigurationError(
                f"y must be [n] or [n, c] for n = {count} samples, got shape {found.shape}"
            )
        if not np.isfinite(found).all():
            raise ConfigurationError("y contains NaN or infinity")
        return found

    def predict(self, X: Any) -> Any:
        """f at points ``[m, d]``: ``[m]``, or ``[m, c]`` for several outputs."""
        found = self._values(X)
        return self.place_.give_back(found[:, 0] if self._flat else found, isinstance(X, Tensor))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², the mean over outputs; 1 is best."""
        return _r_squared(self._values(X), plain(y), sample_weight)

    def _score(self, values: Tensor, targets: Any) -> float:
        return _r_squared(values, targets, None)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class RecursiveFeatureMachineClassifier(ClassifierMixin, _RecursiveFeatureMachine):  # type: ignore[misc]
    """:class:`RecursiveFeatureMachine` on class labels: squared error, the largest output wins.

    One output a class, 1 for the own class and 0 ("one_hot") or −1 ("signed") for the others; two
    classes have two outputs as well.

    Args:
        label_encoding: "one_hot" or "signed". The others are those of
            :class:`RecursiveFeatureMachine`.

    Attributes:
        classes_: The labels, sorted. The others are those of :class:`RecursiveFeatureMachine`.
    """

    def __init__(
        self,
        update: Rule = "fact",
        kernel: str | Kernel | KernelFunction = "laplace",
        bandwidth: float | str | None = None,
        ridge: float = 1e-3,
        iterations: int = 5,
        *,
        label_encoding: LabelEncoding = "one_hot",
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
        random_state: int = 0,
    ) -> None:
        super().__init__(
            update, kernel, bandwidth, ridge, iterations, power=power,
            geometric_averaging=geometric_averaging, rescale=rescale, diagonal=diagonal,
            categorical=categorical, validation_fraction=validation_fraction, patience=patience,
            solver=solver, memory=memory, tolerance=tolerance, history=history, log_dir=log_dir,
            sinks=sinks, callbacks=callbacks, progress=progress, device=device, dtype=dtype,
            random_state=random_state,
        )  # fmt: skip
        self.label_encoding = label_encoding

    def fit(
        self, X: Any, y: Any, *, validation: tuple[Any, Any] | None = None
    ) -> RecursiveFeatureMachineClassifier:
        """Fit.

        Args:
            X: ``[n, d]``.
            y: Labels, ``[n]``: numbers or strings.
            validation: X and y of points to choose the iteration by.
        """
        if y is None:
            raise ConfigurationError("requires y to be passed, but the target y is None")
        if self.label_encoding not in ("one_hot", "signed"):
            raise ConfigurationError(
                f'label_encoding must be "one_hot" or "signed", got {self.label_encoding!r}'
            )
        x = self._checked(X, reset=True)
        labels = self._labels(y, len(x))
        place = Place.of(X if isinstance(X, Tensor) else x, self.device, self.dtype)
        held = None
        if validation is not None:
            held = self._checked(validation[0], reset=False), plain(validation[1])
        elif (split := self._split(len(x), labels)) is not None:
            train, apart = split
            held = x[apart], labels[apart]
            x, labels = x[train], labels[train]
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ConfigurationError(
                f"a classifier needs at least two classes to train on; all labels are one class, "
                f"{self.classes_[0]!r}"
            )
        self._fit(x, encoded_labels(labels, self.classes_, self.label_encoding), place, held)
        return self

    def _labels(self, y: Any, count: int) -> np.ndarray[Any, Any]:
        found = plain(y)
        if HAS_SKLEARN:
            from sklearn.utils.multiclass import check_classification_targets  # noqa: PLC0415
            from sklearn.utils.validation import column_or_1d  # noqa: PLC0415

            found = np.asarray(column_or_1d(found, warn=True))
            check_classification_targets(found)
        if found.ndim != 1 or len(found) != count:
            raise ConfigurationError(
                f"y must be labels [n] of n = {count} samples, got shape {found.shape}"
            )
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise ConfigurationError("y contains NaN or infinity")
        return found

    def decision_function(self, X: Any) -> Any:
        """Outputs at points ``[m, d]``: ``[m, c]``; two classes: second less first, ``[m]``."""
        found = self._values(X)
        if found.shape[1] == 2:
            found = found[:, 1] - found[:, 0]
        return self.place_.give_back(found, isinstance(X, Tensor))

    def predict(self, X: Any) -> Any:
        """Labels of points ``[m, d]``, ``[m]``; a tensor where X is one and labels are numbers."""
        found = self._best(X)
        if isinstance(X, Tensor) and found.dtype.kind in "biuf":
            return torch.as_tensor(found, device=X.device)
        return found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of the labels that are right."""
        return float(np.average(self._best(X) == plain(y), weights=sample_weight))

    def _best(self, x: Any) -> np.ndarray[Any, Any]:
        outputs = self._values(x)
        return np.asarray(self.classes_[outputs.argmax(1).cpu().numpy()])

    def _score(self, values: Tensor, targets: Any) -> float:
        return float(np.mean(self.classes_[values.argmax(1).cpu().numpy()] == targets))


def _r_squared(values: Tensor, targets: np.ndarray[Any, Any], weights: Any) -> float:
    found = values.double().cpu().numpy()
    y = targets.reshape(found.shape).astype(float)
    share = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=float)
    mean = np.average(y, axis=0, weights=share)
    errors = (share[:, None] * (found - y) ** 2).sum(0)
    total = (share[:, None] * (y - mean) ** 2).sum(0)
    explained = np.where(total > 0, 1 - errors / np.where(total > 0, total, 1), (errors == 0) * 1.0)
    return float(explained.mean())


def _raise(error: Exception, where: str) -> None:
    raise error


def _not_fitted(estimator: Any) -> Exception:
    message = f"this {type(estimator).__name__} is not fitted yet: call fit first"
    if HAS_SKLEARN:
        from sklearn.exceptions import NotFittedError  # noqa: PLC0415

        return NotFittedError(message)
    return FeatureProbeError(message)
