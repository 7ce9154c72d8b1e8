"""Reports in TensorBoard's event files, read back with TensorBoard's own readers."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as MigratingAccumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from feature_probe.errors import ConfigurationError, FeatureProbeError, NotMeasuredError
from feature_probe.reports.diagnosis import State
from feature_probe.reports.record import SCORES, VERDICTS
from feature_probe.reports.report import Report
from feature_probe.sinks import TensorBoardSink
from feature_probe.sinks.palette import (
    STATE_PATTERNS,
    UNDEFINED,
    VERDICT_PATTERNS,
    colourise,
)
from feature_probe.sinks.series import custom_scalars_layout, histogram
from feature_probe.sinks.summary import summary_markdown
from feature_probe.sinks.wording import PREDICTIONS, SCORE_NAMES
from feature_probe.theory.relations import RELATIONS, LayerStatistics

NAN = float("nan")
Make = Callable[..., Report]


def events(folder: Path) -> EventAccumulator:
    """Everything in a folder's event file, unsampled."""
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    return accumulator.Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar series."""
    found = events(folder)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def pixels(folder: Path, tag: str) -> NDArray[np.uint8]:
    """The last picture of a tag."""
    encoded = events(folder).Images(tag)[-1].encoded_image_string
    return np.asarray(Image.open(io.BytesIO(encoded)))


def text(folder: Path) -> str:
    """The last table."""
    event = events(folder).Tensors("feature_probe/summary/text_summary")[-1]
    return str(event.tensor_proto.string_val[0].decode())


def write(folder: Path, *reports: Report, **settings: Any) -> TensorBoardSink:
    """Write reports into a folder and close."""
    sink = TensorBoardSink(folder, **settings)
    for report in reports:
        sink.write(report)
    sink.close()
    return sink


def statistics(groups: int = 1, **changes: torch.Tensor | None) -> LayerStatistics:
    """Sums of a layer of 6 outputs and 70 inputs a group."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, torch.Tensor | None] = {
        "weight": torch.randn(groups, 6, 70, generator=generator),
        "gradient": torch.randn(groups, 6, 70, generator=generator),
        "jacobian": torch.eye(6).repeat(groups, 1, 1),
        "loss": torch.eye(6).repeat(groups, 1, 1),
    }
    return LayerStatistics(**(given | changes), weight_decay=1e-3, tolerance=1e-6)  # type: ignore[arg-type]


def test_bands_are_the_reports_percentiles(tmp_path: Path, make_report: Make) -> None:
    """Median and ends of the band of every relation, at every step, in float32."""
    reports = [make_report(step, layers=[f"l{i}" for i in range(7)]) for step in (0, 100, 200)]
    write(tmp_path, *reports)
    found = scalars(tmp_path)
    for label, relation, power in [("fact", "fact", None), ("nfa^0.5", "nfa", 0.5)]:
        for tag, share, score in [
            (f"feature_probe/{label}_median_cosine", 50, "cosine"),
            (f"feature_probe.bands/cosine/{label}/p10", 10, "cosine"),
            (f"feature_probe.bands/cosine/{label}/p90", 90, "cosine"),
            (f"feature_probe.bands/trace_free_cosine/{label}/p50", 50, "trace_free_cosine"),
        ]:
            expected = [
                (
                    r.step,
                    np.percentile(
                        [getattr(x, score) for x in r.select(None, relation, power)], share
                    ),
                )
                for r in reports
            ]
            assert [step for step, _ in found[tag]] == [0, 100, 200]
            np.testing.assert_allclose(found[tag], expected, rtol=1e-6)


def test_no_other_scalars_are_written(tmp_path: Path, make_report: Make) -> None:
    """Few cards: one a relation and four of rest; the charts' helpers have groups of their own."""
    write(tmp_path, make_report())
    labels = ("fact", "bfact", "nfa^0.5", "enfa^0.5")
    cards = {f"feature_probe/{label}_median_cosine" for label in labels}
    rest = ("stationarity", "decay_age", "decay_ratio", "decay_ratio_plus_fluctuation")
    cards |= {f"feature_probe/median_{quantity}" for quantity in rest}
    found = set(scalars(tmp_path))
    assert {tag for tag in found if tag.startswith("feature_probe/")} == cards
    verdicts = {tag for tag in found if tag.startswith("feature_probe.verdicts/")}
    assert verdicts == {
        *(f"feature_probe.verdicts/{label}_applicable_layers" for label in labels),
        "feature_probe.verdicts/fact_share_holds",
        "feature_probe.verdicts/bfact_share_holds",
        "feature_probe.verdicts/nfa^0.5_share_aligned",
        "feature_probe.verdicts/enfa^0.5_share_aligned",
    }
    assert all(tag.startswith("feature_probe.bands/") for tag in found - cards - verdicts)
    assert len(found - verdicts) == 8 + 4 * 2 + 4 * 3 + 4 + 2


