"""Every loop of ``features``: bit for bit the same with a probe as without."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from loops.exact import Net
from loops.features import FEATURES, Feature, Run
from torch import Tensor

from feature_probe import FeatureProbe

STEPS = 20
#: What the status of some record says where it is not "ok".
NOTED = {
    "optimizer of a part": "weight decay not known",
    "lbfgs": "no weight decay",
    "lbfgs strong_wolfe": "no weight decay",
}
#: Loops in which one and the same number of backward passes is thrown away in every step.
DISCARDED = {"discarded backward": 1, "sharpness-aware": 1, "gan": 1}


def trained(feature: Feature, probes: int) -> tuple[Run, list[FeatureProbe]]:
    """Twenty iterations with that many probes."""
    torch.manual_seed(11)
    model = Net().train()
    scaler = torch.amp.GradScaler(
        "cpu", enabled=feature.scaler, init_scale=2.0**8, growth_interval=3
    )
    run = Run(model, feature.optimizers(model), scaler, feature.others(model))
    settings: dict[str, Any] = {"every": 8, "window": 3, "strict": True, **feature.options}
    with contextlib.ExitStack() as stack:
        made = [
            stack.enter_context(FeatureProbe(model, optimizer=run.optimizers, **settings))
            for _ in range(probes)
        ]
        for run.step in range(STEPS):
            feature.iterate(run)
    return run, made


def trace(run: Run) -> dict[str, Any]:
    """Everything that a probe could have disturbed."""
    found: dict[str, Any] = {"losses": run.losses, "rng": torch.get_rng_state()}
    found["scaler"] = run.scaler.state_dict()
    for place, module in enumerate([run.model, *run.others]):
        found |= {f"{place} state {k}": v.clone() for k, v in module.state_dict().items()}
        found |= {f"{place} grad {k}": p.grad for k, p in module.named_parameters()}
        found |= {f"{place} needs {k}": p.requires_grad for k, p in module.named_parameters()}
        found |= {f"{place} vars {k}": sorted(vars(m)) for k, m in module.named_modules()}
    for place, optimizer in enumerate(run.optimizers):
        state = copy.deepcopy(optimizer.state_dict())
        found[f"{place} groups"] = state["param_groups"]
        for index, values in state["state"].items():
            found |= {f"{place} {index} {name}": value for name, value in values.items()}
    return found


def assert_identical(found: Any, expected: Any, where: str = "") -> None:
    """Bitwise the same tensors, equal everything else."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_identical(found[index], value, f"{where}/{index}")
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", FEATURES)
def test_a_probed_loop_is_bit_identical(name: str) -> None:
    """Weights, gradients, optimizer and scaler state, buffers, losses and RNG, 20 iterations."""
    feature = FEATURES[name]
    plain, _ = trained(feature, 0)
    expected = trace(plain)
    run, probes = trained(feature, feature.probes)
    assert_identical(trace(run), expected)
    for probe in probes:
        assert probe.faults == 0
        assert probe.report.step in (8, 16)  # overflows make 20 iterations fewer steps
        assert probe.report.settings["left_out"] == 0
        for record in probe.report.records:
            where = (record.layer, record.label, record.status)
            assert record.status == "ok" or NOTED.get(name, "ok") in record.status, where
        if name in DISCARDED:
            assert probe.report.settings["discarded"] >= DISCARDED[name]
    for mine, other in zip(probes[0].report.records, probes[-1].report.records, strict=True):
        assert_identical(mine.to_dict(), other.to_dict())


def test_the_comparison_sees_one_bit() -> None:
    """One ulp in a weight, one random number drawn, or one momentum changed is noticed."""
    expected = trace(trained(FEATURES["plain"], 0)[0])

    def move(run: Run) -> None:
        run.model.head.weight.data.view(torch.int32)[0, 0].add_(1)

    def draw(run: Run) -> None:
        torch.rand(1)

    def heat(run: Run) -> None:
        run.optimizer.state[run.model.head.weight]["momentum_buffer"].mul_(1.0001)

    for disturb in (move, draw, heat):
        run, _ = trained(FEATURES["plain"], 0)
        assert_identical(trace(run), expected)
        disturb(run)
        with pytest.raises(AssertionError):
            assert_identical(trace(run), expected)
