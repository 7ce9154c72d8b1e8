"""A loop on several processes reports what one process on all of its data does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_jobs as jobs
from comparison import assert_close, assert_measured, assert_same_report, assert_same_reports
from rank_pool import Pool
from training_jobs import Run

UNEVEN = (3, 5, 2, 4)
CENTERED = ("fact", "nfa", "enfa", "init_centered_nfa", "init_centered_enfa")
WHOLE = (*CENTERED, "double_centered_nfa", "ptk_centered_nfa", "alignment_speed")
RUNS = {
    "default": Run(),
    "uneven": Run(sizes=UNEVEN),
    "static graph": Run(ddp={"static_graph": True}),
    "unused parameters": Run(ddp={"find_unused_parameters": True}, extra=False),
    "bucket views": Run(ddp={"gradient_as_bucket_view": True}),
    "no_sync": Run(micro=3, sizes=UNEVEN),
    "exact Jacobian": Run(jacobian="exact"),
    "convolutional": Run(model="convolutional", sizes=UNEVEN),
    "computed": Run(model="computed", sizes=UNEVEN),
    "computed on one rank": Run(
        model="computed", ddp={"find_unused_parameters": True}, extra=False
    ),
    "fsdp": Run(wrapper="fsdp", sizes=UNEVEN),
    "fsdp root": Run(wrapper="fsdp root", sizes=UNEVEN),
    "fsdp convolutional": Run(wrapper="fsdp", model="convolutional"),
    "fsdp root convolutional": Run(wrapper="fsdp root", model="convolutional"),
    "fsdp computed": Run(wrapper="fsdp", model="computed"),
    "fsdp root computed": Run(wrapper="fsdp root", model="computed"),
    "fsdp without sync": Run(wrapper="fsdp", micro=3, sizes=UNEVEN),
    "fsdp root without sync": Run(wrapper="fsdp root", micro=2),
    "wide": Run(max_dim=4, sizes=UNEVEN),
    "fsdp wide": Run(wrapper="fsdp", max_dim=4),
    "init-centred": Run(relations=WHOLE, sizes=UNEVEN),
    "fsdp init-centred": Run(wrapper="fsdp", relations=CENTERED),
}

LOW = Run(wrapper="fsdp", policy=True, dtype=torch.float32)


CASES = [(2, name) for name in RUNS] + [
    (4, "unused parameters"),
    (4, "no_sync"),
    (4, "computed"),
    (4, "fsdp convolutional"),
    (4, "fsdp without sync"),
]


@pytest.mark.parametrize(("count", "name"), CASES)
def test_several_processes_report_what_one_does(
    pools: Callable[[int], Pool], count: int, name: str
) -> None:
    """The reports of all ranks are those of one process that accumulates their batches."""
    run = RUNS[name]
    results = pools(count)(jobs.train, run)
    reference = jobs.accumulate(run, len(results))
    assert len(reference["reports"]) == 2
    for result in results:
        assert result["faults"] == 0
        for report in result["reports"]:
            assert_measured(report)
            assert report["settings"].pop("processes") == len(results)
            moved = report["step"] > 0
            centred = [r for r in report["records"] if r["relation"].startswith("init_centered")]
            assert all(math.isfinite(r["cosine"]) == moved for r in centred)
            # J is the identity in the last layer, then and now
            whole = [r for r in report["records"] if r["relation"] == "double_centered_nfa"]
            assert any(math.isfinite(r["cosine"]) for r in whole) == (moved and bool(whole))
        assert_same_reports(
            result["reports"], reference["reports"], sharded=run.wrapper.startswith("fsdp")
        )


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_structure_is_that_of_one_process(ranks: Pool, wrapper: str) -> None:
    """Spectra, sweeps and balance come from reduced sums and whole weights, on every rank alike."""
    run = Run(wrapper=wrapper, model="convolutional", sizes=UNEVEN, structure=True)
    results = ranks(jobs.train, run)
    reference = jobs.accumulate(run, len(results))
    expected = [report["structures"] for report in reference["reports"]]
    assert [len(structures) for structures in expected] == [3, 3]
    for result in results:
        for report, structures in zip(result["reports"], expected, strict=True):
            assert_close(report["structures"], structures)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_even_batches_are_one_big_batch(ranks: Pool, wrapper: str) -> None:
    """With batches of one size the report is that of one process on their union."""
    run = Run(wrapper=wrapper, jacobian="exact")
    results = ranks(jobs.train, run)
    reference = jobs.in_one_batch(run, len(results))
    for result in results:
        for report in result["reports"]:
            assert report["settings"].pop("processes") == len(results)
        assert_same_reports(
            result["reports"], reference["reports"], sharded=run.wrapper.startswith("fsdp")
        )


@pytest.mark.parametrize(
    ("wrapper", "round_"),
    [
        ("ddp", ["all_gather_object", "all_reduce"]),
        ("fsdp", ["all_gather_object", "all_gather", "all_reduce"]),
    ],
)
def test_a_report_is_one_round_and_a_step_is_none(
    two: Pool, wrapper: str, round_: list[str]
) -> None:
    """The probe communicates at reports alone, once, and on no other step."""
    for result in two(jobs.train, Run(wrapper=wrapper, steps=6, micro=2)):
        assert result["calls"] == [round_, [], round_, [], round_, []]


def test_nothing_else_communicates(two: Pool) -> None:
    """Reading sharded weights and gradients costs no hidden collective, on steps or at reports."""
    run = Run(wrapper="fsdp", steps=4, traced=True, relations=("fact", "bfact"))
    without = two(jobs.train, replace(run, probed=False))
    for mine, theirs in zip(two(jobs.train, run), without, strict=True):
        assert theirs["traffic"][1]  # gathering and reducing, by FSDP
        for step, own in enumerate(theirs["traffic"]):
            extra = mine["traffic"][step][len(own) :]
            assert mine["traffic"][step][: len(own)] == own
            # sizes and contents of the headers, and the shards: there is nothing to be summed
            assert extra == ([] if step % 2 else ["c10d::allgather_"] * 3)


IDENTICAL = (
    "uneven",
    "static graph",
    "unused parameters",
    "no_sync",
    "computed",
    "fsdp",
    "fsdp root",
    "fsdp without sync",
    "fsdp convolutional",
    "fsdp bfloat16",
)


@pytest.mark.parametrize("name", IDENTICAL)
def test_training_is_bit_identical(two: Pool, name: str) -> None:
    """Weights after training are the same bits with the probe and without it."""
    run = replace(RUNS.get(name, LOW), steps=6)
    for with_probe, without in zip(
        two(jobs.train, run), two(jobs.train, replace(run, probed=False)), strict=True
    ):
        assert len(with_probe["reports"]) == 3
        assert without["reports"] == []
        for mine, theirs in zip(with_probe["weights"], without["weights"], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("wrapper", ["fsdp", "fsdp root"])
def test_lower_precision_gives_finite_scores(two: Pool, wrapper: str) -> None:
    """Under a bfloat16 policy every score is finite, near the float32 one, and alike on all."""
    run = replace(LOW, wrapper=wrapper)
    results = two(jobs.train, run)
    exact = jobs.accumulate(replace(run, policy=False), 2)
    assert_same_reports(results[0]["reports"], results[1]["reports"])
    for report, reference in zip(results[0]["reports"], exact["reports"], strict=True):
        for record, other in zip(report["records"], reference["records"], strict=True):
            assert math.isfinite(record["cosine"])
            assert record["cosine"] == pytest.approx(other["cosine"], abs=0.05)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_every_rank_resumes_in_mid_window(two: Pool, wrapper: str) -> None:
    """Probes that go on from the saved states of all ranks report as if never stopped."""
    run = Run(wrapper=wrapper, sizes=UNEVEN)
    for stopped, straight in zip(
        two(jobs.train, replace(run, resumed=True)), two(jobs.train, run), strict=True
    ):
        assert_same_report(stopped["reports"][-1], straight["reports"][-1])
        assert stopped["reports"][-1]["settings"]["window"] == 2


def test_only_the_first_rank_writes(two: Pool, tmp_path: Path) -> None:
    """The first rank's folder holds the run; the other's is not even made. All have the report."""
    results = two(jobs.train, Run(log_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    names = sorted(path.name.split(".")[0] for path in (tmp_path / "0").iterdir())
    assert names == ["events", "feature_probe"]
    assert all(len(result["reports"]) == 2 for result in results)


def test_a_fault_on_one_rank_keeps_the_others_report(two: Pool) -> None:
    """A rank that could not read a step still comes to the report, which all make of the rest."""
    results = two(jobs.train, Run(strict=False, broken_on=1))
    assert [result["faults"] for result in results] == [0, 1]
    whole = jobs.accumulate(Run(), 2)["reports"][1]
    for result in results:
        _, report = result["reports"]
        assert report["settings"]["left_out"] == 1
        assert_same_report(report, results[0]["reports"][1])
        # steps 1 and 2 of the first rank, step 2 of the other
        assert {record["n_examples"] for record in report["records"]} == {3 * 4}
        gradient = "blocks.0 gradient"
        torch.testing.assert_close(report["sums"][gradient], whole["sums"][gradient])


def test_what_one_rank_cannot_see_none_reports(two: Pool) -> None:
    """A sum that lacks a rank's part is left out on all, with that rank's reason."""
    for result in two(jobs.train, Run(blind_on=1)):
        for report in result["reports"]:
            told = {
                record["status"]
                for record in report["records"]
                if record["layer"] == "blocks.0" and record["relation"] in ("enfa", "benfa")
            }
            assert len(told) == 1
            assert "not seen here" in told.pop()
            assert report["sums"]["blocks.0 loss"] is None
            assert report["sums"]["blocks.1 loss"] is not None


def test_a_fault_at_a_report_step_leaves_nobody_waiting(two: Pool) -> None:
    """Where the step that cannot be read is the reported one, the report is made all the same."""
    results = two(jobs.train, Run(strict=False, broken_on=1, every=1, steps=3))
    assert [result["faults"] for result in results] == [0, 1]
    assert [[report["step"] for report in r["reports"]] for r in results] == [[0, 1, 2]] * 2


def test_ranks_that_may_stop_early_are_not_waited_for(two: Pool) -> None:
    """Within DDP's join() a report is a fault that says so, and nothing is communicated."""
    run = Run(strict=False, steps=4, every=1)
    results = two(jobs.train_until_data_runs_out, run)
    assert [result["faults"] for result in results] == [2, 4]
    for result in results:
        assert result["report"] is None
        assert "all_gather_object" not in result["calls"]


