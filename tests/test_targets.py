"""Which layers are measured: selection, tying, names."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import readable
from torch import Tensor, nn

from feature_probe import ConfigurationError, FeatureProbe
from feature_probe.layers.targets import ROOT_NAME, find_targets


class Block(nn.Module):
    """Two Linears and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A convolution, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3, groups=2)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean(-1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ALL = ["stem", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def names(model: nn.Module, include: Any = None, exclude: Any = None) -> list[str]:
    """Names of the layers selected."""
    return [target.name for target in find_targets(model, include, exclude)]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ALL),
        ("*", None, ALL),
        ("head", None, ["head"]),
        ("blocks.*.up", None, ["blocks.0.up", "blocks.1.up"]),
        ("blocks.[1]*", None, ["blocks.1.up", "blocks.1.down"]),
        (re.compile(r"\.(up|down)$"), None, ALL[1:5]),
        (re.compile("0"), None, ALL[1:3]),
        (nn.Conv1d, None, ["stem"]),
        (nn.Linear, None, ALL[1:]),
        (nn.Module, None, ALL),
        (lambda name, module: module.weight.shape[0] == 8, None, ["blocks.0.up", "blocks.1.up"]),
        (["head", nn.Conv1d], None, ["stem", "head"]),
        (("head", re.compile("^stem$"), "blocks.0.*"), None, ["stem", *ALL[1:3], "head"]),
        (None, "head", ALL[:-1]),
        (None, ["head", "stem"], ALL[1:5]),
        (nn.Linear, "*.up", ["blocks.0.down", "blocks.1.down", "head"]),
        ("blocks.*", re.compile("1"), ALL[1:3]),
        ("blocks.*", "head", ALL[1:5]),
        (None, lambda name, module: name.startswith("b"), ["stem", "head"]),
    ],
    ids=readable,
)
def test_selection(include: Any, exclude: Any, expected: list[str]) -> None:
    """Globs, patterns (searched), types, predicates and lists select; model order is kept."""
    assert names(Net(), include, exclude) == expected


def test_globs_are_case_sensitive() -> None:
    """A glob means the name as it is written."""
    with pytest.raises(ConfigurationError, match="matches no layer"):
        names(Net(), "HEAD")


def test_probe_targets_is_the_same() -> None:
    """`FeatureProbe.targets` lists what would be measured, without attaching anything."""
    model = Net()
    found = FeatureProbe.targets(model, "blocks.*", "*.up")
    assert [target.name for target in found] == ["blocks.0.down", "blocks.1.down"]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("criterion", ["encoder.*", re.compile("^up"), nn.Conv2d], ids=str)
def test_what_matches_nothing_lists_the_layers(criterion: Any, argument: str) -> None:
    """A criterion without effect is a mistake: refused, with the argument and every name."""
    with pytest.raises(ConfigurationError, match="matches no layer") as error:
        names(Net(), **{argument: criterion})
    assert argument in str(error.value)
    assert all(name in str(error.value) for name in ALL)


def test_one_of_several_criteria_that_matches_nothing() -> None:
    """Each criterion of a list must match something."""
    with pytest.raises(ConfigurationError, match=r"include='haed' matches no layer"):
        names(Net(), ["stem", "haed"])


@pytest.mark.parametrize("criterion", [3, 1.5, [None], [["head"]]], ids=str)
def test_what_is_no_criterion(criterion: Any) -> None:
    """A number or a nested list is refused, with what is allowed."""
    with pytest.raises(ConfigurationError, match="glob, compiled pattern, type or predicate"):
        names(Net(), criterion)


def test_excluding_all() -> None:
    """Nothing left is refused, with both arguments and the names."""
    with pytest.raises(ConfigurationError, match="leaves no layer") as error:
        names(Net(), "blocks.*", nn.Linear)
    assert "blocks.0.up" in str(error.value)


def test_an_empty_selection() -> None:
    """An empty list selects nothing, which is refused; as exclude it leaves all."""
    with pytest.raises(ConfigurationError, match="leaves no layer"):
        names(Net(), [])
    assert names(Net(), None, []) == ALL


