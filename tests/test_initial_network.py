"""Relations with the whole initial network, and the speed of alignment, in the loop and frozen."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from feature_probe import (
    ConfigurationError,
    Diagnosis,
    FeatureProbe,
    NotMeasuredError,
    Report,
    measure,
)
from feature_probe.reports.verdicts import Standing, judged

DOUBLY = ("double_centered_nfa", "ptk_centered_nfa")
LAYERS = (0, 2, 4)


def network(seed: int = 0) -> nn.Sequential:
    """Three Linears, float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def noisy(seed: int = 0) -> nn.Sequential:
    """With dropout and batch norm."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
    ).double()


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 3, generator=generator, dtype=torch.float64)


def train(model: nn.Module, steps: int = 20, rate: float = 0.2) -> None:
    """Some steps of full batches."""
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def jacobians(model: nn.Sequential, layer: int) -> np.ndarray[Any, Any]:
    """∂f/∂z of a layer at every example, ``[n, outputs, d_out]``, one at a time by autograd."""
    found = []
    for one in data()[0]:
        hidden = model[: layer + 1](one)
        found.append(torch.autograd.functional.jacobian(model[layer + 1 :], hidden).numpy())
    return np.stack(found)


def mean_outer(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(1/n) Σ JᵀJ."""
    return np.einsum("nci,ncj->ij", rows, rows) / len(rows)


def agreement(basis: Any, matrix: np.ndarray[Any, Any], s: float) -> float:
    """cos(BᵀB, (BᵀMB)ˢ) by numpy."""
    basis = np.asarray(basis)
    values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
    kept = values > 1e-12 * values.max()
    predicted = (vectors[:, kept] * values[kept] ** s) @ vectors[:, kept].T
    gram = basis.T @ basis
    return float((gram * predicted).sum() / np.linalg.norm(gram) / np.linalg.norm(predicted))


def measured(model: nn.Module, initial: Any, **options: Any) -> Report:
    """At frozen weights."""
    settings = {"relations": DOUBLY, "progress": False, "initial_weights": initial}
    return measure(model, [data()], F.mse_loss, **{**settings, **options})


def in_the_loop(
    model: nn.Module,
    steps: int = 5,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    rate: float = 0.2,
    **options: Any,
) -> list[Report]:
    """The reports of a loop over full batches."""
    kept: list[Report] = []

    class Keep:
        def write(self, report: Report) -> None:
            kept.append(report)

        def close(self) -> None:
            """Nothing."""

    x, y = data()
    own = optimizer(model.parameters(), lr=rate)
    settings: dict[str, Any] = {
        "relations": DOUBLY, "every": 1, "window": 1, "jacobian": "exact", "strict": True,
        "keep_matrices": True, "sinks": [Keep()],
    }  # fmt: skip
    with FeatureProbe(model, optimizer=own, **{**settings, **options}):
        for _ in range(steps):
            own.zero_grad()
            F.mse_loss(model(x), y).backward()
            own.step()
    return kept


def k_bar(report: Report, layer: str) -> Tensor:
    """K̄ of a report."""
    found = report.statistics[layer].jacobian_change
    assert found is not None
    return found[0]


# --------------------------------------------------------------------------- the definitions


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("layer", LAYERS[:2])
def test_measure_is_the_definition(layer: int, power: float) -> None:
    """Ansatz 5 and 6 with J and J⁰ example by example."""
    model, before = network(), network()
    train(model)
    changed = mean_outer(jacobians(model, layer) - jacobians(before, layer))
    report = measured(model, before.state_dict(), powers=power)
    change = (model[layer].weight - before[layer].weight).detach().numpy()
    initial = before[layer].weight.detach().numpy()
    assert np.allclose(k_bar(report, str(layer)), changed, rtol=1e-9, atol=1e-14)
    double = report.record(str(layer), "double_centered_nfa", power).cosine
    ptk = report.record(str(layer), "ptk_centered_nfa", power).cosine
    assert double == pytest.approx(agreement(change, changed, power), abs=1e-9)
    assert ptk == pytest.approx(agreement(initial, changed, power), abs=1e-9)
    nfm = report.matrix(str(layer), "initial_nfm")
    assert np.allclose(nfm, initial.T @ initial, rtol=1e-12, atol=0)


