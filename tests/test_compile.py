"""torch.compile, of the model or of parts, before or after attaching: the same numbers and runs."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.modules import module as module_globals
from torch.nn.parallel import DistributedDataParallel

from feature_probe import FeatureProbe, measure
from feature_probe.capture import following
from feature_probe.capture.shadow import ShadowPass
from feature_probe.reports.report import Report

RELATIONS = ("fact", "bfact", "nfa", "enfa", "bnfa", "benfa")
EXACT = ("fact", "bfact")

# torch's own remark on looking at the gradients of compiled parts' inputs
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Every test compiles for itself, and leaves nothing compiled behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


# --------------------------------------------------------------------------- models


class Block(nn.Module):
    """Linear, batch norm, in-place activation, dropout."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(rate)

    def forward(self, h: Tensor) -> Tensor:
        """The block."""
        return self.drop(F.relu(self.norm(self.fc(h)), inplace=True))


class Net(nn.Module):
    """A forward of the user's own."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.first, self.second = Block(8, rate), Block(8, rate)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        """Class scores."""
        return self.head(self.second(self.first(self.stem(x))))


class Counts(Net):
    """Counts its calls in a plain attribute, and computes with the count."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        """Class scores."""
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


class Features(Net):
    """Returns the features and, computed from them, the scores."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores and features."""
        features = self.second(self.first(self.stem(x)))
        return {"features": features, "scores": self.head(features)}


def sequential() -> nn.Module:
    """A model whose forward is torch's own, which torch.compile enters in another way."""
    return nn.Sequential(nn.Linear(6, 8), Block(8, 0.2), nn.Linear(8, 3))


def dropout_net() -> nn.Module:
    """With dropout: the shadow has to repeat the masks."""
    return Net(0.2)


# --------------------------------------------------------------------------- ways to compile


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_children() if isinstance(child, Block)]


def whole(model: nn.Module, **options: Any) -> nn.Module:
    """torch.compile(model)."""
    return torch.compile(model, **options)


def in_place(model: nn.Module, **options: Any) -> nn.Module:
    """model.compile()."""
    model.compile(**options)
    return model


def blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Two children replaced by their torch.compile."""
    for name in _blocks(model):
        setattr(model, name, torch.compile(model.get_submodule(name), **options))
    return model


def blocks_in_place(model: nn.Module, **options: Any) -> nn.Module:
    """Two children compiled in place."""
    for name in _blocks(model):
        model.get_submodule(name).compile(**options)
    return model


def method(model: nn.Module, **options: Any) -> nn.Module:
    """The forward method of the model compiled."""
    model.forward = torch.compile(model.forward, **options)
    return model


WAYS: dict[str, Callable[..., nn.Module]] = {
    "torch.compile(model)": whole,
    "model.compile()": in_place,
    "compiled blocks": blocks,
    "blocks compiled in place": blocks_in_place,
    "compiled forward": method,
}
WHEN = [pytest.param(False, id="before attaching"), pytest.param(True, id="after attaching")]


# --------------------------------------------------------------------------- a run, and its trace


@dataclass
class Run:
    """What a training run leaves behind."""

    state: dict[str, Any] = field(default_factory=dict)
    compiled: dict[str, int] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    probe: FeatureProbe | None = None

    def write(self, report: Report) -> None:
        """Keep a report: the run is its probe's sink."""
        self.reports.append(report)

    def close(self) -> None:
        """Nothing to close."""


def plain_loss(output: Any, y: Tensor) -> Tensor:
    """Cross-entropy of what the model returned."""
    return F.cross_entropy(output, y)


