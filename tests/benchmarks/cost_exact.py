"""Exact Jacobians: the passes they take, their arithmetic, their memory and their time.

With ``jacobian="exact"`` K is formed of one backward pass for each of the c outputs. Such a pass
needs the activations' gradients alone: from the output down to the first layer's output z, and no
weight's gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cost_figures as figures
import torch
from cost_growth import Size, endless, mode
from cost_models import Recipe, Training
from cost_parts import WINDOW, probed
from cost_timing import Memory, Mode, apart, interleaved, seconds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop

#: c, from few to many; the first and the last are compared.
OUTPUTS = (4, 16, 64)
#: Memory and time: an array [n, c, d] of one layer is 32 MiB at the most outputs.
SIZE, QUICK = Size(width=512, depth=4, batch=256), Size(width=256, depth=2, batch=128)
#: Counted: widths that tell d_out × d_in from d_out × d_out, and from the batch.
WIDTHS, BATCH = (24, 40, 56, 32), 72


class _Passed(torch.autograd.Function):
    """The identity, telling of every gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tell: Callable[[], None]) -> Tensor:
        """``x``, of any shape, as it is."""
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        ctx.tell()
        return gradient, None


class Gate(nn.Module):
    """Hands its input on, and counts the backward passes that go through it.

    In a list, as plain attributes are set back by the probe after passes of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[None] = []

    @property
    def passes(self) -> int:
        """How many there were."""
        return len(self._seen)

    def forward(self, x: Tensor) -> Tensor:
        """``x``, of any shape, as it is."""
        out: Tensor = _Passed.apply(x, self._count)
        return out

    def _count(self) -> None:
        self._seen.append(None)


def gated(outputs: int) -> Recipe:
    """A perceptron of :data:`WIDTHS` with a gate behind every hidden layer."""

    def make() -> nn.Module:
        hidden = [[nn.Linear(a, b), Gate(), nn.ReLU()] for a, b in itertools.pairwise(WIDTHS)]
        return nn.Sequential(*itertools.chain(*hidden), nn.Linear(WIDTHS[-1], outputs))

    draw = lambda: (torch.randn(BATCH, WIDTHS[0]), torch.randint(outputs, (BATCH,)))  # noqa: E731
    return Recipe(f"gated perceptron, {outputs} outputs", make, draw, 1)


class WeightProducts(TorchDispatchMode):
    """Counts matrix products of ``[d_out, n]`` and ``[n, d_in]``, or the other way round.

    Args:
        shapes: d_out and d_in of the weights.

    Attributes:
        count: How many there were.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._shapes = {*shapes, *((b, a) for a, b in shapes)}
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm") and tuple(out.shape[-2:]) in self._shapes:
            self.count += 1
        return out


def _in_place(flop: Callable[..., int]) -> Callable[..., int]:
    """FLOPs of a product that is added to its first argument, which torch does not count."""
    return lambda *shapes, out_shape=None, **_: flop(*shapes[:3])


_IN_PLACE = {
    torch.ops.aten.addmm_: _in_place(addmm_flop),
    torch.ops.aten.baddbmm_: _in_place(baddbmm_flop),
}


