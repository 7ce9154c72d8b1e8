"""The experiments of examples/papers at their small settings: what they find and write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")

import centered_fig1
import centered_fig2
import fact_fig11
import table
from paper_lab import Results, Row


def run(script: ModuleType, out: Path, *options: str) -> tuple[Results, dict[str, float]]:
    """The results of a script at its small setting, and its means by what they are."""
    results = script.main(["--fast", "--out", str(out), *options])
    assert results.fast
    written = json.loads((out / f"{results.name}_fast.json").read_text(encoding="utf-8"))
    assert [Row(**row) for row in written["rows"]] == results.rows
    assert (out / f"{results.name}_fast.png").stat().st_size > 5000
    return results, {row.what: row.values[0] for row in results.rows}


def test_k_is_aligned_and_its_eigenvectors_matter(tmp_path: Path) -> None:
    """WᵀKW agrees with WᵀW far better than with random eigenvectors, in both readings."""
    _, found = run(centered_fig1, tmp_path)
    for reading in centered_fig1.READINGS:
        own = found[f"{reading}: ρ(WᵀW, WᵀKW)"]
        drawn = found[f"{reading}: ρ(WᵀW, WᵀQW), Q of K's spectrum, one draw"]
        level = found[f"{reading}: the same by the record, `shared_weight_cosine`"]
        assert own > 0.75
        assert drawn < 0.7
        assert abs(drawn - level) < 0.2
        assert own > level + 0.15


@pytest.mark.parametrize(("decay", "name"), [("0", "centered_fig2"), ("2", "centered_fig8")])
def test_the_init_centred_score_is_high_whatever_the_scale(
    decay: str, name: str, tmp_path: Path
) -> None:
    """Where the initial weights are large the init-centred NFA is far above the uncentred one."""
    results, found = run(centered_fig2, tmp_path, "--decay", decay)
    assert results.name == name
    for layer in (1, 2):
        centred = found[f"layer {layer}, init-centred, s = 1: at the end"]
        assert centred > found[f"layer {layer}, uncentred, s = 1: at the end"] + 0.1
        assert found[f"layer {layer}, init-centred: lowest, any setting, any step"] > 0.5


def test_deep_linear_networks_agree_with_fact(tmp_path: Path) -> None:
    """FACT comes near 1, and 1/L is the best power of those tried."""
    _, found = run(fact_fig11, tmp_path, "--depth", "2")
    assert found["layer 1: cosine of FACT"] > 0.97
    powers = {what: value for what, value in found.items() if "AGOP^" in what}
    assert max(powers, key=lambda what: powers[what]) == "layer 1: cosine of AGOP^(1/L)"
    assert len(powers) == len(fact_fig11.POWERS)


def test_the_table_is_made_of_the_results_in_the_repository() -> None:
    """examples/README.md says what papers/results holds, with a command that there is."""
    text = table.README.read_text(encoding="utf-8")
    assert table.table() in text
    commands = re.findall(r"`python (examples/papers/\S+\.py)[^`]*`", text)
    assert commands
    root = table.README.parent.parent
    assert all((root / script).exists() for script in commands)
    assert all(
        (table.README.parent / picture).exists()
        for picture in re.findall(r"\]\((papers/\S+png)\)", text)
    )


def test_a_row_says_its_mean_and_spread() -> None:
    """Over seeds the standard deviation; of one seed the value alone."""
    assert Row("x", "", [1.0, 2.0, 3.0]).ours == "2.000 ± 1.000"
    assert Row("x", "", [0.5]).ours == "0.500"
