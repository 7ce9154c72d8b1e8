"""feature_probe in the frameworks people train with, each an extra: ``feature-probe[lightning]``.

:mod:`~feature_probe.integrations.timm`, :mod:`~feature_probe.integrations.lightning`,
:mod:`~feature_probe.integrations.transformers` and :mod:`~feature_probe.integrations.accelerate`.
This folder is installed as ``feature_probe.integrations`` (``package-dir`` in pyproject.toml); its
modules import the package and their own framework, never each other.
"""