def train(
    build: Callable[[], nn.Module],
    way: Callable[..., nn.Module] | None = None,
    *,
    late: bool = False,
    steps: int = 5,
    probe: dict[str, Any] | None = None,
    loss: Callable[[Any, Tensor], Tensor] = plain_loss,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Run:
    """Train from a fixed start, compiled in some way, with a probe if options for one are given."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    run = Run()
    model = build().to(dtype)
    called = model if way is None or late else way(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    if probe is not None:
        settings = {"every": 2, "window": 2, "relations": RELATIONS, "strict": True, **probe}
        run.probe = FeatureProbe(called, optimizer=optimizer, sinks=[run], **settings)
    with nullcontext() if run.probe is None else run.probe:
        if way is not None and late:
            called = way(model, **options)
        for _ in range(steps):
            x, y = torch.randn(12, 6, dtype=dtype), torch.randint(3, (12,))
            optimizer.zero_grad()
            loss(called(x), y).backward()
            optimizer.step()
    run.state = {
        name.replace("_orig_mod.", ""): value.clone() for name, value in model.state_dict().items()
    }
    for index, held in optimizer.state_dict()["state"].items():
        run.state[f"momentum {index}"] = held["momentum_buffer"].clone()
    run.state["generator"] = torch.get_rng_state()
    run.state["calls"] = torch.tensor(getattr(model, "calls", 0))
    run.compiled = {
        "graphs": counters["stats"]["unique_graphs"],
        "frames": counters["frames"]["total"],
        "breaks": sum(counters["graph_break"].values()),
    }
    return run


def assert_same_state(found: Run, expected: Run) -> None:
    """Bitwise the same weights, momentum, buffers, random state and plain attributes."""
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert torch.equal(found.state[name], value), name


def assert_same_records(
    found: list[Report], expected: list[Report], *, rel: float, exact: tuple[str, ...] = ()
) -> None:
    """The same layers, counts, statuses; scores to a tolerance, those in ``exact`` to the bit."""
    assert len(found) == len(expected) > 0
    for report, wanted in zip(found, expected, strict=True):
        assert report.step == wanted.step
        for record, other in zip(report.records, wanted.records, strict=True):
            where = (report.step, record.layer, record.relation, record.power)
            assert (record.layer, record.relation) == (other.layer, other.relation)
            assert record.status == other.status, where
            assert (record.n_examples, record.n_rows) == (other.n_examples, other.n_rows), where
            if record.relation in exact:
                assert record.cosine == other.cosine, where
                assert record.pearson == other.pearson, where
            assert record.cosine == pytest.approx(other.cosine, rel=rel, abs=rel, nan_ok=True), (
                where
            )
            assert record.pearson == pytest.approx(other.pearson, rel=rel, abs=rel, nan_ok=True), (
                where
            )


# --------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("late", WHEN)
@pytest.mark.parametrize(
    ("build", "way"),
    [*((dropout_net, way) for way in WAYS.values()), (sequential, whole)],
    ids=[*WAYS, "torch.compile(sequential)"],
)
def test_every_relation_is_as_without_compiling(
    build: Callable[[], nn.Module], way: Callable[..., nn.Module], late: bool
) -> None:
    """FACT and bFACT to the bit, the rest to 1e-9 (float64), at every report from step 0 on."""
    expected = train(build, probe={}, dtype=torch.float64)
    found = train(build, way, late=late, probe={}, dtype=torch.float64, backend="eager")
    assert [report.step for report in found.reports] == [0, 2, 4]
    assert_same_records(found.reports, expected.reports, rel=1e-9, exact=EXACT)
    assert found.probe is not None
    assert found.probe.faults == 0
    assert {r.status for r in found.reports[0].records if r.relation in ("nfa", "enfa")} == {"ok"}


@pytest.mark.parametrize("way", [whole, in_place, blocks], ids=lambda way: way.__name__)
def test_every_relation_is_as_without_compiling_through_aot(way: Callable[..., nn.Module]) -> None:
    """The same where forward and backward are traced ahead of time, exact Jacobian, reduced."""
    options = {"jacobian": "exact", "positions": "reduce"}
    expected = train(Net, probe=options, dtype=torch.float64)
    found = train(Net, way, probe=options, dtype=torch.float64, backend="aot_eager")
    assert_same_records(found.reports, expected.reports, rel=1e-9, exact=EXACT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
@pytest.mark.parametrize("way", [whole, blocks_in_place], ids=lambda way: way.__name__)
def test_every_relation_is_as_without_compiling_by_inductor(way: Callable[..., nn.Module]) -> None:
    """With real kernels the numbers are those of the eager run to rounding."""
    expected = train(Net, probe={}, dtype=torch.float64)
    found = train(Net, way, probe={}, dtype=torch.float64, backend="inductor")
    assert_same_records(found.reports, expected.reports, rel=1e-8)
    assert_same_state(found, train(Net, way, dtype=torch.float64, backend="inductor"))


def features_loss(output: Any, y: Tensor) -> Tensor:
    """A loss of two outputs, one of which was computed from the other."""
    return F.cross_entropy(output["scores"], y) + output["features"].square().mean()


@pytest.mark.parametrize("way", [whole, blocks, method], ids=lambda way: way.__name__)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_outputs_computed_from_one_another_are_not_counted_twice(
    way: Callable[..., nn.Module], backend: str
) -> None:
    """E through features and scores is the eager probe's, whichever of them autograd can see."""
    options = {"output": lambda out: out["scores"]}
    expected = train(Features, probe=options, loss=features_loss, dtype=torch.float64)
    found = train(
        Features, way, probe=options, loss=features_loss, dtype=torch.float64, backend=backend
    )
    assert_same_records(found.reports, expected.reports, rel=1e-9, exact=EXACT)


@pytest.mark.parametrize("called_before", [False, True])
def test_what_was_compiled_before_is_found_when_the_model_itself_is_given(
    called_before: bool,
) -> None:
    """The probe gets the plain model, the loop calls what torch.compile made of it before."""
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend="eager")
    if called_before:
        compiled(torch.randn(4, 6)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-2)
    counters.clear()
    with FeatureProbe(model, optimizer=optimizer, every=1, strict=True) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(compiled(torch.randn(4, 6)), torch.randint(3, (4,))).backward()
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == (0 if called_before else 1)
    assert probe.report is not None
    assert probe.report.coverage.share() == 1.0
    assert {record.status for record in probe.report.records} == {"ok"}
    assert {record.n_examples for record in probe.report.records} == {4}


