"""The run with the probe is bit-identical to the run without, and nothing of the probe remains."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_globals
from torch.optim import optimizer as optimizer_globals

from feature_probe import FeatureProbe

ALL_RELATIONS = ("fact", "bfact", "fact_sym", "bfact_sym", "nfa", "enfa", "bnfa", "benfa")
STEPS = 50
Moment = Callable[[str, int], None]


# --------------------------------------------------------------------------- models


def mlp() -> nn.Module:
    """In-place activations, dropout, batch norm, and a convolution in front of them."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 64, 24),
        nn.BatchNorm1d(24),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(24, 16, bias=False),
        nn.Dropout(0.1, inplace=True),
        nn.ELU(inplace=True),
        nn.Linear(16, 5),
    )


def resnet18() -> nn.Module:
    """Timm's resnet18 with dropout before the head."""
    timm = pytest.importorskip("timm")
    return timm.create_model("resnet18", num_classes=5, drop_rate=0.1)


def narrow_resnet18() -> nn.Module:
    """The same network a quarter as wide, for the default run."""
    timm = pytest.importorskip("timm")
    return timm.create_model("resnet18", num_classes=5, drop_rate=0.1, channels=(16, 32, 64, 128))


def small_vit() -> nn.Module:
    """Timm's vit_tiny cut to two blocks of 8-pixel patches, with every kind of dropout."""
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=2,
        embed_dim=48,
        num_classes=5,
        drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.2,
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2),
}


# --------------------------------------------------------------------------- a run, and its trace


class StopTrainingError(Exception):
    """What the tests raise inside the block."""


