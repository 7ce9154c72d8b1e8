"""How optimizers decay weights, against what each one's update rule says by hand."""

from __future__ import annotations

import copy
import math
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, optim
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module
from torch.optim.lr_scheduler import LinearLR, OneCycleLR

from feature_probe.errors import ConfigurationError
from feature_probe.optimizers import behaviour as behaviour_module
from feature_probe.optimizers.behaviour import DecayBehaviour, decay_behaviour, form_note
from feature_probe.optimizers.clock import DecayClock
from feature_probe.optimizers.twin import isolated

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    timm_optim = pytest.importorskip("timm.optim")

NAN = math.nan


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    """Parameters with fixed values and gradients."""
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in shapes or ((5, 3), (3, 4))
    ]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def judged(optimizer: Optimizer) -> DecayBehaviour:
    """The behaviour of the first group."""
    return decay_behaviour(optimizer, optimizer.param_groups[0])


def seen(found: DecayBehaviour) -> tuple[Any, Any]:
    """Form and clock, to compare with what was expected."""
    return found.form, found.clock


class MySGD(optim.SGD):
    """SGD under another name."""


class NestedSGD(optim.SGD):
    """A step that calls its parent's."""

    def step(self, closure: Any = None) -> Any:
        """Step."""
        return super().step(closure)


