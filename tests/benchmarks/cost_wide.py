"""Layers with very many outputs: what a random subspace loses against the full measurement.

A GPT of GPT-2's width and vocabulary, two blocks, untied, takes some steps on text that a Markov
chain over a Zipf distribution wrote. Then its first 768 × 3072 layer and its 768 × 50257 head are
measured in full and within ``max_dim``, with the same random probes. The head in full is not the
probe's (K alone would take 10 GB): eNFA and beNFA come from the rows of logit gradients by dense
algebra, and K is the identity there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cost_models import Gpt
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import measure
from feature_probe.reports.report import Report
from feature_probe.theory.relations import clamp_tolerance

RELATIONS = ("nfa", "enfa", "bnfa", "benfa")
POWERS = (0.5, 1.0)
HIDDEN, HEAD = "blocks.0.mlp.0", "head"
Cosines = dict[str, float]


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        width: Of the residual stream; the hidden layer has four times as many outputs.
        vocabulary: Outputs of the head.
        sequences: Of 128 tokens, in a batch and in what is measured.
        steps: Of training.
        limits: Dimensions of the subspace.
    """

    width: int
    vocabulary: int
    sequences: int
    steps: int
    limits: tuple[int, ...]


FULL = Size(768, 50257, 4, 20, (256, 1024, 2048))
QUICK = Size(24, 500, 2, 2, (16, 64))
_TOKENS = 128


def wide(*, quick: bool) -> list[dict[str, Any]]:
    """Cosines of both layers in full and in each subspace."""
    size = QUICK if quick else FULL
    model, batch = _trained(size)
    full = {HIDDEN: _cosines(_measured(model, batch, HIDDEN, 4 * size.width), HIDDEN)}
    full[HEAD] = _head_in_full(model, batch)
    return [
        {
            "layer": layer,
            "d_out": model.get_submodule(layer).weight.shape[0],
            "d_in": size.width,
            "rows": batch[0].numel(),
            "full": full[layer],
            "within": [_within(model, batch, layer, limit, full[layer]) for limit in size.limits],
        }
        for layer in (HIDDEN, HEAD)
    ]


def _within(
    model: nn.Module, batch: tuple[Tensor, Tensor], layer: str, limit: int, full: Cosines
) -> dict[str, Any]:
    start = time.perf_counter()
    found = _cosines(_measured(model, batch, layer, limit), layer)
    return {
        "limit": limit,
        "seconds": time.perf_counter() - start,
        "off": {label: found[label] - cosine for label, cosine in full.items()},
    }


def _measured(model: nn.Module, batch: tuple[Tensor, Tensor], layer: str, limit: int) -> Report:
    return measure(
        model, [batch], _loss, relations=RELATIONS, powers=POWERS, include=[layer], max_dim=limit,
        jacobian="random", weight_decay=0.0, progress=False,
    )  # fmt: skip


def _cosines(report: Report, layer: str) -> Cosines:
    return {record.label: record.cosine for record in report.records if record.layer == layer}


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def _trained(size: Size) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model, and a batch that it did not see."""
    torch.manual_seed(0)
    model = Gpt(2, size.width, 12, size.vocabulary, _TOKENS, tied=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1.0, size.vocabulary + 1)
    follows = torch.randint(size.vocabulary, (size.vocabulary,), generator=generator)

    def batch() -> tuple[Tensor, Tensor]:
        shape = (size.sequences, _TOKENS + 1)
        text = torch.multinomial(weights, shape[0] * shape[1], True, generator=generator)
        text = text.view(shape)
        repeated = torch.rand(shape, generator=generator) < 0.5
        for place in range(1, shape[1]):
            after = follows[text[:, place - 1]]
            text[:, place] = torch.where(repeated[:, place], after, text[:, place])
        return text[:, :-1], text[:, 1:]

    for _ in range(size.steps):
        x, y = batch()
        optimizer.zero_grad()
        _loss(model(x), y).backward()
        optimizer.step()
    return model, batch()


def _head_in_full(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Cosines:
    """From the gradients of every position's loss, in float64; NFA with K = 1."""
    logits = model(batch[0]).detach().requires_grad_()
    summed = _loss(logits, batch[1]) * batch[1].numel()
    (gradient,) = torch.autograd.grad(summed, logits)
    rows = gradient.flatten(0, -2).double()
    weight = model.get_submodule(HEAD).weight.detach().double()
    inputs = weight.mT @ weight
    found: Cosines = {}
    for power in POWERS:
        through = rows @ weight
        agop = _power(through.mT @ through, power)
        found[f"nfa^{power:g}"] = _cosine(inputs, _power(inputs, power))
        found[f"enfa^{power:g}"] = _cosine(inputs, agop)
        # bNFA: WWᵀ and the identity. beNFA: ⟨WWᵀ, (RᵀR)ˢ⟩ = tr((RRᵀ)ˢ⁻¹ (RW)(RW)ᵀ)
        found[f"bnfa^{power:g}"] = float(inputs.trace() / inputs.norm() / weight.shape[0] ** 0.5)
        small = rows @ rows.mT
        across = (_power(small, power - 1) * (through @ through.mT)).sum()
        norm = _power(small, power).norm()
        found[f"benfa^{power:g}"] = float(across / norm / inputs.norm())
    return found


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > clamp_tolerance(torch.float32) * values[-1]
    raised = torch.where(kept, values, 1.0).pow(power) * kept
    return (vectors * raised) @ vectors.mT


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def furthest(within: Mapping[str, Any]) -> float:
    """The largest deviation of a cosine."""
    return max(abs(off) for off in within["off"].values())
