"""From W and the sums to the structural quantities of every layer of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from feature_probe.layers.targets import Target
from feature_probe.reports.record import Record
from feature_probe.reports.scoring import OnFault, fault_status
from feature_probe.reports.structure import (
    LayerStructure,
    MatrixSpectrum,
    PowerSweep,
    ReferenceAgreement,
)
from feature_probe.reports.structure_settings import Reference, Structure, parse_structure
from feature_probe.theory.agreement import compare
from feature_probe.theory.factored import Factored
from feature_probe.theory.matrices import LayerMatrices
from feature_probe.theory.power import fitted_power, power_curve
from feature_probe.theory.relations import RELATIONS, LayerStatistics, Relation
from feature_probe.theory.structure import imbalance, spectrum_shape
from feature_probe.theory.subspaces import leading_subspace, overlap
from feature_probe.theory.threads import calm

#: The matrices whose spectra are taken: name, and whether its side is d_in.
_MATRICES = {"nfm": True, "agop": True, "ptk": False}
_NFA = RELATIONS["nfa"]
_NO_NEXT = "the next layer is not among depths="
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Structuring:
    """Finds the structural quantities of every layer of a report.

    Attributes:
        asked: What to find out.
        references: The reference matrices by layer.
    """

    asked: Structure
    references: Mapping[str, Reference]

    @staticmethod
    def of(structure: bool | Structure, targets: Sequence[Target]) -> Structuring | None:
        """What finds what is asked for; None if nothing is.

        Raises:
            ConfigurationError: as :func:`parse_structure`.
        """
        parsed = parse_structure(structure, targets)
        return None if parsed is None else Structuring(*parsed)

    def layers(
        self,
        statistics: Mapping[str, LayerStatistics],
        records: Sequence[Record],
        depths: Mapping[str, int],
        unseen: Sequence[str],
        on_fault: OnFault,
    ) -> list[LayerStructure]:
        """The structure of every layer, in the order of ``statistics``.

        What cannot be computed is NaN with the reason. A failure costs the part that it happened
        in, and ``on_fault`` is told.

        Args:
            statistics: W and the normalised sums by layer.
            records: The layers' records, for why a relation has no score.
            depths: Where the layers are a chain: the number of each from the output.
            unseen: Matrices of which nothing is measured: one may lie between the layers.
            on_fault: Called with what failed and where; may raise it.
        """
        numbers, reason = self._depths(depths, unseen)
        successors = {depth: layer for layer, depth in numbers.items()}
        found = []
        for layer, own in statistics.items():
            depth = numbers.get(layer)
            parts = _Parts(
                layer, own, [r for r in records if r.layer == layer], self.asked, depth, on_fault
            )
            structure = LayerStructure(
                layer,
                depth,
                sweeps=tuple(parts.sweep(record) for record in parts.first_records()),
                spectra=tuple(parts.spectrum(matrix) for matrix in _MATRICES),
                references=tuple(
                    parts.agreement(matrix, self.references[layer])
                    for matrix in ("nfm", "agop")
                    if layer in self.references
                ),
            )
            following = successors.get(depth - 1) if depth is not None else None
            if following is not None:
                structure = parts.balance(structure, following, statistics[following].weight)
            else:
                note = reason if depth is None else "the last layer" if depth == 1 else _NO_NEXT
                structure = replace(structure, balance_note=note)
            found.append(structure)
        return found

    def _depths(
        self, depths: Mapping[str, int], unseen: Sequence[str]
    ) -> tuple[Mapping[str, int], str]:
        """L − l + 1 by layer, and why a layer has none."""
        if self.asked.depths is not None:
            return self.asked.depths, "not among depths="
        if depths and unseen:
            return {}, f"not all matrices between the layers are measured: {unseen[0]}"
        return depths, "the layers are no chain"


@dataclass(frozen=True)
class _Parts:
    """One layer's quantities, each by itself; they share decompositions.

    Attributes:
        layer: Name.
        statistics: W and the normalised sums.
        records: The layer's records.
        asked: What to find out.
        depth: L − l + 1, or None.
        on_fault: Called with what failed and where.
    """

    layer: str
    statistics: LayerStatistics
    records: Sequence[Record]
    asked: Structure
    depth: int | None
    on_fault: OnFault

    @cached_property
    def matrices(self) -> LayerMatrices:
        """Those of W itself, whose eigenvectors are wanted in ℝᵈ."""
        return LayerMatrices(self.statistics, framed=False)

    def _of(self, relation: Relation) -> LayerMatrices:
        if relation.basis == "weight":
            return self.matrices
        return LayerMatrices(self.statistics.based_on(relation.basis), framed=False)

    def first_records(self) -> list[Record]:
        """The first record of every relation that has a power."""
        first: dict[str, Record] = {}
        for record in self.records:
            if record.power is not None:
                first.setdefault(record.relation, record)
        return list(first.values())

    def sweep(self, record: Record) -> PowerSweep:
        """C(s) of a record's relation."""
        relation, powers = RELATIONS[record.relation], tuple(self.asked.powers)
        blank = PowerSweep(relation.name, powers, (math.nan,) * len(powers))
        if math.isnan(record.cosine):
            return replace(blank, status=record.status)

        def curve() -> PowerSweep:
            inputs = self._of(relation).power_inputs(relation)
            best = fitted_power(*inputs)
            chance = "" if math.isfinite(record.fitted_power) else "within chance"
            return replace(
                blank,
                cosines=tuple(power_curve(*inputs, powers)),
                best_power=best.power,
                best_cosine=best.cosine,
                depth_product=math.nan if self.depth is None else best.power * self.depth,
                status=best.reason or chance or "ok",
            )

        found, fault = self._guarded(curve)
        return found or replace(blank, status=fault)

    def spectrum(self, matrix: str) -> MatrixSpectrum:
        """The shape of the spectrum of one of ``_MATRICES``."""
        groups, d_out, d_in = self.statistics.weight.shape
        blank = MatrixSpectrum(matrix, groups * (d_in if _MATRICES[matrix] else d_out), ())
        if reason := self._missing(matrix):
            return replace(blank, status=reason)

        def taken() -> MatrixSpectrum:
            shape = spectrum_shape(self._eigenvalues(matrix), blank.size, self.asked.eigenvalues)
            return replace(
                blank,
                decay=shape.decay,
                effective_rank=shape.effective_rank,
                participation_ratio=shape.participation_ratio,
                stable_rank=shape.stable_rank,
                variation=shape.variation,
                status=shape.reason or "ok",
            )

        found, fault = self._guarded(taken)
        return found or replace(blank, status=fault)

    def _eigenvalues(self, matrix: str) -> Tensor:
        """Up to a factor."""
        if matrix == "nfm":
            with calm(self.matrices.weight):
                singular: Tensor = torch.linalg.svdvals(self.matrices.weight)
            return singular.square()
        if matrix == "agop":
            return self.matrices.spectrum(_NFA).values
        return self.matrices.curvature_values("jacobian")

    def agreement(self, matrix: str, reference: Reference) -> ReferenceAgreement:
        """How far "nfm" or "agop" agrees with a reference."""
        rank = reference.space.rank
        blank = ReferenceAgreement(matrix, rank, chance_overlap=rank / reference.dimension)
        if reason := self._missing(matrix):
            return replace(blank, status=reason)
        found, fault = self._guarded(lambda: _compared(self.matrices, reference, blank))
        return found or replace(blank, status=fault)

    def balance(self, structure: LayerStructure, name: str, after: Tensor) -> LayerStructure:
        """``structure`` with the imbalance of this layer and the one that follows it."""
        structure, weight = replace(structure, next_layer=name), self.statistics.weight
        if len(weight) > 1 or len(after) > 1:
            return replace(structure, balance_note="grouped: blocks are not followed one by one")
        if weight.shape[1] != after.shape[2]:
            outputs, inputs = weight.shape[1], after.shape[2]
            note = f"shapes do not fit: {outputs} outputs, {inputs} inputs of {name}"
            return replace(structure, balance_note=note)
        found, fault = self._guarded(lambda: imbalance(weight[0], after[0]))
        if found is None:
            return replace(structure, balance_note=fault)
        return replace(
            structure,
            imbalance=found.relative,
            imbalance_norm=found.norm,
            balance_note=found.reason,
        )

    def _missing(self, matrix: str) -> str:
        """Why there is no such matrix; "" if there is."""
        if not bool(torch.isfinite(self.statistics.weight).all()):
            return "not finite: the weight holds NaN or infinity"
        if matrix == "nfm":
            return ""
        if self.statistics.jacobian is None:
            return self.statistics.missing.get("jacobian", "not measured")
        if self.statistics.subspace is not None:
            return f"K was measured {self.statistics.subspace.note}"
        if not bool(torch.isfinite(self.statistics.jacobian).all()):
            return "not finite: the jacobian sum holds NaN or infinity"
        return ""

    def _guarded(self, work: Callable[[], _Result]) -> tuple[_Result | None, str]:
        """What ``work`` gives, or None and the fault."""
        try:
            return work(), ""
        except Exception as error:  # one number's failure must not cost the others
            self.on_fault(error, f"finding the structure of layer {self.layer!r}")
            return None, fault_status(error)


def _compared(
    matrices: LayerMatrices, reference: Reference, blank: ReferenceAgreement
) -> ReferenceAgreement:
    if blank.matrix == "nfm":
        with calm(matrices.weight):
            _, singular, vectors = torch.linalg.svd(matrices.weight, full_matrices=False)
        values, own = singular.square(), matrices.gram(_NFA)
    else:
        spectrum = matrices.spectrum(_NFA)
        values, vectors, own = spectrum.values, spectrum.vectors, matrices.prediction(_NFA, 1.0)
    space, reason = leading_subspace(values, vectors, blank.rank)
    device = vectors.device
    given = Factored(reference.matrix.left.to(device), reference.matrix.right.to(device))
    scores = compare(own, given)
    told = scores.reason if math.isnan(scores.cosine + scores.trace_free_cosine) else ""
    return replace(
        blank,
        cosine=scores.cosine,
        trace_free_cosine=scores.trace_free_cosine,
        chance_cosine=scores.chance_cosine,
        overlap=math.nan if space is None else overlap(space, reference.space),
        status="; ".join(filter(None, [told, reason])) or "ok",
    )
