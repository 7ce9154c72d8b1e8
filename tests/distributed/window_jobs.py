"""Jobs on windows built by hand; run on every rank by a pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from feature_probe.capture.sharding import full
from feature_probe.processes.reduction import Part, Reduced, is_writer, reduce_window, resolve_group
from feature_probe.sums.moments import Moments
from feature_probe.sums.window import Window

#: What a layer's sums are.
SUMS = (
    "gradient", "gradient_weight", "jacobian", "loss", "jacobian_change", "jacobian_rows",
    "loss_rows",
)  # fmt: skip
#: Collectives by which the library may talk.
COLLECTIVES = ("all_gather", "all_gather_object", "all_reduce", "broadcast", "barrier")


def moments(seed: int, d_out: int = 5, d_in: int = 3, groups: int = 1) -> Moments:
    """Sums of a layer that only its seed decides."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = Moments()
    made.add_gradient(draw(groups * d_out, d_in), weight=2.0)
    made.add_outer("jacobian", draw(7, groups, d_out))
    made.add_outer("loss", draw(7, groups, d_out))
    made.jacobian_rows, made.loss_rows = 7 + seed, 8 + seed
    return made


def plain(reduced: Reduced) -> dict[str, Any]:
    """A reduced window as plain data."""
    window = reduced.window
    return {
        "layers": [{name: getattr(layer, name) for name in SUMS} for layer in window.layers],
        "counts": (window.steps, window.examples, window.left_out, window.discarded),
        "problems": window.problems,
        "weights": reduced.weights,
        "depths": dict(reduced.depths),
        "elsewhere": reduced.elsewhere,
    }


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the collectives called meanwhile, through torch.distributed's functions."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def reduce_plainly(names: Sequence[Sequence[str]], held: str, **changes: Any) -> dict[str, Any]:
    """Each rank brings the targets named for it; seed 10·rank + the last digit of the name."""
    rank = dist.get_rank()
    own = names[rank]
    window = Window(
        [moments(10 * rank + int(name[-1])) for name in own],
        steps=2, examples=10 + rank, left_out=rank, discarded=0,
    )  # fmt: skip
    for index, kind, text in changes.get("problems", {}).get(rank, ()):
        window.problems[index, kind] = text
    for index, kind in changes.get("absent", {}).get(rank, ()):
        setattr(window.layers[index], kind, None)
    for index, weight in changes.get("weights", {}).get(rank, {}).items():
        window.layers[index].gradient_weight = weight
    step = changes.get("steps", {}).get(rank, 4)
    depths = changes.get("depths", {}).get(rank, {})
    parts = [
        Part(name, held, changes.get("tensors", {}).get(rank), depths.get(name))  # type: ignore[arg-type]
        for name in own
    ]
    with counted() as calls:
        reduced = plain(reduce_window(window, parts, dist.group.WORLD, step))
    return reduced | {"calls": calls}


def reduce_of_other_shapes() -> None:
    """Rank 1 has a layer of another size under the same name."""
    rank = dist.get_rank()
    window = Window([moments(1, d_out=5 + rank)])
    reduce_window(window, [Part("a", "mean")], dist.group.WORLD, 0)


def reduce_with_a_failure() -> None:
    """The last rank cannot even describe its sums."""
    window = Window([moments(1)])
    if dist.get_rank() == dist.get_world_size() - 1:
        window.problems[7, "loss"] = "there is no target 7"
    reduce_window(window, [Part("a", "mean")], dist.group.WORLD, 0)


def reduce_in_two_dtypes() -> dict[str, Any]:
    """One layer in float64, one in float32, and one that is float32 on rank 0 alone."""
    rank = dist.get_rank()
    window = Window([moments(rank), moments(rank), moments(rank)])
    for index in (1, 2):
        if index == 1 or rank == 0:
            layer = window.layers[index]
            for kind in ("gradient", "jacobian", "loss"):
                setattr(layer, kind, getattr(layer, kind).float())
    with counted() as calls:
        parts = [Part(name, "mean") for name in "abc"]
        reduced = plain(reduce_window(window, parts, dist.group.WORLD, 0))
    return reduced | {"calls": calls}


def gather_shards(shapes: Sequence[tuple[int, ...]], axis: int) -> dict[str, Any]:
    """Tensors of several dtypes, sharded and replicated, made whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dtypes = [torch.float64, torch.bfloat16, torch.float32]
    given = [torch.randn(shape).to(dtypes[i % 3]) for i, shape in enumerate(shapes)]
    sharded = [distribute_tensor(t, mesh, [Shard(axis)]) for t in given]
    replica = distribute_tensor(given[0], mesh, [Replicate()])
    with counted() as calls:
        whole = full([None, *sharded, replica, given[0]])
    return {"given": given, "whole": whole, "calls": calls}


def gather_on_a_grid() -> dict[str, Any]:
    """A tensor on a mesh of two dimensions, replicated over one and sharded over the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    given = torch.randn(6, 3)
    sharded = distribute_tensor(given, mesh, [Replicate(), Shard(0)])
    return {"given": given, "whole": full([sharded])[0]}


def resolve(kind: str) -> Any:
    """The ranks of the resolved group, or the text of what was raised; and who writes."""
    world = dist.get_world_size()
    mine = dist.get_rank() // 2
    pairs = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]
    model: nn.Module = nn.Linear(4, 4)
    given: Any = "auto"
    if kind == "ddp of a pair":
        model = nn.Sequential(DistributedDataParallel(model, process_group=pairs[mine]))
    elif kind == "given pair":
        given = pairs[mine]
    elif kind == "alone":
        given = None
    elif kind == "not a member":
        given = dist.new_group([0])
    elif kind == "tensor parallel":
        mesh = init_device_mesh("cpu", (world,))
        split = distribute_tensor(model.weight.detach(), mesh, [Shard(1)])
        model.weight = nn.Parameter(split)
    try:
        group = resolve_group(model, given)
    except ValueError as error:
        return str(error)
    return (None if group is None else dist.get_process_group_ranks(group)), is_writer(group)


def call(job: Any, args: tuple[Any, ...], changes: dict[str, Any]) -> Any:
    """A job with keywords."""
    return job(*args, **changes)


def reduce_with_a_weight_missing() -> list[Any]:
    """The last rank never computed the layer's weight."""
    last = dist.get_rank() == dist.get_world_size() - 1
    weight = None if last else torch.full((5, 3), 1.0 + dist.get_rank())
    reduced = reduce_window(Window([moments(1)]), [Part("a", "mean", weight)], dist.group.WORLD, 0)
    return reduced.weights
