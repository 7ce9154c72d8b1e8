"""The experiments on Recursive Feature Machines at their small settings, as in test_papers.py."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import rfm_modular
import rfm_parity
import torch
from test_papers import run


def test_a_parity_is_found_by_both_updates(tmp_path: Path) -> None:
    """M comes to the coordinates of the parity; without features the same kernel does worse."""
    _, found = run(rfm_parity, tmp_path, "--ridge", "6")
    plain = found["kernel regression: test accuracy of the last iteration"]
    for method in rfm_parity.METHODS:
        if method != "kernel regression":
            assert found[f"{method}: test accuracy of the last iteration"] > max(0.99, plain)
            assert found[f"{method}: share of tr M on the parity's coordinates"] > 0.8
    assert found["kernel regression: share of tr M on the parity's coordinates"] == 0.1


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
