"""What the benchmark compares is the same machine, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("xrfm")

from benchmarks import rfm


def test_both_fit_the_same_machine() -> None:
    """Errors on held-out points agree after three updates of M, which change them."""
    given = rfm.data(400)
    plain = rfm.ours(given, 0)
    learned = rfm.ours(given, 3)
    assert abs(learned - plain) > 0.01
    for solver in ("solve", "cholesky"):
        assert rfm.theirs(solver, given, 3) == pytest.approx(learned, abs=1e-4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read on Linux")
def test_the_peak_is_that_of_the_fit() -> None:
    """At n = 4,000 K in float32 is 61 MiB: one of ours, at least that."""
    kernel = 4 * 4000**2
    assert kernel < rfm.peak(rfm.OURS, 4000) < 3 * kernel


def test_the_table_has_ratios() -> None:
    """Ours over theirs, within rounds; and the committed table is that of the committed numbers."""
    one = {
        "points": 1000,
        "seconds": {rfm.OURS: [1.0, 2.0], rfm.LU: [2.0, 2.0], rfm.CHOLESKY: [1.0, 1.0]},
        "peaks": {rfm.OURS: 2**20, rfm.LU: 4 * 2**20, rfm.CHOLESKY: 2**20},
        "errors": dict.fromkeys(rfm.FITS, 0.5),
    }
    table = rfm.markdown([one], {"cores": 2})
    assert "| 1,000 | xrfm, LU (its default) | 0.75 (0.50 to 1.00) | 1.50 | 0.25 | 1 |" in table
    folder = Path(rfm.__file__).parent
    kept = json.loads((folder / "rfm.json").read_text(encoding="utf-8"))
    shown = (folder / "rfm.md").read_text(encoding="utf-8")
    assert shown == rfm.markdown(kept["sizes"], kept["environment"])
