"""Where layers are a chain, their number from the output is known; elsewhere it is not claimed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe import FeatureProbe, measure


class Residual(nn.Module):
    """Two layers, the second of them around a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        """First layer, plus the second of it."""
        h = torch.tanh(self.first(x))
        return h + self.second(h)


class Reused(nn.Module):
    """One layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The head of the body of the body."""
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class Switched(nn.Module):
    """A chain, and a second way through it that is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        """The head of the body, with a residual branch where it is on."""
        h = torch.tanh(self.body(x))
        if self.on:
            h = h + torch.tanh(self.extra(h))
        return self.head(h)


def mlp() -> nn.Module:
    """Three layers in a row."""
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)
    )


def conv() -> nn.Module:
    """A convolution with pooling and a head."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(8, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "mlp": (mlp, {"0": 3, "3": 2, "5": 1}),
    "conv": (conv, {"1": 2, "6": 1}),
    "residual": (Residual, {}),
    "reused": (Reused, {}),
}


def depth_powers(report: object) -> dict[str, float]:
    """1/(L − l + 1) of every layer that has one, from the NFA's records."""
    records = report.records  # type: ignore[attr-defined]
    found = {r.layer: r.depth_power for r in records if r.relation == "nfa" and r.power == 1.0}
    return {layer: power for layer, power in found.items() if not math.isnan(power)}


@pytest.mark.parametrize("name", MODELS)
def test_the_depth_of_every_layer(name: str) -> None:
    """In the loop and in measure: of chains, with anything between the layers; else none."""
    torch.manual_seed(0)
    build, depths = MODELS[name]
    model = build()
    x = torch.randn(16, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with FeatureProbe(model, optimizer=optimizer, every=1, strict=True) as probe:
        F.mse_loss(model(x), torch.zeros_like(model(x))).backward()
        optimizer.step()
    expected = {layer: 1 / depth for layer, depth in depths.items()}
    assert probe.report is not None
    assert depth_powers(probe.report) == expected
    report = measure(
        model, [(x, x)], lambda out, _: out.square().mean(), relations="nfa", powers=1.0
    )
    assert depth_powers(report) == expected


def test_the_cosine_at_that_power() -> None:
    """cos(WᵀW, K^{1/(L − l + 1)}), against numpy on Jacobians of autograd."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    model = model.double()
    x = torch.randn(12, 4, dtype=torch.float64)
    report = measure(
        model, [(x, torch.zeros(12, 2, dtype=torch.float64))], F.mse_loss, relations="nfa"
    )
    inputs = {"0": x, "2": model[:2](x), "4": model[:4](x)}
    for start, power in (("0", 1 / 3), ("2", 1 / 2), ("4", 1.0)):
        rest = model[int(start) :]
        gram = np.zeros((inputs[start].shape[1],) * 2)
        for h in inputs[start]:
            jacobian = torch.func.jacrev(rest)(h).detach().numpy()
            gram += jacobian.T @ jacobian / 12
        values, vectors = np.linalg.eigh(gram)
        powered = (vectors * values.clip(0) ** power) @ vectors.T
        weight = rest[0].weight.detach().numpy()
        wtw = weight.T @ weight
        cosine = (wtw * powered).sum() / np.linalg.norm(wtw) / np.linalg.norm(powered)
        record = report.record(start, "nfa", 1.0)
        assert record.depth_power == power
        assert record.depth_cosine == pytest.approx(cosine, rel=1e-7)


def test_a_later_pass_takes_it_back() -> None:
    """What was a chain at first and then used another layer is none from then on."""
    torch.manual_seed(2)
    model = Switched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    with FeatureProbe(model, optimizer=optimizer, every=1, strict=True) as probe:
        for model.on in (False, True, False):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 5)), torch.zeros(8, 3)).backward()
            optimizer.step()
            assert probe.report is not None
            found.append(depth_powers(probe.report))
    assert found == [{"body": 0.5, "head": 1.0}, {}, {}]


def test_a_chain_with_a_layer_left_out_claims_no_depth() -> None:
    """How many layers lie between is not known then: none is claimed, rather than a wrong one."""
    x, y = torch.randn(20, 5), torch.randn(20, 3)
    for left in (["0"], ["0", "5"]):
        report = measure(
            mlp(), [(x, y)], F.mse_loss, relations="nfa", powers=0.5, include=left, progress=False
        )
        assert [record.layer for record in report.records] == left
        assert all(math.isnan(record.depth_power) for record in report.records)
