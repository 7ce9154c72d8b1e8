"""Report: the scores of every layer at one step, as records, as a table, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from feature_probe.errors import ConfigurationError, NotMeasuredError
from feature_probe.reports.coverage import Coverage
from feature_probe.reports.phrases import align, layer_note, loss_notes
from feature_probe.theory.relations import (
    GRAM_MATRICES,
    RELATIONS,
    LayerMatrices,
    LayerStatistics,
)

_FLOATS = (
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
        decay_ratio: λ̂/λ = −⟨W,G⟩/(λ‖W‖²) of the layer; NaN if λ = 0.
        cosine_low: Lower end of an interval for the cosine; NaN, as none is computed yet.
        cosine_high: Upper end, likewise.
        premise: Why the relation may not be expected to hold here, in words; "" if nothing known.
        n_examples: Examples behind the sums.
        n_rows: Examples × positions × calls behind the sums.
        n_kept: Eigenvalues above the clamp, where there is an eigenproblem, else None.
        status: "ok", or why a number is missing.
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
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return data | {name: None for name in _FLOATS if not math.isfinite(data[name])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The way back from :meth:`to_dict`; None becomes NaN again."""
        back: dict[str, Any] = dict(data)
        back |= {name: math.nan for name in _FLOATS if back[name] is None}
        return cls(**back)


@dataclass(frozen=True, eq=False)
class Report:
    """Every layer's agreement with every asked relation at one step.

    Attributes:
        step: Optimizer steps taken before the weights that were measured; 0 is initialisation.
        records: One :class:`Record` per layer, relation and power, layers in model order.
        coverage: Which matrix parameters of the model these records speak for.
        settings: How it was measured (source, jacobian, positions, window, loss reduction).
        statistics: W and the normalised sums by layer, where they were kept, for :meth:`matrix`.
    """

    step: int
    records: list[Record]
    coverage: Coverage
    settings: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict, repr=False)

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

    def matrix(self, layer: str, kind: str, power: float | None = None) -> Tensor:
        """A layer's matrix in full, float64: memory quadratic in its side.

        Args:
            layer: Layer name.
            kind: A relation's name (its prediction: FACT, AGOPˢ, ...), or "nfm" for WᵀW and
                "bnfm" for WWᵀ.
            power: s, for relations that have one; 1 if not given.

        Returns:
            ``[d, d]``, or ``[groups, d, d]`` for a grouped layer; d is d_in for forward kinds and
            d_out for backward ones.

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
        matrices = LayerMatrices(statistics, framed=False)
        if relation is None:
            dense = matrices.gram(GRAM_MATRICES[kind]).dense()
        else:
            if statistics.sum(relation.needs) is None:
                reason = statistics.missing.get(relation.needs, "not asked for")
                raise NotMeasuredError(f"{kind!r} of layer {layer!r} was not measured: {reason}")
            dense = matrices.prediction(relation, power).dense()
        return dense[0] if dense.shape[0] == 1 else dense

    def table(self, score: str = "cosine") -> str:
        """A text table, layers by relations, of one score; a cosine with its level by chance.

        Raises:
            ConfigurationError: if a record has no such score.
        """
        if score not in _FLOATS:
            raise ConfigurationError(f"unknown score {score!r}; choose from {', '.join(_FLOATS)}")
        header = ["layer", *self.labels]
        cells = {(record.layer, record.label): record for record in self.records}
        rows = [
            [layer, *(_cell(cells.get((layer, label)), score) for label in self.labels)]
            for layer in self.layers
        ]
        return align([header, *rows])

    def notes(self) -> list[str]:
        """What a reader of the table must know: statuses and premises, each with its layers.

        Then what of the run is not in the numbers, where there is anything (``settings``).
        """
        found: dict[str, dict[str, None]] = {}
        for record in self.records:
            texts = [record.status] if record.status != "ok" else []
            texts += [record.premise] if record.premise else []
            for text in texts:
                found.setdefault(f"{record.relation}: {text}", {})[record.layer] = None
        notes = [layer_note(text, list(layers), len(self.layers)) for text, layers in found.items()]
        return notes + loss_notes(self.settings)

    def __str__(self) -> str:
        frozen = self.settings.get("source") == "measure"
        when = "frozen weights" + (f" after step {self.step}" if self.step else "")
        title = (
            f"{when if frozen else f'step {self.step}'}: cosine with the weight's Gram matrix, "
            "1 = full agreement"
        )
        legend = "in brackets the level by chance: " + "; ".join(_legend(self.records))
        return "\n".join([title, self.table(), legend, *self.notes(), str(self.coverage)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready (NaN as None); the matrices are not part of it."""
        return {
            "step": self.step,
            "settings": dict(self.settings),
            "coverage": self.coverage.to_dict(),
            "records": [record.to_dict() for record in self.records],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The way back from :meth:`to_dict`."""
        return cls(
            step=data["step"],
            records=[Record.from_dict(record) for record in data["records"]],
            coverage=Coverage.from_dict(data["coverage"]),
            settings=dict(data["settings"]),
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


def _cell(record: Record | None, score: str) -> str:
    if record is None:
        return ""
    value = float(getattr(record, score))
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" + (f" ({record.level_by_chance:.2f})" if score == "cosine" else "")


def _legend(records: Sequence[Record]) -> list[str]:
    """Which level stands in brackets for which relations."""
    shared = [r.relation for r in records if not math.isnan(r.shared_weight_cosine)]
    rotated = [r.relation for r in records if r.relation not in shared]
    said = {"a random rotation": rotated, "the same W with random gradient directions": shared}
    return [f"{', '.join(dict.fromkeys(names))}: {how}" for how, names in said.items() if names]
