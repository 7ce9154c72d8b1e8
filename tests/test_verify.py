"""probe.verify(): a loop whose bookkeeping is right passes, and every wrong number is caught."""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe import ConfigurationError, FeatureProbe
from feature_probe.errors import VerificationError
from feature_probe.reports.verification import Check, Verification
from feature_probe.sums.ledger import Ledger
from feature_probe.sums.verification import Evidence

LAMBDA = 0.02
BATCH = 8
Change = Callable[[nn.Module, int], None]
Make = Callable[[Any], torch.optim.Optimizer]


class Shared(nn.Module):
    """Two Linears with one weight, an attention, and a convolution before them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3, groups=2)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x.view(-1, 2, 5))).mT
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        x, _ = self.attention(x, x, x, need_weights=False)
        out: Tensor = self.head(x.mean(1))
        return out


def net() -> nn.Sequential:
    """Two layers, with batch norm between."""
    return nn.Sequential(nn.Linear(10, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


def shared() -> nn.Module:
    """Convolution, tied weights, attention."""
    return Shared()


def sgd(**options: Any) -> Make:
    """SGD with decay."""
    return lambda p: torch.optim.SGD(p, **{"lr": 0.1, "weight_decay": LAMBDA, **options})


def adam(kind: Any = torch.optim.Adam, **options: Any) -> Make:
    """Adam or its kin with decay."""
    return lambda p: kind(p, **{"lr": 0.01, "weight_decay": LAMBDA, **options})


@dataclass
class Loop:
    """A training loop.

    Attributes:
        make: The optimizer.
        model: The model.
        steps: Training steps.
        micro: Micro-batches of a step.
        sizes: Examples of each micro-batch in turn.
        schedule: Of the learning rate.
        scaler: Whether the loss goes through a GradScaler.
        between: What happens between backward and step.
        after: What happens after the step.
        scale: Factor on the loss, which the loop takes out of the gradients by hand.
        verify: ``verify_steps``.
        probe: More of the probe's arguments.
    """

    make: Make = field(default_factory=lambda: sgd(momentum=0.9))
    model: Callable[[], nn.Module] = net
    steps: int = 7
    micro: int = 1
    sizes: tuple[int, ...] = (BATCH,)
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    scaler: bool = False
    between: Change | None = None
    after: Change | None = None
    scale: float = 1.0
    verify: int = 6
    probe: dict[str, Any] = field(default_factory=dict)

    def run(self) -> FeatureProbe:
        """Train; the probe afterwards."""
        torch.manual_seed(1)
        model = self.model()
        optimizer = self.make(list(model.parameters()))
        schedule = None if self.schedule is None else self.schedule(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=self.scaler, init_scale=64.0)
        few = {"every": 1000, "window": 1, "relations": "fact", "powers": 1.0}
        options: dict[str, Any] = {**few, "strict": True, **self.probe}
        options = {"verify_steps": self.verify, **options}
        with FeatureProbe(model, optimizer=optimizer, **options) as probe:
            for step in range(self.steps):
                optimizer.zero_grad()
                for number in range(self.micro):
                    x, y = batch(self.sizes[number % len(self.sizes)])
                    loss = F.mse_loss(model(x), y) / self.micro
                    scaler.scale(loss * self.scale).backward()
                if self.scale != 1.0:
                    for parameter in model.parameters():
                        assert parameter.grad is not None
                        parameter.grad /= self.scale
                if self.between is not None:
                    self.between(model, step)
                scaler.step(optimizer)
                scaler.update()
                if self.after is not None:
                    self.after(model, step)
                if schedule is not None:
                    schedule.step()
        self.trained = model
        return probe

    def verify_it(self) -> Verification:
        """Train and verify, with a batch."""
        return self.run().verify(batch(6), F.mse_loss)


def batch(n: int) -> tuple[Tensor, Tensor]:
    """Random inputs and targets."""
    return torch.randn(n, 10), torch.randn(n, 3)


def found(result: Verification, name: str) -> list[Check]:
    """The checks of one name."""
    return [check for check in result.checks if check.name == name]


def failed(result: Verification) -> set[str]:
    """Names of the checks that failed on some layer."""
    return {check.name for check in result.failures}


def every_check(result: Verification) -> dict[str, set[bool | None]]:
    """The verdicts of each check."""
    return {check.name: {c.ok for c in found(result, check.name)} for check in result.checks}


@pytest.fixture
def double() -> Iterator[None]:
    """Models and data in float64."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    """A schedule of both learning rate and momentum."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)


