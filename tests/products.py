"""Models whose weights are used outside their layers' forward, each written out a second time.

The second writing is the oracle: plain arithmetic on one example, with a zero leaf added to the
output of every product, so that ∂ℓ/∂z and ∂f/∂z are derivatives by that leaf. It shares no code
with the package, with torch.nn's layers or with the first writing.
"""

# ruff: noqa: D102 (forward methods of toy models)

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

N = 7
Weights = Mapping[str, Tensor]
Stored = Mapping[str, Tensor]


class Tape:
    """The products of one example: their inputs, and the zero leaves on their outputs."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in weights}

    def __call__(self, name: str, h: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """z = W h of every row of ``h``, plus the leaf; some of W's outputs if so asked."""
        weight = self.weights[name]
        delta = torch.zeros(*h.shape[:-1], len(weight), dtype=h.dtype, requires_grad=True)
        self.calls[name].append((h.detach(), delta))
        return ((h.unsqueeze(-2) * weight).sum(-1) + delta)[..., first:last]


Reference = Callable[[Tape, Stored, Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """A model and what it should be.

    Attributes:
        model: Makes it.
        shape: Of one example.
        weights: W ``[d_out, d_in]`` of every layer by name, out of the stored parameters.
        reference: One example's output, by the tape's products.
        reducible: Whether every layer sees the example axis first, and no sum over positions
            cancels.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    weights: Callable[[Stored], Weights]
    reference: Reference
    reducible: bool = True


def stored(model: nn.Module) -> Stored:
    """The parameters as they stand, float64."""
    return {name: p.detach().clone().double() for name, p in model.named_parameters()}


def rows(product: Product, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, oracle.Rows]:
    """The oracle's rows of every layer for a mean squared error."""
    held = stored(model)
    weights = product.weights(held)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in weights}
    for example, target in zip(x, y, strict=True):
        tape = Tape(weights)
        f = product.reference(tape, held, example)
        loss = ((f - target) ** 2).mean()
        names = [name for name in weights if tape.calls[name]]
        leaves = [delta for name in names for _, delta in tape.calls[name]]
        gradients = [_by_name(tape, names, leaves, value) for value in (loss, *f.reshape(-1))]
        for name in names:
            h = torch.cat([h.reshape(-1, h.shape[-1]) for h, _ in tape.calls[name]])
            jac = torch.stack([row[name] for row in gradients[1:]])
            found[name].append((h[:, None], gradients[0][name], jac))
    return {
        name: oracle.Rows(weights[name][None], *map(torch.stack, zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def _by_name(
    tape: Tape, names: list[str], leaves: list[Tensor], value: Tensor
) -> dict[str, Tensor]:
    found = iter(
        torch.autograd.grad(
            value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )

    def rows_of(name: str) -> Tensor:
        width = len(tape.weights[name])
        return torch.cat([next(found).reshape(-1, 1, width) for _ in tape.calls[name]])

    return {name: rows_of(name) for name in names}


# --------------------------------------------------------------------------- attention


class Attends(nn.Module):
    """torch's attention on parts of its input, and a head on the mean over positions."""

    def __init__(
        self,
        kind: str = "self",
        *,
        mask: str = "",
        weights: bool = False,
        each: bool = False,
        again: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kind, self.mask, self.need_weights = kind, mask, weights
        self.each, self.again = each, again
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.head = nn.Linear(4, 2)
        for parameter in self.attention.parameters():  # biases start at zero otherwise
            nn.init.normal_(parameter, std=0.6)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.stack([self._attend(example) for example in x]) if self.each else None
        if self.again:
            inner = checkpoint(self._attend, x, use_reentrant=False)
        inner = self._attend(x) if inner is None else inner
        return self.head(torch.tanh(inner).mean(1))

    def _attend(self, x: Tensor) -> Tensor:
        swap = x.dim() == 3 and not self.attention.batch_first
        query, key, value = parts(self.kind, x)
        if swap:
            query, key, value = swapped(query, key, value)
        out, _ = self.attention(
            query, key, value, need_weights=self.need_weights, **masks(self.mask, query, key, x)
        )
        return out.transpose(0, 1) if swap else out


def parts(kind: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value out of ``[..., 5, 4]``; the same tensor where they are the same."""
    if kind == "self":
        return x, x, x
    late = x[..., 2:, :]
    if kind == "cross":
        return x[..., :3, :], late, late
    if kind == "three":
        return x[..., :3, :], late, torch.sin(late)
    return x[..., :3, :], late[..., :3], late[..., 1:3]  # widths 4, 3 and 2


def swapped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions first, and still the same tensor where it was."""
    one = query.transpose(0, 1)
    two = one if key is query else key.transpose(0, 1)
    return one, two, two if value is key else value.transpose(0, 1)


def masks(kind: str, query: Tensor, key: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The arguments of torch's attention that mask something."""
    if kind == "causal":
        return {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}
    if kind == "added":
        return {"attn_mask": torch.linspace(-1, 1, 25, dtype=x.dtype).reshape(5, 5)}
    if kind == "padding":
        return {"key_padding_mask": torch.tensor([0, 0, 0, 1, 1], dtype=torch.bool).repeat(N, 1)}
    return {}


def added_scores(kind: str) -> Tensor:
    """What a mask adds to the scores, ``[5, 5]``."""
    never = -torch.inf
    added = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            if (kind == "causal" and j > i) or (kind == "padding" and j > 2):
                added[i, j] = never
            elif kind == "added":
                added[i, j] = -1 + 2 * (5 * i + j) / 24
    return added


def attended(
    tape: Tape, held: Stored, query: Tensor, key: Tensor, value: Tensor, prefix: str, mask: str
) -> Tensor:
    """Attention of one example ``[positions, width]``, two heads of width two."""
    packed = f"{prefix}.in_proj_weight" in held
    names = [f"{prefix}.in_proj.{i}" if packed else f"{prefix}.{i}_proj" for i in "qkv"]
    q, k, v = (tape(name, h) for name, h in zip(names, (query, key, value), strict=True))
    bias = held.get(f"{prefix}.in_proj_bias", torch.zeros(12, dtype=torch.float64))
    q, k, v = q + bias[:4], k + bias[4:8], v + bias[8:]
    if f"{prefix}.bias_k" in held:
        k = torch.cat([k, held[f"{prefix}.bias_k"][0]])
        v = torch.cat([v, held[f"{prefix}.bias_v"][0]])
    heads = []
    for place in (slice(0, 2), slice(2, 4)):
        scores = q[:, place] @ k[:, place].T / 2**0.5
        if mask:
            scores = scores + added_scores(mask)
        weights = torch.exp(scores - scores.detach().amax(1, keepdim=True))
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, place])
    out = tape(f"{prefix}.out_proj", torch.cat(heads, 1))
    return out + held.get(f"{prefix}.out_proj.bias", 0.0)


def projections(held: Stored, prefix: str = "attention") -> dict[str, Tensor]:
    """The four matrices of torch's attention."""
    packed = held.get(f"{prefix}.in_proj_weight")
    if packed is None:
        found = {f"{prefix}.{i}_proj": held[f"{prefix}.{i}_proj_weight"] for i in "qkv"}
    else:
        found = {
            f"{prefix}.in_proj.{letter}": packed[4 * i : 4 * i + 4]
            for i, letter in enumerate("qkv")
        }
    return found | {f"{prefix}.out_proj": held[f"{prefix}.out_proj.weight"]}


def attention(kind: str = "self", mask: str = "", **options: Any) -> Product:
    """torch's attention with these options."""

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        inner = attended(tape, held, *parts(kind, x), "attention", mask)
        return tape("head", torch.tanh(inner).mean(0)) + held["head.bias"]

    return Product(
        lambda: Attends(kind, mask=mask, **options),
        (5, 4),
        lambda held: projections(held) | {"head": held["head.weight"]},
        reference,
        reducible=False,  # the scores do not see a shift of all keys: sums over positions cancel
    )


def normed(held: Stored, name: str, x: Tensor) -> Tensor:
    """Layer normalisation."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred**2).mean(-1, keepdim=True) + 1e-5
    return centred / scale**0.5 * held[f"{name}.weight"] + held[f"{name}.bias"]


class Encoder(nn.Module):
    """One of torch's encoder layers, and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **options)
        self.first = bool(options.get("batch_first"))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) if self.first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(torch.tanh(out).mean(1))


def encoder(**options: Any) -> Product:
    """torch's encoder layer with these options."""
    norm_first = options.get("norm_first", False)

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        def mixed(h: Tensor) -> Tensor:
            return attended(tape, held, h, h, h, "layer.self_attn", "")

        def fed(h: Tensor) -> Tensor:
            inner = tape("layer.linear1", h) + held["layer.linear1.bias"]
            return tape("layer.linear2", inner * (inner > 0)) + held["layer.linear2.bias"]

        if norm_first:
            x = x + mixed(normed(held, "layer.norm1", x))
            x = x + fed(normed(held, "layer.norm2", x))
        else:
            x = normed(held, "layer.norm1", x + mixed(x))
            x = normed(held, "layer.norm2", x + fed(x))
        return tape("head", torch.tanh(x).mean(0)) + held["head.bias"]

    def weights(held: Stored) -> Weights:
        plain = {name: held[f"{name}.weight"] for name in ("layer.linear1", "layer.linear2")}
        return projections(held, "layer.self_attn") | plain | {"head": held["head.weight"]}

    return Product(lambda: Encoder(**options), (5, 4), weights, reference, reducible=False)


# --------------------------------------------------------------------------- single products


class Between(nn.Module):
    """A matrix of its own, used by a function, between a Linear and a Linear head."""

    def __init__(self, rows: int, columns: int, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.w = nn.Parameter(0.7 * torch.randn(rows, columns))
        self.b = nn.Parameter(0.5 * torch.randn(columns))
        self.use = use
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(torch.tanh(self.first(x)), self)))


def straight(
    use: Callable[[Tensor, Any], Tensor],
    shape: tuple[int, ...] = (4,),
    *,
    columns: bool = True,
    bias: bool = False,
    pool: bool = False,
) -> Product:
    """``use`` multiplies rows by W: ``h @ w`` (columns) or ``h @ w.T``; then pools, perhaps."""

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        h = torch.tanh(tape("first", x) + held["first.bias"])
        z = tape("w", h) + (held["b"] if bias else 0.0)
        z = z.mean(0) if pool else z
        return tape("head", torch.tanh(z)) + held["head.bias"]

    def weights(held: Stored) -> Weights:
        w = torch.stack(list(held["w"].unbind(1))) if columns else held["w"]
        return {"first": held["first.weight"], "head": held["head.weight"], "w": w}

    size = (4, 5) if columns else (5, 4)
    return Product(lambda: Between(*size, use), shape, weights, reference)


class Mixer(nn.Module):
    """A weight that multiplies from the left: positions are mixed, features are the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 5))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((self.mix @ x).mean(-1)))


def mixer() -> Product:
    """``w @ x`` of matrices ``[5, 4]``."""

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        z = tape("mix", torch.stack(list(x.unbind(1))))
        return tape("head", torch.tanh(z.mean(0))) + held["head.bias"]

    return Product(
        Mixer,
        (5, 4),
        lambda held: {"head": held["head.weight"], "mix": held["mix"]},
        reference,
    )


class ByWeight(nn.Module):
    """A Linear that is never called: its weight is used, whole or by slices, or its forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.inner.weight, self.inner.bias
        if self.how == "whole":
            y = F.linear(x, weight, bias)
        elif self.how == "forward":
            y = self.inner.forward(x)
        elif self.how == "slices":
            y = torch.cat([F.linear(x, weight[:2]), F.linear(x, weight[2:])], -1) + bias
        else:
            y = torch.cat([x @ part.t() for part in weight.split([1, 5])], -1) + bias
        return self.head(torch.tanh(y).mean(1))


def by_weight(how: str) -> Product:
    """A Linear's weight on ``[n, positions, 4]``; slices are calls that give some outputs each."""
    cuts = {"slices": [(0, 2), (2, 6)], "split": [(0, 1), (1, 6)]}.get(how, [(0, 6)])

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        z = torch.cat([tape("inner", x, *cut) for cut in cuts], -1) + held["inner.bias"]
        return tape("head", torch.tanh(z).mean(0)) + held["head.bias"]

    return Product(
        lambda: ByWeight(how),
        (3, 4),
        lambda held: {name: held[f"{name}.weight"] for name in ("inner", "head")},
        reference,
    )


class Twice(nn.Module):
    """One matrix in two products, and nothing but parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.tanh(x @ self.w).matmul(self.w) + x)
        return torch.mm(x, self.head)


def twice() -> Product:
    """A matrix used twice is one layer with more positions."""

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        x = torch.tanh(tape("w", torch.tanh(tape("w", x))) + x)
        return tape("head", x)

    def weights(held: Stored) -> Weights:
        return {name: torch.stack(list(held[name].unbind(1))) for name in ("w", "head")}

    return Product(Twice, (4,), weights, reference)


class ByConvolution(nn.Module):
    """A convolution whose weight is used by the function, with a geometry of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)
        return self.head(torch.tanh(y).mean(-1))


def by_convolution() -> Product:
    """F.conv1d with stride 2 and padding 1 on ``[2, 5]``: three patches of four."""

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        padded = torch.cat([torch.zeros(2, 1, dtype=x.dtype), x], 1)
        patches = torch.stack([padded[:, i : i + 2].reshape(4) for i in (0, 2, 4)])
        z = tape("conv", patches) + held["conv.bias"]
        return tape("head", torch.tanh(z).mean(0)) + held["head.bias"]

    def weights(held: Stored) -> Weights:
        return {"conv": held["conv.weight"].reshape(3, 4), "head": held["head.weight"]}

    return Product(ByConvolution, (2, 5), weights, reference)


def overwritten(h: Tensor, model: Any) -> Tensor:
    """A product whose value, a view of the graph's own tensor, is changed in place."""
    z = F.linear(h, model.w, torch.zeros(5, dtype=h.dtype))
    z += 0.5
    z[..., 0].mul_(2.0)
    return F.relu(z, inplace=True)


def in_place() -> Product:
    """In-place operations on the value of a functional product."""

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        h = torch.tanh(tape("first", x) + held["first.bias"])
        z = (tape("w", h) + 0.5) * torch.tensor([2.0, 1, 1, 1, 1], dtype=x.dtype)
        return tape("head", torch.tanh(z * (z > 0))) + held["head.bias"]

    def weights(held: Stored) -> Weights:
        return {"first": held["first.weight"], "head": held["head.weight"], "w": held["w"]}

    return Product(lambda: Between(5, 4, overwritten), (3, 4), weights, reference)


def checkpointed(h: Tensor, model: Any) -> Tensor:
    """The product inside a checkpoint."""
    return checkpoint(lambda rows: torch.tanh(rows) @ model.w, h, use_reentrant=False)


def in_a_checkpoint() -> Product:
    """A functional product that is run again in the backward pass."""

    def reference(tape: Tape, held: Stored, x: Tensor) -> Tensor:
        h = torch.tanh(tape("first", x) + held["first.bias"])
        return tape("head", torch.tanh(tape("w", torch.tanh(h)))) + held["head.bias"]

    return Product(
        lambda: Between(4, 5, checkpointed), (4,), straight(checkpointed).weights, reference
    )


ATTENTION: dict[str, Product] = {
    "self": attention(batch_first=True),
    "self, positions first": attention(),
    "self, no bias": attention(bias=False, batch_first=True),
    "self with weights": attention(weights=True, batch_first=True),
    "self with weights, positions first": attention(weights=True),
    "self, bias_kv": attention(add_bias_kv=True, batch_first=True),
    "self, causal": attention(mask="causal", batch_first=True),
    "self, added mask": attention(mask="added"),
    "self, padding": attention(mask="padding", batch_first=True),
    "self, one example at a time": attention(each=True),
    "self, checkpointed": attention(again=True, batch_first=True),
    "cross": attention("cross", batch_first=True),
    "cross, positions first": attention("cross"),
    "query, key and value": attention("three", batch_first=True),
    "query, key and value, positions first": attention("three", weights=True),
    "other widths": attention("widths", kdim=3, vdim=2, batch_first=True),
    "other widths, positions first": attention("widths", kdim=3, vdim=2),
    "other widths, bias_kv": attention("widths", kdim=3, vdim=2, add_bias_kv=True),
    "encoder": encoder(batch_first=True),
    "encoder, positions first": encoder(),
    "encoder, norm first": encoder(batch_first=True, norm_first=True),
}

PRODUCTS: dict[str, Product] = {
    "h @ w": straight(lambda h, m: h @ m.w),
    "h @ w on [n,s,d]": straight(lambda h, m: (h @ m.w).mean(1), (3, 4), pool=True),
    "torch.matmul": straight(lambda h, m: torch.matmul(h, other=m.w)),
    "torch.mm": straight(lambda h, m: torch.mm(h, m.w)),
    "torch.addmm": straight(lambda h, m: torch.addmm(m.b, h, m.w), bias=True),
    "Tensor.addmm": straight(lambda h, m: m.b.addmm(h, m.w), bias=True),
    "F.linear(h, w)": straight(lambda h, m: F.linear(h, m.w), columns=False),
    "F.linear(h, w.t())": straight(lambda h, m: F.linear(h, m.w.t())),
    "h @ w.T": straight(lambda h, m: h @ m.w.T, columns=False),
    "h @ w.mT": straight(lambda h, m: h @ m.w.mT, columns=False),
    "h @ w.t().t()": straight(lambda h, m: h @ m.w.t().t()),
    "w @ x": mixer(),
    "a layer's weight": by_weight("whole"),
    "a layer's forward": by_weight("forward"),
    "slices of a layer's weight": by_weight("slices"),
    "splits of a layer's weight, transposed": by_weight("split"),
    "one matrix twice": twice(),
    "F.conv1d": by_convolution(),
    "in place": in_place(),
    "in a checkpoint": in_a_checkpoint(),
}
ALL = ATTENTION | PRODUCTS


@dataclass(frozen=True)
class Solved:
    """A model of its own, a batch, and the oracle's rows."""

    model: nn.Module
    x: Tensor
    y: Tensor
    rows: dict[str, oracle.Rows]


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model and a batch, float64, always the same."""
    product = ALL[name]
    torch.manual_seed(3)
    model = product.model().double()
    x = torch.randn(N, *product.shape, dtype=torch.float64)
    with torch.no_grad():
        y = torch.randn_like(model(x))
    return model, x, y


@functools.cache
def solved(name: str) -> Solved:
    """The case and the oracle's rows, once per test session."""
    model, x, y = build(name)
    return Solved(model, x, y, rows(ALL[name], model, x, y))
