"""Recursive Feature Machines: kernel machines that learn features from FACT or AGOP.

:class:`RecursiveFeatureMachine` and :class:`RecursiveFeatureMachineClassifier` are the estimators;
:func:`iterate` is the algorithm on tensors, :func:`feature_sums` and :func:`next_features` are its
parts.
"""

from feature_probe.rfm.base import HistoryEntry
from feature_probe.rfm.estimators import (
    RecursiveFeatureMachine,
    RecursiveFeatureMachineClassifier,
)
from feature_probe.rfm.features import FeatureMap, FeatureSums, feature_sums, next_features
from feature_probe.rfm.kernels import (
    AutogradKernel,
    Exponential,
    Gaussian,
    Kernel,
    Laplace,
    LpExponential,
    Polynomial,
)
from feature_probe.rfm.machine import Iteration, Machine, Settings, iterate
from feature_probe.rfm.solvers import Solution, solve

__all__ = [
    "AutogradKernel",
    "Exponential",
    "FeatureMap",
    "FeatureSums",
    "Gaussian",
    "HistoryEntry",
    "Iteration",
    "Kernel",
    "Laplace",
    "LpExponential",
    "Machine",
    "Polynomial",
    "RecursiveFeatureMachine",
    "RecursiveFeatureMachineClassifier",
    "Settings",
    "Solution",
    "feature_sums",
    "iterate",
    "next_features",
    "solve",
]
