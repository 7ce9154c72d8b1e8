"""Windows of several processes become one: what adds up, what does not, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import window_jobs as jobs
from rank_pool import Pool
from torch import Tensor, nn

from feature_probe.errors import ConfigurationError
from feature_probe.processes.packing import Slot, pack_symmetric, unpack_symmetric
from feature_probe.processes.reduction import Part, is_writer, reduce_window, resolve_group
from feature_probe.sums.window import Window


def expected(seeds: list[int], kind: str) -> Tensor:
    """The sum over ranks of what they hold."""
    return torch.stack([getattr(jobs.moments(seed), kind) for seed in seeds]).sum(0)


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, in whatever they are held."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def on_all(results: list[dict[str, Any]], index: int, kind: str) -> Tensor:
    """A sum of a layer, checked to be the same bits on every rank."""
    for result in results[1:]:
        assert_same(result["layers"][index][kind], results[0]["layers"][index][kind])
    return results[0]["layers"][index][kind]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_packing_halves_symmetric_matrices(size: int) -> None:
    """A packed batch of symmetric matrices comes back bit for bit from half the elements."""
    matrices = torch.randn(3, size, size, dtype=torch.float64)
    matrices = matrices + matrices.mT
    packed = pack_symmetric(matrices)
    slot = Slot(tuple(matrices.shape), torch.float64, symmetric=True)
    assert packed.numel() == slot.numel == 3 * ((size + 1) // 2) * (size + 1)
    assert_same(unpack_symmetric(packed.flatten(), matrices.shape), matrices)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_packing_keeps_what_is_not_finite_in_its_place(bad: float) -> None:
    """An infinite or undefined entry does not spread to others."""
    matrix = torch.ones(1, 5, 5)
    matrix[0, 1, 3] = matrix[0, 3, 1] = bad
    back = unpack_symmetric(pack_symmetric(matrix), matrix.shape)
    torch.testing.assert_close(back, matrix, rtol=0, atol=0, equal_nan=True)


def test_outer_sums_and_counts_add_up(ranks: Pool) -> None:
    """K, E, examples and rows are sums over ranks, alike on all; steps are not added."""
    count = len(ranks._processes)
    results = ranks(jobs.reduce_plainly, [["a1", "b2"]] * count, "mean")
    for index, digit in enumerate((1, 2)):
        seeds = [10 * rank + digit for rank in range(count)]
        for kind in ("jacobian", "loss"):
            torch.testing.assert_close(
                on_all(results, index, kind), expected(seeds, kind), rtol=1e-14, atol=1e-14
            )
        layer = results[0]["layers"][index]
        assert layer["jacobian_rows"] == sum(7 + seed for seed in seeds)
        assert layer["loss_rows"] == sum(8 + seed for seed in seeds)
    assert results[0]["counts"] == (2, sum(10 + r for r in range(count)), count - 1, 0)


def test_one_exchange_and_one_reduction(ranks: Pool) -> None:
    """A report costs one exchange of headers and one all_reduce, however many the layers."""
    names = [[f"layer{i}" for i in range(9)]] * len(ranks._processes)
    for result in ranks(jobs.reduce_plainly, names, "mean"):
        assert result["calls"] == ["all_gather_object", "all_reduce"]


@pytest.mark.parametrize(("held", "weight"), [("mean", 4.0), ("sum", 4.0), ("shared", 2.0)])
def test_gradients_become_one_as_they_are_held(two: Pool, held: str, weight: float) -> None:
    """Local gradients are added with their weights; those that are averaged already are kept."""
    results = two(jobs.reduce_plainly, [["a1"], ["a1"]], held)
    for rank, result in enumerate(results):
        layer = result["layers"][0]
        assert layer["gradient_weight"] == weight
        seeds = [10 * rank + 1] if held == "shared" else [1, 11]
        torch.testing.assert_close(layer["gradient"], expected(seeds, "gradient"))


def test_a_mean_counts_ranks_without_a_gradient(two: Pool) -> None:
    """A computed weight that one rank did not use has half the gradient of the used one."""
    results = two(
        jobs.reduce_plainly, [["a1"], ["a1"]], "mean",
        absent={1: [(0, "gradient")]}, weights={1: {0: 0.0}},
    )  # fmt: skip
    layer = results[1]["layers"][0]
    mean = layer["gradient"] / layer["gradient_weight"]
    torch.testing.assert_close(mean, jobs.moments(1).gradient / 2.0 / 2.0)


def test_a_rank_without_a_weight_takes_the_first_ranks(ranks: Pool) -> None:
    """A rank that never computed a layer's weight is given the first rank's."""
    *others, last = ranks(jobs.reduce_with_a_weight_missing)
    for rank, [weight] in enumerate(others):
        assert_same(weight, torch.full((5, 3), 1.0 + rank))
    assert_same(last[0], torch.full((5, 3), 1.0))


def test_a_rank_that_left_a_step_out_takes_the_others_gradient(two: Pool) -> None:
    """Where gradient sums hold different steps, all ranks report the one with the most steps."""
    results = two(jobs.reduce_plainly, [["a1"], ["a1"]], "shared", weights={0: {0: 1.0}})
    for result in results:
        assert_same(result["layers"][0]["gradient"], jobs.moments(11).gradient)
        assert result["layers"][0]["gradient_weight"] == 2.0
        assert result["calls"] == ["all_gather_object", "all_reduce"]


def test_targets_are_matched_by_name(two: Pool) -> None:
    """Ranks that met the layers in another order, or not all, add up what belongs together."""
    names = [["a1", "b2"], ["c3", "b2", "a1"]]
    first, second = two(jobs.reduce_plainly, names, "sum")
    for kind in ("gradient", "jacobian", "loss"):
        assert_same(first["layers"][0][kind], second["layers"][2][kind])
        torch.testing.assert_close(first["layers"][1][kind], expected([2, 12], kind))
        assert_same(second["layers"][0][kind], getattr(jobs.moments(13), kind))
    assert first["elsewhere"] == ("c3",)
    assert second["elsewhere"] == ()


def test_an_absent_sum_counts_as_zero(two: Pool) -> None:
    """A sum that one rank does not hold is the others'; one that none holds stays absent."""
    absent = {0: [(0, "loss"), (0, "jacobian")], 1: [(0, "jacobian")]}
    results = two(jobs.reduce_plainly, [["a1"], ["a1"]], "mean", absent=absent)
    for result in results:
        assert_same(result["layers"][0]["loss"], jobs.moments(11).loss)
        assert result["layers"][0]["jacobian"] is None