SHARES = [{0: [0, 1, 2], 1: [3]}, {0: [0, 1], 1: [2, 3]}]


@pytest.mark.parametrize("model", ["blocks", "convolutional", "computed"])
@pytest.mark.parametrize(
    ("wrapper", "shares"), [("ddp", SHARES[0]), ("fsdp", SHARES[1]), ("fsdp root", SHARES[1])]
)
def test_measure_is_that_of_the_whole_data_set(
    two: Pool, model: str, wrapper: str, shares: dict[int, list[int]]
) -> None:
    """`measure` on uneven parts of the data gives every rank the report of all of it."""
    run = Run(model=model, wrapper=wrapper, sizes=UNEVEN)
    reference = jobs.measured(run, shares)
    gathers = [] if wrapper == "ddp" else ["all_gather"]
    for report in two(jobs.measured, run, shares):
        assert_measured(report)
        assert report.pop("calls") == ["all_gather_object", *gathers, "all_reduce"]
        assert report["settings"].pop("processes") == 2
        assert_same_report(report, reference)


def test_measure_with_a_rank_without_data(two: Pool) -> None:
    """A rank whose part is empty takes part all the same."""
    shares: dict[int, list[int]] = {0: [0, 1], 1: []}
    reference = jobs.measured(Run(), shares)
    for report in two(jobs.measured, Run(), shares):
        assert_same_report(report, reference)