@dataclass
class Run:
    """A training run that draws from every global generator at each step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, build: Callable[[], nn.Module], optimizer: str) -> Run:
        """Seeds everything, then builds."""
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        model = build().train()
        return cls(model, OPTIMIZERS[optimizer](model.parameters()))

    def train(self, steps: int, batch: int = 4, moment: Moment = lambda when, step: None) -> None:
        """Steps on random images; ``moment`` is called before, inside and after each step."""
        for step in range(steps):
            x = torch.randn(batch, 3, 32, 32) * random.uniform(0.5, 1.5) + np.random.normal()
            y = torch.randint(5, (batch,))
            moment("before", step)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            moment("inside", step)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            moment("after", step)

    def trace(self) -> dict[str, Any]:
        """Everything that the probe could have disturbed."""
        found: dict[str, Any] = {"losses": self.losses}
        for name, value in self.model.state_dict().items():
            found[f"state {name}"] = value.clone()
        for name, parameter in self.model.named_parameters():
            found[f"grad {name}"] = parameter.grad.clone()
            found[f"requires_grad {name}"] = parameter.requires_grad
        for name, module in self.model.named_modules():
            found[f"attributes {name}"] = sorted(vars(module))
            found[f"training {name}"] = module.training
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                found[f"optimizer {index} {name}"] = copy.deepcopy(value)
        found["groups"] = self.optimizer.state_dict()["param_groups"]
        found["torch rng"] = torch.get_rng_state()
        found["python rng"] = random.getstate()
        kind, keys, *rest = np.random.get_state()
        found["numpy rng"] = (kind, keys.tolist(), *rest)
        return found


def assert_identical(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same keys, bitwise the same tensors, equal everything else."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Every hook dictionary of the modules and tensors of a model that is not empty."""
    found = {
        f"{name}.{attribute}": list(value.values())
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "hook" in attribute and isinstance(value, dict) and value
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(tensor, attribute, None):
                found[f"{name}.{attribute}"] = list(getattr(tensor, attribute).values())
    return found


def hooks_around(optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """Every hook dictionary of an optimizer, of all modules and of all optimizers, not empty."""
    places = {
        **{f"optimizer.{name}": value for name, value in vars(optimizer).items()},
        **{f"module.{name}": value for name, value in vars(module_globals).items()},
        **{f"optim.{name}": value for name, value in vars(optimizer_globals).items()},
    }
    return {
        name: list(value.values())
        for name, value in places.items()
        if "hook" in name and isinstance(value, dict) and value
    }


def patched_functions() -> list[Any]:
    """Functions of torch that a probe might be tempted to replace."""
    return [
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.multi_head_attention_forward,
        F.scaled_dot_product_attention,
        torch.autograd.grad,
        torch.autograd.backward,
        Tensor.backward,
        nn.Module.__call__,
        nn.Linear.forward,
        nn.Conv2d.forward,
        torch.optim.SGD.step,
    ]


def surroundings(run: Run) -> tuple[Any, ...]:
    """Where a probe could leave something behind."""
    return (
        hooks_of(run.model),
        {name: sorted(vars(module)) for name, module in run.model.named_modules()},
        hooks_around(run.optimizer),
        sorted(vars(run.optimizer)),
        patched_functions(),
    )


@contextlib.contextmanager
def nothing_remains(run: Run) -> Iterator[None]:
    """After the block the hooks, global hooks and functions are those from before it."""
    before = surroundings(run)
    assert not hooks_of(run.model)
    yield
    assert surroundings(run) == before


def probe_of(run: Run, **options: Any) -> FeatureProbe:
    """Every relation, a report every ten steps from a window of four."""
    settings: dict[str, Any] = {"every": 10, "window": 4, "relations": ALL_RELATIONS}
    return FeatureProbe(run.model, optimizer=run.optimizer, **{**settings, **options})


# --------------------------------------------------------------------------- bit-identical runs

RUNS = [
    pytest.param(mlp, "sgd", STEPS, {}, id="mlp sgd"),
    pytest.param(mlp, "adamw", STEPS, {"jacobian": "exact"}, id="mlp adamw exact"),
    pytest.param(mlp, "adamw", STEPS, {"positions": "reduce", "num_probes": 3}, id="mlp reduce"),
    pytest.param(small_vit, "sgd", STEPS, {}, id="vit sgd", marks=pytest.mark.slow),
    pytest.param(small_vit, "adamw", STEPS, {"jacobian": "exact"}, id="vit adamw exact"),
    pytest.param(narrow_resnet18, "sgd", STEPS, {}, id="narrow resnet18 sgd"),
    pytest.param(
        narrow_resnet18, "adamw", STEPS, {}, id="narrow resnet18 adamw", marks=pytest.mark.slow
    ),
    pytest.param(resnet18, "sgd", STEPS, {}, id="resnet18 sgd", marks=pytest.mark.slow),
    pytest.param(resnet18, "adamw", STEPS, {}, id="resnet18 adamw", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("build", "optimizer", "steps", "options"), RUNS)
def test_a_probed_run_is_bit_identical(
    build: Callable[[], nn.Module], optimizer: str, steps: int, options: dict[str, Any]
) -> None:
    """Weights, optimizer state, buffers, gradients, losses and RNG states are bitwise the same."""
    plain = Run.start(build, optimizer)
    plain.train(steps)
    probed = Run.start(build, optimizer)
    reported: list[int] = []
    with nothing_remains(probed), probe_of(probed, **options) as probe:
        probed.train(
            steps,
            moment=lambda when, step: (
                reported.append(probe.report.step) if when == "after" and probe.report else None
            ),
        )
    assert_identical(probed.trace(), plain.trace())
    assert sorted(set(reported)) == list(range(0, steps, 10))
    assert probe.faults == 0
    measured = [record for record in probe.report.records if record.status == "ok"]
    assert {record.relation for record in measured} >= {"nfa", "enfa", "bnfa", "benfa"}


def test_the_comparison_sees_a_disturbance() -> None:
    """The trace differs when a single random number is drawn, or one weight moved by one ulp."""
    plain = Run.start(mlp, "sgd")
    plain.train(3)
    expected = plain.trace()
    for disturb in (
        lambda run: torch.rand(1),
        lambda run: random.random(),
        lambda run: np.random.random(),
        lambda run: run.model[4].weight.data.view(torch.int32)[0, 0].add_(1),
        lambda run: run.model[1].running_mean.mul_(1 + 1e-6),
    ):
        other = Run.start(mlp, "sgd")
        other.train(3)
        assert_identical(other.trace(), expected)
        disturb(other)
        with pytest.raises(AssertionError):
            assert_identical(other.trace(), expected)


@pytest.mark.parametrize("when", ["before", "inside", "after"])
@pytest.mark.parametrize("step", [0, 8, 15])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_an_exception_the_run_goes_on_as_if_unprobed(
    optimizer: str, step: int, when: str
) -> None:
    """An exception in a probed or unprobed step leaves no hook, and training goes on bitwise."""

    def stop(at: str, now: int) -> None:
        if (at, now) == (when, step):
            raise StopTrainingError

    plain = Run.start(mlp, optimizer)
    with pytest.raises(StopTrainingError):
        plain.train(STEPS, moment=stop)
    plain.train(10)
    probed = Run.start(mlp, optimizer)
    with nothing_remains(probed), pytest.raises(StopTrainingError), probe_of(probed):
        probed.train(STEPS, moment=stop)
    probed.train(10)
    assert_identical(probed.trace(), plain.trace())


@pytest.mark.parametrize("step", [0, 8])
def test_an_exception_inside_the_forward_leaves_nothing(step: int) -> None:
    """A model that raises half-way through a probed forward is left without a trace."""
    traces = []
    for probed in (False, True):
        run = Run.start(mlp, "sgd")
        guard = probe_of(run) if probed else contextlib.nullcontext()

        def break_it(when: str, now: int, run: Run = run) -> None:
            if (when, now) == ("before", step):
                run.model[9].forward = None  # calling it raises TypeError

        with nothing_remains(run):
            with pytest.raises(TypeError), guard:
                run.train(STEPS, moment=break_it)
            del run.model[9].forward
        run.train(5)
        traces.append(run.trace())
    assert_identical(traces[1], traces[0])


def test_attach_and_detach_by_hand() -> None:
    """attach() and detach() do what the with statement does, and can be repeated."""
    run = Run.start(mlp, "sgd")
    plain = Run.start(mlp, "sgd")
    plain.train(24)
    run = Run.start(mlp, "sgd")
    with nothing_remains(run):
        probe = probe_of(run)
        probe.attach()
        run.train(12)
        probe.detach()
    assert probe.report is not None
    with nothing_remains(run), probe_of(run):
        run.train(12)
    assert_identical(run.trace(), plain.trace())


def test_the_constructor_alone_attaches_nothing() -> None:
    """Before attach() the model and the optimizer carry no hook."""
    run = Run.start(mlp, "sgd")
    with nothing_remains(run):
        probe_of(run)
        assert not hooks_of(run.model)


# --------------------------------------------------------------------------- copies


@dataclass
class Reports:
    """The reports a run gave, as plain data."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, probe: FeatureProbe) -> None:
        """Adds the latest report, once."""
        if probe.report is not None and (
            not self.found or self.found[-1]["step"] != probe.report.step
        ):
            self.found.append(probe.report.to_dict())


def probed_run(
    disturb: Callable[[Run, str, int], None], build: Callable[[], nn.Module] = mlp, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reports and trace of 13 probed steps with something done at every moment."""
    run = Run.start(build, "sgd")
    reports = Reports()
    with probe_of(run, **options) as probe:

        def moment(when: str, step: int) -> None:
            disturb(run, when, step)
            reports.keep(probe)

        run.train(13, moment=moment)
    assert [report["step"] for report in reports.found] == [0, 10]
    assert probe.faults == 0
    return reports.found, run.trace()


def assert_no_influence(
    disturb: Callable[[Run, str, int], None], build: Callable[[], nn.Module] = mlp, **options: Any
) -> list[dict[str, Any]]:
    """What is done at every moment changes neither the run nor a digit of a report."""
    found, trace = probed_run(disturb, build, **options)
    expected, plain_trace = probed_run(lambda run, when, step: None, build, **options)
    assert_identical(trace, plain_trace)
    for report, plain in zip(found, expected, strict=True):
        for record, plain_record in zip(report["records"], plain["records"], strict=True):
            assert record == plain_record
    assert found == expected
    return found


def exercise(model: nn.Module) -> None:
    """Forward and backward passes of a model, without touching the global generator."""
    with torch.random.fork_rng():
        for _ in range(2):
            F.cross_entropy(model(torch.randn(6, 3, 32, 32)), torch.zeros(6).long()).backward()


@pytest.fixture
def nothing_compiled() -> None:
    """As in a process that never compiled anything: else inert hooks are on the model itself."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        gc.collect()


@pytest.mark.usefixtures("nothing_compiled")
def test_a_deep_copy_during_probing_has_no_trace() -> None:
    """Copies made at any moment carry no hook, and running them changes no report."""

    def disturb(run: Run, when: str, step: int) -> None:
        clone = copy.deepcopy(run.model)
        assert not hooks_of(clone), (when, step)
        before = {name: sorted(vars(module)) for name, module in run.model.named_modules()}
        assert {name: sorted(vars(module)) for name, module in clone.named_modules()} == before
        exercise(clone)

    assert_no_influence(disturb)


@pytest.mark.usefixtures("nothing_compiled")
def test_pickles_during_probing_have_no_reference_to_the_probe() -> None:
    """Pickle and torch.save of the model at any moment know nothing of feature_probe."""

    def disturb(run: Run, when: str, step: int) -> None:
        buffer = io.BytesIO()
        torch.save(run.model, buffer)
        dumped = pickle.dumps(run.model)
        assert b"feature_probe" not in buffer.getvalue(), (when, step)
        assert b"feature_probe" not in dumped, (when, step)
        assert b"feature_probe" not in pickle.dumps(run.optimizer), (when, step)
        buffer.seek(0)
        for clone in (torch.load(buffer, weights_only=False), pickle.loads(dumped)):
            assert not hooks_of(clone), (when, step)
            for name, value in run.model.state_dict().items():
                assert torch.equal(clone.state_dict()[name], value), name

    assert_no_influence(disturb)


def test_state_dicts_have_the_same_keys_during_probing() -> None:
    """Neither the model's nor the optimizer's state_dict gains a key."""
    run = Run.start(mlp, "sgd")
    keys = set(run.model.state_dict())
    groups = [set(group) for group in run.optimizer.state_dict()["param_groups"]]

    def moment(when: str, step: int) -> None:
        assert set(run.model.state_dict()) == keys
        assert [set(group) for group in run.optimizer.state_dict()["param_groups"]] == groups

    with probe_of(run):
        run.train(3, moment=moment)
    assert set(run.optimizer.state_dict()) == {"state", "param_groups"}


# --------------------------------------------------------------------------- evaluation in the loop


def evaluate_no_grad(model: nn.Module, x: Tensor) -> None:
    """The usual evaluation."""
    with torch.no_grad():
        model(x)


def evaluate_inference(model: nn.Module, x: Tensor) -> None:
    """Evaluation in inference mode."""
    with torch.inference_mode():
        model(x)


def evaluate_with_grad(model: nn.Module, x: Tensor) -> None:
    """A careless evaluation that records a graph and drops it."""
    F.cross_entropy(model(x), torch.zeros(len(x)).long())


def evaluate_submodule(model: nn.Module, x: Tensor) -> None:
    """Only the first layers run: features for a plot."""
    with torch.no_grad():
        model[:4](x)


EVALUATIONS = [evaluate_no_grad, evaluate_inference, evaluate_with_grad, evaluate_submodule]


@pytest.mark.parametrize("jacobian", ["random", "exact"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("evaluate", EVALUATIONS, ids=lambda f: f.__name__)
def test_evaluation_in_the_loop_is_not_training(
    evaluate: Callable[[nn.Module, Tensor], None], when: str, jacobian: str
) -> None:
    """Evaluating between steps changes neither the counts nor a digit of a report."""
    x = torch.randn(9, 3, 32, 32)

    def disturb(run: Run, at: str, step: int) -> None:
        if at == when:
            run.model.eval()
            evaluate(run.model, x)
            run.model.train()

    for report in assert_no_influence(disturb, jacobian=jacobian):
        for record in report["records"]:
            assert record["n_examples"] == (4 if report["step"] == 0 else 16)


def plain_mlp() -> nn.Module:
    """Without dropout and batch norm: a forward in training mode has no side effects."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 12), nn.ReLU(inplace=True), nn.Linear(12, 5))


def test_a_training_mode_forward_without_backward_is_not_training() -> None:
    """A forward in training mode whose graph is dropped adds no example and no digit."""
    x = torch.randn(9, 3, 32, 32)

    def disturb(run: Run, at: str, step: int) -> None:
        if at == "before":
            evaluate_with_grad(run.model, x)

    assert_no_influence(disturb, build=plain_mlp, jacobian="exact")
