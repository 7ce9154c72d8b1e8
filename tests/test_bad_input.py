"""Every bad argument is refused by name, before training is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import ConfigurationError, FeatureProbe, Report, measure

RELATIONS = ("fact", "bfact", "fact_sym", "bfact_sym", "nfa", "enfa", "bnfa", "benfa")


def network() -> nn.Sequential:
    """Two Linear layers, "0" and "2"."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    """Six examples."""
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)


def construct(**options: Any) -> FeatureProbe:
    """A probe that would be in order but for the options."""
    model = options.pop("model", None) or network()
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(
        model.parameters(), lr=0.1, weight_decay=0.1
    )
    return FeatureProbe(model, optimizer=optimizer, **options)


def run_measure(**options: Any) -> Report:
    """A measurement that would be in order but for the options."""
    settings: dict[str, Any] = {
        "model": network(),
        "loader": [batch()],
        "loss_fn": nn.MSELoss(),
        "weight_decay": 0.1,
        "progress": False,
        **options,
    }
    model, loader, loss_fn = (settings.pop(key) for key in ("model", "loader", "loss_fn"))
    return measure(model, loader, loss_fn, **settings)


def attach_and_detach(**options: Any) -> None:
    """Constructs a probe and enters the block: nothing may be refused later than this."""
    with construct(**options):
        pass


BOTH = pytest.mark.parametrize("call", [attach_and_detach, run_measure], ids=["loop", "measure"])
LOOP = pytest.mark.parametrize("call", [attach_and_detach], ids=["loop"])
MEASURE = pytest.mark.parametrize("call", [run_measure], ids=["measure"])
Call = Callable[..., Any]


@BOTH
def test_the_default_call_is_in_order(call: Call) -> None:
    """The calls that the tests below spoil are accepted unspoilt."""
    call()


@BOTH
@pytest.mark.parametrize("selection", [{"include": "encoder.*"}, {"include": nn.Conv2d}], ids=str)
def test_no_matching_layer_lists_the_names(call: Call, selection: dict[str, Any]) -> None:
    """A selection that matches nothing is refused, and the message lists the layers there are."""
    with pytest.raises(ConfigurationError, match=r"layer") as error:
        call(**selection)
    assert "0" in str(error.value)
    assert "2" in str(error.value)


@BOTH
def test_everything_excluded(call: Call) -> None:
    """Excluding every layer is refused."""
    with pytest.raises(ConfigurationError, match=r"layer"):
        call(exclude="*")


@BOTH
def test_a_model_without_layers(call: Call) -> None:
    """A model without any matrix layer is refused."""
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ConfigurationError, match=r"layer"):
        call(model=model)


@BOTH
@pytest.mark.parametrize("relations", [("fact", "nfaa"), ("correlation",)], ids=str)
def test_unknown_relation(call: Call, relations: tuple[str, ...]) -> None:
    """An unknown relation is refused, and the message lists the known ones."""
    with pytest.raises(ConfigurationError, match=r"nfaa|correlation") as error:
        call(relations=relations)
    assert "benfa" in str(error.value)


@BOTH
def test_no_relation(call: Call) -> None:
    """An empty list of relations is refused."""
    with pytest.raises(ConfigurationError, match=r"relation"):
        call(relations=())


@BOTH
@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
def test_power_not_positive(call: Call, power: float) -> None:
    """A power must be positive and finite."""
    with pytest.raises(ConfigurationError, match=r"power"):
        call(powers=(0.5, power))


@BOTH
def test_no_power(call: Call) -> None:
    """Relations with a power need at least one."""
    with pytest.raises(ConfigurationError, match=r"power"):
        call(powers=(), relations=("nfa",))


@BOTH
@pytest.mark.parametrize("weight_decay", [-0.1, math.nan, {"0": -1.0}], ids=str)
def test_negative_weight_decay(call: Call, weight_decay: Any) -> None:
    """λ must not be negative."""
    with pytest.raises(ConfigurationError, match=r"weight_decay|weight decay"):
        call(weight_decay=weight_decay)


@BOTH
def test_weight_decay_of_an_unknown_layer(call: Call) -> None:
    """A dict of λ must name layers that are measured."""
    with pytest.raises(ConfigurationError, match=r"encoder"):
        call(weight_decay={"0": 0.1, "encoder": 0.1})


@BOTH
def test_an_optimizer_of_another_model(call: Call) -> None:
    """An optimizer that holds none of the model's parameters is refused."""
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"optimizer"):
        call(optimizer=optimizer, weight_decay=None)


