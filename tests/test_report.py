"""Reports: lookup, tables, matrices and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import (
    RELATIONS,
    ConfigurationError,
    Coverage,
    FeatureProbe,
    FeatureProbeError,
    NotMeasuredError,
    Record,
    Report,
    measure,
)
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.explanation import explain
from feature_probe.reports.phrases import VERDICT_WORDS
from feature_probe.reports.record import VERDICTS

LAMBDA = 0.05


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network() -> nn.Sequential:
    """A grouped convolution, a Linear and a head with one output, so that some numbers are NaN."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(),
        nn.Linear(5, 1),
    ).double()  # fmt: skip


BATCH = (normal(6, 2, 4), normal(6, 1, seed=1))


def make_report(**options: Any) -> Report:
    """All relations of the network by `measure`."""
    settings: dict[str, Any] = {
        "relations": RELATIONS,
        "powers": (0.5, 1.0),
        "weight_decay": LAMBDA,
        "initial_weights": {name: value / 2 for name, value in network().state_dict().items()},
        "progress": False,
        "step": 17,
        **options,
    }
    return measure(network(), [BATCH], F.mse_loss, **settings)


def same(a: Record, b: Record) -> bool:
    """Equal field by field, NaN equal to NaN."""
    for entry in dataclasses.fields(Record):
        one, two = getattr(a, entry.name), getattr(b, entry.name)
        both_nan = isinstance(one, float) and isinstance(two, float) and one != one and two != two
        if not both_nan and (one != two or type(one) is not type(two)):
            return False
    return True


def record(**changes: Any) -> Record:
    """A record of round numbers."""
    values: dict[str, Any] = {
        "layer": "fc",
        "relation": "nfa",
        "power": 0.5,
        "step": 3,
        "pearson": 0.25,
        "cosine": 0.5,
        "trace_free_cosine": 0.125,
        "chance_cosine": 0.1,
        "shared_weight_cosine": 0.2,
        "residual": math.nan,
        "scale": 2.0,
        "weight_decay": 0.1,
        "stationarity": math.nan,
        "decay_ratio": math.nan,
        "cosine_low": math.nan,
        "cosine_high": math.nan,
        "premise": "",
        "n_examples": 4,
        "n_rows": 8,
        "n_kept": 2,
        "status": "ok",
    }
    return Record(**(values | changes))


# --------------------------------------------------------------------------- data


def test_report_round_trip() -> None:
    """`to_dict` is strict JSON; `from_dict` gives the records, coverage and settings back."""
    report = make_report()
    text = json.dumps(report.to_dict(), allow_nan=False)
    back = Report.from_dict(json.loads(text))
    assert back.step == report.step == 17
    assert len(back.records) == len(report.records) == 3 * (6 + 2 * 10)
    assert all(same(a, b) for a, b in zip(back.records, report.records, strict=True))
    assert back.coverage == report.coverage
    assert back.settings == report.settings
    assert back.statistics == {}
    assert len(back.diagnoses) == len(report.diagnoses)
    assert [d.to_dict() for d in back.diagnoses] == [d.to_dict() for d in report.diagnoses]
    assert json.dumps(back.to_dict(), allow_nan=False) == text
    assert any(math.isnan(r.cosine) for r in back.records)
    assert str(back) == str(report)


@pytest.mark.parametrize(
    "changes",
    [{}, {"power": None, "n_kept": None}, {"cosine": math.nan, "status": "not finite"},
     {"premise": "frozen", "layer": "ünïcode"}],
    ids=str,
)  # fmt: skip
def test_record_round_trip(changes: dict[str, Any]) -> None:
    """A record is plain data: NaN is None in JSON and NaN again afterwards; None stays None."""
    one = record(**changes)
    data = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert same(Record.from_dict(data), one)
    assert data["residual"] is None
    assert set(data) == {entry.name for entry in dataclasses.fields(Record)}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Record) if f.type == "float"])
def test_every_number_of_a_record_may_be_nan(name: str) -> None:
    """No float field is forgotten on the way to JSON and back."""
    one = record(**{name: math.nan})
    data = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert data[name] is None
    assert math.isnan(getattr(Record.from_dict(data), name))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities_are_valid_json_too(value: float) -> None:
    """JSON has no infinity: it becomes None."""
    assert json.dumps(record(scale=value).to_dict(), allow_nan=False)