def test_stationarity_is_found_where_the_last_relation_has_none(
    tmp_path: Path, make_report: Make
) -> None:
    """Only records of the gradient's relations hold it; the series and the table show it."""
    write(tmp_path, make_report())
    assert scalars(tmp_path)["feature_probe/median_stationarity"] == [(100, 1.5)]
    assert "| conv | -0.100 (0.30) approaching |" in text(tmp_path)
    assert re.search(r"\| conv \|.*\| 1\.5 \|", text(tmp_path))


def test_the_chance_level_is_the_one_of_the_relation(tmp_path: Path, make_report: Make) -> None:
    """nfa is judged against the same W with random eigenvectors, fact against a rotation."""
    write(tmp_path, make_report())
    found = scalars(tmp_path)
    assert found["feature_probe.bands/cosine/fact/chance"] == [(100, pytest.approx(0.3))]
    assert found["feature_probe.bands/cosine/nfa^0.5/chance"] == [(100, pytest.approx(0.4))]


def test_undefined_scores_are_left_out_and_never_zero(tmp_path: Path, make_report: Make) -> None:
    """NaN layers do not move the percentiles; a relation that is NaN everywhere has no series."""
    gone = {
        "cosine": NAN, "trace_free_cosine": NAN, "shared_weight_cosine": NAN,
        "verdict": "undefined",
    }  # fmt: skip
    changes: dict[tuple[str, str], Mapping[str, Any]] = {("head", "fact"): gone}
    changes |= {(layer, "nfa"): gone for layer in ("conv", "blocks.0.fc_1", "head")}
    report = make_report(changes=changes)
    write(tmp_path, report, layer_scalars=True)
    found = scalars(tmp_path)
    assert found["feature_probe/fact_median_cosine"] == [(100, pytest.approx(-0.05))]
    assert not any("nfa^0.5" in tag for tag in found if "enfa" not in tag)
    assert "feature_probe.layers.head/fact_cosine" not in found
    assert "feature_probe.layers.conv/fact_cosine" in found
    distributions = events(tmp_path).Tags()["histograms"]
    assert "feature_probe.distributions/cosine/nfa^0.5" not in distributions
    picture = pixels(tmp_path, "feature_probe.heatmaps/cosine/nfa^0.5")
    assert (picture == UNDEFINED).all(axis=-1).sum() > 30000
    assert "| head | - undefined |" in text(tmp_path)


SILENT = ("trivial", "not applicable", "undefined")


@pytest.mark.parametrize("verdict", VERDICTS)
def test_what_says_nothing_of_learning_is_in_no_number_over_layers(
    tmp_path: Path, make_report: Make, verdict: str
) -> None:
    """Medians, bands, chance levels and histograms leave such a record out, and no other."""
    changes = {
        ("head", "fact"): {"verdict": verdict, "chance_cosine": 0.9},
        ("conv", "fact"): {"chance_cosine": 0.5},
    }
    write(tmp_path, make_report(changes=changes))
    is_out = verdict in SILENT
    found = scalars(tmp_path)
    middle, top = (-0.05, -0.01) if is_out else (0.0, 0.08)
    assert found["feature_probe/fact_median_cosine"] == [(100, pytest.approx(middle, abs=1e-6))]
    assert found["feature_probe.bands/cosine/fact/p90"] == [(100, pytest.approx(top, abs=1e-6))]
    level = found["feature_probe.bands/cosine/fact/chance"]
    assert level == [(100, pytest.approx(0.4 if is_out else 0.5))]
    assert found["feature_probe.verdicts/fact_applicable_layers"] == [(100, 2.0 if is_out else 3.0)]
    stored = events(tmp_path).Histograms("feature_probe.distributions/cosine/fact")[0]
    assert stored.histogram_value.num == (2 if is_out else 3)
    other = found["feature_probe/bfact_median_cosine"]
    assert other == [(100, pytest.approx(0.01))]