def falling(optimizer: torch.optim.Optimizer) -> Any:
    """A learning rate that falls at every step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


CLEAN: dict[str, Loop] = {
    "plain": Loop(sgd()),
    "momentum": Loop(),
    "dampening": Loop(sgd(momentum=0.9, dampening=0.3)),
    "nesterov": Loop(sgd(momentum=0.8, nesterov=True)),
    "schedule": Loop(sgd(momentum=0.9), schedule=falling),
    "plain schedule": Loop(sgd(), schedule=falling),
    "one cycle": Loop(sgd(momentum=0.9), schedule=one_cycle),
    "maximize": Loop(sgd(momentum=0.9, maximize=True, lr=1e-3)),
    "adam": Loop(adam()),
    "amsgrad": Loop(adam(amsgrad=True)),
    "nadam": Loop(adam(torch.optim.NAdam)),
    "radam": Loop(adam(torch.optim.RAdam)),
    "accumulation": Loop(micro=4),
    "scaler": Loop(scaler=True),
    "scaler and accumulation": Loop(scaler=True, micro=2),
    "loss scale given": Loop(scale=128.0, probe={"loss_scale": 128.0}),
    "shared": Loop(model=shared),
    "shared adam": Loop(adam(), model=shared),
    "all relations": Loop(probe={"relations": None, "every": 4, "window": 2}),
    "gradient not asked for": Loop(probe={"relations": ("nfa", "enfa")}),
    "reduced positions": Loop(model=shared, probe={"relations": "enfa", "positions": "reduce"}),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", CLEAN)
def test_a_right_loop_passes(name: str) -> None:
    """Every check of every layer is made and holds, to rounding."""
    assert_passes(name, 1e-10)


@pytest.mark.parametrize("name", ["plain", "momentum", "adam", "shared", "scaler"])
def test_a_right_loop_passes_in_float32(name: str) -> None:
    """Likewise; the terms of attention's gradients cancel."""
    assert_passes(name, 1e-3)


def assert_passes(name: str, floor: float) -> None:
    """All checks of a clean loop."""
    result = CLEAN[name].verify_it()
    result.raise_if_failed()
    assert result.passed
    assert result.steps == 6
    names = (
        "gradient",
        "examples",
        "trajectory",
        "weights",
        "weight decay",
        "example axis",
        "loss",
    )
    assert every_check(result) == {check: {True} for check in names}
    assert len(found(result, "gradient")) == (7 if CLEAN[name].model is shared else 2)
    assert max(check.gap for check in result.checks if check.gap == check.gap) < floor


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RAdam])
def test_of_decoupled_decay_the_gradient_is_checked(kind: Any) -> None:
    """Adam's first moment shows G; λ is not in it, and the result says so."""
    options = {} if kind is torch.optim.AdamW else {"decoupled_weight_decay": True}
    result = Loop(adam(kind, **options)).verify_it()
    assert result.passed
    assert every_check(result)["trajectory"] == {True}
    assert every_check(result)["weight decay"] == {None}
    assert "decoupled" in found(result, "weight decay")[0].message


def test_an_unknown_optimizer_is_named() -> None:
    """Where weights do not show the gradient, the other checks are made."""
    result = Loop(lambda p: torch.optim.Adagrad(p, lr=0.01)).verify_it()
    assert result.passed
    assert every_check(result)["gradient"] == {True}
    assert every_check(result)["trajectory"] == {None}
    assert "Adagrad" in found(result, "trajectory")[0].message


