"""The level that WᵀW and (WᵀKW)ˢ reach by chance: the W they share, K's eigenvectors at random.

Level and spread are functions of a random rotation Q of d_out dimensions. What is small enough is
sampled, with one eigenproblem a draw for all powers. In wide layers the spread follows instead from
how fast the cosine f changes as Q is turned further: Var f = E‖∇_Q f‖²/d_out holds exactly for a
function that is linear in QKQᵀ, and is too large by a factor 2 for a quadratic one. With
Γ = ∂f/∂(QKQᵀ) the gradient is the commutator of QKQᵀ and Γ, whose norm a few random vectors tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from feature_probe.theory.factored import moderate
from feature_probe.theory.rotations import random_frames, random_signs
from feature_probe.theory.spectra import Spectrum, gram_spectrum, symmetric_spectrum
from feature_probe.theory.threads import calm

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
#: Draws at s = 1 where (Σλ)²/Σλ² of a side is less than so much: as of so many equal eigenvalues.
_SEVERAL, _CONCENTRATED = 8, 2.5
#: Random vectors for each rotation where the spread is not sampled.
_PROBES = 8
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


class TurnedWeight:
    """W under random rotations of its rows, which the levels of all sums of a layer share.

    Args:
        weight: W in float64, shape ``[groups, d_out, d_in]``, or in coordinates of its row space.
        seed: Seed of the draws, so that a report can be repeated.
        gram: WWᵀ ``[groups, d_out, d_out]``, where it is known.
    """

    def __init__(self, weight: Tensor, *, seed: int = 0, gram: Tensor | None = None) -> None:
        self.weight, exponent = moderate(weight)
        self._given_gram = None if exponent else gram
        self._seed = seed
        self._turned: dict[tuple[int, int], _Turned] = {}

    @cached_property
    def is_zero(self) -> bool:
        """Whether there is nothing to turn."""
        return not self.weight.any()

    @cached_property
    def gram(self) -> Tensor:
        """WWᵀ, or WᵀW where it is smaller."""
        if self._given_gram is not None:
            return self._given_gram
        weight = self.weight
        return weight @ weight.mT if weight.shape[1] <= weight.shape[2] else weight.mT @ weight

    @cached_property
    def own_norm(self) -> Tensor:
        """‖WᵀW‖_F."""
        norm: Tensor = self.gram.norm()
        return norm

    def shared(self, z: Tensor) -> Tensor:
        """WWᵀz for vectors ``[..., groups, d_out, m]``."""
        weight = self.weight
        if weight.shape[1] <= weight.shape[2]:
            return self.gram @ z
        return weight @ (weight.mT @ z)

    def at_random(self, draws: int, count: int) -> _Turned:
        """QᵀW of the first ``count`` columns of so many rotations Q, the same at every call."""
        if (draws, count) not in self._turned:
            self._turned[draws, count] = _Turned(self.weight, draws, count, self.generator(0))
        return self._turned[draws, count]

    def generator(self, stream: int) -> torch.Generator:
        """A generator at the beginning of one of two streams."""
        seed = 2 * self._seed + stream
        return torch.Generator(device=self.weight.device).manual_seed(seed)


class ChanceLevels:
    """The levels of one sum of a layer at any power: its draws are made once.

    Args:
        turned: W and its rotations.
        curvature: Kept eigenvalues of K or E, ``[groups, r]``, 0 where dropped; or the matrix
            itself, ``[groups, d_out, d_out]``, whose eigenvectors then need not be known: turned at
            random they are like any others.
        tolerance: Relative eigenvalue clamp.
    """

    def __init__(self, turned: TurnedWeight, curvature: Tensor, tolerance: float) -> None:
        self._turned = turned
        scaled = moderate(curvature)[0]
        self._curvature = _Diagonal(scaled) if curvature.dim() == 2 else _Dense(scaled)
        self._tolerance = tolerance
        self._levels: dict[float, ChanceLevel] = {}
        groups, self._width, _ = turned.weight.shape
        self._undefined = not curvature.any() or turned.is_zero
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
        drawn = self._several if self._has_closed_form(power) else self._drawn
        cosines = drawn.cosines(power)
        if len(cosines) >= _FEWEST:
            far = cosines.clamp(-_ONE, _ONE).atanh()
            return ChanceLevel(float(cosines.mean()), float(cosines.std()), float(far.std()))
        mean = float(cosines.mean())
        spread = math.sqrt(float(drawn.variances(power).mean()))
        if self._has_closed_form(power):
            closed = _closed_form(self._width, self._turned.gram, *self._curvature.moments())
            is_elsewhere = abs(mean - closed) > _APART * spread / math.sqrt(len(cosines))
            mean = mean if is_elsewhere else closed
        return ChanceLevel(mean, spread, spread / max(1 - min(mean, _ONE) ** 2, 1e-12))

    def _is_simple(self) -> bool:
        return self._undefined or self._width == 1

    def _has_closed_form(self, power: float) -> bool:
        return power == 1 and self._width > _NARROW and self._number < _FEWEST

    @cached_property
    def _number(self) -> int:
        return _affordable(self._turned.weight, self._curvature)

    @cached_property
    def _several(self) -> _Draws:
        """Draws for s = 1, where they need no eigenproblem: more if the closed form may be off."""
        if self._number >= _SEVERAL or not self._is_concentrated():
            return self._drawn
        return _Draws(self._curvature, self._turned, _SEVERAL, self._tolerance)

    def _is_concentrated(self) -> bool:
        """Whether few eigenvalues of WᵀW or of K carry most of it."""
        trace = torch.linalg.vector_norm(self._turned.weight).square()
        ranks = [trace / self._turned.own_norm]
        trace_k, trace_k2 = self._curvature.moments()
        ranks.append(trace_k.sum() / trace_k2.sum().sqrt())
        return any(float(rank) ** 2 < _CONCENTRATED for rank in ranks)

    @cached_property
    def _drawn(self) -> _Draws:
        return _Draws(self._curvature, self._turned, self._number, self._tolerance)


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
    s = 1, the mean is a closed form, the ratio of expectations, unless the draws are clearly
    elsewhere. It is far too low where one side is nearly of rank 1 or 2 (0.76 for 0.87), so that
    eight are drawn there.

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
    return ChanceLevels(TurnedWeight(weight, seed=seed), values, tolerance).at(power)


class _Diagonal:
    """K in the basis of its eigenvectors.

    Args:
        values: λ, ``[groups, r]``.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.count = values.shape[1]

    def times(self, z: Tensor) -> Tensor:
        """Λz for ``[draws, groups, r, m]``."""
        return self.values[..., None] * z

    def moments(self) -> tuple[Tensor, Tensor]:
        """tr K and tr K² by group."""
        return self.values.sum(-1), self.values.square().sum(-1)


