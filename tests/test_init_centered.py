"""The init-centred relations: W − W₀ in the place of W, in the loop and at frozen weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import ConfigurationError, FeatureProbe, NotMeasuredError, Report, measure

CENTERED = ("init_centered_nfa", "init_centered_enfa")


def network(seed: int = 0) -> nn.Sequential:
    """Three Linears, float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 3, generator=generator, dtype=torch.float64)


def train(model: nn.Module, steps: int = 20) -> None:
    """Some steps of full batches."""
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def oracle(model: nn.Sequential, before: nn.Sequential, layer: int, name: str, s: float) -> float:
    """cos(W_cᵀW_c, (W_cᵀMW_c)ˢ) by numpy from autograd's Jacobians, one example at a time."""
    x, y = data()
    change = (model[layer].weight - before[layer].weight).detach().numpy()
    matrix = np.zeros((len(change), len(change)))
    for one, target in zip(x, y, strict=True):
        hidden = model[: layer + 1](one)

        def rest(z: Tensor, target: Tensor = target) -> Tensor:
            out = model[layer + 1 :](z)
            return out if name == "init_centered_nfa" else F.mse_loss(out, target)[None]

        jacobian = torch.autograd.functional.jacobian(rest, hidden).numpy()
        matrix += jacobian.T @ jacobian / len(x)
    values, vectors = np.linalg.eigh(change.T @ matrix @ change)
    values = np.where(values > 1e-12 * values.max(), values, 0.0)
    predicted = (vectors * np.where(values > 0, values, 1.0) ** s * (values > 0)) @ vectors.T
    gram = change.T @ change
    return float((gram * predicted).sum() / np.linalg.norm(gram) / np.linalg.norm(predicted))


def measured(model: nn.Module, initial: Any, **options: Any) -> Report:
    """At frozen weights."""
    settings = {"relations": CENTERED, "progress": False, "initial_weights": initial}
    return measure(model, [data()], F.mse_loss, **{**settings, **options})


@pytest.mark.parametrize("name", CENTERED)
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_measure_is_the_definition(layer: int, power: float, name: str) -> None:
    """Cosine, matrices and the level by chance are those of W − W₀."""
    model, before = network(), network()
    train(model)
    report = measured(model, before.state_dict())
    found = report.record(str(layer), name, power)
    assert found.cosine == pytest.approx(oracle(model, before, layer, name, power), rel=1e-9)
    change = (model[layer].weight - before[layer].weight).detach()
    torch.testing.assert_close(
        report.matrix(str(layer), "init_centered_nfm"), change.T @ change, rtol=1e-12, atol=0
    )
    uncentered = measured(model, before, relations=name.removeprefix("init_centered_"))
    plain = uncentered.record(str(layer), name.removeprefix("init_centered_"), power)
    assert layer == 4 or abs(plain.cosine - found.cosine) > 1e-3
    assert (found.verdict == "trivial") == (layer == 4 and name == "init_centered_nfa")


