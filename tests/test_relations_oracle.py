"""`measure` against the brute-force oracle: properties × named cases."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from cases import (
    CASES,
    LAMBDA,
    POWERS,
    Case,
    N,
    Problem,
    assert_all_agree,
    assert_close,
    assert_matrices_agree,
    assert_scores_agree,
    blocks,
    build,
    exactly,
    measured,
    solved,
)
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import Report, measure

# torch's own remark about speed, on the models under test
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


# --------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("name", CASES)
def test_oracle_rows_are_the_layers_rows(name: str) -> None:
    """W·rows is the layer's output without bias, so the oracle's patches are the right ones."""
    problem, rows = solved(name)
    outputs: dict[str, list[Tensor]] = {layer: [] for layer in problem.layers}

    def keep(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            bias = 0.0
            if module.bias is not None:
                shape = (-1,) if isinstance(module, nn.Linear) else (-1, *[1] * (output.dim() - 2))
                bias = module.bias.detach().reshape(shape)
            outputs[layer].append(oracle.output_rows(module, output.detach() - bias))

        return hook

    handles = [
        problem.model.get_submodule(module).register_forward_hook(keep(layer))
        for layer, modules in problem.layers.items()
        for module in modules
    ]
    problem.model(problem.x[:1].clone())
    for handle in handles:
        handle.remove()
    for layer, layer_rows in rows.items():
        z = torch.einsum("pgi,goi->pgo", layer_rows.h[0], layer_rows.weight)
        torch.testing.assert_close(z, torch.cat(outputs[layer]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_oracle_fact_is_the_gradient_form(name: str) -> None:
    """The oracle's FACT and bFACT equal −WᵀG/λ and −WGᵀ/λ with autograd's full-batch G."""
    problem, rows = solved(name)
    problem.model.zero_grad()
    problem.loss_fn(problem.model(problem.x.clone()), problem.y).backward()
    for layer, layer_rows in rows.items():
        weight = layer_rows.weight
        gradient = problem.model.get_submodule(layer).weight.grad.reshape(weight.shape)
        forward = -weight.mT @ gradient / LAMBDA
        backward = -weight @ gradient.mT / LAMBDA
        assert_close(oracle.fact(layer_rows, LAMBDA), forward, 1e-12, layer)
        assert_close(oracle.bfact(layer_rows, LAMBDA), backward, 1e-12, layer)
    problem.model.zero_grad()


def test_oracle_agop_of_the_first_layer_is_the_input_gradient_form() -> None:
    """On a plain network, AGOP of the first layer is (1/n) Σ ∇_x f ∇_x fᵀ by torch.func."""
    problem, rows = solved("three layers")
    jacobian = torch.func.vmap(torch.func.jacrev(problem.model))(problem.x)
    expected = torch.einsum("nci,ncj->ij", jacobian, jacobian) / N
    found = oracle.mean_gradient_square(rows["0"], "output", "input")[0]
    assert_close(found, expected.detach(), 1e-12, "AGOP")


# --------------------------------------------------------------------------- measure


@pytest.mark.parametrize("relation", oracle.RELATIONS)
@pytest.mark.parametrize("name", CASES)
def test_matrices_equal_the_oracle(name: str, relation: str) -> None:
    """Every relation's matrix, at four powers, equals the sum of outer products."""
    _, rows = solved(name)
    report = measured(name, "expand")
    assert set(report.layers) == set(rows)
    for layer in rows:
        assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=LAMBDA)


@pytest.mark.parametrize("relation", oracle.RELATIONS)
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_oracle(name: str, relation: str) -> None:
    """Every score equals the one computed from dense matrices, NaN in the same places."""
    _, rows = solved(name)
    report = measured(name, "expand")
    for layer in rows:
        assert_scores_agree(report, layer, rows[layer], relation)


@pytest.mark.parametrize("relation", ["nfa", "enfa", "bnfa", "benfa", "fact"])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].reducible])
def test_reduced_positions_equal_the_oracle(name: str, relation: str) -> None:
    """positions="reduce" sums over positions and calls first, for K and E but not for FACT."""
    _, rows = solved(name)
    report = measured(name, "reduce")
    for layer in rows:
        options = {"positions": "reduce", "weight_decay": LAMBDA}
        assert_matrices_agree(report, layer, rows[layer], relation, **options)
        assert_scores_agree(report, layer, rows[layer], relation, **options)


