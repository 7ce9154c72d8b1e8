"""Verdicts and states: every branch on numbers made by hand, and a few small runs to the end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
from verdict_lab.expectations import Judged, judge_run
from verdict_lab.training import Setting
from verdict_lab.truth import is_at_rest
from verdict_lab.untrained import small_networks

from feature_probe import Record
from feature_probe.reports.diagnosis import Diagnosis, State
from feature_probe.reports.premises import Premise
from feature_probe.reports.record import VERDICTS
from feature_probe.reports.stationarity import Motion, judge
from feature_probe.reports.verdicts import Standing, judged

NAN = float("nan")
STILL = Motion(norm_drift=0.02, norm_span=1.0)


def record(relation: str, **changes: Any) -> Record:
    """A record with plain numbers: 5,000 examples, λ = 0.01."""
    numbers = dict.fromkeys(
        ("pearson", "trace_free_cosine", "shared_weight_cosine", "residual", "scale",
         "stationarity", "decay_ratio", "cosine_low", "cosine_high"), NAN,
    )  # fmt: skip
    given: dict[str, Any] = {
        **numbers, "layer": "fc", "relation": relation, "step": 100, "cosine": 0.5,
        "power": 1.0 if "nfa" in relation else None, "chance_cosine": 0.2, "chance_spread": 0.02,
        "weight_decay": 0.01, "premise": "", "n_examples": 5000, "n_rows": 5000, "n_kept": None,
        "status": "ok", "form": "" if "nfa" in relation else "window",
    }  # fmt: skip
    return Record(**{**given, **changes})


def standing(state: State = "at stationarity", premise: Premise | None = None) -> Standing:
    """A layer of 10 rows in a state."""
    return Standing(Diagnosis("fc", state=state, because="so it is"), premise, 10)


def verdict(record: Record, standing: Standing) -> str:
    """The verdict alone."""
    return judged(record, standing).verdict


@pytest.mark.parametrize(
    ("stationarity", "noise", "age", "moved", "snapshot", "state", "words"),
    [
        (NAN, 1.0, 9.0, STILL, False, "cannot tell", "not measured"),
        (0.1, 1.0, 0.1, Motion(), False, "at stationarity", "balance: "),
        (0.3, NAN, NAN, Motion(), True, "approaching", "at these weights"),
        (0.6, NAN, NAN, Motion(), True, "far", "at these weights"),
        (0.6, 0.1, 0.9, STILL, False, "far", "decay has had no time"),
        (0.6, 0.1, 2.9, STILL, False, "far", "of about 3"),
        (0.4, 0.1, 2.9, STILL, False, "approaching", "of about 3"),
        (0.6, 0.1, 3.1, STILL, False, "at stationarity", "changes by 2.0%"),
        (0.6, 0.1, 3.1, Motion(norm_drift=-0.3), False, "approaching", "changes by 30.0%"),
        (0.6, 0.1, 3.1, Motion(norm_drift=0.6), False, "far", "changes by 60.0%"),
    ],
)
def test_states(
    stationarity: float,
    noise: float,
    age: float,
    moved: Motion,
    snapshot: bool,
    state: str,
    words: str,
) -> None:
    """Balance counts first, then age, then how steady the norm is; frozen weights have no age."""
    found, because = judge(stationarity, noise, age, moved, snapshot=snapshot)
    assert (found, words in because) == (state, True), because


@pytest.mark.parametrize(
    ("span", "steadiness", "state"),
    [(0.3, 1.0, "at stationarity"), (0.3, 0.7, "approaching"), (0.29, 1.0, "far")],
)
def test_balance_of_a_long_window_stands_in_for_norms(
    span: float, steadiness: float, state: str
) -> None:
    """Without earlier reports λ̂/λ plus its fluctuation says how steady the norm is, if it can."""
    moved = Motion(window_age=span, decay_ratio=steadiness - 0.2, fluctuation=0.2)
    assert judge(0.6, 0.1, 5.0, moved, snapshot=False)[0] == state


@pytest.mark.parametrize(
    ("stationarity", "noise", "state"),
    [
        (0.3, 0.21, "cannot tell"),
        (0.3, 0.19, "approaching"),
        (3.0, 2.1, "cannot tell"),
        (3.0, 1.9, "far"),
        (0.3, NAN, "cannot tell"),
        (3.0, NAN, "cannot tell"),
    ],
)
def test_without_an_age_noise_decides(stationarity: float, noise: float, state: str) -> None:
    """Where the age is undefined, a distance within one and a half of the noise says nothing."""
    assert judge(stationarity, noise, NAN, Motion(), snapshot=False)[0] == state


@pytest.mark.parametrize(
    ("changes", "state", "expected", "words"),
    [
        ({"cosine": 0.95, "residual": 0.15}, "at stationarity", "holds", "so it is"),
        ({"cosine": 0.95, "residual": 0.16}, "at stationarity", "cannot tell", "longer window"),
        ({"cosine": 0.95, "residual": 0.15}, "far", "not yet", "so it is"),
        ({"cosine": 0.94, "residual": 0.2}, "approaching", "approaching", "so it is"),
        ({"cosine": 0.94, "residual": 0.5}, "at stationarity", "cannot tell", "longer window"),
        ({"cosine": 0.94}, "at stationarity", "cannot tell", "cosine 0.94"),
        ({"cosine": 0.5, "residual": 1.0}, "cannot tell", "cannot tell", "so it is"),
        ({"weight_decay": NAN}, "far", "cannot tell", "not known"),
        ({"weight_decay": 0.0}, "far", "not applicable", "no weight decay"),
        ({"cosine": NAN, "status": "no sum"}, "far", "undefined", "no sum"),
        ({"form": "snapshot", "residual": 1.0}, "far", "cannot tell", "scale-invariant"),
        ({"form": "snapshot", "residual": 1.0}, "approaching", "cannot tell", "training loop"),
        ({"form": "snapshot", "cosine": 0.99, "residual": 0.1}, "far", "cannot tell", "so it is"),
        ({"form": "snapshot", "cosine": 0.99, "residual": 0.1}, "at stationarity", "holds", "off"),
        (
            {"form": "snapshot", "cosine": 0.99, "residual": 0.1},
            "approaching",
            "approaching",
            "so it",
        ),
    ],
)
@pytest.mark.parametrize("relation", ["fact", "update_bfact"])
def test_equalities(
    relation: str, changes: dict[str, Any], state: State, expected: str, words: str
) -> None:
    """Numbers that agree hold at rest; else the state says what is missing."""
    made = judged(record(relation, **changes), standing(state))
    assert (made.verdict, words in made.because) == (expected, True), made.because


def test_a_layer_known_not_to_be_invariant_is_not_excused_at_frozen_weights() -> None:
    """What frozen weights leave open is only said where it is open."""
    known = Diagnosis("fc", state="far", scale_invariance="none")
    assert verdict(record("fact", form="snapshot"), Standing(known, None, 10)) == "not yet"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cosine": 0.5}, "aligned"),
        ({"cosine": 0.27, "chance_spread": 0.01}, "at chance"),  # less than a tenth of the way
        ({"cosine": 0.29, "chance_spread": 0.01}, "aligned"),
        ({"cosine": 0.315}, "cannot tell"),  # 5.9 spreads
        ({"cosine": 0.318}, "aligned"),  # 6.1
        ({"cosine": 0.27, "chance_spread": 0.02}, "at chance"),
        ({"cosine": 0.285, "chance_spread": 0.03}, "at chance"),  # 2.9 spreads
        ({"cosine": 0.285, "initial_cosine": 0.1}, "aligned"),  # 4.3
        ({"cosine": 0.285, "chance_spread": 0.03, "initial_cosine": 0.1}, "at chance"),
        ({"cosine": 0.285, "initial_cosine": 0.25}, "cannot tell"),
        ({"cosine": 0.32, "initial_cosine": 0.32}, "aligned"),  # more than training can lack
        ({"cosine": 0.999, "chance_cosine": -0.5, "initial_cosine": 1.0}, "aligned"),
        ({"cosine": 0.5, "chance_arctanh_spread": 0.12}, "at chance"),  # 2.9 of them
        ({"cosine": 0.5, "chance_arctanh_spread": 0.1}, "cannot tell"),  # 3.5
        ({"cosine": 0.5, "chance_arctanh_spread": 0.05}, "aligned"),  # 6.9
        ({"cosine": 0.5, "shared_weight_cosine": 0.49}, "at chance"),
        ({"cosine": 0.5, "shared_weight_cosine": 0.3}, "aligned"),
        ({"cosine": 0.05}, "below chance"),
        ({"cosine": 0.19}, "at chance"),
        ({"cosine": 0.19, "n_examples": 99}, "cannot tell"),
        ({"cosine": 0.05, "n_examples": 99}, "cannot tell"),
        ({"cosine": 0.5, "n_examples": 99}, "aligned"),
        ({"chance_spread": NAN}, "cannot tell"),
        ({"chance_cosine": NAN}, "cannot tell"),
        ({"cosine": NAN}, "undefined"),
        ({"cosine": 1.0, "chance_cosine": 1.0, "chance_spread": 0.0}, "at chance"),
    ],
)
@pytest.mark.parametrize("relation", ["nfa", "benfa"])
def test_proportionalities(relation: str, changes: dict[str, Any], expected: str) -> None:
    """Above chance by spreads and by a share of the way; few examples excuse a low score."""
    made = judged(record(relation, **changes), standing())
    assert made.verdict == expected, made.because
    assert made.because


@pytest.mark.parametrize(
    ("effect", "relation", "expected"),
    [
        ("not applicable", "fact", "not applicable"),
        ("not applicable", "nfa", "not applicable"),
        ("trivial", "nfa", "trivial"),
        ("cannot tell", "fact", "cannot tell"),
        ("cannot tell", "nfa", "cannot tell"),
        ("noted", "fact", "holds"),
        ("noted", "nfa", "aligned"),
    ],
)
def test_premises_come_first(effect: Any, relation: str, expected: str) -> None:
    """A premise decides before the numbers do, unless it is only noted."""
    premise = Premise("because of this", effect)
    made = judged(record(relation, cosine=0.99, residual=0.01), standing(premise=premise))
    assert made.verdict == expected
    assert ("because of this" in made.because) is (effect != "noted")


def test_a_missing_number_is_excused_by_a_premise_that_forbids_it() -> None:
    """Not applicable comes before undefined, undefined before trivial."""
    without = record("nfa", cosine=NAN, status="no sum")
    assert verdict(without, standing(premise=Premise("", "not applicable"))) == "not applicable"
    assert verdict(without, standing(premise=Premise("", "trivial"))) == "undefined"


def test_an_initial_score_stands_in_for_chance_where_that_is_not_known() -> None:
    """A shared weight is judged against step 0, and against chance where that is higher."""
    shared = standing(premise=Premise("shared", "cannot tell"))
    assert verdict(record("nfa", cosine=0.9, initial_cosine=0.5), shared) == "aligned"
    assert verdict(record("nfa", cosine=0.9, initial_cosine=0.9), shared) == "at chance"
    high = record("nfa", cosine=0.9, initial_cosine=0.1, chance_cosine=0.9)
    assert verdict(high, shared) == "at chance"


def test_all_verdicts_are_known() -> None:
    """What the rules return is in the list of verdicts, and no state is unheard of."""
    states = get_args(State)
    found = {
        verdict(record(relation, cosine=cosine, residual=residual), standing(state))
        for relation in ("fact", "nfa")
        for cosine in (-1.0, 0.2, 0.99, NAN)
        for residual in (0.01, 3.0)
        for state in states
    }
    assert found <= set(VERDICTS)
    assert {"holds", "aligned", "not yet", "approaching", "cannot tell", "undefined"} <= found


def _wrong(found: list[Judged]) -> list[Judged]:
    return [judged for judged in found if judged.kind not in ("right", "open", "miss")]


SHORT = Setting("mlp", "momentum", 0.05, 1e-2, age=5.0, batch=64, window=64, settle=1.0, width=12)


@pytest.mark.parametrize(
    "setting",
    [
        SHORT,
        pytest.param(replace(SHORT, network="mlp+bn", window=20), marks=pytest.mark.slow),
        replace(SHORT, optimizer="adamw", lr=1e-2, decay=0.5),
        replace(SHORT, decay=0.0, lr=0.05, age=1.5),
    ],
    ids=lambda setting: f"{setting.name}, λ = {setting.decay:g}",
)
def test_a_small_run_is_judged_right(setting: Setting) -> None:
    """Verdicts and reasons are those that brute force gives; equalities at rest are found."""
    found = judge_run(setting)
    assert _wrong(found) == []
    at_rest = [j for j in found if j.stage == "window" and "holds" in j.expected]
    held = sum(j.verdict == "holds" for j in at_rest)
    assert held >= 0.8 * len(at_rest)
    assert setting.network != "mlp" or not setting.decay or held >= 2
    assert {j.kind for j in found} >= {"right"}
    assert not any(math.isnan(j.cosine) and j.verdict in ("holds", "aligned") for j in found)


def test_untrained_networks_are_not_aligned() -> None:
    """One network of each kind, on few and on many examples, has no aligned layer."""
    seen = [network for network in small_networks(8) if not network.beside_another]
    assert sum(network.judged for network in seen) >= 100
    assert [alarm for network in seen for alarm in network.alarms] == []


def test_an_early_stop_is_not_called_held() -> None:
    """The oracle's own rules: what still moves is not at rest, what is between is left open."""
    assert is_at_rest(0.09, 0.14) == is_at_rest(0.1, None) == "reached"
    assert is_at_rest(0.41, None) == is_at_rest(0.01, 0.61) == "not reached"
    assert is_at_rest(0.3, None) == is_at_rest(0.01, 0.2) == "between"
