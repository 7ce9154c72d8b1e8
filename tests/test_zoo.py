"""A zoo of published image models: none raises, every matrix is measured or has a reason.

A fixed sample runs by default. All of timm's and torchvision's classification models of up to 12
million parameters, more than 300, run with

    python -m pytest -m slow tests/test_zoo.py

(about half an hour on one core) and leave a table of their coverage, ``zoo*/coverage.jsonl`` in
pytest's folder for temporary files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from feature_probe import FeatureProbe
from feature_probe.reports import assembly
from feature_probe.theory.relations import LayerStatistics

#: Nine models in ten have at least this share of their matrix entries measured.
ENOUGH = 0.99
#: Most parameters of a model in the slow run.
LARGEST = 12_000_000
#: Reasons that name no module type, as they are about a layer that coverage names beside them.
ABOUT_A_LAYER = (
    "used in ",
    "ran once for all",
    "no gradient reached",
    "was never called",
    "max_dim",
)

#: The models that run by default, with the size of an image.
SAMPLE: dict[str, tuple[int, ...]] = {
    "timm/convnextv2_atto": (3, 64, 64),
    "timm/cs3darknet_focus_s": (3, 64, 64),
    "timm/dla46x_c": (3, 64, 64),
    "timm/edgenext_xx_small": (3, 64, 64),
    "timm/efficientvit_b0": (3, 64, 64),
    "timm/efficientvit_m0": (3, 224, 224),
    "timm/ese_vovnet19b_slim_dw": (3, 64, 64),
    "timm/ghostnet_050": (3, 64, 64),
    "timm/hardcorenas_a": (3, 64, 64),
    "timm/hgnetv2_b0": (3, 64, 64),
    "timm/lcnet_050": (3, 64, 64),
    "timm/levit_128s": (3, 224, 224),
    "timm/mnasnet_small": (3, 64, 64),
    "timm/mobilenetv2_035": (3, 64, 64),
    "timm/mobilenetv3_small_050": (3, 64, 64),
    "timm/mobilenetv4_conv_small_050": (3, 64, 64),
    "timm/mobilevit_xxs": (3, 64, 64),
    "timm/mobilevitv2_050": (3, 64, 64),
    "timm/nf_regnet_b0": (3, 64, 64),
    "timm/pvt_v2_b0": (3, 64, 64),
    "timm/regnetx_002": (3, 64, 64),
    "timm/regnety_002": (3, 64, 64),
    "timm/repghostnet_050": (3, 64, 64),
    "timm/repvgg_a0": (3, 64, 64),
    "timm/resnet10t": (3, 64, 64),
    "timm/resnetv2_18d": (3, 64, 64),
    "timm/semnasnet_075": (3, 64, 64),
    "timm/shvit_s1": (3, 64, 64),
    "timm/skresnet18": (3, 64, 64),
    "timm/starnet_s1": (3, 64, 64),
    "timm/test_byobnet": (3, 64, 64),
    "timm/test_coatnet": (3, 160, 160),
    "timm/test_convnext": (3, 64, 64),
    "timm/test_convnext3": (3, 64, 64),
    "timm/test_efficientnet": (3, 64, 64),
    "timm/test_efficientnet_ln": (3, 64, 64),
    "timm/test_mambaout": (3, 64, 64),
    "timm/test_maxvit": (3, 160, 160),
    "timm/test_nfnet": (3, 64, 64),
    "timm/test_resnet": (3, 64, 64),
    "timm/test_vit": (3, 160, 160),
    "timm/test_vit3": (3, 160, 160),
    "timm/test_vit_relpos": (3, 160, 160),
    "timm/tinynet_e": (3, 64, 64),
    "timm/vit_tiny_r_s16_p8_224": (3, 224, 224),
    "torchvision/mnasnet0_5": (3, 64, 64),
    "torchvision/mobilenet_v2": (3, 64, 64),
    "torchvision/mobilenet_v3_small": (3, 64, 64),
    "torchvision/shufflenet_v2_x0_5": (3, 64, 64),
    "torchvision/squeezenet1_1": (3, 64, 64),
}


@dataclass(frozen=True)
class Finding:
    """What one followed step of one model left.

    Attributes:
        model: Its name.
        share: Share of matrix entries measured in full.
        partial: Share with a gradient only.
        entries: Matrix entries.
        gaps: Name, entries and reason of every matrix not measured in full.
    """

    model: str
    share: float
    partial: float
    entries: int
    gaps: list[tuple[str, int, str]]


def logits(output: Any) -> Tensor:
    """The tensor f in what a model returns: the first of several heads."""
    return output[0] if isinstance(output, (tuple, list)) else getattr(output, "logits", output)


def make(name: str) -> nn.Module:
    """A model by its name, ``timm/...`` or ``torchvision/...``, with random weights."""
    library, _, short = name.partition("/")
    if library == "timm":
        return timm.create_model(short, pretrained=False, num_classes=10)
    silent = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(short, weights=None, **silent)


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of training on the mean square of the output."""
    optimizer.zero_grad()
    logits(model(x)).square().mean().backward()
    optimizer.step()


