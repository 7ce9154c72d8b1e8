"""The probe in the loop against the brute-force oracle, and what a window's means are."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import (
    CASES,
    LAMBDA,
    POWERS,
    N,
    Problem,
    assert_all_agree,
    assert_close,
    assert_matrices_agree,
    assert_scores_agree,
    build,
)
from torch import nn

from feature_probe import FeatureProbe

# torch's own remark about speed, on the models under test
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


# --------------------------------------------------------------------------- in the loop

LOOP_CASES = [
    "linear [n,d]",
    "linear [n,s,d]",
    "three layers",
    "output [n,s,V]",
    "called three times",
    "tied weights",
    "in place",
    "in place conv",
    "attention",
    "linear folded [n*s,d]",
    "conv1d same, even kernel",
    "conv2d groups, every option",
    "conv3d",
]


def train_step(problem: Problem, optimizer: torch.optim.Optimizer) -> None:
    """One ordinary step on the problem's batch."""
    optimizer.zero_grad()
    problem.loss_fn(problem.model(problem.x.clone()), problem.y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", LOOP_CASES)
def test_in_the_loop_with_window_one_is_the_definition(name: str) -> None:
    """window=1 with exact Jacobians: the definitions on that minibatch at those weights."""
    problem = build(CASES[name])
    problem.model.train()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05, weight_decay=LAMBDA)
    probe = FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    )
    generator = torch.Generator().manual_seed(9)
    with probe:
        for step in range(3):
            x = torch.randn(problem.x.shape, generator=generator, dtype=torch.float64)
            problem = Problem(problem.model, x, problem.y, problem.loss_fn, problem.layers)
            state = {k: v.clone() for k, v in problem.model.state_dict().items()}
            train_step(problem, optimizer)
            report = probe.report
            assert report is not None
            assert report.step == step
            assert probe.faults == 0
            frozen = build(CASES[name])  # the oracle runs a model of its own, unknown to the probe
            frozen.model.load_state_dict(state)
            rows = Problem(frozen.model, x, problem.y, problem.loss_fn, problem.layers).rows()
            assert_all_agree(report, rows)
            for record in report.records:
                assert record.n_examples == N
                assert record.n_rows == rows[record.layer].n_rows
                assert record.weight_decay == LAMBDA
                assert record.step == step


def test_in_the_loop_summed_loss() -> None:
    """loss_reduction="sum": G is the minibatch's summed gradient and g_i is not rescaled."""
    problem = build(CASES["linear [n,s,d]"])
    problem = Problem(
        problem.model, problem.x, problem.y, nn.MSELoss(reduction="sum"), problem.layers
    )
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01, weight_decay=LAMBDA)
    rows = problem.rows()
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        loss_reduction="sum",
        keep_matrices=True,
    ) as probe:
        train_step(problem, optimizer)
    assert_all_agree(probe.report, rows, times=N)


def test_in_the_loop_maximize_turns_the_sign() -> None:
    """An optimizer that maximises minimises −loss: G, FACT and bFACT change sign, E does not."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    optimizer = torch.optim.SGD(
        problem.model.parameters(), lr=0.05, weight_decay=LAMBDA, maximize=True
    )
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        train_step(problem, optimizer)
    assert_all_agree(probe.report, rows, times=-1.0)


def test_in_the_loop_weight_decay_of_each_group() -> None:
    """λ is read from the group of each parameter; a group without decay says so."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    optimizer = torch.optim.SGD(
        [
            {"params": list(problem.model[0].parameters()), "weight_decay": 0.2},
            {"params": list(problem.model[2].parameters()), "weight_decay": 0.0},
            {"params": list(problem.model[4].parameters())},
        ],
        lr=0.05,
        weight_decay=0.05,
    )
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=("fact", "bfact"),
        keep_matrices=True,
    ) as probe:
        train_step(problem, optimizer)
    for layer, weight_decay in {"0": 0.2, "2": 0.0, "4": 0.05}.items():
        record = probe.report.record(layer, "fact")
        assert record.weight_decay == weight_decay
        assert ("no weight decay" in record.status) == (weight_decay == 0.0)
        for relation in ("fact", "bfact"):
            options = {"weight_decay": weight_decay}
            assert_matrices_agree(probe.report, layer, rows[layer], relation, **options)
            assert_scores_agree(probe.report, layer, rows[layer], relation, **options)


