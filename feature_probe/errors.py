"""Exceptions and warnings of feature_probe, all importable from the package root."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np


class FeatureProbeError(Exception):
    """Base class of everything this package raises on purpose."""


class ConfigurationError(FeatureProbeError, ValueError):
    """An argument, a selection or a model that cannot be probed as asked.

    Raised before training is touched: by the constructor, by ``attach()`` or, for what only a
    forward pass can show (the model's output type), in the first forward pass.
    """


class NotMeasuredError(FeatureProbeError, LookupError):
    """A number or a matrix was asked for that this report does not hold."""


class VerificationError(FeatureProbeError, AssertionError):
    """The run-time self-test found numbers that do not belong together."""


def finite_number(name: str, value: Any, *, positive: bool) -> None:
    """Check that an argument is a number, finite, and above 0 or at least 0.

    Raises:
        ConfigurationError: if it is not.
    """
    fits = isinstance(value, Real) and not isinstance(value, bool)
    if not fits or not 0 <= value < float("inf") or (positive and value == 0):
        what = "positive" if positive else "at least 0"
        raise ConfigurationError(f"{name} must be a finite number, {what}; got {value!r}")


def boolean(name: str, value: Any) -> None:
    """Check that an argument is True or False, NumPy's included.

    Raises:
        ConfigurationError: if it is not.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigurationError(f"{name} must be True or False, got {value!r}")


def positive_integer(name: str, value: Any) -> None:
    """Check that an argument counts something.

    Raises:
        ConfigurationError: if ``value`` is not an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a positive integer, got {value!r}")
