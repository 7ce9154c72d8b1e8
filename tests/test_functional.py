"""Weights used outside a layer's forward: attention, F.linear, raw products; by oracle."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cases import LAMBDA, assert_all_agree, assert_close, assert_matrices_agree
from products import ALL, N, build, solved
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import FeatureProbe, Report, measure

POWERS = (0.5, 1.0)
#: All but the matrices that differ in their power alone.
SOME = ("fact", "bfact", "nfa", "enfa", "benfa")


def exactly(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Report:
    """`measure` with every relation; the options override."""
    settings: dict[str, Any] = {"relations": oracle.RELATIONS, "powers": POWERS, **options}
    return measure(model, [(x, y)], F.mse_loss, weight_decay=LAMBDA, progress=False, **settings)


def in_the_loop(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Report:
    """One followed step of training; the options go to the probe."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=LAMBDA)
    settings: dict[str, Any] = {
        "relations": oracle.RELATIONS,
        "powers": POWERS,
        "jacobian": "exact",
        "keep_matrices": True,
        **options,
    }
    probe = FeatureProbe(model, optimizer=optimizer, every=1, window=1, strict=True, **settings)
    with probe:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert probe.report is not None
    return probe.report


# --------------------------------------------------------------------------- by oracle


@pytest.mark.parametrize("name", ALL)
def test_the_second_writing_is_the_same_function(name: str) -> None:
    """G by the oracle's rows is autograd's gradient of the model itself."""
    case = solved(name)
    model, x, y = build(name)
    F.mse_loss(model(x), y).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    weights = ALL[name].weights(gradients)
    assert set(weights) == set(case.rows)
    for layer, rows in case.rows.items():
        w, gradient = rows.weight[0], weights[layer].reshape(rows.weight[0].shape)
        assert_close(oracle.fact(rows, 1.0)[0], -w.T @ gradient, 1e-11, layer)


@pytest.mark.parametrize("name", ALL)
def test_measure_is_the_definition(name: str) -> None:
    """Matrices and scores of every relation at frozen weights equal those of the definitions."""
    case = solved(name)
    assert_all_agree(exactly(case.model, case.x, case.y), case.rows)


@pytest.mark.parametrize("name", ALL)
def test_the_loop_is_the_definition(name: str) -> None:
    """A followed step with exact Jacobians has the definitions on its batch."""
    report = in_the_loop(*build(name), relations=SOME, powers=1.0)
    assert_all_agree(report, solved(name).rows)
    assert {record.n_examples for record in report.records} == {N}


@pytest.mark.parametrize("name", ALL)
def test_frozen_weights_are_measured(name: str) -> None:
    """With every parameter frozen, G is formed as the sum of g hᵀ of every use."""
    if "checkpoint" in name:
        pytest.skip("no leaf can be injected there: tested in test_functional_use.py")
    model, x, y = build(name)
    model.requires_grad_(False)
    report = exactly(model, x, y, relations=SOME, powers=1.0)
    assert_all_agree(report, solved(name).rows)
    assert report.coverage.gaps() == ()


@pytest.mark.parametrize("run", [exactly, in_the_loop])
@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].reducible])
def test_reduced_positions(name: str, run: Any) -> None:
    """positions="reduce" sums an example's positions and calls first."""
    report = run(*build(name), relations=("nfa", "enfa", "bnfa"), positions="reduce")
    assert_all_agree(report, solved(name).rows, positions="reduce")


@pytest.mark.parametrize("name", ["self", "self, positions first", "cross, positions first"])
@pytest.mark.parametrize("run", [exactly, in_the_loop])
def test_reduced_positions_of_attention(name: str, run: Any) -> None:
    """Attention's projections find the example axis though torch has the positions first.

    The keys' gradients add up to zero over positions (softmax does not see a shift of all keys).
    """
    report = run(*build(name), relations=("nfa", "enfa"), powers=1.0, positions="reduce")
    for layer, rows in solved(name).rows.items():
        for relation in () if layer.endswith(".k") else ("nfa", "enfa"):
            assert_matrices_agree(report, layer, rows, relation, positions="reduce")
    keys = report.matrix("attention.in_proj.k", "nfa", power=1.0)
    queries = report.matrix("attention.in_proj.q", "nfa", power=1.0)
    assert keys.norm() < 1e-20 * queries.norm()


@pytest.mark.parametrize(
    "name", ["self", "cross", "encoder", "h @ w", "slices of a layer's weight"]
)
def test_batches_of_any_size_add_up(name: str) -> None:
    """Split into two batches the numbers are those of the whole."""
    case = solved(name)
    batches = [(case.x[:3], case.y[:3]), (case.x[3:], case.y[3:])]
    report = measure(
        case.model, batches, F.mse_loss, weight_decay=LAMBDA, relations=SOME, progress=False
    )
    assert_all_agree(report, case.rows)


@pytest.mark.parametrize("name", ALL)
def test_training_is_bit_identical(name: str) -> None:
    """Two steps with the probe and without leave the same bits, and no mode behind."""
    states = []
    for probed in (False, True):
        model, x, y = build(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA, momentum=0.9)
        probe = FeatureProbe(
            model, optimizer=optimizer, every=1, window=1, strict=True,
            relations=("bfact", "bnfa", "benfa"), powers=1.0,
        )  # fmt: skip
        if probed:
            probe.attach()
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        probe.detach()
        states.append(model.state_dict())
        assert torch.overrides._get_current_function_mode_stack() == []
    assert all(
        torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True)
    )
