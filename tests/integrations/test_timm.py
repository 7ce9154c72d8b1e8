"""timm's metadata read right, the probe on timm's models, and the example that trains one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import Kept, assert_same_reports, assert_same_weights, hooks_of
from torch import Tensor, nn

import feature_probe
from feature_probe import ConfigurationError, FeatureProbe
from feature_probe.integrations.timm import Parts, attach, logits, parts

timm = pytest.importorskip("timm")
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import ModelEmaV3, NativeScaler  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {"img_size": 28, "patch_size": 14, "depth": 1, "in_chans": 1, "num_classes": 10}


def small_vit(**options: Any) -> nn.Module:
    """timm's test_vit on 28 pixels, one block deep, always with the same weights."""
    torch.manual_seed(1)
    return timm.create_model("test_vit", **{**SMALL, **options})


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Random images and classes, always the same."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(3, 1, 28, 28, generator=generator),
            torch.randint(10, (3,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "head", "stem", "width"),
    [
        ("resnet18", ("fc",), ("conv1",), 512),
        ("vit_tiny_patch16_224", ("head",), ("patch_embed.proj",), 192),
        ("convnext_atto", ("head.fc",), ("stem.0",), 320),
        ("efficientnet_b0", ("classifier",), ("conv_stem",), 1280),
        ("mixer_s16_224", ("head",), ("stem.proj",), 512),
        ("swin_tiny_patch4_window7_224", ("head.fc",), ("patch_embed.proj",), 768),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist"), ("patch_embed.proj",), 192),
        (
            "crossvit_tiny_240",
            ("head.0", "head.1"),
            ("patch_embed.0.proj", "patch_embed.1.proj"),
            288,
        ),
    ],
)
def test_parts_of_timms_models(
    name: str, head: tuple[str, ...], stem: tuple[str, ...], width: int
) -> None:
    """Head, stem and width are found, and the head is what maps features to classes."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    assert parts(model) == Parts(head, stem, width)
    assert all(model.get_submodule(layer).out_features == 7 for layer in head)


def test_a_config_that_names_no_classifier_leaves_get_classifier() -> None:
    """Without a name in the config, the head is what get_classifier() returns."""
    model = small_vit()
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "classifier": None}
    assert parts(model).head == ("head",)


def test_a_model_without_a_head() -> None:
    """num_classes=0: there is no head, every layer is a feature, and head="only" is refused."""
    model = small_vit(num_classes=0)
    assert parts(model).head == ()
    probe = attach(model)
    probe.detach()
    with pytest.raises(ConfigurationError, match="this model has no classifier among the layers"):
        attach(model, head="only")


def measured(model: nn.Module, **options: Any) -> tuple[str, ...]:
    """The layers in the report of one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
    probe = attach(model, optimizer=optimizer, **options)
    for x, y in batches(1):
        nn.functional.cross_entropy(logits(model(x)), y).backward()
        optimizer.step()
    probe.detach()
    assert probe.report is not None
    assert probe.faults == 0
    return probe.report.layers