def test_it_is_the_plain_relation_of_the_difference() -> None:
    """With K and E of this network and W − W₀ for W, every number is that of nfa and enfa."""
    model, before = network(), network()
    train(model)
    report = measured(model, before, relations=(*CENTERED, "nfa", "enfa"))
    zero = copy.deepcopy(before)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    same = measured(model, zero)
    for record in same.records:
        plain = report.record(record.layer, record.relation.removeprefix("init_centered_"),
                              record.power)  # fmt: skip
        for field in ("cosine", "pearson", "shared_weight_cosine", "fitted_power", "depth_cosine"):
            one, other = getattr(record, field), getattr(plain, field)
            assert one == pytest.approx(other, rel=1e-9) or (math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize("store", ["device", "cpu", "half"])
def test_the_loop_takes_the_weights_as_they_stand_when_attached(store: Any) -> None:
    """On full batches a report of the loop is that of measure with the weights of the start."""
    model = network()
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    before = copy.deepcopy(model)
    probe = FeatureProbe(
        model, optimizer=optimizer, every=10, window=1, relations=CENTERED, jacobian="exact",
        initial_store=store, strict=True,
    )  # fmt: skip
    reports = []
    with probe:
        for _ in range(21):
            stood = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            if probe.report is not None and probe.report not in reports:
                reports.append(probe.report)
    first, _, last = reports
    for record in first.records:
        assert math.isnan(record.cosine)
        assert record.status == {
            "half": "W − W₀ is not known: it is no larger than what W₀ in float16 resolves"
        }.get(store, "W = W₀: the weight has not changed since initialisation")
    now = network()
    now.load_state_dict(stood)
    allowed = {"device": 1e-9, "cpu": 1e-9, "half": 5e-3}[store]
    for record in measured(now, before).records:
        found = last.record(record.layer, record.relation, record.power)
        assert found.cosine == pytest.approx(record.cosine, rel=allowed)


def test_a_resumed_run_has_the_weights_of_its_start() -> None:
    """state_dict holds W₀, and the probe of a resumed run does not take its own."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def run(probe: FeatureProbe, steps: int) -> None:
        x, y = data()
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()

    def probe() -> FeatureProbe:
        return FeatureProbe(model, optimizer=optimizer, every=4, window=1, relations=CENTERED)

    first = probe()
    with first:
        run(first, 6)
    state = first.state_dict()
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with first:
        run(first, 4)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    second = probe()
    second.load_state_dict(state)
    with second:
        run(second, 4)
    assert first.report is not None
    assert second.report is not None
    assert second.report.records == first.report.records


def test_what_initial_weights_may_be(tmp_path: Path) -> None:
    """A module, its state dict, a checkpoint that holds one, a file; names of wrappers come off."""
    model, before = network(), network()
    train(model)
    state = before.state_dict()
    torch.save({"model": state, "step": 3}, tmp_path / "checkpoint.pt")
    given = [
        before, state, {"state_dict": state}, tmp_path / "checkpoint.pt",
        str(tmp_path / "checkpoint.pt"), {f"module.{name}": value for name, value in state.items()},
    ]  # fmt: skip
    reports = [measured(model, one).records for one in given]
    assert all(records == reports[0] for records in reports)
    assert not math.isnan(reports[0][0].cosine)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, "init_centered_nfa needs initial_weights="),
        (3, "must be a state dict, a file of one or a module, got int"),
        ({"0.weight": torch.zeros(2, 2)}, r"0.weight of shape \[2, 2\], the model \[8, 6\]"),
        ({"other": torch.zeros(2, 2)}, "none of the model's weights: it has other"),
        ({}, "it has nothing"),
    ],
)
def test_initial_weights_that_are_none(given: Any, match: str) -> None:
    """What does not belong to the model is refused beforehand."""
    with pytest.raises(ConfigurationError, match=match):
        measured(network(), given)


def test_a_layer_without_initial_weights() -> None:
    """A part of the state dict is enough: the other layers say why they have no number."""
    model, before = network(), network()
    train(model)
    report = measured(model, {"0.weight": before.state_dict()["0.weight"]})
    assert not math.isnan(report.record("0", "init_centered_nfa", 1.0).cosine)
    other = report.record("2", "init_centered_nfa", 1.0)
    assert other.verdict == "undefined"
    assert other.status == "W₀ is not known: there was no such weight in initial_weights"
    with pytest.raises(NotMeasuredError, match="no such weight in initial_weights"):
        report.matrix("2", "init_centered_nfm")


def test_without_them_nothing_is_kept() -> None:
    """W₀ is only held where a relation asks for it, and the estimate counts it."""
    model = network()
    x, _ = data()
    plain = FeatureProbe.estimate(model, x, relations="nfa")
    centered = FeatureProbe.estimate(model, x, relations=("nfa", "init_centered_nfa"))
    weights = sum(p.numel() * 8 for p in model.parameters() if p.dim() > 1)
    assert centered.bytes_held - plain.bytes_held == weights
    assert FeatureProbe(model, relations="nfa").state_dict()["initial_weights"] == {}


@pytest.mark.parametrize("store", ["gpu", None])
def test_where_they_cannot_be_kept(store: Any) -> None:
    """Another store is refused."""
    with pytest.raises(ConfigurationError, match="device, cpu or half"):
        FeatureProbe(network(), relations=CENTERED, initial_store=store)


def test_intervals_of_centred_scores() -> None:
    """The jackknife works on W − W₀ as on W."""
    model, before = network(), network()
    train(model)
    x, y = data()
    batches = list(zip(x.split(5), y.split(5), strict=True))
    report = measure(
        model, batches, F.mse_loss, relations=("nfa", *CENTERED), initial_weights=before,
        jackknife=8, progress=False,
    )  # fmt: skip
    centered = report.record("0", "init_centered_nfa", 1.0)
    assert centered.cosine_low <= centered.cosine_corrected <= centered.cosine_high
    assert centered.cosine_low != report.record("0", "nfa", 1.0).cosine_low


def test_a_computed_weight_has_no_initial_one() -> None:
    """Under weight_norm W is made of other parameters; the layers beside it are measured."""
    model, before = network(), network()
    train(model)
    nn.utils.parametrizations.weight_norm(model[2])
    report = measured(model, before)
    assert not math.isnan(report.record("0", "init_centered_nfa", 1.0).cosine)
    status = report.record("2", "init_centered_nfa", 1.0).status
    assert status == "W₀ is not known: the weight is computed from other parameters"
