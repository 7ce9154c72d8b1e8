"""What a checkpoint holds: a window by layer name, and the probe's whole state."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from feature_probe import ConfigurationError, FeatureProbe, Report
from feature_probe.schedules import at
from feature_probe.sinks.outlets import JSONL_NAME
from feature_probe.sums.moments import Moments
from feature_probe.sums.state import FORMAT, NamedWindow, check_state
from feature_probe.sums.window import Window

CPU = torch.device("cpu")


def moments(seed: int, groups: int = 1) -> Moments:
    """Sums of a layer, all numbers different."""
    generator = torch.Generator().manual_seed(seed)
    made = Moments()
    rows = torch.randn(9, groups, 3, generator=generator)
    made.add_gradient(torch.randn(groups, 3, 4, generator=generator), 1.0 + seed)
    made.add_outer("jacobian", rows)
    made.add_outer("loss", rows, 0.3)
    made.jacobian_rows, made.loss_rows = 5 + seed, 9
    return made


def window() -> Window:
    """Two layers, the second without K, with counts and a problem."""
    made = Window([moments(1), moments(2)], steps=2, examples=12, left_out=1, discarded=3)
    made.layers[1].jacobian = None
    made.problems[1, "jacobian"] = "wider than max_dim"
    return made


def through_a_file(state: dict[str, Any]) -> Any:
    """What a checkpoint gives back, read as an untrusted one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_moments(one: Moments, two: Moments) -> None:
    """Bit for bit."""
    for name in ("gradient", "jacobian", "loss"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None), name
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype), name
    for name in ("gradient_weight", "jacobian_rows", "loss_rows"):
        assert getattr(one, name) == getattr(two, name), name


def test_a_window_comes_back_from_a_file() -> None:
    """Every sum, count and problem, with layers in another order."""
    kept = through_a_file(NamedWindow.copied(window(), ["a", "b"]).state_dict())
    back = Window([Moments() for _ in range(3)])
    NamedWindow.from_state(kept).give(back, ["b", "new", "a"], lambda _: CPU)
    original = window()
    assert_same_moments(back.layers[2], original.layers[0])
    assert_same_moments(back.layers[0], original.layers[1])
    assert_same_moments(back.layers[1], Moments())
    assert (back.steps, back.examples, back.left_out, back.discarded) == (2, 12, 1, 3)
    assert back.problems == {(0, "jacobian"): "wider than max_dim"}


def test_a_copy_does_not_change_with_the_run() -> None:
    """Sums that are added to after the checkpoint leave it as it was, and so does resuming."""
    running = window()
    copy = NamedWindow.copied(running, ["a", "b"])
    running.merge(window())
    assert_same_moments(copy.layers["a"], moments(1))
    state = copy.state_dict()
    for _ in range(2):  # one state may be loaded twice
        back = Window([Moments() for _ in range(2)])
        NamedWindow.from_state(state).give(back, ["a", "b"], lambda _: CPU)
        back.merge(window())
        assert_same_moments(copy.layers["a"], moments(1))


def test_a_layer_found_later_gets_its_sums_then() -> None:
    """Counts are given once, sums when the name is known, before anything is added to them."""
    named = NamedWindow.copied(window(), ["a", "found"])
    back = Window([Moments() for _ in range(1)])
    named.give(back, ["a"], lambda _: CPU)
    named.give(back, ["a"], lambda _: CPU)
    assert back.examples == 12
    assert len(back.layers) == 1
    assert back.problems == {}
    named.give(back, ["a", "found"], lambda _: CPU)
    assert_same_moments(back.layers[1], window().layers[1])
    assert back.problems == {(1, "jacobian"): "wider than max_dim"}
    assert back.examples == 12
    assert_same_moments(back.layers[0], moments(1))


def test_sums_go_to_where_the_layer_is() -> None:
    """A checkpoint read to the CPU is added to on the layer's device."""
    named = NamedWindow.copied(window(), ["a", "b"])
    back = Window([Moments() for _ in range(2)])
    named.give(back, ["a", "b"], lambda index: torch.device("meta") if index else CPU)
    devices = [m.gradient.device.type for m in back.layers if m.gradient is not None]
    assert devices == ["cpu", "meta"]


