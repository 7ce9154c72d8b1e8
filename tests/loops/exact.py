"""What a report of one step must hold, from the oracle's rows of the examples behind it."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import FeatureProbe, Report

LAMBDA = 0.03
TOLERANCE = 1e-9
#: G, K and E, by their names in a report's statistics.
SUMS = ("gradient", "jacobian", "loss")
Loss = Callable[[Tensor, Tensor], Tensor]


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three layers."""
    layers = (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(*layers).to(dtype)


class Net(nn.Module):
    """A convolution with batch norm, in-place activations and dropout, and two linear layers."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, outputs)
        self.skip = False
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.max_pool2d(x, 2).flatten(1)
        if self.fail:
            raise MemoryError
        x = x[:, :6] if self.skip else F.elu(self.hidden(x), inplace=True)
        return self.head(self.drop(x))


def sgd(model: nn.Module | Iterable[nn.Parameter], **options: Any) -> torch.optim.SGD:
    """SGD with the weight decay of all tests, at a rate that moves the weights visibly."""
    held = model.parameters() if isinstance(model, nn.Module) else model
    return torch.optim.SGD(held, **{"lr": 0.2, "weight_decay": LAMBDA, **options})


def data(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random inputs and targets of :func:`net`."""
    return torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype)


def probe_of(model: nn.Module, optimizer: Any, **options: Any) -> FeatureProbe:
    """A probe with exact Jacobians that reports every step, keeps its sums and raises faults."""
    settings: dict[str, Any] = {
        "relations": ("fact", "nfa", "enfa"),  # one for each sum
        "powers": (1.0,),
        "jacobian": "exact",
        "every": 1,
        "window": 1,
        "keep_matrices": True,
        "strict": True,
    }
    return FeatureProbe(model, optimizer=optimizer, **{**settings, **options})


def rows_of(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Loss = F.mse_loss
) -> dict[str, oracle.Rows]:
    """The oracle's rows of a batch at the model's weights as they are, by a copy of it."""
    twin = copy.deepcopy(model).double()
    layers = {name: (name,) for name, module in twin.named_modules() if oracle.is_layer(module)}
    samples = oracle.one_by_one((x.double(), y.double() if y.is_floating_point() else y))
    return oracle.collect(twin, samples, oracle.supervised(loss_fn), layers)


def sums_of(rows: oracle.Rows) -> dict[str, Tensor]:
    """W, G, K and E, ``[groups, ...]``."""
    return {
        "weight": rows.weight,
        "gradient": torch.einsum("npgo,npgi->goi", rows.g, rows.h) / rows.n,
        "jacobian": oracle.mean_gradient_square(rows, "output", "output"),
        "loss": oracle.mean_gradient_square(rows, "loss", "output"),
    }


def joined(parts: Sequence[Mapping[str, oracle.Rows]]) -> dict[str, oracle.Rows]:
    """The rows of several batches as one, at the weights of the last."""
    return {
        layer: oracle.Rows(
            last.weight,
            *(
                torch.cat([getattr(part[layer], key) for part in parts])
                for key in ("h", "g", "jac")
            ),
        )
        for layer, last in parts[-1].items()
    }


def assert_close(found: Tensor | None, expected: Tensor, what: str, tolerance: float) -> None:
    """A small error relative to the expected norm."""
    assert found is not None, f"{what} was not measured"
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def assert_sums(
    report: Report | None,
    rows: Mapping[str, oracle.Rows],
    *,
    only: Sequence[str] = SUMS,
    tolerance: float = TOLERANCE,
    **factors: float,
) -> None:
    """The report's W and sums are those of the rows, each times its factor (1 if not given)."""
    assert report is not None
    assert set(report.layers) == set(rows)
    for layer, layer_rows in rows.items():
        statistics = report.statistics[layer]
        for kind, expected in sums_of(layer_rows).items():
            if kind == "weight" or kind in only:
                found = getattr(statistics, kind)
                factor = factors.get(kind, 1.0)
                assert_close(found, expected * factor, f"{layer} {kind}", tolerance)
        assert {record.n_examples for record in report.select(layer)} == {layer_rows.n}


def assert_gradients(
    report: Report | None, gradients: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """The report's G is the given gradient of each layer's weight."""
    assert report is not None
    for layer, gradient in gradients.items():
        found = report.statistics[layer].gradient
        assert_close(found, gradient.reshape(found.shape).double(), f"{layer} G", tolerance)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of ``weight.grad`` of every layer that the oracle knows."""
    return {
        name: module.weight.grad.clone()
        for name, module in model.named_modules()
        if oracle.is_layer(module)
    }
