"""The experiments of examples/papers at their small settings: what they find and write."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
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
import centered_fig3
import centered_fig4
import centered_fig5
import centered_fig6
import centered_training
import cifar
import fact_fig2
import fact_fig7
import fact_fig8
import fact_fig11
import fact_mlp
import fact_table2
import table
from paper_lab import Experiment, Results, Row, mlp


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


def test_the_start_of_alignment_is_as_predicted(tmp_path: Path) -> None:
    """Free probability follows the probe over the balance; the probe's G and K are the dual's."""
    _, found = run(centered_fig3, tmp_path)
    found = {what.replace(" (data sets: 1)", ""): value for what, value in found.items()}
    sized = centered_fig3.SIZED
    assert found[f"{sized}: observed, lowest over γ"] < 0.8
    assert found[f"{sized}: observed, highest over γ"] > 0.95
    assert found[f"{sized}: distance of predicted and observed, mean over γ"] < 0.06
    assert found[f"{sized}: Pearson of predicted and observed over γ"] > 0.95
    assert found[f"{centered_fig3.PRINTED}: observed, lowest over γ"] > 0.999
    [difference] = [value for what, value in found.items() if "against the dual form" in what]
    assert abs(difference) < 1e-10
    whole = found[f"{centered_fig3.INVERTED}, one data set, γ = 0.1: observed"]
    assert found["the same without X₁"] == pytest.approx(whole, abs=1e-4)
    changed = [value for what, value in found.items() if " but " in what]
    assert len(changed) == 2
    assert min(changed) > found[f"{sized}: observed, lowest over γ"] + 0.1


def test_the_first_order_follows_two_hidden_layers(tmp_path: Path) -> None:
    """Prediction and observation fall together for inputs of high rank under ReLU."""
    _, found = run(centered_fig6, tmp_path)
    wide = f"ReLU, {centered_fig6.HIGH}, k = {centered_fig6.SMALL.widths[-1]}"
    for kind in ("observed", "predicted"):
        assert found[f"{wide}: {kind}, lowest between below the lower end"] > 0.005
    gaps = {
        what: value for what, value in found.items() if "mean over α" in what and "𝒦" not in what
    }
    assert len(gaps) == 8
    assert max(gaps.values()) < 0.1
    assert found[f"quadratic, {centered_fig6.LOW}, k = 96: observed at α = 0"] > 0.95


@pytest.mark.parametrize("activation", centered_fig6.ACTIVATIONS)
def test_the_probe_sees_what_the_dual_form_computes(activation: str) -> None:
    """ρ(GᵀG, GᵀKG) of two hidden layers, by measure and by 𝒥 from autograd."""
    torch.manual_seed(0)
    model = centered_fig6.TwoHidden(12, 20, activation)
    x = centered_fig6.inputs(12, 1.0, seed=0)
    y = centered_fig6.labels(x, centered_fig6.HIGH, seed=0)
    assert float(y.std()) == pytest.approx(1)
    speed = centered_fig6.zero_output_alignment_speed(model.jacobian(x), x, y)
    assert speed.cosine < 0.999
    assert centered_fig6.observed(model, x, y) == pytest.approx(speed.cosine, rel=1e-10)


def test_the_closed_form_is_the_mean_of_wide_networks() -> None:
    """E[𝒦] of ReLU by formula, against 40 networks of width 400; its linear part is another."""
    torch.manual_seed(0)
    x = centered_fig6.inputs(8, 0.5, seed=1)
    nets = centered_fig6.networks(8, 400, "ReLU", 40)
    kernel = centered_fig6.expected_kernel(net.jacobian(x) for net in nets).mean
    kernel = kernel / kernel.diagonal().mean()
    for linear in (False, True):
        formula = centered_fig6.relu_kernel(x, linear)
        largest = float((formula / formula.diagonal().mean() - kernel).abs().max())
        assert largest > 0.1 if linear else largest < 0.06


@pytest.mark.parametrize("start", [0, 1])
def test_the_inputs_have_the_spectrum_of_the_text(start: int) -> None:
    """From α = 0, where all eigenvalues are ½, to 1/(1 + k²) in the same basis, from ``start``."""
    flat, x = (centered_fig6.inputs(5, decay, 0, start) for decay in (0.0, 2.0))
    stretched = torch.linalg.solve(flat, x)
    values = torch.linalg.eigvals(stretched).real.square().sort(descending=True).values / 2
    expected = torch.tensor([1 / (1 + k**2) for k in range(start, start + 5)]).double()
    torch.testing.assert_close(values, expected)


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
    """The options that its numbers depend on, where they are not the defaults."""

    def command(*options: str) -> str:
        given = Experiment(
            "there/fact.py", "Title.", options, data="CIFAR", depth=(2, 3), width=(64,),
            stored=(0, 1),
        )  # fmt: skip
        return given.results.command

    assert command() == "fact.py"
    assert command("--depth", "2", "--out", "elsewhere", "--stored", "1") == "fact.py"
    assert command("--seeds", "2", "--depth", "3") == "fact.py --seeds 2 --depth 3"
    assert command("--width", "7", "--data", "/some/place") == "fact.py --width 7 --data ROOT"


def test_a_row_says_its_mean_and_spread() -> None:
    """Over seeds the standard deviation; of one seed the value alone."""
    assert Row("x", "", [1.0, 2.0, 3.0]).ours == "2.000 ± 1.000"
    assert Row("x", "", [0.5]).ours == "0.500"


def test_a_table_of_the_paper_is_a_table_here(tmp_path: Path) -> None:
    """Rows named "row: column" become cells, the paper's number in brackets, notes once a row."""
    result = Results("t", "T", "t.py", False, columns=["a", "b"], note="All of it.", minutes=1.0)
    result.rows = [
        Row("n = 1: a", "0.5", [0.25], "why"),
        Row("n = 1: b", "", [math.nan], "why"),
        Row("n = 2: b", "1", [1.0, 3.0]),
    ]
    (tmp_path / "t.json").write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
    text = table.table(tmp_path)
    assert "|  | a | b | notes |" in text
    assert "| n = 1 | 0.250 (0.5) | diverged | why |" in text
    assert "\n\nAll of it.\n" in text + "\n"
    assert "| n = 2 |  | 2.000 ± 1.414 (1) |  |" in text
