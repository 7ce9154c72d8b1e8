"""The estimate against what the probe really holds, and against FLOPs counted by hand."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feature_probe import RELATIONS, ConfigurationError, Estimate, FeatureProbe

STEPS = 3


def mlp() -> nn.Module:
    """10 → 20 → 5."""
    return nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))


def conv() -> nn.Module:
    """A strided convolution, a depthwise one, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Tied(nn.Module):
    """A layer called twice, its weight shared by another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(torch.tanh(self.first(x))))))


def tokens() -> nn.Module:
    """Linears on [n, s, d], one with a computed weight."""
    return nn.Sequential(
        nn.Linear(6, 7), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(7, 3))
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (10,)),
    "convolutions and groups": (conv, (3, 8, 8)),
    "tied": (Tied, (6,)),
    "positions": (tokens, (4, 6)),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "fact": {"relations": "fact"},
    "nfa": {"relations": "nfa"},
    "enfa and bfact": {"relations": ("enfa", "bfact")},
    "all": {"relations": tuple(RELATIONS)},
    "max_dim": {"max_dim": 5},
    "include": {"include": nn.Linear},
    "two probes": {"num_probes": 2},
    "exact": {"jacobian": "exact"},
}


def held(model: nn.Module, x: Tensor, **options: Any) -> tuple[int, int, int]:
    """Bytes of the probe's sums and paths late in a window, and at most inside a step of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probe = FeatureProbe(
        model, optimizer=optimizer, every=lambda step: step == STEPS, window=STEPS + 1,
        strict=True, **options,
    )  # fmt: skip
    peak = 0
    with probe:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            inside = probe._collector.nbytes()
            optimizer.step()
            peak = max(peak, inside)
    return probe._collector.window.nbytes(), probe._collector.trajectory.nbytes(), peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_that_the_probe_holds(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The estimate equals the bytes of the sums in a window, to the byte, and bounds the peak."""
    make, shape = MODELS[name]
    model, x = make().to(dtype), torch.randn(4, *shape, dtype=dtype)
    estimate = FeatureProbe.estimate(model, x, window=STEPS + 1, **options)
    after_step, paths, inside_step = held(model, x, **options)
    sums = sum(layer.sum_bytes for layer in estimate.layers)
    most = sum(layer.path_bytes for layer in estimate.layers)
    initial = sum(layer.initial_bytes for layer in estimate.layers)
    assert sums == after_step > 0
    assert paths <= most
    assert estimate.bytes_held == sums + most + initial
    assert inside_step + initial <= estimate.bytes_peak == 2 * sums + most + initial


def test_bytes_of_bfloat16_models() -> None:
    """Low-precision models have float32 sums."""
    x = torch.randn(4, 10)
    low = FeatureProbe.estimate(mlp().bfloat16(), x.bfloat16())
    assert low.bytes_held == FeatureProbe.estimate(mlp(), x).bytes_held
    sums = sum(layer.sum_bytes for layer in low.layers)
    assert sums == 4 * (20 * 10 + 5 * 20 + 2 * (20 * 20 + 5 * 5))


def test_a_window_of_one_step_holds_no_second_set() -> None:
    """With window=1 the step's sums are the window's."""
    estimate = FeatureProbe.estimate(mlp(), torch.randn(4, 10), window=1)
    assert estimate.bytes_peak == estimate.bytes_held


def test_jackknife_holds_a_set_of_sums_for_every_group() -> None:
    """What measure(jackknife=m) holds: m groups and all of them together, and no path."""
    x = torch.randn(4, 10)
    estimate = FeatureProbe.estimate(mlp(), x, jackknife=8)
    sums = sum(layer.sum_bytes for layer in FeatureProbe.estimate(mlp(), x).layers)
    assert estimate.bytes_held == 9 * sums
    assert estimate.bytes_peak == 10 * sums


# --------------------------------------------------------------------------- work

N = 8
FORWARD = (2 * N * 10 * 20, 2 * N * 20 * 5)
PLAIN = 3 * sum(FORWARD) - FORWARD[0]
GRAM = 2 * N * (20 * 20 + 5 * 5)


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, 2 * GRAM + FORWARD[1]),
        ({"relations": "fact"}, 0),
        ({"relations": "enfa"}, GRAM),
        ({"relations": "nfa"}, GRAM + FORWARD[1]),
        ({"num_probes": 3}, 4 * GRAM + 3 * FORWARD[1]),
        ({"jacobian": "exact"}, 6 * GRAM + 5 * FORWARD[1]),
        ({"max_dim": 10}, 2 * 2 * N * (100 + 25) + FORWARD[1]),
    ],
    ids=str,
)
def test_step_ratio_of_an_mlp(options: dict[str, Any], extra: float) -> None:
    """Grams and activation-only backward passes, over three forward passes less one product."""
    estimate = FeatureProbe.estimate(mlp(), torch.randn(N, 10), **options)
    assert math.isclose(estimate.step_ratio, 1 + extra / PLAIN)


def test_rows_and_flops_of_layers() -> None:
    """A row per example and position, in every call; flops of the grouped product."""
    x = torch.randn(4, 3, 8, 8)
    first, depthwise, grouped, head = FeatureProbe.estimate(conv(), x).layers
    assert [layer.rows for layer in (first, depthwise, grouped, head)] == [64, 64, 64, 4]
    assert first.forward_flops == 2 * 64 * 8 * 27
    assert depthwise.forward_flops == 2 * 64 * 8 * 9
    assert grouped.forward_flops == 2 * 64 * 6 * 4
    assert grouped.gram_flops == 2 * (2 * 64 * 2 * 3**2)
    tied, _ = FeatureProbe.estimate(Tied(), torch.randn(5, 6)).layers
    assert (tied.layer, tied.rows) == ("first", 15)


def test_interval() -> None:
    """A window and a report cost the budget, or a little less."""
    made = Estimate((), 0, 0, step_ratio=2.0, report_seconds=0.4, step_seconds=0.1)
    assert made.interval() == 400  # (4 + 4)/0.02
    assert made.amortised(400, 4) == pytest.approx(1.02)
    assert made.interval(0.1, 1) == 50
    assert made.interval(0.5, 64) == 150  # 68/0.5 = 136
    assert made.interval(1.0, 64) == 80
    assert "a report every 400 steps takes 2 % of the training's time" in str(made)
    assert "one every 100 takes 8 %" in str(made)


def test_amortised() -> None:
    """Probed steps over all steps; a window as long as the interval is every step."""
    estimate = Estimate(
        layers=(), bytes_held=0, bytes_peak=0, step_ratio=3.0, report_seconds=0.0, step_seconds=0.5
    )
    assert math.isclose(estimate.amortised(100, 4), 1.08)
    assert estimate.amortised(4, 4) == estimate.amortised(2, 4) == 3.0
    with_report = replace(estimate, report_seconds=2.0)
    assert math.isclose(with_report.amortised(100, 4), 1.12)


def test_text() -> None:
    """Totals first, then a line per layer."""
    estimate = FeatureProbe.estimate(mlp(), torch.randn(N, 10))
    first, second, *rest = str(estimate).split("\n")
    assert "24.41 KiB held, 28.91 KiB at most" in first
    assert "plain steps" in first
    assert f"a report takes about {estimate.report_seconds:.2g} s" in second
    assert [line.split(":")[0] for line in rest] == ["0", "2"]


def test_the_time_of_a_report_is_that_of_a_report() -> None:
    """The estimated seconds lie within a factor of a few of what a reporting step takes."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 200))
    x = torch.randn(2000, 300)
    estimates = [FeatureProbe.estimate(model, x) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.1)
    took = []
    with FeatureProbe(model, optimizer=optimizer, every=1, window=1, strict=True) as probe:
        for _ in range(3):  # the fastest of three, as the machine may be busy
            model(x).square().mean().backward()
            start = time.perf_counter()
            optimizer.step()
            took.append(time.perf_counter() - start)
    assert probe.report is not None
    assert 0.2 < min(estimate.report_seconds for estimate in estimates) / min(took) < 5
    assert all(estimate.step_seconds > 0 for estimate in estimates)


# --------------------------------------------------------------------------- side effects


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_the_model_is_as_before() -> None:
    """Modes, buffers, gradients, hooks and the random state are untouched; nothing is attached."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Noisy(), nn.Flatten(), nn.Linear(144, 2)
    )
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    FeatureProbe.estimate(model, torch.ones(2, 3, 8, 8))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_as_before_after_an_exception() -> None:
    """A forward that fails leaves no hook and no changed mode."""
    model = mlp().train()
    with pytest.raises(RuntimeError):
        FeatureProbe.estimate(model, torch.ones(2, 11))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


class TwoInputs(nn.Module):
    """A model of two arguments with a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x + shift)}