CONFIGURATION: dict[str, Any] = {
    "layers": {"a": [1, 3, 4], "b": [1, 3, 4]},
    "relations": ["fact", "nfa"],
    "seed": 0,
    "positions": "expand",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed was 0, is 1"),
        ({"positions": "reduce"}, r"positions was 'expand', is 'reduce'"),
        ({"relations": ["fact"]}, r"relations was \['fact', 'nfa'\], is \['fact'\]"),
        ({"layers": {"a": [1, 3, 4]}}, r"layers that are not here: b"),
        (
            {"layers": {"a": [1, 3, 4], "b": [1, 3, 4], "c": [1, 1, 1]}},
            r"layers it does not have: c",
        ),
        (
            {"layers": {"a": [1, 3, 5], "b": [1, 3, 4]}},
            r"layers of another shape: a \(was \[1, 3, 4\], is \[1, 3, 5\]\)",
        ),
        (
            {"layers": {f"l{i}": [1, 1, 1] for i in range(9)}, "seed": 3},
            r"layers it does not have: l0, l1, l2, l3 and 5 more; .*not here: a, b; seed was 0",
        ),
    ],
)
def test_another_configuration_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """Every difference is named, with both values and the way out."""
    state = {"format": FORMAT, "configuration": through_a_file(CONFIGURATION)}
    check_state(state, CONFIGURATION)
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_state(state, {**CONFIGURATION, **changes})
    assert "start without load_state_dict()" in str(caught.value)


@pytest.mark.parametrize("state", [None, [], {}, {"model": 1, "optimizer": 2}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    """A whole checkpoint handed over by mistake is told from a probe's state."""
    with pytest.raises(ConfigurationError, match="no state of a FeatureProbe: give what state_di"):
        check_state(state, CONFIGURATION)


def test_another_format_is_refused() -> None:
    """A state of a later version is not guessed at."""
    state = {"format": FORMAT + 1, "configuration": CONFIGURATION}
    with pytest.raises(ConfigurationError, match=rf"format {FORMAT + 1}, this version .* {FORMAT}"):
        check_state(state, CONFIGURATION)


# --------------------------------------------------------------------------- the probe

#: Few pictures, which take the time of the tests that write files.
FEW: dict[str, Any] = {"relations": ("fact", "nfa"), "powers": 0.5}


class Functional(nn.Module):
    """A weight that is only known once it has been used, a computed one, dropout and branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, groups=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.w = nn.Parameter(torch.randn(6, 5) / 2)
        self.rare = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """One layer only runs on some batches."""
        hidden = torch.tanh(self.normed(torch.tanh(self.conv(x)).flatten(1)))
        hidden = nn.functional.dropout(hidden, 0.3) @ self.w
        if len(x) == 5:
            hidden = hidden + self.rare(hidden)
        return cast(Tensor, self.head(torch.tanh(hidden)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The data of a step, of uneven size: five rows, and all layers used, in two steps only."""
    generator = torch.Generator().manual_seed(step)
    rows = 5 if step in (2, 4) else 4 + 2 * (step % 2)
    x = torch.randn(rows, 2, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 3, generator=generator, dtype=torch.float64)


class Run:
    """A training run whose whole state can be saved and resumed, as a script would do it."""

    def __init__(self, log_dir: Path | None = None, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = Functional().double()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01
        )
        self.sink = Collector()
        settings = {"every": 5, "window": 4, "strict": True, "sinks": [self.sink], **options}
        self.probe = FeatureProbe(self.model, optimizer=self.optimizer, log_dir=log_dir, **settings)
        self.step = 0

    def train(self, stop: int, each: Callable[[], Any] = lambda: None) -> Run:
        """Up to a step, two micro-batches a step; the probe is attached meanwhile."""
        with self.probe:
            self.loop(stop, each)
        return self

    def loop(self, stop: int, each: Callable[[], Any] = lambda: None) -> None:
        """The loop alone."""
        while self.step < stop:
            self.step += 1
            self.optimizer.zero_grad()
            for part in (0, 100):
                x, y = batch(self.step + part)
                (nn.functional.mse_loss(self.model(x), y) / 2).backward()
            self.optimizer.step()
            each()

    def save(self) -> bytes:
        """A checkpoint file."""
        buffer = io.BytesIO()
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "probe": self.probe.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
        }
        torch.save(parts, buffer)
        return buffer.getvalue()

    def load(self, checkpoint: bytes) -> Run:
        """Go on from a checkpoint file, read as an untrusted one."""
        parts = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.probe.load_state_dict(parts["probe"])
        torch.set_rng_state(parts["rng"])
        self.step = parts["step"]
        return self


class Collector:
    """Keeps the reports; a sink that cannot resume."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def write(self, report: Report) -> None:
        """Keep it."""
        self.reports.append(report)

    def close(self) -> None:
        """Nothing."""


def text(reports: list[Report]) -> list[str]:
    """Every number of every report, to the last bit."""
    return [json.dumps(report.to_dict()) for report in reports]


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Steps and values of every curve, distribution and picture in TensorBoard."""
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    found = EventAccumulator(str(folder), size_guidance=everything).Reload()
    tags = found.Tags()
    return (
        {t: [(e.step, e.value) for e in found.Scalars(t)] for t in tags["scalars"]}
        | {t: [(e.step, str(e.histogram_value)) for e in found.Histograms(t)]
           for t in tags["histograms"]}
        | {t: [(e.step, e.encoded_image_string) for e in found.Images(t)] for t in tags["images"]}
    )  # fmt: skip


RESUMED_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact": {"jacobian": "exact"},
    "several probes, reduced positions": {"num_probes": 2, "positions": "reduce", "seed": 5},
    "a sum, the gradient alone": {"loss_reduction": "sum", "relations": ("fact", "bfact")},
    "irregular": {"every": at([3, 7, 8, 15]), "window": 100},
}