@BOTH
@pytest.mark.parametrize("jacobian", ["Exact", "hutchinson", "", None])
def test_unknown_jacobian(call: Call, jacobian: Any) -> None:
    """The Jacobian mode is "random" or "exact"."""
    with pytest.raises(ConfigurationError, match=r"jacobian"):
        call(jacobian=jacobian)


@BOTH
@pytest.mark.parametrize("positions", ["sum", "flatten", None])
def test_unknown_positions(call: Call, positions: Any) -> None:
    """The treatment of positions is "expand" or "reduce"."""
    with pytest.raises(ConfigurationError, match=r"positions"):
        call(positions=positions)


@BOTH
@pytest.mark.parametrize("loss_reduction", ["none", "average", None])
def test_unknown_loss_reduction(call: Call, loss_reduction: Any) -> None:
    """The loss reduction is "mean" or "sum"."""
    with pytest.raises(ConfigurationError, match=r"loss_reduction"):
        call(loss_reduction=loss_reduction)


@LOOP
@pytest.mark.parametrize("every", [0, -5])
def test_every_not_positive(call: Call, every: int) -> None:
    """A report every zero steps is refused."""
    with pytest.raises(ConfigurationError, match=r"every"):
        call(every=every)


@LOOP
@pytest.mark.parametrize("window", [0, -1])
def test_window_not_positive(call: Call, window: int) -> None:
    """A window holds at least one step."""
    with pytest.raises(ConfigurationError, match=r"window"):
        call(window=window)


@BOTH
@pytest.mark.parametrize("num_probes", [0, -1])
def test_num_probes_not_positive(call: Call, num_probes: int) -> None:
    """At least one probe is needed."""
    with pytest.raises(ConfigurationError, match=r"num_probes"):
        call(num_probes=num_probes)


@BOTH
@pytest.mark.parametrize("limit", ["max_dim", "max_outputs"])
def test_limits_not_positive(call: Call, limit: str) -> None:
    """A limit below one is refused."""
    with pytest.raises(ConfigurationError, match=limit):
        call(**{limit: 0})


@LOOP
def test_log_dir_not_writable(call: Call, tmp_path: Path) -> None:
    """A log_dir that cannot be made is refused before training, with its path."""
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    with pytest.raises(ConfigurationError, match=r"log_dir"):
        call(log_dir=occupied / "logs")


@LOOP
def test_log_dir_is_a_file(call: Call, tmp_path: Path) -> None:
    """A log_dir that is a file is refused before training."""
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    with pytest.raises(ConfigurationError, match=r"log_dir"):
        call(log_dir=str(occupied))
    assert occupied.read_text() == "not a folder"


@MEASURE
def test_a_sum_needs_the_training_batch_size(call: Call) -> None:
    """With loss_reduction="sum" the training batch size must be given."""
    with pytest.raises(ConfigurationError, match=r"training_batch_size"):
        call(loss_reduction="sum")


@MEASURE
@pytest.mark.parametrize("size", [0, -4])
def test_training_batch_size_not_positive(call: Call, size: int) -> None:
    """A training batch holds at least one example."""
    with pytest.raises(ConfigurationError, match=r"training_batch_size"):
        call(loss_reduction="sum", training_batch_size=size)


@MEASURE
def test_an_empty_loader(call: Call) -> None:
    """A loader without batches is refused, not answered with NaN."""
    with pytest.raises(ConfigurationError, match=r"loader|batch"):
        call(loader=[])


@MEASURE
def test_neither_loss_nor_forward(call: Call) -> None:
    """Either a loss function or a forward is needed."""
    with pytest.raises(ConfigurationError, match=r"loss_fn"):
        call(loss_fn=None)


@MEASURE
def test_batches_that_are_no_pairs(call: Call) -> None:
    """Batches that are not (input, target) pairs need forward=."""
    with pytest.raises(ConfigurationError, match=r"forward"):
        call(loader=[{"x": batch()[0]}])