def test_the_comparison_of_records_sees_differences() -> None:
    """`same` is not always true."""
    assert same(record(), record())
    assert not same(record(), record(cosine=0.51))
    assert not same(record(), record(cosine=math.nan))
    assert not same(record(), record(power=None))


# --------------------------------------------------------------------------- lookup


def test_layers_and_labels() -> None:
    """Layers in model order, relations with their powers in the order asked."""
    report = make_report(relations=("nfa", "fact"), powers=(1.0, 0.5))
    assert report.layers == ("0", "3", "5")
    assert report.labels == ("nfa^1", "nfa^0.5", "fact")
    assert report.records[0].label == "nfa^1"


def test_select() -> None:
    """Every argument given must match; none given is all."""
    report = make_report()
    assert report.select() == report.records
    assert {r.relation for r in report.select(layer="3")} == set(RELATIONS)
    assert {(r.layer, r.power) for r in report.select(relation="nfa")} == {
        (layer, power) for layer in ("0", "3", "5") for power in (0.5, 1.0)
    }
    assert [r.relation for r in report.select("3", power=0.5)] == [
        "nfa", "enfa", "bnfa", "benfa", "init_centered_nfa", "init_centered_enfa",
        "double_centered_nfa", "ptk_centered_nfa", "alignment_speed", "update_alignment_speed",
    ]  # fmt: skip
    assert report.select(layer="nowhere") == []


def test_record() -> None:
    """The one record that matches, with the power where there are several."""
    report = make_report()
    assert report.record("3", "nfa", 0.5) is report.select("3", "nfa", 0.5)[0]
    assert report.record("3", "fact").power is None


@pytest.mark.parametrize(
    "arguments", [("4", "fact"), ("3", "nfa", 0.3), ("3", "NFA", 0.5)], ids=str
)
def test_no_record(arguments: tuple[Any, ...]) -> None:
    """Where none matches, the message lists layers and relations."""
    with pytest.raises(NotMeasuredError, match="no record matches") as error:
        make_report().record(*arguments)
    assert "0, 3, 5" in str(error.value)
    assert "nfa^0.5" in str(error.value)


def test_several_records() -> None:
    """Where several match, the message names the powers to choose from."""
    with pytest.raises(NotMeasuredError, match=r"give one of power=0\.5, power=1\.0"):
        make_report().record("3", "nfa")


def test_not_measured_is_a_lookup_error() -> None:
    """A caller may catch it as LookupError or FeatureProbeError."""
    assert issubclass(NotMeasuredError, LookupError)
    assert issubclass(NotMeasuredError, FeatureProbeError)


# --------------------------------------------------------------------------- matrices


def test_matrices() -> None:
    """Shapes by side and groups, and the power's default is 1."""
    report = make_report()
    weight = network()[3].weight.detach()
    torch.testing.assert_close(report.matrix("3", "nfm"), weight.T @ weight)
    torch.testing.assert_close(report.matrix("3", "bnfm"), weight @ weight.T)
    for kind, relation in RELATIONS.items():
        if relation.needs == "update" or relation.basis == "motion":
            continue  # frozen weights take no step
        forward = relation.side == "forward"
        assert report.matrix("3", kind).shape == ((8, 8) if forward else (5, 5))
        assert report.matrix("0", kind).shape == ((2, 3, 3) if forward else (2, 2, 2))
        assert report.matrix("3", kind).dtype == torch.float64
    assert torch.equal(report.matrix("3", "nfa"), report.matrix("3", "nfa", 1.0))
    half = report.matrix("3", "nfa", 0.5)
    torch.testing.assert_close(half @ half, report.matrix("3", "nfa"))


def test_a_matrix_at_a_power_that_was_not_scored() -> None:
    """The sums are kept, so any power can be had."""
    third = make_report(powers=1.0).matrix("3", "nfa", 1 / 3)
    torch.testing.assert_close(third @ third @ third, make_report().matrix("3", "nfa"))


@pytest.mark.parametrize("kind", ["agop", "", "nfa^0.5"])
def test_an_unknown_matrix(kind: str) -> None:
    """The message lists the kinds there are."""
    with pytest.raises(ConfigurationError, match="unknown matrix") as error:
        make_report().matrix("3", kind)
    assert all(name in str(error.value) for name in (*RELATIONS, "nfm", "bnfm"))


