"""The experiments on the NFA of deep networks at their small settings, as in test_papers.py."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import nfa_fig2
import nfa_fig3
import nfa_fig4
import nfa_fig8
import nfa_lab
import nfa_rates
import nfa_tables
import nfa_targets
import paper_lab
import torch
from network_stack import NetworkStack
from nfa_lab import DECAYS, Group, Network
from test_papers import run

#: λ of the small settings.
ENDS = (DECAYS[0], DECAYS[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the scripts on the same networks share, so that they are trained once."""
    return tmp_path_factory.mktemp("nfa")


def test_balanced_chains_peak_at_one_over_the_depth(trained: Path) -> None:
    """Balanced: α = 1/L is best whatever λ; unbalanced, at these small λ: not so close."""
    _, found = run(nfa_fig2, trained)
    for decay in ENDS:
        lowest = {
            name: found[f"{name}, λ = {decay:.0e}, cosine at α̃ = 1: L = 2"]
            for name in ("balanced", "unbalanced")
        }
        assert lowest["balanced"] > 0.998
        assert lowest["unbalanced"] < 0.99
        assert found[f"balanced, λ = {decay:.0e}, best α̃ tried: L = 2"] == 1


def test_momentum_aligns_sooner(trained: Path) -> None:
    """In a training too short without momentum, the networks with it are aligned."""
    _, found = run(nfa_fig3, trained)
    ends = {what: value for what, value in found.items() if "cosine at the end" in what}
    assert len(ends) == 4
    for name, times in (("SGD", 200), ("GD", 40)):
        plain = ends[f"{name}, L = 2 ({times}x shorter): cosine at the end"]
        fast = ends[f"{name} with momentum, L = 2 ({times}x shorter): cosine at the end"]
        assert fast > plain + 0.02
        assert fast > 0.97


def test_a_table_has_the_printed_numbers_beside_ours(trained: Path) -> None:
    """All cells of the table, and more alignment with more decay."""
    results, found = run(nfa_tables, trained)
    assert results.name == "nfa_tables_rank5"
    assert len(found) == 6 * len(ENDS)
    printed = {row.what: row.paper for row in results.rows}
    assert printed["L = 2, λ = 1e-05: sgdm"] == "1.00"
    values = [found[f"L = 2, λ = {decay:.0e}: sgdm"] for decay in ENDS]
    assert values[-1] > values[0] + 0.02
    assert values[-1] > 0.97


def test_the_printed_tables_are_whole() -> None:
    """Six blocks of sixteen rows, five columns each; a cell of each table as in the paper."""
    tables = {(r, n): nfa_lab.printed(r, n) for r in (2, 5, 20) for n in (0, 1)}
    assert all(len(table) == 16 * 5 for table in tables.values())
    assert tables[2, 0]["gd", 5, 1e-5] == "0.91"
    assert tables[5, 1]["sgdm", 5, 1e-5] == "0.88"
    assert tables[20, 0]["gdm", 5, 1e-4] == "nan"


def test_the_target_of_large_scale_is_told_from_the_small_one(tmp_path: Path) -> None:
    """Rank 5, two layers: the two readings of the target come out apart."""
    _, found = run(nfa_targets, tmp_path, "--seeds", "1")
    large, small = nfa_targets.READINGS
    assert found[f"rank 5, L = 2, {large}: training diverged"] == 0
    assert found[f"rank 5, L = 2, {large}: cosine"] > found[f"rank 5, L = 2, {small}: cosine"]


def test_a_larger_rate_is_a_row_of_its_own(tmp_path: Path) -> None:
    """Two layers at two rates: both train, and their cosines are told apart."""
    _, found = run(nfa_rates, tmp_path)
    cosines = [
        found[f"SGD with momentum, L = 2, {times} times the rate: cosine"]
        for times in nfa_rates.TIMES[1:]
    ]
    assert all(0.9 < value < 1 for value in cosines)
    assert cosines[0] != cosines[1]


def test_spectra_of_relu_networks(tmp_path: Path) -> None:
    """The AGOP of the target has rank five; W_1ᵀW_1 falls off behind its fifth value."""
    _, found = run(nfa_fig4, tmp_path)
    ratios = [value for what, value in found.items() if "σ_6/σ_5" in what]
    assert len(ratios) == 2
    assert all(0 < ratio < 1 for ratio in ratios)
    written = json.loads(next((tmp_path / "nfa_runs").glob("relu_*")).read_text(encoding="utf-8"))
    values = written["snapshots"][0]["target"]
    assert values[4] > 1e-4
    assert values[5] < 1e-6