def test_the_initial_network_is_wanted_not_only_the_layer() -> None:
    """With the layer's own W₀ in the network as it is K̄ would be another matrix."""
    model, before = network(), network()
    train(model)
    hybrid = copy.deepcopy(model)
    hybrid[2].load_state_dict(before[2].state_dict())
    right = k_bar(measured(model, before.state_dict()), "2")
    wrong = k_bar(measured(model, hybrid.state_dict()), "2")
    assert float((right - wrong).norm() / right.norm()) > 0.1


@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_convolutions(positions: Any) -> None:
    """K̄ over positions: outer products per position, or of the sums over them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 3, 2), nn.Flatten(), nn.Linear(15, 2)
    ).double()
    before = copy.deepcopy(model)
    x, y = torch.randn(7, 2, 8, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    report = measure(
        model, [(x[:3], y[:3]), (x[3:], y[3:])], F.mse_loss, relations=DOUBLY, progress=False,
        initial_weights=before, positions=positions,
    )  # fmt: skip
    expected = np.zeros((3, 3))
    for one in x:
        rows = []
        for net in (model, before):
            hidden = net[:3](one[None])
            rows.append(torch.autograd.functional.jacobian(net[3:], hidden)[0, :, 0].numpy())
        gap = rows[0] - rows[1]  # [outputs, channels, positions]
        gap = gap if positions == "expand" else gap.sum(-1, keepdims=True)
        expected += np.einsum("cip,cjp->ij", gap, gap) / len(x)
    assert np.allclose(k_bar(report, "2"), expected, rtol=1e-9, atol=1e-14)


def test_random_products_use_the_same_vectors() -> None:
    """Their mean is K̄, not K + K⁰; at the initial weights it is 0 for every draw."""
    model, before = network(), network()
    train(model)
    exact = k_bar(measured(model, before.state_dict()), "2")
    draws = torch.stack(
        [
            k_bar(measured(model, before.state_dict(), jacobian="random", seed=seed), "2")
            for seed in range(25)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() < 5 * error).all())
    assert not k_bar(measured(before, before, jacobian="random"), "2").any()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_speed_of_alignment(layer: int, power: float) -> None:
    """ρ(GᵀG, (GᵀKG)ˢ), C-NFA paper Prop. 3, with G by autograd."""
    model = network()
    x, y = data()
    (gradient,) = torch.autograd.grad(F.mse_loss(model(x), y), [model[layer].weight])
    matrix = mean_outer(jacobians(model, layer)) if layer < LAYERS[-1] else np.eye(3)
    report = measure(
        model, [data()], F.mse_loss, relations="alignment_speed", powers=power, progress=False
    )
    record = report.record(str(layer), "alignment_speed", power)
    assert record.cosine == pytest.approx(agreement(gradient, matrix, power), abs=1e-9)
    assert (record.verdict == "trivial") == (layer == LAYERS[-1])


def test_it_is_what_the_centred_nfa_starts_with() -> None:
    """One small step of gradient descent: C-NFA is the speed, to the step's size."""
    model, before = network(), network()
    speed = measure(
        model, [data()], F.mse_loss, relations="alignment_speed", powers=1.0, progress=False
    )
    train(model, steps=1, rate=1e-5)
    reached = measured(model, before, relations="init_centered_nfa", powers=1.0)
    for layer in LAYERS[:2]:
        start = speed.record(str(layer), "alignment_speed").cosine
        assert reached.record(str(layer), "init_centered_nfa").cosine == pytest.approx(
            start, abs=1e-4
        )
        assert start < 0.9999


# --------------------------------------------------------------------------- the loop


def test_the_loop_is_measure_at_every_step() -> None:
    """Each step's weights against those at attaching."""
    model, before = network(), network()
    reports = in_the_loop(model, steps=4)
    twin = network()
    for step, report in enumerate(reports):
        if step:
            train(twin, steps=1)
        reference = measured(twin, before)
        for layer in ("0", "2"):
            torch.testing.assert_close(
                k_bar(report, layer), k_bar(reference, layer), rtol=1e-9, atol=1e-15
            )
            for relation in DOUBLY:
                got = report.record(layer, relation, 1.0).cosine
                assert got == pytest.approx(
                    reference.record(layer, relation, 1.0).cosine, abs=1e-9, nan_ok=True
                )
    assert "zero" in reports[0].record("0", "ptk_centered_nfa", 1.0).status
    assert not math.isnan(reports[-1].record("0", "double_centered_nfa", 1.0).cosine)


def test_random_masks_and_batch_statistics_are_the_passes_own() -> None:
    """At step 0 the two networks are one: K̄ is 0, under dropout and batch norm in training."""
    for draw in ("exact", "random"):
        reports = in_the_loop(noisy(), steps=3, jacobian=draw)
        assert not k_bar(reports[0], "0").any()
        assert k_bar(reports[2], "0").any()


