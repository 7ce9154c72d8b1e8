"""The cost benchmark's parts that are of no model: growth, exact Jacobians, bfloat16 rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cost
import cost_accuracy
import cost_exact
import cost_growth
import cost_profile
import cost_tables
import cost_targets
import pytest
import torch

from feature_probe.sums import moments, outer

LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are read on Linux"
)


def _page(**parts: Any) -> dict[str, Any]:
    return {"environment": {"cores": 2}, "models": {}, "skipped": {}, **parts}


def test_the_exponent_is_the_power_of_the_last_sizes() -> None:
    """3·size^2.5 behind two values that overhead rules; a line through three that are off one."""
    sizes = [64, 128, 256, 512, 1024]
    values = [1e9, 1e9, *(3 * size**2.5 for size in sizes[2:])]
    assert cost_growth.exponent(sizes, values) == pytest.approx(2.5)
    assert cost_growth.exponent([1, 2, 4], [1, 8, 4]) == pytest.approx(1)  # least squares
    assert cost_growth.exponent(sizes, [7.0] * 5) == pytest.approx(0)
    assert math.isnan(cost_growth.exponent(sizes, [1, 1, 1, -0.1, 1]))


def _point(plain: float, probed: float, report: float, held: int) -> dict[str, Any]:
    seconds = {"plain": [[plain] * 3] * 2, "probed": [[probed] * 3, [probed + 2] * 3]}
    return {"seconds": seconds, "reports": [report + 9, report], "bytes": held}


def test_costs_are_what_is_added() -> None:
    """Medians over rounds of what a step adds, and the shorter report."""
    found = cost_growth.costs(_point(1.0, 1.5, 4.0, 80))
    assert found == pytest.approx({"plain": 1.0, "step": 1.5, "report": 4.0, "bytes": 80.0})


def test_growth_has_a_row_for_each_series() -> None:
    """From numbers whose exponents are 1, 2, 3 and 0."""
    points = [_point(x, x + x**2 - 1, x**3, 2**20) for x in (2.0, 4.0, 8.0)]
    series = {"quantity": "width", "jacobian": "random", "sizes": [2, 4, 8], "points": points}
    page = cost_tables.markdown(_page(growth=[series]))
    row = "| width | random | 2, 4, 8 | 1.00 (8000.0 ms) | 2.00 (64000.0 ms) | 3.00 (512.00 s) |"
    assert f"{row} 0.00 (1.0 MiB) |" in page


def test_positions_are_an_axis_of_the_batch() -> None:
    """``[n, s, features]`` and a label for each; the model is the same."""
    x, y = cost_growth.Size(width=8, batch=4, positions=3).recipe().draw()
    assert (x.shape, y.shape) == ((4, 3, 8), (4, 3))
    assert cost_growth.Size(width=8, batch=4).recipe().draw()[0].shape == (4, 8)


def test_the_quick_parts_run(tmp_path: Path) -> None:
    """Growth and accuracy, from the command to the page, and taken up again."""
    options = ["--quick", "--parts", "growth", "accuracy", "--models", "mlp"]
    cost.main([*options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert [len(one["points"]) for one in found["growth"]] == [3, 3]
    fitted = [cost_growth.exponents(one) for one in found["growth"]]
    assert 0 < fitted[0]["bytes"] < 2.5  # as the width's square, and rows that are kept
    page = (tmp_path / "cost.md").read_text(encoding="utf-8")
    assert page == cost_tables.markdown(found)
    assert "| outputs | exact | 2, 4, 8 |" in page
    assert "| 32 × 32 | bfloat16 | 4,096 | benfa^0.5 |" in page
    assert [row[-1] for row in cost_targets.rows(found)] == ["met", "met"]


@pytest.mark.parametrize("outputs", [1, 3, 16])
def test_an_exact_jacobian_takes_a_pass_an_output(outputs: int) -> None:
    """Through every layer c passes beside the user's one, no weight's gradient, theory's FLOPs."""
    found = cost_exact.work(outputs)
    layers = len(cost_exact.WIDTHS) - 1
    assert found["plain_passes"] == [1] * layers
    assert found["passes"] == [outputs] * layers
    assert found["plain_weight_products"] == layers + 1
    assert found["weight_products"] == 0
    assert found["flops"] == found["flops_said"]


