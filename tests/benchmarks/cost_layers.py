"""One layer's report against the same numbers by dense algebra on d_in × d_in matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cost_timing import seconds
from torch import Tensor

from feature_probe.reports.scoring import LayerFacts, score_layer
from feature_probe.theory.relations import LayerStatistics, parse_relations

#: Every relation on the input side of W; FACT's symmetric form by eigenvalues too.
FORWARD = ("fact", "fact_sym", "nfa", "enfa")
POWERS = (0.5, 1.0)
DECAY = 1e-3
#: Eigenvalues below this share of the largest are left out, here and there.
CLAMP = 1e-6
_CPU = torch.device("cpu")
#: d_out, d_in, dtype of the dense code, and how many times faster a report is to be.
SIZES = ((512, 4608, torch.float32, 70.0), (256, 1024, torch.float64, 14.0))


def statistics_of(d_out: int, d_in: int, seed: int = 0) -> LayerStatistics:
    """A weight and its sums in float32, their spectra falling off, but not to the clamp."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw)

    def curvature() -> Tensor:
        fall = torch.linspace(0, -3, d_out).exp()  # K's to 0.0025 of its largest: none is clamped
        rows = noise(2 * d_out, d_out) * fall
        return rows.mT @ rows / len(rows[0])

    weight = noise(d_out, d_in) / d_in**0.5
    gradient = -DECAY * (weight + 0.3 * noise(d_out, d_in) / d_in**0.5)
    return LayerStatistics(weight, gradient, curvature(), curvature(), DECAY, CLAMP)


Scores = dict[str, tuple[float, float]]


def ours(statistics: LayerStatistics) -> Scores:
    """Cosine and Pearson's r by relation and power, as a report has them (and more beside)."""
    facts = LayerFacts("layer", 0, 1, 1)
    records = score_layer(facts, statistics, parse_relations(FORWARD), POWERS)
    return {record.label: (record.cosine, record.pearson) for record in records}


@dataclass(frozen=True)
class Dense:
    """The straightforward code: every matrix formed d_in × d_in, powers by ``eigh``."""

    dtype: torch.dtype

    def __call__(self, statistics: LayerStatistics) -> Scores:
        """The scores of :func:`ours`."""
        given = (statistics.weight, statistics.gradient, statistics.jacobian, statistics.loss)
        W, G, K, E = (_given(one).to(self.dtype) for one in given)
        gram, fact = W.T @ W, -(W.T @ G) / DECAY
        square = fact @ fact.T
        # FACT·FACTᵀ has the square of FACT's spectrum, and so twice the clamp's exponent
        found = {"fact": fact, "fact_sym": power(square, 0.5, CLAMP**2)}
        for name, curvature in (("nfa", K), ("enfa", E)):
            product = W.T @ curvature @ W
            values, vectors = torch.linalg.eigh(product)
            for s in POWERS:
                found[f"{name}^{s:g}"] = _raised(values, vectors, s, CLAMP)
        return {name: (_cosine(gram, one), _pearson(gram, one)) for name, one in found.items()}


def power(matrix: Tensor, exponent: float, clamp: float) -> Tensor:
    """A power of a symmetric matrix, by its eigendecomposition."""
    return _raised(*torch.linalg.eigh(matrix), exponent, clamp)


def _raised(values: Tensor, vectors: Tensor, exponent: float, clamp: float) -> Tensor:
    kept = values > clamp * values.max()
    raised = torch.where(kept, values.clamp_min(0).pow(exponent), 0.0)
    return (vectors * raised) @ vectors.T


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor[0]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def _pearson(a: Tensor, b: Tensor) -> float:
    return _cosine(a - a.mean(), b - b.mean())


def difference(one: Scores, other: Scores) -> float:
    """The largest difference of any number."""
    return max(
        abs(mine - theirs)
        for label, pair in one.items()
        for mine, theirs in zip(pair, other[label], strict=True)
    )


def compared(d_out: int, d_in: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of both by round, one after the other, and how far the numbers differ."""
    given = statistics_of(d_out, d_in)
    dense = Dense(dtype)
    warm = statistics_of(8, 16)
    ours(warm), dense(warm)
    found: dict[str, Any] = {"d_out": d_out, "d_in": d_in, "dtype": str(dtype).split(".")[-1]}
    found |= {"ours": [], "dense": []}
    mine: Scores = {}
    theirs: Scores = {}
    for _ in range(rounds):
        found["ours"].append(seconds(lambda: mine.update(ours(given)), _CPU))
        found["dense"].append(seconds(lambda: theirs.update(dense(given)), _CPU))
    exact = theirs if dtype == torch.float64 else Dense(torch.float64)(given)
    found["difference"] = difference(mine, exact)
    found["dense_difference"] = difference(theirs, exact)
    return found


def layers(rounds: int, *, quick: bool = False) -> list[dict[str, Any]]:
    """Both sizes; the wide one once, for its dense code takes long."""
    wide, narrow = SIZES
    first = (128, 512, torch.float32) if quick else wide[:3]
    return [compared(*first, rounds=1 if quick else 2), compared(*narrow[:3], rounds=rounds)]