@pytest.mark.parametrize("store", ["device", "cpu"])
def test_training_is_bit_identical(store: Any) -> None:
    """With dropout and batch norm, whose random state and statistics the copy must leave alone."""
    plain, probed = noisy(), noisy()
    torch.manual_seed(5)
    train(plain, steps=10)
    torch.manual_seed(5)
    in_the_loop(probed, steps=10, initial_store=store, relations=(*DOUBLY, "alignment_speed"))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, probed.state_dict()[name]), name


def test_kept_in_main_memory_it_is_the_same() -> None:
    """On the CPU both are."""
    stored = in_the_loop(network(), initial_store="cpu")
    beside = in_the_loop(network())
    assert torch.equal(k_bar(stored[-1], "2"), k_bar(beside[-1], "2"))


def test_reentrant_checkpoints_have_it_by_the_shadow() -> None:
    """The user's own pass has no graph there."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            hidden: Any = checkpoint(self.body[:4], x.requires_grad_(), use_reentrant=True)
            out: Tensor = self.body[4](hidden)
            return out

    plain = in_the_loop(network(), steps=3)
    with_checkpoint = in_the_loop(Checkpointed(), steps=3)
    torch.testing.assert_close(
        k_bar(with_checkpoint[-1], "body.2"), k_bar(plain[-1], "2"), rtol=1e-9, atol=1e-15
    )


def test_a_compiled_model() -> None:
    """It is followed by its shadow, and the copy runs eagerly."""
    model = network()
    compiled = torch.compile(model, backend="eager")
    kept = in_the_loop(compiled, steps=3)  # type: ignore[arg-type]
    plain = in_the_loop(network(), steps=3)
    torch.testing.assert_close(k_bar(kept[-1], "2"), k_bar(plain[-1], "2"), rtol=1e-9, atol=1e-15)


def test_the_speed_of_the_updates_is_that_of_the_motion() -> None:
    """Adam's motion over the window in the place of −G, whatever the optimizer."""
    model, before = network(), network()
    reports = in_the_loop(
        model, steps=2, optimizer=torch.optim.Adam, rate=0.01, window=2,
        relations=("update_alignment_speed", "alignment_speed"), powers=1.0,
    )  # fmt: skip
    assert "two steps" in reports[0].record("0", "update_alignment_speed").status
    twin = network()
    steps = []

    class Keep:
        def write(self, report: Report) -> None:
            steps.append(report)

        def close(self) -> None:
            """Nothing."""

    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    x, y = data()
    with FeatureProbe(
        twin, optimizer=optimizer, every=lambda step: step == 1, window=2, jacobian="exact",
        relations="update_alignment_speed", powers=1.0, sinks=[Keep()], strict=True,
    ):  # fmt: skip
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(twin(x), y).backward()
            optimizer.step()
    moved = network()
    own = torch.optim.Adam(moved.parameters(), lr=0.01)
    F.mse_loss(moved(x), y).backward()
    own.step()
    for layer in LAYERS[:2]:
        motion = (moved[layer].weight - before[layer].weight).detach().numpy()
        both = mean_outer(jacobians(moved, layer)) + mean_outer(jacobians(before, layer))
        got = steps[0].record(str(layer), "update_alignment_speed").cosine
        assert got == pytest.approx(agreement(motion, both / 2, 1.0), abs=1e-9)


def test_a_resumed_run_goes_on_with_the_same_initial_network(tmp_path: Path) -> None:
    """Also where the weights at attaching are others by then."""
    straight = in_the_loop(network(), steps=6)[-1]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    x, y = data()
    settings: dict[str, Any] = {
        "relations": DOUBLY, "every": 1, "window": 1, "jacobian": "exact", "strict": True,
        "keep_matrices": True,
    }  # fmt: skip

    def run(probe: FeatureProbe, steps: int) -> None:
        with probe:
            for _ in range(steps):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()

    first = FeatureProbe(model, optimizer=optimizer, **settings)
    run(first, 3)
    torch.save(first.state_dict(), tmp_path / "probe.pt")
    second = FeatureProbe(model, optimizer=optimizer, **settings)
    second.load_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    run(second, 3)
    assert second.report is not None
    torch.testing.assert_close(k_bar(second.report, "2"), k_bar(straight, "2"), rtol=0, atol=0)