def explore(name: str, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Finding:
    """Follow one step; the sums must be finite, and nothing may be left on the model."""
    infinite: list[str] = []

    def finite(facts: Any, statistics: LayerStatistics, *_: Any, **__: Any) -> list[Any]:
        """In place of the scores, which take longer than all else together."""
        sums = [statistics.sum(needs) for needs in ("gradient", "jacobian", "loss")]
        if not all(bool(torch.isfinite(s).all()) for s in sums if s is not None):
            infinite.append(facts.layer)
        return []

    monkeypatch.setattr(assembly, "score_layer", finite)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=1e-3)
    probe = FeatureProbe(
        model, optimizer=optimizer, every=1, window=1, output=logits, strict=True,
        relations=("bfact", "bnfa", "benfa"), powers=1.0,
    )  # fmt: skip
    with probe:
        step(model, x, optimizer)
    assert probe.report is not None
    assert infinite == []
    assert _get_current_function_mode_stack() == []
    coverage = probe.report.coverage
    return Finding(
        name,
        coverage.share(),
        coverage.share(("gradient only",)),
        coverage.elements,
        [(gap.parameter, gap.elements, gap.reason) for gap in coverage.gaps()],
    )


def check(finding: Finding, model: nn.Module) -> None:
    """Every gap has a reason that names the module type, or says what is wrong with the layer."""
    types = {type(module).__name__ for module in model.modules()}
    for parameter, _, reason in finding.gaps:
        named = any(f"{kind} " in reason or f"{kind}:" in reason for kind in types)
        assert named or any(words in reason for words in ABOUT_A_LAYER), f"{parameter}: {reason!r}"
    if not finding.gaps:
        assert finding.share == 1.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One followed step of each model of the sample."""
    torch.manual_seed(0)
    model = make(name).train()
    finding = explore(name, model, torch.randn(2, *SAMPLE[name]), monkeypatch)
    check(finding, model)


# --------------------------------------------------------------------------- the whole zoo


def zoo() -> list[str]:
    """All names."""
    own = torchvision.models.list_models(module=torchvision.models)
    return [
        *(f"timm/{name}" for name in timm.list_models()),
        *(f"torchvision/{name}" for name in own),
    ]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Finding]]:
    """Collects the findings; written to a temporary file, with its path, at the end."""
    findings: list[Finding] = []
    yield findings
    path: Path = tmp_path_factory.mktemp("zoo") / "coverage.jsonl"
    path.write_text("".join(json.dumps(asdict(finding)) + "\n" for finding in findings))


def parameters(name: str) -> float:
    """How many parameters a model has, without making them; 0 if it cannot be told."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make(name).parameters())
    except Exception:  # a model that computes while it is made
        return 0


def sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Input sizes to try, the cheapest first."""
    config = getattr(model, "default_cfg", None) or {}
    full = tuple(config.get("input_size", (3, 224, 224)))
    if config.get("fixed_input_size"):
        return [full]
    smallest = tuple(config.get("min_input_size") or full)
    return list(dict.fromkeys([(full[0], 64, 64), smallest, (full[0], 128, 128), full]))


def usable(model: nn.Module) -> Tensor | None:
    """Two images of the first size that the model trains on without the probe; None if none."""
    for size in sizes(model):
        x = torch.randn(2, *size)
        try:
            logits(model(x)).square().mean().backward()
        except Exception:  # whatever a model raises at images too small for it
            continue
        return x
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", zoo())
def test_zoo(name: str, table: list[Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    """One followed step of each model that is small enough and trains without the probe."""
    if parameters(name) > LARGEST:
        pytest.skip("too large")
    torch.manual_seed(0)
    model = make(name).train()
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        pytest.skip("too large")
    x = usable(model)
    if x is None:
        pytest.skip("does not train on two images, without the probe")
    finding = explore(name, model, x, monkeypatch)
    table.append(finding)
    check(finding, model)


@pytest.mark.slow
def test_the_zoo_is_large(table: list[Finding]) -> None:
    """More than 300 models were followed, and nine in ten of them are measured to 99 %."""
    if len(table) < 2:
        pytest.skip("run the whole file: this looks at what the other tests found")
    shares = [finding.share for finding in table if not math.isnan(finding.share)]
    assert len(table) >= 300
    assert sum(share >= ENOUGH for share in shares) >= 0.9 * len(shares)
