"""Premises: the reason in words, and what it makes of the verdict, end to end in small networks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from feature_probe import ConfigurationError, FeatureProbe, Record, Report, measure
from feature_probe.reports.premises import Circumstances, premises
from feature_probe.theory.invariance import ScaleInvariance
from feature_probe.theory.relations import LayerStatistics

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))
Make = Callable[[Sequence[nn.Parameter]], Optimizer]


def network() -> nn.Sequential:
    """6 → 8 → 3."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(
    make: Make,
    model: nn.Module | None = None,
    *,
    steps: int = 12,
    each: Callable[[Optimizer, int], None] | None = None,
    **options: Any,
) -> Report:
    """The last report of a short run."""
    model = network() if model is None else model
    optimizer = make(list(model.parameters()))
    settings: dict[str, Any] = {"every": lambda s: s == steps - 1, "window": 9, "strict": True}
    with FeatureProbe(model, optimizer=optimizer, **(settings | options)) as probe:
        for step in range(steps):
            if each is not None:
                each(optimizer, step)
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    assert probe.report is not None
    return probe.report


def sgd(decay: float = 0.01, **settings: Any) -> Make:
    """SGD with weight decay."""
    return lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=decay, **settings)


def fact(report: Report, layer: str = "0") -> Record:
    """FACT's record of a layer."""
    return report.record(layer, "fact")


def test_without_weight_decay_fact_does_not_apply() -> None:
    """λ = 0: FACT keeps its direction, but nothing balances the gradient."""
    report = trained(sgd(0.0))
    assert fact(report).verdict == "not applicable"
    assert "no weight decay" in fact(report).because
    assert report.diagnosis("0").state == "not applicable"
    assert report.diagnosis("0").decay_form == "none"


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.RAdam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    ],
    ids=["AdamW", "RAdam"],
)
def test_decoupled_decay_points_to_the_update_form(make: Make) -> None:
    """FACT is not applicable, the update form is, and both are measured without being asked for."""
    report = trained(make)
    assert fact(report).verdict == "not applicable"
    assert "update_fact" in fact(report).because
    update = report.record("0", "update_fact")
    assert (update.verdict, update.form) == ("not yet", "update")
    assert report.diagnosis("0").decay_form == "decoupled"
    assert "decoupled decay" in report.settings["weight_decay"]


def test_under_coupled_decay_the_update_form_does_not_apply() -> None:
    """It is not measured unless asked for, and then says why it is not the one to read."""
    assert "update_fact" not in trained(sgd()).labels
    record = trained(sgd(), relations=("fact", "update_fact")).record("0", "update_fact")
    assert record.verdict == "not applicable"
    assert "read fact" in record.because


def test_groups_have_their_own_forms() -> None:
    """A layer without decay beside one with it: each by its own group."""
    model = network()

    def make(parameters: Sequence[nn.Parameter]) -> Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": list(model[0].parameters()), "weight_decay": 0.0},
            {"params": list(model[2].parameters())},
        ]
        return torch.optim.SGD(groups, lr=0.05, weight_decay=0.1)

    report = trained(make, model)
    assert fact(report, "0").verdict == "not applicable"
    assert fact(report, "2").verdict == "not yet"
    assert len(FeatureProbe(model, optimizer=make([])).preflight()) == 2


