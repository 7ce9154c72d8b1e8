"""The table of examples/verdicts.py, its held-out runs and untrained networks, in full: minutes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import cache

import pytest
import verdicts
from verdict_lab.expectations import STAGES, Judged, judge_run
from verdict_lab.training import Setting
from verdict_lab.untrained import small_networks, timm_networks

pytestmark = pytest.mark.slow


@cache
def _judged(held_out: bool) -> list[list[Judged]]:
    settings = verdicts.held_out_settings() if held_out else verdicts.table_settings()
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(judge_run, settings))


def _kinds(found: list[list[Judged]], kind: str) -> list[Judged]:
    return [judged for run in found for judged in run if judged.kind == kind]


def test_the_table_has_every_network_and_optimizer() -> None:
    """Five networks by five optimizers, each with early, windowed and frozen verdicts."""
    found = _judged(held_out=False)
    assert len({run[0].run for run in found}) == len(found) == 25
    assert all({judged.stage for judged in run} == set(STAGES) for run in found)


@pytest.mark.parametrize("held_out", [False, True], ids=["table", "held out"])
def test_no_false_alarm_and_no_wrong_reason(held_out: bool) -> None:
    """Nothing is said to hold, to be aligned or not to apply that is not so."""
    found = _judged(held_out)
    assert _kinds(found, "false alarm") == []
    assert _kinds(found, "wrong reason") == []


def test_every_cell_of_the_table_is_right() -> None:
    """No verdict is wrong or left open whose truth is clear, and the truth is clear for most."""
    found = _judged(held_out=False)
    assert _kinds(found, "miss") == _kinds(found, "undecided") == []
    assert len(_kinds(found, "right")) >= 3 * len(_kinds(found, "open"))


def test_misses_are_few_in_held_out_runs() -> None:
    """Of what is so, little is left unsaid."""
    found = _judged(held_out=True)
    scored = [judged for run in found for judged in run if judged.kind != "open"]
    assert len(scored) >= 1500
    assert len(_kinds(found, "miss")) <= 0.01 * len(scored)
    assert len(_kinds(found, "undecided")) <= 0.02 * len(scored)


def test_scores_at_rest_are_near_one() -> None:
    """At rest FACT's cosine is 0.99; where the window is too noisy, it is over a longer one."""
    at_rest = {
        (stage, noisy): [
            judged
            for run in _judged(held_out=False)
            for judged in verdicts.scores_at_rest(run, stage, noisy=noisy)
        ]
        for stage in ("window", "frozen")
        for noisy in (False, True)
    }
    assert len(at_rest["window", False]) >= 40
    assert len(at_rest["frozen", False]) >= 20
    for stage in ("window", "frozen"):
        assert min(judged.cosine for judged in at_rest[stage, False]) >= 0.99
    assert min((judged.long for judged in at_rest["window", True]), default=1.0) >= 0.99


def test_held_out_runs_are_many_and_varied() -> None:
    """At least 40 runs, with all that the table leaves out."""
    settings: list[Setting] = verdicts.held_out_settings()
    assert len(settings) >= 40
    assert {s.window for s in settings} >= {1, 4, 20}
    assert {s.optimizer for s in settings} >= {"nesterov", "radamw", "nadamw", "muon", "lion"}
    assert {s.network for s in settings} >= {"mlp+ln", "conv+gn", "post-ln"}
    assert {s.schedule for s in settings} == {"constant", "warmup", "cosine"}
    assert any(s.decay == 0 for s in settings)
    assert any(s.only for s in settings)
    assert any(s.frozen for s in settings)


def test_no_untrained_network_is_aligned() -> None:
    """Of more than 3,000 records of small and of timm's networks none is called aligned."""
    seen = [n for n in (*small_networks(112), *timm_networks()) if not n.beside_another]
    assert sum(network.judged for network in seen) >= 3000
    assert [alarm for network in seen for alarm in network.alarms] == []