class Slow(torch.optim.Optimizer):
    """A wrapper with a rule of its own, as Lookahead is."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.base_optimizer = inner

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optimizer.step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)


def test_a_wrapped_optimizer_is_named() -> None:
    """What a wrapper does to the weights is not known, and no failure."""
    result = Loop(lambda p: Slow(sgd()(p))).verify_it()
    assert result.passed
    assert every_check(result)["weights"] == {None}
    assert "by Slow, which the optimizer is wrapped in" in str(result)


# --------------------------------------------------------------------------- injections


def scaled_by(factor: float) -> Callable[..., float]:
    """Stands for Ledger._scale: n times a factor."""
    return lambda self, forward: float(forward.examples) * factor


def test_a_wrong_number_of_examples_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """E's per-example gradients scaled by another n than that of the batch."""
    monkeypatch.setattr(Ledger, "_scale", scaled_by((BATCH + 1) / BATCH))
    result = Loop().verify_it()
    assert failed(result) == {"examples"}
    assert found(result, "examples")[0].factor == pytest.approx((BATCH + 1) / BATCH, rel=1e-6)


def test_a_forgotten_number_of_examples_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor that is the batch size is called that."""
    monkeypatch.setattr(Ledger, "_scale", scaled_by(1 / BATCH))
    result = Loop().verify_it()
    assert failed(result) == {"examples"}
    assert f"number of examples of a step) ({BATCH})" in str(result)


def test_a_wrong_accumulation_factor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """E scaled as if a step had one forward pass."""
    monkeypatch.setattr(Ledger, "_step_scale", lambda self, passes, factor: factor)
    result = Loop(micro=4).verify_it()
    assert failed(result) == {"examples"}
    assert "1/(the number of forward passes of a step) (4)" in str(result)


def test_passes_that_are_lost_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """G formed from the gradients of one of four micro-batches, four times over."""
    own = Ledger.commit

    def commit(self: Ledger, *args: Any, **options: Any) -> Any:
        window = own(self, *args, **options)
        for moments in window.layers:
            if moments.gradient is not None:
                moments.gradient.mul_(4)
        return window

    monkeypatch.setattr(Ledger, "commit", commit)
    result = Loop(micro=4).verify_it()
    assert failed(result) == {"gradient", "examples"}
    assert "the number of forward passes of a step (4)" in str(result)


@pytest.mark.parametrize(
    "make", [sgd(), sgd(momentum=0.9), sgd(momentum=0.9, nesterov=True), adam()]
)
@pytest.mark.parametrize("factor", [0.5, 1.1, 0.0])
def test_a_wrong_weight_decay_is_caught(make: Make, factor: float) -> None:
    """λ given to the probe that is not the one the weights obey."""
    result = Loop(make, probe={"weight_decay": LAMBDA * factor}).verify_it()
    assert failed(result) == {"weight decay"}
    for check in found(result, "weight decay"):
        assert f"the steps show λ = {LAMBDA:.4g}" in check.message
        if factor:
            assert check.factor == pytest.approx(1 / factor, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 6])
def test_a_wrong_reduction_is_caught(steps: int) -> None:
    """A mean declared as a sum; only the loss of a batch shows it."""
    loop = Loop(probe={"loss_reduction": "sum"}, steps=steps)
    assert failed(loop.verify_it()) == {"loss"}
    assert loop.run().verify().passed


def test_a_sum_declared_as_a_mean_is_caught() -> None:
    """The other way round, on batches of an odd number."""

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target, reduction="sum")

    result = Loop().run().verify(batch(7), summed)
    assert failed(result) == {"loss"}
    assert "give loss_reduction='sum'" in str(result)
    assert Loop(probe={"loss_reduction": "sum"}).run().verify(batch(7), summed).passed


@pytest.mark.parametrize("factor", [128.0, 100.0, 0.25])
def test_a_loss_scale_that_was_not_told_is_caught(factor: float) -> None:
    """The loss multiplied, the gradients divided by hand."""
    result = Loop(scale=factor).verify_it()
    assert failed(result) == {"gradient"}
    for check in found(result, "gradient"):
        assert check.factor == pytest.approx(factor, rel=1e-4)
        assert "constant factor" in check.message
    assert ("give loss_scale=" in str(result)) == (factor != 100.0)


def test_a_wrong_loss_scale_is_named() -> None:
    """A loss scale that the probe was told of and that is not there."""
    result = Loop(probe={"loss_scale": 128.0}).verify_it()
    assert failed(result) == {"gradient"}
    assert "1/(the loss scale) (128)" in str(result)


def test_a_penalty_in_the_loss_is_caught() -> None:
    """(λ/2)‖W‖² in the loss: the gradient that reports are made with contains λW."""

    def penalised(model: nn.Module, step: int) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.05 * parameter.detach()

    result = Loop(between=penalised).verify_it()
    assert failed(result) == {"gradient"}
    assert "contains 0.05 × the weight" in str(result)


def test_another_gradient_is_caught() -> None:
    """Noise on the gradients is neither a factor nor clipping."""

    def noisy(model: nn.Module, step: int) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.1 * torch.randn_like(parameter)

    result = Loop(between=noisy).verify_it()
    assert failed(result) == {"gradient"}
    assert "in direction too" in str(result)


def test_clipping_is_named_and_passes() -> None:
    """By norm, with the mean factor; the trajectory holds with the clipped gradient."""
    factors = []

    def clipped(model: nn.Module, step: int) -> None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        factors.append(min(0.5 / float(norm), 1.0))

    result = Loop(between=clipped, steps=6).verify_it()
    result.raise_if_failed()
    assert every_check(result)["trajectory"] == {True}
    mean = sum(factors) / len(factors)
    assert f"clipped between backward and step in 6 of 6 steps (mean factor {mean:.3g})" in str(
        result
    )


def test_clipping_in_some_steps_is_named_and_passes() -> None:
    """Steps whose gradient is short enough are as they were."""

    def clipped(model: nn.Module, step: int) -> None:
        if step % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    result = Loop(between=clipped).verify_it()
    result.raise_if_failed()
    assert "clipped between backward and step in 3 of 6 steps" in str(result)


def test_clipping_by_value_is_named_and_passes() -> None:
    """Entry by entry."""

    def clipped(model: nn.Module, step: int) -> None:
        nn.utils.clip_grad_value_(model.parameters(), 0.02)

    result = Loop(between=clipped).verify_it()
    result.raise_if_failed()
    assert "entries were clipped" in str(result)


def test_a_changed_weight_is_caught() -> None:
    """A projection after the step is no step of the optimizer."""

    def projected(model: nn.Module, step: int) -> None:
        weight = next(model.parameters())
        weight.data.clamp_(-0.2, 0.2)

    result = Loop(after=projected).verify_it()
    assert failed(result) == {"weights"}
    assert [check.layer for check in result.failures] == ["0"]
    assert "changed 5 times between two steps" in str(result)


def test_a_step_of_another_length_is_caught() -> None:
    """Weights that move by another rate than the group's, while the momentum is as it should be."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = sgd(momentum=0.9)(parameters)
        weights = [p for p in parameters if p.dim() > 1]

        def far(opt: torch.optim.Optimizer, *_: Any) -> None:
            with torch.no_grad():
                for weight in weights:
                    weight.sub_(0.1 * opt.state[weight]["momentum_buffer"])

        optimizer.register_step_post_hook(far)  # before the probe's own
        return optimizer

    result = Loop(make).verify_it()
    assert failed(result) == {"trajectory"}
    assert "did not move the weights as its rule says" in str(result)