def test_a_decay_that_changes_inside_the_window() -> None:
    """There is no one λ to compare with."""

    def change(optimizer: Optimizer, step: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.01 * (1 + step)

    record = fact(trained(sgd(), each=change))
    assert record.verdict == "cannot tell"
    assert "λ changed inside the window" in record.because


def test_a_given_decay_that_the_optimizer_does_not_apply() -> None:
    """The optimizer's own is what balances the gradient."""
    record = fact(trained(sgd(0.01), weight_decay=0.02))
    assert record.verdict == "not applicable"
    assert "λ was given as 0.02, but SGD applies 0.01" in record.because


def test_frozen_and_not_held() -> None:
    """A frozen layer and one that the optimizer does not hold are not driven to rest."""
    model = network()
    model[0].requires_grad_(False)
    report = trained(lambda p: sgd()([q for q in p if q.requires_grad]), model)
    assert "frozen" in fact(report).because
    model = network()
    report = trained(lambda p: sgd()(list(model[2].parameters())), model)
    assert "not held by the optimizer" in fact(report).because
    assert {record.verdict for record in report.select("0", "fact")} == {"not applicable"}


def test_batch_norm_makes_rows_scale_invariant_and_fact_not_applicable() -> None:
    """Found from the steps: eight are needed, and before them it cannot be told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    report = trained(sgd(), model)
    assert report.diagnosis("0").scale_invariance == "rows"
    assert fact(report).verdict == "not applicable"
    assert "scale-invariant" in fact(report).because
    assert report.diagnosis("3").scale_invariance == "none"
    assert fact(report, "3").verdict == "not yet"
    early = trained(sgd(), model, steps=4, window=4)
    assert early.diagnosis("0").scale_invariance == "unknown"


def test_scale_invariance_is_gathered_over_several_windows() -> None:
    """Windows of four steps: the second report has eight to go by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    report = trained(sgd(), model, steps=24, window=4, every=lambda s: s in (11, 23))
    assert report.diagnosis("0").scale_invariance == "rows"


def test_a_stored_weight_that_is_standardised_before_use() -> None:
    """Weight standardisation: the stored weight is computed with, so FACT need not hold."""

    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean(1, keepdim=True)
            return F.linear(x, weight / weight.std(1, keepdim=True), self.bias)

    torch.manual_seed(0)
    report = trained(sgd(), nn.Sequential(Standardised(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    assert report.diagnosis("0").scale_invariance == "rows"
    assert fact(report).verdict == "not applicable"


def test_the_last_layer_is_trivial_with_exact_and_with_random_jacobians() -> None:
    """K ∝ I, also behind a mean over positions, where random probes show it by their sampling."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.stack([x, x.flip(1)], 1)
            return self.head(torch.tanh(self.inner(tokens))).mean(1)

    torch.manual_seed(0)
    model = Pooled()
    data = [(X.repeat(4, 1), Y.repeat(4))]
    for jacobian in ("exact", "random"):
        report = measure(model, data, F.cross_entropy, jacobian=jacobian, progress=False)
        assert {r.verdict for r in report.select("head", "nfa")} == {"trivial"}
        assert "trivial" not in {r.verdict for r in report.select("inner", "nfa")}


def test_a_weight_used_twice_has_no_level_by_chance() -> None:
    """K contains the weight: no verdict without a score at initialisation to compare with."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6) / 6**0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight), self.weight.T)

    torch.manual_seed(0)
    report = measure(Tied(), [(X, X)], F.mse_loss, relations="nfa", powers=0.5, progress=False)
    record = report.record("weight", "nfa", 0.5)
    assert record.cosine > 0.99
    assert record.verdict == "cannot tell"
    assert "used in several places" in record.because


def test_squares_that_underflow_are_told_of() -> None:
    """Gradients of 1e-18 in float32: E is there, but its smaller entries are gone."""
    torch.manual_seed(0)
    report = measure(
        network(), [(X, Y)], lambda f, y: 1e-18 * F.cross_entropy(f, y),
        relations="enfa", powers=0.5, progress=False,
    )  # fmt: skip
    record = report.record("0", "enfa", 0.5)
    assert record.verdict == "cannot tell"
    assert "underflow" in record.because


def test_unknown_decay_rules_are_refused_by_name() -> None:
    """ASGD decays by its own lambd: neither form is claimed."""
    record = fact(trained(lambda p: torch.optim.ASGD(p, lr=0.01, weight_decay=0.01)))
    assert record.verdict == "not applicable"
    assert "ASGD" in record.because


def test_without_optimizer_lambda_is_not_known() -> None:
    """measure without λ: the direction only, and no verdict on the equality."""
    report = measure(network(), [(X, Y)], F.cross_entropy, progress=False)
    assert fact(report).verdict == "cannot tell"
    assert "weight decay not known" in fact(report).because
    assert report.diagnosis("0").state == "cannot tell"


def test_ages_are_unknown_when_attached_late() -> None:
    """An optimizer with state has stepped before; a fresh one has not."""
    model = network()
    optimizer = sgd(momentum=0.9)(list(model.parameters()))
    for late in (False, True):
        with FeatureProbe(model, optimizer=optimizer, every=lambda s: s == 3, window=2) as probe:
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward()
                optimizer.step()
        assert probe.report is not None
        found = probe.report.diagnosis("0")
        if late:
            assert found.decay_age != found.decay_age
            assert "after training had begun" in found.decay_age_note
        else:
            assert found.decay_age == pytest.approx(3 * 0.05 * 0.01 / 0.1)


def test_sam_given_whole_is_followed_at_its_base_optimizer() -> None:
    """The wrapper's own step moves the weights away and back: one step is one step of its base."""

    class SAM(torch.optim.Optimizer):
        """Sharpness-aware minimisation as its users write it."""

        def __init__(self, parameters: Sequence[nn.Parameter], rho: float = 0.05) -> None:
            super().__init__(parameters, {"rho": rho})
            self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.05, weight_decay=0.01)
            self.param_groups = self.base_optimizer.param_groups

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            held = {}
            for group in self.param_groups:
                for p in group["params"]:
                    held[p] = p.clone()
                    p.add_(group["rho"] * p.grad / p.grad.norm())
            with torch.enable_grad():
                loss = closure()
            for p, before in held.items():
                p.copy_(before)
            self.base_optimizer.step()
            return loss

    model = network()
    optimizer = SAM(list(model.parameters()))
    weights = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with FeatureProbe(
        model, optimizer=optimizer, every=1, keep_matrices=True, strict=True
    ) as probe:
        for step in range(3):
            weights.append(model[0].weight.detach().clone())
            closure()
            optimizer.step(closure)
            assert probe.report is not None
            assert probe.report.step == step
            assert torch.equal(probe.report.statistics["0"].weight[0], weights[-1])
    assert probe.report is not None
    assert probe.report.diagnosis("0").decay_form == "coupled"


def test_an_average_of_weights_is_refused_with_what_to_do() -> None:
    """An EMA copy is not what the optimizer trains."""
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(ConfigurationError, match="copied"):
        FeatureProbe(average, optimizer=sgd()(list(model.parameters())))


def test_the_preflight_note_is_logged_on_attaching(caplog: pytest.LogCaptureFixture) -> None:
    """One line per parameter group, with the form that applies."""
    model = network()
    probe = FeatureProbe(model, optimizer=torch.optim.AdamW(model.parameters()))
    assert "read update_fact, not fact" in probe.preflight()[0]
    with caplog.at_level(logging.INFO, logger="feature_probe"):
        probe.attach()
        probe.detach()
    assert "read update_fact, not fact" in caplog.text


@pytest.mark.parametrize(
    ("balanced", "effect"),
    [(0.5, "noted"), (0.11, "noted"), (0.09, "not applicable"), (-0.02, "not applicable"),
     (float("nan"), "noted")],
)  # fmt: skip
def test_a_partly_invariant_layer_is_judged_by_what_its_gradient_balances(
    balanced: float, effect: str
) -> None:
    """Under a tenth of the decay FACT cannot hold; above, or where that is unknown, it may."""
    partly = ScaleInvariance("partly", 1e-5, 24, 32, "partly: each of its 24 rows")
    weight = torch.ones(1, 24, 24)
    statistics = LayerStatistics(
        weight=weight, gradient=weight, jacobian=None, loss=None, weight_decay=0.01, tolerance=0.0
    )
    found = premises(Circumstances(invariance=partly, balanced=balanced), statistics)["gradient"]
    assert found.effect == effect
    assert ("FACT cannot hold" in found.text) is (effect == "not applicable")