@pytest.mark.parametrize("kind", ["fact", "bfact_sym", "nfm"])
def test_a_power_where_there_is_none(kind: str) -> None:
    """A power is refused, not ignored."""
    with pytest.raises(ConfigurationError, match=rf"'{kind}' has no power, got power=0.5"):
        make_report().matrix("3", kind, 0.5)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_a_matrix_power_must_be_positive(power: float) -> None:
    """Zero, negative and NaN powers are refused."""
    with pytest.raises(ConfigurationError, match="power must be positive"):
        make_report().matrix("3", "nfa", power)


def test_a_matrix_of_no_layer() -> None:
    """The message lists the layers."""
    with pytest.raises(NotMeasuredError, match=r"no layer '4'; layers: 0, 3, 5"):
        make_report().matrix("4", "nfm")


def test_a_matrix_that_was_not_asked_for() -> None:
    """Only sums that a relation needed are there; the weight always is."""
    report = make_report(relations="fact")
    report.matrix("3", "nfm")
    report.matrix("3", "bfact")
    with pytest.raises(NotMeasuredError, match=r"'nfa' of layer '3' was not measured: not asked"):
        report.matrix("3", "nfa")


def test_a_matrix_that_could_not_be_measured_says_why() -> None:
    """The reason is that of the records."""
    report = make_report(relations=("nfa", "update_fact"))
    assert "measured in the loop" in report.record("3", "update_fact").status
    with pytest.raises(NotMeasuredError, match="measured in the loop"):
        report.matrix("3", "update_fact")


def test_matrices_of_a_wide_layer_are_those_of_its_subspace() -> None:
    """(PW)ᵀ(PKPᵀ)(PW) and PKPᵀ, with P the layer's; FACT and WᵀW in full."""
    report, full = make_report(max_dim=4), make_report()
    statistics = report.statistics["3"]
    subspace = statistics.subspace
    assert subspace is not None
    assert statistics.jacobian is not None
    inside = subspace.matrix(statistics.weight.double())[0]
    expected = inside.mT @ statistics.jacobian[0].double() @ inside
    assert torch.allclose(report.matrix("3", "nfa"), expected)
    assert report.matrix("3", "bnfa").shape == (4, 4)
    for kind in ("fact", "bfact", "nfm", "bnfm"):
        assert torch.equal(report.matrix("3", kind), full.matrix("3", kind))


def test_a_report_from_data_has_no_matrices() -> None:
    """What was written to JSON are the scores."""
    back = Report.from_dict(make_report().to_dict())
    with pytest.raises(NotMeasuredError, match="holds no matrices"):
        back.matrix("3", "nfm")


def train(steps: int, keep: bool) -> list[Report]:
    """Reports of an SGD run, one a step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=LAMBDA)
    probe = FeatureProbe(
        model, optimizer=optimizer, every=1, window=2, keep_matrices=keep, strict=True
    )
    reports = []
    with probe:
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(BATCH[0]), BATCH[1]).backward()
            optimizer.step()
            assert probe.report is not None
            reports.append(probe.report)
    return reports


def test_without_keep_matrices_the_message_names_it() -> None:
    """In the loop matrices are kept on request only, and the error says how to ask."""
    (report,) = train(1, keep=False)
    with pytest.raises(NotMeasuredError, match="keep_matrices=True"):
        report.matrix("3", "nfm")
    assert report.statistics == {}


def test_kept_matrices_are_not_changed_by_training() -> None:
    """A report's matrices stay what they were, however the weights move and sums go on."""
    kinds = ("nfm", "bnfm", "fact", "nfa", "enfa")
    (first,) = train(1, keep=True)
    expected = {kind: first.matrix("3", kind) for kind in kinds}
    start = network()[3].weight.detach()
    torch.testing.assert_close(expected["nfm"], start.T @ start)
    reports = train(5, keep=True)
    for kind in kinds:
        assert torch.equal(reports[0].matrix("3", kind), expected[kind]), kind
        assert not torch.equal(reports[4].matrix("3", kind), expected[kind]), kind


# --------------------------------------------------------------------------- text


