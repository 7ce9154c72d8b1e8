"""What a checkpoint holds of a probe: a window's sums by layer name, and what they may go on with.

Plain dicts, lists, strings, numbers and tensors, so that ``torch.load(..., weights_only=True)``
reads them. Pure functions: nothing here knows the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any, get_args

import torch

from feature_probe.errors import ConfigurationError
from feature_probe.sums.moments import Moments
from feature_probe.sums.window import Window
from feature_probe.theory.relations import Sum

#: Changes when what is stored changes its meaning.
FORMAT = 2
_COUNTS = ("steps", "examples", "left_out", "discarded")
_SHOWN = 4


@dataclass
class NamedWindow:
    """A window whose layers go by name, as a resumed run may find them in another order.

    Attributes:
        layers: The sums of each layer.
        problems: Why a sum of a layer is not measured in this window, by (layer, sum).
        steps: As in :class:`Window`, like the other counts.
        examples: n.
        left_out: Steps left out.
        discarded: Backward passes not counted.
    """

    layers: dict[str, Moments] = field(default_factory=dict)
    problems: dict[tuple[str, Sum], str] = field(default_factory=dict)
    steps: int = 0
    examples: int = 0
    left_out: int = 0
    discarded: int = 0

    @classmethod
    def copied(cls, window: Window, names: Sequence[str]) -> NamedWindow:
        """A copy of a window that goes on being added to.

        Args:
            window: Settled: with nothing undecided.
            names: The layers' names by index.
        """
        return cls(
            layers={names[i]: m.map(torch.clone) for i, m in enumerate(window.layers)},
            problems={(names[i], needs): why for (i, needs), why in window.problems.items()},
            **{name: getattr(window, name) for name in _COUNTS},
        )

    def give(
        self, window: Window, names: Sequence[str], device: Callable[[int], torch.device]
    ) -> None:
        """Add to a window what belongs to layers that are known by now; the rest stays here.

        A weight that is only known once it has been used has its sums wait for that.

        Args:
            window: Sums of its layers come to lie on ``device(index)``.
            names: The layers' names by index.
            device: Where a layer's sums are formed.
        """
        for index, name in enumerate(names):
            moments = self.layers.pop(name, None)
            if moments is not None:
                window.layer(index).merge(moments.map(methodcaller("to", device(index))))
            for needs in get_args(Sum):
                why = self.problems.pop((name, needs), None)
                if why is not None:
                    window.problems[index, needs] = why
        for name in _COUNTS:
            setattr(window, name, getattr(window, name) + getattr(self, name))
            setattr(self, name, 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain data; the tensors are not copied."""
        return {
            "layers": {name: moments.state_dict() for name, moments in self.layers.items()},
            "problems": [[name, needs, why] for (name, needs), why in self.problems.items()],
            **{name: getattr(self, name) for name in _COUNTS},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> NamedWindow:
        """The way back from :meth:`state_dict`; the tensors are copied, the state may be reused."""
        layers = {
            name: Moments.from_state(kept).map(torch.clone)
            for name, kept in state["layers"].items()
        }
        problems = {(name, needs): why for name, needs, why in state["problems"]}
        counts = {name: state[name] for name in _COUNTS}
        return cls(layers, problems, **counts)


def without_sums(state: Mapping[str, Any]) -> dict[str, Any]:
    """A collector's state with an empty window."""
    return {**state, "window": NamedWindow().state_dict()}


def check_state(state: object, configuration: Mapping[str, Any]) -> None:
    """Whether a state is one of ours, and of a probe configured alike.

    Args:
        state: What is to be loaded.
        configuration: What the sums depend on, by the name of the argument; "layers" holds the
            shape of every layer.

    Raises:
        ConfigurationError: naming every difference.
    """
    if not isinstance(state, Mapping) or "format" not in state or "configuration" not in state:
        raise ConfigurationError(
            "this is no state of a FeatureProbe: give what state_dict() returned, got "
            + (f"keys {list(state)[:_SHOWN]}" if isinstance(state, Mapping) else repr(type(state)))
        )
    if state["format"] != FORMAT:
        raise ConfigurationError(
            f"the state has format {state['format']!r}, this version of feature_probe reads "
            f"{FORMAT}: resume with the version that wrote it, or without load_state_dict()"
        )
    saved = state["configuration"]
    differences = _layer_differences(saved.get("layers", {}), configuration["layers"])
    differences += [
        f"{name} was {saved.get(name)!r}, is {here!r}"
        for name, here in configuration.items()
        if name != "layers" and saved.get(name) != here
    ]
    if differences:
        raise ConfigurationError(
            "the state is of a probe that was configured otherwise: "
            + "; ".join(differences)
            + ". Configure this one alike, or start without load_state_dict()"
        )


def _layer_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    groups = {
        "layers it does not have": [name for name in here if name not in saved],
        "layers that are not here": [name for name in saved if name not in here],
        "layers of another shape": [
            f"{name} (was {list(saved[name])}, is {list(here[name])})"
            for name in here
            if name in saved and list(saved[name]) != list(here[name])
        ],
    }
    return [
        f"{what}: {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in groups.items()
        if names
    ]