def test_a_relation_that_is_applicable_nowhere_has_no_point(
    tmp_path: Path, make_report: Make
) -> None:
    """No median, no share, no distribution; its picture is all grey, and its verdicts are drawn."""
    said = {"verdict": "not applicable"}
    layers = ("conv", "blocks.0.fc_1", "head")
    write(tmp_path, make_report(changes={(layer, "fact"): said for layer in layers}))
    assert not any("/fact" in tag for tag in scalars(tmp_path))
    assert not any(tag.endswith("/fact") for tag in events(tmp_path).Tags()["histograms"])
    picture = pixels(tmp_path, "feature_probe.heatmaps/cosine/fact")
    assert (picture == UNDEFINED).all(axis=-1).sum() > 30000
    drawn = pixels(tmp_path, "feature_probe.heatmaps/verdict/fact")
    assert (drawn == VERDICT_PATTERNS["not applicable"].fill).all(axis=-1).sum() > 30000
    row = next(line for line in text(tmp_path).splitlines() if line.startswith("| median of"))
    assert row.startswith("| median of applicable layers | - | 0.010 (3 of 3 layers) |")


def test_shares_are_of_the_applicable_layers(tmp_path: Path, make_report: Make) -> None:
    """Equalities are to be "holds", proportionalities "aligned", over what is not silent."""
    changes = {
        ("a", "fact"): {"verdict": "holds"},
        ("b", "fact"): {"verdict": "not applicable"},
        ("a", "nfa"): {"verdict": "trivial"},
        ("b", "nfa"): {"verdict": "at chance"},
        ("a", "bfact"): {"verdict": "aligned"},  # not what an equality is to be
    }
    write(tmp_path, make_report(layers=("a", "b", "c", "d", "e"), changes=changes))
    found = scalars(tmp_path)
    group = "feature_probe.verdicts"
    assert found[f"{group}/fact_share_holds"] == [(100, 0.25)]
    assert found[f"{group}/nfa^0.5_share_aligned"] == [(100, 0.75)]
    assert found[f"{group}/enfa^0.5_share_aligned"] == [(100, 1.0)]
    assert found[f"{group}/bfact_share_holds"] == [(100, 0.0)]
    assert found[f"{group}/nfa^0.5_applicable_layers"] == [(100, 4.0)]


def test_medians_of_rest_are_of_the_layers_that_can_come_to_rest(
    tmp_path: Path, make_report: Make
) -> None:
    """A scale-invariant layer only ages, one without decay not even that."""
    rest = {"stationarity": 0.25, "decay_age": 4.0, "decay_ratio": 0.75, "fluctuation": 0.125}
    diagnosed = {
        "a": rest,
        "b": {"state": "not applicable", "decay_age": 8.0, "stationarity": 9.0},
        "c": {"state": "not applicable", "decay_form": "none", "decay_age": 0.0},
    }
    write(tmp_path, make_report(layers=("a", "b", "c"), diagnosed=diagnosed))
    found = scalars(tmp_path)
    assert found["feature_probe/median_stationarity"] == [(100, 0.25)]
    assert found["feature_probe.bands/stationarity/p90"] == [(100, 0.25)]
    assert found["feature_probe/median_decay_age"] == [(100, 6.0)]
    assert found["feature_probe/median_decay_ratio"] == [(100, 0.75)]
    assert found["feature_probe/median_decay_ratio_plus_fluctuation"] == [(100, 0.875)]


def test_without_a_fluctuation_the_decay_ratio_stands_alone(
    tmp_path: Path, make_report: Make
) -> None:
    """Under Adam there is no such form: no number is made up."""
    layers = ("conv", "head")
    diagnosed = {layer: {"fluctuation": NAN} for layer in layers}
    write(tmp_path, make_report(layers=layers, diagnosed=diagnosed), layer_scalars=True)
    found = scalars(tmp_path)
    assert found["feature_probe/median_decay_ratio"] == [(100, 0.375)]
    assert not any("plus_fluctuation" in tag for tag in found)
    assert "| 0.38 | 0.12 |" in text(tmp_path)


