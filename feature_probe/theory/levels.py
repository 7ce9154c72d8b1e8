"""The level that WᵀW and (WᵀKW)ˢ reach by chance: the W they share, K's eigenvectors at random.

Level and spread are functions of a random rotation Q of d_out dimensions. What is small enough is
sampled, with one eigenproblem a draw for all powers. In wide layers the spread follows instead from
how fast the cosine f changes as Q is turned further: Var f = E‖∇_Q f‖²/d_out holds exactly for a
function that is linear in QKQᵀ, and is too large by a factor 2 for a quadratic one. With
Γ = ∂f/∂(QKQᵀ) the gradient is the commutator of QKQᵀ and Γ, whose norm a few random vectors z tell:
‖C‖² = E‖Cz‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from feature_probe.theory.factored import moderate
from feature_probe.theory.spectra import Spectrum, gram_spectrum

Apply = Callable[[Tensor], Tensor]

_NAN = float("nan")
#: Most rotations drawn, and the floating-point operations that all of them may cost.
_MOST_DRAWS, _BUDGET = 96, 1e8
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
#: Operations that those rotations may cost.
_BUDGET_AT_ONE = 3e8
#: Width from which on rotations are products of signs and transforms: they mix as Haar's do there.
_WIDE = 128
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


class ChanceLevels:
    """The levels of one layer at any power: its draws are made once.

    Args:
        weight: W in float64, shape ``[groups, d_out, d_in]``, or in coordinates of its row space.
        values: Kept eigenvalues of K or E, ``[groups, r]``, 0 where dropped.
        tolerance: Relative eigenvalue clamp.
        seed: Seed of the draws, so that a report can be repeated.
        gram: WWᵀ ``[groups, d_out, d_out]``, where it is known.
    """

    def __init__(
        self,
        weight: Tensor,
        values: Tensor,
        tolerance: float,
        *,
        seed: int = 0,
        gram: Tensor | None = None,
    ) -> None:
        (self._weight, exponent), self._values = moderate(weight), moderate(values)[0]
        self._given_gram = None if exponent else gram
        self._tolerance, self._seed = tolerance, seed
        self._levels: dict[float, ChanceLevel] = {}
        groups, self._width, _ = weight.shape
        self._undefined = not (values > 0).any() or not weight.any()
        self._undefined |= self._width == 1 and groups > 1

    def at(self, power: float) -> ChanceLevel:
        """The level at s = ``power``; see :func:`shared_weight_level`."""
        if power not in self._levels:
            self._levels[power] = self._level(power)
        return self._levels[power]

    def mean(self, power: float) -> float:
        """The level without its spread, which is the larger part of the work in wide layers."""
        if power in self._levels or self._is_simple() or self._has_closed_form(power):
            return self.at(power).cosine
        return float(self._drawn.cosines(power).mean())

    def _level(self, power: float) -> ChanceLevel:
        if self._undefined:
            return ChanceLevel(_NAN, _NAN, _NAN)
        if self._width == 1:
            return ChanceLevel(1.0, 0.0, 0.0)
        if self._has_closed_form(power):
            return _level_at_one(self._weight, self._values, self._gram, self._generator(1))
        cosines = self._drawn.cosines(power)
        if len(cosines) < _FEWEST:
            variances = self._drawn.variances(power, self._generator(1))
            return _estimated(float(cosines.mean()), float(variances.mean().sqrt()))
        far = cosines.clamp(-_ONE, _ONE).atanh()
        return ChanceLevel(float(cosines.mean()), float(cosines.std()), float(far.std()))

    def _is_simple(self) -> bool:
        return self._undefined or self._width == 1

    def _has_closed_form(self, power: float) -> bool:
        return power == 1 and self._width > _NARROW and self._number < _FEWEST

    @cached_property
    def _number(self) -> int:
        return _affordable(self._weight, self._values)

    @cached_property
    def _drawn(self) -> _Draws:
        generator = self._generator(0)
        rotation: _Rotation
        if self._width >= _WIDE:
            rotation = _Mixing(self._number, self._weight, generator)
        else:
            rotation = _Haar(self._number, self._weight, self._values.shape[1], generator)
        return _Draws(self._values, rotation, self._gram.norm(), self._tolerance)

    @cached_property
    def _gram(self) -> Tensor:
        """WWᵀ, or WᵀW where it is smaller."""
        if self._given_gram is not None:
            return self._given_gram
        weight = self._weight
        return weight @ weight.mT if self._width <= weight.shape[2] else weight.mT @ weight

    def _generator(self, stream: int) -> torch.Generator:
        seed = 2 * self._seed + stream
        return torch.Generator(device=self._weight.device).manual_seed(seed)


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
    eigenvectors are drawn anew. Mean and standard deviation over 24 to 96 draws where
    d_out ≤ 64, or where so many cost at most 10⁸ operations (one costs about 10·r³ + 4·d_out·r²
    with r eigenvalues of K). Elsewhere the spread is √(mean ‖∇f‖²/d_out), typically within 20 % of
    the standard deviation and at most about a factor √2 above it, and the mean is over the few
    draws that fit, at least one, so that it is itself uncertain by up to the spread. There, at
    s = 1, the mean is a closed form, the ratio of expectations, unless eight draws are clearly
    elsewhere: it is far too low where one side is nearly of rank 1 or 2 (0.76 for 0.87).

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
    return ChanceLevels(weight, values, tolerance, seed=seed).at(power)


def _estimated(cosine: float, spread: float) -> ChanceLevel:
    """A level whose spread is not that of draws."""
    return ChanceLevel(cosine, spread, spread / max(1 - min(cosine, _ONE) ** 2, 1e-12))


def _affordable(weight: Tensor, values: Tensor) -> int:
    """How many rotations are drawn."""
    groups, width, columns = weight.shape
    count = values.shape[1]
    operations = count * (4 * width * count + 2 * width * min(width, columns)) + _OVERHEAD
    operations += 10 * min(count, columns) ** 3
    fewest = _FEWEST if width <= _NARROW else 1
    return int(max(fewest, min(_MOST_DRAWS, _BUDGET // (groups * operations))))


class _Rotation(Protocol):
    """Random rotations Q of the rows of one layer, in a basis of ℝ^d_out that is Q's own or W's."""

    @property
    def whole(self) -> Tensor:
        """W in that basis, ``[draws or 1, groups, d_out, d_in]``."""

    def rows(self, count: int) -> Tensor:
        """QᵀW of the first ``count`` columns of Q, ``[draws, groups, count, d_in]``."""

    def curvature(self, values: Tensor, vectors: Tensor) -> Tensor:
        """QKQᵀ times vectors ``[draws, groups, d_out, m]`` for the eigenvalues of K."""


class _Haar:
    """Rotations from the QR decomposition of normal numbers.

    Where W has fewer columns than K has eigenvalues, QᵀW = P·T with W = U·T and P = QᵀU a random
    frame of d_in columns, which is the smaller one to draw.
    """

    def __init__(self, draws: int, weight: Tensor, count: int, generator: torch.Generator) -> None:
        groups, width, columns = weight.shape
        shape = (draws, groups, width, min(count, columns))
        normal = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
        frame = torch.linalg.qr(normal).Q  # the signs of its columns cancel in every product
        self._frame: Tensor | None = frame if count <= columns else None
        self.whole: Tensor = weight[None]
        if self._frame is None:
            self.whole = frame @ torch.linalg.qr(weight, mode="r").R

    def rows(self, count: int) -> Tensor:
        """QᵀW of the first ``count`` columns of Q."""
        if self._frame is None:
            return self.whole[:, :, :count]
        return self._frame.mT @ self.whole

    def curvature(self, values: Tensor, vectors: Tensor) -> Tensor:
        """QKQᵀ times vectors."""
        if self._frame is not None:
            turned: Tensor = self._frame.mT @ vectors
            return self._frame @ (values[..., None] * turned)
        count = values.shape[1]
        product = torch.zeros_like(vectors)
        product[:, :, :count] = values[..., None] * vectors[:, :, :count]
        return product


class _Mixing:
    """Q = D₁HD₂HD₃H with random signs D and the Hartley transform H: k·log k operations a vector.

    It mixes as well as Haar's rotations do in many dimensions.
    """

    def __init__(self, draws: int, weight: Tensor, generator: torch.Generator) -> None:
        groups, width, _ = weight.shape
        shape = (draws, groups, width, 1)
        self._signs = [_signs(shape, generator, weight) for _ in range(3)]
        self.whole = weight[None]

    def rows(self, count: int) -> Tensor:
        """QᵀW of the first ``count`` columns of Q."""
        return self._forth(self.whole)[:, :, :count]

    def curvature(self, values: Tensor, vectors: Tensor) -> Tensor:
        """QKQᵀ times vectors."""
        turned, count = self._forth(vectors), values.shape[1]
        inside = torch.zeros_like(turned)
        inside[:, :, :count] = values[..., None] * turned[:, :, :count]
        return self._back(inside)

    def _forth(self, z: Tensor) -> Tensor:
        for signs in self._signs:
            z = _hartley(signs * z)
        return z

    def _back(self, z: Tensor) -> Tensor:
        for signs in reversed(self._signs):
            z = signs * _hartley(z)
        return z


class _Draws:
    """f and its gradient at random rotations of one layer, at any power.

    Args:
        values: λ of K, ``[groups, r]``.
        rotation: The rotations, and W.
        own_norm: ‖WᵀW‖_F.
        tolerance: Relative eigenvalue clamp.
    """

    def __init__(
        self, values: Tensor, rotation: _Rotation, own_norm: Tensor, tolerance: float
    ) -> None:
        self._rotation, self._curvature = rotation, values
        self._own_norm, self._tolerance = own_norm, tolerance
        self._rows = rotation.rows(values.shape[1])

    def cosines(self, power: float) -> Tensor:
        """f of every draw, ``[draws]``."""
        if power == 1:  # without an eigenproblem
            own = self._curvature.sqrt()[..., None] * self._rows
            norms = (own @ own.mT).square().sum((1, 2, 3)).sqrt() * self._own_norm
            mixed = self._rows @ self._rotation.whole.mT
            return (self._curvature[..., None] * mixed.square()).sum((1, 2, 3)) / norms
        raised = self._eigen.values.pow(power)
        norms = raised.square().sum((1, 2)).sqrt() * self._own_norm
        return (raised * self._quotients).sum((1, 2)) / norms

    def variances(self, power: float, probes: torch.Generator) -> Tensor:
        """‖∇f‖²/d_out of every draw, ``[draws]``."""
        values, vectors, top = self._eigen.values, self._eigen.vectors, self._top
        turned, whole = self._turned, self._rotation.whole
        raised = values.pow(power)
        norms = raised.square().sum((1, 2)).sqrt()
        first = 1 / (norms * self._own_norm)
        cosines = first * (raised * self._quotients).sum((1, 2))
        first, second = (x[:, None, None, None] for x in (first, cosines / norms.square()))
        # ∂f/∂X = Vᵀ(φ∘S)V + the part between V and its complement, X in units of its largest
        # eigenvalue
        kernel = _divided_differences(values, power)
        kernel *= first * self._turned_gram - second * torch.diag_embed(raised)
        powers = torch.where(values > 0, values, 1.0).pow(power - 1) * (values > 0)
        slopes = first * powers[..., None]

        def gradient(z: Tensor) -> Tensor:
            inside = whole.mT @ z
            seen = vectors @ inside
            outside = inside - vectors.mT @ seen
            kept = kernel @ seen + slopes * (turned @ (whole @ outside))
            beyond = whole.mT @ (turned.mT @ (slopes * seen))
            beyond = beyond - vectors.mT @ (vectors @ beyond)
            return whole @ (vectors.mT @ kept + beyond) / top

        def curvature(z: Tensor) -> Tensor:
            return self._rotation.curvature(self._curvature, z)

        size = (*values.shape[:2], whole.shape[2], _PROBES)
        return _commutator(curvature, gradient, size, probes, whole) / whole.shape[2]

    @cached_property
    def _scaled_eigen(self) -> tuple[Spectrum, Tensor]:
        """Eigenpairs of every WᵀQKQᵀW, in units of the largest eigenvalue of all."""
        own = self._curvature.sqrt()[..., None] * self._rows
        found = gram_spectrum(own.flatten(0, 1), self._tolerance)
        top = found.values.max()
        values = found.values.reshape(*own.shape[:2], -1) / top
        return Spectrum(values, found.vectors.reshape(*own.shape[:2], -1, own.shape[3])), top

    @property
    def _eigen(self) -> Spectrum:
        return self._scaled_eigen[0]

    @property
    def _top(self) -> Tensor:
        return self._scaled_eigen[1]

    @cached_property
    def _turned(self) -> Tensor:
        return self._eigen.vectors @ self._rotation.whole.mT

    @cached_property
    def _turned_gram(self) -> Tensor:
        return self._turned @ self._turned.mT

    @cached_property
    def _quotients(self) -> Tensor:
        """vᵀWᵀWv of every eigenvector."""
        return self._turned.square().sum(-1)


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


def _level_at_one(
    weight: Tensor, values: Tensor, gram: Tensor, generator: torch.Generator
) -> ChanceLevel:
    """Mean and spread at s = 1 without a decomposition: Γ = WWᵀ(c₁ − c₂·QKQᵀ)WWᵀ.

    c₁ = 1/(‖WᵀW‖‖X‖), c₂ = f/‖X‖², X = WᵀQKQᵀW.
    """
    groups, width, columns = weight.shape
    count = values.shape[1]
    operations = 2 * groups * count * columns * (count + width)
    rotations = int(max(1, min(_ROTATIONS, _BUDGET_AT_ONE // operations)))
    rotation = _Mixing(rotations, weight, generator)

    def shared(z: Tensor) -> Tensor:
        return gram @ z if width <= columns else weight @ (weight.mT @ z)

    def curvature(z: Tensor) -> Tensor:
        return rotation.curvature(values, z)

    rows = rotation.rows(count)
    own = values.sqrt()[..., None] * rows
    norms = (own @ own.mT).square().sum((1, 2, 3), keepdim=True).sqrt()
    mixed = (rows @ weight.mT).square()
    products = (values[..., None] * mixed).sum((1, 2, 3), keepdim=True)
    first = 1 / (norms * gram.norm())
    second = first * products / norms.square()

    def gradient(z: Tensor) -> Tensor:
        inner = shared(z)
        return shared(first * inner - second * curvature(inner))

    size = (rotations, groups, width, _PROBES)
    squares = _commutator(curvature, gradient, size, generator, weight)
    spread = math.sqrt(float(squares.mean()) / width)
    drawn = float((first * products).mean())
    closed = _closed_form(width, gram, values)
    is_elsewhere = abs(drawn - closed) > _APART * spread / math.sqrt(rotations)
    return _estimated(drawn if is_elsewhere else closed, spread)


def _hartley(z: Tensor) -> Tensor:
    """An orthogonal symmetric transform along the last axis but one, in k·log k operations."""
    size = z.shape[-2]
    waves: Tensor = torch.fft.rfft(z, dim=-2, norm="ortho")
    mirrored = (waves.real + waves.imag)[..., 1 : (size + 1) // 2, :].flip(-2)
    return torch.cat([waves.real - waves.imag, mirrored], dim=-2)


def _closed_form(k: int, gram: Tensor, values: Tensor) -> float:
    """ρ ≈ (tr K/k) tr L² / √(tr L² · [a tr L² + b(tr L² + (tr L)²)]), L = WWᵀ, blocks added."""
    trace_l2 = gram.square().sum((-1, -2))
    trace_l = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    trace_k, trace_k2 = values.sum(-1), values.square().sum(-1)
    b = (k * trace_k2 - trace_k**2) / (k * (k - 1) * (k + 2))
    a = (trace_k**2 - 2 * k * b) / k**2
    cross = (trace_k / k * trace_l2).sum()
    norm = (a * trace_l2 + b * (trace_l2 + trace_l**2)).sum()
    return float(cross) / math.sqrt(float(trace_l2.sum() * norm))