class _Dense:
    """K in any basis.

    Args:
        matrix: K, ``[groups, d_out, d_out]``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = (matrix + matrix.mT) / 2
        self.count = matrix.shape[1]

    def times(self, z: Tensor) -> Tensor:
        """Kz for ``[draws, groups, d_out, m]``."""
        product: Tensor = self.matrix @ z
        return product

    def moments(self) -> tuple[Tensor, Tensor]:
        """tr K and tr K² by group."""
        trace = self.matrix.diagonal(dim1=1, dim2=2).sum(-1)
        return trace, torch.linalg.vector_norm(self.matrix, dim=(1, 2)).square()


def _affordable(weight: Tensor, curvature: _Diagonal | _Dense) -> int:
    """How many rotations are drawn."""
    groups, width, columns = weight.shape
    count = curvature.count
    operations = count * (4 * width * count + 2 * width * min(width, columns)) + _OVERHEAD
    operations += 10 * min(count, columns) ** 3
    fewest = _FEWEST if width <= _NARROW else 1
    return int(max(fewest, min(_MOST_DRAWS, _BUDGET // (groups * operations))))


class _Turned:
    """W under random rotations Q, in a basis of ℝ^d_out that is Q's own or W's.

    Where W has fewer columns than K has eigenvalues, QᵀW = P·T with W = U·T and P = QᵀU a random
    frame of d_in columns, which is the smaller one to draw.

    Attributes:
        whole: W in that basis, ``[draws or 1, groups, d_out, d_in]``.
        rows: QᵀW of the first ``count`` columns of Q, ``[draws, groups, count, d_in]``.
    """

    def __init__(self, weight: Tensor, draws: int, count: int, generator: torch.Generator) -> None:
        groups, width, columns = weight.shape
        frame = random_frames(draws, groups, width, min(count, columns), generator, weight)
        self._frame = frame if count <= columns else None
        if self._frame is None:
            with calm(weight):
                triangle = torch.linalg.qr(weight, mode="r").R
            self.whole: Tensor = frame @ triangle
            self.rows: Tensor = self.whole[:, :, :count]
        else:
            self.whole = weight[None]
            self.rows = frame.mT @ self.whole

    @property
    def is_straight(self) -> bool:
        """Whether the basis is W's."""
        return self._frame is not None

    @cached_property
    def mixed(self) -> Tensor:
        """QᵀWWᵀ in the rows of the first columns of Q, ``[draws, groups, count, d_out]``."""
        return self.rows @ self.whole.mT

    def first(self, vectors: Tensor) -> Tensor:
        """Fᵀ times vectors ``[draws, groups, d_out, m]``, F the first columns of Q."""
        if self._frame is None:
            return vectors[:, :, : self.rows.shape[2]]
        product: Tensor = self._frame.mT @ vectors
        return product

    def shared(self, vectors: Tensor) -> Tensor:
        """WWᵀ times vectors, in that basis."""
        product: Tensor = self.whole @ (self.whole.mT @ vectors)
        return product


