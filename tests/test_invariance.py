"""Scale invariance of real networks, trained by plain autograd: what is found, and what is not."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe.theory.invariance import (
    ScaleInvariance,
    StepScalars,
    _log_chance,
    scale_invariance,
)

Answer = tuple[str, int]
Input = Callable[[torch.Generator], Tensor]


@dataclass
class Case:
    """A network, its classification data, and the truth about each of its layers."""

    model: nn.Module
    truth: dict[str, Answer]
    inputs: Tensor
    targets: Tensor

    def layer(self, name: str) -> nn.Linear | nn.Conv2d:
        """A layer by name."""
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        return module


class StandardisedConv(nn.Conv2d):
    """Convolution by (w − mean)/std of every row, the gradient reaching the stored weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.var((1, 2, 3), keepdim=True).add(1e-10).sqrt()
        scale = self.weight[0].numel() ** -0.5
        return F.conv2d(x, (self.weight - mean) / std * scale, self.bias, padding=1)


class Attention(nn.Module):
    """One pre-LN transformer block behind an embedding, its queries and keys normed or not."""

    def __init__(self, width: int, heads: int, normed: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)
        self.heads, self.normed, self.eps = heads, normed, eps
        self.gain = nn.Parameter(torch.full((2, 1), 1.0))

    def split(self, x: Tensor, which: int) -> Tensor:
        """[n, s, width] to [n, heads, s, width/heads], RMS-normed for queries and keys."""
        x = x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)
        if self.normed and which < 2:
            rms = x.square().mean(-1, keepdim=True).add(self.eps).sqrt()
            return x / rms * self.gain[which]
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 4]."""
        x = self.embed(x)
        h = self.norm1(x)
        q, k, v = (self.split(p(h), i) for i, p in enumerate((self.q, self.k, self.v)))
        y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        logits: Tensor = self.head(self.norm3(x).mean(1))
        return logits


def images(generator: torch.Generator) -> Tensor:
    """512 images of 3 × 6 × 6 with a mean."""
    return torch.randn(512, 3, 6, 6, generator=generator) + 0.3


def vectors(generator: torch.Generator) -> Tensor:
    """512 vectors of length 20, not centred."""
    return torch.randn(512, 20, generator=generator) + 0.3


def sequences(generator: torch.Generator) -> Tensor:
    """512 sequences of 5 vectors of length 12."""
    return torch.randn(512, 5, 12, generator=generator)


def mlp(width: int, middle: Callable[[], list[nn.Module]], bias: bool = True) -> nn.Module:
    """Three linear layers, with ``middle`` after the first two."""
    return nn.Sequential(
        nn.Linear(20, width, bias=bias),
        *middle(),
        nn.Linear(width, width, bias=bias),
        *middle(),
        nn.Linear(width, 4, bias=bias),
    )


def convolutions(middle: Callable[[], list[nn.Module]], kind: type[nn.Conv2d]) -> nn.Module:
    """Two convolutions of 16 channels with ``middle`` after each, a mean and a linear layer."""
    return nn.Sequential(
        kind(3, 16, 3, padding=1),
        *middle(),
        kind(16, 16, 3, padding=1),
        *middle(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


NONE, ROWS32, ROWS16, LAYER, GROUPS4 = (
    ("none", 0),
    ("rows", 32),
    ("rows", 16),
    ("layer", 1),
    ("groups", 4),
)
TRANSFORMER = ["embed", "q", "k", "v", "o", "up", "down", "head"]


def deep(first: Answer, position: int, second: Answer, last: int) -> dict[str, Answer]:
    """The truth about three layers of a Sequential; the last one is never invariant."""
    return {"0": first, str(position): second, str(last): NONE}


Entry = tuple[Callable[[], nn.Module], Input, dict[str, Answer]]
INVARIANT: dict[str, Entry] = {
    "linear-batchnorm": (
        lambda: mlp(32, lambda: [nn.BatchNorm1d(32), nn.ReLU()]),
        vectors,
        deep(ROWS32, 3, ROWS32, 6),
    ),
    "linear-relu-batchnorm": (  # the bias scales along
        lambda: mlp(32, lambda: [nn.ReLU(), nn.BatchNorm1d(32)]),
        vectors,
        deep(ROWS32, 3, ROWS32, 6),
    ),
    "conv-batchnorm": (
        lambda: convolutions(lambda: [nn.BatchNorm2d(16), nn.ReLU()], nn.Conv2d),
        images,
        deep(ROWS16, 3, ROWS16, 8),
    ),
    "standardised-conv": (
        lambda: convolutions(lambda: [nn.ReLU()], StandardisedConv),
        images,
        deep(ROWS16, 2, ROWS16, 6),
    ),
    "linear-layernorm": (
        lambda: mlp(32, lambda: [nn.LayerNorm(32), nn.ReLU()]),
        vectors,
        deep(LAYER, 3, LAYER, 6),
    ),
    "linear-layernorm-no-bias": (
        lambda: mlp(32, lambda: [nn.LayerNorm(32), nn.ReLU()], bias=False),
        vectors,
        deep(LAYER, 3, LAYER, 6),
    ),
    "conv-groupnorm": (
        lambda: convolutions(lambda: [nn.GroupNorm(4, 16), nn.ReLU()], nn.Conv2d),
        images,
        deep(GROUPS4, 3, GROUPS4, 8),
    ),
    "query-key-norm": (
        lambda: Attention(32, 4, normed=True),
        sequences,
        {name: GROUPS4 if name in "qk" else NONE for name in TRANSFORMER},
    ),
}
PLAIN: dict[str, Entry] = {
    "relu": (lambda: mlp(32, lambda: [nn.ReLU()]), vectors, deep(NONE, 2, NONE, 4)),
    "tanh": (lambda: mlp(48, lambda: [nn.Tanh()]), vectors, deep(NONE, 2, NONE, 4)),
    "relu-no-bias": (lambda: mlp(16, lambda: [nn.ReLU()], False), vectors, deep(NONE, 2, NONE, 4)),
    "narrow": (lambda: mlp(3, lambda: [nn.Tanh()]), vectors, deep(NONE, 2, NONE, 4)),
    "deep-linear": (lambda: mlp(24, list, bias=False), vectors, deep(NONE, 1, NONE, 2)),
    "conv": (
        lambda: convolutions(lambda: [nn.ReLU()], nn.Conv2d),
        images,
        deep(NONE, 2, NONE, 6),
    ),
    "transformer": (
        lambda: Attention(32, 4, normed=False),
        sequences,
        dict.fromkeys(TRANSFORMER, NONE),
    ),
}


def build(entry: Entry, seed: int, dtype: torch.dtype) -> Case:
    """Initialise the network and draw its data: labels from a random linear teacher."""
    make, draw, truth = entry
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().to(dtype)
    generator = torch.Generator().manual_seed(1000 + seed)
    inputs = draw(generator).to(dtype)
    flat = inputs.flatten(1)
    targets = (flat @ torch.randn(flat.shape[1], 4, generator=generator).to(dtype)).argmax(1)
    return Case(model, truth, inputs, targets)


def read(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One step's scalars of a layer, straight from weight and gradient."""
    assert layer.weight.grad is not None
    w, g = layer.weight.detach().flatten(1).double(), layer.weight.grad.flatten(1).double()
    bias = None
    if layer.bias is not None:
        assert layer.bias.grad is not None
        b, gb = layer.bias.detach().double(), layer.bias.grad.double()
        bias = torch.stack([b * gb, b * b, gb * gb], 1)
    return (w * g).sum(1), w.square().sum(1), g.square().sum(1), bias