@pytest.mark.parametrize("make", [sgd(momentum=0.9), adam(), adam(torch.optim.AdamW)])
def test_a_gradient_changed_after_the_probe_read_it_is_caught(make: Make) -> None:
    """The optimizer's momentum holds another gradient than the one that was read."""
    held: list[torch.optim.Optimizer] = []

    def remember(parameters: Any) -> torch.optim.Optimizer:
        held.append(make(parameters))
        return held[-1]

    def double(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad *= 2

    def hooked(model: nn.Module, step: int) -> None:
        if step == 0:  # after the probe was attached
            held[-1].register_step_pre_hook(double)

    result = Loop(remember, between=hooked).verify_it()
    assert "trajectory" in failed(result)
    assert "is not what went into its momentum" in str(result)


# --------------------------------------------------------------------------- what cannot be told


def test_a_decay_below_the_rounding_cannot_be_told() -> None:
    """ηλ so small that float32 weights do not show it, in steps without momentum."""
    result = Loop(sgd(lr=1e-4, weight_decay=1e-4)).verify_it()
    assert not failed(result)
    assert every_check(result)["weight decay"] == {None}
    assert "cannot tell λ" in str(result)


def test_uneven_micro_batches_leave_the_examples_unchecked() -> None:
    """A mean of means over uneven batches is no mean over examples."""
    result = Loop(micro=2, sizes=(8, 5)).verify_it()
    assert result.passed
    assert every_check(result)["examples"] == {None}
    assert "uneven sizes" in str(result)


def test_a_changing_decay_is_not_judged() -> None:
    """λ under a schedule."""
    optimizers = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(sgd(momentum=0.9)(parameters))
        return optimizers[-1]

    def changed(model: nn.Module, step: int) -> None:
        optimizers[-1].param_groups[0]["weight_decay"] *= 0.9

    result = Loop(make, after=changed).verify_it()
    assert result.passed
    assert every_check(result)["weight decay"] == {None}
    assert "weight_decay changed" in str(result)


class Embedded(nn.Module):
    """A head that is tied to an embedding, and a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.last = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.normed(self.embedding(x.abs().long() % 10).mean(1)))
        out: Tensor = self.last(torch.tanh(self.head(y)))
        return out


def test_weights_with_other_sources_are_left_out_by_name() -> None:
    """A tied embedding's gradient holds more than the head's; a computed weight has none."""
    result = Loop(model=Embedded).verify_it()
    assert result.passed
    verdicts = {check.layer: check for check in found(result, "gradient")}
    assert verdicts["last"].ok
    assert verdicts["head"].ok is None
    assert "shared with embedding" in verdicts["head"].message
    assert verdicts["normed"].ok is None
    assert "computed" in verdicts["normed"].message


def attached(model: nn.Module, optimizer: Any, **options: Any) -> FeatureProbe:
    """A probe that verifies six steps."""
    settings: dict[str, Any] = {"verify_steps": 6, "relations": "fact", "strict": True, **options}
    return FeatureProbe(model, optimizer=optimizer, **settings)


def test_skipped_steps_are_not_counted() -> None:
    """Steps that a fused optimizer skips after an overflow are none; the others hold."""
    model = nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = sgd(momentum=0.9, fused=True)(list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with attached(model, optimizer) as probe:
        for step in range(7):
            optimizer.zero_grad()
            x, y = batch(8)
            x = x * float("inf") if step in (2, 3) else x
            scaler.scale(F.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
    result = probe.verify()
    result.raise_if_failed()
    assert result.steps == 5
    assert None not in {check.ok for check in result.checks}


def test_autocast_passes_and_a_factor_in_it_is_caught() -> None:
    """Gradients rounded to bfloat16 are told from a wrong factor of two."""
    for factor in (1.0, 2.0):
        model = Shared()
        optimizer = sgd(momentum=0.9)(list(model.parameters()))
        with attached(model, optimizer) as probe:
            for _ in range(6):
                optimizer.zero_grad()
                x, y = batch(8)
                with torch.autocast("cpu", torch.bfloat16):
                    out = model(x)
                F.mse_loss(out.float(), y).mul(factor).backward()
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= factor
                optimizer.step()
        result = probe.verify()
        assert failed(result) == (set() if factor == 1.0 else {"gradient"})
        assert len(result.failures) == (0 if factor == 1.0 else 7)


def test_an_input_changed_in_place_under_autocast_is_still_known() -> None:
    """The layer saved a cast copy, so that the model may write to what it was given."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = torch.tanh(self.first(x))
            x.zero_()
            out: Tensor = self.last(y)
            return out

    model = Writing()
    optimizer = sgd()(list(model.parameters()))
    with attached(model, optimizer) as probe:
        for _ in range(2):
            optimizer.zero_grad()
            x, y = batch(8)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            F.mse_loss(out.float(), y).backward()
            optimizer.step()
    assert probe.report is not None
    scores = [record.cosine for record in probe.report.records if record.layer == "first"]
    assert scores
    assert all(math.isfinite(score) for score in scores)
    assert every_check(probe.verify())["gradient"] == {True}


def test_two_optimizers_of_which_one_steps_twice() -> None:
    """Each layer by its own optimizer; the trajectory of the one that steps twice is not judged."""
    for times in (1, 2):
        model = nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3))
        first = sgd(momentum=0.9)(list(model[0].parameters()))
        last = adam()(list(model[2].parameters()))
        with attached(model, [first, last]) as probe:
            for _ in range(4):
                for _ in range(times):
                    first.zero_grad()
                    last.zero_grad()
                    x, y = batch(8)
                    F.mse_loss(model(x), y).backward()
                    first.step()
                last.step()
        result = probe.verify()
        result.raise_if_failed()
        assert result.steps == 4
        verdicts = {check.layer: check for check in found(result, "trajectory")}
        assert verdicts["2"].ok
        assert verdicts["0"].ok is (True if times == 1 else None)
        assert times == 1 or "steps more often" in verdicts["0"].message