def example() -> Report:
    """Two layers with verdicts, one of them with notes."""
    fact: dict[str, Any] = {"relation": "fact", "power": None, "shared_weight_cosine": math.nan}
    zero = "predicted matrix is zero"
    return Report(
        step=3,
        records=[
            record(verdict="at chance", because="cosine 0.50, by chance 0.20 ± 0.30"),
            record(**fact, cosine=-0.75, verdict="not yet", because="decay age 0.4"),
            record(layer="head", cosine=math.nan, verdict="undefined", status=zero, because=zero),
            record(**fact, layer="head", cosine=1.0, verdict="not applicable", premise="frozen"),
        ],
        coverage=Coverage(()),
    )


def test_table() -> None:
    """Layers by relations, aligned, each cosine with its level by chance and its verdict."""
    assert example().table() == (
        "layer       nfa^0.5                  fact\n"
        "-------------------------------------------------\n"
        "fc     0.500 (0.20) chance  -0.750 (0.10) not yet\n"
        "head              -          1.000 (0.10) n/a"
    )


def test_table_with_states() -> None:
    """Where the state of a layer is known it is the last column, in full or shortened."""
    report = dataclasses.replace(
        example(),
        diagnoses=[Diagnosis("fc", state="at stationarity"), Diagnosis("head")],
    )
    header, _, first, second = report.table().split("\n")
    assert header.endswith("  state")
    assert first.endswith("not yet  at stationarity")
    assert second.endswith("n/a      ?")
    assert header.index("state") == first.index("at stationarity") == second.index("?")
    assert "state: has training brought" in str(report)
    frozen = dataclasses.replace(report, diagnoses=[Diagnosis("head", state="not applicable")])
    assert [line.split()[-1] for line in frozen.table().split("\n")] == [
        "state", "-" * len(frozen.table().split("\n")[1]), "yet", "n/a",
    ]  # fmt: skip


def test_no_state_is_no_column() -> None:
    """A column of question marks would say nothing."""
    report = dataclasses.replace(example(), diagnoses=[Diagnosis("fc"), Diagnosis("head")])
    assert report.table() == example().table()
    assert "state:" not in str(report)


def test_every_verdict_has_a_word() -> None:
    """Short, each its own, with a meaning in the line below the table."""
    assert set(VERDICT_WORDS) == set(VERDICTS)
    words = [word for word, _ in VERDICT_WORDS.values()]
    assert len(set(words)) == len(words)
    assert max(map(len, words)) <= 7
    for verdict, (word, meaning) in VERDICT_WORDS.items():
        text = str(Report(3, [record(verdict=verdict)], Coverage(())))
        assert f"0.500 (0.20) {word}\n" in text
        assert f"\n{word}: {meaning}\n" in text


def test_only_verdicts_that_occur_are_explained() -> None:
    """Each once, in the order of the verdicts."""
    lines = str(example()).split("\n")
    assert (
        "not yet: training has not brought the layer to rest; chance: not clearly above chance; "
        "n/a: the relation is not claimed for this layer; -: no number"
    ) in lines


def test_a_verdict_of_a_later_version() -> None:
    """A word that is not known here is shown as it is."""
    assert record(verdict="new").verdict in Report(3, [record(verdict="new")], Coverage(())).table()


@pytest.mark.parametrize("verdict", ["not applicable", "trivial"])
def test_a_number_that_is_not_there_keeps_its_verdict(verdict: str) -> None:
    """A dash with the reason why none is wanted."""
    made = Report(3, [record(verdict=verdict, cosine=math.nan)], Coverage(()))
    assert made.table().split("\n")[-1].split() == ["fc", "-", VERDICT_WORDS[verdict][0]]


def test_the_table_is_not_too_wide() -> None:
    """Six columns and the state with the longest words fit 160 characters."""
    records = [
        record(relation=name, power=power, verdict="approaching")
        for name, power in [("fact", None), ("bfact", None), ("nfa", 0.5), ("nfa", 1.0),
                            ("enfa", 0.5), ("enfa", 1.0)]
    ]  # fmt: skip
    made = Report(3, records, Coverage(()), diagnoses=[Diagnosis("fc", state="at stationarity")])
    assert max(map(len, made.table().split("\n"))) <= 160


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, 0.2),
        ({"shared_weight_cosine": math.nan}, 0.1),
        ({"relation": "bfact", "power": None, "shared_weight_cosine": math.nan}, 0.1),
        ({"shared_weight_cosine": math.nan, "chance_cosine": math.nan}, math.nan),
    ],
    ids=["same W", "none known with the same W", "backward", "neither"],
)
def test_level_by_chance(changes: dict[str, Any], level: float) -> None:
    """The level with the same W where there is one, else that of a random rotation."""
    assert record(**changes).level_by_chance == pytest.approx(level, nan_ok=True)


