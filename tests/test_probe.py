"""The probe in a training loop: which steps, which sums, which weights, and what goes wrong."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import ConfigurationError, FeatureProbe, Report
from feature_probe.schedules import at, log_spaced

LAMBDA = 0.05
LAYERS = ("0", "2")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network() -> nn.Sequential:
    """4 → 5 → 2, always with the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of the given sizes."""
    return [
        (normal(size, 4, seed=2 * i), normal(size, 2, seed=2 * i + 1))
        for i, size in enumerate(sizes)
    ]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """SGD with a step that moves the weights visibly."""
    return torch.optim.SGD(model.parameters(), **{"lr": 0.2, "weight_decay": LAMBDA, **options})


class Collector:
    """A sink that keeps what it is given and counts its closings."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.closed = 0

    @property
    def steps(self) -> list[int]:
        """Steps of the reports."""
        return [report.step for report in self.reports]

    def write(self, report: Report) -> None:
        self.reports.append(report)

    def close(self) -> None:
        self.closed += 1


def train(
    model: nn.Module,
    data: Sequence[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> tuple[FeatureProbe, list[Report]]:
    """One step a batch; exact Jacobians, strict, matrices kept, unless options say otherwise."""
    optimizer = optimizer or sgd(model)
    sink = Collector()
    settings: dict[str, Any] = {
        "jacobian": "exact",
        "strict": True,
        "keep_matrices": True,
        "every": 1,
        "window": 1,
        **options,
    }
    settings["sinks"] = [*settings.get("sinks", ()), sink]
    with FeatureProbe(model, optimizer=optimizer, **settings) as probe:
        for x, y in data:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    return probe, sink.reports


def replay(
    data: Sequence[tuple[Tensor, Tensor]],
) -> list[tuple[nn.Sequential, dict[str, Tensor]]]:
    """The same run without a probe: a copy of the model before each step, and its gradients."""
    model = network()
    optimizer = sgd(model)
    seen = []
    for x, y in data:
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        gradients = {name: model.get_submodule(name).weight.grad.clone() for name in LAYERS}
        seen.append((before, gradients))
        optimizer.step()
    return seen


def curvature(model: nn.Module, batch: tuple[Tensor, Tensor], layer: str, of: str) -> Tensor:
    """K or E of one batch, mean over its examples, by the oracle."""
    rows = oracle.collect(
        model,
        oracle.one_by_one(batch),
        oracle.supervised(F.mse_loss),
        {layer: (layer,)},
    )[layer]
    return oracle.mean_gradient_square(rows, of, "output")[0]


def assert_window(
    report: Report,
    data: Sequence[tuple[Tensor, Tensor]],
    first: int,
    last: int,
) -> None:
    """A report is of the steps first..last: G per step, K and E per example, W of the last."""
    seen = replay(data)[first : last + 1]
    used = data[first : last + 1]
    assert report.step == last
    assert report.settings["window"] == len(used)
    counts = [len(x) for x, _ in used]
    for layer in LAYERS:
        weight = seen[-1][0].get_submodule(layer).weight.detach()
        gradient = sum(gradients[layer] for _, gradients in seen) / len(seen)
        torch.testing.assert_close(report.matrix(layer, "nfm"), weight.T @ weight)
        torch.testing.assert_close(report.matrix(layer, "fact"), -weight.T @ gradient / LAMBDA)
        torch.testing.assert_close(report.matrix(layer, "bfact"), -weight @ gradient.T / LAMBDA)
        for kind, of in (("nfa", "output"), ("enfa", "loss")):
            parts = [
                n * curvature(model, batch, layer, of)
                for n, (model, _), batch in zip(counts, seen, used, strict=True)
            ]
            mean = sum(parts) / sum(counts)
            torch.testing.assert_close(report.matrix(layer, kind), weight.T @ mean @ weight)
        record = report.record(layer, "nfa", 1.0)
        assert (record.step, record.n_examples, record.n_rows) == (last, sum(counts), sum(counts))


# --------------------------------------------------------------------------- which steps


@pytest.mark.parametrize("window", [1, 2, 4, 50])
@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, list(range(12))),
        (3, [0, 3, 6, 9]),
        (5, [0, 5, 10]),
        (100, [0]),
        (at([2, 7, 8]), [2, 7, 8]),
        (log_spaced(3), [0, 1, 2, 5, 10]),
        (lambda step: step >= 10, [10, 11]),
        (lambda step: False, []),
    ],
    ids=["1", "3", "5", "100", "at", "log", "late", "never"],
)
def test_report_steps(every: Any, expected: list[int], window: int) -> None:
    """Reports come at the steps the schedule names, whatever the window."""
    _, reports = train(network(), batches(*[3] * 12), every=every, window=window, relations="fact")
    assert [report.step for report in reports] == expected
    for report in reports:
        assert {record.step for record in report.records} == {report.step}


