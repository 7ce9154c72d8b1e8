"""The study of a ResNet and a ViT on images: a run of seconds, what is saved, and its page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("timm")

import images_study
from images_lab import page
from images_lab.results import age, counts, leads, load, median, onset, record, save
from images_lab.training import Outcome, Setting, build, build_optimizer, train
from mnist import load_mnist

from feature_probe import RELATIONS

SAVED = [images_study.RESULTS / f"{setting.name}.json.gz" for setting in images_study.SETTINGS]


@pytest.fixture(scope="module")
def small() -> Outcome:
    """The ResNet with BatchNorm at the small setting, the run with most to get wrong."""
    return train(images_study.fast(images_study.SETTINGS[1]), load_mnist())


def test_every_relation_of_every_layer_is_there(small: Outcome) -> None:
    """All reports that are due, with all relations of all ten layers, and finite numbers."""
    assert [report.step for report in small.loop] == small.setting.due
    assert len(small.loop) == small.setting.reports
    for report in small.loop:
        assert {(r.layer, r.relation) for r in report.records} == {
            (layer, name) for layer in small.loop[0].layers for name in RELATIONS
        }
    assert len(small.loop[0].layers) == 10
    last = small.loop[-1]
    assert all(math.isfinite(record(last, layer, "nfa").cosine) for layer in last.layers)
    assert [at.others.step for at in small.frozen] == [0, 12, 24]


def test_the_decay_age_is_that_of_the_schedule(small: Outcome) -> None:
    """Σ ηλ/(1 − μ) of the rates that were set."""
    setting = small.setting
    expected = sum(setting.rate_at(step) for step in range(small.loop[-1].step))
    assert age(small.loop[-1]) == pytest.approx(expected * setting.decay / 0.1, rel=1e-6)


def test_only_weights_before_batchnorm_are_out_of_reach_of_fact(small: Outcome) -> None:
    """FACT is not applicable before BatchNorm, and applies to shortcuts and the head."""
    last = small.loop[-1]
    out = {x for x in last.layers if record(last, x, "fact").verdict == "not applicable"}
    assert out == {"stem", *(f"block{i}.conv{j}" for i in (1, 2, 3) for j in (1, 2))}


def test_the_head_is_trivial(small: Outcome) -> None:
    """K of the last layer is a multiple of the identity."""
    at = small.frozen[-1].others
    assert record(at, "head", "nfa").verdict == "trivial"
    assert record(at, "stem", "nfa").verdict != "trivial"


def test_results_come_back(small: Outcome, tmp_path: Path) -> None:
    """What is saved is what was found, to five digits."""
    back = load(save(small, tmp_path))
    assert back.setting == small.setting
    for ours, theirs in zip(small.loop, back.loop, strict=True):
        assert [r.verdict for r in ours.records] == [r.verdict for r in theirs.records]
        cosines = [[r.cosine for r in report.records] for report in (ours, theirs)]
        assert cosines[1] == pytest.approx(cosines[0], rel=1e-4, nan_ok=True)


def test_onset_is_the_first_report_of_the_last_unbroken_lead(small: Outcome) -> None:
    """A lead that is lost again does not count; one that never comes is None."""
    base = small.loop[-1]
    low = replace(
        record(base, "stem", "nfa"), verdict="aligned", shared_weight_cosine=0.5,
        chance_spread=0.01, chance_arctanh_spread=math.nan,
    )  # fmt: skip

    def report(step: int, cosine: float) -> object:
        return replace(base, step=step, records=[replace(low, cosine=cosine)])

    reports = [report(step, c) for step, c in enumerate((0.9, 0.5, 0.9, 0.8))]
    found = onset(reports, "stem", "nfa")
    assert found is not None
    assert found.step == 2
    assert onset(reports[:2], "stem", "nfa") is None
    assert leads(replace(low, cosine=0.56))
    assert not leads(replace(low, cosine=0.54))  # less than a tenth of the way from 0.5 to 1
    assert not leads(replace(low, cosine=0.56, chance_spread=0.02))  # three spreads
    arctanh = math.atanh(0.9) - math.atanh(0.5)
    assert leads(replace(low, cosine=0.9, chance_arctanh_spread=arctanh / 4.1))
    assert not leads(replace(low, cosine=0.9, chance_arctanh_spread=arctanh / 3.9))


def test_the_script_draws_and_saves(tmp_path: Path) -> None:
    """A run of the ViT alone: its results, and all figures."""
    images_study.main(["--fast", "--only", "vit", "--out", str(tmp_path)])
    (outcome,) = [load(path) for path in tmp_path.glob("*.json.gz")]
    last = outcome.loop[-1]
    qkv = record(last, "blocks.0.attn.qkv", "fact")
    assert qkv.verdict == "not applicable"
    assert "decoupled" in qkv.because
    assert math.isfinite(record(last, "blocks.0.attn.qkv", "update_fact").cosine)
    pictures = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"fact.png", "curves.png", "heatmaps.png", "onset.png"}
    assert min(pictures.values()) > 5000


def test_decay_is_on_matrices_alone() -> None:
    """λ on every weight that is measured, none on biases and norms."""
    setting = Setting("vit", "vit", "adamw", rate=1e-3, decay=0.7, width=8)
    model = build(setting)
    decayed = {id(p) for p in build_optimizer(setting, model).param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        is_weight = parameter.dim() >= 2 and name.endswith("weight")
        assert (id(parameter) in decayed) == is_weight, name
    with pytest.raises(ValueError, match="no network 'vgg'"):
        build(replace(setting, network="vgg"))
    with pytest.raises(ValueError, match="no optimizer 'lion'"):
        build_optimizer(replace(setting, optimizer="lion"), torch.nn.Linear(2, 2))


def test_the_page_is_made_of_the_saved_results() -> None:
    """The tables say what images_lab/results holds, and the figures that it shows are there."""
    path = Path(images_study.__file__).with_suffix(".md")
    text = path.read_text(encoding="utf-8")
    assert page.filled(text, [load(saved) for saved in SAVED]) == text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 4
    assert all((path.parent / picture).exists() for picture in pictures)
    with pytest.raises(ValueError, match="the page has no"):
        page.filled("", [load(saved) for saved in SAVED])


def test_what_the_page_claims_is_in_the_saved_results() -> None:
    """No untrained score is clear of chance; BatchNorm, PTK and the power as the page says."""
    plain, normed, vit = (load(saved) for saved in SAVED)
    for outcome in (plain, normed, vit):
        start, last = outcome.frozen[0].others, outcome.loop[-1]
        tested = [record(start, x, name) for x in start.layers for name in ("nfa", "enfa", "bnfa")]
        assert not any(leads(r) for r in tested if counts(r))
        assert age(last) > 3
        assert all(onset(outcome.loop, x, "ptk_centered_nfa") is None for x in last.layers)
        at = outcome.frozen[-1].others
        assert 0.4 < median(record(at, x, "nfa").fitted_power for x in at.layers) < 0.7
    at, last = normed.frozen[-1].equalities, normed.loop[-1]
    scaled = [x for x in last.layers if record(last, x, "fact").verdict == "not applicable"]
    assert len(scaled) == 7
    assert all(abs(record(at, x, "fact").cosine) < 0.1 for x in scaled)
    middle = normed.loop[5]
    assert median(record(middle, x, "fact").cosine for x in scaled) > 0.2
    head = record(vit.frozen[-1].equalities, "head", "fact")
    assert head.cosine > 0.9
    assert head.stationarity > 0.9
    found = [onset(vit.loop, x, "init_centered_nfa") for x in vit.loop[-1].layers]
    assert len([r for r in found if r is not None]) == 6
