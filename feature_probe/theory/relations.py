"""What each relation predicts for WᵀW or WWᵀ, as algebra on one layer's weight and sums.

Symbols (the FACT paper, arXiv:2507.05644, §2, §3 and App. B; code name: paper symbol, shape):

====================  ==========================  ==========================================
code name             paper                       shape
====================  ==========================  ==========================================
``weight``            W                           ``[groups, d_out, d_in]``
``gradient`` (G)      ∂L/∂W, no decay             ``[groups, d_out, d_in]``
``jacobian`` (K)      (1/n) Σ_i Σ_p J_ipᵀJ_ip     ``[groups, d_out, d_out]``
``loss`` (E)          (1/n) Σ_i Σ_p g_ip g_ipᵀ    ``[groups, d_out, d_out]``
``weight_decay`` (λ)  λ                           number
====================  ==========================  ==========================================

with z = W h the pre-activation without bias, J = ∂f/∂z, g = ∂ℓ/∂z, p the position (pixel, token,
call). Then FACT = −WᵀG/λ, AGOP = WᵀKW, eNFA = WᵀEW on the input side, bFACT = −WGᵀ/λ, bAGOP = K,
beNFA = E on the output side. Nothing here sees a Module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError
from feature_probe.theory.factored import (
    Factored,
    Frame,
    PolarRoot,
    Spectrum,
    framed_rows,
    gram_spectrum,
    polar_root,
    symmetric_spectrum,
    symmetric_values,
)

Side = Literal["forward", "backward"]
Sum = Literal["gradient", "jacobian", "loss"]


@dataclass(frozen=True)
class Relation:
    """One account of feature learning: which matrix it says the weight's Gram matrix agrees with.

    Attributes:
        name: Name in records and arguments.
        side: "forward" compares with WᵀW, "backward" with WWᵀ.
        needs: Which streaming sum it is computed from.
        is_equality: True: predicted to be equal, with the true λ. False: proportional.
        has_power: Whether the predicted matrix is raised to a power s.
        symbol: How the relation is written in tables.
        equation: The prediction in the paper's symbols.
        source: Place in the FACT paper, arXiv:2507.05644.
    """

    name: str
    side: Side
    needs: Sum
    is_equality: bool
    has_power: bool
    symbol: str
    equation: str
    source: str

    def label(self, power: float | None) -> str:
        """Short label for tables and charts, e.g. ``nfa^0.5``."""
        return self.name if power is None else f"{self.name}^{power:g}"


def _table(*rows: Relation) -> dict[str, Relation]:
    return {row.name: row for row in rows}


#: Every relation by name.
RELATIONS: Mapping[str, Relation] = _table(
    Relation("fact", "forward", "gradient", True, False, "FACT",
             "WᵀW = −(1/λn) Σ (∇_h ℓ_i) h_iᵀ = −WᵀG/λ", "Thm 3.1"),
    Relation("fact_sym", "forward", "gradient", True, False, "√(FACT·FACTᵀ)",
             "WᵀW = √(FACT·FACTᵀ)", "Remark 3.2"),
    Relation("bfact", "backward", "gradient", True, False, "bFACT",
             "WWᵀ = −(1/λn) Σ (W h_i)(∇_{Wh} ℓ_i)ᵀ = −WGᵀ/λ", "Thm B.1"),
    Relation("bfact_sym", "backward", "gradient", True, False, "√(bFACT·bFACTᵀ)",
             "WWᵀ = √(bFACT·bFACTᵀ)", "App. B"),
    Relation("nfa", "forward", "jacobian", False, True, "NFA",
             "WᵀW ∝ AGOPˢ, AGOP = (1/n) Σ (∇_h f_i)(∇_h f_i)ᵀ = WᵀKW", "§2"),
    Relation("enfa", "forward", "loss", False, True, "eNFA",
             "WᵀW ∝ eNFAˢ, eNFA = (1/n) Σ (∇_h ℓ_i)(∇_h ℓ_i)ᵀ = WᵀEW", "§2"),
    Relation("bnfa", "backward", "jacobian", False, True, "bNFA",
             "WWᵀ ∝ bAGOPˢ, bAGOP = (1/n) Σ (∇_{Wh} f_i)(∇_{Wh} f_i)ᵀ = K", "App. B"),
    Relation("benfa", "backward", "loss", False, True, "beNFA",
             "WWᵀ ∝ beNFAˢ, beNFA = (1/n) Σ (∇_{Wh} ℓ_i)(∇_{Wh} ℓ_i)ᵀ = E", "App. B"),
)  # fmt: skip

#: The measured side of each comparison by name, with a relation of that side.
GRAM_MATRICES: Mapping[str, Relation] = {"nfm": RELATIONS["fact"], "bnfm": RELATIONS["bfact"]}


def parse_relations(names: Iterable[str] | str) -> tuple[Relation, ...]:
    """Look relations up by name, in the order given, each once.

    Raises:
        ConfigurationError: for an unknown name or an empty selection.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in RELATIONS]
    if unknown:
        raise ConfigurationError(
            f"unknown relation {unknown[0]!r}; choose from {', '.join(RELATIONS)}"
        )
    if not wanted:
        raise ConfigurationError(f"no relation given; choose from {', '.join(RELATIONS)}")
    return tuple(RELATIONS[name] for name in dict.fromkeys(wanted))