def test_the_latest_report() -> None:
    """`probe.report` is None before the first report and then always the latest."""
    model = network()
    optimizer = sgd(model)
    probe = FeatureProbe(model, optimizer=optimizer, every=2, window=1)
    assert probe.report is None
    steps = []
    with probe:
        for x, y in batches(*[3] * 5):
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            assert probe.report is not None
            steps.append(probe.report.step)
    assert steps == [0, 0, 2, 2, 4]
    assert probe.report.step == 4


def test_step_counts_steps_not_forward_passes() -> None:
    """Evaluation and forward passes without a step do not move the step."""
    model = network()
    optimizer = sgd(model)
    sink = Collector()
    with FeatureProbe(model, optimizer=optimizer, every=1, window=1, sinks=[sink]):
        for x, y in batches(3, 4):
            with torch.no_grad():
                model(x)
            model(x)
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            model(x)
    assert sink.steps == [0, 1]
    assert [report.record("0", "nfa", 1.0).n_examples for report in sink.reports] == [3, 4]


# --------------------------------------------------------------------------- windows


def test_a_window_of_one_is_its_minibatch() -> None:
    """window=1: every report is of one batch at the weights before its step."""
    data = batches(4, 6, 3)
    _, reports = train(network(), data)
    for step, report in enumerate(reports):
        assert_window(report, data, step, step)


def test_a_window_ends_with_the_reported_step() -> None:
    """every=5, window=3: steps 3, 4, 5 with uneven batches, weights of step 5."""
    data = batches(4, 6, 3, 5, 2, 7, 4)
    _, reports = train(network(), data, every=5, window=3)
    assert_window(reports[0], data, 0, 0)
    assert_window(reports[1], data, 3, 5)


def test_windows_do_not_overlap() -> None:
    """Where the last report is nearer than the window is long, the window starts after it."""
    data = batches(4, 6, 3, 5, 2, 7)
    _, reports = train(network(), data, every=2, window=4)
    assert [report.settings["window"] for report in reports] == [1, 2, 2]
    assert_window(reports[1], data, 1, 2)
    assert_window(reports[2], data, 3, 4)


def test_an_irregular_schedule_has_its_windows() -> None:
    """Steps between two windows belong to none."""
    data = batches(4, 6, 3, 5, 2, 7, 3, 4)
    _, reports = train(network(), data, every=at([2, 6, 7]), window=2)
    for report, (first, last) in zip(reports, ((1, 2), (5, 6), (7, 7)), strict=True):
        assert_window(report, data, first, last)


def test_a_run_shorter_than_the_window() -> None:
    """Step 0 is nearer than the window is long: the report has what there is."""
    data = batches(4, 6, 3)
    _, reports = train(network(), data, every=at([2]), window=10)
    assert_window(reports[0], data, 0, 2)


def test_outside_its_windows_the_probe_does_nothing() -> None:
    """No hook is waiting and no sum is held between two windows."""
    model = network()
    optimizer = sgd(model)
    armed = []
    with FeatureProbe(model, optimizer=optimizer, every=4, window=2) as probe:
        for x, y in batches(*[3] * 9):
            armed.append(probe._observer.recorder.armed)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            if not armed[-1]:
                trajectory = probe._collector.trajectory.nbytes()
                assert probe._collector.nbytes() == trajectory  # three numbers a row and step
                assert trajectory < 32 * 6 * 8 * sum(t.d_out for t in FeatureProbe.targets(model))
    assert armed == [True, False, False, True, True, False, False, True, True]


