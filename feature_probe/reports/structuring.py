"""From W and the sums to a layer's structural quantities: what to compute, and computing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.layers.targets import Target
from feature_probe.reports.coverage import Coverage
from feature_probe.reports.record import Record
from feature_probe.reports.scoring import OnFault, fault_status
from feature_probe.reports.structure import (
    LayerStructure,
    MatrixSpectrum,
    PowerSweep,
    ReferenceAgreement,
)
from feature_probe.theory.agreement import compare
from feature_probe.theory.factored import Factored
from feature_probe.theory.matrices import LayerMatrices
from feature_probe.theory.power import fitted_power, power_curve
from feature_probe.theory.relations import RELATIONS, LayerStatistics, parse_powers
from feature_probe.theory.structure import imbalance, spectrum_shape
from feature_probe.theory.subspaces import Subspace, leading_subspace, overlap, symmetric_blocks

#: 1/32 to 4, four to an octave: 1, 1/2 and 1/4 are among them.
DEFAULT_POWERS = tuple(2.0 ** (quarter / 4) for quarter in range(-20, 9))
#: The matrices whose spectra are taken: name, and whether its side is d_in.
_MATRICES = {"nfm": True, "agop": True, "ptk": False}
#: Eigenvalues of a reference up to this, in units of its largest, do not count in its rank.
_RANK_TOLERANCE = 1e-6
_NFA = RELATIONS["nfa"]


@dataclass(frozen=True, eq=False)
class Structure:
    """What ``FeatureProbe(structure=...)`` and ``measure(structure=...)`` shall find out.

    ``structure=True`` stands for ``Structure()``.

    Attributes:
        powers: The s at which C(s) is given, for every asked relation that has a power.
        eigenvalues: How many of each spectrum are kept.
        references: By layer name a matrix that WᵀW and AGOP are compared with, such as
            :func:`feature_probe.egop` of the target function for the first layer: symmetric,
            ``[d_in, d_in]``, or ``[groups, d_in, d_in]`` for a grouped layer.
        rank: Dimension of the leading eigenspaces compared, one number or by layer name; None: the
            rank of the reference, its eigenvalues above 10⁻⁶ of the largest.
        depths: L − l + 1 by layer name, for networks that are no chain all through, or that end in
            something that shall not count: 1 for the last layer. None: as found in the first pass.

    Raises:
        ConfigurationError: for a bad argument; what concerns the model's layers is checked by
            whoever is given this.
    """

    powers: Sequence[float] = DEFAULT_POWERS
    eigenvalues: int = 64
    references: Mapping[str, Any] = field(default_factory=dict)
    rank: int | Mapping[str, int] | None = None
    depths: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "powers", tuple(sorted(parse_powers(self.powers))))
        positive_integer("eigenvalues", self.eigenvalues)
        if not isinstance(self.references, Mapping):
            raise ConfigurationError(
                f"references must map layer names to matrices, got {type(self.references).__name__}"
            )
        if not self.references and self.rank is not None:
            raise ConfigurationError("rank is that of references, and there are none")
        ranks = (
            self.rank
            if isinstance(self.rank, Mapping)
            else {"": 1 if self.rank is None else self.rank}
        )
        for layer, rank in {**ranks, **(self.depths or {})}.items():
            positive_integer(f"the rank or depth of {layer!r}" if layer else "rank", rank)
        depths = list((self.depths or {}).values())
        if len(set(depths)) < len(depths):
            raise ConfigurationError(f"depths must all be different, got {depths}")


@dataclass(frozen=True)
class _Reference:
    """A reference matrix, decomposed once.

    Attributes:
        matrix: As thin factors.
        space: Its leading eigenspace.
        dimension: d over all blocks.
    """

    matrix: Factored
    space: Subspace
    dimension: int


@dataclass(frozen=True)
class Structuring:
    """Finds the structural quantities of every layer of a report.

    Attributes:
        asked: What to find out.
        references: The reference matrices by layer.
    """

    asked: Structure
    references: Mapping[str, _Reference]

    def layers(
        self,
        statistics: Mapping[str, LayerStatistics],
        records: Sequence[Record],
        depths: Mapping[str, int],
        coverage: Coverage,
        on_fault: OnFault,
    ) -> list[LayerStructure]:
        """The structure of every layer, in the order of ``statistics``.

        What cannot be computed is NaN with the reason. A failure costs the part that it happened
        in, and ``on_fault`` is told.

        Args:
            statistics: W and the normalised sums by layer.
            records: The layers' records, for why a relation has no score.
            depths: Where the layers are a chain: the number of each from the output.
            coverage: Which matrices are measured: between those that are not the layers are none.
            on_fault: Called with what failed and where; may raise it.
        """
        unseen = [entry.parameter for entry in coverage.gaps() if entry.layer is None]
        given = self.asked.depths
        numbers = given if given is not None else {} if unseen else depths
        reason = "the layers are no chain"
        if unseen and depths and given is None:
            reason = f"not all matrices between the layers are measured: {unseen[0]}"
        successors = {depth: layer for layer, depth in numbers.items()}
        found = []
        for layer, own in statistics.items():
            depth = numbers.get(layer)
            following = successors.get((depth or 1) - 1, "")
            guard = _Guard(f"structure of layer {layer!r}", on_fault)
            structure = LayerStructure(layer, depth, following)
            if following:
                balance = self._balance(structure, own, statistics[following], guard)
            elif depth is None:
                balance = replace(structure, balance_note=reason)
            else:
                balance = replace(structure, balance_note="the last layer")
            found.append(
                replace(
                    balance,
                    **self._matrices(
                        layer, own, [r for r in records if r.layer == layer], depth, guard
                    ),
                )
            )
        return found

    def _balance(
        self,
        structure: LayerStructure,
        own: LayerStatistics,
        following: LayerStatistics,
        guard: _Guard,
    ) -> LayerStructure:
        weight, after = own.weight, following.weight
        if len(weight) > 1 or len(after) > 1:
            return replace(structure, balance_note="grouped: blocks are not followed one by one")
        if weight.shape[1] != after.shape[2]:
            return replace(
                structure,
                balance_note=f"shapes do not fit: {weight.shape[1]} outputs, {after.shape[2]} "
                f"inputs of {structure.next_layer}",
            )
        found, reason = guard(lambda: imbalance(weight[0], after[0]))
        if found is None:
            return replace(structure, balance_note=reason)
        return replace(
            structure,
            imbalance=found.relative,
            imbalance_norm=found.norm,
            balance_note=found.reason,
        )

    def _matrices(
        self,
        layer: str,
        statistics: LayerStatistics,
        records: Sequence[Record],
        depth: int | None,
        guard: _Guard,
    ) -> dict[str, Any]:
        bases: dict[bool, LayerMatrices] = {}

        def matrices(init_centered: bool) -> LayerMatrices:
            if init_centered not in bases:
                basis = statistics.basis(init_centered)
                bases[init_centered] = LayerMatrices(basis, framed=False)
            return bases[init_centered]

        first: dict[str, Record] = {}
        for record in records:
            if record.power is not None:
                first.setdefault(record.relation, record)
        return {
            "sweeps": tuple(
                self._sweep(record, matrices, depth, guard) for record in first.values()
            ),
            "spectra": tuple(
                self._spectrum(matrix, statistics, matrices, guard) for matrix in _MATRICES
            ),
            "references": tuple(
                self._agreement(matrix, self.references[layer], statistics, matrices, guard)
                for matrix in ("nfm", "agop")
                if layer in self.references
            ),
        }

    def _sweep(
        self,
        record: Record,
        matrices: Callable[[bool], LayerMatrices],
        depth: int | None,
        guard: _Guard,
    ) -> PowerSweep:
        relation, powers = RELATIONS[record.relation], tuple(self.asked.powers)
        blank = PowerSweep(relation.name, powers, (math.nan,) * len(powers))
        if math.isnan(record.cosine):
            return replace(blank, status=record.status)

        def curve() -> PowerSweep:
            inputs = matrices(relation.init_centered).power_inputs(relation)
            best = fitted_power(*inputs)
            chance = "" if math.isfinite(record.fitted_power) else "within chance"
            return replace(
                blank,
                cosines=tuple(power_curve(*inputs, powers)),
                best_power=best.power,
                best_cosine=best.cosine,
                depth_product=math.nan if depth is None else best.power * depth,
                status=best.reason or chance or "ok",
            )

        found, reason = guard(curve)
        return found or replace(blank, status=reason)

    def _spectrum(
        self,
        matrix: str,
        statistics: LayerStatistics,
        matrices: Callable[[bool], LayerMatrices],
        guard: _Guard,
    ) -> MatrixSpectrum:
        groups, d_out, d_in = statistics.weight.shape
        blank = MatrixSpectrum(matrix, groups * (d_in if _MATRICES[matrix] else d_out), ())
        if reason := _missing(matrix, statistics):
            return replace(blank, status=reason)

        def values() -> Tensor:
            if matrix == "nfm":
                singular: Tensor = torch.linalg.svdvals(matrices(False).weight)
                return singular.square()
            if matrix == "agop":
                return matrices(False).spectrum(_NFA).values
            return matrices(False).curvature_values("jacobian")

        shape, reason = guard(lambda: spectrum_shape(values(), blank.size, self.asked.eigenvalues))
        if shape is None:
            return replace(blank, status=reason)
        return replace(
            blank,
            decay=shape.decay,
            effective_rank=shape.effective_rank,
            participation_ratio=shape.participation_ratio,
            stable_rank=shape.stable_rank,
            variation=shape.variation,
            status=shape.reason or "ok",
        )

    def _agreement(
        self,
        matrix: str,
        reference: _Reference,
        statistics: LayerStatistics,
        matrices: Callable[[bool], LayerMatrices],
        guard: _Guard,
    ) -> ReferenceAgreement:
        rank = reference.space.rank
        blank = ReferenceAgreement(matrix, rank, chance_overlap=rank / reference.dimension)
        if reason := _missing(matrix, statistics):
            return replace(blank, status=reason)
        found, reason = guard(lambda: _compared(matrix, matrices(False), reference, blank))
        return found or replace(blank, status=reason)


def _compared(
    matrix: str, matrices: LayerMatrices, reference: _Reference, blank: ReferenceAgreement
) -> ReferenceAgreement:
    if matrix == "nfm":
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


def _missing(matrix: str, statistics: LayerStatistics) -> str:
    """Why there is no such matrix; "" if there is."""
    if not bool(torch.isfinite(statistics.weight).all()):
        return "not finite: the weight holds NaN or infinity"
    if matrix == "nfm":
        return ""
    if statistics.jacobian is None:
        return statistics.missing.get("jacobian", "not measured")
    if not bool(torch.isfinite(statistics.jacobian).all()):
        return "not finite: the jacobian sum holds NaN or infinity"
    return ""


@dataclass(frozen=True)
class _Guard:
    """Runs a part; a failure of it is told and becomes the reason."""

    where: str
    on_fault: OnFault

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, str]:
        try:
            return work(), ""
        except Exception as error:  # one number's failure must not cost the others
            self.on_fault(error, f"finding the {self.where}")
            return None, fault_status(error)


def parse_structure(structure: bool | Structure, targets: Sequence[Target]) -> Structuring | None:
    """Check what was asked for against the layers there are; None if nothing was.

    Raises:
        ConfigurationError: for another type, and for layers that are not measured, a reference
            that is not symmetric or of another shape, or a rank that says nothing.
    """
    if structure is False:
        return None
    asked = Structure() if structure is True else structure
    if not isinstance(asked, Structure):
        raise ConfigurationError(
            f"structure must be True, False or a Structure(...), got {type(asked).__name__}"
        )
    known = {target.name: target for target in targets}
    ranks = asked.rank if isinstance(asked.rank, Mapping) else {}
    for what, names in (
        ("references", asked.references),
        ("rank", ranks),
        ("depths", asked.depths or {}),
    ):
        for name in names:
            if name not in known:
                raise ConfigurationError(
                    f"{what} names {name!r}, which is no measured layer: {', '.join(known)}"
                )
    for name in ranks:
        if name not in asked.references:
            raise ConfigurationError(f"rank names {name!r}, which has no reference")
    references = {
        name: _reference(
            known[name],
            matrix,
            ranks.get(name) if isinstance(asked.rank, Mapping) else asked.rank,
        )
        for name, matrix in asked.references.items()
    }
    return Structuring(asked, references)


def _reference(target: Target, given: Any, rank: int | None) -> _Reference:
    name = f"the reference of {target.name!r}"
    try:
        matrix = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{name} must be a matrix, got {given!r}") from error
    blocks = symmetric_blocks(matrix, name)
    wanted = (target.groups, target.d_in, target.d_in)
    if tuple(blocks.shape) != wanted:
        shown = list(wanted if target.groups > 1 else wanted[1:])
        raise ConfigurationError(f"{name} must be {shown}, got {list(matrix.shape)}")
    values, vectors = torch.linalg.eigh(blocks)
    rows, dimension = vectors.mT, target.groups * target.d_in
    top = float(values.abs().max())
    if top == 0 or float(values.max()) <= 0:
        raise ConfigurationError(f"{name} has no positive eigenvalue")
    if rank is None:
        rank = int((values > _RANK_TOLERANCE * top).sum())
        if rank == dimension:
            raise ConfigurationError(
                f"{name} has full rank, and whole spaces always overlap: give rank="
            )
    if rank >= dimension:
        raise ConfigurationError(
            f"rank {rank} of {name} must be below {dimension}: whole spaces always overlap"
        )
    space, reason = leading_subspace(values, rows, rank)
    if space is None:
        raise ConfigurationError(f"{name} has {reason}; give another rank=")
    # eigenvectors without weight do not count: an EGOP of low rank stays thin
    kept = (values.abs() > torch.finfo(values.dtype).eps * top).any(0)
    rows, values = rows[:, kept], values[:, kept]
    return _Reference(Factored(values[..., None] * rows, rows), space, dimension)
