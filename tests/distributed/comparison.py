"""What it means that two reports say the same."""

from __future__ import annotations

import math
from typing import Any

import torch

#: Relative, on float64.
EXACT = 1e-9


def assert_same_reports(
    found: list[dict[str, Any]], reference: list[dict[str, Any]], *, sharded: bool = False
) -> None:
    """All numbers and sums of all reports agree, but for what sharded weights have none of."""
    assert [report["step"] for report in found] == [report["step"] for report in reference]
    for one, other in zip(found, reference, strict=True):
        assert_same_report(one, other, sharded=sharded)


def assert_same_report(
    one: dict[str, Any], other: dict[str, Any], *, sharded: bool = False
) -> None:
    """Sums first, which say more than the scores do."""
    assert one["sums"].keys() == other["sums"].keys()
    for name, total in other["sums"].items():
        mine = one["sums"][name]
        assert (mine is None) == (total is None), name
        if total is not None:
            scale = float(total.abs().max())
            torch.testing.assert_close(mine, total, rtol=EXACT, atol=EXACT * scale, msg=name)
    assert one["share"] == other["share"]
    for mine, theirs in zip(one["records"], other["records"], strict=True):
        for name, value in theirs.items():
            if sharded and name == "decay_ratio":
                assert math.isnan(mine[name])
            elif isinstance(value, float):
                same = math.isclose(mine[name], value, rel_tol=EXACT, abs_tol=EXACT)
                assert same or (math.isnan(mine[name]) and math.isnan(value)), (name, mine, theirs)
            else:
                assert mine[name] == value, (name, mine, theirs)


def assert_measured(report: dict[str, Any]) -> None:
    """Every layer has all of its sums, and they are not all zero."""
    assert report["share"] == 1.0
    assert all(total is not None and total.any() for total in report["sums"].values())


def assert_close(one: Any, other: Any) -> None:
    """Nested plain data agree, numbers up to rounding in sums that are added in another order."""
    if isinstance(other, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_close(mine, theirs)
    elif isinstance(other, dict):
        assert one.keys() == other.keys()
        for name, theirs in other.items():
            assert_close(one[name], theirs)
    elif isinstance(other, float):
        assert math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9), (one, other)
    else:
        assert one == other