@LINUX
def test_an_exact_jacobian_holds_no_array_of_outputs() -> None:
    """Its peak at 64 outputs is about that at 4: an array [n, c, d] would be several times it."""
    found = cost_exact.exact(1, 0.0, quick=True)
    assert [one["outputs"] for one in found] == [4, 64]
    assert found[-1]["array"] > 2 * found[-1]["peak"] > 0
    assert cost_exact.peak_ratio(found) < 1.5
    assert min(each for one in found for each in cost_exact.seconds_each(one)) > 0
    rows = {row[0]: row for row in cost_targets.rows(_page(exact=found))}
    assert [row[3] for row in rows.values()][:3] == ["1.000", "0.000", "1.000"]
    assert len(rows) == 4
    assert "| 64 | 1 | 0 | 1.000 |" in cost_tables.markdown(_page(exact=found))


def test_time_is_told_in_passes_of_the_round() -> None:
    """A step of 4 for 1, two outputs, passes of half a step: three passes an output."""
    seconds = {"plain": [[1.0] * 3], "exact": [[4.0] * 3], "pass": [[0.5] * 3]}
    one = {"outputs": 2, "seconds": seconds, "bound": {"pass": 8, "gram": 4}}
    assert cost_exact.seconds_each(one) == pytest.approx([3.0])
    assert cost_exact.products_each(one) == pytest.approx(1 + 0.5 * 3 / 2)


def test_bfloat16_rows_are_scored_as_in_float64() -> None:
    """The reference is what the definitions say of the rows, and the probe's sums come near it."""
    width, rows = 24, 4096
    found = cost_accuracy.compared(width, rows, "autocast")
    source = cost_accuracy.Source(width, rows)
    W = source.weight.double()
    batches = [[one.bfloat16().double() for one in batch] for batch in source]
    h, along, down = (torch.cat(kind) for kind in zip(*batches, strict=True))
    gram = W.T @ W
    for label, predicted in {
        "nfa^1": W.T @ along.T @ along @ W,
        "enfa^1": W.T @ down.T @ down @ W,
        "fact": -W.T @ down.T @ h,
    }.items():
        cosine = (gram * predicted).sum() / (gram.norm() * predicted.norm())
        assert found["float64"][label][0] == pytest.approx(float(cosine), abs=1e-6)
    assert found["rows"] == rows
    assert 0 < cost_accuracy.worst(found) < 1e-3
    assert 0 < cost_accuracy.worst(found, "rounded") < 1e-3


def test_sums_in_bfloat16_would_miss_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark sees what it is there for."""
    for module in (outer, moments):
        monkeypatch.setattr(module, "sum_dtype", lambda dtype: dtype)
    found = cost_accuracy.compared(24, 4096, "bfloat16")
    assert cost_accuracy.worst(found) > cost_targets.BF16
    assert cost_targets.rows(_page(accuracy=[found]))[0][-1] == "**missed**"


def test_shares_of_a_profile_add_up() -> None:
    """Each group's part of what is beyond a plain step, the largest first, the rest included."""
    found = cost_profile.shares(3.0, {"a": 0.5, "b": 1.0, "none": 0.0}, taken=1.0)
    assert found == pytest.approx({"b": 0.5, "a": 0.25, "the rest": 0.25})
    assert next(iter(found)) == "b"


def test_a_profile_finds_its_functions() -> None:
    """Every group of a step and a report took some time, and none more than all of it."""
    found = cost_profile.profile("small")
    for total, groups in (("step", "step_groups"), ("report", "report_groups")):
        spent = {name: part for name, part in found[groups].items() if name != "polar roots"}
        assert all(0 < part < found[total] for part in spent.values())
        assert sum(found[groups].values()) < found[total]
    page = cost_tables.markdown(
        {"environment": {}, "models": {"mlp": {"profile": found}}, "skipped": {}}
    )
    assert "levels by chance" in page