def train(
    case: Case,
    steps: int,
    lr: float = 0.05,
    decay: float = 1e-3,
    batch: int = 32,
    seed: int = 0,
    autocast: bool = False,
) -> Iterator[int]:
    """SGD with momentum; yields after every backward pass, before the weights move."""
    optimizer = torch.optim.SGD(case.model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    generator = torch.Generator().manual_seed(2000 + seed)
    everything = torch.arange(len(case.inputs))
    for step in range(steps):
        chosen = everything
        if batch < len(everything):
            chosen = torch.randperm(len(everything), generator=generator)[:batch]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = case.model(case.inputs[chosen])
        F.cross_entropy(logits.to(case.inputs.dtype), case.targets[chosen]).backward()
        yield step
        optimizer.step()


def collect(case: Case, probed: Iterator[bool]) -> dict[str, StepScalars]:
    """The scalars of every layer on the probed steps."""
    taken: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor | None]]] = {}
    for keep in probed:
        if keep:
            for name in case.truth:
                taken.setdefault(name, []).append(read(case.layer(name)))
    return {name: stack(rows, case.layer(name)) for name, rows in taken.items()}


def stack(
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor | None]], layer: nn.Linear | nn.Conv2d
) -> StepScalars:
    """Steps first."""
    dot, weight, gradient = (torch.stack([row[i] for row in rows]) for i in range(3))  # type: ignore[misc]
    biases = [row[3] for row in rows if row[3] is not None]
    bias = torch.stack(biases) if biases else None
    return StepScalars(dot, weight, gradient, bias, layer.weight[0].numel())