def test_settings_say_how_it_was_measured() -> None:
    """The report carries the options that its numbers depend on."""
    _, (report,) = train(
        network(), batches(4), jacobian="random", num_probes=3, positions="reduce",
        loss_reduction="sum",
    )  # fmt: skip
    assert report.settings == {
        "source": "loop",
        "window": 1,
        "jacobian": "random",
        "num_probes": 3,
        "positions": "reduce",
        "loss_reduction": "sum",
        "left_out": 0,
        "discarded": 0,
        "faults": 0,
        "weight_decay": "SGD, group 0 (4 tensors, weight_decay 0.05): coupled decay; at rest the "
        "gradient balances it: read fact",
    }


# --------------------------------------------------------------------------- gradients


def test_gradient_accumulation() -> None:
    """Two micro-batches, uneven: G is the accumulated param.grad, K over the examples of both."""
    (x, y), (u, v) = batches(4, 6)
    model = network()
    optimizer = sgd(model)
    with FeatureProbe(
        model, optimizer=optimizer, every=1, window=1, jacobian="exact", keep_matrices=True,
        strict=True,
    ) as probe:  # fmt: skip
        (F.mse_loss(model(x), y) / 2).backward()
        (F.mse_loss(model(u), v) / 2).backward()
        gradient = model[0].weight.grad.clone()
        weight = model[0].weight.detach().clone()
        optimizer.step()
    report = probe.report
    assert report is not None
    torch.testing.assert_close(report.matrix("0", "fact"), -weight.T @ gradient / LAMBDA)
    record = report.record("0", "nfa", 1.0)
    assert (record.n_examples, record.n_rows) == (10, 10)
    both = (torch.cat([x, u]), torch.cat([y, v]))
    k = curvature(network(), both, "0", "output")
    torch.testing.assert_close(report.matrix("0", "nfa"), weight.T @ k @ weight)
    assert report.settings["window"] == 1


@pytest.mark.parametrize("how", ["computed", "frozen"])
def test_gradient_accumulation_without_param_grad(how: str) -> None:
    """Where G is formed as gᵀh, the calls and micro-batches of a step are one gradient together."""
    data = batches(4, 6, 3)
    plain, model = network(), network()
    if how == "computed":
        nn.utils.parametrizations.weight_norm(model[2])
    else:
        model[2].weight.requires_grad_(False)
    reports = []
    for net in (plain, model):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with FeatureProbe(
            net, optimizer=optimizer, every=at([2]), window=3, keep_matrices=True,
            weight_decay=LAMBDA, strict=True,
        ) as probe:  # fmt: skip
            for x, y in data:
                optimizer.zero_grad()
                for part in (slice(0, 2), slice(2, None)):
                    (F.mse_loss(net(x[part]), y[part]) / 2).backward()
                optimizer.step()
        reports.append(probe.report)
    expected, got = reports
    assert expected is not None
    assert got is not None
    for kind in ("fact", "bfact"):
        torch.testing.assert_close(got.matrix("2", kind), expected.matrix("2", kind))


