"""What each relation predicts for WᵀW or WWᵀ, as algebra on one layer's weight and sums.

Symbols (the FACT paper, arXiv:2507.05644, §2, §3 and App. B; code name: paper symbol, shape):

====================  ==========================  ==========================================
code name             paper                       shape
====================  ==========================  ==========================================
``weight``            W                           ``[groups, d_out, d_in]``
``gradient`` (G)      ∂L/∂W, no decay             ``[groups, d_out, d_in]``
``jacobian`` (K)      (1/n) Σ_i Σ_p J_ipᵀJ_ip     ``[groups, d_out, d_out]``
``loss`` (E)          (1/n) Σ_i Σ_p g_ip g_ipᵀ    ``[groups, d_out, d_out]``
``update`` (U)        (W₊ − (1 − ηλ)W)/(−η)       ``[groups, d_out, d_in]``
``weight_decay`` (λ)  λ                           number
====================  ==========================  ==========================================

with z = W h the pre-activation without bias, J = ∂f/∂z, g = ∂ℓ/∂z, p the position (pixel, token,
call). Then FACT = −WᵀG/λ, AGOP = WᵀKW, eNFA = WᵀEW on the input side, bFACT = −WGᵀ/λ, bAGOP = K,
beNFA = E on the output side. Under decoupled weight decay (AdamW, Lion, Muon), W₊ = (1 − ηλ)W − ηU,
rest means U = −λW, and the optimizer's update U takes the place of G.

The relations of the C-NFA paper ("Gradient descent induces alignment between weights and the
pre-activation tangents for deep non-linear networks", Beaglehole, Mitliagkas and Agarwala) put
another matrix in the place of W on both sides, and K̄ = (1/n) Σ (J − J⁰)ᵀ(J − J⁰) in that of K,
J⁰ the Jacobian of the whole network as it was before training. Nothing here sees a Module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError
from feature_probe.theory.projection import Subspace

Side = Literal["forward", "backward"]
Sum = Literal["gradient", "update", "jacobian", "loss", "jacobian_change"]
#: What stands in the place of W: W itself, W − W₀, W₀, G, or the motion W_T − W_t of the window.
Basis = Literal["weight", "change", "initial", "gradient", "motion"]


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
        source: Place in the FACT paper, arXiv:2507.05644, or what takes its argument further.
        basis: What takes the place of W, on both sides.
    """

    name: str
    side: Side
    needs: Sum
    is_equality: bool
    has_power: bool
    symbol: str
    equation: str
    source: str
    basis: Basis = "weight"

    @property
    def sums(self) -> frozenset[Sum]:
        """Every streaming sum that it is computed from."""
        of_basis: dict[Basis, Sum] = {"gradient": "gradient"}
        return frozenset({self.needs, of_basis.get(self.basis, self.needs)})

    @property
    def needs_initial_weights(self) -> bool:
        """Whether it is computed from W₀."""
        return self.basis in ("change", "initial")

    @property
    def needs_initial_network(self) -> bool:
        """Whether it is computed from what the whole network was before training."""
        return self.needs == "jacobian_change"

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
    Relation("update_fact", "forward", "update", True, False, "update FACT",
             "WᵀW = −WᵀU/λ, W₊ = (1 − ηλ)W − ηU", "Thm 3.1 with the update for the gradient"),
    Relation("update_bfact", "backward", "update", True, False, "update bFACT",
             "WWᵀ = −WUᵀ/λ, W₊ = (1 − ηλ)W − ηU", "Thm B.1 with the update for the gradient"),
    Relation("nfa", "forward", "jacobian", False, True, "NFA",
             "WᵀW ∝ AGOPˢ, AGOP = (1/n) Σ (∇_h f_i)(∇_h f_i)ᵀ = WᵀKW", "§2"),
    Relation("enfa", "forward", "loss", False, True, "eNFA",
             "WᵀW ∝ eNFAˢ, eNFA = (1/n) Σ (∇_h ℓ_i)(∇_h ℓ_i)ᵀ = WᵀEW", "§2"),
    Relation("bnfa", "backward", "jacobian", False, True, "bNFA",
             "WWᵀ ∝ bAGOPˢ, bAGOP = (1/n) Σ (∇_{Wh} f_i)(∇_{Wh} f_i)ᵀ = K", "App. B"),
    Relation("benfa", "backward", "loss", False, True, "beNFA",
             "WWᵀ ∝ beNFAˢ, beNFA = (1/n) Σ (∇_{Wh} ℓ_i)(∇_{Wh} ℓ_i)ᵀ = E", "App. B"),
    Relation("init_centered_nfa", "forward", "jacobian", False, True, "C-NFA",
             "W_cᵀW_c ∝ (W_cᵀKW_c)ˢ, W_c = W − W₀", "C-NFA paper, §2.3", basis="change"),
    Relation("init_centered_enfa", "forward", "loss", False, True, "C-eNFA",
             "W_cᵀW_c ∝ (W_cᵀEW_c)ˢ, W_c = W − W₀",
             "C-NFA with the loss's gradients for the output's", basis="change"),
    Relation("double_centered_nfa", "forward", "jacobian_change", False, True, "double-centred NFA",
             "W_cᵀW_c ∝ (W_cᵀK̄W_c)ˢ, K̄ = (1/n) Σ (J − J⁰)ᵀ(J − J⁰)", "C-NFA paper, Ansatz 5",
             basis="change"),
    Relation("ptk_centered_nfa", "forward", "jacobian_change", False, True, "PTK-centred NFA",
             "W₀ᵀW₀ ∝ (W₀ᵀK̄W₀)ˢ, K̄ = (1/n) Σ (J − J⁰)ᵀ(J − J⁰)", "C-NFA paper, Ansatz 6",
             basis="initial"),
    Relation("alignment_speed", "forward", "jacobian", False, True, "alignment speed",
             "GᵀG ∝ (GᵀKG)ˢ: to second order in time what W_cᵀW_c and W_cᵀKW_c grow by",
             "C-NFA paper, Prop. 3 and Eq. 3", basis="gradient"),
    Relation("update_alignment_speed", "forward", "jacobian", False, True,
             "alignment speed of the updates", "ΔWᵀΔW ∝ (ΔWᵀKΔW)ˢ, ΔW the window's motion",
             "C-NFA paper, Prop. 3, with the optimizer's motion for −G", basis="motion"),
)  # fmt: skip

