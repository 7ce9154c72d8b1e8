"""Record: one relation's agreement with one layer's weight at one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from feature_probe.theory.relations import RELATIONS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: The fields that are numbers, NaN where undefined.
FLOATS = (
    "pearson",
    "cosine",
    "trace_free_cosine",
    "chance_cosine",
    "shared_weight_cosine",
    "residual",
    "scale",
    "weight_decay",
    "stationarity",
    "decay_ratio",
    "cosine_low",
    "cosine_high",
    "off_diagonal_pearson",
    "spearman",
    "r_squared",
    "chance_spread",
    "chance_arctanh_spread",
    "initial_cosine",
    "cosine_corrected",
    "fitted_power",
    "fitted_power_low",
    "fitted_power_high",
    "fitted_cosine",
    "depth_power",
    "depth_cosine",
)
_NAN = float("nan")
#: What a record's verdict may be. Of equalities: "holds", "approaching" (it comes nearer),
#: "not yet" (training has not had the time), "not applicable" (a premise is not given). Of
#: proportionalities: "aligned" (well above chance), "at chance", "below chance", "trivial" (true
#: whatever was learned). Of either: "cannot tell" (the data do not say), "undefined" (no number).
VERDICTS = (
    "holds",
    "approaching",
    "not yet",
    "aligned",
    "at chance",
    "below chance",
    "trivial",
    "not applicable",
    "cannot tell",
    "undefined",
)
#: The scores of a record that lie on the scale of an agreement, for tables and charts.
SCORES = ("pearson", "cosine", "trace_free_cosine")


@dataclass(frozen=True)
class Record:
    """One relation's agreement with one layer's weight at one step. Undefined numbers are NaN.

    Attributes:
        layer: Name as in ``model.named_modules()``.
        relation: Name in :data:`feature_probe.RELATIONS`.
        power: s of AGOPˢ, None where the relation has none.
        step: Optimizer steps taken before the weights that were measured.
        pearson: Pearson's r between the entries of the two matrices (inside blocks).
        cosine: Their cosine ⟨A, X⟩/(‖A‖‖X‖).
        trace_free_cosine: The cosine without the (tr/d)·I part of both.
        chance_cosine: Cosine expected under a random rotation of the basis.
        shared_weight_cosine: nfa and enfa: the cosine expected with the same W and random
            eigenvectors of K or E; "not aligned" must be judged against this one. Else NaN.
        residual: Equalities with λ > 0: ‖X − A‖_F/‖A‖_F with the true λ. Else NaN.
        scale: Proportionalities: c of the best least-squares fit A ≈ c·X. Else NaN.
        weight_decay: λ used; NaN where not known.
        stationarity: ‖λW + G‖_F/‖λW‖_F of the layer, the error behind every FACT; NaN if λ = 0.
        decay_ratio: λ̂/λ = −⟨W,G⟩/(λ‖W‖²) of the layer, in the loop −Σ⟨W_t,G_t⟩/(λΣ‖W_t‖²) over the
            window's steps; NaN if λ = 0, or where the steps cannot be followed (sharded).
        cosine_low: Lower end of a 90 % interval for the cosine, by a bias-corrected grouped
            jackknife; NaN unless asked for (``measure(jackknife=8)``).
        cosine_high: Upper end, likewise.
        premise: Why the relation may not be expected to hold here, in words; "" if nothing known.
        n_examples: Examples behind the sums.
        n_rows: Examples × positions × calls behind the sums.
        n_kept: Eigenvalues above the clamp, where there is an eigenproblem, else None.
        status: "ok", or why a number is missing.
        off_diagonal_pearson: Pearson's r over the entries off the diagonal (inside blocks).
        spearman: Spearman's rank correlation over the entries i ≤ j inside blocks; of a fixed
            sample of the columns where there are more than 199.
        r_squared: Equalities: 1 − ‖X − A‖²/‖A − mean A‖² with the true λ. Proportionalities: that
            of the best one, 1 − min_c ‖A − cX‖²/‖A‖².
        chance_spread: Standard deviation of the cosine by chance about ``level_by_chance``.
        chance_arctanh_spread: That of arctanh of the cosine, the scale on which spreads are
            counted; NaN where only chance_spread is known.
        initial_cosine: The cosine at step 0 of this run; NaN where it was not seen.
        cosine_corrected: The cosine less the jackknife's estimate of its bias, the interval's
            centre.
        fitted_power: ŝ, the power s of AGOPˢ with the highest cosine; NaN where there is none.
        fitted_power_low: Lower end of its interval: the jackknife's where asked for, else the
            least s with a cosine within 0.01 of the highest.
        fitted_power_high: Upper end, likewise.
        fitted_cosine: The cosine at ŝ; its square is the R² of the best proportionality.
        depth_power: 1/(L − l + 1), the power that deep linear networks come to in layer l of L;
            NaN where the layers are no chain.
        depth_cosine: The cosine at that power.
        form: Which form of FACT: "snapshot" (frozen weights, all the data), "window" (mean gradient
            of the window's steps) or "update" (the optimizer's mean update); "" for the others.
        verdict: One of :data:`VERDICTS`.
        because: Why, in words.
        interval_note: Why there is no interval, or what it does not claim; "" if nothing is to say.
    """

    layer: str
    relation: str
    power: float | None
    step: int
    pearson: float
    cosine: float
    trace_free_cosine: float
    chance_cosine: float
    shared_weight_cosine: float
    residual: float
    scale: float
    weight_decay: float
    stationarity: float
    decay_ratio: float
    cosine_low: float
    cosine_high: float
    premise: str
    n_examples: int
    n_rows: int
    n_kept: int | None
    status: str
    off_diagonal_pearson: float = _NAN
    spearman: float = _NAN
    r_squared: float = _NAN
    chance_spread: float = _NAN
    chance_arctanh_spread: float = _NAN
    initial_cosine: float = _NAN
    cosine_corrected: float = _NAN
    fitted_power: float = _NAN
    fitted_power_low: float = _NAN
    fitted_power_high: float = _NAN
    fitted_cosine: float = _NAN
    depth_power: float = _NAN
    depth_cosine: float = _NAN
    form: str = ""
    verdict: str = "cannot tell"
    because: str = ""
    interval_note: str = ""

    @property
    def label(self) -> str:
        """The relation and its power, e.g. ``nfa^0.5``."""
        return RELATIONS[self.relation].label(self.power)

    @property
    def level_by_chance(self) -> float:
        """The cosine to judge this one by: with random eigenvectors of K or E, else rotated."""
        shared = self.shared_weight_cosine
        return self.chance_cosine if math.isnan(shared) else shared

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None, so that it is valid JSON."""
        return plain_data(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The way back from :meth:`to_dict`; None becomes NaN again."""
        back: dict[str, Any] = dict(data)
        back |= {name: math.nan for name in FLOATS if back.get(name) is None}
        return cls(**back)


def plain_data(record: DataclassInstance) -> dict[str, Any]:
    """The fields of a record of numbers and words; what is not finite becomes None."""
    data = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in data.items()
    }