def test_a_report_without_diagnoses_is_written(tmp_path: Path, make_report: Make) -> None:
    """An earlier version's reports: the records' stationarity, no states."""
    write(tmp_path, make_report(diagnosed=None), layer_scalars=True)
    assert scalars(tmp_path)["feature_probe/median_stationarity"] == [(100, 1.5)]
    assert "feature_probe.heatmaps/state" not in events(tmp_path).Tags()["images"]
    assert "How far each layer has come" not in text(tmp_path)


def test_layer_scalars_are_opt_in_and_grouped_by_layer(tmp_path: Path, make_report: Make) -> None:
    """One group of cards a layer: dots stay, slashes go, and every number is the record's."""
    report = make_report(layers=("blocks.0/fc", ""))
    write(tmp_path / "off", report)
    write(tmp_path / "on", report, layer_scalars=True)
    assert not any(tag.startswith("feature_probe.layers.") for tag in scalars(tmp_path / "off"))
    found = {
        tag: v
        for tag, v in scalars(tmp_path / "on").items()
        if tag.startswith("feature_probe.layers.")
    }
    assert len(found) == 8 + 2 * 3
    names = {"blocks.0/fc": "blocks.0.fc", "": "(model)"}
    for record in report.records:
        tag = f"feature_probe.layers.{names[record.layer]}/{record.label}_cosine"
        assert found[tag] == [(100, np.float32(record.cosine))]
    for name in names.values():
        group = f"feature_probe.layers.{name}"
        assert found[f"{group}/stationarity"] == [(100, 1.5)]
        assert found[f"{group}/decay_age"] == [(100, 2.5)]
        assert found[f"{group}/decay_ratio_plus_fluctuation"] == [(100, 0.875)]


@pytest.mark.parametrize("score", SCORES)
def test_the_chosen_score_is_the_one_written(tmp_path: Path, make_report: Make, score: str) -> None:
    """Series, pictures, distributions and table speak of the score, each kind once."""
    report = make_report(changes={("conv", "fact"): {score: 0.123}})
    write(tmp_path, report, score=score, layer_scalars=True)
    tags = events(tmp_path).Tags()
    assert scalars(tmp_path)["feature_probe.layers.conv/fact_" + score] == [
        (100, np.float32(0.123))
    ]
    assert f"feature_probe.heatmaps/{score}/fact" in tags["images"]
    assert f"feature_probe.distributions/{score}/fact" in tags["histograms"]
    assert SCORE_NAMES[score] in text(tmp_path)
    assert "0.123" in text(tmp_path)
    assert ("(0.30)" in text(tmp_path)) == (score == "cosine")
    assert any("/chance" in tag for tag in tags["scalars"]) == (score == "cosine")


def test_the_layout_names_only_series_that_exist(tmp_path: Path, make_report: Make) -> None:
    """Parsed back, margin tags are written tags and every pattern matches exactly one of them."""
    write(tmp_path, make_report(0), make_report(100))
    stored = events(tmp_path).Tensors("custom_scalars__config__")
    assert len(stored) == 1
    layout = layout_pb2.Layout.FromString(stored[0].tensor_proto.string_val[0])
    tags = set(scalars(tmp_path))
    margins, patterns = [], []
    for category in layout.category:
        assert category.title.startswith("feature_probe: ")
        for chart in category.chart:
            margins += [t for s in chart.margin.series for t in (s.value, s.lower, s.upper)]
            patterns += list(chart.multiline.tag)
    assert len(margins) == 3 * (4 + 4 + 1)
    assert set(margins) <= tags
    assert len(patterns) == 3 + 2 * 4 + 4 + 3
    assert all(sum(re.match(pattern, tag) is not None for tag in tags) == 1 for pattern in patterns)


def test_equalities_and_proportionalities_have_their_own_chart_of_shares() -> None:
    """What is to "hold" and what is to be "aligned" is not compared; one kind alone, one chart."""
    titles = {
        tuple(labels): list(
            next(c for t, c in custom_scalars_layout(labels).items() if "share" in t)
        )
        for labels in (["fact", "nfa^1"], ["nfa^1"])
    }
    holds = "equalities: share of layers with the verdict 'holds'"
    aligned = "proportionalities: share of layers with the verdict 'aligned'"
    assert titles == {("fact", "nfa^1"): [holds, aligned], ("nfa^1",): [aligned]}


