"""What the init-centred NFA starts from in f(x) = aᵀ(Wx)², predicted from data and width.

The one hidden layer of k quadratic units of Beaglehole, Mitliagkas and Agarwala ("Gradient descent
induces alignment between weights and the pre-activation tangents", the C-NFA paper, §3.2, App. E
and F), drawn as a ~ N(0, I), W_ij ~ N(0, 1/k), under the square loss of outputs taken as zero
(Eq. 4). With B = XᵀX, C = XᵀYX, Y = diag(y), A = C² and R = Wᵀdiag(a²)W the two sides are CRC and
CRBRC, up to factors that no cosine sees (4/n² and 16/n³: the paper drops those of the derivative of
(Wx)²). Two predictions: of the cosine, R being free of the data (App. E); and of each side's mean
(Proposition 10).

Two of the paper's statements are wrong as printed, and corrected here:

* Eq. 28, last term: tr[B]²·tr[Ā²]·tr[R²]², where tr[Ā]²·tr[B²]·tr[R²]² is printed. The printed
  one is 0, Ā having no trace: the predicted cosine can then exceed 1, or its square be negative.
* Proposition 10, second line: E[RBR] = (3/k)·tr(B)·I + (1 + 5/k)·B. Printed are 3·tr(B)·I + 6·B, of
  K² with the terms of two different units left out, and 1/k with them.

Eq. 19's last term is tr(R³), where tr(R)³ is printed; Eq. 20, which follows from it, is right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.theory.early_alignment import AlignmentSpeed

__all__ = [
    "QuadraticPrediction",
    "expected_alignment_speed",
    "expected_moments",
    "network_moments",
    "predict_alignment",
]

_ORDER = 4


@dataclass(frozen=True)
class QuadraticPrediction:
    """The three traces of the cosine of CRC and CRBRC, each over d.

    Attributes:
        numerator: tr(ARARBR), Eq. 20.
        nfm_square: tr(ARAR), Eq. 22.
        agop_square: tr(ARBRARBR), Eq. 28 with its last term corrected.
        agop_square_as_printed: The same with the term as printed, which is zero.
    """

    numerator: float
    nfm_square: float
    agop_square: float
    agop_square_as_printed: float

    @property
    def cosine(self) -> float:
        """The predicted ρ(GᵀG, GᵀKG) (Eq. 4); NaN for data that give zero."""
        return self._cosine(self.agop_square)

    @property
    def cosine_as_printed(self) -> float:
        """The same by Eq. 28 as printed, to show the erratum: may exceed 1, NaN where undefined."""
        return self._cosine(self.agop_square_as_printed)

    def _cosine(self, agop_square: float) -> float:
        if not (self.nfm_square > 0 and agop_square > 0):
            return float("nan")
        return self.numerator / (math.sqrt(self.nfm_square) * math.sqrt(agop_square))


def predict_alignment(
    inputs: Tensor, labels: Tensor, moments: Tensor | Sequence[float]
) -> QuadraticPrediction:
    """Data and moments of R to the cosine that the init-centred NFA starts from (Eq. 16 to 28).

    For n, k and d that are all large, a and W independent of the data. At n = k = d = 400 and
    inputs with eigenvalues of 1/(1 + i/4) the cosine of one network scattered by 0.01, and the mean
    of 30 was within 0.004 of the prediction.

    Cost: four products of d × d matrices.

    Args:
        inputs: X, ``[n, d]``; worked on in float64.
        labels: y, ``[n]``.
        moments: tr(R^j)/d for j = 1 … 4, of :func:`expected_moments`, or of
            :func:`network_moments` averaged over networks, as in the paper.

    Raises:
        ConfigurationError: if the shapes do not fit.
    """
    gram, labelled = _data_matrices(inputs, labels)
    r1, r2, r3, r4 = _four(moments)
    a, centred_a = _centred(labelled @ labelled)
    b, centred_b = _centred(gram)
    product = centred_a @ centred_b
    aa, bb, ab = _trace(centred_a, centred_a), _trace(centred_b, centred_b), float(_mean(product))
    aab, abb = _trace(centred_a, product), _trace(product, centred_b)
    abab = _trace(product, product)
    numerator = a**2 * b * r3 + 2 * a * r2 * r1 * ab + b * r1 * r2 * aa + r1**3 * aab  # Eq. 20
    nfm_square = (aa + a**2) * r1**2 + a**2 * r2 - a**2 * r1**2  # Eq. 22
    without_last = (
        r1**4 * abab
        + 2 * r1**2 * (r2 - r1**2) * ab**2
        + 2 * r1**2 * r2 * (b * aab + a * abb)
        + 4 * a * b * r3 * r1 * ab
        + a**2 * b**2 * r4
        + a**2 * bb * r2**2
    )
    last = b**2 * aa * r2**2
    return QuadraticPrediction(numerator, nfm_square, without_last + last, without_last)


def expected_alignment_speed(inputs: Tensor, labels: Tensor, width: int) -> AlignmentSpeed:
    """Data to the means over initialisations of GᵀG and GᵀKG (Proposition 10, corrected).

    E[GᵀG] = (4/n²)·C² and E[GᵀKG] = (16/n³)·((3/k)·tr(B)·C² + (1 + 5/k)·CBC), for
    f(x) = aᵀ(Wx)² with loss (1/n) Σ ½(f_i − y_i)² at f = 0 and K a mean over examples. The factors
    that the paper drops are kept, so that these are the means of what is measured. Exact for every
    n, k and d.

    Args:
        inputs: X, ``[n, d]``.
        labels: y, ``[n]``.
        width: k.

    Raises:
        ConfigurationError: if the shapes do not fit, or ``width`` is no positive integer.
    """
    positive_integer("width", width)
    gram, labelled = _data_matrices(inputs, labels)
    examples = len(inputs)
    square = labelled @ labelled
    agop = (3 / width) * gram.trace() * square + (1 + 5 / width) * labelled @ gram @ labelled
    return AlignmentSpeed(4 / examples**2 * square, 16 / examples**3 * agop)


def network_moments(weight: Tensor, readout: Tensor) -> Tensor:
    """tr(R^j)/d for j = 1 … 4 of one network, R = Wᵀdiag(a²)W (Eq. 16).

    Args:
        weight: W, ``[k, d]``.
        readout: a, ``[k]``.

    Returns:
        ``[4]``, to be averaged over networks.

    Raises:
        ConfigurationError: if the shapes do not fit.
    """
    if weight.dim() != 2 or readout.shape != weight.shape[:1]:
        raise ConfigurationError(
            "weight must be [k, d] and readout [k], got shapes "
            f"{tuple(weight.shape)} and {tuple(readout.shape)}"
        )
    rows = readout[:, None] * weight
    once = rows.T @ rows
    twice = once @ once
    traces = [once.trace(), twice.trace(), (once * twice).sum(), twice.square().sum()]
    return torch.stack(traces) / weight.shape[1]


def expected_moments(width: int, dimension: int) -> Tensor:
    """E[tr(R^j)]/d for j = 1 … 4, a ~ N(0, I), W_ij ~ N(0, 1/k): exact for every k and d.

    tr(R^j) is a sum over j units of a²-weighted products of entries of W around a ring. By which of
    the units are the same it falls into set partitions, each with k(k−1)… terms and a factor
    E[a^(2b)] = (2b−1)!! for b equal ones; Wick's theorem pairs the entries of W of equal units, and
    each ring of paired indices gives d. At k = d → ∞: 1, 4, 25, 202, as of the free compound
    Poisson law with cumulants (d/k)^(j−1)·(2j−1)!!. (The paper averages over 30 networks instead.)

    Args:
        width: k.
        dimension: d.

    Returns:
        ``[4]``, float64.

    Raises:
        ConfigurationError: if an argument is no positive integer.
    """
    positive_integer("width", width)
    positive_integer("dimension", dimension)
    found = []
    for order in range(1, _ORDER + 1):
        total = 0
        for blocks in _partitions(list(range(order))):
            units = math.prod(range(width - len(blocks) + 1, width + 1))
            readouts = math.prod(_double_factorial(2 * len(block) - 1) for block in blocks)
            total += units * readouts * sum(dimension**r for r in _rings(blocks, order))
        found.append(total / (width**order * dimension))
    return torch.tensor(found, dtype=torch.float64)


def _rings(blocks: Sequence[Sequence[int]], order: int) -> Iterator[int]:
    """Free indices of each pairing of the entries of W that belong to equal units.

    Unit i meets index i on its one side, index i + 1 on its other.
    """
    sides = [[side for i in block for side in (i, (i + 1) % order)] for block in blocks]
    for pairing in itertools.product(*(list(_pairings(block)) for block in sides)):
        name = list(range(order))
        for left, right in itertools.chain(*pairing):
            old, new = name[left], name[right]
            name = [new if other == old else other for other in name]
        yield len(set(name))


def _pairings(items: list[int]) -> Iterator[list[tuple[int, int]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for i, other in enumerate(rest):
        for pairs in _pairings(rest[:i] + rest[i + 1 :]):
            yield [(first, other), *pairs]


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for blocks in _partitions(rest):
        yield [[first], *blocks]
        for i, block in enumerate(blocks):
            yield [*blocks[:i], [first, *block], *blocks[i + 1 :]]


def _double_factorial(odd: int) -> int:
    return math.prod(range(odd, 0, -2))


def _data_matrices(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """B = XᵀX and C = XᵀYX, in float64: eighth powers of X are compared."""
    if inputs.dim() != 2 or labels.shape != inputs.shape[:1]:
        raise ConfigurationError(
            "inputs must be [n, d] and labels [n], got shapes "
            f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
        )
    x, y = inputs.double(), labels.double()
    return x.T @ x, x.T @ (y[:, None] * x)


def _four(moments: Tensor | Sequence[float]) -> tuple[float, float, float, float]:
    values = [float(moment) for moment in moments]
    if len(values) != _ORDER:
        raise ConfigurationError(f"moments must be tr(R^j)/d for j = 1 … 4, got {len(values)}")
    return values[0], values[1], values[2], values[3]


def _centred(matrix: Tensor) -> tuple[float, Tensor]:
    """tr[M] and M̄ = M − tr[M]·I, the trace over d."""
    mean = _mean(matrix)
    return float(mean), matrix - mean * torch.eye(len(matrix)).to(matrix)


def _mean(matrix: Tensor) -> Tensor:
    """tr[M], the trace over d."""
    return matrix.trace() / len(matrix)


def _trace(a: Tensor, b: Tensor) -> float:
    """tr[AB], the trace over d."""
    return float((a * b.T).sum()) / len(a)