@pytest.mark.parametrize("options", RESUMED_OPTIONS.values(), ids=RESUMED_OPTIONS.keys())
def test_a_resumed_run_reports_what_a_run_not_stopped_reports(options: dict[str, Any]) -> None:
    """Stopped after any step, inside a window or between: later reports are equal bit by bit."""
    checkpoints: list[bytes] = []
    whole = Run(**options)
    whole.train(16, lambda: checkpoints.append(whole.save()))
    expected = text(whole.sink.reports)
    assert len(expected) >= 3
    assert text(Run(**options).train(16).sink.reports) == expected  # saving changes nothing
    for step, checkpoint in list(enumerate(checkpoints, 1))[:: 1 if not options else 3]:
        resumed = Run(**options).load(checkpoint).train(16)
        before = [report for report in whole.sink.reports if report.step < step]
        assert text(resumed.sink.reports) == expected[len(before) :], step
        assert resumed.probe.faults == 0
        for one, two in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(one, two)


def test_files_after_a_crash_are_those_of_a_run_not_stopped(tmp_path: Path) -> None:
    """Records byte for byte, curves and pictures alike, though the lost steps were written too."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Run(whole, **FEW).train(17)
    first = Run(parts, **FEW)
    saved: list[bytes] = []

    def each() -> None:
        if first.step == 8:
            saved.append(first.save())
        if first.step == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(17, each)
    assert len((parts / JSONL_NAME).read_bytes()) > 1000
    Run(parts, **FEW).load(saved[0]).train(17)
    assert (parts / JSONL_NAME).read_bytes() == (whole / JSONL_NAME).read_bytes()
    expected, found = curves(whole), curves(parts)
    assert found == expected
    assert [step for step, _ in found["feature_probe/fact_median_cosine"]] == [0, 5, 10, 15]


def test_rolling_back_inside_one_process(tmp_path: Path) -> None:
    """`load_state_dict` on an attached probe: what was reported since is superseded."""
    Run(tmp_path / "whole", **FEW).train(17)
    run = Run(tmp_path / "parts", **FEW)
    with run.probe:
        run.loop(8)
        checkpoint = run.save()
        run.loop(14)
        run.load(checkpoint)
        run.loop(17)
    for name in ("whole", "parts"):
        assert (tmp_path / name / JSONL_NAME).exists()
    assert (tmp_path / "parts" / JSONL_NAME).read_bytes() == (
        tmp_path / "whole" / JSONL_NAME
    ).read_bytes()
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")


def test_attached_again_the_pictures_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After `detach` and `attach` the heatmap still begins at step 0, and nobody is warned."""
    run = Run(tmp_path / "parts", window=1, **FEW)
    run.train(7).train(17)
    Run(tmp_path / "whole", window=1, **FEW).train(17)
    tag = "feature_probe.heatmaps/cosine/fact"
    assert curves(tmp_path / "parts")[tag][-1] == curves(tmp_path / "whole")[tag][-1]
    assert not [record for record in caplog.records if "earlier run" in record.message]