def test_few_lines_share_a_chart() -> None:
    """Accounts of WᵀW and of WWᵀ have charts of their own, a single account none."""
    layout = custom_scalars_layout(["fact", "nfa^1", "bfact"])
    accounts = next(iter(layout.values()))
    assert list(accounts) == ["accounts of W^T W"]
    assert len(accounts["accounts of W^T W"][1]) == 2
    centred = ["init_centered_nfa^1", "bnfa^1", "nfa^1", "init_centered_enfa^1", "bfact", "fact"]
    accounts = next(iter(custom_scalars_layout(centred).values()))
    grams = ["W^T W", "W W^T", "Wc^T Wc, Wc = W - W0"]
    assert list(accounts) == [f"accounts of {gram}" for gram in grams]
    assert [len(chart[1]) for chart in accounts.values()] == [2, 2, 2]


def test_the_layout_is_left_to_the_user_on_request(tmp_path: Path, make_report: Make) -> None:
    """With layout=False the run's one Custom Scalars page stays the user's."""
    write(tmp_path, make_report(), layout=False)
    assert "custom_scalars__config__" not in events(tmp_path).Tags()["tensors"]


def test_histograms_have_linear_bins_with_the_reports_counts(
    tmp_path: Path, make_report: Make
) -> None:
    """The same 40 bins at every step; after TensorBoard's migration the ends are the extremes."""
    report = make_report(layers=[f"l{i}" for i in range(9)])
    write(tmp_path, report)
    tag = "feature_probe.distributions/cosine/fact"
    stored = events(tmp_path).Histograms(tag)[0].histogram_value
    cosines = [record.cosine for record in report.select(relation="fact")]
    np.testing.assert_allclose(stored.bucket_limit, np.linspace(-1, 1, 41)[1:], atol=1e-12)
    np.testing.assert_array_equal(stored.bucket, np.histogram(cosines, 40, (-1, 1))[0])
    assert stored.num == 9
    assert stored.sum == pytest.approx(sum(cosines))
    migrated = MigratingAccumulator(str(tmp_path)).Reload()
    buckets = np.array(
        np.frombuffer(migrated.Tensors(tag)[0].tensor_proto.tensor_content, np.float32)
    ).reshape(-1, 3)
    assert buckets[:, 2].sum() == 9
    np.testing.assert_allclose([buckets[0, 0], buckets[-1, 1]], [min(cosines), max(cosines)])


def test_a_histogram_of_one_value_fills_its_bin() -> None:
    """A zero-width bucket would not be drawn; rounding beyond 1 stays in the last bin."""
    bins = histogram([1.0000001, 1.0, NAN])
    assert bins is not None
    assert (bins.low, bins.high) == (pytest.approx(0.95), 1.0)
    assert bins.counts == [0] * 39 + [2]
    assert histogram([NAN]) is None


def test_the_heatmap_holds_every_step_so_far(tmp_path: Path, make_report: Make) -> None:
    """After two reports both columns show the report's colours."""
    first = make_report(0, changes={("conv", "fact"): {"cosine": -0.8}})
    second = make_report(100, changes={("conv", "fact"): {"cosine": 0.9}})
    write(tmp_path, first, second)
    picture = pixels(tmp_path, "feature_probe.heatmaps/cosine/fact")
    areas = [(picture == colourise(np.array(x))).all(axis=-1) for x in (-0.8, 0.9)]
    assert all(area.sum() > 2000 for area in areas)
    left, right = (np.argwhere(area)[:, 1].mean() for area in areas)
    assert left < right


def columns_of(picture: NDArray[np.uint8], colour: Sequence[int], right: int) -> tuple[int, float]:
    """How many pixels have a colour in the plot, which ends at ``right``, and where on average."""
    there = np.argwhere((picture[:300, :right] == np.array(colour)).all(axis=-1))
    return len(there), float(there[:, 1].mean()) if len(there) else NAN


def test_greyness_is_that_of_each_step(tmp_path: Path, make_report: Make) -> None:
    """A verdict that changes greys the steps it was given at, and leaves the others."""
    applicable = {"cosine": 0.9, "verdict": "approaching"}
    not_so = {"cosine": 0.8, "verdict": "not applicable"}
    reports = [
        make_report(step, layers=["conv"], changes={("conv", "fact"): given})
        for step, given in ((0, not_so), (100, applicable), (200, applicable))
    ]
    write(tmp_path, *reports)
    picture = pixels(tmp_path, "feature_probe.heatmaps/cosine/fact")
    score, gone = (colourise(np.array(value)).tolist() for value in (0.9, 0.8))
    (grey, left), (coloured, right), (lost, _) = (
        columns_of(picture, colour, 690) for colour in (UNDEFINED, score, gone)
    )
    assert coloured == pytest.approx(2 * grey, rel=0.05)
    assert left < right
    assert lost == 0


