"""The level that WᵀW and (WᵀKW)ˢ reach by chance: the W they share, K's eigenvectors at random.

Level and spread are functions of a random rotation Q of d_out dimensions. What is small enough is
sampled. In wide layers the spread follows instead from how fast the cosine f changes as Q is turned
further: Var f = E‖∇_Q f‖²/d_out holds exactly for a function that is linear in QKQᵀ, and is too
large by a factor 2 for a quadratic one. With Γ = ∂f/∂(QKQᵀ) the gradient is the commutator of
QKQᵀ and Γ, whose norm a few random vectors z tell: ‖C‖² = E‖Cz‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.theory.factored import Factored, moderate
from feature_probe.theory.spectra import gram_spectrum

Apply = Callable[[Tensor], Tensor]

_NAN = float("nan")
#: Most rotations drawn, and the floating-point operations that all of them may cost.
_MOST_DRAWS, _BUDGET = 256, 3e8
#: What handling one small matrix costs, in the same operations.
_OVERHEAD = 20_000
#: Fewest draws whose standard deviation is taken for the spread (good to about 15 %).
_FEWEST = 24
#: Width up to which the level is sampled whatever that costs: the closed form at s = 1 is not good
#: to 0.01 there.
_NARROW = 64
#: Largest cosine that is told from 1.
_ONE = 1 - 1e-9
#: Standard errors that the mean of some draws may lie from the closed form.
_APART = 4.0
#: Rotations, and random vectors for each, where the spread at s = 1 is not sampled.
_ROTATIONS, _PROBES = 8, 16
#: Eigenvalues closer than this, relatively, share one divided difference.
_CLOSE = 1e-7


@dataclass(frozen=True)
class ChanceLevel:
    """What the cosine is by chance.

    Attributes:
        cosine: Its mean.
        spread: Its standard deviation, that of one draw (not of the mean).
        arctanh_spread: The same of arctanh of the cosine, on which scale 1 is far away; below
            24 draws spread/(1 − cosine²).
    """

    cosine: float
    spread: float
    arctanh_spread: float


@dataclass(frozen=True)
class _Draws:
    """Random rotations Q of one layer, in a basis of ℝ^d_out that is Q's own or W's.

    Attributes:
        rows: QᵀW of the first r columns of Q, ``[draws, groups, r, d_in]``.
        whole: W in that basis, ``[draws or 1, groups, d_out, d_in]``.
        frame: The first r columns of Q in that basis, or None where they are unit vectors.
        values: λ of K, ``[groups, r]``.
    """

    rows: Tensor
    whole: Tensor
    frame: Tensor | None
    values: Tensor

    def curvature(self, vectors: Tensor) -> Tensor:
        """QKQᵀ times vectors ``[draws, groups, d_out, m]``."""
        if self.frame is not None:
            return self.frame @ (self.values[..., None] * (self.frame.mT @ vectors))
        count = self.values.shape[1]
        product = torch.zeros_like(vectors)
        product[:, :, :count] = self.values[..., None] * vectors[:, :, :count]
        return product


def shared_weight_level(
    weight: Tensor,
    values: Tensor,
    power: float,
    tolerance: float,
    *,
    seed: int = 0,
) -> ChanceLevel:
    """Cosine of WᵀW with (WᵀQKQᵀW)ˢ, Q a random rotation: what K with random eigenvectors gets.

    The control of Beaglehole, Mitliagkas and Agarwala, "Gradient descent induces alignment between
    weights and the pre-activation tangents": the W that both sides share is kept, only K's
    eigenvectors are drawn anew. Mean and standard deviation over 24 to 256 draws where
    d_out ≤ 64, or where so many cost at most 3·10⁸ operations (one costs about 4·d_out·r² with r
    eigenvalues of K). Elsewhere the spread is √(mean ‖∇f‖²/d_out), typically within 20 % of the
    standard deviation and at most about a factor √2 above it, and the mean is over the few draws
    that fit, at least one, so that it is itself uncertain by up to the spread. There, at s = 1, the
    mean is a closed form, the ratio of expectations, unless eight draws are clearly elsewhere: it
    is far too low where one side is nearly of rank 1 or 2 (0.76 for 0.87).

    Args:
        weight: W in float64, shape ``[groups, d_out, d_in]``, or in coordinates of its row space.
        values: Kept eigenvalues of K or E, ``[groups, r]``, 0 where dropped.
        power: s.
        tolerance: Relative eigenvalue clamp.
        seed: Seed of the draws, so that a report can be repeated.

    Returns:
        The level: 1 with spread 0 for a single row, as every K gives WᵀKW ∝ WᵀW; NaN where a side
        is zero or the blocks have one row each.

    Raises:
        torch.linalg.LinAlgError: if an eigenproblem does not converge.
    """
    groups, width, _ = weight.shape
    weight, values = moderate(weight)[0], moderate(values)[0]
    if not (values > 0).any() or not weight.any() or (width == 1 and groups > 1):
        return ChanceLevel(_NAN, _NAN, _NAN)
    if width == 1:
        return ChanceLevel(1.0, 0.0, 0.0)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    number = _affordable(weight, values, power)
    if power == 1 and width > _NARROW and number < _FEWEST:
        return _level_at_one(weight, values, generator)
    draws = _drawn(weight, values, number, generator)
    if number < _FEWEST:
        cosines, variances = _at_power(draws, power, tolerance, generator)
        return _estimated(float(cosines.mean()), float(variances.mean().sqrt()))
    cosines = _cosines_at_one(draws) if power == 1 else _at_power(draws, power, tolerance)[0]
    far = cosines.clamp(-_ONE, _ONE).atanh()
    return ChanceLevel(float(cosines.mean()), float(cosines.std()), float(far.std()))


def _estimated(cosine: float, spread: float) -> ChanceLevel:
    """A level whose spread is not that of draws."""
    return ChanceLevel(cosine, spread, spread / max(1 - min(cosine, _ONE) ** 2, 1e-12))


def _affordable(weight: Tensor, values: Tensor, power: float) -> int:
    """How many rotations are drawn."""
    groups, width, columns = weight.shape
    count = values.shape[1]
    operations = count * (4 * width * count + 2 * width * min(width, columns)) + _OVERHEAD
    if power != 1:
        operations += 10 * min(count, columns) ** 3
    fewest = _FEWEST if width <= _NARROW else 1
    return int(max(fewest, min(_MOST_DRAWS, _BUDGET // (groups * operations))))


def _drawn(weight: Tensor, values: Tensor, draws: int, generator: torch.Generator) -> _Draws:
    """Haar rotations.

    Where W has fewer columns than K has eigenvalues, QᵀW = P·T with W = U·T and P = QᵀU a random
    frame of d_in columns, which is the smaller one to draw.
    """
    groups, width, columns = weight.shape
    count = values.shape[1]
    shape = (draws, groups, width, min(count, columns))
    normal = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
    frame = torch.linalg.qr(normal).Q  # the signs of its columns cancel in every product
    if count <= columns:
        return _Draws(frame.mT @ weight, weight[None], frame, values)
    whole = frame @ torch.linalg.qr(weight, mode="r").R
    return _Draws(whole[:, :, :count], whole, None, values)


def _cosines_at_one(draws: _Draws) -> Tensor:
    """f of every draw at s = 1."""
    rows = draws.rows
    own = draws.values.sqrt()[..., None] * rows
    norms = (own @ own.mT).square().sum((1, 2, 3)).sqrt() * _gram_norm(draws.whole)
    mixed = rows @ draws.whole.mT
    return (draws.values[..., None] * mixed.square()).sum((1, 2, 3)) / norms


def _at_power(
    draws: _Draws, power: float, tolerance: float, probes: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """f of every draw and, with a generator for the probes, ‖∇f‖²/d_out."""
    own = draws.values.sqrt()[..., None] * draws.rows
    spectrum = gram_spectrum(own.flatten(0, 1), tolerance)
    shape, top = (*own.shape[:2], -1), spectrum.values.max()
    values = spectrum.values.reshape(shape) / top
    vectors = spectrum.vectors.reshape(*shape, own.shape[3])
    raised = values.pow(power)
    norms = raised.square().sum((1, 2)).sqrt()
    turned = vectors @ draws.whole.mT
    first = 1 / (norms * _gram_norm(draws.whole))
    cosines = first * (raised[..., None] * turned.square()).sum((1, 2, 3))
    if probes is None:
        return cosines, cosines
    first, second = (x[:, None, None, None] for x in (first, cosines / norms.square()))
    # ∂f/∂X = Vᵀ(φ∘S)V + the part between V and its complement, X in units of its largest eigenvalue
    kernel = _divided_differences(values, power)
    kernel *= first * (turned @ turned.mT) - second * torch.diag_embed(raised)
    slopes = first * (torch.where(values > 0, values, 1.0).pow(power - 1) * (values > 0))[..., None]
    whole = draws.whole

    def gradient(z: Tensor) -> Tensor:
        inside = whole.mT @ z
        seen = vectors @ inside
        outside = inside - vectors.mT @ seen
        kept = kernel @ seen + slopes * (turned @ (whole @ outside))
        beyond = whole.mT @ (turned.mT @ (slopes * seen))
        beyond = beyond - vectors.mT @ (vectors @ beyond)
        return whole @ (vectors.mT @ kept + beyond) / top

    size = (*own.shape[:2], whole.shape[2], _PROBES)
    return cosines, _commutator(draws.curvature, gradient, size, probes, whole) / whole.shape[2]


def _divided_differences(values: Tensor, power: float) -> Tensor:
    """(aˢ − bˢ)/(a − b) of every two eigenvalues, s·aˢ⁻¹ where they are equal, 0 where dropped."""
    rows, columns = values[..., None], values[..., None, :]
    gap = rows - columns
    close = gap.abs() <= _CLOSE * (rows + columns)
    middle = torch.where(rows + columns > 0, (rows + columns) / 2, 1.0)
    quotient = (rows.pow(power) - columns.pow(power)) / torch.where(close, 1.0, gap)
    kept = (rows > 0) & (columns > 0)
    return torch.where(close, power * middle.pow(power - 1), quotient) * kept


def _commutator(
    one: Apply, other: Apply, size: tuple[int, ...], generator: torch.Generator, like: Tensor
) -> Tensor:
    """‖[A, B]‖_F² of symmetric A and B from random signs z, ``[draws]``."""
    z = _signs(size, generator, like)
    return (one(other(z)) - other(one(z))).square().sum((1, 2, 3)) / size[3]


def _signs(size: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    bits = torch.randint(2, size, generator=generator, device=like.device)
    return bits.to(like.dtype) * 2 - 1


def _level_at_one(weight: Tensor, values: Tensor, generator: torch.Generator) -> ChanceLevel:
    """Mean and spread at s = 1 without a decomposition: Γ = WWᵀ(c₁ − c₂·QKQᵀ)WWᵀ.

    c₁ = 1/(‖WᵀW‖‖X‖), c₂ = f/‖X‖², X = WᵀQKQᵀW. In place of Haar rotations
    Q = D₁HD₂HD₃H with random signs D and the Hartley transform H, which mixes as well in many
    dimensions.
    """
    groups, width, columns = weight.shape
    rotations = int(max(1, min(_ROTATIONS, _BUDGET // (4 * groups * width * columns**2))))
    gram = weight @ weight.mT if width <= columns else None
    signs = [_signs((rotations, groups, width, 1), generator, weight) for _ in range(3)]
    spectrum = torch.cat([values, values.new_zeros(groups, width - values.shape[1])], 1)[..., None]

    def shared(z: Tensor) -> Tensor:
        return gram @ z if gram is not None else weight @ (weight.mT @ z)

    def curvature(z: Tensor) -> Tensor:
        for sign in signs:
            z = _hartley(sign * z)
        z = spectrum * z
        for sign in reversed(signs):
            z = sign * _hartley(z)
        return z

    own = weight.mT @ weight
    predicted = weight.mT @ curvature(weight[None])
    norms = predicted.square().sum((1, 2, 3), keepdim=True).sqrt()
    first = 1 / (norms * own.norm())
    second = first * (own * predicted).sum((1, 2, 3), keepdim=True) / norms.square()

    def gradient(z: Tensor) -> Tensor:
        inner = shared(z)
        return shared(first * inner - second * curvature(inner))

    size = (rotations, groups, width, _PROBES)
    squares = _commutator(curvature, gradient, size, generator, weight)
    spread = math.sqrt(float(squares.mean()) / width)
    drawn = float((first * (own * predicted).sum((1, 2, 3), keepdim=True)).mean())
    closed = _closed_form(weight, values)
    is_elsewhere = abs(drawn - closed) > _APART * spread / math.sqrt(rotations)
    return _estimated(drawn if is_elsewhere else closed, spread)


def _hartley(z: Tensor) -> Tensor:
    """An orthogonal symmetric transform along the last axis but one, in k·log k operations."""
    waves: Tensor = torch.fft.fft(z, dim=-2, norm="ortho")
    return waves.real - waves.imag


def _gram_norm(whole: Tensor) -> Tensor:
    """‖WᵀW‖_F."""
    return Factored.gram(whole[0]).thin().squared_norm().sqrt()


def _closed_form(weight: Tensor, values: Tensor) -> float:
    """ρ ≈ (tr K/k) tr L² / √(tr L² · [a tr L² + b(tr L² + (tr L)²)]), L = WWᵀ, blocks added."""
    k = weight.shape[1]
    gram = weight @ weight.mT if k <= weight.shape[2] else weight.mT @ weight
    trace_l2 = gram.square().sum((-1, -2))
    trace_l = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    trace_k, trace_k2 = values.sum(-1), values.square().sum(-1)
    b = (k * trace_k2 - trace_k**2) / (k * (k - 1) * (k + 2))
    a = (trace_k**2 - 2 * k * b) / k**2
    cross = (trace_k / k * trace_l2).sum()
    norm = (a * trace_l2 + b * (trace_l2 + trace_l**2)).sum()
    return float(cross) / math.sqrt(float(trace_l2.sum() * norm))