def counted(training: Training, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What a step does: backward passes at every gate, weight products, FLOPs."""
    gates = [module for module in training.model.modules() if isinstance(module, Gate)]
    before = [gate.passes for gate in gates]
    products = WeightProducts(shapes)
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as flops, products:
        training.step()
    return {
        "passes": [gate.passes - old for gate, old in zip(gates, before, strict=True)],
        "weight_products": products.count,
        "flops": flops.get_total_flops(),
    }


def followed(recipe: Recipe) -> Training:
    """A training whose next step is in a window, and not the first or the last of it."""
    training = Training(recipe)
    probed(training, jacobian="exact", window=WINDOW, every=lambda step: step == WINDOW)
    for _ in range(WINDOW - 1):
        training.step()
    return training


def arithmetic(shapes: Sequence[tuple[int, int]], rows: int) -> dict[str, int]:
    """FLOPs of an activation-only backward pass, and of a Gram sum of every layer.

    Args:
        shapes: d_out and d_in, from the first layer to the last.
        rows: n.
    """
    return {
        "pass": sum(2 * rows * d_out * d_in for d_out, d_in in shapes[1:]),
        "gram": sum(2 * rows * d_out**2 for d_out, _ in shapes),
    }


def work(outputs: int) -> dict[str, Any]:
    """What a window's step does beyond a plain one, and the FLOPs that it ought to take.

    They are those of c passes, of c Gram sums for K and of one for E.
    """
    recipe = gated(outputs)
    shapes = [(b, a) for a, b in itertools.pairwise((*WIDTHS, outputs))]
    plain = Training(recipe)
    plain.step()
    before, inside = counted(plain, shapes), counted(followed(recipe), shapes)
    one = arithmetic(shapes, BATCH)
    pairs = zip(before["passes"], inside["passes"], strict=True)
    return {
        "passes": [after - old for old, after in pairs],
        "plain_passes": before["passes"],
        "weight_products": inside["weight_products"] - before["weight_products"],
        "plain_weight_products": before["weight_products"],
        "flops": inside["flops"] - before["flops"],
        "flops_said": outputs * (one["pass"] + one["gram"]) + one["gram"],
    }


def peak(size: Size) -> int:
    """Bytes at the peak of a window's step beyond that of a plain step; in a process of its own."""
    starting = Training(Size(16, 1, 4, 1, 2).recipe())  # what it loads is no memory of the probe's
    probed(starting, jacobian="exact", every=lambda step: step == 1)
    starting.step(), starting.step()
    training = Training(size.recipe())
    memory = Memory(training.device)
    for _ in range(3):
        training.step()
    plain = memory.peak_of(training.step)
    probed(training, jacobian="exact", window=WINDOW, every=lambda step: step == WINDOW)
    for _ in range(WINDOW - 1):
        training.step()
    return memory.peak_of(training.step) - plain


def _pass(training: Training) -> Callable[[], float]:
    """An activation-only backward pass: from the output to the first layer's, no weight's."""
    first, *others = training.model.requires_grad_(False)
    z = first(training.batches[0][0]).requires_grad_()
    out = nn.Sequential(*others)(z)
    v = torch.ones_like(out)

    def once() -> None:
        torch.autograd.grad(out, z, v, retain_graph=True)

    return lambda: seconds(once, training.device)


def times(size: Size, rounds: int, limit: float) -> dict[str, list[list[float]]]:
    """Seconds by round of a plain step, one inside a window, and an activation-only pass."""
    plain, inside, alone = (Training(size.recipe()) for _ in range(3))
    probed(inside, **endless("exact", rounds))
    modes = {"plain": mode(plain), "exact": mode(inside), "pass": Mode(_pass(alone), WINDOW - 1)}
    return interleaved(modes, rounds, limit)


def exact(rounds: int, limit: float, *, quick: bool = False) -> list[dict[str, Any]]:
    """For each number of outputs: what is done, bytes at the peak, and seconds.

    Args:
        rounds: Interleaved rounds of the clock.
        limit: Seconds after which no further round is begun, after three.
        quick: Whether only to see that everything runs.
    """
    found = []
    for outputs in OUTPUTS[::2] if quick else OUTPUTS:
        given = QUICK if quick else SIZE
        size = Size(given.width, given.depth, given.batch, 1, outputs)
        shapes = [(size.width, size.width)] * size.depth + [(outputs, size.width)]
        found.append(
            {
                "outputs": outputs,
                **work(outputs),
                "peak": apart(peak, size),
                "array": 4 * size.batch * outputs * size.width,
                "seconds": times(size, rounds, limit),
                "bound": arithmetic(shapes, size.batch),
            }
        )
    return found


def passes_each(one: Mapping[str, Any]) -> float:
    """Backward passes per output, where most go through."""
    return max(one["passes"]) / one["outputs"]


def of_theory(one: Mapping[str, Any]) -> float:
    """FLOPs added to a step, in those of c activation-only passes and the Gram sums."""
    return one["flops"] / one["flops_said"]


def seconds_each(one: Mapping[str, Any]) -> list[float]:
    """What an output adds to a step, in activation-only passes of the same round."""
    added = [ratio - 1 for ratio in figures.ratios(one["seconds"], "exact")]
    alone = figures.ratios(one["seconds"], "pass")
    return [each / unit / one["outputs"] for each, unit in zip(added, alone, strict=True)]


def products_each(one: Mapping[str, Any]) -> float:
    """The same by FLOPs: the pass and the Gram sums behind it, the loss's shared out."""
    bound, outputs = one["bound"], one["outputs"]
    return 1 + bound["gram"] / bound["pass"] * (outputs + 1) / outputs


def peak_ratio(found: Sequence[Mapping[str, Any]]) -> float:
    """The peak at the most outputs over that at the fewest."""
    return found[-1]["peak"] / found[0]["peak"]
