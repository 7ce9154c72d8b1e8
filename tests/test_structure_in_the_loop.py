"""Structural quantities in the loop: over training, in files, and without touching the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import (
    ConfigurationError,
    FeatureProbe,
    LayerStructure,
    Report,
    Structure,
    egop,
    measure,
)
from feature_probe.sinks import JSONLSink, ScalarSink, TensorBoardSink
from feature_probe.sinks.structure import structure_layout, structure_scalars

STEPS = 5


def target(x: Tensor) -> Tensor:
    """y = Σ_k x_k x_{k+1} over k mod 3."""
    return (x[:, :3] * x[:, :3].roll(-1, 1)).sum(1)


def data() -> tuple[Tensor, Tensor]:
    """Inputs and the values of the target function."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    return x, target(x)[:, None]


def network() -> nn.Sequential:
    """A chain of three, with dropout, which draws from the global random state."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 1)
    )


def asked() -> Structure:
    """The first layer beside the target function's EGOP."""
    return Structure(powers=(0.25, 0.5, 1.0), references={"0": egop(target, data()[0])})


class Kept:
    """Holds every report."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def write(self, report: Report) -> None:
        """Keep it."""
        self.reports.append(report)

    def close(self) -> None:
        """Nothing to do."""


def trained(
    structure: bool | Structure | None, **options: Any
) -> tuple[nn.Module, list[Report], torch.optim.Optimizer, Tensor]:
    """Five steps, reported at each other one; ``None``: no probe."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    kept = Kept()
    x, y = data()
    settings: dict[str, Any] = {"every": 2, "window": 2, "strict": True, "sinks": [kept]} | options
    probe = (
        None
        if structure is None
        else FeatureProbe(model, optimizer=optimizer, structure=structure, **settings).attach()
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    if probe is not None:
        probe.detach()
    return model, kept.reports, optimizer, torch.get_rng_state()


def test_training_is_bit_identical() -> None:
    """Weights, momentum and random state are those of a run without a probe."""
    plain, _, before, state = trained(None)
    probed, reports, after, drawn = trained(asked())
    assert [report.step for report in reports] == [0, 2, 4]
    assert torch.equal(state, drawn)
    for one, other in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(
            before.state[one]["momentum_buffer"], after.state[other]["momentum_buffer"]
        )


def test_off_by_default_nothing_changes(tmp_path: Path) -> None:
    """Without structure= no report, record line or series has anything of it; scores are equal."""
    _, plain, *_ = trained(False, log_dir=tmp_path / "plain")
    _, full, *_ = trained(asked(), log_dir=tmp_path / "full")
    for one, other in zip(plain, full, strict=True):
        assert one.structures == ()
        assert "structures" not in one.to_dict()
        assert repr(one.records) == repr(other.records)
        assert repr(one.diagnoses) == repr(other.diagnoses)
        assert str(one) == str(other)
    assert not any("structure" in line for line in lines(tmp_path / "plain"))
    tags = events(tmp_path / "plain").Tags()
    shown = [*tags["scalars"], *tags["images"]]
    assert not any("structure" in tag or "sweeps" in tag for tag in shown)
    more = events(tmp_path / "full").Tags()
    assert set(shown) < {*more["scalars"], *more["images"]}


def test_a_window_of_one_step_is_measure() -> None:
    """The loop at frozen weights gives what measure gives: one code, two ways in."""
    model = network().double().eval()
    x, y = (tensor.double() for tensor in data())
    structure = Structure(references={"0": egop(target, x)})
    exact = measure(
        model, [(x, y)], F.mse_loss, weight_decay=1e-2, structure=structure, progress=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1e-2)
    with FeatureProbe(
        model, optimizer=optimizer, jacobian="exact", window=1, structure=structure, strict=True
    ) as probe:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert probe.report is not None
    for layer in exact.layers:
        assert_close(probe.report.structure(layer).to_dict(), exact.structure(layer).to_dict())


def assert_close(one: Any, other: Any) -> None:
    """Plain data agree to 10⁻⁶, which random signs of exact products leave."""
    if isinstance(other, dict):
        for name, value in other.items():
            assert_close(one[name], value)
    elif isinstance(other, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_close(mine, theirs)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    else:
        assert one == other


def test_over_training_agop_comes_to_the_egop() -> None:
    """The first layer's AGOP turns to the target's three directions, its overlap from chance up."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(3))
    kept = Kept()
    structure = Structure(references={"0": egop(target, x)})
    with FeatureProbe(
        model, optimizer=optimizer, every=150, structure=structure, sinks=[kept], strict=True,
        relations="nfa",
    ):  # fmt: skip
        for _ in range(301):
            optimizer.zero_grad()
            F.mse_loss(model(x), target(x)[:, None]).backward()
            optimizer.step()
    found = [report.structure("0").reference("agop") for report in kept.reports]
    assert found[0].rank == 3
    assert found[0].chance_overlap == 3 / 8
    assert found[0].overlap < 0.7
    assert found[-1].overlap > 0.95
    assert found[-1].cosine > 0.95 > found[0].cosine


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records that were written."""
    text = (folder / "feature_probe.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def events(folder: Path) -> EventAccumulator:
    """Everything in a folder's event file."""
    everything = dict.fromkeys(("scalars", "images", "tensors"), 0)
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def test_json_lines_hold_it_once_a_layer(tmp_path: Path) -> None:
    """The first record of each layer and step has the structure, which reads back whole."""
    _, reports, *_ = trained(asked(), log_dir=tmp_path)
    found = {
        (line["step"], line["layer"]): LayerStructure.from_dict(line["structure"])
        for line in lines(tmp_path)
        if "structure" in line
    }
    expected = {(r.step, layer): r.structure(layer) for r in reports for layer in r.layers}
    assert repr(found) == repr(expected)
    holders = [(line["step"], line["layer"]) for line in lines(tmp_path) if "structure" in line]
    assert len(holders) == len(set(holders)) == 9


def test_resuming_finds_the_steps_in_lines_with_structure(tmp_path: Path) -> None:
    """The long lines are cut like others: those of the step that is taken up again go."""
    _, reports, *_ = trained(asked(), log_dir=tmp_path)
    sink = JSONLSink(tmp_path / "feature_probe.jsonl")
    sink.resume(2, {})
    assert {line["step"] for line in lines(tmp_path)} == {0}
    sink.write(reports[1])
    assert {line["step"] for line in lines(tmp_path)} == {0, 2}


def test_tensorboard_has_a_series_per_layer_and_quantity(tmp_path: Path) -> None:
    """Scalars equal to the report's, at its steps; a picture of each sweep."""
    _, reports, *_ = trained(asked(), log_dir=tmp_path)
    found = events(tmp_path)
    tags = [tag for tag in found.Tags()["scalars"] if ".structure." in tag]
    written: dict[str, dict[int, float]] = {
        tag: {event.step: event.value for event in found.Scalars(tag)} for tag in tags
    }
    expected: dict[str, dict[int, float]] = {}
    for report in reports:
        for tag, value in structure_scalars(report).items():
            expected.setdefault(tag, {})[report.step] = value
    assert written.keys() == expected.keys()
    for tag, values in expected.items():
        assert written[tag] == pytest.approx(values, rel=1e-6)
    for name in (
        "imbalance/0", "effective_rank_nfm/3", "variation_ptk/5", "best_power_nfa/0",
        "best_power_times_depth_nfa/0", "reference_overlap_agop/0", "reference_cosine_nfm/0",
    ):  # fmt: skip
        assert f"feature_probe.structure.{name}" in written
    last = reports[-1].structure("0")
    overlap = written["feature_probe.structure.reference_overlap_agop/0"]
    assert overlap[4] == pytest.approx(last.reference("agop").overlap, rel=1e-6)
    assert "feature_probe.structure.imbalance/5" not in written  # the last layer: never 0
    pictures = [tag for tag in found.Tags()["images"] if ".sweeps/" in tag]
    assert pictures == ["feature_probe.sweeps/nfa", "feature_probe.sweeps/enfa"]


def layout(folder: Path) -> layout_pb2.Layout:
    """The Custom Scalars page."""
    tensor = events(folder).Tensors("custom_scalars__config__")[-1].tensor_proto
    return layout_pb2.Layout.FromString(tensor.string_val[0])


def test_custom_scalars_have_it_where_asked_for(tmp_path: Path) -> None:
    """structure_charts= adds a group of charts whose lines are series that exist; else none."""
    _, reports, *_ = trained(asked())
    for charts in (False, True):
        folder = tmp_path / str(charts)
        sink = TensorBoardSink(folder, structure_charts=charts)
        sink.write(reports[-1])
        sink.close()
        groups = [group for group in layout(folder).category if "structure" in group.title]
        assert len(groups) == charts
    patterns = [tag for chart in groups[0].chart for tag in chart.multiline.tag]
    meant = {pattern.strip("^$").replace("\\", "") for pattern in patterns}
    assert set(structure_scalars(reports[-1])) <= meant
    assert structure_layout(trained(False)[1][-1]) == {}


def test_other_loggers_get_the_numbers() -> None:
    """ScalarSink hands them on with the bands, and not where only medians are wanted."""
    _, reports, *_ = trained(asked())
    for detail, expected in (("medians", False), ("bands", True), ("layers", True)):
        logged: list[dict[str, float]] = []
        ScalarSink(
            lambda numbers, _, into=logged: into.append(numbers),  # type: ignore[misc]
            detail=detail,  # type: ignore[arg-type]
        ).write(reports[-1])
        assert ("feature_probe.structure.effective_rank_nfm/0" in logged[0]) == expected


def test_a_state_keeps_the_last_report_and_resumes_with_or_without() -> None:
    """state_dict holds plain data; a probe that asks for something else goes on from it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = data()

    def steps(probe: FeatureProbe, count: int) -> None:
        with probe:
            for _ in range(count):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()

    first = FeatureProbe(model, optimizer=optimizer, every=2, structure=asked(), strict=True)
    steps(first, 3)
    assert first.report is not None
    for structure in (False, True, asked()):
        again = FeatureProbe(model, optimizer=optimizer, every=2, structure=structure, strict=True)
        again.load_state_dict(first.state_dict())
        assert again.report is not None
        assert repr(again.report.structure("0")) == repr(first.report.structure("0"))
        steps(again, 2)
        assert len(again.report.structures) == (3 if structure else 0)


def test_bad_arguments_are_refused_before_training() -> None:
    """By the constructor."""
    model = network()
    with pytest.raises(ConfigurationError, match="no measured layer: 0, 3, 5"):
        FeatureProbe(model, structure=Structure(references={"first": torch.eye(8)}))
    with pytest.raises(ConfigurationError, match=r"must be \[8, 8\], got \[5, 5\]"):
        FeatureProbe(model, structure=Structure(references={"0": torch.eye(5)}))
    with pytest.raises(ConfigurationError, match="no measured layer: 0"):
        FeatureProbe(model, include="0", structure=Structure(depths={"3": 1}))


def test_weights_that_blow_up_do_not_end_the_run() -> None:
    """NaN and infinity become NaN with a reason, with no fault and no exception, strict or not."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = data()
    with FeatureProbe(model, optimizer=optimizer, every=1, structure=asked(), strict=True) as probe:
        for value in (math.inf, math.nan):
            with torch.no_grad():
                model[0].weight[0, 0] = value  # type: ignore[index, union-attr]
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            assert probe.report is not None
            structure = probe.report.structure("0")
            assert "weight holds NaN or infinity" in structure.balance_note
            assert "not finite" in structure.reference("nfm").status
            assert not structure_scalars(probe.report).keys() & {
                "feature_probe.structure.imbalance/0", "feature_probe.structure.best_power_nfa/0"
            }  # fmt: skip
    assert probe.faults == 0
