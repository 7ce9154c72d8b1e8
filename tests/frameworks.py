"""What the tests of all frameworks share: a small problem, and the loop they are compared to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feature_probe import FeatureProbe, Report

#: Options of every probe here: a report every other step, from all steps so far.
OPTIONS: dict[str, Any] = {"every": 2, "window": 2, "strict": True}
Batch = tuple[Tensor, Tensor]


@dataclass
class Kept:
    """A sink that keeps the reports."""

    reports: list[Report] = field(default_factory=list)
    closed: int = 0

    def write(self, report: Report) -> None:
        """Keep it."""
        self.reports.append(report)

    def close(self) -> None:
        """Count the calls."""
        self.closed += 1


def hooks_of(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """How many hooks are on a model, its parameters, its optimizers, and on all modules."""
    places: list[Any] = [
        hooks
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks")
    ]
    for parameter in model.parameters():
        places += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    for optimizer in optimizers:
        places += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    everywhere = vars(torch.nn.modules.module)
    places += [hooks for name, hooks in everywhere.items() if name.startswith("_global_")]
    return sum(len(hooks) for hooks in places if hasattr(hooks, "__len__"))


def make_model() -> nn.Sequential:
    """Three layers in float64, always with the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def make_batches(count: int = 8, n: int = 5) -> list[Batch]:
    """Batches of six numbers and a class, always the same."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(n, 6, dtype=torch.float64, generator=generator),
            torch.randint(3, (n,), generator=generator),
        )
        for _ in range(count)
    ]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with everything that has state."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


@dataclass
class Outcome:
    """What a run leaves: the weights, and the reports if it was probed."""

    weights: dict[str, Tensor]
    reports: list[Report]


def bare_loop(accumulate: int = 1, **options: Any) -> Outcome:
    """The loop everything is compared with: PyTorch and the probe, nothing else."""
    model, kept = make_model(), Kept()
    optimizer = make_optimizer(model)
    with FeatureProbe(model, optimizer=optimizer, sinks=[kept], **{**OPTIONS, **options}):
        for i, (x, y) in enumerate(make_batches(), start=1):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if i % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return Outcome(model.state_dict(), kept.reports)


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def assert_same_reports(
    found: Sequence[Report], expected: Sequence[Report], rename: str = ""
) -> None:
    """The same steps, layers, counts, and every score to the last digits."""
    assert [report.step for report in found] == [report.step for report in expected]
    assert expected, "nothing to compare"
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.records) == len(theirs.records)
        for a, b in zip(ours.records, theirs.records, strict=True):
            one, two = a.to_dict(), b.to_dict()
            assert one.pop("layer") == rename + two.pop("layer")
            for name, value in two.items():
                if isinstance(value, float):
                    value = pytest.approx(value, rel=1e-12, abs=1e-12)
                assert one[name] == value, (a.label, name)
        assert any(record.status == "ok" for record in ours.records)