def judge(case: Case, after: int, steps: int, **options: float) -> dict[str, ScaleInvariance]:
    """Train for ``after`` steps, then probe ``steps`` in a row."""
    run = train(case, after + steps, **options)  # type: ignore[arg-type]
    found = collect(case, (step >= after for step in run))
    return {name: scale_invariance(scalars) for name, scalars in found.items()}


def agrees(found: ScaleInvariance, truth: Answer) -> bool:
    """Whether kind and, where something is claimed, number of blocks are right."""
    return found.kind == truth[0] and (found.kind == "none" or found.blocks == truth[1])


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
AFTER = pytest.mark.parametrize("after", [0, 40, pytest.param(300, marks=pytest.mark.slow)])


@pytest.mark.parametrize("name", [*INVARIANT, *PLAIN])
@DTYPES
@AFTER
def test_every_layer_is_told_right(name: str, dtype: torch.dtype, after: int) -> None:
    """Eight minibatch steps tell the kind and the blocks of every layer, new and trained."""
    case = build((INVARIANT | PLAIN)[name], 0, dtype)
    found = judge(case, after, 8)
    assert {
        layer: agrees(found[layer], truth) for layer, truth in case.truth.items()
    } == dict.fromkeys(case.truth, True), found
    invariant = [f.statistic for f in found.values() if f.kind in ("rows", "groups", "layer")]
    assert all(rho < 1e-5 for rho in invariant)
    assert all(f.steps == 8 for f in found.values())


@pytest.mark.parametrize("name", ["linear-batchnorm", "linear-layernorm", "conv-groupnorm"])
def test_bfloat16_autocast_leaves_the_answer(name: str) -> None:
    """Rounding of a bf16 forward and backward pass (ρ about 1e-5) is no reason to doubt."""
    case = build(INVARIANT[name], 0, torch.float32)
    found = judge(case, 10, 8, autocast=True)
    assert all(agrees(found[layer], truth) for layer, truth in case.truth.items()), found
    assert 1e-7 < found["0"].statistic < 1e-4


WINDOWS = [(start, 8, 1) for start in (0, 4, 10, 24)] + [(0, 16, 1), (0, 32, 1), (0, 8, 4)]
TRAININGS: dict[str, dict[str, float]] = {
    "minibatches": {},
    "full batch": {"batch": 512},
    "full batch, hardly moving": {"batch": 512, "lr": 1e-4},
    "nearly full batches": {"batch": 480, "lr": 1e-3},
}


def cut(scalars: StepScalars, start: int, steps: int, stride: int) -> StepScalars:
    """A window of a run."""
    kept = slice(start, start + steps * stride, stride)
    bias = None if scalars.bias is None else scalars.bias[kept]
    parts = [x[kept] for x in (scalars.dot, scalars.weight, scalars.gradient)]
    return StepScalars(parts[0], parts[1], parts[2], bias, scalars.columns)


def tally(
    table: dict[str, Entry], seeds: range, trainings: list[str], length: int = 40
) -> tuple[Counter[str], int]:
    """Answers over every window ("right", "unknown", "wrong") and the number of layer runs."""
    answers: Counter[str] = Counter()
    runs = 0
    for training in trainings:
        for entry in table.values():
            for seed in seeds:
                case = build(entry, seed, torch.float32)
                run = train(case, length, seed=seed, **TRAININGS[training])  # type: ignore[arg-type]
                for name, scalars in collect(case, (True for _ in run)).items():
                    runs += 1
                    for window in WINDOWS:
                        found = scale_invariance(cut(scalars, *window))
                        right = agrees(found, case.truth[name])
                        unknown = found.kind == "unknown"
                        answers["right" if right else "unknown" if unknown else "wrong"] += 1
    return answers, runs


@pytest.mark.slow
def test_no_false_alarm_over_many_plain_layers() -> None:
    """Plain networks under four ways of training: no window of any layer is called invariant."""
    answers, runs = tally(PLAIN, range(4), list(TRAININGS))
    assert runs >= 400
    assert answers["wrong"] == 0
    assert answers["unknown"] < 0.05 * answers.total(), answers


