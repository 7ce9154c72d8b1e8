"""Recursive Feature Machines as estimators, in scikit-learn's manner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError
from feature_probe.rfm.base import Callback, EstimatorBase
from feature_probe.rfm.encoding import LabelEncoding, encoded_labels, plain
from feature_probe.rfm.features import Rescaling, Rule
from feature_probe.rfm.kernels import Kernel, KernelFunction
from feature_probe.rfm.sklearn_base import HAS_SKLEARN, ClassifierMixin, RegressorMixin
from feature_probe.rfm.solvers import Solver
from feature_probe.sinks.base import Sink

if HAS_SKLEARN:
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import column_or_1d


class RecursiveFeatureMachine(RegressorMixin, EstimatorBase):  # type: ignore[misc]
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
        categorical: Indices of columns that hold categories: each becomes columns of zeros and
            ones in its place (``columns_.names``); a category not seen in training becomes zeros.
        validation_fraction: Share of the points, drawn at random (of classes: of each), that is
            held out and not trained on: the iteration that scores best there is kept, of equals
            the first, which may be that of W = I. The paper finds that iterating past convergence
            becomes unstable on sparse parities.
        patience: Stop after so many iterations without a better score there.
        solver: "cholesky", "iterative" (preconditioned conjugate gradients), or "auto": the first
            where K takes three quarters of ``memory`` at most.
        memory: GiB that K, and what blocks of it are made of, may take.
        tolerance: Relative residual of the iterative solver.
        history: Keep every M_t and its agreement with FACT and AGOP in ``history_``; both matrices
            are then formed at every iteration.
        log_dir: Folder for TensorBoard and JSON lines of those agreements, as of FeatureProbe.
        sinks: More places for them.
        callbacks: Called with each :class:`Iteration`; True ends the fit.
        progress: Show a bar.
        device: Where to compute; None: where the inputs are.
        dtype: float32 or float64; None: that of the inputs.
        random_state: Seed of the validation split, the median's sample and the iterative solver;
            None: another one every time.

    There is no intercept, and FACT-RFM depends on the size of y: standardise it, as
    ``TransformedTargetRegressor`` does, or take ``rescale="trace"``.

    Attributes:
        feature_matrix_: M = WᵀW, ``[d, d]``, or ``[d]`` where it is diagonal, of what was given:
            array or tensor. Its diagonal weighs the columns, in their units: standardise X to
            compare them. The identity where ``n_iter_`` is 0.
        columns_: With ``categorical``: its ``names`` are those of M's rows; else None.
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
        x = self._checked(X, reset=True)
        targets = self._targets(y, len(x))
        self._flat = targets.ndim == 1
        x, targets, held = self._divided(x, targets, validation)
        self._fit(x, targets.reshape(len(targets), -1), held)
        return self

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
        return self._score(self._values(X), plain(y), sample_weight)

    def _score(self, values: Tensor, targets: Any, weights: Any = None) -> float:
        return _r_squared(values, targets, weights)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class RecursiveFeatureMachineClassifier(ClassifierMixin, EstimatorBase):  # type: ignore[misc]
    """:class:`RecursiveFeatureMachine` on class labels: squared error, the largest output wins.

    There are no probabilities (scikit-learn's ``CalibratedClassifierCV`` makes them).

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
        random_state: int | None = 0,
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
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ConfigurationError(
                f"a classifier needs at least two classes to train on; all labels are one class, "
                f"{self.classes_[0]}"
            )
        x, labels, held = self._divided(x, labels, validation)
        self._fit(x, encoded_labels(labels, self.classes_, self.label_encoding), held)
        return self

    def _held_out(self, targets: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
        """The same share of every class, of which one point at least stays to train on."""
        generator = self._generator()
        found = np.zeros(len(targets), dtype=bool)
        for label in np.unique(targets):
            own = np.flatnonzero(targets == label)
            order = torch.randperm(len(own), generator=generator).numpy()
            found[own[order[: min(round(share * len(own)), len(own) - 1)]]] = True
        return found

    def _labels(self, y: Any, count: int) -> np.ndarray[Any, Any]:
        found = plain(y)
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise ConfigurationError("y contains NaN or infinity")
        if HAS_SKLEARN:
            found = np.asarray(column_or_1d(found, warn=True))
            check_classification_targets(found)
        if found.ndim != 1 or len(found) != count:
            raise ConfigurationError(
                f"y must be labels [n] of n = {count} samples, got shape {found.shape}"
            )
        return found

    def decision_function(self, X: Any) -> Any:
        """Outputs at points ``[m, d]``: ``[m, c]``; two classes: second less first, ``[m]``."""
        found = self._values(X)
        if found.shape[1] == 2:
            found = found[:, 1] - found[:, 0]
        return self.place_.give_back(found, isinstance(X, Tensor))

    def predict(self, X: Any) -> Any:
        """Labels of points ``[m, d]``, ``[m]``; a tensor where X is one and labels are numbers."""
        found = self._best(self._values(X))
        if isinstance(X, Tensor) and found.dtype.kind in "biuf":
            return torch.as_tensor(found, device=X.device)
        return found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of the labels that are right."""
        return self._score(self._values(X), plain(y), sample_weight)

    def _score(self, values: Tensor, targets: Any, weights: Any = None) -> float:
        return float(np.average(self._best(values) == targets, weights=weights))

    def _best(self, values: Tensor) -> np.ndarray[Any, Any]:
        return np.asarray(self.classes_[values.argmax(1).cpu().numpy()])


def _r_squared(values: Tensor, targets: np.ndarray[Any, Any], weights: Any) -> float:
    found = values.double().cpu().numpy()
    y = targets.reshape(found.shape).astype(float)
    share = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=float)
    mean = np.average(y, axis=0, weights=share)
    errors = (share[:, None] * (found - y) ** 2).sum(0)
    total = (share[:, None] * (y - mean) ** 2).sum(0)
    explained = np.where(total > 0, 1 - errors / np.where(total > 0, total, 1), (errors == 0) * 1.0)
    return float(explained.mean())