def test_verdicts_and_states_have_pictures(tmp_path: Path, make_report: Make) -> None:
    """Layers × steps in the colours of what was said, one a relation and one of the states."""
    reports = [
        make_report(
            step,
            layers=["conv"],
            changes={("conv", "fact"): {"verdict": verdict}},
            diagnosed={"conv": {"state": state}},
        )
        for step, verdict, state in [
            (0, "not yet", "far"),
            (100, "approaching", "approaching"),
            (200, "holds", "at stationarity"),
            (300, "holds", "at stationarity"),
        ]
    ]
    write(tmp_path, *reports)
    tags = [tag for tag in events(tmp_path).Tags()["images"] if "/cosine/" not in tag]
    labels = ("fact", "bfact", "nfa^0.5", "enfa^0.5")
    assert set(tags) == {
        *(f"feature_probe.heatmaps/verdict/{label}" for label in labels),
        "feature_probe.heatmaps/state",
    }
    for tag, words in [
        ("verdict/fact", ("not yet", "approaching", "holds")),
        ("state", ("far", "approaching", "at stationarity")),
    ]:
        picture = pixels(tmp_path, f"feature_probe.heatmaps/{tag}")
        patterns = {**VERDICT_PATTERNS, **STATE_PATTERNS}
        seen = [columns_of(picture, patterns[word].fill, 640) for word in words]
        counts, places = zip(*seen, strict=True)
        assert list(places) == sorted(places)
        assert counts[0] > 10000
        assert counts[2] == pytest.approx(2 * counts[1], rel=0.05)
        assert counts[1] == pytest.approx(counts[0], rel=0.05)


def test_pictures_and_tables_do_not_grow_with_the_square_of_the_run(
    tmp_path: Path, make_report: Make
) -> None:
    """300 reports make few pictures, the last is of the last report, and the file stays small."""
    write(tmp_path, *(make_report(step) for step in range(300)))
    images = events(tmp_path).Images("feature_probe.heatmaps/cosine/fact")
    steps = [event.step for event in images]
    assert steps[:5] == [0, 1, 2, 3, 4]
    assert steps[-1] == 299
    assert len(steps) == len(set(steps)) < 30
    assert all(later <= 1.3 * earlier for earlier, later in pairwise(steps[8:]))
    assert len(scalars(tmp_path)["feature_probe/fact_median_cosine"]) == 300
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12e6


def test_the_table_says_what_its_numbers_mean(make_report: Make) -> None:
    """Scores with chance in brackets, equations, notes, gaps and settings are all there."""
    missing = {"cosine": NAN, "status": "K was not measured", "verdict": "undefined"}
    changes = {("conv", "nfa"): missing}
    written = summary_markdown(make_report(1000, changes=changes))
    assert "Step 1,000" in written
    assert "| layer | fact | bfact | nfa^0.5 | enfa^0.5 | ‖λW+G‖/‖λW‖ |" in written
    row = "| 0.000 (0.30) approaching | 0.010 (0.30) approaching | 0.020 (0.40) aligned |"
    assert f"| blocks.0.fc\\_1 {row}" in written
    row = "| -0.100 (0.30) approaching | -0.090 (0.30) approaching | - undefined |"
    assert f"| conv {row}" in written
    assert "| median of applicable layers | 0.000 (3 of 3 layers) |" in written
    assert "nfa: K was not measured (conv)" in written
    assert "an Embedding is not measured: embed.weight" in written
    assert "jacobian: exact" in written
    for relation in ("fact", "bfact", "nfa", "enfa"):
        equation = RELATIONS[relation].equation.replace("_", "\\_")
        assert equation in written


def test_the_table_explains_the_verdicts_that_occur(make_report: Make) -> None:
    """A verdict that is not there has no line."""
    changes = {("conv", "nfa"): {"verdict": "trivial"}, ("head", "nfa"): {"verdict": "at chance"}}
    written = summary_markdown(make_report(changes=changes))
    for verdict in ("approaching", "aligned", "trivial", "at chance"):
        assert f"\n- {verdict}: " in written
    for verdict in ("holds", "below chance", "undefined"):
        assert f"\n- {verdict}: " not in written
    row = next(line for line in written.splitlines() if line.startswith("| median of"))
    assert row.split(" | ")[3] == "0.070 (2 of 3 layers)"


