"""feature_probe: are the layers learning features, by which account, and since when.

:class:`FeatureProbe` watches a training loop; :func:`measure` measures frozen weights.
"""

from feature_probe.errors import (
    ConfigurationError,
    FeatureProbeError,
    NotMeasuredError,
    VerificationError,
)
from feature_probe.estimate import Estimate
from feature_probe.initialization import balanced_init_
from feature_probe.layers.embeddings import EmbeddingRule
from feature_probe.layers.rules import (
    ConvRule,
    LayerRule,
    LinearRule,
    TransposedLinearRule,
    register_layer_rule,
    unregister_layer_rule,
)
from feature_probe.layers.transposed import ConvTransposeRule
from feature_probe.measure import measure
from feature_probe.probe import FeatureProbe
from feature_probe.reports.coverage import Coverage, ParameterCoverage
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.record import Record
from feature_probe.reports.report import Report
from feature_probe.reports.structure import (
    LayerStructure,
    MatrixSpectrum,
    PowerSweep,
    ReferenceAgreement,
)
from feature_probe.reports.structure_settings import Structure
from feature_probe.reports.verification import Check, Verification
from feature_probe.theory.egop import egop
from feature_probe.theory.relations import RELATIONS, Relation
from feature_probe.theory.subspaces import principal_angles, subspace_overlap

__version__ = "0.1.0"

__all__ = [
    "RELATIONS",
    "Check",
    "ConfigurationError",
    "ConvRule",
    "ConvTransposeRule",
    "Coverage",
    "Diagnosis",
    "EmbeddingRule",
    "Estimate",
    "FeatureProbe",
    "FeatureProbeError",
    "LayerRule",
    "LayerStructure",
    "LinearRule",
    "MatrixSpectrum",
    "NotMeasuredError",
    "ParameterCoverage",
    "PowerSweep",
    "Record",
    "ReferenceAgreement",
    "Relation",
    "Report",
    "Structure",
    "TransposedLinearRule",
    "Verification",
    "VerificationError",
    "balanced_init_",
    "egop",
    "measure",
    "principal_angles",
    "register_layer_rule",
    "subspace_overlap",
    "unregister_layer_rule",
]