class _Draws:
    """f and its gradient at random rotations of one layer, at any power.

    Args:
        curvature: K.
        weight: W and its rotations.
        draws: How many rotations.
        tolerance: Relative eigenvalue clamp.
    """

    def __init__(
        self,
        curvature: _Diagonal | _Dense,
        weight: TurnedWeight,
        draws: int,
        tolerance: float,
    ) -> None:
        self._curvature, self._weight, self._tolerance = curvature, weight, tolerance
        self._turned = weight.at_random(draws, curvature.count)
        self._own_norm = weight.own_norm

    def cosines(self, power: float) -> Tensor:
        """f of every draw, ``[draws]``."""
        if power == 1:  # without an eigenproblem
            return self._products / (self._norms * self._own_norm)
        raised = self._eigen.values.pow(power)
        norms = raised.square().sum((1, 2)).sqrt() * self._own_norm
        return (raised * self._quotients).sum((1, 2)) / norms

    def variances(self, power: float) -> Tensor:
        """‖∇f‖²/d_out of every draw, ``[draws]``.

        ∇f is the commutator of A = FΛFᵀ, F the first columns of Q, and Γ. With G = FᵀΓF its norm is
        ‖[A, Γ]‖² = ‖ΛG − GΛ‖² + 2‖(1 − FFᵀ)ΓFΛ‖², which random signs z tell from ΓFz and ΓFΛz.
        Of a K that is given as a matrix F is all of Q, and K stands for Λ.
        """
        turned, times = self._turned, self._curvature.times
        size = (*turned.rows.shape[:3], _PROBES)
        z = random_signs(size, self._weight.generator(1), turned.rows)
        both = torch.cat([z, times(z)], dim=-1)
        y = self._slope_at_one(both) if power == 1 else self._slope(power, both)
        inside = turned.first(y)
        (inner, outer), whole = inside.chunk(2, dim=-1), y.chunk(2, dim=-1)[1]
        within = (times(inner) - outer).square().sum((1, 2, 3))
        across = whole.square().sum((1, 2, 3)) - outer.square().sum((1, 2, 3))
        return (within + 2 * across.clamp_min(0.0)) / (_PROBES * turned.whole.shape[2])

    def _slope_at_one(self, z: Tensor) -> Tensor:
        """ΓFz, Γ = WWᵀ(c₁ − c₂A)WWᵀ, c₁ = 1/(‖WᵀW‖‖X‖), c₂ = f/‖X‖², X = WᵀAW."""
        turned = self._turned
        first = 1 / (self._norms * self._own_norm)
        second = first * self._products / self._norms.square()
        first, second = (x[:, None, None, None] for x in (first, second))
        inner = self._curvature.times(turned.rows @ (turned.rows.mT @ z))
        slope: Tensor = first * self._shared(turned.mixed.mT @ z)
        return slope - second * (turned.mixed.mT @ inner)

    def _slope(self, power: float, z: Tensor) -> Tensor:
        """ΓFz at any power: Γ = W(∂f/∂X)Wᵀ from the eigenpairs V of X.

        ∂f/∂X = Vᵀ(φ∘S)V + the part between V and its complement, in which WᵀF has no part unless
        eigenvalues were dropped.
        """
        values, vectors, turned = self._eigen.values, self._eigen.vectors, self._turned
        raised = values.pow(power)
        norms = raised.square().sum((1, 2)).sqrt()
        first = 1 / (norms * self._own_norm)
        cosines = first * (raised * self._quotients).sum((1, 2))
        first, second = (x[:, None, None, None] for x in (first, cosines / norms.square()))
        kernel = _divided_differences(values, power)
        kernel *= first * self._seen_gram - second * torch.diag_embed(raised)
        powers = torch.where(values > 0, values, 1.0).pow(power - 1) * (values > 0)
        slopes = first * powers[..., None]

        inside = turned.rows.mT @ z
        coordinates = vectors @ inside
        outer = slopes * coordinates
        kept = kernel @ coordinates - self._seen_gram @ outer
        if self._eigen.kept < min(turned.rows.shape[2:]) * values[..., 0].numel():
            outside = turned.whole @ (inside - vectors.mT @ coordinates)
            kept = kept + slopes * (self._seen @ outside)
        slope: Tensor = self._seen.mT @ kept + self._shared(self._seen.mT @ outer)
        return slope / self._top

    def _shared(self, z: Tensor) -> Tensor:
        """WWᵀz in the basis of the rotated W."""
        return self._weight.shared(z) if self._turned.is_straight else self._turned.shared(z)

    @cached_property
    def _own(self) -> Tensor:
        """B with BᵀB = X = WᵀQKQᵀW, K diagonal, ``[draws, groups, r, d_in]``; X itself if dense."""
        rows = self._turned.rows
        if isinstance(self._curvature, _Dense):
            product: Tensor = rows.mT @ (self._curvature.matrix @ rows)
            return product
        return self._curvature.values.sqrt()[..., None] * rows

    @cached_property
    def _own_gram(self) -> Tensor:
        """BBᵀ, or X: a matrix with the eigenvalues of X."""
        return self._own if isinstance(self._curvature, _Dense) else self._own @ self._own.mT

    @cached_property
    def _norms(self) -> Tensor:
        """‖X‖_F of every draw."""
        return self._own_gram.square().sum((1, 2, 3)).sqrt()

    @cached_property
    def _products(self) -> Tensor:
        """⟨WᵀW, X⟩ of every draw."""
        if isinstance(self._curvature, _Dense):
            whole = self._turned.whole
            return (self._own * (whole.mT @ whole)).sum((1, 2, 3))
        return (self._curvature.values * self._turned.mixed.square().sum(-1)).sum((1, 2))

    @cached_property
    def _scaled_eigen(self) -> tuple[Spectrum, Tensor]:
        """Eigenpairs of every X, in units of the largest eigenvalue of all."""
        own, flat = self._own, self._own.flatten(0, 1)
        if isinstance(self._curvature, _Dense):
            found = symmetric_spectrum(flat, self._tolerance)
        else:
            gram = self._own_gram.flatten(0, 1) if own.shape[2] <= own.shape[3] else None
            found = gram_spectrum(flat, self._tolerance, gram)
        top = found.values.max()
        shape = own.shape[:2]

        def by_draw(tensor: Tensor) -> Tensor:
            return tensor.reshape(*shape, *tensor.shape[1:])

        mixing = None if found.mixing is None else by_draw(found.mixing)
        return Spectrum(by_draw(found.values) / top, by_draw(found.vectors), mixing), top

    @property
    def _eigen(self) -> Spectrum:
        return self._scaled_eigen[0]

    @property
    def _top(self) -> Tensor:
        return self._scaled_eigen[1]

    @cached_property
    def _seen(self) -> Tensor:
        """Wv of every eigenvector, ``[draws, groups, kept, d_out]``."""
        mixing, curvature = self._eigen.mixing, self._curvature
        if mixing is None or isinstance(curvature, _Dense):
            return self._eigen.vectors @ self._turned.whole.mT
        return (mixing * curvature.values.sqrt()[:, None]) @ self._turned.mixed

    @cached_property
    def _seen_gram(self) -> Tensor:
        return self._seen @ self._seen.mT

    @cached_property
    def _quotients(self) -> Tensor:
        """vᵀWᵀWv of every eigenvector."""
        return self._seen.square().sum(-1)