def test_reduced_positions_differ_from_expanded_ones() -> None:
    """The two treatments of positions give different matrices where there are positions."""
    expanded = measured("linear [n,s,d]", "expand").matrix("0", "nfa")
    reduced = measured("linear [n,s,d]", "reduce").matrix("0", "nfa")
    assert float((expanded - reduced).norm() / expanded.norm()) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_counts(name: str) -> None:
    """n_examples, n_rows, n_kept and the status of an ordinary measurement are right."""
    _, rows = solved(name)
    report = measured(name, "expand")
    assert report.records
    for record in report.records:
        layer = rows[record.layer]
        assert record.n_examples == N, record
        assert record.n_rows == layer.n_rows, record
        assert record.weight_decay == LAMBDA
        if record.relation not in oracle.EQUALITIES and record.power != 1.0:
            blocks_ = oracle.prediction(layer, record.relation, 1.0)
            assert record.n_kept == oracle.kept_eigenvalues(blocks_), record


@pytest.mark.parametrize("relation", ["nfa", "enfa"])
@pytest.mark.parametrize("name", ["linear [n,d]", "linear wide to narrow", "conv2d", "attention"])
def test_shared_weight_cosine(name: str, relation: str) -> None:
    """The level of K with random eigenvectors is that of a Monte Carlo with rotations of its own.

    These layers are narrow, where the closed form at s = 1 would be up to 0.025 low.
    """
    _, rows = solved(name)
    report = measured(name, "expand")
    of = "output" if relation == "nfa" else "loss"
    checked = 0
    for layer, layer_rows in rows.items():
        k_matrix = oracle.mean_gradient_square(layer_rows, of, "output")[0]
        for power in (0.5, 1.0):
            sampled = oracle.rotated_cosines(layer_rows.weight[0], k_matrix, power, 300, seed=3)
            found = report.record(layer, relation, power).shared_weight_cosine
            # both are means of about 300 rotations: five standard errors of their difference
            allowed = 5 * float(sampled.std()) * (1 / 256 + 1 / 300) ** 0.5 + 1e-6
            assert abs(found - float(sampled.mean())) < allowed, (layer, power)
        checked += 1
    assert checked == len(report.layers)


@pytest.mark.parametrize(
    "name", ["linear [n,d]", "linear [n,s,d]", "conv2d groups", "tied weights"]
)
@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5), (1,) * 7, (6, 1)], ids=str)
def test_any_split_equals_one_shot(name: str, sizes: tuple[int, ...]) -> None:
    """Streaming over an uneven split of the data gives the one-shot report."""
    problem, _ = solved(name)
    whole = measured(name, "expand")
    parts = exactly(problem, list(zip(problem.x.split(sizes), problem.y.split(sizes), strict=True)))
    for one, other in zip(whole.records, parts.records, strict=True):
        assert (one.layer, one.label, one.status) == (other.layer, other.label, other.status)
        assert (one.n_examples, one.n_rows) == (other.n_examples, other.n_rows)
        matrix = blocks(whole.matrix(one.layer, one.relation, one.power))
        streamed = blocks(parts.matrix(one.layer, one.relation, one.power))
        # the square root loses half of the digits next to a zero eigenvalue
        assert_close(streamed, matrix, 1e-12 if one.power in (None, 1.0, 2.0) else 1e-10, one.label)
        for score in ("pearson", "cosine", "residual", "scale"):
            a, b = getattr(one, score), getattr(other, score)
            assert (math.isnan(a) and math.isnan(b)) or math.isclose(
                a, b, rel_tol=1e-9, abs_tol=1e-10
            )


def test_weight_decay_scales_fact_only() -> None:
    """λ divides FACT and bFACT, moves the residual, and leaves the cosine and the NFA alone."""
    problem, rows = solved("three layers")
    for weight_decay in (0.01, 0.5):
        report = exactly(problem, [(problem.x, problem.y)], weight_decay=weight_decay)
        assert_all_agree(report, rows, weight_decay=weight_decay)
        assert {record.weight_decay for record in report.records} == {weight_decay}


def test_weight_decay_by_layer() -> None:
    """A dict gives each layer its own λ."""
    problem, rows = solved("three layers")
    by_layer = {"0": 0.1, "2": 0.02, "4": 0.3}
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=by_layer)
    for layer, weight_decay in by_layer.items():
        for relation in oracle.RELATIONS:
            options = {"weight_decay": weight_decay}
            assert_matrices_agree(report, layer, rows[layer], relation, **options)
            assert_scores_agree(report, layer, rows[layer], relation, **options)


