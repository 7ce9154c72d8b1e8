"""Report: the scores of every layer at one step, as records, as a table, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from feature_probe.errors import ConfigurationError, NotMeasuredError
from feature_probe.reports.coverage import Coverage
from feature_probe.reports.diagnosis import Diagnosis
from feature_probe.reports.explanation import explain
from feature_probe.reports.phrases import (
    JUDGED_SCORES,
    STATE_WORDS,
    cell,
    column,
    level_legend,
    loss_notes,
    record_notes,
    ruled,
    verdict_legend,
)
from feature_probe.reports.record import FLOATS, Record
from feature_probe.reports.structure import LayerStructure
from feature_probe.theory.matrices import LayerMatrices
from feature_probe.theory.relations import GRAM_MATRICES, RELATIONS, LayerStatistics


@dataclass(frozen=True, eq=False)
class Report:
    """Every layer's agreement with every asked relation at one step.

    Attributes:
        step: Optimizer steps taken before the weights that were measured; 0 is initialisation.
        records: One :class:`Record` per layer, relation and power, layers in model order.
        coverage: Which matrix parameters of the model these records speak for.
        settings: How it was measured (source, jacobian, positions, window, loss reduction).
        diagnoses: One :class:`Diagnosis` per layer, in the same order.
        statistics: W and the normalised sums by layer, where they were kept, for :meth:`matrix`.
        structures: One :class:`LayerStructure` per layer, where they were asked for.
    """

    step: int
    records: list[Record]
    coverage: Coverage
    settings: Mapping[str, Any] = field(default_factory=dict)
    diagnoses: Sequence[Diagnosis] = ()
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict, repr=False)
    structures: Sequence[LayerStructure] = field(default=(), repr=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in model order."""
        return tuple(dict.fromkeys(record.layer for record in self.records))

    @property
    def labels(self) -> tuple[str, ...]:
        """The relations with their powers, in the order asked, e.g. ``("fact", "nfa^0.5")``."""
        return tuple(dict.fromkeys(record.label for record in self.records))

    def select(
        self,
        layer: str | None = None,
        relation: str | None = None,
        power: float | None = None,
    ) -> list[Record]:
        """The records that match every argument given."""
        return [
            record
            for record in self.records
            if (layer is None or record.layer == layer)
            and (relation is None or record.relation == relation)
            and (power is None or record.power == power)
        ]

    def record(self, layer: str, relation: str, power: float | None = None) -> Record:
        """The one record of a layer and a relation; ``power`` where several were measured.

        Raises:
            NotMeasuredError: if no record, or more than one, matches.
        """
        found = self.select(layer, relation, power)
        if len(found) == 1:
            return found[0]
        asked = f"layer {layer!r}, relation {relation!r}, power {power!r}"
        if found:
            powers = ", ".join(f"power={record.power}" for record in found)
            raise NotMeasuredError(f"several records match {asked}: give one of {powers}")
        raise NotMeasuredError(
            f"no record matches {asked}; layers: {', '.join(self.layers)}; "
            f"relations: {', '.join(self.labels)}"
        )

    def diagnosis(self, layer: str) -> Diagnosis:
        """What is known of a layer beside its scores.

        Raises:
            NotMeasuredError: if the report has none of it.
        """
        for diagnosis in self.diagnoses:
            if diagnosis.layer == layer:
                return diagnosis
        raise NotMeasuredError(f"no diagnosis of {layer!r}; layers: {', '.join(self.layers)}")

    def structure(self, layer: str) -> LayerStructure:
        """A layer's power sweeps, spectra, imbalance and agreement with references.

        Raises:
            NotMeasuredError: if the report has none of it: it is there with ``structure=True``.
        """
        for structure in self.structures:
            if structure.layer == layer:
                return structure
        known = ", ".join(found.layer for found in self.structures)
        asked = f"layers: {known}" if known else "ask for it with structure=True"
        raise NotMeasuredError(f"no structure of {layer!r}; {asked}")

    def matrix(self, layer: str, kind: str, power: float | None = None) -> Tensor:
        """A layer's matrix in full, float64: memory quadratic in its side.

        Args:
            layer: Layer name.
            kind: A relation's name (its prediction: FACT, AGOPˢ, ...), or "nfm" for WᵀW, "bnfm"
                for WWᵀ, "init_centered_nfm" for (W − W₀)ᵀ(W − W₀), "initial_nfm" for W₀ᵀW₀. The
                matrix K itself is the prediction of "bnfa".
            power: s, for relations that have one; 1 if not given.

        Returns:
            ``[d, d]``, or ``[groups, d, d]`` for a grouped layer; d is d_in for forward kinds and
            d_out for backward ones. Of a layer wider than ``max_dim`` those of K and E are what was
            measured in the subspace, backward ones of side ``max_dim``.

        Raises:
            ConfigurationError: for an unknown kind, or a power where the kind has none.
            NotMeasuredError: if the matrices or the sum behind this one were not kept.
        """
        if kind not in RELATIONS and kind not in GRAM_MATRICES:
            known = ", ".join([*GRAM_MATRICES, *RELATIONS])
            raise ConfigurationError(f"unknown matrix {kind!r}; choose from {known}")
        relation = RELATIONS.get(kind)
        if power is not None and (relation is None or not relation.has_power):
            raise ConfigurationError(f"{kind!r} has no power, got power={power!r}")
        if power is not None and not power > 0:
            raise ConfigurationError(f"power must be positive, got {power!r}")
        statistics = self._kept(layer)
        if relation is None:
            measured = GRAM_MATRICES[kind]
        else:
            measured = relation
            if statistics.sum(relation.needs) is None:
                reason = statistics.missing.get(relation.needs, "not asked for")
                raise NotMeasuredError(f"{kind!r} of layer {layer!r} was not measured: {reason}")
        if statistics.in_place_of_weight(measured.basis) is None:
            raise NotMeasuredError(
                f"{kind!r} of layer {layer!r} was not measured: {statistics.why_no(measured.basis)}"
            )
        seen = statistics.based_on(measured.basis)
        if relation is not None:
            seen = statistics.seen_by(relation)
        matrices = LayerMatrices(seen, framed=False)
        found = (
            matrices.gram(measured) if relation is None else matrices.prediction(relation, power)
        )
        dense = found.dense()
        return dense[0] if dense.shape[0] == 1 else dense

    def table(self, score: str = "cosine") -> str:
        """A text table, layers by relations, of one score.

        A cosine stands with its level by chance, a score of agreement with its verdict in a word
        (``str(report)`` says what the words mean), and behind them the layer's state where known.

        Raises:
            ConfigurationError: if a record has no such score.
        """
        if score not in FLOATS:
            raise ConfigurationError(f"unknown score {score!r}; choose from {', '.join(FLOATS)}")
        records = {(record.layer, record.label): record for record in self.records}
        width = max(map(len, ["layer", *self.layers]))
        columns = [[name.ljust(width) for name in ["layer", *self.layers]]]
        for label in self.labels:
            cells = [cell(records.get((layer, label)), score) for layer in self.layers]
            columns.append(column(label, cells))
        if score in JUDGED_SCORES and (states := self._states()):
            columns.append(["state", *(states.get(layer, "") for layer in self.layers)])
        return ruled(columns)

    def notes(self, limit: int | None = 12) -> list[str]:
        """What a reader of the table must know: statuses, premises and reasons, with their layers.

        What concerns all layers comes first; then what of the run is not in the numbers, where
        there is anything (``settings``).

        Args:
            limit: Most lines on records, the last one counting the rest; None for all.
        """
        return record_notes(self.records, limit) + loss_notes(self.settings)

    def explain(self, layer: str) -> str:
        """Three sentences on one layer: what holds, what cannot be said and why, what to do.

        Raises:
            NotMeasuredError: if the report has no such layer.
        """
        return explain(self, layer)

    def __str__(self) -> str:
        frozen = self.settings.get("source") == "measure"
        when = "frozen weights" + (f" after step {self.step}" if self.step else "")
        title = (
            f"{when if frozen else f'step {self.step}'}: cosine with the weight's Gram matrix, "
            "1 = full agreement"
        )
        legends = [level_legend(self.records), verdict_legend(self.records)]
        if self._states():
            legends.append("state: has training brought the layer to rest, decay balanced by data?")
        said = [line for line in legends if line]
        return "\n".join([title, self.table(), *said, *self.notes(), str(self.coverage)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready (NaN as None); the matrices are not part of it."""
        structures = [structure.to_dict() for structure in self.structures]
        return {
            "step": self.step,
            "settings": dict(self.settings),
            "coverage": self.coverage.to_dict(),
            "layers": [diagnosis.to_dict() for diagnosis in self.diagnoses],
            "records": [record.to_dict() for record in self.records],
            **({"structures": structures} if structures else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The way back from :meth:`to_dict`."""
        return cls(
            step=data["step"],
            records=[Record.from_dict(record) for record in data["records"]],
            coverage=Coverage.from_dict(data["coverage"]),
            settings=dict(data["settings"]),
            diagnoses=[Diagnosis.from_dict(layer) for layer in data.get("layers", ())],
            structures=[LayerStructure.from_dict(found) for found in data.get("structures", ())],
        )

    def _kept(self, layer: str) -> LayerStatistics:
        if layer in self.statistics:
            return self.statistics[layer]
        if layer in self.layers:
            raise NotMeasuredError(
                "this report holds no matrices: in the loop, ask for them with "
                "FeatureProbe(..., keep_matrices=True); a report read back from data has none"
            )
        raise NotMeasuredError(f"no layer {layer!r}; layers: {', '.join(self.layers)}")

    def _states(self) -> dict[str, str]:
        """Each layer's state for the table; nothing where none is known."""
        states = {diagnosis.layer: diagnosis.state for diagnosis in self.diagnoses}
        if set(states.values()) <= {"cannot tell"}:
            return {}
        return {layer: STATE_WORDS.get(state, state) for layer, state in states.items()}