def test_the_layers_table_has_every_number_of_rest(make_report: Make) -> None:
    """Age, window, stationarity, λ̂/λ with its fluctuation, drift, norm drift, invariance, state."""
    diagnosed = {
        "conv": {"decay_age": NAN, "scale_invariance": "rows", "state": "not applicable"},
        "head": {"norm_drift": NAN, "decay_ratio": NAN},
    }
    written = summary_markdown(make_report(diagnosed=diagnosed))
    numbers = "0.25 | 1.5 | 0.38 + 0.5 = 0.88 | 0.12 | -0.062"
    assert f"| blocks.0.fc\\_1 | 2.5 | {numbers} | none | approaching |" in written
    assert f"| conv | - | {numbers} | rows | not applicable |" in written
    assert "| head | 2.5 | 0.25 | 1.5 | - | 0.12 | - | none | approaching |" in written


def test_twelve_layers_are_explained_and_the_others_counted(make_report: Make) -> None:
    """In the words of report.explain, then how many there are of each verdict."""
    names = [f"l{i}" for i in range(15)]
    changes: dict[tuple[str, str], Mapping[str, Any]] = {
        ("l13", "fact"): {"verdict": "holds"},
        ("l14", "fact"): {"verdict": "holds"},
        ("l14", "nfa"): {"verdict": "trivial"},
    }
    report = make_report(layers=names, changes=changes)
    written = summary_markdown(report)
    lines = written.partition("### The layers in words\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(lines) == 12 + 4
    for name, line in zip(names, lines[:12], strict=False):
        assert f"layer {name}" in line
        assert len(line) > 100
    assert lines[12] == "- the other 3 layers, fact: 2 holds, 1 approaching"
    assert lines[14] == "- the other 3 layers, nfa^0.5: 2 aligned, 1 trivial"
    assert "the other" not in summary_markdown(make_report(layers=names[:12]))


def test_a_bar_or_a_tag_in_a_name_does_not_break_the_table(make_report: Make) -> None:
    """Markdown's own characters in names are shown as they are."""
    row = next(
        line
        for line in summary_markdown(make_report(layers=("a|b<i>*c*",))).splitlines()
        if line.startswith("| a")
    )
    assert row.startswith("| a\\|b&lt;i>\\*c\\* | -0.100 (0.30) approaching |")


def test_every_relation_and_score_has_words() -> None:
    """A relation, score, verdict or state that is added must be given its name in pictures."""
    assert set(PREDICTIONS) == set(RELATIONS)
    assert set(SCORE_NAMES) == set(SCORES)
    assert set(VERDICT_PATTERNS) == set(VERDICTS)
    assert set(STATE_PATTERNS) == set(get_args(State))


def test_matrices_are_drawn_for_the_layers_asked(tmp_path: Path, make_report: Make) -> None:
    """Names and patterns choose layers; what is drawn is what the report forms."""
    kept = {"conv": statistics(groups=3), "blocks.0.fc_1": statistics(), "head": statistics()}
    write(tmp_path, make_report(statistics=kept), matrices=("conv", "blocks.*"))
    tags = [tag for tag in events(tmp_path).Tags()["images"] if "matrices" in tag]
    assert tags == ["feature_probe.matrices/conv", "feature_probe.matrices/blocks.0.fc_1"]
    picture = pixels(tmp_path, "feature_probe.matrices/blocks.0.fc_1")
    frames = (picture[150] == 95).all(axis=-1).sum()
    assert frames >= 8


def test_matrices_that_were_not_measured_are_left_out(tmp_path: Path, make_report: Make) -> None:
    """Without K there is no AGOP panel, and the others are drawn."""
    kept = {"conv": statistics(jacobian=None)}
    write(tmp_path, make_report(layers=["conv"], statistics=kept), matrices="conv")
    picture = pixels(tmp_path, "feature_probe.matrices/conv")
    assert (picture[150, 440 + 16 + 200 :] == 255).all()


def test_matrices_without_kept_sums_are_an_error_once(tmp_path: Path, make_report: Make) -> None:
    """Everything else is written, the reason is raised at the first report only."""
    sink = TensorBoardSink(tmp_path, matrices="conv")
    with pytest.raises(NotMeasuredError, match="keep_matrices=True"):
        sink.write(make_report(0))
    sink.write(make_report(100))
    sink.close()
    assert [s for s, _ in scalars(tmp_path)["feature_probe/fact_median_cosine"]] == [0, 100]


def test_matrices_of_no_layer_are_an_error(tmp_path: Path, make_report: Make) -> None:
    """A pattern that matches nothing names the layers there are."""
    sink = TensorBoardSink(tmp_path, matrices=["encoder.*"])
    with pytest.raises(ConfigurationError, match=r"matches no layer; layers: conv, blocks"):
        sink.write(make_report())
    sink.close()


def test_a_users_writer_is_written_through_flushed_and_left_open(
    tmp_path: Path, make_report: Make
) -> None:
    """One event file, readable after each report; the user goes on writing after close."""
    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer=writer)
        sink.write(make_report(0))
        assert "feature_probe/fact_median_cosine" in scalars(tmp_path)
        sink.write(make_report(100))
        sink.close()
        writer.add_scalar("loss", 1.0, 100)
    assert len(list(tmp_path.iterdir())) == 1
    assert scalars(tmp_path)["loss"] == [(100, 1.0)]
    assert len(scalars(tmp_path)["feature_probe/fact_median_cosine"]) == 2