def test_table_of_another_score() -> None:
    """Any number can be tabulated, with a verdict where it is one of agreement."""
    first, *_ = example().table("pearson").split("\n")[2:]
    assert first.split() == ["fc", "0.250", "chance", "0.250", "not", "yet"]
    assert example().table("residual").split("\n")[2].split() == [
        "fc",
        "-",
        "chance",
        "-",
        "not",
        "yet",
    ]
    assert example().table("weight_decay").split("\n")[2].split() == ["fc", "0.100", "0.100"]
    assert example().table("stationarity").split("\n")[2].split() == ["fc", "-", "-"]


@pytest.mark.parametrize("score", ["correlation", "layer", "n_rows"])
def test_table_of_no_score(score: str) -> None:
    """What is no score is refused, with the scores there are."""
    with pytest.raises(ConfigurationError, match=f"unknown score '{score}'") as error:
        example().table(score)
    assert "trace_free_cosine" in str(error.value)


def test_table_with_a_missing_record() -> None:
    """A relation that a layer does not have is an empty cell."""
    report = example()
    del report.records[3]
    assert report.table().split("\n")[-1] == "head              -"


def test_notes() -> None:
    """Statuses, premises and reasons of what says little, each once, with their layers."""
    assert example().notes() == [
        "fact: decay age 0.4 (fc)",
        "nfa: predicted matrix is zero (head)",
        "fact: frozen (head)",
    ]


def test_a_reason_that_contains_another_is_given_alone() -> None:
    """Status, premise and reason often say the same."""
    texts = {"status": "no", "premise": "no gradient", "because": "no gradient: frozen"}
    one = record(verdict="not applicable", **texts, interval_note="no gradient")
    assert Report(0, [one], Coverage(())).notes() == ["nfa: no gradient: frozen (fc)"]


def test_a_status_that_says_what_a_reason_says() -> None:
    """A part of the status that begins like the reason is left out; a fault is one part."""
    status = "no two entries; no weight decay: direction only"
    one = record(verdict="not applicable", status=status, because="no weight decay: no balance")
    assert Report(0, [one], Coverage(())).notes() == [
        "nfa: no two entries (fc)",
        "nfa: no weight decay: no balance (fc)",
    ]
    fault = record(verdict="undefined", status="fault: OSError: a; b", because="")
    assert Report(0, [fault], Coverage(())).notes() == ["nfa: fault: OSError: a; b (fc)"]


def test_findings_need_no_reason() -> None:
    """Why a relation holds or is at chance is in the record, not in the notes."""
    found = ("holds", "approaching", "aligned", "at chance", "below chance")
    records = [record(layer=word, verdict=word, because=f"so {word}") for word in VERDICTS]
    text = "\n".join(Report(0, records, Coverage(())).notes(limit=None))
    assert {word for word in VERDICTS if f"so {word}" not in text} == set(found)


def test_notes_on_many_layers_are_short() -> None:
    """All layers are said to be all; of many some are named."""
    records = [record(layer=f"l{i}", premise="odd" if i < 6 else "") for i in range(8)]
    assert Report(0, records, Coverage(())).notes() == ["nfa: odd (l0, l1, l2, l3 and 2 more)"]
    records = [record(layer=f"l{i}", status="zero") for i in range(3)]
    assert Report(0, records, Coverage(())).notes() == ["nfa: zero (all layers)"]


