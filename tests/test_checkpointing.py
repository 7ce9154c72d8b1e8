"""Activation checkpointing, of both kinds: the same numbers, the same training, less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from feature_probe import FeatureProbe, measure
from feature_probe.reports.report import Report

RELATIONS = ("fact", "bfact", "nfa", "enfa", "bnfa", "benfa")
KINDS = {"none": None, "non-reentrant": False, "reentrant": True}
CHECKPOINTED = [pytest.param(False, id="non-reentrant"), pytest.param(True, id="reentrant")]


class Block(nn.Module):
    """Linear, batch norm, dropout, in-place activation; checkpointed as asked."""

    def __init__(self, width: int, reentrant: bool | None, rate: float = 0.2) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(rate)
        self.reentrant = reentrant

    def work(self, h: Tensor) -> Tensor:
        """The block itself."""
        return F.relu(self.drop(self.norm(self.fc(h))), inplace=True)

    def forward(self, h: Tensor) -> Tensor:
        """The block, recomputed in the backward pass."""
        if self.reentrant is None:
            return self.work(h)
        out: Tensor = checkpoint(self.work, h, use_reentrant=self.reentrant)
        return out


class Net(nn.Module):
    """Two blocks, the first called twice, between layers that are not checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.first, self.second = Block(8, reentrant), Block(8, reentrant)
        self.head = nn.Linear(8, 3)

    def forward(self, *, inputs: Tensor) -> Tensor:
        """Class scores; called by keyword, as models of transformers are."""
        h: Tensor = self.stem(inputs)
        for block in (self.first, self.second, self.first):
            h = block(h)
        out: Tensor = self.head(h)
        return out