@pytest.mark.slow
def test_few_misses_over_many_invariant_layers() -> None:
    """Normalised networks: no window is told wrong, and few are left open."""
    answers, runs = tally(INVARIANT, range(2), list(TRAININGS))
    assert runs >= 200
    assert answers["wrong"] == 0
    assert answers["unknown"] < 0.05 * answers.total(), answers


def test_no_false_alarm_over_some_plain_layers() -> None:
    """The count above on small networks, minibatches and a nearly repeated gradient."""
    small = {name: PLAIN[name] for name in ("relu", "relu-no-bias", "narrow", "deep-linear")}
    answers, runs = tally(small, range(2), ["minibatches", "full batch, hardly moving"])
    assert runs == 48
    assert answers["wrong"] == 0
    assert answers["unknown"] < 0.1 * answers.total(), answers


def crossing(seed: int) -> Case:
    """A plain network at weights where the first layer's ⟨W, G⟩ is zero for the full batch."""
    case = build(PLAIN["tanh"], seed, torch.float64)
    weight = case.layer("0").weight
    for _ in range(20):
        loss = F.cross_entropy(case.model(case.inputs), case.targets)
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= (weight * gradient).sum() / gradient.square().sum() * gradient * 0.7
    return case


def test_a_crossing_through_zero_is_no_invariance() -> None:
    """⟨W, G⟩ = 0 of a layer, held by a gradient that repeats, is unknown; on minibatches none."""
    held = judge(crossing(0), 0, 8, batch=512, lr=1e-7)["0"]
    assert held.kind == "unknown"
    assert "by chance" in held.reason
    assert judge(crossing(0), 0, 8, batch=32, lr=1e-7)["0"].kind == "none"
    moving = judge(crossing(0), 0, 16, batch=512, lr=0.05)["0"]
    assert moving.kind == "none"


@pytest.mark.parametrize(
    ("eps", "allowed"), [(0.01, {"partly"}), (0.03, {"partly", "none"}), (10.0, {"none"})]
)
def test_a_large_epsilon_ends_in_partly_and_none(eps: float, allowed: set[str]) -> None:
    """BatchNorm whose ε is not small against the variance is partly invariant, then not at all."""
    entry: Entry = (
        lambda: mlp(32, lambda: [nn.BatchNorm1d(32, eps=eps), nn.ReLU()]),
        vectors,
        deep(ROWS32, 3, ROWS32, 6),
    )
    found = judge(build(entry, 0, torch.float32), 0, 16)
    assert {found["0"].kind, found["3"].kind} <= allowed
    assert found["6"].kind == "none"


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scalars_of(
    w: Tensor, g: Tensor, b: Tensor | None = None, gb: Tensor | None = None
) -> StepScalars:
    """Scalars of weights and gradients ``[T, rows, d]`` and biases ``[T, rows]``."""
    bias = None if b is None or gb is None else torch.stack([b * gb, b * b, gb * gb], -1)
    return StepScalars((w * g).sum(-1), w.square().sum(-1), g.square().sum(-1), bias, w.shape[-1])


def orthogonal(w: Tensor, g: Tensor, blocks: int, left: float = 0.0) -> Tensor:
    """g without its part along w in every block of rows, up to the share ``left``."""
    w_, g_ = (x.reshape(len(x), blocks, -1) for x in (w, g))
    along = (w_ * g_).sum(-1, keepdim=True) / w_.square().sum(-1, keepdim=True)
    return (g_ - (1 - left) * along * w_).reshape(g.shape)