def test_one_note_for_relations_with_the_same_layers() -> None:
    """All powers of a relation are the relation; all relations need no name."""
    fact = record(relation="fact", power=None)
    powers = [record(power=0.5, premise="odd"), record(power=1.0, premise="odd")]
    assert Report(0, [fact, *powers], Coverage(())).notes() == ["nfa: odd (fc)"]
    assert Report(0, [*powers, record(power=2.0)], Coverage(())).notes() == [
        "nfa^0.5, nfa^1: odd (fc)"
    ]
    with_fact = [record(relation="fact", power=None, premise="odd"), *powers]
    assert Report(0, with_fact, Coverage(())).notes() == ["odd (fc)"]
    one_more = [*with_fact, record(relation="enfa")]
    assert Report(0, one_more, Coverage(())).notes() == ["fact, nfa: odd (fc)"]


def test_notes_that_differ_in_numbers_are_one() -> None:
    """The first one's numbers stand for the others, and the note says so."""
    records = [record(layer=f"l{i}", premise=f"age 0.{i} of 3") for i in range(3)]
    assert Report(0, records, Coverage(())).notes() == [
        "nfa: age 0.0 of 3 (all layers; other numbers elsewhere)"
    ]


def test_what_concerns_all_layers_comes_first() -> None:
    """Then the others as they come; that nothing was asked for comes last."""
    none = "no interval: measure(jackknife=8) gives one"
    records = [
        record(layer="a", status="only here", premise="everywhere", interval_note=none),
        record(layer="b", status="everywhere", interval_note=none),
        record(layer="c", status="everywhere", interval_note="clipped to [-1, 1]"),
    ]
    assert Report(0, records, Coverage(())).notes() == [
        "nfa: everywhere (all layers)",
        "nfa: only here (a)",
        f"nfa: {none} (a, b)",
        "nfa: clipped to [-1, 1] (c)",
    ]


def test_many_notes_are_counted() -> None:
    """At most twelve lines unless asked for; what went wrong is never cut off."""
    words = "abcdefghijklmno"
    records = [record(layer=word, premise=f"odd {word}") for word in words]
    made = Report(0, records, Coverage(()), {"faults": 1})
    *notes, last, fault = made.notes()
    assert notes == [f"nfa: odd {word} ({word})" for word in words[:11]]
    assert last == "... and 4 more notes: report.explain(layer)"
    assert fault.startswith("1 fault inside")
    assert len(made.notes(limit=None)) == 16
    assert len(made.notes(limit=15)) == 16
    assert len(made.notes(limit=14)) == 15


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, []),
        ({"left_out": 0, "discarded": 0, "faults": 0}, []),
        (
            {"left_out": 1},
            [
                "1 training step left out of this report: something inside the probe failed there "
                "(see the log)"
            ],
        ),
        (
            {"discarded": 2000},
            [
                "2,000 backward passes not counted in this report: no optimizer step used the "
                "gradients (skipped after an overflow, or cleared)"
            ],
        ),
        (
            {"left_out": 3, "discarded": 1, "faults": 4},
            ["3 training steps left", "1 backward pass not counted", "4 faults inside the probe"],
        ),
    ],
)
def test_what_was_not_counted_is_said_in_words(settings: dict[str, int], lines: list[str]) -> None:
    """Nothing where all was well; else below the table, in full sentences."""
    made = Report(5, [record()], Coverage(()), settings)
    notes = made.notes()
    assert len(notes) == len(lines)
    for note, line in zip(notes, lines, strict=True):
        assert note.startswith(line)
        assert note in str(made)
    assert made.to_dict()["settings"] == settings


def test_text_of_a_report() -> None:
    """The step, the table, the notes and the coverage, in this order."""
    text = str(example())
    parts = ["step 3", example().table(), *example().notes(), str(example().coverage)]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


def test_explain() -> None:
    """The three sentences of feature_probe.reports.explanation, for a layer that is there."""
    assert example().explain("fc") == explain(example(), "fc")
    with pytest.raises(NotMeasuredError, match="no layer 'x'; layers: fc, head"):
        example().explain("x")


def test_diagnosis_of_a_layer() -> None:
    """Looked up by name; without one the message lists the layers."""
    one = Diagnosis("fc", state="far")
    assert dataclasses.replace(example(), diagnoses=[one]).diagnosis("fc") is one
    with pytest.raises(NotMeasuredError, match=r"no diagnosis of 'fc'; layers: fc, head"):
        example().diagnosis("fc")


def test_repr_does_not_print_matrices() -> None:
    """The kept tensors are left out of the repr."""
    assert "tensor(" not in repr(make_report())
