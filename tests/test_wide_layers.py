"""Layers with more outputs than max_dim: K and E in a random subspace, against dense algebra."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import FeatureProbe, Report, measure
from feature_probe.theory.projection import MAX_DIM, Subspace

LAMBDA = 1e-3
WIDTH, LIMIT = 300, 64
NOTE = "in W's columns and random directions: 64 of 300 output dimensions (max_dim)"


def projection(size: int, dimension: int, weight: Tensor | None = None) -> Tensor:
    """P, ``[m, d]``, by what it does to the unit vectors."""
    subspace = Subspace.within(size, dimension, None if weight is None else weight[None])
    assert subspace is not None
    return subspace.matrix(torch.eye(size, dtype=torch.float64)[None])[0]


def first_weight() -> Tensor:
    """W of the wide layer as it is before training."""
    return network()[0].weight.detach()


def network() -> nn.Sequential:
    """6 → 300 → 3, float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    """Twenty rows."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(20, k, generator=generator, dtype=torch.float64) for k in (6, 3))
    return x, y


def frozen(**options: Any) -> Report:
    """Exact Jacobians at frozen weights."""
    settings: dict[str, Any] = {"weight_decay": LAMBDA, "jacobian": "exact", "progress": False}
    return measure(network(), [batch()], F.mse_loss, **settings | options)


def curvatures() -> dict[str, Tensor]:
    """K and E of the first layer by autograd, one row at a time, ``[300, 300]``."""
    model, (x, y) = network(), batch()
    sums = {"nfa": torch.zeros(WIDTH, WIDTH, dtype=torch.float64)}
    sums["enfa"] = torch.zeros_like(sums["nfa"])
    for row, target in zip(x, y, strict=True):
        z = model[0](row).detach().requires_grad_()
        out = model[2](torch.tanh(z))
        for part in out:
            (g,) = torch.autograd.grad(part, z, retain_graph=True)
            sums["nfa"] += torch.outer(g, g) / len(x)
        (g,) = torch.autograd.grad(F.mse_loss(out, target), z)
        sums["enfa"] += torch.outer(g, g) / len(x)
    return sums


def power(matrix: Tensor, s: float, clamp: float) -> Tensor:
    """Mˢ of a PSD matrix, eigenvalues below the clamp dropped."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > clamp * values.max()
    return (vectors * torch.where(kept, values.clamp_min(1e-300) ** s, 0.0)) @ vectors.mT


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two matrices."""
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize(("size", "dimension"), [(5, 4), (300, 64), (301, 300), (1000, 8)])
def test_rows_are_orthogonal_and_of_one_length(size: int, dimension: int) -> None:
    """PPᵀ = (d/m)·1."""
    p = projection(size, dimension)
    assert p.shape == (dimension, size)
    expected = torch.eye(dimension, dtype=torch.float64) * size / dimension
    assert torch.allclose(p @ p.mT, expected, atol=1e-12 * size)


def test_beside_the_span_of_the_weight_it_is_random() -> None:
    """Qᵀ, then √(d/r)·R(1 − QQᵀ): WᵀW and WᵀKW are exact, and the trace of K on average."""
    generator = torch.Generator().manual_seed(2)
    w, rows = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((400, 9), (50, 400))
    )
    p = projection(400, 100, w)
    k = rows.mT @ rows
    assert torch.allclose((p @ w).mT @ (p @ w), w.mT @ w)
    assert torch.allclose((p @ w).mT @ (p @ k @ p.mT) @ (p @ w), w.mT @ k @ w)
    assert torch.allclose(p[:9] @ p[9:].mT, torch.zeros(9, 91, dtype=torch.float64), atol=1e-12)
    assert float((p @ k @ p.mT).trace() / k.trace()) == pytest.approx(1, abs=0.1)


def test_products_are_exact_where_the_user_allows_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """With reduced float32 products allowed, those with Q run in float64."""
    w, rows = torch.randn(1, 200, 9), torch.randn(30, 1, 200)
    subspace = Subspace.within(200, 50, w)
    assert subspace is not None
    expected = subspace.rows(rows.double())
    monkeypatch.setattr("feature_probe.theory.projection.reduced_precision", lambda device: True)
    found = subspace.rows(rows)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_too_many_columns_leave_no_room() -> None:
    """Beyond three quarters of the dimensions P is random altogether."""
    w = torch.randn(1, 40, 16)
    assert Subspace.within(40, 21, w).frame is None  # type: ignore[union-attr]
    assert Subspace.within(40, 22, w).frame is not None  # type: ignore[union-attr]
    assert Subspace.within(40, 22, w * float("nan")).frame is None  # type: ignore[union-attr]


def test_it_is_the_identity_on_average() -> None:
    """⟨Pa, Pb⟩ lies about ⟨a, b⟩ as 1/√m says."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 400, 2000, generator=generator, dtype=torch.float64)
    subspace = Subspace(2000, 500)
    found = (subspace.rows(a[:, None]) * subspace.rows(b[:, None])).sum((1, 2)) - (a * b).sum(1)
    unit = (a.norm(dim=1) * b.norm(dim=1)) / math.sqrt(500)
    assert 0.6 < float((found / unit).square().mean().sqrt()) < 1.1
    assert abs(float((found / unit).mean())) < 4 / math.sqrt(400)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rows_are_summed_wider(dtype: torch.dtype) -> None:
    """Float32 out, equal to the projection of what came in."""
    rows = torch.randn(7, 2, 3, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = Subspace(130, 20).rows(rows)
    assert found.dtype == torch.float32
    assert found.shape == (7, 2, 3, 20)
    expected = rows.double() @ projection(130, 20).mT
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_many_rows_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks make no difference."""
    rows = torch.randn(25, 2, 40, generator=torch.Generator().manual_seed(0))
    whole = Subspace(40, 9).rows(rows)
    monkeypatch.setattr("feature_probe.theory.projection._CHUNK", 7 * 40)
    assert torch.allclose(Subspace(40, 9).rows(rows), whole, atol=1e-6)


@pytest.mark.parametrize("s", [0.5, 1.0])
@pytest.mark.parametrize("name", ["nfa", "enfa"])
def test_scores_are_those_of_the_projected_matrices(name: str, s: float) -> None:
    """(PW)ᵀ(PW) against ((PW)ᵀ(PKPᵀ)(PW))ˢ, and (PW)(PW)ᵀ against (PKPᵀ)ˢ, all formed."""
    report = frozen(max_dim=LIMIT, relations=("nfa", "enfa", "bnfa", "benfa"), powers=s)
    p = projection(WIDTH, LIMIT, first_weight())
    w, k = p @ first_weight(), p @ curvatures()[name] @ p.mT
    clamp = 10 * torch.finfo(torch.float64).eps
    forward = report.record("0", name, s)
    assert forward.cosine == pytest.approx(
        cosine(w.mT @ w, power(w.mT @ k @ w, s, clamp)), abs=1e-9
    )
    backward = report.record("0", f"b{name}", s)
    assert backward.cosine == pytest.approx(cosine(w @ w.mT, power(k, s, clamp)), abs=1e-9)
    for record in (forward, backward):
        assert record.status == NOTE


def test_forward_scores_at_frozen_weights_are_those_in_full() -> None:
    """To rounding, at any limit that leaves W's columns room."""
    full = frozen(relations=("nfa", "enfa"))
    for limit in (10, 200):
        part = frozen(max_dim=limit, relations=("nfa", "enfa"))
        for name in ("nfa", "enfa"):
            for s in (0.5, 1.0):
                one, other = (each.record("0", name, s) for each in (part, full))
                for score in ("cosine", "pearson", "trace_free_cosine", "scale"):
                    assert getattr(one, score) == pytest.approx(getattr(other, score), abs=1e-9)


def test_backward_scores_come_near_with_more_dimensions() -> None:
    """Those of the sketch of K."""
    full, gaps = frozen(relations="bnfa", powers=1.0), []
    for limit in (10, 290):
        part = frozen(max_dim=limit, relations="bnfa", powers=1.0)
        gaps.append(
            abs(part.record("0", "bnfa", 1.0).cosine - full.record("0", "bnfa", 1.0).cosine)
        )
    assert gaps[1] < gaps[0]
    assert gaps[1] < 0.02


def test_fact_and_other_layers_are_not_touched() -> None:
    """All their numbers are the same."""
    full, part = frozen(), frozen(max_dim=LIMIT)
    for record in full.records:
        other = part.record(record.layer, record.relation, record.power)
        if record.layer != "0" or record.power is None:
            assert other.cosine == record.cosine
            assert other.status == record.status


def loop(model: nn.Module, **options: Any) -> Report:
    """Two steps of SGD, reported at the second."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
    x, y = batch()
    with FeatureProbe(
        model, optimizer=optimizer, every=lambda step: step == 1, window=2, strict=True, **options
    ) as probe:
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert probe.report is not None
    return probe.report


@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("jacobian", ["exact", "random"])
def test_sums_in_the_loop_are_projections_of_the_full_ones(positions: str, jacobian: str) -> None:
    """PKPᵀ and PEPᵀ of the very same steps."""
    options = {"jacobian": jacobian, "positions": positions, "keep_matrices": True}
    full = loop(network(), **options).statistics["0"]
    part = loop(network(), max_dim=LIMIT, **options).statistics["0"]
    p = projection(WIDTH, LIMIT, first_weight())
    for name in ("jacobian", "loss"):
        expected = p @ getattr(full, name)[0] @ p.mT
        assert torch.allclose(getattr(part, name)[0], expected, rtol=1e-9, atol=1e-15)


def test_a_window_goes_on_in_the_same_subspace_after_a_stop() -> None:
    """The frame of W at the window's start is in the state: the report is the same."""
    reports = []
    for stop in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
        settings = {"every": lambda step: step == 3, "window": 3, "max_dim": LIMIT, "strict": True}
        probe = FeatureProbe(model, optimizer=optimizer, **settings).attach()
        x, y = batch()
        for step in range(4):
            if stop and step == 2:
                state = probe.state_dict()
                probe.detach()
                probe = FeatureProbe(model, optimizer=optimizer, **settings)
                probe.load_state_dict(state)
                probe.attach()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        probe.detach()
        assert probe.report is not None
        reports.append(probe.report)
    for one, other in zip(*(report.records for report in reports), strict=True):
        assert one.cosine == other.cosine or (one.cosine != one.cosine)


def test_weights_are_those_of_the_run_without() -> None:
    """Bit by bit."""
    ends = []
    for options in ({}, {"max_dim": LIMIT}):
        model = network()
        loop(model, **options)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    "relation",
    ["init_centered_nfa", "alignment_speed", "update_alignment_speed", "double_centered_nfa"],
)
def test_relations_with_another_basis_are_measured_too(relation: str) -> None:
    """W − W₀, G and ΔW are projected like W."""
    record = loop(network(), relations=(relation,), max_dim=LIMIT).record("0", relation, 1.0)
    assert 0 < record.cosine <= 1
    assert record.status == NOTE