FEATURES = (
    "patch_embed.proj",
    *(f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FEATURES),
        ({"head": "include"}, (*FEATURES, "head")),
        ({"head": "only"}, ("head",)),
        ({"include": "*mlp*"}, FEATURES[3:]),
        ({"include": ["head", "*mlp*"]}, FEATURES[3:]),
        ({"include": ["head", "*mlp*"], "head": "include"}, (*FEATURES[3:], "head")),
        ({"exclude": nn.Conv2d, "head": "include"}, (*FEATURES[1:], "head")),
    ],
)
def test_layers_measured(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    """The head is left out, put in or alone; include and exclude choose among the rest."""
    assert measured(small_vit(), **options) == expected


def test_a_distilled_model_that_returns_two_outputs() -> None:
    """Both heads are left out, and f is the first head's logits."""
    torch.manual_seed(1)
    model = timm.create_model("deit_tiny_distilled_patch16_224", embed_dim=12, num_heads=2, **SMALL)
    model.set_distilled_training(True)
    assert measured(model) == FEATURES


def test_the_probe_is_that_of_the_bare_loop() -> None:
    """Weights are bitwise those of the loop without it, reports those of FeatureProbe itself."""
    outcomes = []
    for kind in ("plain", "attach", "bare"):
        model, kept = small_vit(), Kept()
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-2)
        options: dict[str, Any] = {"every": 2, "window": 2, "sinks": [kept]}
        if kind == "attach":
            probe = attach(model, optimizer=optimizer, **options)
        if kind == "bare":
            probe = FeatureProbe(model, optimizer=optimizer, exclude="head", **options).attach()
        for x, y in batches():
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if kind != "plain":
            probe.detach()
        assert hooks_of(model, optimizer) == 0
        outcomes.append((model.state_dict(), kept.reports))
    plain, attached, bare = outcomes
    assert_same_weights(attached[0], plain[0])
    assert_same_reports(attached[1], bare[1])


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled, but CUDA")
def test_timms_scaler_and_moving_average(tmp_path: Path) -> None:
    """NativeScaler hides the step, ModelEmaV3 copies the model: both as in timm's train.py."""
    outcomes = []
    for probed in (False, True):
        model, kept = small_vit(), Kept()
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-2)
        if probed:
            probe = attach(model, optimizer=optimizer, sinks=[kept], every=1, strict=True)
        scaler, average = NativeScaler("cpu"), ModelEmaV3(model, decay=0.5)
        for x, y in batches():
            with torch.autocast("cpu"):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            optimizer.zero_grad()
            average.update(model)
        average.module(x)  # what a process that compiled something leaves in a copy goes here
        if probed:
            probe.detach()
            assert hooks_of(average.module) == 0
            assert [report.step for report in kept.reports] == [0, 1, 2, 3]
            assert all(r.status == "ok" for r in kept.reports[-1].records)
        outcomes.append({**model.state_dict(), **{
            f"average.{name}": value for name, value in average.module.state_dict().items()
        }})  # fmt: skip
    assert_same_weights(outcomes[1], outcomes[0])


def test_a_model_that_is_not_timms_is_refused() -> None:
    """A plain module is refused with what to use instead."""
    with pytest.raises(ConfigurationError, match=r"does not come from timm.create_model\(\)"):
        attach(nn.Sequential(nn.Linear(2, 2)))


def test_an_unknown_head_is_refused() -> None:
    """The choices are listed."""
    with pytest.raises(ConfigurationError, match="one of exclude, include, only, got True"):
        attach(small_vit(), head=True)  # type: ignore[arg-type]


def test_an_output_without_logits_is_refused() -> None:
    """What no classifier returns is told by its type."""
    x = torch.zeros(2, 3)
    assert logits(x) is x
    assert logits((x, x[0])) is x
    with pytest.raises(ConfigurationError, match="returns dict and no logits"):
        logits({"x": x})


def test_the_example_trains_and_reports(tmp_path: Path) -> None:
    """`train_timm.py` prints the features' table, says what it left out, and writes the run."""
    # Not the file itself: first what lets a CUDA build of torchvision import beside CPU torch.
    code = "import runpy, torchvision_stub; runpy.run_path('train_timm.py', run_name='__main__')"
    options = ["--epochs", "1", "--images", "300", "--log-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=EXAMPLES,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(feature_probe.__file__).parents[1]), str(EXAMPLES.parent / "tests")]
            ),
        },
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "features: 64 wide; head left out: head" in done.stdout
    rows = re.findall(r"^(blocks\S+|patch_embed\S+)", done.stdout, flags=re.MULTILINE)
    assert len(rows) == 13
    (run,) = tmp_path.iterdir()
    lines = (run / "feature_probe.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["layer"] for line in lines} == set(rows)
