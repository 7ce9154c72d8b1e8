"""What `measure` takes its output and its passes from, and what it says of trivial layers."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from cases import readable
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import ConfigurationError, FeatureProbe, measure


def network(outputs: int = 3) -> nn.Sequential:
    """Two Linears with a tanh between, float64."""
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def batch(outputs: int = 3) -> tuple[Tensor, Tensor]:
    """Eight examples."""
    return torch.randn(8, 5).double(), torch.randn(8, outputs).double()


def test_f_is_the_output_that_forward_returns() -> None:
    """A forward that returns a part of the model's output is measured as output= of that part."""
    model, data = network(), batch()

    def part(module: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out = module(given[0])
        return out[:, :1], F.mse_loss(out, given[1])

    by_forward = measure(model, [data], forward=part, weight_decay=0.1, progress=False)
    by_output = measure(
        model, [data], F.mse_loss, output=lambda out: out[:, :1], weight_decay=0.1, progress=False
    )
    whole = measure(model, [data], F.mse_loss, weight_decay=0.1, progress=False)
    for one, two in zip(by_forward.records, by_output.records, strict=True):
        assert math.isclose(one.cosine, two.cosine, rel_tol=1e-12)
    nfa = [report.record("0", "nfa", 1.0).cosine for report in (by_forward, whole)]
    assert abs(nfa[0] - nfa[1]) > 1e-3


@pytest.mark.parametrize("calls", [0, 2])
def test_forward_must_call_the_model_once(calls: int) -> None:
    """No call and two calls are refused, as n would be wrong."""
    model, data = network(), batch()

    def forward(module: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out = model[2](torch.tanh(model[0](given[0])))
        for _ in range(calls):
            out = module(given[0])
        return out, F.mse_loss(out, given[1])

    with pytest.raises(ConfigurationError, match=f"called {calls} times for one batch"):
        measure(model, [data], forward=forward, progress=False)


def test_forward_must_return_a_pair() -> None:
    """The output alone is refused."""
    with pytest.raises(ConfigurationError, match=r"must return \(output, loss\), got Tensor"):
        measure(network(), [batch()], forward=lambda m, b: m(b[0]), progress=False)  # type: ignore[arg-type,return-value]


def test_one_output_row_is_trivial() -> None:
    """With one output row the NFA holds whatever the gradients: said, and with level 1."""
    report = measure(network(1), [batch(1)], F.mse_loss, weight_decay=0.1, progress=False)
    for relation in ("nfa", "enfa"):
        record = report.record("2", relation, 1.0)
        assert math.isclose(record.cosine, 1.0, rel_tol=1e-12)
        assert record.level_by_chance == 1.0
        assert "one output row" in record.premise


@pytest.mark.parametrize("jacobian", ["random", "exact"])
def test_the_last_layer_is_trivial_in_the_loop(jacobian: Any) -> None:
    """The layer whose output is f is known as such, whatever its K comes out as."""
    model, (x, y) = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with FeatureProbe(model, optimizer=optimizer, jacobian=jacobian, strict=True) as probe:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert probe.report is not None
    assert "trivial" in probe.report.record("2", "nfa", 1.0).premise
    assert probe.report.record("0", "nfa", 1.0).premise == ""


@pytest.mark.parametrize("sinks", ["a", 3, [3], [object()]], ids=readable)
def test_what_is_no_sink(sinks: Any) -> None:
    """Sinks are checked before training."""
    with pytest.raises(ConfigurationError, match="sink"):
        FeatureProbe(network(), sinks=sinks)


def test_what_is_no_writer() -> None:
    """A folder given as writer is refused with the right argument's name."""
    with pytest.raises(ConfigurationError, match="for a folder use log_dir="):
        FeatureProbe(network(), writer="runs")  # type: ignore[arg-type]


def test_a_probe_that_made_no_report_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A forgotten optimizer= shows at the end of the block."""
    model, (x, y) = network(), batch()
    with caplog.at_level(logging.WARNING), FeatureProbe(model):
        F.mse_loss(model(x), y).backward()
    assert "made no report" in caplog.text
    assert "probe.step()" in caplog.text


def untrained_and_trained() -> tuple[Any, Any, Tensor, Tensor]:
    """Reports of a network before training (alone), after it (alone, and beside the first)."""
    torch.manual_seed(0)
    x, y = torch.randn(400, 5).double(), torch.randn(400, 3).double()
    model = network()
    before = measure(model, [(x, y)], F.mse_loss, relations=("nfa", "fact"), progress=False)
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0]).double()[:, None])
    return model, before, x, y


def test_an_initial_report_gives_the_score_before_training() -> None:
    """Every record has the cosine of the untrained network; without it there is none."""
    model, before, x, y = untrained_and_trained()
    after = measure(
        model, [(x, y)], F.mse_loss, relations=("nfa", "fact"), initial=before, progress=False
    )
    for record in after.records:
        first = before.record(record.layer, record.relation, record.power)
        assert record.initial_cosine == first.cosine or math.isnan(first.cosine)
        assert math.isnan(first.initial_cosine)
    assert "at initialisation" in after.record("0", "nfa", 1.0).because
    assert "at initialisation" not in before.record("0", "nfa", 1.0).because


@pytest.mark.parametrize(
    ("initial", "change", "match"),
    [
        ("a report", {}, "the report that measure\\(\\) returned"),
        (None, {"jacobian": "random"}, "jacobian='exact', this with 'random'"),
        (None, {"positions": "reduce"}, "positions='expand', this with 'reduce'"),
        (None, {"eval_mode": False}, "eval_mode=True, this with False"),
    ],
)
def test_an_initial_report_that_does_not_compare(
    initial: Any, change: dict[str, Any], match: str
) -> None:
    """Something else than a report, and one measured otherwise, are refused before any pass."""
    model, before, x, y = untrained_and_trained()

    def never(output: Tensor, target: Tensor) -> Tensor:
        raise AssertionError("a pass was made")

    with pytest.raises(ConfigurationError, match=match):
        measure(model, [(x, y)], never, initial=initial or before, progress=False, **change)


def test_an_initial_report_of_another_network() -> None:
    """No layer in common is refused, with what it has."""
    _, before, x, y = untrained_and_trained()
    other = nn.ModuleDict({"body": nn.Linear(5, 3)}).double()
    with pytest.raises(ConfigurationError, match="it has 0, 2"):
        measure(
            other, [(x, y)], relations="nfa", initial=before, progress=False,
            forward=lambda m, b: (m["body"](b[0]), None),
        )  # fmt: skip