def parse_powers(powers: Iterable[float] | float) -> tuple[float, ...]:
    """Check the powers s of (AGOP)ˢ: finite and positive, each once.

    Raises:
        ConfigurationError: for a power that is not a positive finite number, or none at all.
    """
    listed = [powers] if isinstance(powers, (int, float)) else list(powers)
    for power in listed:
        if isinstance(power, bool) or not isinstance(power, (int, float)):
            raise ConfigurationError(f"powers must be numbers, got {power!r}")
        if not 0 < power < float("inf"):
            raise ConfigurationError(f"powers must be positive and finite, got {power!r}")
    if not listed:
        raise ConfigurationError("powers is empty: give at least one, e.g. powers=(0.5, 1.0)")
    return tuple(dict.fromkeys(float(power) for power in listed))


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's weight and normalised sums: everything a score is computed from.

    Attributes:
        weight: W, shape ``[groups, d_out, d_in]``.
        gradient: G, the gradient of the loss the optimizer minimises, without decay, or None.
        jacobian: K, mean over examples and sum over positions, or None.
        loss: E, mean over examples and sum over positions, or None.
        weight_decay: λ ≥ 0, or None where it is not known.
        tolerance: Relative eigenvalue clamp τ = 10·eps of the sums' dtype.
        missing: Why a sum is None, by the sum's name.
    """

    weight: Tensor
    gradient: Tensor | None
    jacobian: Tensor | None
    loss: Tensor | None
    weight_decay: float | None
    tolerance: float
    missing: Mapping[Sum, str] = field(default_factory=dict)

    def sum(self, needs: Sum) -> Tensor | None:
        """One of the sums by name, or None."""
        return {"gradient": self.gradient, "jacobian": self.jacobian, "loss": self.loss}[needs]


def clamp_tolerance(sum_dtype: torch.dtype) -> float:
    """τ = 10·eps of the dtype the sums were held in, whatever the algebra runs in."""
    return 10 * torch.finfo(sum_dtype).eps


class LayerMatrices:
    """The matrices of one layer in float64, each computed once and shared by powers and scores.

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
        self._roots: dict[Side, PolarRoot] = {}
        self._grams: dict[tuple[Side, bool], Factored] = {}

    @cached_property
    def weight(self) -> Tensor:
        """W in float64, shape ``[groups, d_out, d_in]``."""
        return to_algebra(self._given.weight)

    @cached_property
    def gradient(self) -> Tensor:
        """G in float64."""
        return to_algebra(_present(self._given.gradient))

    def curvature(self, needs: Sum) -> Tensor:
        """K or E in float64, shape ``[groups, d_out, d_out]``."""
        return to_algebra(_present(self._given.sum(needs)))

    @cached_property
    def input_rows(self) -> tuple[Tensor, Frame | None]:
        """W, or rows with the same Gram matrix in coordinates of W's row space, and those."""
        if self._framed and self.weight.shape[1] < self.weight.shape[2]:
            return framed_rows(self.weight)
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
        if _is_plain_fact(relation):
            scaled = -self.gradient / (self.weight_decay or 1.0)
            return self._with_gradient(relation.side, scaled)
        frame = self.input_rows[1] if relation.side == "forward" else None
        if relation.is_equality:
            return Factored.gram(self._root(relation.side).rows, frame)
        return self.spectrum(relation).power(1.0 if power is None else power, frame)

    def residual(self, relation: Relation) -> float:
        """‖prediction − gram‖_F / ‖gram‖_F with the true λ; NaN unless an equality with λ > 0.

        Never formed as ⟨A,A⟩ − 2⟨A,B⟩ + ⟨B,B⟩, whose floor is about 1e-8: for FACT
        the difference is Wᵀ(W + G/λ); for the symmetrised forms both sides are small matrices in
        one orthonormal basis.
        """
        if not relation.is_equality or not self.weight_decay:
            return float("nan")
        if _is_plain_fact(relation):
            gap = self._with_gradient(
                relation.side, self.weight + self.gradient / self.weight_decay
            )
            return float((gap.squared_norm() / self.gram(relation).squared_norm()).sqrt())
        root = self._root(relation.side)
        gram = root.triangle @ root.triangle.mT
        return float(torch.linalg.vector_norm(root.root - gram) / torch.linalg.vector_norm(gram))

    def stationarity(self) -> float:
        """‖λW + G‖_F / ‖λW‖_F: 0 at a stationary point of the decayed loss; NaN if λ = 0."""
        if not self.weight_decay or self._given.gradient is None:
            return float("nan")
        gap = self.weight + self.gradient / self.weight_decay
        return float(gap.norm() / self.weight.norm())

    def decay_ratio(self) -> float:
        """λ̂/λ = −⟨W, G⟩/(λ‖W‖²) = tr FACT / tr WᵀW: 1 where decay is balanced; NaN if λ = 0."""
        if not self.weight_decay or self._given.gradient is None:
            return float("nan")
        alignment = -(self.weight * self.gradient).sum()
        return float(alignment / (self.weight_decay * self.weight.square().sum()))

    def spectrum(self, relation: Relation) -> Spectrum:
        """Clamped eigenpairs of AGOP or eNFA (forward), K or E (backward), shared by all powers."""
        key = (relation.side, relation.needs)
        if relation.side == "backward":
            return self.curvature_spectrum(relation.needs)
        if key not in self._spectra:
            self._spectra[key] = self._input_spectrum(relation.needs)
        return self._spectra[key]

    def _input_spectrum(self, needs: Sum) -> Spectrum:
        weight, tolerance = self.input_rows[0], self._given.tolerance
        if weight.shape[1] > weight.shape[2]:  # more rows than columns: WᵀKW is the smaller problem
            return symmetric_spectrum(weight.mT @ self.curvature(needs) @ weight, tolerance)
        return gram_spectrum(self.curvature_spectrum(needs).rows(1.0) @ weight, tolerance)

    def curvature_spectrum(self, needs: Sum) -> Spectrum:
        """Clamped eigenpairs of K or E."""
        key: tuple[Side, Sum] = ("backward", needs)
        if key not in self._spectra:
            self._spectra[key] = symmetric_spectrum(self.curvature(needs), self._given.tolerance)
        return self._spectra[key]

    def curvature_values(self, needs: Sum) -> Tensor:
        """Clamped eigenvalues of K or E, largest first, ``[groups, r]``."""
        if ("backward", needs) in self._spectra:
            return self._spectra["backward", needs].values
        if needs not in self._values:
            self._values[needs] = symmetric_values(self.curvature(needs), self._given.tolerance)
        return self._values[needs]

    def _gram(self, side: Side, rows: Tensor, frame: Frame | None) -> Factored:
        key = (side, frame is None)
        if key not in self._grams:
            thin = Factored.gram(rows, frame).thin()
            self._grams[key] = replace(thin, left_gram=thin.left @ thin.left.mT)
        return self._grams[key]

    def _side_rows(self, side: Side) -> Tensor:
        """Rows whose Gram matrix is the measured side: W for WᵀW, Wᵀ for WWᵀ."""
        return self.weight if side == "forward" else self.weight.mT

    def _with_gradient(self, side: Side, matrix: Tensor) -> Factored:
        """WᵀM (forward) or W Mᵀ (backward) for a matrix M of the weight's shape."""
        rows = self._side_rows(side)
        product = Factored(rows, matrix if side == "forward" else matrix.mT)
        if rows.shape[1] > rows.shape[2]:
            return product.thin()
        return replace(product, left_gram=self._gram(side, rows, None).left_gram)

    def _root(self, side: Side) -> PolarRoot:
        if side not in self._roots:
            rows = self.input_rows[0] if side == "forward" else self.weight.mT
            scaled = self.gradient / (self.weight_decay or 1.0)
            self._roots[side] = polar_root(rows, scaled if side == "forward" else scaled.mT)
        return self._roots[side]


def _is_plain_fact(relation: Relation) -> bool:
    """Whether the prediction is FACT or bFACT itself, which W's row space does not hold."""
    return relation.name in ("fact", "bfact")


def to_algebra(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on its device, or on the CPU where the device has no float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device=device, dtype=torch.float64)


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("this sum was not measured for the layer")
    return tensor