def _divided_differences(values: Tensor, power: float) -> Tensor:
    """(aˢ − bˢ)/(a − b) of every two eigenvalues, s·aˢ⁻¹ where they are equal, 0 where dropped."""
    rows, columns = values[..., None], values[..., None, :]
    gap = rows - columns
    close = gap.abs() <= _CLOSE * (rows + columns)
    middle = torch.where(rows + columns > 0, (rows + columns) / 2, 1.0)
    quotient = (rows.pow(power) - columns.pow(power)) / torch.where(close, 1.0, gap)
    kept = (rows > 0) & (columns > 0)
    return torch.where(close, power * middle.pow(power - 1), quotient) * kept


def _closed_form(k: int, gram: Tensor, trace_k: Tensor, trace_k2: Tensor) -> float:
    """ρ ≈ (tr K/k) tr L² / √(tr L² · [a tr L² + b(tr L² + (tr L)²)]), L = WWᵀ, blocks added."""
    trace_l2 = torch.linalg.vector_norm(gram, dim=(-1, -2)).square()
    trace_l = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    b = (k * trace_k2 - trace_k**2) / (k * (k - 1) * (k + 2))
    a = (trace_k**2 - 2 * k * b) / k**2
    cross = (trace_k / k * trace_l2).sum()
    norm = (a * trace_l2 + b * (trace_l2 + trace_l**2)).sum()
    return float(cross) / math.sqrt(float(trace_l2.sum() * norm))