def test_without_an_optimizer_the_gradients_are_checked() -> None:
    """Steps counted by hand; frozen layers are named."""
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = sgd()([p for p in model.parameters() if p.requires_grad])
    with attached(model, None, weight_decay=0.1) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            x, y = batch(8)
            F.mse_loss(model(x), y).backward()
            probe.step()
            optimizer.step()
    result = probe.verify()
    assert result.passed
    verdicts = {check.layer: check for check in found(result, "gradient")}
    assert verdicts["3"].ok
    assert verdicts["0"].message == "it is frozen"
    assert "no optimizer" in found(result, "trajectory")[0].message


def test_gradients_that_are_not_finite_fail() -> None:
    """A step taken with NaN is no step that can be right."""

    def spoil(model: nn.Module, step: int) -> None:
        parameter = next(model.parameters())
        assert parameter.grad is not None
        parameter.grad[0, 0] = float("nan")

    result = Loop(between=spoil).verify_it()
    assert "not finite in a step that the optimizer took" in str(result)
    assert failed(result) >= {"gradient"}


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_enough(steps: int) -> None:
    """A single step checks everything but the weights between two."""
    result = Loop(steps=steps).verify_it()
    assert result.passed
    assert every_check(result)["weights"] == ({None} if steps == 1 else {True})