def test_long_lists_of_names_are_cut() -> None:
    """A message about a model of 50 layers names 40 and counts the rest."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    with pytest.raises(ConfigurationError, match=r"38, 39 and 10 more"):
        names(model, "nothing")


def test_a_model_without_known_layers_lists_the_types() -> None:
    """The message names the types there are rules for and how to add one."""
    with pytest.raises(
        ConfigurationError, match=r"LayerNorm has no layer.*Linear, Conv1d"
    ) as error:
        names(nn.LayerNorm(3))
    assert "register_layer_rule" in str(error.value)


# --------------------------------------------------------------------------- tying


def test_tied_weights_are_one_target() -> None:
    """Modules that share a parameter are one layer, named after the first, with aliases."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    model[2].weight = model[0].weight
    model[3].weight = model[0].weight
    first, second = find_targets(model)
    assert (first.name, first.aliases) == ("0", ("2", "3"))
    assert first.modules == (model[0], model[2], model[3])
    assert first.module is model[0]
    assert first.parameter is model[0].weight
    assert (second.name, second.aliases) == ("1", ())


def test_a_module_registered_twice_is_one_target_without_alias() -> None:
    """The same module under two names is one module."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    (target,) = find_targets(model)
    assert (target.name, target.modules, target.aliases) == ("0", (layer,), ())


def test_a_tied_weight_is_named_after_the_first_selected() -> None:
    """Excluding the first holder leaves the others as the layer."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    model[2].weight = model[0].weight
    one, two = find_targets(model, exclude="0")
    assert (one.name, two.name) == ("1", "2")
    assert two.modules == (model[2],)


def test_equal_weights_are_not_tied() -> None:
    """Tying is by identity, not by value."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    assert names(model) == ["0", "1"]


# --------------------------------------------------------------------------- shapes and names


@pytest.mark.parametrize(
    ("layer", "shape", "text"),
    [
        (nn.Linear(4, 7), (1, 7, 4), "0: Linear 7 × 4"),
        (nn.Conv1d(4, 6, 5), (1, 6, 20), "0: Conv1d 6 × 20"),
        (nn.Conv2d(4, 6, (2, 3), groups=2), (2, 3, 12), "0: Conv2d 2 × 3 × 12"),
        (nn.Conv3d(2, 4, 3), (1, 4, 54), "0: Conv3d 4 × 54"),
        (nn.Conv2d(5, 5, 3, groups=5), (5, 1, 9), "0: Conv2d 5 × 1 × 9"),
    ],
    ids=str,
)
def test_shapes_and_text(layer: nn.Module, shape: tuple[int, int, int], text: str) -> None:
    """Groups, d_out and d_in of the weight as a matrix, and how a target prints."""
    (target,) = find_targets(nn.Sequential(layer))
    assert (target.groups, target.d_out, target.d_in) == shape
    assert target.rule.matrix(layer, layer.weight).shape == shape
    assert str(target) == text
    assert not target.intercepted


def test_text_of_tied_layers() -> None:
    """The aliases are named."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[2].weight = model[0].weight
    assert str(find_targets(model)[0]) == "0: Linear 3 × 3, tied with 1, 2"


@pytest.mark.parametrize("include", [None, ROOT_NAME, nn.Linear, "(*"], ids=str)
def test_the_model_itself_can_be_the_layer(include: Any) -> None:
    """A bare layer is its own only target, named "(model)"."""
    layer = nn.Linear(3, 2)
    (target,) = find_targets(layer, include)
    assert target.name == "(model)"
    assert target.module is layer


def test_lazy_layers_count_once_they_are_initialised() -> None:
    """An uninitialised lazy layer is passed over; after a forward pass it is a Linear."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    assert names(model) == ["0"]
    model(torch.zeros(1, 3))
    assert names(model) == ["0", "1"]
    assert find_targets(model)[1].d_in == 4


def test_only_lazy_layers() -> None:
    """Where all layers are uninitialised the message says to run a forward pass."""
    with pytest.raises(ConfigurationError, match="run one forward pass first"):
        names(nn.Sequential(nn.LazyLinear(2)))


def test_parametrized_weights_are_not_read() -> None:
    """A target with a parametrization has no leaf parameter; its shape is not from evaluating."""
    calls: list[int] = []

    class Counted(nn.Module):
        """Counts how often the weight is computed."""

        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return 2 * weight

    layer = nn.Conv2d(4, 6, 3, groups=2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Counted())
    calls.clear()
    (target,) = find_targets(nn.Sequential(layer))
    assert calls == []
    assert target.parameter is None
    assert target.intercepted
    assert (target.groups, target.d_out, target.d_in) == (2, 3, 18)