@pytest.mark.parametrize("blocks", [24, 12, 8, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_statistic_is_its_definition(blocks: int, biased: bool) -> None:
    """ρ, kind and blocks by explicit loops, for every division of 24 rows, bias in the block."""
    # With a bias the last column stands for it: only the two together are orthogonal.
    steps, rows, columns = 12, 24, 7
    w, raw = normal(steps, rows, columns), normal(steps, rows, columns, seed=1)
    g = orthogonal(w, raw, blocks, left=1e-3)
    found = scale_invariance(
        scalars_of(w[..., :-1], g[..., :-1], w[..., -1], g[..., -1]) if biased else scalars_of(w, g)
    )
    ratios = []
    for block in range(blocks):
        inner = slice(block * rows // blocks, (block + 1) * rows // blocks)
        a = c = 0.0
        for t in range(steps):
            a += float(w[t, inner].flatten() @ g[t, inner].flatten()) ** 2
            c += float(w[t, inner].norm() ** 2 * g[t, inner].norm() ** 2)
        ratios.append(rows // blocks * columns * a / c)
    assert (found.kind, found.blocks) == (
        {24: "rows", 1: "layer"}.get(blocks, "groups"),
        blocks,
    )
    expected = float(torch.tensor(ratios, dtype=torch.float64).sort().values[(blocks - 1) // 2])
    assert found.statistic == pytest.approx(expected, rel=1e-10)
    assert ("with its bias" in found.reason) == biased


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_the_gradients_unit_does_not_matter(scale: float) -> None:
    """A loss scale changes nothing, and the statistic of "none" is the rows' median."""
    w, g = normal(10, 20, 9), normal(10, 20, 9, seed=1)
    found = scale_invariance(scalars_of(w, g * scale))
    a = (w * g).sum(-1).square().sum(0)
    c = (w.square().sum(-1) * g.square().sum(-1)).sum(0)
    assert found.kind == "none"
    assert found.statistic == pytest.approx(float((9 * a / c).median()), rel=1e-10)
    assert (found.blocks, found.steps) == (20, 10)


@pytest.mark.parametrize(("strays", "kind"), [(1, "rows"), (2, "rows"), (3, "none")])
def test_95_percent_of_the_rows_are_enough(strays: int, kind: str) -> None:
    """Of 40 rows two may stray, not three."""
    w, g = normal(8, 40, 9), normal(8, 40, 9, seed=1)
    g[:, strays:] = orthogonal(w, g, 40)[:, strays:]
    assert scale_invariance(scalars_of(w, g)).kind == kind


def test_rows_without_gradient_say_nothing() -> None:
    """Dead rows are left out, and the reason says how many are left."""
    w, g = normal(8, 32, 9), normal(8, 32, 9, seed=1)
    g = orthogonal(w, g, 32)
    g[:, ::2] = 0
    found = scale_invariance(scalars_of(w, g))
    assert (found.kind, found.blocks) == ("rows", 32)
    assert "(16 with a gradient)" in found.reason
    g[:, 1::2] = normal(8, 16, 9, seed=2)
    assert scale_invariance(scalars_of(w, g)).kind == "none"


def test_too_few_steps_are_unknown() -> None:
    """Fewer than eight finite steps: unknown, and how many are missing."""
    w = normal(9, 16, 9)
    full = scalars_of(w, orthogonal(w, normal(9, 16, 9, seed=1), 16))
    found = scale_invariance(cut(full, 0, 3, 1))
    assert (found.kind, found.blocks, found.steps) == ("unknown", 0, 3)
    assert math.isnan(found.statistic)
    assert found.reason == "seen on 3 finite steps; 8 are needed, 5 more"
    assert scale_invariance(cut(full, 0, 0, 1)).kind == "unknown"
    full.gradient[4, 3] = math.inf
    kept = scale_invariance(full)
    assert (kept.kind, kept.steps) == ("rows", 8)
    full.dot[0, 0] = math.nan
    assert (scale_invariance(full).kind, scale_invariance(full).steps) == ("unknown", 7)


def test_a_nan_in_the_bias_drops_the_step() -> None:
    """A step counts only if the bias is finite too."""
    w, g, b = normal(9, 16, 9), normal(9, 16, 9, seed=1), normal(9, 16, seed=2)
    scalars = scalars_of(w, orthogonal(w, g, 16), b, b.roll(1))
    assert scalars.bias is not None
    scalars.bias[2, 5, 0] = math.nan
    found = scale_invariance(scalars)
    assert (found.kind, found.steps) == ("rows", 8)


def test_nothing_to_see_is_unknown() -> None:
    """A zero gradient, or a zero weight, is unknown and says which."""
    w = normal(8, 16, 9)
    assert "no gradient" in scale_invariance(scalars_of(w, 0 * w)).reason
    no_weight = scale_invariance(scalars_of(0 * w, w))
    assert no_weight.kind == "unknown"
    assert "no row had both a weight and a gradient" in no_weight.reason


def test_rows_of_one_parameter() -> None:
    """With d_in = 1 a row has no direction: groups and the layer can be told, rows cannot."""
    w, g = normal(12, 24, 1), normal(12, 24, 1, seed=1)
    found = scale_invariance(scalars_of(w, g))
    assert found.kind == "unknown"
    assert "a row of one parameter" in found.reason
    grouped = scale_invariance(scalars_of(w, orthogonal(w, g, 4)))
    assert (grouped.kind, grouped.blocks) == ("groups", 4)


def test_one_row_alone_proves_nothing() -> None:
    """A layer of one row whose ρ is small cannot be told from one gradient that repeats."""
    w, g = normal(16, 1, 50), normal(16, 1, 50, seed=1)
    assert scale_invariance(scalars_of(w, g)).kind == "none"
    assert scale_invariance(scalars_of(w, orthogonal(w, g, 1, left=1e-3))).kind == "unknown"
    exact = scale_invariance(scalars_of(w, orthogonal(w, g, 1)))
    assert (exact.kind, exact.blocks) == ("rows", 1)


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_repeated_gradients_raise_no_alarm(rows: int) -> None:
    """Unrelated directions, one gradient repeated with a little noise: ρ is small, no alarm."""
    trials, small = 300, 0
    for seed in range(trials):
        w = normal(1, rows, 30, seed=seed).expand(8, -1, -1)
        g = normal(1, rows, 30, seed=trials + seed) + 1e-3 * normal(
            8, rows, 30, seed=2 * trials + seed
        )
        found = scale_invariance(scalars_of(w, g))
        assert found.kind in ("none", "unknown"), found
        dot, size = (w * g).sum((1, 2)), w[0].square().sum() * g.square().sum((1, 2))
        small += float(rows * 30 * dot.square().sum() / size.sum()) < 1e-3
    assert small > 0, "the whole layer's ρ must fall below 1e-3 by chance for the test to bite"


def test_a_single_large_step_counts_as_one() -> None:
    """Where one step holds almost all of Σ‖w‖²‖g‖², a small ρ rests on that step alone."""
    w, g = normal(8, 16, 9), normal(8, 16, 9, seed=1)
    small = orthogonal(w, g, 1, left=1e-2)
    assert scale_invariance(scalars_of(w, small)).kind == "layer"
    g[0] = 1e6 * small[0]
    assert scale_invariance(scalars_of(w, g)).kind == "unknown"


def test_halves_of_an_invariant_layer_are_one_piece_of_evidence() -> None:
    """Before LayerNorm two halves' ⟨w, g⟩ cancel, so both are small together by one chance."""
    w = normal(1, 24, 9).expand(8, -1, -1)
    g = orthogonal(w, normal(1, 24, 9, seed=1) + 0.1 * normal(8, 24, 9, seed=2), 2)
    halves = w.clone()
    halves[:, 12:] *= -w[0, :12].square().sum() / w[0, 12:].square().sum()
    cosine = 0.05 / (12 * 9) ** 0.5
    found = scale_invariance(scalars_of(w, g + cosine * halves))
    assert (found.kind, found.blocks) == ("layer", 1)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("below", [0.01, 0.1])
def test_the_chance_is_a_bound(alike: float, below: float) -> None:
    """P(Σ s_t u_t² ≤ x) by a million draws is below the bound, and not by much."""
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    draws = alike**0.5 * normal(1_000_000, 1) + (1 - alike) ** 0.5 * normal(1_000_000, 3, seed=1)
    chance = float(((draws.square() @ shares) < below).double().mean())
    correlation = torch.full((3, 3), alike, dtype=torch.float64).fill_diagonal_(1.0)
    bound = math.exp(_log_chance(below, shares[:, None], correlation))
    assert 0.97 * chance < bound < 2.5 * chance


def test_the_callers_numbers_are_left_alone() -> None:
    """Nothing is written to, and the random state is untouched."""
    w, g = normal(8, 16, 9), normal(8, 16, 9, seed=1)
    scalars = scalars_of(w, g, w[..., 0], g[..., 0])
    tensors = [scalars.dot, scalars.weight, scalars.gradient, scalars.bias]
    before = [x.clone() for x in tensors if x is not None]
    state = torch.get_rng_state()
    scale_invariance(scalars)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors, strict=True) if y is not None)
    assert torch.equal(state, torch.get_rng_state())


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Each tensor's shape is checked against the others."""
    good = scalars_of(normal(8, 4, 3), normal(8, 4, 3))
    with pytest.raises(ValueError, match="must all be"):
        dataclasses.replace(good, weight=good.weight[:7])
    with pytest.raises(ValueError, match="bias must be"):
        dataclasses.replace(good, bias=torch.zeros(8, 4, 2))
    with pytest.raises(ValueError, match="rows and columns"):
        dataclasses.replace(good, columns=0)
