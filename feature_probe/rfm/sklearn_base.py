"""What an estimator is: scikit-learn's own base classes, or as much of them as works without it."""

from __future__ import annotations

import inspect
from typing import Any

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

    HAS_SKLEARN = True
except ImportError:
    HAS_SKLEARN = False

    class BaseEstimator:  # type: ignore[no-redef]
        """Parameters by name, as scikit-learn's; install scikit-learn for clone and searches."""

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            """The constructor's arguments."""
            names = inspect.signature(type(self)).parameters
            return {name: getattr(self, name) for name in names}

        def set_params(self, **params: Any) -> BaseEstimator:
            """Change some of the constructor's arguments.

            Raises:
                ValueError: for one that there is not.
            """
            known = self.get_params()
            for name, value in params.items():
                if name not in known:
                    raise ValueError(f"unknown parameter {name!r}; there are {', '.join(known)}")
                setattr(self, name, value)
            return self

        def __repr__(self) -> str:
            own = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
            return f"{type(self).__name__}({own})"

    class ClassifierMixin:  # type: ignore[no-redef]
        """Tells what it is."""

        _estimator_type = "classifier"

    class RegressorMixin:  # type: ignore[no-redef]
        """Tells what it is."""

        _estimator_type = "regressor"


__all__ = ["HAS_SKLEARN", "BaseEstimator", "ClassifierMixin", "RegressorMixin"]
