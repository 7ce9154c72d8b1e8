"""One layer's matrices: what each relation predicts from W and its sums, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from feature_probe.theory.factored import (
    Factored,
    Frame,
    Lift,
    framed_rows,
    moderate,
    row_products,
    scaled,
)
from feature_probe.theory.relations import LayerStatistics, Relation, Side, Sum
from feature_probe.theory.spectra import (
    PolarRoot,
    Spectrum,
    gram_spectrum,
    polar_root,
    symmetric_spectrum,
    symmetric_values,
)

#: Residual below which W + G/λ is formed as such, as its products cancel.
_CANCELLED = 1e-3
#: Width up to which K's eigenvalues are found whatever W's shape.
_SMALL = 128


class LayerMatrices:
    """The matrices of one layer in float64, each computed once and shared by powers and scores.

    W, the sums and λ are scaled by powers of two where their entries are beyond 2^±64, so that no
    product of them leaves the range of floating point; every :class:`Factored` says by which.

    Args:
        statistics: The layer's weight and sums.
        framed: Whether matrices in the row space of W are held in coordinates of that space where
            it is smaller than ℝᵈ. The scores are the same; dense forms are not to be had then.
    """

    def __init__(self, statistics: LayerStatistics, *, framed: bool = True) -> None:
        self.weight_decay = statistics.weight_decay
        self._given = statistics
        self._framed = framed
        self._spectra: dict[tuple[Side, Sum], Spectrum] = {}
        self._values: dict[Sum, Tensor] = {}
        self._slopes: dict[Sum, tuple[Tensor, int]] = {}
        self._curvatures: dict[Sum, tuple[Tensor, int]] = {}
        self._rows: dict[Sum, Tensor] = {}
        self._lifted: dict[Sum, Tensor] = {}
        self._roots: dict[Side, PolarRoot] = {}
        self._grams: dict[tuple[Side, bool], Factored] = {}
        self._products: dict[Sum, tuple[Tensor, Tensor]] = {}
        self._residuals: dict[tuple[Side, Sum, bool], float] = {}
        self._facts: dict[tuple[Side, Sum], Factored] = {}
        self._quotients: dict[tuple[Side, Sum], Tensor] = {}

    @cached_property
    def _scaled_weight(self) -> tuple[Tensor, int]:
        return moderate(to_algebra(self._given.weight))

    @property
    def weight(self) -> Tensor:
        """W in float64, shape ``[groups, d_out, d_in]``, up to a power of two if out of range."""
        return self._scaled_weight[0]

    def slope(self, needs: Sum) -> tuple[Tensor, int]:
        """(S, e) with 2ᵉS = G/λ or U/λ (λ = 1 where it is 0 or unknown): −W at rest.

        S is in float64, shape ``[groups, d_out, d_in]``.
        """
        if needs not in self._slopes:
            slope, exponent = moderate(to_algebra(_present(self._given.sum(needs))))
            fraction, binary = math.frexp(self.weight_decay or 1.0)
            self._slopes[needs] = slope / (2 * fraction), exponent + 1 - binary
        return self._slopes[needs]

    def curvature(self, needs: Sum) -> Tensor:
        """K or E in float64, ``[groups, d_out, d_out]``, up to a power of two if out of range."""
        return self._scaled_curvature(needs)[0]

    def _scaled_curvature(self, needs: Sum) -> tuple[Tensor, int]:
        if needs not in self._curvatures:
            self._curvatures[needs] = moderate(to_algebra(_present(self._given.sum(needs))))
        return self._curvatures[needs]

    def curvature_rows(self, needs: Sum) -> Tensor | None:
        """R with RᵀR = K or E in float64, ``[groups, r, d_out]``, where its rows were kept."""
        if needs not in self._given.rows or self._scaled_curvature(needs)[1]:
            return None
        if needs not in self._rows:
            self._rows[needs] = to_algebra(self._given.rows[needs])
        return self._rows[needs]

    @cached_property
    def input_rows(self) -> tuple[Tensor, Frame | None]:
        """W, or rows with the same Gram matrix in coordinates of W's row space, and those."""
        if self._framed and self.weight.shape[1] < self.weight.shape[2]:
            return framed_rows(self.weight, self.weight_gram)
        return self.weight, None

    def gram(self, relation: Relation) -> Factored:
        """WᵀW (forward) or WWᵀ (backward), in the coordinates of the relation's prediction."""
        if relation.side == "forward" and not _is_plain_fact(relation):
            rows, frame = self.input_rows
            return self._gram("forward", rows, frame)
        return self._gram(relation.side, self._side_rows(relation.side), None)

    def prediction(self, relation: Relation, power: float | None) -> Factored:
        """The matrix that ``relation`` says the Gram matrix equals or is proportional to.

        With λ = 0 or unknown FACT stands for −WᵀG, whose direction is still defined.

        Raises:
            torch.linalg.LinAlgError: if an eigenproblem or SVD does not converge.
        """
        if relation.has_power:
            return self._power(relation, power)
        exponent = self.slope(relation.needs)[1] + self._scaled_weight[1]
        if _is_plain_fact(relation):
            fact = self._fact(relation.side, relation.needs)
            return replace(fact, exponent=exponent) if exponent else fact
        root = self._root(relation.side)
        frame = self.input_rows[1] if relation.side == "forward" else None
        lift = None if frame is None else Lift(root.mixing @ self.weight)
        return Factored(root.rows, root.rows, frame, exponent=exponent, lift=lift)

    def residual(self, relation: Relation) -> float:
        """‖prediction − gram‖_F / ‖gram‖_F with the true λ; NaN unless an equality with λ > 0.

        Not formed as ⟨A,A⟩ − 2⟨A,B⟩ + ⟨B,B⟩, whose floor is about 1e-8: for FACT
        the difference is Wᵀ(W + G/λ), formed as such where it is small; for the symmetrised forms
        both sides are small matrices in one orthonormal basis.
        """
        if not relation.is_equality or not self.weight_decay:
            return float("nan")
        key = (relation.side, relation.needs, _is_plain_fact(relation))
        if key not in self._residuals:
            self._residuals[key] = self._residual(relation)
        return self._residuals[key]

    def _residual(self, relation: Relation) -> float:
        if _is_plain_fact(relation):
            difference, exponent = self._difference(relation.side, relation.needs)
            ratio = float((difference / self._square(relation)).sqrt())
            return _times_power_of_two(ratio, exponent)
        root = self._root(relation.side)
        small = row_products(root.triangle)
        difference, exponent = _added(
            (root.root, self.slope(relation.needs)[1]), (-small, self._scaled_weight[1])
        )
        ratio = torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(small)
        return _times_power_of_two(float(ratio), exponent - self._scaled_weight[1])

    def r_squared(self, relation: Relation, power: float | None = None) -> float:
        """Share of the Gram matrix N that the prediction X explains.

        For an equality 1 − ‖X − N‖²/‖N − mean(N)‖² over the entries inside the blocks, with the
        true λ: 1 at equality, below 0 where the mean is the better prediction. For a
        proportionality the squared cosine, 1 − min_c ‖N − c·X‖²/‖N‖².

        Returns:
            R²; NaN for an equality without known λ > 0, for constant N, and where a side is zero.
        """
        if relation.has_power:
            values, quotients, norm = self.power_inputs(relation)
            if norm == 0 or not values.numel():
                return float("nan")
            raised = (values / values.max()).pow(1.0 if power is None else power)
            cosine = float((raised * quotients).sum() / (raised.norm() * norm))
            return min(1.0, cosine**2)
        gram = self.gram(relation)
        entries, square = gram.groups * gram.size**2, float(self._square(relation))
        variance = square - float(replace(gram, exponent=0).total()) ** 2 / entries
        if variance <= 1e-13 * square:
            return float("nan")
        return 1 - self.residual(relation) ** 2 * (square / variance)

    def power_inputs(self, relation: Relation) -> tuple[Tensor, Tensor, float]:
        """What the cosine of the Gram matrix N with AGOPˢ, eNFAˢ, Kˢ or Eˢ is made of, at any s.

        cos = Σ_j a_jˢ q_j/(‖N‖ √Σ_j a_j^{2s}): a the kept eigenvalues, v_j their eigenvectors,
        q_j = v_jᵀNv_j, all blocks in one vector each. Where entries of W or K are beyond 2^±64, a
        and (q, ‖N‖) are each given up to a factor, which the cosine does not see.

        Returns:
            (a, q, ‖N‖_F), a and q of shape ``[kept]``.
        """
        spectrum = self.spectrum(relation)
        kept = spectrum.values > 0
        norm = float(self._square(relation).sqrt())
        return spectrum.values[kept], self._quotients_of(relation)[kept], norm

    def inner(self, relation: Relation, power: float | None) -> Tensor | None:
        """⟨N, X⟩ of the factors of both sides, without their exponents; None if not known."""
        if not relation.has_power:
            return None
        weights = self.spectrum(relation).weights(*self._power_and_exponent(relation, power))[0]
        return (weights * self._quotients_of(relation)).sum()

    def _quotients_of(self, relation: Relation) -> Tensor:
        """vᵀNv of every eigenvector of AGOP, eNFA, K or E, ``[groups, r]``."""
        key = (relation.side, relation.needs)
        if key not in self._quotients:
            rows = self.input_rows[0]
            seen = rows.mT if relation.side == "forward" else rows
            vectors = self.spectrum(relation).vectors
            self._quotients[key] = (vectors @ seen).square().sum(-1)
        return self._quotients[key]

    def stationarity(self, needs: Sum = "gradient") -> float:
        """‖λW + G‖_F / ‖λW‖_F, or U for G: 0 at rest; NaN if λ = 0 or it was not measured."""
        if not self.weight_decay or self._given.sum(needs) is None:
            return float("nan")
        own, other = self._scaled_weight[1], self.slope(needs)[1]
        if self._has_products(needs) and own == other == 0:
            cross, square = (_trace(product) for product in self._slope_products(needs))
            weight = _trace(_present(self.weight_gram))
            gap = weight + 2 * cross + square  # ‖W + G/λ‖²
            if gap > _CANCELLED**2 * weight:
                return math.sqrt(gap / weight)
        difference, exponent = self._gap(needs)
        return _times_power_of_two(float(difference.norm() / self.weight.norm()), exponent)

    def _has_products(self, needs: Sum) -> bool:
        return needs in self._products and self.weight_gram is not None

    def decay_ratio(self, needs: Sum = "gradient") -> float:
        """λ̂/λ = −⟨W, G⟩/(λ‖W‖²) = tr FACT / tr WᵀW, or U for G; NaN if λ = 0."""
        if not self.weight_decay or self._given.sum(needs) is None:
            return float("nan")
        slope, exponent = self.slope(needs)
        if self._has_products(needs):
            cross, square = _trace(self._products[needs][0]), _trace(_present(self.weight_gram))
        else:
            cross = float((self.weight * slope).sum())
            square = float(torch.linalg.vector_norm(self.weight).square())
        ratio = -cross / square
        return _times_power_of_two(ratio, exponent - self._scaled_weight[1])

    def spectrum(self, relation: Relation) -> Spectrum:
        """Clamped eigenpairs of AGOP or eNFA (forward), K or E (backward), shared by all powers.

        The eigenvalues are those of the scaled matrices.
        """
        key = (relation.side, relation.needs)
        if relation.side == "backward":
            return self.curvature_spectrum(relation.needs)
        if key not in self._spectra:
            self._spectra[key] = self._input_spectrum(relation.needs)
        return self._spectra[key]

    def _input_spectrum(self, needs: Sum) -> Spectrum:
        (weight, frame), tolerance = self.input_rows, self._given.tolerance
        if weight.shape[1] > weight.shape[2] and self.curvature_rows(needs) is None:
            # WᵀKW is the smaller problem
            return symmetric_spectrum(weight.mT @ self.curvature(needs) @ weight, tolerance)
        root = self.curvature_spectrum(needs).rows(1.0)
        spectrum = gram_spectrum(root @ weight, tolerance)
        if frame is not None and spectrum.mixing is not None:
            self._lifted[needs] = spectrum.mixing @ root @ self.weight
        return spectrum

    def curvature_spectrum(self, needs: Sum) -> Spectrum:
        """Clamped eigenpairs of K or E."""
        key: tuple[Side, Sum] = ("backward", needs)
        if key not in self._spectra:
            rows, tolerance = self.curvature_rows(needs), self._given.tolerance
            self._spectra[key] = (
                symmetric_spectrum(self.curvature(needs), tolerance)
                if rows is None
                else gram_spectrum(rows, tolerance)
            )
        return self._spectra[key]

    def curvature_values(self, needs: Sum) -> Tensor:
        """Clamped eigenvalues of K or E, largest first, ``[groups, r]``."""
        if ("backward", needs) in self._spectra:
            return self._spectra["backward", needs].values
        if needs not in self._values:
            rows = self.curvature_rows(needs)
            small = self.curvature(needs) if rows is None else rows @ rows.mT
            self._values[needs] = symmetric_values(small, self._given.tolerance)
        return self._values[needs]

    def curvature_to_turn(self, needs: Sum) -> Tensor:
        """What the level by chance needs of K or E: the matrix where W is tall, else eigenvalues.

        The eigenproblem of a tall layer is that of WᵀKW; one of K's size would be the larger.
        """
        _, width, columns = self.weight.shape
        if width <= max(columns, _SMALL) or self.curvature_rows(needs) is not None:
            return self.curvature_values(needs)
        return self.curvature(needs)

    def _power_and_exponent(self, relation: Relation, power: float | None) -> tuple[float, int]:
        """s, and e of AGOP, eNFA, K or E = 2ᵉX with X as it is scaled here."""
        exponent = self._scaled_curvature(relation.needs)[1]
        if relation.side == "forward":
            exponent += 2 * self._scaled_weight[1]
        return 1.0 if power is None else power, exponent

    def _power(self, relation: Relation, power: float | None) -> Factored:
        spectrum = self.spectrum(relation)
        power, exponent = self._power_and_exponent(relation, power)
        if relation.side == "backward":
            return spectrum.power(power, exponent=exponent)
        frame, lifted = self.input_rows[1], self._lifted.get(relation.needs)
        return spectrum.power(power, frame, exponent=exponent, lifted=lifted)

    def _gram(self, side: Side, rows: Tensor, frame: Frame | None) -> Factored:
        key = (side, frame is None)
        if key not in self._grams:
            exponent = 2 * self._scaled_weight[1]
            if side == "backward" and self.weight_gram is not None:
                thin = Factored.whole(self.weight_gram, symmetric=True)
                thin = replace(thin, exponent=exponent)
                self._grams[key] = thin
                return thin
            thin = Factored.gram(rows, frame, exponent).thin()
            lift = None if frame is None else Lift(self.weight)
            known = None if frame is not None else self.weight_gram
            gram = thin.left @ thin.left.mT if known is None else known
            self._grams[key] = replace(thin, left_gram=gram, lift=lift)
        return self._grams[key]

    def _square(self, relation: Relation) -> Tensor:
        """‖N‖² of the Gram matrix, in the units of W as it is scaled here."""
        gram = self.gram(relation)
        return replace(gram, exponent=0).squared_norm() if gram.exponent else gram.squared_norm()

    def _gap(self, needs: Sum) -> tuple[Tensor, int]:
        """W + G/λ, in units of W's own scale times 2^exponent."""
        gap, exponent = _added(self._scaled_weight, self.slope(needs))
        return gap, exponent - self._scaled_weight[1]

    def _side_rows(self, side: Side) -> Tensor:
        """Rows whose Gram matrix is the measured side: W for WᵀW, Wᵀ for WWᵀ."""
        return self.weight if side == "forward" else self.weight.mT

    def _with_gradient(self, side: Side, matrix: Tensor) -> Factored:
        """WᵀM (forward) or W Mᵀ (backward) for a matrix M of the weight's shape."""
        if side == "backward" and self.weight_gram is not None:
            return Factored.whole(self.weight @ matrix.mT)
        rows = self._side_rows(side)
        product = Factored(rows, matrix if side == "forward" else matrix.mT)
        if rows.shape[1] > rows.shape[2]:
            return product.thin()
        gram = self._gram(side, rows, None)
        return replace(product, left=gram.left, left_gram=gram.left_gram)

    def _fact(self, side: Side, needs: Sum) -> Factored:
        """−WᵀS (forward) or −W Sᵀ (backward) for the slope S; both sides share the products."""
        if (side, needs) not in self._facts:
            self._facts[side, needs] = self._new_fact(side, self.slope(needs)[0], needs)
        return self._facts[side, needs]

    def _new_fact(self, side: Side, slope: Tensor, needs: Sum) -> Factored:
        if self.weight_gram is None:
            return self._with_gradient(side, -slope)
        cross, square = self._slope_products(needs)
        if side == "backward":
            return Factored.whole(-cross)
        gram = self._gram("forward", self.weight, None)
        return replace(gram, right=-slope, right_gram=square, cross=-cross, exponent=0, lift=None)

    def _difference(self, side: Side, needs: Sum) -> tuple[Tensor, int]:
        """(‖WᵀD‖², e) or (‖W Dᵀ‖², e) with D·2ᵉ = W + G/λ.

        From the products of W and G, good to 1e-10 of it, unless they all but cancel.
        """
        gram = self.weight_gram
        if gram is not None:
            exponents = self._scaled_weight[1], self.slope(needs)[1]
            top = max(exponents)
            own, other = (2.0 ** max(exponent - top, -1000) for exponent in exponents)
            squared, across, inside = self._slope_inners(side, needs)
            inside = own**2 * squared + 2 * own * other * across + other**2 * inside
            if float(inside) > (_CANCELLED * own) ** 2 * float(squared):
                return inside, top - self._scaled_weight[1]
        gap, exponent = self._gap(needs)
        return self._with_gradient(side, gap).squared_norm(), exponent

    def _slope_inners(self, side: Side, needs: Sum) -> tuple[Tensor, Tensor, Tensor]:
        """‖N‖², ⟨N, X⟩ and ‖X‖² of N = WᵀW and X = WᵀS, or WWᵀ and WSᵀ."""
        gram, fact = self._gram(side, self._side_rows(side), None), self._fact(side, needs)
        plain = replace(gram, exponent=0)
        return plain.squared_norm(), -plain.inner(fact), fact.squared_norm()

    def _slope_products(self, needs: Sum) -> tuple[Tensor, Tensor]:
        """W Sᵀ and S Sᵀ, ``[groups, d_out, d_out]``."""
        if needs not in self._products:
            slope = self.slope(needs)[0]
            self._products[needs] = self.weight @ slope.mT, row_products(slope)
        return self._products[needs]

    @cached_property
    def weight_gram(self) -> Tensor | None:
        """W Wᵀ ``[groups, d_out, d_out]`` where it is the smaller Gram matrix, else None."""
        if self.weight.shape[1] > self.weight.shape[2]:
            return None
        return row_products(self.weight)

    def _root(self, side: Side) -> PolarRoot:
        if side not in self._roots:
            rows = self.input_rows[0] if side == "forward" else self.weight.mT
            slope = self.slope("gradient")[0]
            right = slope if side == "forward" else slope.mT
            product = square = None
            if self.weight_gram is not None:  # the products of both sides
                cross, gram = self._slope_products("gradient")
                product, square = (cross, None) if side == "backward" else (None, gram)
            self._roots[side] = polar_root(rows, right, product=product, right_gram=square)
        return self._roots[side]


def _trace(blocks: Tensor) -> float:
    """The sum of the traces."""
    return float(blocks.diagonal(dim1=1, dim2=2).sum())


def _is_plain_fact(relation: Relation) -> bool:
    """Whether the prediction is FACT or bFACT itself, which W's row space does not hold."""
    return relation.name in ("fact", "bfact", "update_fact", "update_bfact")


def _added(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> tuple[Tensor, int]:
    """2ᵃX + 2ᵇY as (Z, e) with 2ᵉZ."""
    top = max(one[1], other[1])
    return scaled(one[0], one[1] - top) + scaled(other[0], other[1] - top), top


def _times_power_of_two(value: float, exponent: int) -> float:
    """value·2^exponent, infinite where that overflows."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def to_algebra(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on its device, or on the CPU where the device has no float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device=device, dtype=torch.float64)


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("this sum was not measured for the layer")
    return tensor