@pytest.fixture
def brittle(tmp_path: Path) -> Iterator[Pool]:
    """Two processes for one test, which ends one of them."""
    pool = Pool(2, tmp_path)
    yield pool
    pool.close()


def assert_went_on(result: dict[str, Any], run: Run) -> None:
    """Training went on to its end with one fault, and the last report is kept."""
    assert result["faults"] == 1
    assert result["step"] == 0
    for mine, initial in zip(result["weights"], jobs.new_model(run).parameters(), strict=True):
        assert not torch.equal(mine, initial)


def test_a_rank_that_exits_costs_a_fault_and_not_the_run(brittle: Pool) -> None:
    """The others hear of it at once, not after a time-out, and train on."""
    run = Run(strict=False)
    (ok, result), _ = brittle.attempt(jobs.lose_a_rank, run, "exits", 20.0)
    assert ok, result
    assert_went_on(result, run)
    assert result["seconds"] < 15.0


def test_a_rank_that_hangs_costs_the_groups_time_out(two: Pool) -> None:
    """The others wait for as long as the process group says, once, and train on."""
    run = Run(strict=False)
    result, _ = two(jobs.lose_a_rank, run, "hangs", 2.0)
    assert_went_on(result, run)
    assert 1.9 < result["seconds"] < 15.0


def test_a_lost_rank_is_raised_if_strict(two: Pool) -> None:
    """With strict=True the process group's own error comes out of the optimizer's step."""
    (ok, text), _ = two.attempt(jobs.lose_a_rank, Run(), "hangs", 1.0)
    assert not ok
    assert "all_gather_object" in text
    assert "RuntimeError" in text


def test_a_budget_is_paced_by_the_first_rank(two: Pool) -> None:
    """All ranks report the same steps, though the cost that they measure differs."""
    first, second = two(jobs.paced, 0.5, 400)
    assert first["steps"] == second["steps"]
    assert first["steps"][:2] == [0, 24]
    assert len(first["steps"]) > 2
    assert first["cost"].split(";")[0] == second["cost"].split(";")[0]
    assert second["own"] > first["own"] + 0.04