def test_estimate_knows_it() -> None:
    """Sums of max_dim² instead of d_out², and the frame of W."""
    x = torch.randn(500, 6, dtype=torch.float64)
    sizes = [
        FeatureProbe.estimate(network(), x, relations=("nfa", "enfa"), **options).layers[0]
        for options in ({}, {"max_dim": LIMIT})
    ]
    assert sizes[0].sum_bytes == 8 * 2 * WIDTH**2
    assert sizes[1].sum_bytes == 8 * (2 * LIMIT**2 + WIDTH * 6)


def test_intervals_and_structure(recwarn: pytest.WarningsRecorder) -> None:
    """The jackknife works within the subspace; structure of K says why there is none."""
    x, y = batch()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]
    report = measure(
        network(), batches, F.mse_loss, weight_decay=LAMBDA, jackknife=5, max_dim=LIMIT,
        relations=("nfa", "fact"), progress=False,
    )  # fmt: skip
    record = report.record("0", "nfa", 1.0)
    assert record.interval_note or record.cosine_low <= record.cosine_high
    assert not recwarn.list


def test_the_default_holds_wide_transformers_in_full() -> None:
    """Four times 1024; a vocabulary is projected."""
    assert Subspace.within(4 * 1024, MAX_DIM) is None
    head = Subspace.within(50257, MAX_DIM)
    assert head is not None
    assert (head.size, head.dimension) == (50257, MAX_DIM)
