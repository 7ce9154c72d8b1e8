"""The self-test on several processes: Ĝ is averaged over them, and a wrong number of them shows."""

from __future__ import annotations

import pytest
import verify_jobs as jobs
from rank_pool import Pool


@pytest.mark.parametrize("micro", [1, 2])
def test_a_right_loop_passes_on_every_rank(two: Pool, micro: int) -> None:
    """Data-parallel training, each rank with batches of its own; all get the same words."""
    results = two(jobs.train, micro=micro)
    assert [result["passed"] for result in results] == [True, True]
    assert results[0]["text"] == results[1]["text"]
    assert "not made" in results[0]["text"].splitlines()[0]
    assert ", 0 not made" in results[0]["text"]


def test_a_wrong_number_of_ranks_is_named(two: Pool) -> None:
    """Gradients added up over the ranks where training averages them."""
    for result in two(jobs.train, wrong="sum"):
        assert result["failed"] == ["examples", "gradient"]
        assert "the number of processes (2)" in result["text"]
        assert result["factors"] == pytest.approx([2.0, 2.0])


def test_a_factor_of_the_loop_is_named(two: Pool) -> None:
    """A loss multiplied by the number of ranks, as before DDP's average, and taken out again."""
    for result in two(jobs.train, wrong="model"):
        assert result["failed"] == ["gradient"]
        assert "the number of processes (2)" in result["text"]


def test_clipping_is_named(two: Pool) -> None:
    """The clipped gradient is that of all ranks."""
    for result in two(jobs.train, clip=0.1):
        assert result["passed"]
        assert "clipped between backward and step in 5 of 5 steps" in result["text"]


def test_one_process_of_several_says_what_it_cannot_see(two: Pool) -> None:
    """With process_group=None this rank's gradient is not the one the optimizer gets."""
    for result in two(jobs.train, alone=True):
        assert result["passed"]
        assert "the other processes' part of the gradient is not seen" in result["text"]


def test_sharded_parameters_are_left_out_by_name(two: Pool) -> None:
    """No process has the gradient of a sharded parameter whole."""
    for result in two(jobs.train, wrapper="fsdp"):
        assert not result["passed"]
        assert not result["failed"]
        assert "parameter is sharded" in result["text"]