#: The measured side of each comparison by name, with a relation of that side.
GRAM_MATRICES: Mapping[str, Relation] = {
    "nfm": RELATIONS["fact"],
    "bnfm": RELATIONS["bfact"],
    "init_centered_nfm": RELATIONS["init_centered_nfa"],
    "initial_nfm": RELATIONS["ptk_centered_nfa"],
}


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
        update: U, the mean update of the window under decoupled decay, or None.
        jacobian_change: K̄, mean over examples and sum over positions, or None.
        bases: What else may take the place of W, where it was asked for and is known: W − W₀, W₀
            and the window's motion, each ``[groups, d_out, d_in]``.
        no_basis: Why one of them is not there.
        rows: R with RᵀR the sum K, E or K̄, ``[groups, r, d_out]`` with r < d_out, by the sum's
            name: where the rows behind it were kept, its eigenproblem has their number.
        subspace: What K, E and K̄ were measured in, where not in all of ℝ^d_out.
    """

    weight: Tensor
    gradient: Tensor | None
    jacobian: Tensor | None
    loss: Tensor | None
    weight_decay: float | None
    tolerance: float
    missing: Mapping[Sum, str] = field(default_factory=dict)
    update: Tensor | None = None
    jacobian_change: Tensor | None = None
    bases: Mapping[Basis, Tensor] = field(default_factory=dict)
    no_basis: Mapping[Basis, str] = field(default_factory=dict)
    rows: Mapping[Sum, Tensor] = field(default_factory=dict)
    subspace: Subspace | None = None

    def seen_by(self, relation: Relation) -> LayerStatistics:
        """What a relation compares: with its basis in the place of W, and within the subspace.

        Raises:
            ValueError: if its basis is not known.
        """
        based = self.based_on(relation.basis)
        if self.subspace is None or not relation.has_power:
            return based
        return replace(
            based, weight=self.subspace.matrix(based.weight), gradient=None, update=None,
            bases={}, subspace=None,
        )  # fmt: skip

    def in_place_of_weight(self, basis: Basis) -> Tensor | None:
        """What takes the place of W, or None."""
        if basis == "weight":
            return self.weight
        return self.gradient if basis == "gradient" else self.bases.get(basis)

    def why_no(self, basis: Basis) -> str:
        """Why there is nothing to take the place of W."""
        if basis == "gradient":
            return self.missing.get("gradient", "not measured")
        return self.no_basis.get(basis, "not asked for")

    def based_on(self, basis: Basis) -> LayerStatistics:
        """These numbers, with another matrix in the place of W.

        Raises:
            ValueError: if it is not known.
        """
        matrix = self.in_place_of_weight(basis)
        if matrix is None:
            raise ValueError(self.why_no(basis))
        return self if basis == "weight" else replace(self, weight=matrix)

    def sum(self, needs: Sum) -> Tensor | None:
        """One of the sums by name, or None."""
        return {
            "gradient": self.gradient,
            "update": self.update,
            "jacobian": self.jacobian,
            "loss": self.loss,
            "jacobian_change": self.jacobian_change,
        }[needs]


def clamp_tolerance(sum_dtype: torch.dtype) -> float:
    """τ = 10·eps of the dtype the sums were held in, whatever the algebra runs in."""
    return 10 * torch.finfo(sum_dtype).eps
