"""The stacked training of examples/papers against autograd and torch.optim."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("matplotlib")

from network_stack import Architecture, NetworkStack, Updates

DECAYS = (1e-1, 1e-3)
SHAPES = {
    "linear chain, batch larger than d": (Architecture(6, 9, 3), 300),
    "linear chain, batch smaller than d": (Architecture(12, 5, 2), 7),
    "one linear layer": (Architecture(6, 9, 1), 64),
    "ReLU network": (Architecture(6, 9, 1, tail=3), 64),
    "classes": (Architecture(20, 8, 2, outputs=4), 16),
}


def data(shape: Architecture, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, d] and targets, [networks, n] or classes [n]."""
    x = torch.randn(count, shape.inputs)
    if shape.outputs > 1:
        return x, torch.randint(shape.outputs, (count,))
    return x, torch.randn(len(DECAYS), count)


def loss(shape: Architecture, network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of one network."""
    if shape.outputs > 1:
        return F.cross_entropy(network(x), y)
    return F.mse_loss(network(x).squeeze(1), y)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_autograds(name: str, float64: None) -> None:
    """Written-out gradients of every network agree with autograd's to rounding."""
    shape, count = SHAPES[name]
    networks = [shape.build(seed) for seed in range(len(DECAYS))]
    x, y = data(shape, count)
    stack = NetworkStack(networks, shape, DECAYS, Updates(0.1))
    stack.differentiate(x, y)
    found = stack.gradients.clone()
    stack.values.copy_(found)
    for index, network in enumerate(networks):
        loss(shape, network, x, y if shape.outputs > 1 else y[index]).backward()
        gradients = stack.network(index)  # the gradients, in the network's places
        for parameter, gradient in zip(network.parameters(), gradients.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(gradient.detach(), parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "sgdm", "adam"])
def test_updates_are_torch_optims(kind: str, biases: bool, float64: None) -> None:
    """Thirty steps, the last ten at another rate, follow torch.optim step for step."""
    shape, count = SHAPES["linear chain, batch larger than d"]
    networks = [shape.build(seed) for seed in range(len(DECAYS))]
    x, y = data(shape, count)
    rate = 0.05
    updates = Updates(rate, 0.9 if kind == "sgdm" else 0.0, kind == "adam")
    stack = NetworkStack(networks, shape, DECAYS, updates, biases)
    optimizers: list[torch.optim.Optimizer] = []
    for network, decay in zip(networks, DECAYS, strict=True):
        weights = [p for p in network.parameters() if p.dim() == 2]
        others = [p for p in network.parameters() if p.dim() == 1]
        groups = [
            {"params": weights, "weight_decay": decay},
            {"params": others, "weight_decay": decay if biases else 0.0},
        ]
        optimizers.append(
            torch.optim.Adam(groups, lr=rate)
            if kind == "adam"
            else torch.optim.SGD(groups, lr=rate, momentum=updates.momentum)
        )
    for step in range(30):
        now = rate if step < 20 else rate / 10
        chosen = torch.randperm(count)[:32]
        stack.step(x[chosen], y[:, chosen], now)
        for index, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.zero_grad()
            loss(shape, network, x[chosen], y[index, chosen]).backward()
            optimizer.step()
            ours = stack.network(index)
            for parameter, own in zip(network.parameters(), ours.parameters(), strict=True):
                torch.testing.assert_close(own.detach(), parameter.detach(), rtol=1e-9, atol=1e-11)
