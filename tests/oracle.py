"""Brute-force oracle: every matrix and score from its definition, in float64, slow and plain.

Shares no code with feature_probe and imports nothing of it. One example at a time goes through the
model; a zero perturbation δ is added to the layer's output, so that ∂ℓ_i/∂δ and ∂f_i/∂δ are
derivatives with respect to the pre-activation z = W h (+ bias) whatever happens to the output
later (a transposed convolution has its δ on the columns, before they are folded up); patches are
gathered, and columns folded, by index arithmetic written out here; ∇_h = Wᵀ∇_z is formed row by row
and the outer products are added up in the space where the paper defines them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]

FORWARD_RELATIONS = ("fact", "fact_sym", "nfa", "enfa")
BACKWARD_RELATIONS = ("bfact", "bfact_sym", "bnfa", "benfa")
EQUALITIES = ("fact", "bfact", "fact_sym", "bfact_sym")
RELATIONS = ("fact", "bfact", "fact_sym", "bfact_sym", "nfa", "enfa", "bnfa", "benfa")

#: Eigenvalues at or below this multiple of the block's largest count as zero in a power
#: (MATH.md §2; 10·eps of float64). Applied to the dense AGOP, eNFA, K and E alike.
CLAMP = 10 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Rows:
    """One row per example and position of everything the definitions need.

    Attributes:
        weight: ``[groups, d_out, d_in]``.
        h: Layer inputs (patches), ``[n, p, groups, d_in]``; p runs over positions and calls.
        g: ∂ℓ_i/∂z, ``[n, p, groups, d_out]``.
        jac: ∂f_i/∂z, ``[n, c, p, groups, d_out]``.
    """

    weight: Tensor
    h: Tensor
    g: Tensor
    jac: Tensor

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.h.shape[0]

    @property
    def n_rows(self) -> int:
        """Examples × positions × calls."""
        return self.h.shape[0] * self.h.shape[1]


@dataclass(frozen=True)
class Scores:
    """What a record says, from dense matrices; NaN where undefined."""

    pearson: float
    cosine: float
    trace_free_cosine: float
    chance_cosine: float
    residual: float
    scale: float


# --------------------------------------------------------------------------- the model's layers


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a type the oracle knows."""
    known = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)
    return isinstance(module, known) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (or looks like it): z = x @ weight + bias."""
    return type(module).__name__ == "Conv1D"


def layer_weight(module: nn.Module) -> Tensor:
    """The weight as ``[groups, d_out, d_in]``; see :func:`stored_matrix`."""
    return stored_matrix(module, module.weight.detach().clone().double())  # training goes on


def stored_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """An array laid out like the module's weight as ``[groups, d_out, d_in]``.

    A convolution's d_in is channel-major, then kernel offsets; so is a transposed one's d_out.
    """
    if is_conv1d(module) or isinstance(module, nn.Embedding):
        return torch.stack(list(stored.unbind(0)), dim=1)[None]
    groups = getattr(module, "groups", 1)
    if isinstance(module, TRANSPOSED):
        per_group = stored.shape[0] // groups
        parts = [stored[b * per_group : (b + 1) * per_group] for b in range(groups)]
        return torch.stack([part.flatten(1).T for part in parts])
    return stored.reshape(groups, stored.shape[0] // groups, -1)


def source_index(position: int, length: int, mode: str) -> int | None:
    """Index in the unpadded input that a position of the padded input reads; None for a zero."""
    if 0 <= position < length:
        return position
    if mode == "zeros":
        return None
    if mode == "circular":
        return position % length
    if mode == "replicate":
        return min(max(position, 0), length - 1)
    if mode == "reflect":  # ... 2 1 | 0 1 2 | 1 0 ...
        period = 2 * (length - 1)
        folded = position % period
        return folded if folded < length else period - folded
    raise AssertionError(mode)


def padding_before_after(module: nn.Module, axis: int) -> tuple[int, int]:
    """Padding before and after along one spatial axis; "same" puts the odd one after."""
    reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
    if module.padding == "same":
        return reach // 2, reach - reach // 2
    if module.padding == "valid":
        return 0, 0
    return module.padding[axis], module.padding[axis]


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Rows h of a convolution: ``[positions, groups, d_in]`` of one example ``[1, C, *space]``."""
    space = x.shape[2:]
    outputs = []
    for axis, length in enumerate(space):
        before, after = padding_before_after(module, axis)
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        outputs.append((length + before + after - reach - 1) // module.stride[axis] + 1)
    channels = x.shape[1] // module.groups
    rows = []
    for position in product(*(range(size) for size in outputs)):
        columns = []
        for offset in product(*(range(size) for size in module.kernel_size)):
            source = [
                source_index(
                    position[axis] * module.stride[axis]
                    + offset[axis] * module.dilation[axis]
                    - padding_before_after(module, axis)[0],
                    length,
                    module.padding_mode,
                )
                for axis, length in enumerate(space)
            ]
            inside = all(index is not None for index in source)
            pixel = x[(0, slice(None), *source)] if inside else x.new_zeros(x.shape[1])
            columns.append(pixel)
        row = torch.stack(columns, dim=1)  # [C, kernel offsets]
        rows.append(row.reshape(module.groups, channels * row.shape[1]))
    return torch.stack(rows)


def one_hot(module: nn.Embedding, indices: Tensor) -> Tensor:
    """A row per index; zero at the padding index, whose vector gets no gradient."""
    rows = torch.zeros(indices.numel(), 1, module.num_embeddings, dtype=torch.float64)
    for position, index in enumerate(indices.flatten().tolist()):
        if index != module.padding_idx:
            rows[position, 0, index] = 1.0
    return rows


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows h of one call on one example: ``[positions, groups, d_in]``."""
    if isinstance(module, nn.Embedding):
        return one_hot(module, x)
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return x.reshape(-1, 1, x.shape[-1])
    if isinstance(module, TRANSPOSED):
        return _channels_by_group(module, x)
    return patches(module, x)


def output_rows(module: nn.Module, z: Tensor) -> Tensor:
    """An array shaped like :func:`zero_rows` on one example, as ``[positions, groups, d_out]``."""
    if isinstance(module, TRANSPOSED):
        return z
    if isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module):
        return z.reshape(-1, 1, z.shape[-1])
    return _channels_by_group(module, z)


def _channels_by_group(module: nn.Module, z: Tensor) -> Tensor:
    """``[1, C, *space]`` as ``[positions, groups, C/groups]``."""
    channels_last = z[0].flatten(1).T
    return channels_last.reshape(channels_last.shape[0], module.groups, -1)


def zero_rows(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """What is added to z = W h of one call on one example: a zero to differentiate by.

    Shaped like the output; for a transposed convolution the columns before they are folded,
    ``[positions, groups, d_out]``.
    """
    if isinstance(module, TRANSPOSED):
        taps = math.prod(module.kernel_size)
        shape = (math.prod(x.shape[2:]), module.groups, module.out_channels // module.groups * taps)
        return output.new_zeros(shape, requires_grad=True)
    return torch.zeros_like(output, requires_grad=True)


def into_output(module: nn.Module, x: Tensor, delta: Tensor, output: Tensor) -> Tensor:
    """What :func:`zero_rows` adds to the output: itself, or the fold of the columns."""
    if isinstance(module, TRANSPOSED):
        return fold(module, delta, x.shape[2:], output.shape)
    return delta


def fold(module: nn.Module, columns: Tensor, space: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Add the columns of a transposed convolution up into its output, entry by entry.

    Args:
        module: The layer.
        columns: ``[positions, groups, d_out]`` with d_out channel-major, then kernel offsets.
        space: Sizes of the input.
        shape: Shape of the output, ``[1, C_out, *space_out]``; what falls outside is cropped.
    """
    offsets = list(product(*(range(size) for size in module.kernel_size)))
    channels = module.out_channels // module.groups
    sources, targets = [], []
    numbers = torch.arange(math.prod(shape)).reshape(*shape)
    for place, position in enumerate(product(*(range(size) for size in space))):
        for tap, offset in enumerate(offsets):
            pixel = [
                position[axis] * module.stride[axis]
                + offset[axis] * module.dilation[axis]
                - module.padding[axis]
                for axis in range(len(space))
            ]
            if not all(0 <= pixel[axis] < shape[2 + axis] for axis in range(len(space))):
                continue
            for group in range(module.groups):
                for channel in range(channels):
                    row = place * module.groups + group
                    sources.append((row * channels + channel) * len(offsets) + tap)
                    targets.append(int(numbers[(0, group * channels + channel, *pixel)]))
    taken = columns.reshape(-1)[torch.tensor(sources)]
    flat = columns.new_zeros(math.prod(shape)).index_add(0, torch.tensor(targets), taken)
    return flat.reshape(*shape)


# --------------------------------------------------------------------------- rows, by example


def supervised(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """The forward of batches (x, y)."""

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        output = model(batch[0])
        return output, loss_fn(output, batch[1])

    return forward


def one_by_one(batch: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The batch as batches of one example."""
    return [tuple(part[i : i + 1] for part in batch) for i in range(len(batch[0]))]


def collect(
    model: nn.Module, samples: Sequence[Any], forward: Forward, layers: dict[str, tuple[str, ...]]
) -> dict[str, Rows]:
    """Rows of every layer, from one run of the model per sample.

    Args:
        model: In the mode (train or eval) in which it is to be measured; float64.
        samples: Batches of one example. A whole batch as the only sample gives the Jacobian of all
            outputs by all pre-activations, cross terms between examples included.
        forward: Runs the model on a sample, returns (output, loss).
        layers: Modules that share one weight, by the layer's name.

    Returns:
        Rows by layer name; layers that were never called are left out.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in layers}
    for sample in samples:
        for name, rows in _collect_one(model, sample, forward, layers).items():
            found[name].append(rows)
    return {
        name: Rows(
            layer_weight(model.get_submodule(modules[0])),
            *(torch.stack(parts) for parts in zip(*found[name], strict=True)),
        )
        for name, modules in layers.items()
        if found[name]
    }


def _collect_one(
    model: nn.Module, sample: Any, forward: Forward, layers: dict[str, tuple[str, ...]]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    calls: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {name: [] for name in layers}

    def inject(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach().clone()
            delta = zero_rows(module, x, output)
            calls[name].append((module, x, delta))
            return output + into_output(module, x, delta, output)

        return hook

    handles = [
        model.get_submodule(module).register_forward_hook(inject(name))
        for name, modules in layers.items()
        for module in modules
    ]
    try:
        output, loss = forward(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    deltas = [delta for name in layers for _, _, delta in calls[name]]

    def gradients(scalar: Tensor) -> dict[str, Tensor]:
        found = iter(
            torch.autograd.grad(
                scalar, deltas, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )
        return {
            name: torch.cat([output_rows(module, next(found)) for module, _, _ in calls[name]])
            for name in layers
            if calls[name]
        }

    g = gradients(loss)
    jac = [gradients(entry) for entry in output.reshape(-1)]
    return {
        name: (
            torch.cat([input_rows(module, h) for module, h, _ in calls[name]]),
            g[name],
            torch.stack([row[name] for row in jac]),
        )
        for name in layers
        if calls[name]
    }


# --------------------------------------------------------------------------- dense matrices


def nfm(rows: Rows) -> Tensor:
    """WᵀW, block by block: ``[groups, d_in, d_in]``."""
    return torch.stack([w.T @ w for w in rows.weight])


def bnfm(rows: Rows) -> Tensor:
    """WWᵀ, block by block: ``[groups, d_out, d_out]``."""
    return torch.stack([w @ w.T for w in rows.weight])


def fact(rows: Rows, weight_decay: float, times: float = 1.0) -> Tensor:
    """FACT = −(1/λn) Σ_i Σ_p (∇_h ℓ_i) h_iᵀ, times B for a summed loss; λ = 0 stands for λ = 1."""
    blocks = []
    for b, w in enumerate(rows.weight):
        nabla = rows.g[:, :, b] @ w  # rows are (∇_h ℓ)ᵀ = gᵀW
        blocks.append(sum_of_outer(nabla.flatten(0, 1), rows.h[:, :, b].flatten(0, 1)))
    return -torch.stack(blocks) * times / (rows.n * (weight_decay or 1.0))


def bfact(rows: Rows, weight_decay: float, times: float = 1.0) -> Tensor:
    """BFACT = −(1/λn) Σ_i Σ_p (W h_i)(∇_{Wh} ℓ_i)ᵀ, times B for a summed loss."""
    blocks = []
    for b, w in enumerate(rows.weight):
        z = rows.h[:, :, b] @ w.T
        blocks.append(sum_of_outer(z.flatten(0, 1), rows.g[:, :, b].flatten(0, 1)))
    return -torch.stack(blocks) * times / (rows.n * (weight_decay or 1.0))


def mean_gradient_square(rows: Rows, of: str, side: str, positions: str = "expand") -> Tensor:
    """AGOP, eNFA and their backward forms: (1/n) Σ_i Σ_p (∇)(∇)ᵀ.

    Args:
        rows: The layer's rows.
        of: "output" (all coordinates of f_i) or "loss".
        side: "input" for ∇_h = Wᵀ∇_z, "output" for ∇_z.
        positions: "expand" sums outer products over positions; "reduce" sums the gradients of one
            example over positions (and calls) first.
    """
    gradient = rows.jac if of == "output" else rows.g.unsqueeze(1)  # [n, c, p, groups, d_out]
    if positions == "reduce":
        gradient = gradient.sum(dim=2, keepdim=True)
    blocks = []
    for b, w in enumerate(rows.weight):
        nabla = gradient[..., b, :]
        nabla = nabla @ w if side == "input" else nabla
        nabla = nabla.flatten(0, 2)
        blocks.append(sum_of_outer(nabla, nabla))
    return torch.stack(blocks) / rows.n


def sum_of_outer(a: Tensor, b: Tensor) -> Tensor:
    """Σ_r a_r b_rᵀ."""
    return torch.einsum("ri,rj->ij", a, b)


def kept_eigenvalues(blocks: Tensor) -> int:
    """Number of eigenvalues above the clamp, all blocks together."""
    values = torch.linalg.eigvalsh(blocks)
    return int((values > CLAMP * values[:, -1:]).sum())


def matrix_power(blocks: Tensor, power: float) -> Tensor:
    """Power of symmetric PSD blocks; eigenvalues ≤ CLAMP · largest are dropped."""
    values, vectors = torch.linalg.eigh(blocks)
    kept = values > CLAMP * values[:, -1:]
    powers = torch.where(kept, values.clamp_min(0) ** power, torch.zeros_like(values))
    return torch.einsum("bik,bk,bjk->bij", vectors, powers, vectors)


def left_polar(blocks: Tensor) -> Tensor:
    """√(X Xᵀ) = U S Uᵀ where X = U S Vᵀ."""
    u, s, _ = torch.linalg.svd(blocks)
    return torch.einsum("bik,bk,bjk->bij", u, s, u)


def prediction(
    rows: Rows,
    relation: str,
    power: float | None = None,
    *,
    weight_decay: float = 1.0,
    positions: str = "expand",
    times: float = 1.0,
) -> Tensor:
    """What the relation predicts for WᵀW (or WWᵀ): ``[groups, d, d]``."""
    if relation in ("fact", "fact_sym"):
        x = fact(rows, weight_decay, times)
        return x if relation == "fact" else left_polar(x)
    if relation in ("bfact", "bfact_sym"):
        x = bfact(rows, weight_decay, times)
        return x if relation == "bfact" else left_polar(x)
    of = "output" if relation in ("nfa", "bnfa") else "loss"
    side = "input" if relation in ("nfa", "enfa") else "output"
    blocks = mean_gradient_square(rows, of, side, positions)
    return blocks if power in (None, 1.0) else matrix_power(blocks, float(power))


def claimed(rows: Rows, relation: str) -> Tensor:
    """The side of the relation that is the weight's: WᵀW or WWᵀ."""
    return bnfm(rows) if relation in BACKWARD_RELATIONS else nfm(rows)


# --------------------------------------------------------------------------- scores


def _ratio(numerator: Tensor, denominator: Tensor, size: Tensor) -> float:
    """The quotient, NaN where the denominator is zero to rounding (``size`` says on what scale)."""
    if not denominator > 1e-12 * size:
        return math.nan
    return float(numerator / denominator)


def scores(a: Tensor, x: Tensor, *, equality: bool, weight_decay: float) -> Scores:
    """Scores of the prediction ``x`` against ``a``, over the entries inside the blocks."""
    d = a.shape[-1]
    norm = a.norm() * x.norm()
    inner = (a * x).sum()
    a0, x0 = a - a.mean(), x - x.mean()
    eye = torch.eye(d, dtype=a.dtype)
    trace_a, trace_x = (m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (a, x))
    a1, x1 = (m - (t / d)[:, None, None] * eye for m, t in ((a, trace_a), (x, trace_x)))
    with_decay = equality and weight_decay > 0
    return Scores(
        pearson=_ratio((a0 * x0).sum(), a0.norm() * x0.norm(), norm),
        cosine=_ratio(inner, norm, norm),
        trace_free_cosine=_ratio((a1 * x1).sum(), a1.norm() * x1.norm(), norm),
        chance_cosine=_ratio((trace_a * trace_x / d).sum(), norm, norm),
        residual=float((x - a).norm() / a.norm()) if with_decay else math.nan,
        scale=math.nan if equality else float(inner / (x * x).sum()),
    )


def rotated_cosines(w: Tensor, k_matrix: Tensor, power: float, draws: int, seed: int) -> Tensor:
    """cos(WᵀW, (WᵀQKQᵀW)ˢ) for random rotations Q."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        gaussian = torch.randn(k_matrix.shape, generator=generator, dtype=w.dtype)
        q, r = torch.linalg.qr(gaussian)
        q = q * r.diagonal().sign()
        x = matrix_power((w.T @ q @ k_matrix @ q.T @ w)[None], power)[0]
        a = w.T @ w
        values.append(float((a * x).sum() / (a.norm() * x.norm())))
    return torch.tensor(values)