def test_manual_stepping_without_an_optimizer() -> None:
    """probe.step() after backward does what the optimizer's hook does."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    with FeatureProbe(
        problem.model,
        every=1,
        window=1,
        weight_decay=LAMBDA,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        problem.loss_fn(problem.model(problem.x), problem.y).backward()
        probe.step()
    assert probe.report.step == 0
    assert_all_agree(probe.report, rows)


def test_a_window_at_frozen_weights_is_the_definition_on_the_union() -> None:
    """At lr = 0 a window of three minibatches is one measurement on the twelve examples."""
    problem = build(CASES["three layers"], n=12)
    rows = problem.rows()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0, weight_decay=LAMBDA)
    probe = FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=lambda step: step == 4,
        window=3,
        relations=oracle.RELATIONS,
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    )
    batches = list(zip(problem.x.split(4), problem.y.split(4), strict=True))
    with probe:
        for step in range(5):
            x, y = batches[(step + 1) % 3] if step >= 2 else batches[0]
            part = Problem(problem.model, x, y, problem.loss_fn, problem.layers)
            train_step(part, optimizer)
            assert (probe.report is not None) == (step == 4)
    assert probe.report.step == 4
    assert {record.n_examples for record in probe.report.records} == {12}
    assert_all_agree(probe.report, rows)


def test_a_window_takes_means_and_the_last_weights() -> None:
    """G is the mean over steps, K and E are means over examples, W is the last step's."""
    problem = build(CASES["three layers"], n=12)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.2, weight_decay=LAMBDA)
    sizes = (2, 7, 3)
    steps = []
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=lambda step: step == 2,
        window=3,
        relations=oracle.RELATIONS,
        powers=(1.0,),
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        for x, y in zip(problem.x.split(sizes), problem.y.split(sizes), strict=True):
            part = Problem(problem.model, x, y, problem.loss_fn, problem.layers)
            twin = build(CASES["three layers"])
            twin.model.load_state_dict(problem.model.state_dict())
            steps.append(Problem(twin.model, x, y, problem.loss_fn, problem.layers).rows())
            train_step(part, optimizer)
    report = probe.report
    assert {record.n_examples for record in report.records} == {12}
    for layer in problem.layers:
        w = steps[-1][layer].weight[0]
        assert float((w - steps[0][layer].weight[0]).norm() / w.norm()) > 1e-3
        gradients = [
            torch.einsum("npgo,npgi->oi", rows[layer].g, rows[layer].h) / rows[layer].n
            for rows in steps
        ]
        g = sum(gradients) / len(steps)
        sums = {
            of: sum(
                rows[layer].n * oracle.mean_gradient_square(rows[layer], of, "output")[0]
                for rows in steps
            )
            / 12
            for of in ("output", "loss")
        }
        expected = {
            "nfm": w.T @ w,
            "fact": -w.T @ g / LAMBDA,
            "bfact": -w @ g.T / LAMBDA,
            "nfa": w.T @ sums["output"] @ w,
            "enfa": w.T @ sums["loss"] @ w,
            "bnfa": sums["output"],
            "benfa": sums["loss"],
        }
        for kind, matrix in expected.items():
            assert_close(report.matrix(layer, kind), matrix, 1e-10, f"{layer} {kind}")


def test_gradient_accumulation_keeps_fact() -> None:
    """Two half-weighted backward passes before a step: G, FACT and the counts are the batch's."""
    problem = build(CASES["three layers"], n=8)
    rows = problem.rows()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05, weight_decay=LAMBDA)
    with FeatureProbe(
        problem.model,
        optimizer=optimizer,
        every=1,
        window=1,
        relations=("fact", "bfact", "fact_sym", "bfact_sym", "nfa", "bnfa"),
        powers=POWERS,
        jacobian="exact",
        keep_matrices=True,
    ) as probe:
        for x, y in zip(problem.x.split(4), problem.y.split(4), strict=True):
            (problem.loss_fn(problem.model(x), y) / 2).backward()
        optimizer.step()
    assert {record.n_examples for record in probe.report.records} == {8}
    assert_all_agree(probe.report, rows)