def test_a_problem_of_one_rank_is_everyones(two: Pool) -> None:
    """What one rank could not measure is not reported, with that rank's reason, on any."""
    problems = {1: [(1, "loss", "broken here")]}
    results = two(jobs.reduce_plainly, [["a1", "b2"], ["b2", "a1"]], "mean", problems=problems)
    assert results[0]["problems"] == {(0, "loss"): "broken here"}
    assert results[1]["problems"] == {(1, "loss"): "broken here"}
    assert results[0]["layers"][0]["loss"] is None
    assert results[0]["layers"][1]["loss"] is not None


def test_dtypes_travel_apart(two: Pool) -> None:
    """float64 sums stay exact beside float32 ones, by one reduction each; mixed ones are raised."""
    for result in two(jobs.reduce_in_two_dtypes):
        dtypes = [layer["loss"].dtype for layer in result["layers"]]
        assert dtypes == [torch.float64, torch.float32, torch.float64]
        assert result["calls"] == ["all_gather_object", "all_reduce", "all_reduce"]
        torch.testing.assert_close(result["layers"][0]["loss"], expected([0, 1], "loss"))


@pytest.mark.parametrize(
    ("job", "args", "changes", "words"),
    [
        (jobs.reduce_plainly, ([["a1"]] * 2, "mean"), {"steps": {1: 5}},
         "another step: 4 on rank 0; 5 on rank 1. Every rank must be given the same schedule"),
        (jobs.reduce_plainly, ([["a1"]] * 2, "mean"),
         {"tensors": {0: nn.Parameter(torch.eye(9)), 1: nn.Parameter(-torch.eye(9))}},
         "another sum and norm of the weight of a1"),
        (jobs.reduce_of_other_shapes, (), {}, "another shape of the gradient sum of a: (5, 3)"),
        (jobs.reduce_with_a_failure, (), {}, "rank 1 cannot take part: IndexError"),
    ],
)  # fmt: skip
def test_disagreement_is_one_error_on_all_ranks(
    two: Pool, job: Any, args: tuple[Any, ...], changes: dict[str, Any], words: str
) -> None:
    """Ranks that do not belong together all hear the same, at once, and can go on."""
    answers = two.attempt(jobs.call, job, args, changes)
    said = [text.splitlines()[-1] for _, text in answers]
    assert [ok for ok, _ in answers] == [False, False]
    assert words in said[0]
    assert said[0] == said[1]
    two(jobs.reduce_plainly, [["a1"]] * 2, "mean")