def test_several_calls_of_a_layer_are_paired_in_order() -> None:
    """A layer that is used twice has J − J⁰ of each use."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))
            return out

    torch.manual_seed(0)
    model = Twice().double()
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    report = measured(model, before)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for one in data()[0]:
        gaps = []
        for net in (model, before):
            z1 = net.inner(one)
            z2 = net.inner(torch.tanh(z1))

            def after_first(z: Tensor, net: Any = net) -> Tensor:
                return net.last(torch.tanh(net.inner(torch.tanh(z))))  # type: ignore[no-any-return]

            def after_second(z: Tensor, net: Any = net) -> Tensor:
                return net.last(torch.tanh(z))  # type: ignore[no-any-return]

            gaps.append(
                [
                    torch.autograd.functional.jacobian(after_first, z1),
                    torch.autograd.functional.jacobian(after_second, z2),
                ]
            )
        for now, then in zip(*gaps, strict=True):
            expected += (now - then).T @ (now - then) / len(data()[0])
    torch.testing.assert_close(k_bar(report, "inner"), expected, rtol=1e-9, atol=1e-14)


# --------------------------------------------------------------------------- what is refused


def test_what_cannot_be_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state dict without a buffer, half precision, shards, what cannot be copied, no W₀."""
    model = noisy()
    state = {name: value for name, value in model.state_dict().items() if "running" not in name}
    with pytest.raises(ConfigurationError, match=r"lacks 1\.running_mean"):
        FeatureProbe(model, relations=DOUBLY, initial_weights=state)
    with pytest.raises(ConfigurationError, match="float16"):
        FeatureProbe(model, relations=DOUBLY, initial_store="half")
    with pytest.raises(ConfigurationError, match="needs initial_weights"):
        measured(model, None)

    with monkeypatch.context() as patched:
        patched.setattr("feature_probe.sums.initial_network.is_sharded", lambda _: True)
        with pytest.raises(ConfigurationError, match="fully_shard"):
            FeatureProbe(model, relations=DOUBLY)

    class Stubborn(nn.Sequential):
        def __deepcopy__(self, memo: dict[int, Any]) -> Stubborn:
            raise TypeError("not me")

    stubborn = Stubborn(nn.Linear(6, 4), nn.Linear(4, 3)).double()
    with pytest.raises(ConfigurationError, match="not me"):
        measured(stubborn, stubborn.state_dict())
    probe = FeatureProbe(stubborn, relations=DOUBLY)
    with pytest.raises(ConfigurationError, match="not me"):
        probe.attach()
    assert not probe.is_attached


def test_reasons_are_told_where_a_matrix_is_missing() -> None:
    """At frozen weights nothing moves; not asked for is not measured."""
    report = measured(network(), network(1), relations=("update_alignment_speed", "nfa"))
    record = report.record("0", "update_alignment_speed", 1.0)
    assert math.isnan(record.cosine)
    assert "frozen weights do not move" in record.status
    with pytest.raises(NotMeasuredError, match="not asked for"):
        report.matrix("0", "double_centered_nfa")


def test_an_input_changed_in_place_is_told() -> None:
    """The initial network would see another one."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x.mul_(2))
            return out

    report = measured(InPlace(), InPlace())
    assert "in place" in report.record("inner.0", "double_centered_nfa", 1.0).status


def test_nothing_is_left_of_the_copy() -> None:
    """Neither hooks on the model nor the initial network itself."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = FeatureProbe(model, optimizer=optimizer, relations=DOUBLY, every=1, window=1)
    x, y = data()
    with probe:
        held = weakref.ref(probe._initial_network.module)  # type: ignore[union-attr]
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    del probe
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("name", ["alignment_speed", "update_alignment_speed"])
def test_a_speed_is_judged_by_chance_alone(name: str) -> None:
    """It is asked for at initialisation: what it was there is nothing that it must exceed."""
    record = replace(
        measured(network(), network(), relations="alignment_speed").records[0],
        relation=name, cosine=0.95, initial_cosine=0.94, shared_weight_cosine=0.3,
        chance_spread=0.02, chance_arctanh_spread=0.02, n_examples=1000,
    )  # fmt: skip
    standing = Standing(Diagnosis("0"), None, 8)
    assert judged(record, standing).verdict == "aligned"
    unsure = judged(replace(record, chance_arctanh_spread=0.4), standing)
    assert unsure.verdict == "cannot tell"
    assert "rank 1" in unsure.because
    # the weight itself is held to its start
    assert judged(replace(record, relation="nfa"), standing).because.count("initialisation") == 1