def test_the_gradient_is_what_the_optimizer_sees() -> None:
    """Clipping between backward and step is in G."""
    ((x, y),) = batches(4)
    model = network()
    optimizer = sgd(model)
    with FeatureProbe(
        model, optimizer=optimizer, every=1, window=1, keep_matrices=True, strict=True
    ) as probe:
        F.mse_loss(model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert norm > 1e-2
        gradient, weight = model[2].weight.grad.clone(), model[2].weight.detach().clone()
        optimizer.step()
    assert probe.report is not None
    torch.testing.assert_close(probe.report.matrix("2", "fact"), -weight.T @ gradient / LAMBDA)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_the_gradients_after_the_step(set_to_none: bool) -> None:
    """However gradients are zeroed, a window's G is the same."""
    data = batches(4, 3, 5)
    model = network()
    optimizer = sgd(model)
    with FeatureProbe(
        model, optimizer=optimizer, every=at([2]), window=3, jacobian="exact",
        keep_matrices=True, strict=True,
    ) as probe:  # fmt: skip
        for x, y in data:
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert probe.report is not None
    assert_window(probe.report, data, 0, 2)


def test_two_forward_passes_in_a_step() -> None:
    """A loss of two passes: K and its count are over the examples of both."""
    (x, y), (u, v) = batches(4, 6)
    model = network()
    optimizer = sgd(model)
    with FeatureProbe(
        model, optimizer=optimizer, every=1, window=1, jacobian="exact", keep_matrices=True,
        strict=True,
    ) as probe:  # fmt: skip
        loss = F.mse_loss(model(x), y) + 3 * F.mse_loss(model(u), v)
        loss.backward()
        gradient, weight = model[0].weight.grad.clone(), model[0].weight.detach().clone()
        optimizer.step()
    report = probe.report
    assert report is not None
    assert report.record("0", "nfa", 1.0).n_examples == 10
    k = curvature(network(), (torch.cat([x, u]), torch.cat([y, v])), "0", "output")
    torch.testing.assert_close(report.matrix("0", "nfa"), weight.T @ k @ weight)
    torch.testing.assert_close(report.matrix("0", "fact"), -weight.T @ gradient / LAMBDA)


@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_positions_in_the_loop(positions: str) -> None:
    """Tokens are positions: summed as outer products, or before them."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)).double()
    x, y = normal(6, 3, 4), normal(6, 2, seed=1)
    before = copy.deepcopy(model)
    _, (report,) = train(model, [(x, y)], positions=positions)
    rows = oracle.collect(
        before, oracle.one_by_one((x, y)), oracle.supervised(F.mse_loss), {"0": ("0",)}
    )["0"]
    for kind in ("nfa", "enfa"):
        expected = oracle.prediction(rows, kind, positions=positions)[0]
        torch.testing.assert_close(report.matrix("0", kind), expected)
    record = report.record("0", "nfa", 1.0)
    assert (record.n_examples, record.n_rows) == (6, 18)


# --------------------------------------------------------------------------- by hand


def test_stepping_by_hand() -> None:
    """Without an optimizer `step()` after backward ends a step; λ is given or not known."""
    data = batches(4, 6, 3)
    model = network()
    sink = Collector()
    probe = FeatureProbe(
        model, every=2, window=2, jacobian="exact", keep_matrices=True, sinks=[sink],
        weight_decay=LAMBDA, strict=True,
    )  # fmt: skip
    with probe:
        for x, y in data:
            model.zero_grad()
            F.mse_loss(model(x), y).backward()
            probe.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.2 * (parameter.grad + LAMBDA * parameter)
    assert sink.steps == [0, 2]
    assert_window(sink.reports[1], data, 1, 2)


def test_stepping_by_hand_without_weight_decay() -> None:
    """λ that nobody told is NaN, and the status says that only the direction counts."""
    model = network()
    ((x, y),) = batches(4)
    with FeatureProbe(model, every=1) as probe:
        F.mse_loss(model(x), y).backward()
        probe.step()
    assert probe.report is not None
    record = probe.report.record("0", "fact")
    assert math.isnan(record.weight_decay)
    assert math.isnan(record.residual)
    assert record.status == "weight decay not known: direction only"
    assert math.isfinite(record.cosine)


def test_step_by_hand_is_refused_beside_an_optimizer() -> None:
    """Steps are counted once."""
    model = network()
    with (
        FeatureProbe(model, optimizer=sgd(model)) as probe,
        pytest.raises(ConfigurationError, match="counted from the optimizer"),
    ):
        probe.step()


@pytest.mark.parametrize("detached", [False, True])
def test_step_by_hand_needs_an_attached_probe(detached: bool) -> None:
    """Before `attach()` and after `detach()` a step is refused, with what to do."""
    probe = FeatureProbe(network())
    if detached:
        probe.attach().detach()
    with pytest.raises(ConfigurationError, match="attached probe: use `with` or attach"):
        probe.step()


def test_attach_and_detach() -> None:
    """`attach` returns the probe, `detach` may come twice, nothing is followed afterwards."""
    model = network()
    optimizer = sgd(model)
    sink = Collector()
    probe = FeatureProbe(model, optimizer=optimizer, every=1, sinks=[sink])
    assert not probe.is_attached
    assert probe.attach() is probe
    assert probe.is_attached
    data = batches(3, 3)
    for x, y in data:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        probe.detach()
        probe.detach()
        assert not probe.is_attached
    assert sink.steps == [0]
    assert sink.closed == 1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_attaching_again_starts_with_an_empty_window() -> None:
    """Sums of a window that was cut off by `detach` do not enter a later report."""
    data = batches(4, 6, 3, 5)
    model = network()
    optimizer = sgd(model)
    sink = Collector()
    probe = FeatureProbe(
        model, optimizer=optimizer, every=at([2]), window=3, jacobian="exact",
        keep_matrices=True, sinks=[sink], strict=True,
    )  # fmt: skip
    for attached, (x, y) in zip((True, False, True, True), data, strict=True):
        if attached and not probe.is_attached:
            probe.attach()
        if not attached:
            probe.detach()
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    probe.detach()
    (report,) = sink.reports
    assert report.settings["window"] == 2
    assert report.record("0", "nfa", 1.0).n_examples == 8


# --------------------------------------------------------------------------- models


class Dict(nn.Module):
    """A model that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x), "features": x}


