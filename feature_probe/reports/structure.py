"""What is known of a layer's matrices beside their agreement: powers, ranks, balance, references.

Plain results, kept in a report where they were asked for (``structure=``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from feature_probe.errors import NotMeasuredError
from feature_probe.reports.record import plain_data

_NAN = float("nan")


@dataclass(frozen=True)
class PowerSweep:
    """C(s), the cosine of one relation's two matrices as a function of the power s.

    Attributes:
        relation: Name in :data:`feature_probe.RELATIONS`.
        powers: The s that were tried, rising.
        cosines: C(s) at each of them.
        best_power: argmax C over 0.02 ≤ s ≤ 4, not bound to ``powers``, whether above chance or
            not: the record's ``fitted_power`` is the same number where it is. NaN without a peak.
        best_cosine: C there.
        depth_product: best_power·(L − l + 1), s·L for the first layer: 1 in balanced deep linear
            networks. NaN where the layers are no chain.
        status: "ok", or why a number is missing, or that the peak is within chance.
    """

    relation: str
    powers: tuple[float, ...]
    cosines: tuple[float, ...]
    best_power: float = _NAN
    best_cosine: float = _NAN
    depth_product: float = _NAN
    status: str = "ok"


@dataclass(frozen=True)
class MatrixSpectrum:
    """How the eigenvalues of one of a layer's matrices fall off, over all blocks of a grouped one.

    They are the singular values of that matrix: of WᵀW the squares of the singular values of W.

    Attributes:
        matrix: "nfm" (WᵀW), "agop" (WᵀKW) or "ptk" (K).
        size: d, the side of the whole matrix: d_in·groups, or d_out·groups for K.
        decay: The largest eigenvalues in units of the largest. Of AGOP and K those count as 0
            that the clamp of relations drops: below 10 eps of the sums.
        effective_rank: exp of the entropy of λ/Σλ (Roy and Vetterli).
        participation_ratio: (tr X)²/tr X².
        stable_rank: tr X/λ_1.
        variation: Standard deviation of all ``size`` eigenvalues over their mean.
        status: "ok", or why there are none.
    """

    matrix: str
    size: int
    decay: tuple[float, ...]
    effective_rank: float = _NAN
    participation_ratio: float = _NAN
    stable_rank: float = _NAN
    variation: float = _NAN
    status: str = "ok"


@dataclass(frozen=True)
class ReferenceAgreement:
    """Agreement of one of a layer's matrices with a matrix that the user gave, as an EGOP.

    Attributes:
        matrix: "nfm" (WᵀW) or "agop" (WᵀKW).
        rank: r, the dimension of the leading eigenspaces that are compared.
        cosine: Cosine with the reference.
        trace_free_cosine: The same without the parts proportional to the identity.
        chance_cosine: The cosine expected after a random rotation of the basis.
        overlap: ‖U_AᵀU_B‖_F²/r of the leading eigenspaces.
        chance_overlap: r/d, that of a random subspace.
        status: "ok", or why a number is missing.
    """

    matrix: str
    rank: int
    cosine: float = _NAN
    trace_free_cosine: float = _NAN
    chance_cosine: float = _NAN
    overlap: float = _NAN
    chance_overlap: float = _NAN
    status: str = "ok"


_Part = TypeVar("_Part", PowerSweep, MatrixSpectrum, ReferenceAgreement)


@dataclass(frozen=True)
class LayerStructure:
    """One layer's structural quantities at one step. Numbers that are not known are NaN.

    Attributes:
        layer: Name.
        depth: L − l + 1, the layer's number from the output in a chain of layers; None elsewhere.
        next_layer: The layer that its output goes to, in a chain; "" for the last and elsewhere.
        imbalance: ‖W_l W_lᵀ − W_{l+1}ᵀ W_{l+1}‖_F/√(‖W_l W_lᵀ‖_F² + ‖W_{l+1}ᵀ W_{l+1}‖_F²): 0
            where the two are balanced, at most 1.
        imbalance_norm: The numerator.
        balance_note: Why they are missing; "" if they are not.
        sweeps: Per relation with a power, in the order asked.
        spectra: Of WᵀW, AGOP and K.
        references: Agreement of WᵀW and AGOP with the reference, where one was given.
    """

    layer: str
    depth: int | None = None
    next_layer: str = ""
    imbalance: float = _NAN
    imbalance_norm: float = _NAN
    balance_note: str = ""
    sweeps: Sequence[PowerSweep] = ()
    spectra: Sequence[MatrixSpectrum] = ()
    references: Sequence[ReferenceAgreement] = ()

    def sweep(self, relation: str) -> PowerSweep:
        """The sweep of a relation.

        Raises:
            NotMeasuredError: if there is none.
        """
        return self._found(self.sweeps, "relation", relation)

    def spectrum(self, matrix: str) -> MatrixSpectrum:
        """The spectrum of "nfm", "agop" or "ptk".

        Raises:
            NotMeasuredError: if there is none.
        """
        return self._found(self.spectra, "matrix", matrix)

    def reference(self, matrix: str) -> ReferenceAgreement:
        """The agreement of "nfm" or "agop" with this layer's reference.

        Raises:
            NotMeasuredError: if there is none.
        """
        return self._found(self.references, "matrix", matrix)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None, so that it is valid JSON."""
        parts = {
            name: [_plain_part(part) for part in getattr(self, name)]
            for name in ("sweeps", "spectra", "references")
        }
        return plain_data(self) | parts

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerStructure:
        """The way back from :meth:`to_dict`; None becomes NaN again."""
        back = _numbers_back(cls, data)
        back["sweeps"] = tuple(_part(PowerSweep, part) for part in data["sweeps"])
        back["spectra"] = tuple(_part(MatrixSpectrum, part) for part in data["spectra"])
        back["references"] = tuple(_part(ReferenceAgreement, part) for part in data["references"])
        return cls(**back)

    def _found(self, parts: Sequence[_Part], key: str, wanted: str) -> _Part:
        for part in parts:
            if getattr(part, key) == wanted:
                return part
        known = ", ".join(getattr(part, key) for part in parts) or "none"
        raise NotMeasuredError(f"layer {self.layer!r} has no {wanted!r} here; there are: {known}")


def _plain_part(part: PowerSweep | MatrixSpectrum | ReferenceAgreement) -> dict[str, Any]:
    return {
        name: [None if math.isnan(number) else number for number in value]
        if isinstance(value, tuple)
        else value
        for name, value in plain_data(part).items()
    }


def _part(kind: type[_Part], data: Mapping[str, Any]) -> _Part:
    back = {
        name: tuple(_NAN if number is None else number for number in value)
        if isinstance(value, (list, tuple))
        else value
        for name, value in data.items()
    }
    return kind(**_numbers_back(kind, back))


def _numbers_back(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``data`` with NaN for None in those that are numbers."""
    numbers = {entry.name for entry in fields(kind) if entry.type == "float"}
    return {
        name: _NAN if value is None and name in numbers else value for name, value in data.items()
    }