def test_targets_gradients_are_autograds() -> None:
    """The AGOP of the target from its formula, against autograd."""
    for plain in (False, True):
        x = (torch.rand(50, 20, dtype=torch.float64) - 0.5).requires_grad_()
        matrix, heads, biases = (part.double() for part in nfa_lab.target(5, 0, plain))
        ((x @ matrix.T + biases).relu() @ heads).sum().backward()
        assert x.grad is not None
        expected = x.grad.T @ x.grad / 50
        found = nfa_fig4.target_agop(x.detach().float(), 0, plain).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
        assert torch.linalg.matrix_rank(matrix, rtol=1e-5) == 5


def test_mnist_at_the_small_setting(tmp_path: Path) -> None:
    """All cells are there, and the networks learn."""
    _, found = run(nfa_fig8, tmp_path)
    accuracies = [value for what, value in found.items() if "accuracy" in what]
    assert len(accuracies) == 2
    assert max(accuracies) > 0.6
    cosines = [value for what, value in found.items() if "cosine" in what]
    assert len(cosines) == 2 * len(ENDS)
    assert all(0 < value <= 1 for value in cosines)


def experiment(out: Path) -> paper_lab.Experiment:
    """A script's run at its small setting."""
    arguments = ["--fast", "--out", str(out)]
    return paper_lab.Experiment(
        "x.py", "x", arguments, shorter=nfa_lab.SHORTER, plain=(0, 1), stored=(0, 1)
    )


def test_stored_shows_what_is_there_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the groups that were trained have rows."""
    nfa_lab.all_seeds("gdm", 2, experiment(tmp_path))
    monkeypatch.setattr(nfa_lab, "_train", lambda _: pytest.fail("trained"))
    _, found = run(nfa_tables, tmp_path, "--stored", "1")
    assert {what.rpartition(": ")[2] for what in found} == {"gdm", nfa_tables.CHANCE}


def test_of_what_is_stored_the_least_shortened_is_shown(tmp_path: Path) -> None:
    """Of runs shortened 20 and 2 times the latter, also where the options say 20."""
    arguments = ["--out", str(tmp_path), "--stored", "1", "--shorter", "20"]
    shown = paper_lab.Experiment(
        "x.py", "x", arguments, seeds=1, shorter=nfa_lab.SHORTER, plain=(0, 1), stored=(0, 1)
    )
    for times in (20, 2):
        group = nfa_lab.group("sgdm", 2, 0, shown, shorter=times)
        nfa_lab.kept(shown, group.name, asdict(group), lambda: [{"epoch": 0, "networks": []}])
    [found] = nfa_lab.all_seeds("sgdm", 2, shown)
    assert found["settings"]["shorter"] == 2
    assert nfa_lab.all_seeds("sgdm", 3, shown) == []


@pytest.mark.parametrize("ends", [0, 50])
def test_a_shorter_run_has_the_same_sum_of_rates(
    ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer epochs at larger rates; the first and the last keep the printed one where asked."""
    rates: list[float] = []
    monkeypatch.setattr(NetworkStack, "step", lambda self, x, y, rate: rates.append(rate))
    for shorter in (1, 10):
        rates.clear()
        group = Group("gd", 2, (Network(1e-3),), shorter=shorter, ends=ends, epochs=300, points=64)
        snapshots = nfa_lab._train(group)
        assert sum(rates) == pytest.approx(1e-3 * 300 + 1e-4 * 100)
        assert snapshots[-1]["epoch"] == 400
        assert len(rates) == (400 if shorter == 1 else 40 if ends == 0 else 2 * 50 + 20 + 100)
        assert max(rates) == pytest.approx(1e-3 * shorter)
        if ends:
            assert set(rates[:ends]) == set(rates[-100 - ends : -100]) == {1e-3}


def test_what_was_trained_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group is read from its file at the same settings only; what diverged is NaN."""
    settings = {"shorter": 100, "plain": True, "points": 128, "epochs": 200, "last": 100}
    group = Group("sgdm", 2, (Network(1e-3),), **settings)
    first = nfa_lab.train(group, experiment(tmp_path))
    assert [snapshot["epoch"] for snapshot in first["snapshots"]] == [0, 200, 300]
    assert 0 < nfa_lab.cosine(first, Network(1e-3)) <= 1
    monkeypatch.setattr(nfa_lab, "_train", lambda _: [{"epoch": 0, "networks": [{"loss": None}]}])
    later = experiment(tmp_path)
    assert nfa_lab.train(group, later) == first
    assert later.spent == first["minutes"]
    other = Group("sgdm", 2, (Network(1e-4),), **settings)
    assert other.name == group.name
    assert math.isnan(nfa_lab.cosine(nfa_lab.train(other, later), Network(1e-4)))
