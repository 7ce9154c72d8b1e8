"""timm: a probe that knows where a model's head and features are, from timm's own metadata.

In a loop of your own::

    from feature_probe.integrations.timm import attach

    model = timm.create_model("resnet18", num_classes=10)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=5e-4)
    probe = attach(model, optimizer=optimizer, log_dir="runs/resnet18", every=500)
    ...                                     # train
    probe.detach()

In timm's own ``train.py``, three lines: the import, and around the loop over epochs ::

    from feature_probe.integrations.timm import attach                  # at the top
    probe = attach(model, optimizer=optimizer, log_dir="runs/probe")    # before `for epoch in ...`
    probe.detach()                                                      # after the loop

Nothing else changes. ``NativeScaler`` hides ``backward()`` and ``optimizer.step()``: steps are
counted at the optimizer itself. ``ModelEmaV2`` and ``ModelEmaV3`` copy the model: copies have no
hooks. ``--grad-accum-steps``, which divides the loss, ``--clip-grad`` and ``validate()`` between
the epochs need nothing. ``model`` may be the bare model or timm's DistributedDataParallel around
it. Where every process writes, give ``log_dir`` to rank 0 only:
``log_dir="runs/probe" if utils.is_primary(args) else None``.

This module does not import timm: a model of timm's brings all that is asked of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feature_probe import ConfigurationError, FeatureProbe
from feature_probe.models import unwrap

#: Which layers to measure: all but the classifier, all, or the classifier alone.
Head = Literal["exclude", "include", "only"]
_HEADS = ("exclude", "include", "only")


@dataclass(frozen=True)
class Parts:
    """Where the parts of a timm model are, by module name.

    Attributes:
        head: The classifiers' layers: several in a distilled model, none with ``num_classes=0``.
        stem: The first layers, which see the pixels.
        num_features: Width of what the features give to the head.
    """

    head: tuple[str, ...]
    stem: tuple[str, ...]
    num_features: int


def parts(model: nn.Module) -> Parts:
    """Head, stem and width of a timm model, from ``pretrained_cfg`` and ``get_classifier()``.

    Raises:
        ConfigurationError: for a model without timm's metadata.
    """
    inner = unwrap(model)
    config = _config(inner)
    names = [name for name, _ in inner.named_modules()]
    head = _existing(config.get("classifier"), names) or _classifier(inner)
    identities = {name for name, module in inner.named_modules() if isinstance(module, nn.Identity)}
    return Parts(
        head=tuple(name for name in head if name not in identities),
        stem=tuple(_existing(config.get("first_conv"), names)),
        num_features=int(getattr(inner, "num_features", 0)),
    )


def attach(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    head: Head = "exclude",
    **options: Any,
) -> FeatureProbe:
    """Attach a probe to the feature layers of a timm model.

    The classifier is left out unless asked for: it is a readout and no feature layer, its NFA is
    trivial (K is a multiple of the identity), and without it the medians over layers speak of
    features only. FACT is of interest there too: ``head="include"``.

    Args:
        model: The model, as made by ``timm.create_model`` or loaded through it; bare or in
            DistributedDataParallel.
        optimizer: Its optimizer, the one of PyTorch's kind under any wrapper.
        head: "exclude", "include" or "only" the classifier's layers.
        options: Any option of :class:`feature_probe.FeatureProbe`. ``include`` and ``exclude``
            choose among the layers that ``head`` leaves; ``output`` defaults to the logits, of the
            first classifier where a model returns several.

    Returns:
        The probe, attached. Call ``detach()`` at the end.

    Raises:
        ConfigurationError: for a model without timm's metadata, an unknown ``head``, or anything
            that :class:`feature_probe.FeatureProbe` refuses.
    """
    if head not in _HEADS:
        raise ConfigurationError(f"head must be one of {', '.join(_HEADS)}, got {head!r}")
    found = parts(model)
    measured = [target.name for target in FeatureProbe.targets(model, options.pop("include", None))]
    in_head = {name for name in measured if _is_inside(name, found.head)}
    if head == "only" and not in_head:
        raise ConfigurationError(
            f"head='only', but this model has no classifier among the layers {', '.join(measured)}"
            ": it was made with num_classes=0, or include= leaves the classifier out"
        )
    chosen = {
        "exclude": [name for name in measured if name not in in_head],
        "include": measured,
        "only": [name for name in measured if name in in_head],
    }[head]
    kept = frozenset(chosen)
    options = {"output": logits, **options}
    probe = FeatureProbe(
        model, optimizer=optimizer, include=lambda name, module: name in kept, **options
    )
    return probe.attach()


def logits(output: Any) -> Tensor:
    """f of a timm model: its logits, of the first classifier where training returns several.

    Raises:
        ConfigurationError: for what timm's classifiers do not return.
    """
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise ConfigurationError(
            f"this model returns {type(output).__name__} and no logits; "
            "say with output= which tensor is f"
        )
    return first


def _config(model: nn.Module) -> Mapping[str, Any]:
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if isinstance(config, Mapping) and "classifier" in config:
            return config
    raise ConfigurationError(
        f"{type(model).__name__} has no pretrained_cfg or default_cfg that names its classifier: "
        "it does not come from timm.create_model(), so probe it with "
        "feature_probe.FeatureProbe(model, exclude='name of the head')"
    )


def _classifier(model: nn.Module) -> list[str]:
    """Names of what ``get_classifier()`` returns, for a config that names none."""
    getter = getattr(model, "get_classifier", None)
    found = getter() if callable(getter) else ()
    modules = list(found) if isinstance(found, Iterable) else [found]
    return [name for name, module in model.named_modules() if any(module is m for m in modules)]


def _existing(names: str | Iterable[str] | None, known: list[str]) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names or ())
    return [name for name in listed if name in known]


def _is_inside(layer: str, modules: Iterable[str]) -> bool:
    return any(layer == module or layer.startswith(f"{module}.") for module in modules)