def test_a_state_may_be_passed_on_unused() -> None:
    """Loaded and saved again before training, or stopped before a layer was used again."""
    run = Run()
    run.train(3)
    checkpoint = run.save()
    expected = text(Run().train(8).sink.reports)[1:]
    handed_on = Run().load(Run().load(checkpoint).save()).train(8)
    assert text(handed_on.sink.reports) == expected
    opened = Run().load(checkpoint)
    with opened.probe:
        again = opened.save()
    assert text(Run().load(again).train(8).sink.reports) == expected


def test_the_state_outside_a_window_is_small() -> None:
    """No sums are kept between windows; inside one, what the window holds."""
    run = Run(every=10, window=2)
    run.train(4)
    assert run.probe.state_dict()["collector"]["window"]["layers"] == {}
    run = Run(every=10, window=2)
    run.train(10)
    layers = run.probe.state_dict()["collector"]["window"]["layers"]
    assert set(layers) == {"conv", "normed", "w", "rare", "head"}
    assert layers["w"]["gradient"].shape == (6, 5)


def test_what_the_probe_knew_comes_back() -> None:
    """Step, faults, the last report (without its matrices), and which layers were seen."""
    run = Run(strict=False, keep_matrices=True)
    run.train(7)
    run.probe.faults = 3
    resumed = Run().load(run.save())
    assert resumed.probe.faults == 3
    assert resumed.probe.report is not None
    assert run.probe.report is not None
    assert text([resumed.probe.report]) == text([run.probe.report])
    seen = run.probe.state_dict()["collector"]["seen"]
    assert "w" in seen["fired"]
    known = {
        key: [name for name in value if name != "w"] if isinstance(value, list) else value
        for key, value in seen.items()
    }  # that layer is known when it has been used
    with resumed.probe:
        assert resumed.probe.state_dict()["collector"]["seen"] == known


def test_another_process_does_not_count_these_sums_twice() -> None:
    """One rank's checkpoint loaded on all: the others go on without the window's first steps."""
    run = Run()
    run.train(8)
    state = run.probe.state_dict()
    assert state["rank"] == [0, 1]
    other = Run()
    other.load(run.save())
    other.probe.load_state_dict({**state, "rank": [1, 2]})
    other.train(11)
    assert [report.settings["window"] for report in other.sink.reports] == [3]


def test_the_state_of_another_model_is_refused_before_anything_is_touched() -> None:
    """A probe that refuses a state goes on as it was."""
    run = Run()
    run.train(8)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    other = FeatureProbe(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match=r"layers it does not have: 0, 2; .*not here: con"):
        other.load_state_dict(run.probe.state_dict())
    assert other.state_dict()["step"] == 0
    with pytest.raises(ConfigurationError, match=r"num_probes was 1, is 2; seed was 0, is 9"):
        Run(num_probes=2, seed=9).probe.load_state_dict(run.probe.state_dict())