class WithLoss(Net):
    """Returns its loss beside the outputs, as transformers' models do."""

    def forward(self, x: Tensor) -> Any:
        """A loss, and what it is of."""
        z = super().forward(x)
        return {"loss": F.cross_entropy(z, torch.arange(len(x)) % 3), "logits": z}


@pytest.mark.parametrize("way", [whole, in_place])
def test_a_loss_that_the_compiled_model_returns(way: Callable[..., nn.Module]) -> None:
    """The backward pass reaches the loss alone: the numbers are those of the model uncompiled."""
    asked: dict[str, Any] = {
        "loss": lambda out, _: out["loss"],
        "dtype": torch.float64,
        "probe": {"output": lambda out: out["logits"]},
    }
    eager = train(WithLoss, **asked)
    for backend in ("eager", "aot_eager"):
        compiled = train(WithLoss, way, backend=backend, **asked)
        assert_same_records(compiled.reports, eager.reports, rel=1e-9)
        assert {record.status for report in compiled.reports for record in report.records} == {"ok"}


@dataclass
class Output:
    """What some libraries return: neither a container nor known to torch's pytrees."""

    scores: Tensor


class Wraps(Net):
    """Returns an object."""

    def forward(self, x: Tensor) -> Any:
        """Scores in an object."""
        return Output(super().forward(x))