def test_weight_decay_from_the_optimizer_groups() -> None:
    """Without weight_decay, λ is that of each parameter's own group."""
    problem, rows = solved("three layers")
    groups = [
        {"params": list(problem.model[0].parameters()), "weight_decay": 0.1},
        {"params": list(problem.model[2].parameters())},
        {"params": list(problem.model[4].parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.07)
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=None, optimizer=optimizer)
    for layer, weight_decay in {"0": 0.1, "2": 0.07, "4": 0.0}.items():
        assert report.record(layer, "fact").weight_decay == weight_decay
        assert_matrices_agree(report, layer, rows[layer], "fact", weight_decay=weight_decay)
        assert_scores_agree(report, layer, rows[layer], "fact", weight_decay=weight_decay)


@pytest.mark.parametrize("relation", oracle.EQUALITIES)
def test_no_weight_decay(relation: str) -> None:
    """At λ = 0 FACT stands for −WᵀG: cosines defined, no residual, and the status says why."""
    problem, rows = solved("three layers")
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=0.0)
    for layer in rows:
        record = report.record(layer, relation)
        assert math.isnan(record.residual)
        assert "no weight decay" in record.status
        assert_matrices_agree(report, layer, rows[layer], relation, weight_decay=0.0)
        assert_scores_agree(report, layer, rows[layer], relation, weight_decay=0.0)


def test_unknown_weight_decay_is_nan() -> None:
    """Without weight_decay and optimizer λ is unknown: NaN in the record, no residual, a reason."""
    problem, rows = solved("linear [n,d]")
    report = exactly(problem, [(problem.x, problem.y)], weight_decay=None)
    for layer in rows:
        record = report.record(layer, "fact")
        assert math.isnan(record.weight_decay)
        assert math.isnan(record.residual)
        assert record.status != "ok"
        assert report.record(layer, "nfa", 1.0).status == "ok"
        assert_scores_agree(report, layer, rows[layer], "fact", weight_decay=0.0)


@pytest.mark.parametrize("training_batch_size", [1, 4, 32])
def test_summed_loss(training_batch_size: int) -> None:
    """With reduction "sum", ℓ_i is not divided by n and G is B times the mean gradient."""
    problem, _ = solved("linear [n,s,d]")
    summed = Problem(
        problem.model, problem.x, problem.y, nn.MSELoss(reduction="sum"), problem.layers
    )
    report = exactly(
        summed,
        [(problem.x[:3], problem.y[:3]), (problem.x[3:], problem.y[3:])],
        loss_reduction="sum",
        training_batch_size=training_batch_size,
    )
    assert_all_agree(report, summed.rows(), times=training_batch_size)


def test_custom_forward_on_dict_batches() -> None:
    """forward= runs any batch; the report equals the oracle's through the same callable."""
    problem, rows = solved("three layers")

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(batch["features"])
        return output, F.cross_entropy(output, batch["label"])

    loader = [
        {"label": y, "features": x}
        for x, y in zip(problem.x.split(4), problem.y.split(4), strict=True)
    ]
    report = measure(
        problem.model,
        loader,
        forward=forward,
        weight_decay=LAMBDA,
        relations=oracle.RELATIONS,
        powers=POWERS,
        progress=False,
    )
    assert_all_agree(report, rows)


def test_output_picks_the_tensor() -> None:
    """output= picks f out of what the model returns; here the second of two."""

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"other": x.exp(), "logits": self.inner(x)}

    problem, rows = solved("three layers")
    report = measure(
        Pair(problem.model),
        [(problem.x, problem.y)],
        lambda out, y: F.cross_entropy(out["logits"], y),
        output=lambda out: out["logits"],
        weight_decay=LAMBDA,
        relations=oracle.RELATIONS,
        powers=POWERS,
        progress=False,
    )
    assert_all_agree(report, {f"inner.{layer}": rows[layer] for layer in rows})


def test_include_and_exclude_select_layers() -> None:
    """A selection changes which layers are reported, not their numbers."""
    problem, rows = solved("three layers")
    report = exactly(problem, [(problem.x, problem.y)], include=["0", "4"], exclude="4")
    assert report.layers == ("0",)
    assert_all_agree(report, {"0": rows["0"]})


def test_measure_leaves_the_model_as_it_was() -> None:
    """Modes, parameters, buffers, gradients and random states are untouched by measure."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(True), nn.Linear(5, 2)
    ).double()
    model.train()
    model[3].eval()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    nn.functional.mse_loss(model(x), y).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for eval_mode in (True, False):
        measure(
            model,
            [(x, y)],
            nn.MSELoss(),
            weight_decay=0.1,
            relations=oracle.RELATIONS,
            eval_mode=eval_mode,
            progress=False,
        )
        assert [module.training for module in model.modules()] == modes
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), (name, eval_mode)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, gradient)
            assert p.requires_grad
        assert torch.equal(torch.get_rng_state(), state), eval_mode


# --------------------------------------------------------------------------- frozen, unused


def right_or_a_reason(
    report: Report, rows: dict[str, oracle.Rows], required: Sequence[tuple[str, str]]
) -> None:
    """Each record is the oracle's or all NaN with a reason; the required ones must be numbers."""
    for record in report.records:
        if math.isnan(record.cosine):
            assert (record.layer, record.relation) not in required, record
            assert record.status not in ("", "ok"), record
            for score in ("pearson", "trace_free_cosine", "residual", "scale"):
                assert math.isnan(getattr(record, score)), record
        else:
            options = {"weight_decay": LAMBDA}
            assert_scores_agree(
                report, record.layer, rows[record.layer], record.relation, **options
            )