def test_one_clipped_step_cannot_be_told_from_a_factor() -> None:
    """With one step there is nothing to see it vary over."""

    def halved(model: nn.Module, step: int) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.63

    result = Loop(steps=1, between=halved).verify_it()
    assert every_check(result)["gradient"] == {None}
    assert failed(Loop(steps=3, between=halved).verify_it()) == {"gradient"}


# --------------------------------------------------------------------------- the batch's loss


def test_the_model_is_left_as_it_was() -> None:
    """Neither buffers, modes, gradients nor random numbers show that a batch was evaluated."""
    loop = Loop(model=lambda: nn.Sequential(net(), nn.Dropout(0.5), Counting()))
    probe = loop.run()
    model = loop.trained
    assert isinstance(model, nn.Sequential)
    counting = model[2]
    assert isinstance(counting, Counting)
    counting.modes.clear()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    random = torch.get_rng_state()
    given = torch.ones(6, 10), torch.zeros(6, 3)
    probe.verify(given, lambda out, y: F.mse_loss(out + 0 * torch.randn(3), y))
    assert torch.equal(torch.get_rng_state(), random)
    assert counting.modes == [False, False, False]
    assert flags == [module.training for module in model.modules()]
    assert all(a is b for a, b in zip(gradients, [p.grad for p in model.parameters()], strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Counting(nn.Module):
    """Counts its calls in a buffer, in either mode, and notes the modes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.modes.append(self.training)
        return x


def test_an_example_axis_that_is_elsewhere_is_caught() -> None:
    """Outputs [c, n]: what the probe takes for n is c."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x).mT
            return out

    loop = Loop(model=Turned, probe={"relations": "fact"})
    torch.manual_seed(0)
    model = Turned()
    optimizer = loop.make(list(model.parameters()))
    with FeatureProbe(model, optimizer=optimizer, verify_steps=2, relations="fact") as probe:
        for _ in range(2):
            optimizer.zero_grad()
            x, y = batch(8)
            F.mse_loss(model(x), y.mT).backward()
            optimizer.step()
    result = probe.verify(batch(6), lambda out, y: F.mse_loss(out, y.mT))
    assert failed(result) == {"example axis"}
    assert "has 3 rows for a batch of 6" in str(result)


def test_a_loss_that_is_neither_is_not_judged() -> None:
    """A root of a mean; and a loss that raises is a check that was not made."""
    probe = Loop().run()
    result = probe.verify(batch(6), lambda out, y: F.mse_loss(out, y).sqrt())
    assert result.passed
    assert "neither the mean nor the sum" in str(result)

    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no such loss")

    result = probe.verify(batch(6), fails)
    assert result.passed
    assert "RuntimeError: no such loss" in str(result)
    zero = probe.verify(batch(6), lambda out, y: 0 * out.sum())
    assert "too near to 0" in str(zero)


def test_other_batches_go_through_forward() -> None:
    """``forward`` gives output and loss of a batch of any shape."""
    x, y = batch(6)

    def forward(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out = model(given["x"])
        return out, F.mse_loss(out, given["y"])

    result = Loop().run().verify({"x": x, "y": y}, forward=forward)
    assert result.passed
    assert every_check(result)["loss"] == {True}


# --------------------------------------------------------------------------- the rest


def test_what_is_missing_is_said() -> None:
    """Without verify_steps, before a step, without a loss, with a batch of one."""
    with pytest.raises(ConfigurationError, match="verify_steps=20"):
        Loop(verify=0).run().verify()
    with pytest.raises(ConfigurationError, match="none has ended"):
        Loop(steps=0).run().verify()
    probe = Loop().run()
    with pytest.raises(ConfigurationError, match="needs the loss"):
        probe.verify(batch(4))
    with pytest.raises(ConfigurationError, match="two examples"):
        probe.verify(batch(1), F.mse_loss)
    with pytest.raises(ConfigurationError, match="scalar"):
        probe.verify(batch(4), lambda out, y: out)
    with pytest.raises(ConfigurationError, match="not both"):
        probe.verify(batch(4), F.mse_loss, forward=lambda model, given: (None, None))
    with pytest.raises(ConfigurationError, match="verify_steps must be a positive integer"):
        Loop(verify=-1).run()


def test_a_failure_raises_where_asked() -> None:
    """raise_if_failed carries the text."""
    result = Loop(scale=128.0).verify_it()
    assert not result.passed
    with pytest.raises(VerificationError, match="constant factor"):
        result.raise_if_failed()
    with pytest.raises(VerificationError, match="0 checks hold"):
        Verification((), 3).raise_if_failed()


@pytest.mark.parametrize("verify", [3, 20])
def test_training_and_reports_are_the_same_with_and_without(verify: int) -> None:
    """Weights bit for bit, and every number of every report; window and random signs included."""
    probe = {"every": 5, "window": 2, "positions": "expand"}
    reports: list[list[str]] = []
    weights = []
    for steps in (0, verify):
        written = Written()
        options = {**probe, "relations": ("fact", "nfa", "enfa"), "sinks": [written]}
        loop = Loop(model=shared, steps=13, micro=2, verify=steps, probe=options)
        loop.run()
        reports.append(written.texts)
        weights.append(loop.trained.state_dict())
    assert len(reports[0]) == 3
    assert reports[0] == reports[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Written:
    """A sink that keeps what reports say."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, report: Any) -> None:
        self.texts.append(repr(report.to_dict()))

    def close(self) -> None:
        """Nothing to close."""


def test_a_fault_inside_costs_neither_training_nor_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test ends, is counted as one fault, and says so."""
    calls = []

    def fails(self: Evidence, *args: Any) -> None:
        calls.append(args)
        raise MemoryError("no room")

    monkeypatch.setattr(Evidence, "read", fails)
    probe = Loop(probe={"strict": False}).run()
    assert probe.faults == 1
    assert len(calls) == 1
    assert probe.report is not None
    result = probe.verify()
    assert not result.passed
    assert "MemoryError: no room" in str(result)


def test_a_result_reads_well() -> None:
    """Failures first, layers with the same message on one line."""
    checks = (
        Check("gradient", "a", True, 1.0, 1e-7),
        Check("gradient", "b", False, 4.0, 3.0, "off"),
        Check("gradient", "c", None, message="sharded"),
        Check("gradient", "d", True, 1.0, 2e-7),
        Check("gradient", "e", None, message="sharded"),
    )
    assert str(Verification(checks, 20)).splitlines() == [
        "self-test of 20 steps: FAILED (2 checks hold, 1 failed, 2 not made)",
        "gradient: what the layers' calls delivered (Σ gᵀh) against what the optimizer got (.grad)",
        "  FAILED    b: off (factor 4, gap 3)",
        "  not made  c, e: sharded",
        "  holds     a, d (largest gap 2.0e-07)",
    ]