class Keep:
    """A sink that keeps every report."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def write(self, report: Report) -> None:
        """Keep it."""
        self.reports.append(report)

    def close(self) -> None:
        """Nothing to close."""


def train(
    model: nn.Module,
    steps: int,
    probe: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
) -> dict[str, Tensor]:
    """Steps of ordinary training; everything that it has left behind."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    with nullcontext() if probe is None else probe(model, optimizer):
        for _ in range(steps):
            x, y = torch.randn(12, 6), torch.randint(3, (12,))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs=x), y).backward()
            optimizer.step()
    left = {name: value.clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        left[f"momentum {index}"] = state["momentum_buffer"].clone()
    return {**left, "generator": torch.get_rng_state()}


def build(reentrant: bool | None) -> Net:
    """The model, from the same start."""
    torch.manual_seed(0)
    return Net(reentrant)


def probed(reentrant: bool | None, steps: int = 5, **options: Any) -> tuple[FeatureProbe, Keep]:
    """A probe that has watched some steps, and its reports."""
    kept: list[FeatureProbe] = []
    sink = Keep()
    settings = {"every": 2, "window": 2, "relations": RELATIONS, "strict": True, **options}

    def probe(model: nn.Module, optimizer: torch.optim.Optimizer) -> FeatureProbe:
        kept.append(FeatureProbe(model, optimizer=optimizer, sinks=[sink], **settings))
        return kept[0]

    train(build(reentrant), steps, probe)
    return kept[0], sink


def assert_same_records(found: list[Report], expected: list[Report]) -> None:
    """Every score of every layer to 1e-9, every count exactly, nothing missing."""
    assert len(found) == len(expected) > 0
    for report, wanted in zip(found, expected, strict=True):
        for record, other in zip(report.records, wanted.records, strict=True):
            where = (report.step, record.layer, record.relation, record.power)
            assert (record.layer, record.relation) == (other.layer, other.relation)
            assert (record.n_examples, record.n_rows) == (other.n_examples, other.n_rows), where
            assert record.status == other.status, where
            assert record.cosine == pytest.approx(other.cosine, rel=1e-9, abs=1e-12), where
            assert record.pearson == pytest.approx(other.pearson, rel=1e-9, abs=1e-12), where


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reentrant", CHECKPOINTED)
@pytest.mark.parametrize("options", [{}, {"jacobian": "exact", "positions": "reduce"}], ids=str)
def test_the_numbers_are_those_without_checkpointing(
    reentrant: bool, options: dict[str, Any]
) -> None:
    """Every relation at every report, step 0 included, each position counted once."""
    _, expected = probed(None, **options)
    probe, found = probed(reentrant, **options)
    assert [report.step for report in found.reports] == [0, 2, 4]
    assert_same_records(found.reports, expected.reports)
    assert probe.faults == 0
    rows = {r.layer: r.n_rows for r in found.reports[0].records if r.relation == "nfa"}
    assert rows == {"stem": 12, "first.fc": 24, "second.fc": 12, "head": 12}


@pytest.mark.parametrize("reentrant", KINDS.values(), ids=KINDS)
def test_training_is_bit_identical(reentrant: bool | None) -> None:
    """Weights, momentum, running statistics and the generator after 20 steps, to the bit."""
    expected = train(build(reentrant), 20)
    found = train(
        build(reentrant),
        20,
        lambda model, optimizer: FeatureProbe(
            model, optimizer=optimizer, every=3, window=2, relations=RELATIONS, strict=True
        ),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_checkpointing_itself_is_as_before() -> None:
    """What stands in for reentrant checkpoints while a shadow runs is gone after each pass."""
    before = dict(vars(checkpointing.CheckpointFunction))
    inside = []

    class Spy(Net):
        def forward(self, *, inputs: Tensor) -> Tensor:
            inside.append("apply" in vars(checkpointing.CheckpointFunction))
            return super().forward(inputs=inputs)

    torch.manual_seed(0)
    train(Spy(True), 1, lambda m, o: FeatureProbe(m, optimizer=o, every=1, strict=True))
    assert inside == [False, True]  # the user's pass, then the shadow of it
    assert dict(vars(checkpointing.CheckpointFunction)) == before


def test_a_shadow_that_raises_leaves_checkpointing_alone() -> None:
    """A forward that cannot be run twice costs the numbers, not the run, and restores the class."""

    class Once(Net):
        calls = 0

        def forward(self, *, inputs: Tensor) -> Tensor:
            Once.calls += 1
            if Once.calls % 2 == 0:
                raise OSError("the stream is at its end")
            return super().forward(inputs=inputs)

    torch.manual_seed(0)
    probes: list[FeatureProbe] = []

    def probe(model: nn.Module, optimizer: torch.optim.Optimizer) -> FeatureProbe:
        probes.append(FeatureProbe(model, optimizer=optimizer, every=1))
        return probes[0]

    train(Once(True), 2, probe)
    assert probes[0].faults == 2
    assert "apply" not in vars(checkpointing.CheckpointFunction)


def test_checkpointing_that_begins_later_is_followed_from_then_on() -> None:
    """A step in which reentrant checkpointing first shows is left out; the next is measured."""
    model = build(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = Keep()
    with FeatureProbe(model, optimizer=optimizer, every=1, window=1, sinks=[sink]) as probe:
        for step in range(4):
            for block in (model.first, model.second):
                block.reentrant = None if step == 0 else True
            optimizer.zero_grad()
            F.cross_entropy(model(inputs=torch.randn(8, 6)), torch.zeros(8).long()).backward()
            optimizer.step()
    scored = [
        all(r.status == "ok" for r in report.records if r.relation in ("nfa", "enfa"))
        for report in sink.reports
    ]
    assert scored == [True, False, True, True]
    assert probe.faults == 1
    assert "left out" in {r.status for r in sink.reports[1].records if r.relation == "nfa"}.pop()


class ForeignCheckpoint(torch.autograd.Function):
    """A reentrant checkpoint as other libraries have their own."""

    @staticmethod
    def forward(ctx: Any, work: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """Run without a graph."""
        ctx.work = work
        ctx.save_for_backward(h)
        with torch.no_grad():
            return work(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Run again, with one."""
        (h,) = ctx.saved_tensors
        again = h.detach().requires_grad_()
        with torch.enable_grad():
            ctx.work(again).backward(*gradients)
        return None, again.grad


def test_a_checkpoint_of_another_library_is_named_as_the_reason() -> None:
    """K and E are missing with a reason, FACT is that without checkpointing, training its own."""

    class Foreign(Net):
        def forward(self, *, inputs: Tensor) -> Tensor:
            h = ForeignCheckpoint.apply(self.first.work, self.stem(inputs))
            out: Tensor = self.head(h)
            return out

    def run(probe: bool) -> tuple[dict[str, Tensor], list[Report]]:
        torch.manual_seed(0)
        sink = Keep()
        state = train(
            Foreign(None),
            3,
            lambda m, o: (
                FeatureProbe(m, optimizer=o, every=1, window=1, sinks=[sink], strict=True)
                if probe
                else nullcontext()
            ),
        )
        return state, sink.reports

    found, reports = run(probe=True)
    expected, _ = run(probe=False)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(reports) == 3
    for report in reports:
        for record in report.records:
            if record.layer == "second.fc":
                continue  # not used
            if record.relation == "fact":
                assert record.cosine == record.cosine
            if record.relation in ("nfa", "enfa"):
                assert record.cosine != record.cosine
                assert "ForeignCheckpoint checkpoints reentrantly" in record.status


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reentrant", CHECKPOINTED)
def test_measure_sees_through_checkpointing(reentrant: bool) -> None:
    """`measure` at frozen weights gives what it gives without checkpointing."""
    data = [(torch.randn(7, 6), torch.randint(3, (7,))) for _ in range(2)]

    def report(kind: bool | None) -> Report:
        model = build(kind)
        return measure(
            model,
            data,
            relations=RELATIONS,
            forward=lambda m, batch: (out := m(inputs=batch[0]), F.cross_entropy(out, batch[1])),
            progress=False,
        )

    assert_same_records([report(reentrant)], [report(None)])


# --------------------------------------------------------------------------- memory


class Deep(nn.Module):
    """A block with many more intermediate values than layer outputs."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.reentrant = reentrant

    def work(self, h: Tensor) -> Tensor:
        """The block itself."""
        h = self.fc(h)
        for _ in range(6):
            h = torch.tanh(h) * 1.01
        return h

    def forward(self, h: Tensor) -> Tensor:
        """The block, recomputed in the backward pass."""
        if self.reentrant is None:
            return self.work(h)
        out: Tensor = checkpoint(self.work, h, use_reentrant=self.reentrant)
        return out


def peak(reentrant: bool | None, *, probe: bool) -> float:
    """Most bytes that one training step has allocated at a time, by the allocator's own account."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), *(Deep(reentrant) for _ in range(8)), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(1024, 16), torch.randint(3, (1024,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    # the second step is followed, but not reported: a report's arithmetic has a peak of its own
    watched = FeatureProbe(
        model, optimizer=optimizer, every=lambda s: s == 2, window=3, strict=True
    )
    with watched if probe else nullcontext():
        step()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            step()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return float(most)


@pytest.mark.parametrize("reentrant", CHECKPOINTED)
def test_the_memory_saving_is_kept_while_probing(reentrant: bool) -> None:
    """In a probed step checkpointing saves at least 3/4 of what it saves without the probe."""
    saved = peak(None, probe=False) - peak(reentrant, probe=False)
    saved_probing = peak(None, probe=True) - peak(reentrant, probe=True)
    assert saved > 0.6 * peak(None, probe=False)
    assert saved_probing > 0.75 * saved