@pytest.mark.parametrize("frozen", ["0", "2", "4"])
def test_a_frozen_layer(frozen: str) -> None:
    """Other layers keep their numbers; the frozen one's are right or NaN with a reason."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    for parameter in problem.model.get_submodule(frozen).parameters():
        parameter.requires_grad_(False)
    report = exactly(problem, [(problem.x, problem.y)])
    required = [(layer, r) for layer in rows if layer != frozen for r in oracle.RELATIONS]
    right_or_a_reason(report, rows, required)
    assert set(report.layers) - {frozen} == set(rows) - {frozen}


def test_all_layers_frozen() -> None:
    """A model without anything to train gives no number, or a refusal, never a zero."""
    problem = build(CASES["three layers"])
    rows = problem.rows()
    problem.model.requires_grad_(False)
    report = exactly(problem, [(problem.x, problem.y)])
    right_or_a_reason(report, rows, [])


class Unused(nn.Module):
    """A layer that is never called, one whose output is dropped, one behind detach."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 5)
        self.never_called = nn.Linear(4, 5)
        self.dropped = nn.Linear(4, 5)
        self.detached = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.head(torch.tanh(self.used(x)) + self.detached(x).detach())


@pytest.mark.parametrize("layer", ["never_called", "dropped", "detached"])
def test_a_layer_without_gradient_says_so(layer: str) -> None:
    """A layer no gradient reached is NaN with a status that says so, never zero."""
    reasons = ["no gradient reached", "never called"][: 2 if layer == "never_called" else 1]
    case = Case(Unused, (4,))
    problem = build(case)
    report = exactly(problem, [(problem.x, problem.y)])
    records = report.select(layer)
    assert {record.relation for record in records} == set(oracle.RELATIONS)
    for record in records:
        assert any(reason in record.status for reason in reasons), record
        for score in ("pearson", "cosine", "trace_free_cosine", "residual", "scale"):
            assert math.isnan(getattr(record, score)), record


def test_layers_beside_an_unused_one_are_right() -> None:
    """An unused layer does not disturb the others."""
    problem = build(Case(Unused, (4,)))
    rows = {layer: problem.rows()[layer] for layer in ("used", "head")}
    report = exactly(problem, [(problem.x, problem.y)], include=["used", "head"])
    assert_all_agree(report, rows)
    report = exactly(problem, [(problem.x, problem.y)])
    right_or_a_reason(report, rows, [(layer, r) for layer in rows for r in oracle.RELATIONS])


class Gated(nn.Module):
    """A branch behind a gate that starts at zero, as the residual branches of timm's ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.branch = nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + self.gate * self.branch(x)


def test_a_gradient_that_is_zero_is_not_a_missing_one() -> None:
    """Behind a closed gate G, K and E are zero: NaN, the status says zero, coverage is full."""
    problem = build(Case(Gated, (4,)))
    rows = problem.rows()
    report = exactly(problem, [(problem.x, problem.y)])
    for record in report.select("branch"):
        assert "zero" in record.status, record
        assert math.isnan(record.cosine), record
        assert record.n_rows == N
    for relation in oracle.RELATIONS:
        assert_matrices_agree(report, "trunk", rows["trunk"], relation, weight_decay=LAMBDA)
    assert report.coverage.share() == 1.0


def test_reduced_positions_without_an_example_axis_are_refused_by_status() -> None:
    """Where [n·s, d] hides the examples, "reduce" gives NaN with a reason; FACT is as ever."""
    _, rows = solved("linear folded [n*s,d]")
    report = measured("linear folded [n*s,d]", "reduce")
    for record in report.select("inner"):
        if record.relation in oracle.EQUALITIES:
            assert record.status == "ok", record
        else:
            assert "reduce" in record.status, record
            assert math.isnan(record.cosine), record
    for relation in oracle.EQUALITIES:
        assert_matrices_agree(report, "inner", rows["inner"], relation, weight_decay=LAMBDA)