class Signed(Optimizer):
    """Decoupled sign descent with an odd constructor and attributes of all kinds."""

    def __init__(self, size: int, named: dict[str, torch.nn.Parameter], *, decay: float) -> None:
        self.size = size
        self.watched = list(named.values())  # never needed by step
        self.scale = torch.tensor(1.0)
        self.settings = {"power": [1, 2]}
        self.log: list[float] = []
        super().__init__(named.values(), {"lr": 0.1, "weight_decay": decay, "odd": ("a", 1)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """W ← (1 − ηλ)W − η sign(G), in place in another order."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.log.append(1.0)
                    parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign() * self.scale, alpha=-group["lr"])


class Raising(optim.SGD):
    """A step that raises."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Raise."""
        raise RuntimeError("no device\nhere")


class Needy(optim.SGD):
    """A step that needs the user's own parameters, which a twin must not touch."""

    def __init__(self, params: list[torch.nn.Parameter], **settings: Any) -> None:
        super().__init__(params, **settings)
        self.mine = params

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Write to them."""
        for parameter in self.mine:
            parameter.data.zero_()


class CautiousDecay(optim.SGD):
    """Decays only the entries that the step shrinks."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step."""
        for group in self.param_groups:
            for p in group["params"]:
                mask = (p * p.grad > 0).to(p.dtype)
                p.add_(p * mask, alpha=-group["lr"] * group["weight_decay"])
                p.add_(p.grad, alpha=-group["lr"])


class Doubled(optim.SGD):
    """Heavy ball whose steps are twice as long: coupled, with clock 2/(1−μ)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad + group["weight_decay"] * p)
                p.sub_(buffer, alpha=2 * group["lr"])


class Hidden(optim.SGD):
    """Decays by a key that is not weight_decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step."""
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * 0.01)


class Sam(Optimizer):
    """The wrapper of sharpness-aware minimisation, as commonly written."""

    def __init__(self, params: Any, base: type[Optimizer], **settings: Any) -> None:
        super().__init__(params, {"rho": 0.05, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups


def momenta(mu: float, delta: float = 0.0, nesterov: bool = False) -> dict[str, Any]:
    """Settings of SGD."""
    return {"momentum": mu, "dampening": delta, "nesterov": nesterov}


#: class, settings, form, clock; by reading each step in torch/optim.
TORCH: list[tuple[type[Optimizer], dict[str, Any], str, float]] = [
    (optim.SGD, {}, "coupled", 1.0),
    (optim.SGD, {"dampening": 0.5}, "coupled", 1.0),
    (optim.SGD, momenta(0.9), "coupled", 10.0),
    (optim.SGD, momenta(0.9, 0.3), "coupled", 7.0),
    (optim.SGD, momenta(0.9, nesterov=True), "coupled", 10.0),
    (optim.Adam, {}, "coupled", NAN),
    (optim.Adam, {"amsgrad": True, "maximize": True}, "coupled", NAN),
    (optim.Adam, {"decoupled_weight_decay": True}, "decoupled", 1.0),
    (optim.Adam, {"fused": True}, "coupled", NAN),
    (optim.Adam, {"foreach": True}, "coupled", NAN),
    (optim.AdamW, {}, "decoupled", 1.0),
    (optim.AdamW, {"amsgrad": True}, "decoupled", 1.0),
    (optim.NAdam, {}, "coupled", NAN),
    (optim.NAdam, {"decoupled_weight_decay": True}, "decoupled", 1.0),
    (optim.RAdam, {}, "coupled", NAN),
    (optim.RAdam, {"decoupled_weight_decay": True}, "decoupled", 1.0),
    (optim.Adagrad, {"initial_accumulator_value": 0.1}, "coupled", NAN),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}, "coupled", NAN),
    (optim.Adamax, {}, "coupled", NAN),
    (optim.Adadelta, {}, "coupled", NAN),
    (optim.ASGD, {}, "unknown", NAN),
    (optim.Adafactor, {}, "unknown", NAN),
]
if hasattr(optim, "Muon"):  # since torch 2.9
    TORCH.append((optim.Muon, {}, "decoupled", 1.0))


@pytest.mark.parametrize(("kind", "settings", "form", "clock"), TORCH, ids=str)
def test_torch(kind: Any, settings: dict[str, Any], form: str, clock: float) -> None:
    """Every optimizer of torch that takes weight_decay, before and after a step."""
    optimizer = kind(parameters(), lr=0.01, weight_decay=0.1, **settings)
    expected = pytest.approx(clock, rel=1e-3, nan_ok=True)
    for _ in range(2):
        found = judged(optimizer)
        assert seen(found) == (form, expected)
        assert bool(found.reason) == math.isnan(clock)
        optimizer.step()


@pytest.mark.parametrize("kind", [optim.Rprop, optim.LBFGS, optim.SparseAdam, optim.AdamW])
def test_no_decay(kind: Any) -> None:
    """Without weight_decay, or with 0, there is none."""
    settings = {"weight_decay": 0.0} if kind is optim.AdamW else {}
    assert judged(kind(parameters(), lr=0.01, **settings)) == DecayBehaviour("none", 0.0)


#: timm's by the name given to its factory; by reading each step in timm/optim (1.0).
TIMM: dict[str, tuple[str, float]] = {
    "sgd": ("coupled", 10.0),  # torch's, Nesterov, momentum 0.9
    "adamw": ("decoupled", 1.0),
    "nadamw": ("decoupled", 1.0),
    "cadamw": ("decoupled", 1.0),  # cautious in the update, not in the decay
    "lion": ("decoupled", 1.0),
    "sgdw": ("decoupled", 1.0),  # the buffer is of G alone
    "adabelief": ("decoupled", 1.0),
    "adopt": ("coupled", NAN),  # G + λW goes into both moments
    "adoptw": ("decoupled", 1.0),
    "laprop": ("decoupled", 1.0),  # (1 − ηλ)(W − ηU): the decay comes last
    "adan": ("decoupled", 1.0),  # (W − ηU)/(1 + ηλ): an implicit step
    "adanw": ("decoupled", 1.0),
    "mars": ("decoupled", 1.0),  # λW joins the update after its scaling
    "kron": ("decoupled", 1.0),  # λW joins the update after its preconditioning
    "muon": ("decoupled", 1.0),
    "radamlegacy": ("decoupled", 1.0),  # computes in float32
    "rmsproptf": ("coupled", NAN),
    "lars": ("coupled", NAN),  # the trust ratio scales G + λW
    "larc": ("coupled", NAN),
    "madgrad": ("coupled", NAN),  # λW goes into the dual average
    "madgradw": ("unknown", NAN),  # pulled back to a W₀ that does not decay
    "lamb": ("unknown", NAN),  # the trust ratio scales U + λW
    "lambc": ("unknown", NAN),  # the same, clipped for large W
    "lambw": ("unknown", NAN),  # U has the trust ratio ‖W‖/‖U‖ in it
    "novograd": ("unknown", NAN),  # λW joins the normalised gradient, then goes into the moment
    "adamp": ("unknown", NAN),  # a tenth of the decay where G is orthogonal to W
    "sgdp": ("unknown", NAN),  # decays by ηλ/(1−μ) at once
    "adafactor": ("unknown", NAN),
    "adafactorbv": ("unknown", NAN),
    "adamc": ("unknown", NAN),  # decays by λη²/η_max
    "lionc": ("unknown", NAN),
    "sgdc": ("unknown", NAN),
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.filterwarnings("ignore:It is highly recommended")  # kron, opt_einsum
def test_timm(name: str) -> None:
    """timm's optimizers."""
    optimizer = timm_optim.create_optimizer_v2(parameters(), opt=name, lr=0.01, weight_decay=0.1)
    found = judged(optimizer)
    expected = pytest.approx(TIMM[name][1], rel=1e-3, nan_ok=True)
    assert seen(found) == (TIMM[name][0], expected)


@pytest.mark.parametrize("rate", [2.0**-10, 2.0**-9])
def test_corrected_decay_at_a_trial_rate(rate: float) -> None:
    """Decay by λη²/η_max is found out even where η_max is a learning rate of the trials."""
    optimizer = timm_optim.create_optimizer_v2(parameters(), opt="adamc", lr=rate, weight_decay=0.1)
    found = judged(optimizer)
    assert found.form == "unknown"
    assert "corrected_weight_decay" in found.reason


@pytest.mark.parametrize(
    "settings",
    [
        {},
        momenta(0.9),
        momenta(0.9, 0.3),
        momenta(0.9, nesterov=True),
        momenta(0.99, nesterov=True),
        momenta(0.999),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [MySGD, NestedSGD])
def test_measured_clock_of_a_users_sgd(kind: Any, settings: dict[str, Any]) -> None:
    """A subclass is tried, and its clock is measured: (1−δ)/(1−μ) to 1e-3."""
    clock = (1 - settings.get("dampening", 0)) / (1 - settings.get("momentum", 0))
    found = judged(kind(parameters(), lr=0.3, weight_decay=1e-4, **settings))
    assert (found.form, found.reason) == ("coupled", "")
    assert found.clock == pytest.approx(clock, rel=1e-3)


def test_ema_momentum_beside_the_weights_is_coupled() -> None:
    """SGDW with dampening = μ keeps an average of G: at rest G = −λW, and its clock is 1."""
    settings = {"momentum": 0.8, "dampening": 0.8, "nesterov": False}
    found = judged(timm_optim.SGDW(parameters(), lr=0.1, weight_decay=0.1, **settings))
    assert seen(found) == ("coupled", pytest.approx(1.0, rel=1e-3))


def test_a_users_decoupled_optimizer() -> None:
    """An odd constructor, attributes of all kinds: judged, and untouched."""
    first, second = parameters()
    optimizer = Signed(3, {"a": first, "b": second}, decay=0.1)
    assert judged(optimizer) == DecayBehaviour("decoupled", 1.0)
    assert optimizer.log == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda p: Raising(p, weight_decay=0.1),
            r"Raising could not.*RuntimeError: no device here",
        ),
        (lambda p: Needy(p, weight_decay=0.1), r"Needy could not be tried.*AttributeError.*mine"),
        (lambda p: CautiousDecay(p, weight_decay=0.1), "CautiousDecay: its steps are neither"),
        (lambda p: Hidden(p), "Hidden moves weights without weight_decay and without a gradient"),
        (
            lambda p: Hidden([{"params": p, "wd": 0.01}]),
            r"rule of its own \('wd' in its groups; the probe reads 'weight_decay'\), not a form",
        ),
        (lambda p: optim.ASGD(p), "ASGD decays by its own lambd"),
        (lambda p: optim.Adafactor(p, weight_decay=0.1), "Adafactor scales its learning rate"),
        (
            lambda p: optim.AdamW([{"params": p, "cautious_wd": True}]),
            "AdamW, cautious_wd: only some entries decay",
        ),
        (
            lambda p: timm_optim.Lookahead(optim.AdamW(p, weight_decay=0.1)),
            "Lookahead could not be tried on a small matrix: AttributeError",
        ),
        (lambda p: optim.AdamW([{"params": p, "weight_decay": "0.1x"}]), "is not a number: '0.1x'"),
    ],
)
def test_unknown_says_why(make: Callable[[Any], Optimizer], reason: str) -> None:
    """What cannot be judged is unknown, with the class and the reason in one line."""
    given = parameters()
    before = copy.deepcopy(given)
    found = judged(make(given))
    assert (found.form, math.isnan(found.clock)) == ("unknown", True)
    assert torch.equal(given[0], before[0])
    assert "\n" not in found.reason
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_ignored_decay() -> None:
    """A rule that never looks at weight_decay has none, and says so."""

    class Plain(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])

    found = judged(Plain(parameters(), weight_decay=0.1))
    assert seen(found) == ("none", 0.0)
    assert found.reason == "Plain does not apply its weight_decay"