def test_a_users_closed_writer_is_not_reopened(tmp_path: Path, make_report: Make) -> None:
    """Its next use would open a second event file: write says so, close does nothing."""
    writer = SummaryWriter(tmp_path)
    sink = TensorBoardSink(writer=writer)
    sink.write(make_report(0))
    writer.close()
    with pytest.raises(FeatureProbeError, match="has been closed: close it after"):
        sink.write(make_report(100))
    sink.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_our_own_file_is_closed(tmp_path: Path, make_report: Make) -> None:
    """After close, and a second close, there is one complete file."""
    sink = write(tmp_path, make_report())
    sink.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert "feature_probe/fact_median_cosine" in scalars(tmp_path)


def test_a_sink_without_reports_closes(tmp_path: Path) -> None:
    """A run that never reported leaves no trace but the file."""
    write(tmp_path)
    assert scalars(tmp_path) == {}


def test_a_layer_that_comes_late_is_drawn(tmp_path: Path, make_report: Make) -> None:
    """Layers may differ between reports."""
    write(tmp_path, make_report(0, layers=["a"]), make_report(1, layers=["a", "b"]))
    picture = pixels(tmp_path, "feature_probe.heatmaps/cosine/fact")
    assert (picture == UNDEFINED).all(axis=-1).sum() > 1000


def test_exactly_one_of_folder_and_writer(tmp_path: Path) -> None:
    """Neither and both are refused."""
    with pytest.raises(ConfigurationError, match="exactly one of log_dir and writer"):
        TensorBoardSink()
    with (
        SummaryWriter(tmp_path) as writer,
        pytest.raises(ConfigurationError, match="exactly one of log_dir and writer"),
    ):
        TensorBoardSink(tmp_path, writer=writer)


def test_an_unknown_score_is_refused(tmp_path: Path) -> None:
    """The message lists the scores, and no file is opened."""
    with pytest.raises(ConfigurationError, match="unknown score 'r2'; choose from pearson, cosine"):
        TensorBoardSink(tmp_path / "run", score="r2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", ["", "runs/a"])
def test_a_folder_that_is_or_goes_through_a_file_is_refused(tmp_path: Path, inside: str) -> None:
    """What cannot be written, by anyone, is said at construction."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot write to log_dir=.*can be written to"):
        TensorBoardSink(tmp_path / "file" / inside)


def test_the_hint_is_a_line_for_the_shell(tmp_path: Path) -> None:
    """A folder with a space is quoted."""
    sink = write(tmp_path / "my runs")
    assert sink.dashboard_hint() == f"tensorboard --logdir '{tmp_path}/my runs'"


def test_importing_the_sinks_does_not_import_tensorboard() -> None:
    """The import of the package stays light."""
    code = (
        "import sys, feature_probe.sinks;"
        "print('tensorboard' in sys.modules, 'matplotlib' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.split() == ["False", "False"]
