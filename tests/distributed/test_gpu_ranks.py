"""Several processes on CUDA devices: NCCL where there are two, gloo on a single one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import training_jobs as jobs
from comparison import assert_measured, assert_same_report, assert_same_reports
from rank_pool import Pool
from training_jobs import Run

DEVICES = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICES == 0, reason="needs a CUDA device"),
]

UNEVEN = (3, 5, 2, 4)
# random signs differ between devices, so the Jacobian is exact
RUNS = {
    "ddp": Run(sizes=UNEVEN),
    "no_sync": Run(micro=2, sizes=UNEVEN),
    "computed": Run(model="computed", sizes=UNEVEN),
    "convolutional": Run(model="convolutional", sizes=UNEVEN),
    "fsdp": Run(wrapper="fsdp", sizes=UNEVEN),
    "fsdp root": Run(wrapper="fsdp root", sizes=UNEVEN),
    "fsdp convolutional": Run(wrapper="fsdp", model="convolutional"),
    "fsdp without sync": Run(wrapper="fsdp", micro=2),
}


@pytest.fixture(
    scope="module",
    params=[
        "gloo",
        pytest.param(
            "nccl", marks=pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
        ),
    ],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pool]:
    """Two processes, each with a device of its own, or both with the only one."""
    pool = Pool(2, tmp_path_factory.mktemp("ranks"), backend=request.param, timeout=60.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", RUNS)
def test_processes_on_devices_report_what_one_does(pair: Pool, name: str) -> None:
    """The reports are those of one process on the CPU that accumulates the ranks' batches."""
    run = replace(RUNS[name], jacobian="exact")
    results = pair(jobs.train, replace(run, device="cuda"))
    reference = jobs.accumulate(run, 2)
    for result in results:
        for report in result["reports"]:
            assert_measured(report)
            assert report["settings"].pop("processes") == 2
        assert_same_reports(result["reports"], reference["reports"])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp without sync"])
def test_training_on_devices_is_bit_identical(pair: Pool, name: str) -> None:
    """Weights after training are the same bits with the probe and without it."""
    run = replace(RUNS[name], device="cuda", steps=6)
    with_probe = pair(jobs.train, run)
    without = pair(jobs.train, replace(run, probed=False))
    for mine, theirs in zip(with_probe, without, strict=True):
        for one, other in zip(mine["weights"], theirs["weights"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_measure_on_devices(pair: Pool, wrapper: str) -> None:
    """`measure` on parts of the data gives every rank the report of all of it."""
    run = Run(wrapper=wrapper, sizes=UNEVEN)
    shares = {0: [0, 1], 1: [2, 3]}
    reference = jobs.measured(run, shares)
    for report in pair(jobs.measured, replace(run, device="cuda"), shares):
        assert_same_report(report, reference)