def test_wrappers_are_judged_by_what_they_wrap() -> None:
    """SAM around AdamW is AdamW, around SGD SGD."""
    assert judged(Sam(parameters(), optim.AdamW, weight_decay=0.1)).form == "decoupled"
    found = judged(Sam(parameters(), optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.1))
    assert found == DecayBehaviour("coupled", 2.0)


def test_nothing_of_the_users_changes() -> None:
    """Parameters, gradients, state, groups, hooks, random numbers: as before, nothing called."""
    called: list[str] = []
    given = parameters()
    optimizer = NestedSGD(given, lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.register_step_pre_hook(lambda *_: called.append("own"))
    first = optimizer_module.register_optimizer_step_pre_hook(lambda *_: called.append("pre"))
    last = optimizer_module.register_optimizer_step_post_hook(lambda *_: called.append("post"))
    scheduler = LinearLR(optimizer)
    optimizer.step()
    scheduler.step()
    assert called == ["pre", "own", "pre", "own", "post", "post"]
    called.clear()
    held = copy.deepcopy(optimizer.state_dict())
    weights = [(p.detach().clone(), p.grad.clone()) for p in given if p.grad is not None]
    attributes = {name: id(value) for name, value in vars(optimizer).items()}
    globals_before = dict(vars(optimizer_module)["_global_optimizer_pre_hooks"])
    generators = torch.get_rng_state(), random.getstate()
    with torch.inference_mode():
        assert judged(optimizer).form == "coupled"
    assert called == []
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert vars(optimizer_module)["_global_optimizer_pre_hooks"] == globals_before
    assert {name: id(value) for name, value in vars(optimizer).items()} == attributes
    after = optimizer.state_dict()
    assert after["param_groups"] == held["param_groups"]
    for number, state in held["state"].items():
        assert torch.equal(after["state"][number]["momentum_buffer"], state["momentum_buffer"])
    for p, (weight, gradient) in zip(given, weights, strict=True):
        assert torch.equal(p, weight)
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)
    optimizer.step()
    assert called == ["pre", "own", "pre", "own", "post", "post"]
    first.remove()
    last.remove()