def test_output_picks_the_tensor() -> None:
    """`output=` chooses f out of what the model returns; the loop goes on with the whole."""
    data = batches(4)
    model = Dict()
    optimizer = sgd(model)
    with FeatureProbe(
        model, optimizer=optimizer, every=1, window=1, jacobian="exact", keep_matrices=True,
        output=lambda out: out["logits"], strict=True,
    ) as probe:  # fmt: skip
        out = model(data[0][0])
        assert set(out) == {"logits", "features"}
        F.mse_loss(out["logits"], data[0][1]).backward()
        optimizer.step()
    _, (expected,) = train(network(), data)
    assert probe.report is not None
    for layer in LAYERS:
        for kind in ("nfm", "fact", "bfact", "nfa", "enfa"):
            torch.testing.assert_close(
                probe.report.matrix(f"inner.{layer}", kind), expected.matrix(layer, kind)
            )


class Sometimes(nn.Module):
    """A model whose second layer is used on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.extra = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)
        self.use = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.use:
            x = x + torch.tanh(self.extra(x))
        return self.head(x)


def run_sometimes(used: Sequence[bool], probed: bool = True) -> tuple[Any, nn.Module, Any]:
    """Steps in which the extra layer is used or not; gradients of it by step."""
    torch.manual_seed(1)
    model = Sometimes().double()
    optimizer = sgd(model)
    last = len(used) - 1
    probe = FeatureProbe(
        model, optimizer=optimizer, every=at([last]), window=last + 1, jacobian="exact",
        keep_matrices=True, strict=True,
    )  # fmt: skip
    if probed:
        probe.attach()
    gradients, weight = [], model.extra.weight.detach().clone()
    for use, (x, y) in zip(used, batches(*[4] * len(used)), strict=True):
        model.use = use
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if model.extra.weight.grad is not None:
            gradients.append(model.extra.weight.grad.clone())
        weight = model.extra.weight.detach().clone()
        optimizer.step()
    probe.detach()
    return probe.report, model, (gradients, weight)


def test_a_layer_unused_in_some_steps() -> None:
    """G is the mean over the steps that moved the layer; K counts the examples of all passes."""
    report, _, (gradients, weight) = run_sometimes([True, False, True])
    assert len(gradients) == 2
    gradient = sum(gradients) / 2
    torch.testing.assert_close(report.matrix("extra", "fact"), -weight.T @ gradient / LAMBDA)
    record = report.record("extra", "nfa", 1.0)
    assert record.status == "ok"
    assert (record.n_examples, record.n_rows) == (12, 8)
    assert report.record("first", "nfa", 1.0).n_rows == 12
    assert report.coverage.share() == 1.0


def test_a_layer_unused_in_the_last_step_is_still_measured() -> None:
    """What a window saw of a layer earlier counts."""
    report, _, (gradients, weight) = run_sometimes([True, False])
    torch.testing.assert_close(report.matrix("extra", "fact"), -weight.T @ gradients[0] / LAMBDA)


def test_a_layer_never_used_says_so() -> None:
    """A layer that no step used is NaN with the reason, the others are measured."""
    report, *_ = run_sometimes([False, False])
    for record in report.select("extra"):
        assert math.isnan(record.cosine)
        assert record.status != "ok"
    assert "never called" in report.record("extra", "nfa", 1.0).status
    assert math.isfinite(report.record("first", "nfa", 1.0).cosine)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_frozen_layer(layer: str) -> None:
    """A frozen layer has every score, with G from gᵀh, and a premise that says it is frozen."""
    data = batches(5)
    model = network()
    model.get_submodule(layer).weight.requires_grad_(False)
    model.get_submodule(layer).bias.requires_grad_(False)
    optimizer = sgd(model)
    _, (report,) = train(model, data, optimizer)
    if layer == "0":  # nothing below needs a gradient, so none arrives at the first layer
        assert math.isnan(report.record("0", "fact").cosine)
        assert report.record("0", "fact").status != "ok"
    else:
        _, gradients = replay(data)[0]
        weight = network()[2].weight.detach()
        torch.testing.assert_close(report.matrix("2", "fact"), -weight.T @ gradients["2"] / LAMBDA)
    assert "frozen" in report.record(layer, "fact").premise
    other = "2" if layer == "0" else "0"
    assert report.record(other, "fact").premise == ""
    assert_same_scores(report.select(other), train(network(), data)[1][0].select(other))


def assert_same_scores(got: Sequence[Any], expected: Sequence[Any]) -> None:
    """The same records up to rounding."""
    assert len(got) == len(expected) > 0
    for one, two in zip(got, expected, strict=True):
        assert (one.layer, one.label, one.status) == (two.layer, two.label, two.status)
        for score in ("cosine", "pearson", "residual", "scale", "trace_free_cosine"):
            a, b = getattr(one, score), getattr(two, score)
            assert a == pytest.approx(b, rel=1e-10, nan_ok=True), (one.layer, one.label, score)


def test_max_dim() -> None:
    """Layers with more output rows than max_dim have NFA in a subspace, and say so."""
    _, (report,) = train(network(), batches(5), max_dim=4)
    assert report.record("0", "fact").status == "ok"
    for relation in ("nfa", "enfa"):
        record = report.record("0", relation, 1.0)
        assert 0 < record.cosine <= 1
        assert record.status == "in a random subspace: 4 of 5 output dimensions (max_dim)"
        assert report.record("2", relation, 1.0).status == "ok"


# --------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("make", "premise"),
    [
        (lambda p: torch.optim.AdamW(p, weight_decay=LAMBDA), "decoupled weight decay (AdamW)"),
        (lambda p: torch.optim.Adam(p, weight_decay=LAMBDA), ""),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.0), "no weight decay"),
        (
            lambda p: torch.optim.NAdam(p, weight_decay=LAMBDA, decoupled_weight_decay=True),
            "decoupled weight decay (NAdam)",
        ),
        (lambda p: torch.optim.NAdam(p, weight_decay=LAMBDA), ""),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=LAMBDA), ""),
    ],
    ids=["AdamW", "Adam", "AdamW λ=0", "NAdam decoupled", "NAdam", "SGD"],
)
def test_decoupled_decay_is_a_premise(make: Callable[..., Any], premise: str) -> None:
    """Under decoupled decay FACT in its gradient form need not hold, and the record says so."""
    model = network()
    _, (report,) = train(model, batches(4), make(model.parameters()))
    fact, nfa = report.record("0", "fact"), report.record("0", "nfa", 1.0)
    assert fact.premise.startswith(premise)
    assert bool(fact.premise) == bool(premise)
    assert nfa.premise == ""
    assert "K is a multiple of the identity" in report.record("2", "nfa", 1.0).premise


def test_maximize_turns_the_sign() -> None:
    """Under maximize the loss that is minimised is minus the user's."""
    data = batches(4)
    model = network()
    _, (ascent,) = train(model, data, sgd(model, maximize=True))
    _, (descent,) = train(network(), data)
    for kind in ("fact", "bfact"):
        torch.testing.assert_close(ascent.matrix("0", kind), -descent.matrix("0", kind))
    torch.testing.assert_close(ascent.matrix("0", "enfa"), descent.matrix("0", "enfa"))


