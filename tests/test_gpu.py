"""What only a CUDA device shows: the same numbers, low-precision training, no synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feature_probe import FeatureProbe, Report, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RELATIONS = ("fact", "fact_sym", "bfact", "bfact_sym", "nfa", "enfa", "bnfa", "benfa")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """cuDNN picks the same kernels in every run, or nothing could be compared bit for bit."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def small_net() -> nn.Sequential:
    """Convolutions (one grouped), batch norm, in-place activations, dropout and two linears."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, stride=2, groups=4), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5),
    )  # fmt: skip


def data(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images and labels on the CPU."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 12, 12, generator=generator, dtype=dtype)
    return x, torch.randint(0, 5, (n,), generator=generator)


def train(model: nn.Module, steps: int, dtype: torch.dtype | None, probed: bool) -> Report | None:
    """SGD under autocast (or not), with the probe or without it."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    x, y = (part.cuda() for part in data(32))
    probe = FeatureProbe(model, optimizer=optimizer, every=5, window=2, strict=True)
    if probed:
        probe.attach()
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    finally:
        probe.detach()
    return probe.report


def test_a_report_is_the_same_on_the_device() -> None:
    """In float64 every score measured on the GPU equals the CPU's."""
    torch.manual_seed(0)
    model = small_net().double()
    x, y = data(24, torch.float64)
    reports = []
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(model).to(device)
        reports.append(
            measure(
                here, [(x[:10], y[:10]), (x[10:], y[10:])], F.cross_entropy,
                weight_decay=1e-2, relations=RELATIONS, progress=False,
            )
        )  # fmt: skip
    for on_cpu, on_gpu in zip(*(report.records for report in reports), strict=True):
        for score in ("cosine", "pearson", "trace_free_cosine", "chance_cosine", "residual"):
            a, b = getattr(on_cpu, score), getattr(on_gpu, score)
            assert a == pytest.approx(b, rel=1e-9, abs=1e-9, nan_ok=True), (on_cpu, score)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16 autocast"])
def test_training_is_bit_identical_on_the_device(dtype: torch.dtype | None) -> None:
    """Weights, buffers and the device's random state are those of a run without the probe."""
    torch.manual_seed(0)
    plain = small_net().cuda()
    probed = copy.deepcopy(plain)
    train(plain, 12, dtype, probed=False)
    random_plain = torch.cuda.get_rng_state()
    report = train(probed, 12, dtype, probed=True)
    assert torch.equal(random_plain, torch.cuda.get_rng_state())
    for (name, a), b in zip(plain.state_dict().items(), probed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert report is not None
    assert report.step == 10
    assert all(record.status == "ok" for record in report.records)


def test_bf16_scores_are_near_the_float64_ones() -> None:
    """Sums of bf16 rows are float32, so that scores of one step lie within 0.02 of float64's.

    The gap is that of bf16 gradients themselves, rounded to 3 digits layer after layer.
    """
    torch.manual_seed(0)
    model = small_net().cuda().eval()
    exact = copy.deepcopy(model).double()
    x, y = (part.cuda() for part in data(256))

    def autocast(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = module(batch[0])
            return out, F.cross_entropy(out, batch[1])

    low = measure(model, [(x, y)], forward=autocast, weight_decay=1e-2, progress=False)
    high = measure(exact, [(x.double(), y)], F.cross_entropy, weight_decay=1e-2, progress=False)
    for a, b in zip(low.records, high.records, strict=True):
        assert a.cosine == pytest.approx(b.cosine, abs=0.02), (a, b)


def test_steps_that_do_not_report_do_not_synchronise() -> None:
    """No step of a window waits for the device until the report is due."""
    torch.manual_seed(0)
    model = small_net().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-2)
    x, y = (part.cuda() for part in data(32))
    with FeatureProbe(
        model, optimizer=optimizer, every=lambda step: step == 9, window=6, strict=True
    ) as probe:
        for step in range(10):
            if step in (1, 5):
                torch.cuda.set_sync_debug_mode("error")
            if step == 9:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert probe.report is not None
    assert probe.report.settings["window"] == 6


def test_a_budget_is_measured_in_the_devices_time() -> None:
    """Steps that the host hands over ahead of time take as long as the device works on them."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(4096, 2048, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with FeatureProbe(model, optimizer=optimizer, relations="fact", strict=True) as probe:
        for step in range(40):
            if step == 5:
                start.record()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if step == 15:
                end.record()
    torch.cuda.synchronize()
    plain = start.elapsed_time(end) / 1e3 / 11
    assert probe.cost.plain_seconds == pytest.approx(plain, rel=0.3)
    assert probe.cost.reports == 2


def test_an_initial_network_in_main_memory_visits_the_device() -> None:
    """K̄ is the same as with one that stays there, and nothing of it stays between the passes."""
    found = []
    for store in ("device", "cpu"):
        torch.manual_seed(0)
        model = small_net().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x, y = (part.cuda() for part in data(32))
        torch.manual_seed(3)
        probe = FeatureProbe(
            model, optimizer=optimizer, every=1, window=1, relations="double_centered_nfa",
            initial_store=store, keep_matrices=True, strict=True,
        )  # fmt: skip
        with probe:
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        network = probe._initial_network
        assert network is not None
        home = "cuda" if store == "device" else "cpu"
        assert {p.device.type for p in network.module.parameters()} == {home}
        assert probe.report is not None
        found.append(probe.report.statistics["0"].jacobian_change)
    assert found[0] is not None
    assert found[1] is not None
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-8)