def test_random_numbers_inside_a_step() -> None:
    """Twins draw alike, and the user's generators stay where they are."""

    class Noisy(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(torch.randn_like(p) * p.grad * random.random(), alpha=group["lr"])
                    warnings.warn("mine", UserWarning, stacklevel=2)

    states = torch.get_rng_state(), random.getstate()
    assert judged(Noisy(parameters(), weight_decay=0.1)).form == "decoupled"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_a_step_that_communicates_is_not_tried(tmp_path: Path) -> None:
    """Collectives inside a step are refused: other processes may not be asking."""

    class Gathering(optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            torch.distributed.all_reduce(self.param_groups[0]["params"][0].grad)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        found = judged(Gathering(parameters(), weight_decay=0.1))
    finally:
        torch.distributed.destroy_process_group()
    assert found.form == "unknown"
    assert "its step communicates between processes" in found.reason


def test_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking again, with another η or λ, runs no twin; with another setting it does."""
    runs: list[str] = []
    tried = behaviour_module._tried

    def counted(*given: Any) -> DecayBehaviour:
        runs.append(type(given[0]).__name__)
        return tried(*given)

    monkeypatch.setattr(behaviour_module, "_tried", counted)
    monkeypatch.setattr(behaviour_module, "_CACHE", type(behaviour_module._CACHE)())
    monkeypatch.setattr(behaviour_module, "_CACHED", 2)
    optimizer = MySGD(parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    group = optimizer.param_groups[0]
    for rate, decay in [(0.1, 0.1), (0.05, 0.1), (0.1, 0.2)]:
        group.update(lr=rate, weight_decay=decay)
        assert judged(optimizer).clock == pytest.approx(10)
    assert len(runs) == 1
    group["momentum"] = 0.5
    assert judged(optimizer).clock == pytest.approx(2)
    group["weight_decay"] = 0.0
    assert judged(optimizer).form == "none"
    assert len(runs) == 3
    assert len(behaviour_module._CACHE) == 2


def test_tensor_settings() -> None:
    """η, β as tensors are read as numbers."""
    optimizer = optim.AdamW(
        parameters(),
        lr=torch.tensor(0.01),
        betas=(torch.tensor(0.9), torch.tensor(0.99)),
        weight_decay=0.1,
        capturable=True,
        foreach=False,
    )
    assert judged(optimizer).form == "decoupled"


def test_isolation_survives_an_error() -> None:
    """Hooks and generators are put back after an exception."""
    pre = vars(optimizer_module)["_global_optimizer_pre_hooks"]
    state = torch.get_rng_state()

    def fail() -> None:
        with isolated():
            torch.rand(3)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert vars(optimizer_module)["_global_optimizer_pre_hooks"] is pre
    assert torch.equal(torch.get_rng_state(), state)


def test_note() -> None:
    """One line per group, in plain words."""
    first, second = parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "weight_decay": 0.0}]
    optimizer = optim.AdamW(groups, weight_decay=0.01)
    assert form_note(optimizer) == [
        "AdamW, group 0 (1 tensor, weight_decay 0.01): decoupled decay; at rest the update, not "
        "the gradient, balances it: read update_fact, not fact",
        "AdamW, group 1 (1 tensor, weight_decay 0): no weight decay; nothing balances the gradient "
        "at rest: the equalities with weight_decay do not apply",
    ]
    (line,) = form_note(optim.SGD(parameters(), weight_decay=0.1))
    assert line == (
        "SGD, group 0 (2 tensors, weight_decay 0.1): coupled decay; at rest the gradient balances "
        "it: read fact"
    )
    (line,) = form_note(optim.ASGD(parameters(), weight_decay=0.1))
    assert "form of decay unknown: neither fact nor update_fact need hold (ASGD decays" in line


def shrunk(optimizer: Optimizer, parameter: Tensor, steps: int) -> float:
    """−log of what zero gradients leave of a weight: the age by experiment."""
    start = float(parameter.detach().norm())
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return -math.log(float(parameter.detach().norm()) / start)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (optim.SGD, momenta(0.5)),
        (MySGD, momenta(0.5, 0.3)),
        (optim.SGD, momenta(0.5, nesterov=True)),
        (optim.AdamW, {}),
    ],
    ids=str,
)
def test_age_is_what_decay_leaves(kind: Any, settings: dict[str, Any]) -> None:
    """e^−age of the weights is left without gradients, under schedules of η."""
    weight = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer = kind([weight], lr=1e-3, weight_decay=0.1, **settings)
    clock = DecayClock([optimizer])
    age = 0.0
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step / 100)
        clock.advance(optimizer)
        age += shrunk(optimizer, weight, 1)
    assert clock.age(weight) == pytest.approx(age, rel=0.01)
    assert clock.why_unknown(weight) == ""


def test_clock_follows_every_schedule() -> None:
    """η, λ, μ, δ are read at each step; one group each; a group added later starts at 0."""
    first, second = parameters()
    (third,) = parameters((2, 2))
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "weight_decay": 0.0}]
    optimizer = optim.SGD(groups, lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    clock = DecayClock([optimizer])
    expected = [0.0, 0.0, 0.0]
    for step in range(6):
        group = optimizer.param_groups[0]
        group.update(lr=0.1 / (1 + step), weight_decay=0.2 + step, momentum=0.1 * step)
        group["dampening"] = 0.5
        if step == 2:
            optimizer.add_param_group({"params": [third], "weight_decay": 0.3, "momentum": 0.0})
        if step == 4:
            optimizer.param_groups[1]["weight_decay"] = 0.7
        clock.advance(optimizer)
        factor = 1.0 if step == 0 else 0.5 / (1 - 0.1 * step)
        expected[0] += 0.1 / (1 + step) * (0.2 + step) * factor
        expected[1] += 0.1 * 0.7 if step >= 4 else 0.0
        expected[2] += 0.1 * 0.3 if step >= 2 else 0.0
    found = [clock.age(parameter) for parameter in (first, second, third)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_clock_with_one_cycle() -> None:
    """OneCycle moves μ of a user's SGD as well: by SGD's formula, which its measured clock met."""
    (weight,) = parameters((3, 3))
    optimizer = MySGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    clock = DecayClock([optimizer])
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    expected = 0.0
    for _ in range(20):
        group = optimizer.param_groups[0]
        expected += group["lr"] * 0.1 / (1 - group["momentum"])
        clock.advance(optimizer)
        optimizer.step()
        if scheduler.last_epoch < 19:
            scheduler.step()
    assert clock.age(weight) == pytest.approx(expected, rel=1e-12)


def test_clock_where_the_age_is_undefined() -> None:
    """Adam's coupled decay, an unknown rule and an unknown parameter have no age, and say why."""
    first, second = parameters()
    (stranger,) = parameters((2, 2))
    both = [optim.Adam([first], weight_decay=0.1), optim.ASGD([second])]
    clock = DecayClock(both)
    for optimizer in both:
        clock.advance(optimizer)
    assert all(math.isnan(clock.age(parameter)) for parameter in (first, second, stranger))
    assert "Adam does not apply the decay in proportion" in clock.why_unknown(first)
    assert "ASGD decays by its own lambd" in clock.why_unknown(second)
    assert clock.why_unknown(stranger) == "not held by an optimizer of the clock"


def test_momentum_of_one() -> None:
    """SGD that never forgets has no decay age, from the start or from a step on."""
    first, second = parameters()
    optimizer = optim.SGD([first], lr=0.1, momentum=1.0, weight_decay=0.1)
    assert seen(judged(optimizer)) == ("coupled", pytest.approx(NAN, nan_ok=True))
    assert DecayClock([optimizer]).why_unknown(first) == "SGD with a momentum of 1 has no decay age"
    optimizer = optim.SGD([second], lr=0.1, momentum=0.9, weight_decay=0.1)
    clock = DecayClock([optimizer])
    optimizer.param_groups[0]["momentum"] = 1.0
    clock.advance(optimizer)
    assert math.isnan(clock.age(second))
    assert "left the age undefined" in clock.why_unknown(second)


def test_clock_where_a_measured_rule_changes() -> None:
    """A measured clock does not outlive the momentum it was measured with."""
    (weight,) = parameters((3, 3))
    optimizer = Doubled([weight], lr=0.1, momentum=0.5, weight_decay=0.1)
    assert judged(optimizer).clock == pytest.approx(4.0, rel=1e-3)
    clock = DecayClock([optimizer])
    clock.advance(optimizer)
    assert clock.age(weight) == pytest.approx(0.04, rel=1e-3)
    optimizer.param_groups[0]["momentum"] = 0.7
    clock.advance(optimizer)
    assert math.isnan(clock.age(weight))
    assert "momentum changed" in clock.why_unknown(weight)


def test_clock_with_a_tensor_lr() -> None:
    """A learning rate in a tensor is added up in float64, each step with its own value."""
    (weight,) = parameters((3, 3))
    rate = torch.tensor(0.1)
    optimizer = optim.AdamW([weight], lr=rate, weight_decay=0.5)
    clock = DecayClock([optimizer])
    for _ in range(3):
        clock.advance(optimizer)
        rate.mul_(0.5)
    assert clock.age(weight) == pytest.approx(0.5 * 0.175, rel=1e-6)


def test_clock_attached_late() -> None:
    """State of a step, or a scheduler's mark, is evidence; a backward pass or warm-up is none."""
    (weight,) = parameters((3, 3))
    assert weight.grad is not None
    plain = optim.SGD([weight], lr=0.1, weight_decay=0.1)
    assert DecayClock([plain]).age(weight) == 0
    scheduler = LinearLR(plain, start_factor=0.1)
    assert plain.param_groups[0]["lr"] != plain.param_groups[0]["initial_lr"]
    assert DecayClock([plain]).age(weight) == 0
    plain.step()
    scheduler.step()
    clock = DecayClock([plain])
    assert math.isnan(clock.age(weight))
    assert "attached after training had begun" in clock.why_unknown(weight)
    for kind in (optim.Adagrad, optim.AdamW, MySGD):
        settings: dict[str, Any] = {"momentum": 0.9} if kind is MySGD else {}
        optimizer: Optimizer = kind([weight], lr=0.1, weight_decay=0.0, **settings)
        assert DecayClock([optimizer]).age(weight) == 0
        early = DecayClock([optimizer])
        optimizer.step()
        assert math.isnan(DecayClock([optimizer]).age(weight))
        assert early.age(weight) == 0
        early.start()
        assert math.isnan(early.age(weight))


def test_clock_state() -> None:
    """A saved clock goes on where it was, attached late or not; plain data alone is saved."""
    first, second = parameters()
    optimizer = optim.AdamW([first], lr=0.1, weight_decay=0.5)
    clock = DecayClock([optimizer])
    clock.advance(optimizer)
    optimizer.step()
    state = clock.state_dict()
    assert state == {"ages": [[0.05]], "reasons": [[""]]}
    late = DecayClock([optimizer])
    assert late.state_dict()["reasons"] == [[late.why_unknown(first)]]
    late.load_state_dict(state)
    optimizer.add_param_group({"params": [second]})
    late.advance(optimizer)
    assert late.age(first) == pytest.approx(0.1)
    assert late.age(second) == pytest.approx(0.05)
    with pytest.raises(ConfigurationError, match="state is of 1 optimizers, there are 2"):
        DecayClock([optimizer, optim.SGD([second])]).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="not the state of a decay clock"):
        late.load_state_dict({"x": 1})
    with pytest.raises(ConfigurationError, match="was not made for this SGD"):
        late.advance(optim.SGD([second]))


def test_advancing_takes_microseconds() -> None:
    """No trial runs at a step: the best of many advances over four groups is below 100 µs."""
    optimizer = optim.AdamW([{"params": [p]} for p in parameters(*[(2, 2)] * 4)], weight_decay=0.1)
    clock = DecayClock([optimizer])
    best = math.inf
    for _ in range(200):
        began = time.perf_counter()
        clock.advance(optimizer)
        best = min(best, time.perf_counter() - began)
    assert best < 1e-4, os.cpu_count()