def test_a_schedule_of_weight_decay_is_followed() -> None:
    """λ is read from the group at every report."""
    model = network()
    optimizer = sgd(model)
    decays = []
    with FeatureProbe(model, optimizer=optimizer, every=1, window=1) as probe:
        for decay, (x, y) in zip((0.1, 0.2, 0.0), batches(3, 3, 3), strict=True):
            optimizer.param_groups[0]["weight_decay"] = decay
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            assert probe.report is not None
            decays.append(probe.report.record("0", "fact").weight_decay)
    assert decays == [0.1, 0.2, 0.0]


def test_an_optimizer_with_a_closure() -> None:
    """L-BFGS calls the model inside its step: there are reports, no faults, the same training."""
    x, y = batches(8)[0]
    states, probe = [], None
    for probed in (False, True):
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
        sink = Collector()
        probe = FeatureProbe(model, optimizer=optimizer, every=2, window=2, sinks=[sink])
        if probed:
            probe.attach()

        def closure(
            model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        probe.detach()
        states.append(model.state_dict())
        assert sink.steps == ([0, 2, 4] if probed else [])
        assert probe.faults == 0
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert probe is not None
    assert probe.report is not None
    assert all(math.isfinite(record.cosine) for record in probe.report.records)


def test_a_closure_given_by_name() -> None:
    """`step(closure=f)` is the same as `step(f)`."""
    model = network()
    optimizer = sgd(model)
    x, y = batches(4)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with FeatureProbe(model, optimizer=optimizer, every=1, window=1, strict=True) as probe:
        optimizer.step(closure=closure)
    assert probe.report is not None
    assert probe.report.step == 0
    assert math.isfinite(probe.report.record("0", "fact").cosine)


# --------------------------------------------------------------------------- sinks and faults


def test_sinks_receive_every_report_and_are_closed_once() -> None:
    """Every sink gets the same reports, those that `probe.report` shows, in order."""
    first, second = Collector(), Collector()
    probe, reports = train(network(), batches(*[3] * 5), every=2, sinks=[first, second])
    assert first.steps == second.steps == [0, 2, 4]
    for mine, theirs, third in zip(first.reports, second.reports, reports, strict=True):
        assert mine is theirs is third
    assert probe.report is first.reports[-1]
    assert (first.closed, second.closed) == (1, 1)
    probe.detach()
    assert first.closed == 1


def test_sinks_are_closed_after_an_exception() -> None:
    """An exception in the loop goes through and the sinks are closed."""
    model, sink = network(), Collector()
    with (
        pytest.raises(KeyboardInterrupt),
        FeatureProbe(model, optimizer=sgd(model), sinks=[sink]),
    ):
        raise KeyboardInterrupt
    assert sink.closed == 1


class Broken(Collector):
    """A sink that fails at writing, at closing, or both."""

    def __init__(self, *, write: bool = True, close: bool = False) -> None:
        super().__init__()
        self.fails = (write, close)

    def write(self, report: Report) -> None:
        if self.fails[0]:
            raise OSError("disk full")
        super().write(report)

    def close(self) -> None:
        super().close()
        if self.fails[1]:
            raise OSError("disk gone")


def test_strict_raises_what_a_sink_raises() -> None:
    """strict=True: the sink's own exception reaches the loop."""
    with pytest.raises(OSError, match="disk full"):
        train(network(), batches(3), sinks=[Broken()])


def test_a_broken_sink_does_not_end_training(caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is counted and the first one logged; other sinks and training go on as ever."""
    data = batches(*[3] * 6)
    model, plain = network(), network()
    broken, healthy = Broken(), Collector()
    with caplog.at_level(logging.WARNING, "feature_probe"):
        probe, reports = train(
            model, data, every=2, window=2, sinks=[broken, healthy], strict=False
        )
    train(plain, data, every=at([]))
    assert probe.faults == 3
    assert healthy.steps == [0, 2, 4]
    assert_window(reports[1], data, 1, 2)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    messages = [record for record in caplog.records if "fault" in record.message]
    assert len(messages) == 1
    assert "Broken" in messages[0].message
    assert reports[-1].settings["faults"] == 2


def test_a_sink_that_fails_to_close() -> None:
    """Closing is tried for every sink, and failing is counted."""
    broken, healthy = Broken(write=False, close=True), Collector()
    probe, _ = train(network(), batches(3), sinks=[broken, healthy], strict=False)
    assert (broken.closed, healthy.closed, probe.faults) == (1, 1, 1)
    assert not probe.is_attached


def test_a_fault_in_a_step_leaves_the_step_out() -> None:
    """A step whose hooks failed is not in the window; the others are, and training is the same."""
    data = batches(4, 6, 3, 5)
    model, plain = network(), network()
    calls: list[int] = []

    def moody(out: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("not today")
        return out

    probe, reports = train(model, data, every=at([3]), window=4, output=moody, strict=False)
    train(plain, data, every=at([]))
    assert probe.faults == 1
    (report,) = reports
    assert report.settings["window"] == 3
    assert report.record("0", "nfa", 1.0).n_examples == 4 + 3 + 5
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    seen = replay(data)
    gradient = sum(seen[step][1]["0"] for step in (0, 2, 3)) / 3
    weight = seen[3][0][0].weight.detach()
    torch.testing.assert_close(report.matrix("0", "fact"), -weight.T @ gradient / LAMBDA)


def test_a_report_of_a_step_that_failed_says_so() -> None:
    """Where a fault left nothing to report, the reason is not that no gradient arrived."""
    calls: list[int] = []

    def moody(out: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("not today")
        return out

    probe, (_, report) = train(
        network(), batches(3, 3), every=1, window=1, output=moody, strict=False
    )
    assert probe.faults == 1
    assert report.settings["window"] == 0
    for record in report.records:
        assert math.isnan(record.cosine)
        assert record.n_examples == 0
        assert "no gradient reached" not in record.status
        assert "fault" in record.status


def test_strict_raises_what_a_hook_raises() -> None:
    """strict=True: an output= that fails in a later step reaches the loop."""
    calls: list[int] = []

    def moody(out: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("not today")
        return out

    with pytest.raises(ConfigurationError, match="RuntimeError: not today"):
        train(network(), batches(3, 3), every=1, output=moody)


@pytest.mark.parametrize("strict", [True, False])
def test_an_output_that_fails_at_once_is_refused(strict: bool) -> None:
    """A failing output= is raised in the first forward pass, strict or not: it cannot work."""

    def never(out: Tensor) -> Tensor:
        raise KeyError("logit")

    with pytest.raises(ConfigurationError, match="output= raised KeyError: 'logit'"):
        train(network(), batches(3), output=never, strict=strict)


def test_a_schedule_that_raises_does_not_end_training() -> None:
    """A failing schedule is a fault like any other."""

    def moody(step: int) -> bool:
        if step == 3:
            raise RuntimeError("not today")
        return step == 1

    probe, reports = train(network(), batches(*[3] * 6), every=moody, window=1, strict=False)
    assert probe.faults > 0
    assert [report.step for report in reports] == [1]


def test_gaps_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """What is not measured is logged with the first report, and not again."""
    with caplog.at_level(logging.WARNING, "feature_probe"):
        train(network(), batches(3, 3, 3), include="0")
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert "left out by include/exclude: 2.weight" in messages[0]


def test_log_dir_and_writer() -> None:
    """Two places for the same thing are refused."""
    with pytest.raises(ConfigurationError, match="log_dir or writer, not both"):
        FeatureProbe(network(), log_dir="runs", writer=object())  # type: ignore[arg-type]