def test_a_tuple_is_several_arguments() -> None:
    """A tuple as sample is the positional arguments of the model."""
    estimate = FeatureProbe.estimate(TwoInputs(), (torch.ones(4, 3), torch.ones(3)))
    assert [layer.rows for layer in estimate.layers] == [4]


def test_exact_jacobians_need_to_know_the_output() -> None:
    """An output that is no tensor is refused with "exact", unless output= picks f out of it."""
    sample = (torch.ones(4, 3), torch.ones(3))
    with pytest.raises(ConfigurationError, match="output="):
        FeatureProbe.estimate(TwoInputs(), sample, jacobian="exact")
    options = {"relations": "nfa", "output": lambda out: out["logits"]}
    exact = FeatureProbe.estimate(TwoInputs(), sample, jacobian="exact", **options)
    one = FeatureProbe.estimate(TwoInputs(), sample, **options)
    assert exact.layers[0].gram_flops == 2 * one.layers[0].gram_flops > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"relations": "nfaa"}, "unknown relation"),
        ({"include": "encoder"}, "matches no layer"),
        ({"jacobian": "Exact"}, "jacobian"),
        ({"num_probes": 0}, "num_probes"),
        ({"window": 0}, "window"),
        ({"max_dim": 0}, "max_dim"),
    ],
    ids=str,
)
def test_what_the_probe_refuses_is_refused(options: dict[str, Any], match: str) -> None:
    """The options are those of the probe, with its limits."""
    with pytest.raises(ConfigurationError, match=match):
        FeatureProbe.estimate(mlp(), torch.ones(2, 10), **options)