def test_shards_of_all_dtypes_are_gathered_at_once(ranks: Pool) -> None:
    """Uneven, empty and replicated shards of three dtypes are whole again after one all_gather."""
    shapes = [(5, 3), (1,), (7, 2, 3), (4, 4), (8,)]
    for result in ranks(jobs.gather_shards, shapes, 0):
        assert result["calls"] == ["all_gather"]
        given = [*result["given"], result["given"][0], result["given"][0]]
        assert_same(result["whole"][1:], given)
        assert result["whole"][0] is None


@pytest.mark.parametrize(
    ("second", "agreed"), [({"a1": 2, "b2": 1}, {"a1": 2, "b2": 1}), ({"b2": 1}, {}), ({}, {})]
)
def test_a_chain_is_one_on_every_rank(
    two: Pool, second: dict[str, int], agreed: dict[str, int]
) -> None:
    """The depth of a layer is said where all ranks saw the same chain, in whatever order."""
    depths = {0: {"a1": 2, "b2": 1}, 1: second}
    for result in two(jobs.reduce_plainly, [["a1", "b2"], ["b2", "a1"]], "mean", depths=depths):
        assert result["depths"] == agreed


def test_shards_of_columns_are_gathered(two: Pool) -> None:
    """A tensor may be sharded along another dimension than the first."""
    for result in two(jobs.gather_shards, [(5, 3), (2, 7)], -1):
        assert_same(result["whole"][1:3], result["given"])


def test_a_grid_of_processes_falls_back(four: Pool) -> None:
    """A tensor on a two-dimensional mesh is gathered too."""
    for result in four(jobs.gather_on_a_grid):
        assert_same(result["whole"], result["given"])


@pytest.mark.parametrize(
    ("kind", "members", "writers"),
    [
        ("default", [[0, 1, 2, 3]] * 4, [0]),
        ("ddp of a pair", [[0, 1], [0, 1], [2, 3], [2, 3]], [0, 2]),
        ("given pair", [[0, 1], [0, 1], [2, 3], [2, 3]], [0, 2]),
        ("alone", [None] * 4, [0, 1, 2, 3]),
    ],
)
def test_the_group_is_the_one_trained_in(
    four: Pool, kind: str, members: list[Any], writers: list[int]
) -> None:
    """The group is DDP's own, else the default one; the first of a group writes."""
    answers = four(jobs.resolve, kind)
    assert [ranks for ranks, _ in answers] == members
    assert [rank for rank, (_, writes) in enumerate(answers) if writes] == writers


def test_groups_that_cannot_be_are_refused(two: Pool) -> None:
    """A group without this process, and tensor parallelism, are refused with the way round."""
    answers = two(jobs.resolve, "not a member")
    assert answers[0] == (None, True)  # a group of one
    assert "a process group this process belongs to" in answers[1]
    for text in two(jobs.resolve, "tensor parallel"):
        assert "parameter 'weight' is placed" in text
        assert "tensor parallel" in text


def test_without_torch_distributed() -> None:
    """A process by itself has no group, writes, and keeps its window; a group is refused."""
    model = nn.Linear(2, 2)
    assert resolve_group(model, "auto") is None
    assert resolve_group(model, None) is None
    assert is_writer(None)
    window = Window([jobs.moments(1)])
    reduced = reduce_window(window, [Part("a", "shared", model.weight)], None, 0)
    assert reduced.window is window
    assert reduced.weights[0] is model.weight
    assert reduced.depths == {}
    with pytest.raises(ConfigurationError, match="distributed is not initialised"):
        resolve_group(model, "gloo")  # type: ignore[arg-type]