def test_outputs_inside_objects_are_found() -> None:
    """E is measured where the model returns an object that holds the tensors."""
    options = {"output": lambda out: out.scores}

    def loss(output: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(output.scores, y)

    expected = train(Wraps, probe=options, loss=loss, dtype=torch.float64)
    found = train(Wraps, whole, probe=options, loss=loss, dtype=torch.float64, backend="eager")
    assert_same_records(found.reports, expected.reports, rel=1e-9, exact=EXACT)
    assert {r.status for r in found.reports[0].records if r.relation == "enfa"} == {"ok"}


def test_layers_and_parameters_have_their_own_names() -> None:
    """No `_orig_mod` in the names of layers and parameters."""
    expected = train(Net, probe={})
    found = train(Net, blocks, probe={}, backend="eager")
    names = [
        [entry.parameter for entry in run.reports[0].coverage.parameters]
        for run in (found, expected)
    ]
    assert names[0] == names[1]
    assert {r.layer for r in found.reports[0].records} == {"stem", "first.fc", "second.fc", "head"}


@pytest.mark.parametrize("way", [whole, in_place, blocks], ids=lambda way: way.__name__)
def test_measure_runs_compiled_models_eagerly(way: Callable[..., nn.Module]) -> None:
    """`measure` of a compiled model is that of the model, and nothing is compiled for it."""
    torch.manual_seed(0)
    model = Net().double()
    data = [(torch.randn(7, 6).double(), torch.randint(3, (7,))) for _ in range(2)]
    expected = measure(model, data, F.cross_entropy, relations=RELATIONS, progress=False)
    called = way(model, backend="eager")
    found = measure(called, data, F.cross_entropy, relations=RELATIONS, progress=False)
    assert_same_records([found], [expected], rel=1e-12)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("way", [whole, blocks], ids=lambda way: way.__name__)
def test_the_estimate_is_as_without_compiling(way: Callable[..., nn.Module]) -> None:
    """Rows and bytes of every layer are seen through compiled parts."""
    model, sample = Net(), torch.randn(7, 6)
    expected = FeatureProbe.estimate(model, sample).layers
    called = way(model, backend="eager").eval()
    with torch.no_grad():
        called(sample)  # compiled without the hooks that count rows
    assert FeatureProbe.estimate(called, sample).layers == expected
    assert all(entry.rows == 7 for entry in expected)


# --------------------------------------------------------------------------- the user's run


@pytest.mark.parametrize(
    ("fullgraph", "late"),
    [(False, True), (True, False)],
    ids=["after attaching", "before attaching, fullgraph"],
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_20_steps_are_bit_identical_and_nothing_is_compiled_again(
    way: Callable[..., nn.Module], late: bool, fullgraph: bool
) -> None:
    """Weights, buffers, random state and attributes to the bit; no graph, frame or break more."""
    options = {"backend": "eager", "fullgraph": fullgraph, "late": late, "steps": 20}
    expected = train(dropout_net, way, **options)
    found = train(dropout_net, way, probe={"every": 5}, **options)
    assert_same_state(found, expected)
    assert found.compiled == expected.compiled
    assert expected.compiled["graphs"] > 0


@pytest.mark.parametrize("late", WHEN)
def test_a_sequential_model_is_not_compiled_again(late: bool) -> None:
    """The same through aot_eager for a model that torch.compile enters below its hooks."""
    options = {"backend": "aot_eager", "fullgraph": True, "late": late, "steps": 8}
    expected = train(sequential, whole, **options)
    found = train(sequential, whole, probe={"every": 4}, **options)
    assert_same_state(found, expected)
    assert found.compiled == expected.compiled


def test_plain_attributes_are_those_of_the_users_pass() -> None:
    """A counter in the model counts the user's passes, and a shadow computes with its value."""
    expected = train(Counts, probe={}, dtype=torch.float64)
    plain = train(Counts, whole, backend="eager", dtype=torch.float64)
    found = train(Counts, whole, probe={}, backend="eager", dtype=torch.float64)
    assert_same_records(found.reports, expected.reports, rel=1e-9, exact=EXACT)
    assert_same_state(found, plain)
    assert found.compiled == plain.compiled
    assert found.state["calls"] == 5


def test_fact_alone_runs_no_second_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradients of parameters are all that is asked for, no shadow is made."""
    expected = train(Net, probe={"relations": EXACT})
    monkeypatch.setattr(following, "ShadowPass", None)
    found = train(Net, whole, probe={"relations": EXACT}, backend="eager")
    assert len(found.reports) == len(expected.reports)
    for report, wanted in zip(found.reports, expected.reports, strict=True):
        for record, other in zip(report.records, wanted.records, strict=True):
            # the rows of a layer's calls are not seen
            assert record == replace(other, n_rows=0)


def test_another_compiled_model_is_left_alone() -> None:
    """A compiled model beside the probed one is not compiled again and draws no warning."""

    def graphs(*, probing: bool) -> int:
        torch._dynamo.reset()
        counters.clear()
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        teacher = torch.compile(nn.Sequential(nn.Linear(6, 3)), backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        student = FeatureProbe(model, optimizer=optimizer, every=2, window=1, strict=True)
        with student if probing else nullcontext():
            teacher_2 = torch.compile(nn.Sequential(nn.Linear(6, 3)), backend="eager")
            for _ in range(5):
                x = torch.randn(4, 6)
                optimizer.zero_grad()
                (model(x) - teacher(x).detach() - teacher_2(x).detach()).square().mean().backward()
                optimizer.step()
        return counters["stats"]["unique_graphs"]

    assert graphs(probing=True) == graphs(probing=False)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def compiled_around(model: nn.Module, **options: Any) -> nn.Module:
    """torch.compile of DistributedDataParallel of the model."""
    return torch.compile(DistributedDataParallel(model), **options)


def compiled_inside(model: nn.Module, **options: Any) -> nn.Module:
    """DistributedDataParallel of torch.compile of the model."""
    return DistributedDataParallel(torch.compile(model, **options))


def wrapper_compiled_in_place(model: nn.Module, **options: Any) -> nn.Module:
    """DistributedDataParallel compiled in place."""
    wrapped = DistributedDataParallel(model)
    wrapped.compile(**options)
    return wrapped


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "way",
    [compiled_around, compiled_inside, wrapper_compiled_in_place],
    ids=lambda way: way.__name__,
)
def test_distributed_data_parallel_in_any_nesting(way: Callable[..., nn.Module]) -> None:
    """The numbers of the bare model, and no graph compiled again."""
    expected = train(Net, probe={}, dtype=torch.float64)
    plain = train(Net, way, backend="aot_eager", dtype=torch.float64)
    found = train(Net, way, probe={}, backend="aot_eager", dtype=torch.float64)
    assert_same_records(found.reports, expected.reports, rel=1e-9, exact=EXACT)
    assert_same_state(found, plain)
    # torch's own frames around the wrapper's graph breaks differ where a module has hooks
    assert found.compiled["graphs"] == plain.compiled["graphs"]


def test_accumulation_and_two_backward_passes() -> None:
    """Two forward passes a step, and two backward passes through one of them, as uncompiled."""

    def loop(*, compiling: bool) -> list[Report]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        run, model = Run(), Net().double()
        called = torch.compile(model, backend="aot_eager") if compiling else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with FeatureProbe(
            called, optimizer=optimizer, every=1, window=1, sinks=[run], relations=RELATIONS
        ):
            for _ in range(4):
                optimizer.zero_grad()
                for _ in range(2):
                    x, y = torch.randn(6, 6).double(), torch.randint(3, (6,))
                    output = called(x)
                    (F.cross_entropy(output, y) / 2).backward(retain_graph=True)
                    (output.square().mean() / 2).backward()
                optimizer.step()
        return run.reports

    assert_same_records(loop(compiling=True), loop(compiling=False), rel=1e-9, exact=EXACT)


# --------------------------------------------------------------------------- what cannot be seen


def test_a_compiled_function_around_the_model_is_named_as_the_reason() -> None:
    """Inside a compiled training function FACT is exact, and K and E are missing with a reason."""

    def function(model: nn.Module, **options: Any) -> Any:
        return torch.compile(lambda x: model(x), **options)

    expected = train(Net, probe={})
    found = train(Net, function, late=True, probe={}, backend="eager")
    for record, other in zip(found.reports[-1].records, expected.reports[-1].records, strict=True):
        if record.relation in EXACT:
            assert (record.cosine, record.status) == (other.cosine, other.status)
        else:
            assert record.cosine != record.cosine
            assert "compiled function" in record.status
    assert_same_state(found, train(Net, function, late=True, backend="eager"))


class Modifies(Net):
    """Normalises its input in place."""

    def forward(self, x: Tensor) -> Any:
        """Class scores."""
        return super().forward(x.sub_(x.mean()))


class Drifts(Net):
    """Writes to a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Any:
        """Class scores."""
        self.seen.add_(1)
        return super().forward(x) * self.seen


@pytest.mark.parametrize(
    ("build", "reason"), [(Modifies, "input in place"), (Drifts, "register_buffer")]
)
def test_a_forward_that_cannot_be_repeated_is_not_measured(
    build: Callable[[], nn.Module], reason: str
) -> None:
    """Rather than a wrong number there is a reason; FACT and the training are as they were."""
    expected = train(build, whole, backend="aot_eager")
    found = train(build, whole, probe={}, backend="aot_eager")
    assert_same_state(found, expected)
    for record in found.reports[-1].records:
        if record.relation in EXACT:
            assert record.cosine == record.cosine
        else:
            assert record.cosine != record.cosine
            assert reason in record.status


# --------------------------------------------------------------------------- nothing remains


def hooks_of(model: nn.Module) -> list[str]:
    """Hook dictionaries of the modules that are not empty."""
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "hook" in attribute and isinstance(value, dict) and value
    ]


def global_hooks() -> dict[str, int]:
    """How many hooks there are on all modules."""
    return {n: len(v) for n, v in vars(module_globals).items() if isinstance(v, dict)}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_all_hooks_are_gone_after_detach_and_after_an_exception(
    way: Callable[..., nn.Module],
) -> None:
    """On the modules, on their wrappers and on all modules; the model's failure is the user's."""
    before = global_hooks()
    model = Net()
    called = way(model, backend="eager")
    probe = FeatureProbe(called, every=1)
    with probe:
        assert hooks_of(called)
        with pytest.raises(RuntimeError):
            called(torch.randn(4, 7))
    assert not hooks_of(called)
    assert global_hooks() == before
    with probe:
        called(torch.randn(4, 6)).sum().backward()
        probe.step()
    assert not hooks_of(called)
    assert global_hooks() == before


class Keep:
    """Something to be kept alive."""


@pytest.mark.parametrize("retain", [False, True], ids=["plain", "retain_graph"])
def test_shadows_go_with_the_users_graph(monkeypatch: pytest.MonkeyPatch, retain: bool) -> None:
    """Nothing of a shadow outlives the graph of the pass it stands for, backward pass or not."""
    alive: list[weakref.ref[Keep]] = []
    run = ShadowPass.run

    def watched(self: ShadowPass) -> Any:
        output = run(self)
        output.grad_fn.metadata["mark"] = mark = Keep()  # lives as long as the graph does
        alive.append(weakref.ref(mark))
        return output

    monkeypatch.setattr(ShadowPass, "run", watched)
    called = torch.compile(Net(), backend="eager")
    with FeatureProbe(called, every=1, strict=True) as probe:
        for _ in range(3):
            output = called(torch.randn(4, 6))
            output.sum().backward(retain_graph=retain)
            unused = called(torch.randn(4, 6))
            probe.step()
            assert len([ref for ref in alive if ref() is not None]) <= 2
        del output, unused
    assert len(alive) == 6
    assert not [ref for ref in alive if ref() is not None]


def test_copies_and_pickles_of_a_compiled_model_carry_no_probe() -> None:
    """A copy made while watching loses its hooks when called; a pickle knows no package."""
    model = Net()
    called = torch.compile(model, backend="eager")
    with FeatureProbe(called, every=1) as probe:
        called(torch.randn(4, 6)).sum().backward()
        clone = copy.deepcopy(model)
        dumped = pickle.dumps(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        probe.step()
    clone(torch.randn(4, 6))
    assert not hooks_of(clone)
    assert b"feature_probe" not in dumped
    assert b"feature_probe" not in buffer.getvalue()
    assert pickle.loads(dumped)(torch.randn(4, 6)).shape == (4, 3)
    assert probe.faults == 0
