"""The experiments of examples/papers at their small settings: what they find and write."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from feature_probe import measure

pytest.importorskip("matplotlib")

import centered_dip
import centered_fig1
import centered_fig2
import centered_fig4
import centered_fig5
import centered_training
import fact_fig11
import table
from paper_lab import Results, Row, mlp


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


def test_without_the_mean_jacobian_the_score_does_not_fall(tmp_path: Path) -> None:
    """Under every change Cov(J) in the place of K gives a higher lowest score."""
    _, found = run(centered_dip, tmp_path)
    changes = [what.removesuffix(": at the end") for what in found if what.endswith("at the end")]
    assert len(changes) == 2
    for change in changes:
        assert found[f"{change}, Cov(J) for K: lowest"] > found[f"{change}: lowest"] + 0.02
        assert found[f"{change}: at the end"] >= found[f"{change}: lowest"]


def test_the_change_of_the_jacobians_matters_late_and_from_small_weights(tmp_path: Path) -> None:
    """Fig. 4's ratio is small early and where the initial weights are large."""
    _, found = run(centered_fig4, tmp_path)
    large, small = "s = 1, rate 0.01", "s = 0.0001"
    for layer in (1, 2):
        early = {s: found[f"layer {layer}, {s}: at time 20"] for s in (large, small)}
        assert 0 < early[large] < 0.2
        assert early[large] < early[small] / 2
        assert found[f"layer {layer}, {large}: at the end"] > 2 * early[large]


def test_the_ptk_centred_score_decreases(tmp_path: Path) -> None:
    """Fig. 5: in both layers and spectra, from every scale run."""
    _, found = run(centered_fig5, tmp_path)
    early = {
        what: value for what, value in found.items() if "at time 20" in what and "Cov" not in what
    }
    assert len(early) == 8
    for what, value in early.items():
        assert found[what.replace("at time 20", "at the end")] < value - 0.03


def test_the_mean_jacobian_is_taken_out_of_k() -> None:
    """Cosine and share against J example by example, J by autograd, Cov(J) by numpy."""
    torch.manual_seed(0)
    model = mlp((5, 7, 6, 1)).double()
    before = copy.deepcopy(model)
    x = torch.randn(30, 5, dtype=torch.float64)
    y = x[:, :1] * x[:, 1:2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    report = measure(
        model, [(x, y)], F.mse_loss, powers=1.0,
        relations=("init_centered_nfa", "ptk_centered_nfa"),
        initial_weights=before.state_dict(), progress=False,
    )  # fmt: skip
    for layer in centered_training.LAYERS:
        index = int(layer)
        rows, rows_before = (
            np.stack(
                [jacobian(net[index + 1 :], one)[0].numpy() for one in net[: index + 1](x).detach()]
            )
            for net in (model, before)
        )
        initial = before[index].weight.detach().numpy()
        change = model[index].weight.detach().numpy() - initial
        gram = change.T @ change
        spread = change.T @ np.cov(rows.T, bias=True) @ change
        whole = change.T @ (rows.T @ rows / len(rows)) @ change
        mean = centered_training.mean_jacobian(model, index, x)
        assert np.allclose(mean, rows.mean(0), rtol=1e-12, atol=0)
        of_mean = centered_training.of_mean(model, before, layer, x)
        found = centered_training.apart(report, layer, of_mean)
        cosine = (gram * spread).sum() / np.linalg.norm(gram) / np.linalg.norm(spread)
        assert found[centered_training.SPREAD] == pytest.approx(cosine, abs=1e-9)
        share = 1 - np.trace(spread) / np.trace(whole)
        assert found[centered_training.MEAN_SHARE] == pytest.approx(share, abs=1e-9)
        moved = change @ (rows.mean(0) @ change) / np.linalg.norm(rows.mean(0) @ change)
        along = (moved**2).sum() / (change**2).sum()
        assert found[centered_training.GRAM_SHARE] == pytest.approx(along, abs=1e-9)
        gram = initial.T @ initial
        spread = initial.T @ np.cov((rows - rows_before).T, bias=True) @ initial
        cosine = (gram * spread).sum() / np.linalg.norm(gram) / np.linalg.norm(spread)
        found = centered_fig5.apart(report, layer, of_mean)
        assert found[centered_fig5.SPREAD] == pytest.approx(cosine, abs=1e-9)


def test_report_and_mean_jacobian_are_of_the_same_weights() -> None:
    """In a linear network every J is the mean, so that K less its part is nothing at all times."""
    setting = centered_training.Setting(0.1, activation=nn.Identity)
    found = centered_training.train(
        0, setting, ("init_centered_nfa",), fast=True, read=centered_training.apart
    )
    for layer in centered_training.LAYERS:
        shares = found[layer, centered_training.MEAN_SHARE][1:]
        assert [time for time, _ in shares] == list(centered_training.TIMES_FAST[1:])
        assert all(share == pytest.approx(1, abs=1e-5) for _, share in shares)


def test_mirrored_points_have_no_linear_part() -> None:
    """Σ y x = 0 over the training points; y is even. Labels have standard deviation 1."""
    x, y = centered_training.data(64, mirrored=True)
    assert x.shape == (64 + 2048, 32)
    assert (x[:64].T @ y[:64]).abs().max() < 1e-4
    assert y[:64].std().item() == pytest.approx(1, abs=1e-5)
    x, y = centered_training.data(64, decay=2)
    assert (x[:64].T @ y[:64]).abs().max() > 0.1
    values = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    assert torch.allclose(values[:3], 1 / (1 + torch.arange(3.0) ** 2), rtol=0.15)


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
