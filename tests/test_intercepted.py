"""Layers that are looked into while they run: what they do around their product is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe import FeatureProbe, measure

LAMBDA = 0.1


class Tripled(nn.Linear):
    """Multiplies what its product gives."""

    def forward(self, x: Tensor) -> Tensor:
        """3 (W x + b)."""
        return 3 * F.linear(x, self.weight, self.bias)


class Rectified(nn.Linear):
    """Applies its own nonlinearity, in place."""

    def forward(self, x: Tensor) -> Tensor:
        """max(W x + b, 0)."""
        return F.linear(x, self.weight, self.bias).relu_()


class Tokens(nn.Linear):
    """Returns its positions in another shape."""

    def forward(self, x: Tensor) -> Tensor:
        """W x + b on two halves of x as two positions, flattened."""
        return F.linear(x.reshape(len(x), 2, -1), self.weight, self.bias).flatten(1)


def plain(layer: nn.Linear) -> nn.Linear:
    """A plain nn.Linear with the layer's weights."""
    copy = nn.Linear(layer.in_features, layer.out_features)
    copy.load_state_dict(layer.state_dict())
    return copy


class Spelled(nn.Module):
    """The same network with a plain Linear, and what was inside the layer written beside it."""

    def __init__(self, net: nn.Sequential, after: Callable[[Tensor], Tensor], halves: bool) -> None:
        super().__init__()
        self.a, self.b = plain(net[0]), plain(net[1])
        self.after, self.halves = after, halves

    def forward(self, x: Tensor) -> Tensor:
        """What the network computes."""
        x = x.reshape(len(x), 2, -1) if self.halves else x
        return self.b(self.after(self.a(x)))


CASES: dict[str, tuple[type[nn.Linear], int, int, Callable[[Tensor], Tensor], bool]] = {
    "scaled": (Tripled, 6, 5, lambda z: 3 * z, False),
    "in place": (Rectified, 6, 5, torch.relu, False),
    "reshaped": (Tokens, 3, 10, lambda z: z.flatten(1), True),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_what_a_layer_does_after_its_product_is_no_part_of_it(name: str) -> None:
    """Every matrix is that of the network in which it stands beside a plain Linear."""
    kind, d_in, width, after, halves = CASES[name]
    net = nn.Sequential(kind(d_in, 5), nn.Linear(width, 2))
    data = [(torch.randn(7, 6), torch.randn(7, 2))]
    asked: dict[str, Any] = {"weight_decay": LAMBDA, "progress": False}
    found = measure(net, data, F.mse_loss, **asked)
    expected = measure(Spelled(net, after, halves), data, F.mse_loss, **asked)
    for relation in ("fact", "bfact", "nfa", "enfa"):
        torch.testing.assert_close(
            found.matrix("0", relation), expected.matrix("a", relation), rtol=1e-9, atol=1e-12
        )
    assert found.record("0", "nfa", 1.0).status == "ok"


class Positions(nn.Module):
    """Adds a bias made from a table that is the same for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(2, 5)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The head on body and bias."""
        places = torch.linspace(-1, 1, 6, dtype=x.dtype).reshape(1, 3, 2)
        return self.head(torch.tanh(self.body(x) + self.table(places).sum(1)))


@pytest.mark.usefixtures("float64")
def test_a_layer_that_runs_once_for_all_examples_says_so() -> None:
    """Its FACT is measured; E, and K from exact products, would mix examples and are withheld."""
    model = Positions()
    data = [(torch.randn(7, 6), torch.randn(7, 2))]
    report = measure(model, data, F.mse_loss, weight_decay=LAMBDA, progress=False)
    assert report.record("table", "fact").status == "ok"
    for relation in ("nfa", "enfa"):
        assert "ran once for all 7 examples" in report.record("table", relation, 1.0).status
        assert report.record("body", relation, 1.0).status == "ok"


def test_random_products_of_such_a_layer_are_kept() -> None:
    """K from random signs per example is unbiased there, so the loop's NFA is measured."""
    model = Positions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
    with FeatureProbe(model, optimizer=optimizer, every=1, strict=True) as probe:
        F.mse_loss(model(torch.randn(7, 6)), torch.randn(7, 2)).backward()
        optimizer.step()
    assert probe.report is not None
    assert probe.report.record("table", "nfa", 1.0).status == "ok"
    assert "ran once" in probe.report.record("table", "enfa", 1.0).status


class OneByOne(nn.Module):
    """Calls its layer for one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The head on the examples put together again."""
        return self.head(torch.cat([torch.tanh(self.body(row[None])) for row in x]))


@pytest.mark.usefixtures("float64")
def test_a_layer_called_for_each_example_by_itself_is_measured() -> None:
    """As many calls as examples: the same matrices as from one call on the batch."""
    model = OneByOne()
    together = nn.Sequential(model.body, nn.Tanh(), model.head)
    data = [(torch.randn(7, 6), torch.randn(7, 2))]
    asked: dict[str, Any] = {"weight_decay": LAMBDA, "progress": False}
    found, expected = (measure(net, data, F.mse_loss, **asked) for net in (model, together))
    for relation in ("fact", "nfa", "enfa"):
        torch.testing.assert_close(
            found.matrix("body", relation), expected.matrix("0", relation), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("after", ["float", "clone", "autocast"])
def test_a_copy_of_the_last_layers_output_keeps_its_premise(after: str) -> None:
    """Casting or copying leaves K the identity of the last linear layer: NFA is trivial there."""

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.head(torch.tanh(self.body(x)))
            return z.clone() if after == "clone" else z.float()

    model = Copies()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
    with FeatureProbe(model, optimizer=optimizer, every=1, strict=True) as probe:
        with torch.autocast("cpu", torch.bfloat16, enabled=after == "autocast"):
            output = model(torch.randn(7, 6))
        F.mse_loss(output, torch.randn(7, 3)).backward()
        optimizer.step()
    assert probe.report is not None
    assert "trivial" in probe.report.record("head", "nfa", 1.0).premise
    assert probe.report.record("body", "nfa", 1.0).premise == ""


def test_decay_in_the_loss_is_named() -> None:
    """With λ given and none in the optimizer, FACT may be read from a gradient that holds λW."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(7, 6), torch.randn(7, 3)
    premises = []
    for own in (0.0, LAMBDA):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=own)
        with FeatureProbe(model, optimizer=optimizer, every=1, weight_decay=LAMBDA) as probe:
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        assert probe.report is not None
        premises.append(probe.report.record("0", "fact").premise)
    assert "gradient contains that" in premises[0]
    assert premises[1] == ""