def test_attach_twice() -> None:
    """A probe that is attached cannot be attached again; it stays attached and works."""
    probe = construct()
    with probe, pytest.raises(ConfigurationError, match=r"attached"):
        probe.attach()


def test_with_takes_an_attached_probe() -> None:
    """As an integration's attach() gives it; leaving the with detaches it."""
    probe = construct().attach()
    with probe as same:
        assert same is probe
        assert probe.is_attached
    assert not probe.is_attached


class Pair(nn.Module):
    """A model that returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """A dict with the output."""
        return {"logits": self.inner(x)}


class Scalar(nn.Module):
    """A model that returns its loss: there is no axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        """The mean output."""
        return self.inner(x).mean()


@pytest.mark.parametrize(
    ("model_type", "pick", "loss_of"),
    [
        (Pair, None, lambda out: out["logits"].square().mean()),
        (Pair, lambda out: "logits", lambda out: out["logits"].square().mean()),
        (Scalar, None, lambda out: out),
    ],
    ids=["dict without output", "output gives no tensor", "no example axis"],
)
def test_an_output_that_is_no_batch_of_tensors(
    model_type: type[nn.Module], pick: Any, loss_of: Callable[[Any], Tensor]
) -> None:
    """Refused with a mention of output= in the first forward, before any weight changed."""
    model = model_type()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)

    def train() -> None:
        with FeatureProbe(model, optimizer=optimizer, output=pick):
            loss_of(model(batch()[0])).backward()
            optimizer.step()

    with pytest.raises(ConfigurationError, match=r"output"):
        train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ConfigurationError, match=r"output"):
        run_measure(model=model_type(), loss_fn=lambda out, y: loss_of(out), output=pick)


GRADIENTS = ("fact", "bfact", "fact_sym", "bfact_sym")
LOSSES = ("enfa", "benfa")


def assert_spoilt(report: Report, spoilt: set[tuple[str, str]]) -> None:
    """The records named are NaN with a reason; all others are numbers, none is half and half."""
    assert len(report.records) == 2 * (4 + 2 * 4)
    for record in report.records:
        wrong = "not finite" in record.status
        assert wrong == ((record.layer, record.relation) in spoilt), record
        for score in (record.pearson, record.cosine):
            assert math.isnan(score) == wrong, record


def test_nan_in_the_data_is_a_status() -> None:
    """One NaN spoils every relation but K of the last layer, which is the identity for any data."""
    x, y = batch()
    x[2, 1] = math.nan
    report = run_measure(loader=[(x, y)], relations=RELATIONS)
    spoilt = {(layer, relation) for layer in "02" for relation in (*GRADIENTS, *LOSSES)}
    assert_spoilt(report, spoilt | {("0", "nfa"), ("0", "bnfa")})


def test_infinity_in_the_data_is_a_status() -> None:
    """One infinity saturates tanh: only the first layer's gradient, 0 · ∞, is not finite."""
    x, y = batch()
    x[2, 1] = math.inf
    report = run_measure(loader=[(x, y)], relations=RELATIONS)
    assert_spoilt(report, {("0", relation) for relation in GRADIENTS})


def test_non_finite_data_in_the_loop_is_a_status() -> None:
    """A NaN batch in the loop gives a report with reasons; training is as without the probe."""
    torch.manual_seed(1)
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    x, y = batch()
    bad = x.clone()
    bad[0, 0] = math.nan
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, plain)]
    probe = FeatureProbe(model, optimizer=optimizers[0], every=1, window=1, relations=RELATIONS)
    reports = []
    with probe:
        for inputs in (x, bad):
            for m, optimizer in zip((model, plain), optimizers, strict=True):
                optimizer.zero_grad()
                F.mse_loss(m(inputs), y).backward()
                optimizer.step()
            reports.append(probe.report)
    good, spoilt = reports
    assert good.step == 0
    assert spoilt.step == 1
    assert_spoilt(good, set())
    layers = {(layer, relation) for layer in "02" for relation in (*GRADIENTS, *LOSSES)}
    assert_spoilt(spoilt, layers | {("0", "nfa"), ("0", "bnfa")})
    assert probe.faults == 0
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
