"""The experiments of examples/papers at their small settings: what they find and write."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")

import centered_fig1
import centered_fig2
import cifar
import fact_fig2
import fact_fig7
import fact_fig8
import fact_fig11
import fact_mlp
import fact_table2
import numpy as np
import table
import torch
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


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of results for the scripts that share their networks."""
    return tmp_path_factory.mktemp("networks")


def test_relu_networks_agree_with_fact_once_decay_has_had_time(networks: Path) -> None:
    """FACT comes near WᵀW, its symmetrisation and the roots nearer; networks are trained once."""
    _, found = run(fact_table2, networks)
    by_name = {what.rpartition(": ")[2]: value for what, value in found.items()}
    assert set(by_name) == {fact_fig2.FORWARD[label] for label in fact_table2.LABELS}
    assert 0.7 < by_name["FACT"] < by_name["√(FACT·FACTᵀ)"]
    (file,) = (networks / "fact_runs").iterdir()
    written = file.stat().st_mtime_ns
    _, by_layer = run(fact_fig2, networks)
    assert file.stat().st_mtime_ns == written
    for name, value in by_name.items():
        assert by_layer[f"layer 1: Pearson's r of {name}"] == value
        assert by_layer[f"{name}, lowest over layers"] <= value
    for name in ("AGOP", "eNFA"):
        assert (
            by_layer[f"layer 1: Pearson's r of √{name}"]
            > by_layer[f"layer 1: Pearson's r of {name}"]
        )


def test_fact_comes_late_and_its_symmetrisation_early(networks: Path) -> None:
    """FACT rises at the end of the cosine schedule; before it the symmetrised one is far above."""
    _, found = run(fact_fig8, networks)
    files = set((networks / "fact_runs").iterdir())
    _, by_layer = run(fact_fig2, networks)  # reads it: a network that is followed serves all
    assert set((networks / "fact_runs").iterdir()) == files
    final = found["layer 1, FACT after all of the epochs"]  # of a curve: kept to five digits
    assert abs(by_layer["layer 1: Pearson's r of FACT"] - final) < 1e-5
    assert final > found["layer 1, FACT after a tenth of the epochs"] + 0.2
    for when in ("a tenth", "half"):
        fact = found[f"layer 1, FACT after {when} of the epochs"]
        assert found[f"layer 1, √(FACT·FACTᵀ) after {when} of the epochs"] > fact + 0.1


def test_decay_age_of_a_cosine_schedule() -> None:
    """Σ ηλ/(1 − μ) over the steps of torch's own cosine schedule."""
    setting = fact_mlp.Setting(points=1000, hidden=3, width=8, epochs=30, seed=0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    age = 0.0
    for _ in range(30):
        age += 16 * schedule.get_last_lr()[0] * 1e-4 / 0.1
        optimizer.step()
        schedule.step()
    assert math.isclose(setting.age, age, rel_tol=1e-9)
    assert setting.name == "points1000_hidden3_width8_epochs30_seed0"


def test_more_images_than_are_shipped_need_data(tmp_path: Path) -> None:
    """It says what to give."""
    with pytest.raises(SystemExit, match="give --data"):
        fact_table2.main(["--points", "6000", "--out", str(tmp_path)])


def test_the_nfa_fails_where_decay_is_small_and_fact_does_not(tmp_path: Path) -> None:
    """At the printed λ the minimiser has rank 1 and both hold; at a small one only FACT does."""
    _, found = run(fact_fig7, tmp_path)
    printed, separating = "minimiser at p = 1e-05, λ = 1e-05", "minimiser at p = 1e-06, λ = 1e-07"
    assert found[f"{printed}: rank of W"] == 1
    assert found[f"{printed}: cosine of FACT"] > 0.999
    assert found[f"{printed}: cosine of AGOP"] > 0.999
    assert found[f"{separating}: cosine of FACT"] > 0.99
    assert found[f"{separating}: cosine of AGOP"] < 0.2


def test_adam_in_closed_form_is_that_of_torch() -> None:
    """300 steps with autograd and torch.optim.Adam come to the same weights."""
    population = fact_fig7.Population.of(1e-5, 1e-3)
    adam = fact_fig7.Adam(population, range(2))
    adam.run(300)
    weights = fact_fig7.started(range(2))
    optimizer = torch.optim.Adam(weights, lr=fact_fig7.RATE)
    for _ in range(300):
        optimizer.zero_grad()
        population.losses(*weights).sum().backward()  # with λ/2 ‖θ‖² in it
        optimizer.step()
    for theirs, ours in zip(weights, adam.weights(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-11)


def test_every_atom_counts_as_much_as_its_probability() -> None:
    """FACT and AGOP of the population by a loop over its atoms."""
    population = fact_fig7.Population.of(0.3, 0.1)
    first, second = (w.detach()[0] for w in fact_fig7.started([3]))
    report = fact_fig7.report(population, first, second)
    fact, agop = np.zeros((4, 4)), np.zeros((4, 4))
    W, a = first.numpy(), second.numpy()
    for x, y, p in zip(
        population.x.numpy(), population.y.numpy(), population.probability.numpy(), strict=True
    ):
        slope = sum(2 * a[j] * (W[j] @ x) * W[j] for j in range(len(a)))
        error = sum(a[j] * (W[j] @ x) ** 2 for j in range(len(a))) - y
        fact -= p * np.outer(2 * error * slope, x) / 0.1
        agop += p * np.outer(slope, slope)
    np.testing.assert_allclose(report.matrix("first", "fact").numpy(), fact, rtol=1e-10)
    np.testing.assert_allclose(report.matrix("first", "nfa", 1.0).numpy(), agop, rtol=1e-10)


def _write_cifar(root: Path) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for number in range(1, 6):
        part = images[2 * number - 2 : 2 * number]
        content = {b"data": part, b"labels": [number, 0], b"filenames": [b"a.png", b"b.png"]}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(content, protocol=2))
    return images


def test_cifar_is_read_from_torchvisions_layout(tmp_path: Path) -> None:
    """Images in their order, in [0, 1], and their classes."""
    images = _write_cifar(tmp_path)
    x, y = cifar.load_cifar10(tmp_path)
    np.testing.assert_allclose(x.numpy(), images / 255, rtol=1e-6)
    assert y.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]


def test_a_file_that_is_no_batch_of_cifar_is_refused(tmp_path: Path) -> None:
    """Nor is anything called that a pickle names."""
    _write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"builtins.print has no place"):
        cifar.load_cifar10(tmp_path)


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


def test_a_result_names_the_command_that_makes_it() -> None:
    """The options are in its name."""
    assert (
        table.command("fact_fig2_points5000_width256") == "fact_fig2.py --points 5000 --width 256"
    )
    assert table.command("fact_fig11_depth3") == "fact_fig11.py --depth 3"
    assert table.command("fact_table2") == "fact_table2.py"


def test_a_row_says_its_mean_and_spread() -> None:
    """Over seeds the standard deviation; of one seed the value alone."""
    assert Row("x", "", [1.0, 2.0, 3.0]).ours == "2.000 ± 1.000"
    assert Row("x", "", [0.5]).ours == "0.500"
