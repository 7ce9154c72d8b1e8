"""Intervals for the scores of a sample: the sums in groups, each left out once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from feature_probe.errors import ConfigurationError
from feature_probe.reports.record import Record
from feature_probe.sums.moments import Moments
from feature_probe.sums.window import Window
from feature_probe.theory.matrices import LayerMatrices
from feature_probe.theory.power import fitted_power
from feature_probe.theory.relations import RELATIONS, Basis, LayerStatistics, Relation, Sum
from feature_probe.theory.uncertainty import effective_examples, jackknife, regime

_IN_THE_LOOP = (
    "no interval: in a training window the weights move and the batches are not independent; "
    "measure(jackknife=8) gives one at frozen weights"
)
#: The gradients of the examples all but cancel at rest, so that FACT of a sample is mostly noise.
_NOT_OF_FACT = (
    "cannot tell: FACT of a sample says little of FACT of all the data, and no interval covers "
    "that; measure all the training data"
)
_NOT_OF_GRADIENTS = (
    "cannot tell: the mean gradient of a sample may say little of that of all the data; measure "
    "all the training data"
)
_NOT_ASKED = "no interval: measure(jackknife=8) gives one"


def check_batches(groups: int, batches: int) -> None:
    """Refuse groups without data.

    Raises:
        ConfigurationError: if there are fewer batches than groups.
    """
    if batches < groups:
        raise ConfigurationError(
            f"jackknife={groups} needs at least as many batches, the loader gives {batches}: use "
            "smaller batches"
        )


@dataclass(frozen=True)
class Parts:
    """A window in groups of batches.

    Attributes:
        groups: The sums of each.
        share: The share of the data set that the sample is; 0 for unlimited data.
        exact: Whether the Jacobians are exact.
    """

    groups: Sequence[Window]
    share: float
    exact: bool

    @classmethod
    def of(cls, groups: Sequence[Window], population: int | None, jacobian: str) -> Parts:
        """The parts, with what they are of.

        Raises:
            ConfigurationError: for a population smaller than the sample.
        """
        examples = sum(group.examples for group in groups)
        if population is not None and population < max(examples, 1):
            raise ConfigurationError(
                f"population={population!r} is fewer than the {examples} examples of the loader"
            )
        share = 0.0 if population is None else examples / population
        return cls(groups, share, jacobian == "exact")

    def check(self) -> None:
        """Refuse groups without data.

        Raises:
            ConfigurationError: if there were fewer batches than groups.
        """
        check_batches(len(self.groups), sum(group.examples > 0 for group in self.groups))

    @cached_property
    def whole(self) -> Window:
        """All groups together; the very group where there is one only."""
        if len(self.groups) == 1:
            return self.groups[0]
        whole = Window()
        for group in self.groups:
            copies = [moments.without(Moments()) for moments in group.layers]
            whole.merge(replace(group, layers=copies))
        return whole

    def left_out(self, index: int) -> list[Window]:
        """One layer's sums without each of the groups in turn."""
        found = []
        for group in self.groups:
            rest = Window(
                examples=self.whole.examples - group.examples, problems=dict(self.whole.problems)
            )
            rest.layer(index)
            rest.layers[index] = self.whole.layer(index).without(group.layer(index))
            found.append(rest)
        return found

    def effective(self, index: int, needs: Sum) -> float:
        """Examples behind one layer's sum, fewer where a few of them carry most of it."""
        examples = self.whole.examples
        if needs in ("gradient", "update"):
            return float(examples)
        totals = [getattr(group.layer(index), needs) for group in self.groups]
        if any(total is None for total in totals):
            return float(examples)
        traces = [
            float(total.diagonal(dim1=-2, dim2=-1).sum()) / group.examples
            for total, group in zip(totals, self.groups, strict=True)
        ]
        return effective_examples(examples, traces)


def with_intervals(
    records: Sequence[Record],
    left_out: Sequence[LayerStatistics],
    parts: Parts | None,
    index: int,
    rows: int,
    *,
    frozen: bool,
) -> list[Record]:
    """A layer's records with 90 % intervals of their cosines and fitted powers.

    Args:
        records: Of one layer.
        left_out: The layer's statistics without each of the groups in turn.
        parts: The groups; None: no intervals were asked for.
        index: Which layer.
        rows: d_out of a block.
        frozen: Whether the weights stood still.
    """
    if parts is None:
        note = _NOT_ASKED if frozen else _IN_THE_LOOP
        return [replace(record, interval_note=note) for record in records]

    shared: dict[tuple[Basis, bool], list[LayerMatrices]] = {}

    def matrices(relation: Relation) -> list[LayerMatrices]:
        key = (relation.basis, relation.has_power)
        if key not in shared:
            seen = [statistics.seen_by(relation) for statistics in left_out]
            shared[key] = [LayerMatrices(statistics) for statistics in seen]
        return shared[key]

    asked = [RELATIONS[record.relation] for record in records]
    return [
        record
        if math.isnan(record.cosine)
        else _with_interval(record, matrices(relation), parts, index, rows)
        for record, relation in zip(records, asked, strict=True)
    ]


def _with_interval(
    record: Record, left_out: Sequence[LayerMatrices], parts: Parts, index: int, rows: int
) -> Record:
    relation = RELATIONS[record.relation]
    if "gradient" in relation.sums and parts.share < 1:
        note = _NOT_OF_FACT if relation.is_equality else _NOT_OF_GRADIENTS
        return replace(record, interval_note=note)
    exact = parts.exact or relation.needs == "loss"
    share = parts.share if exact else 0.0
    cosines = [_cosine(matrices, relation, record.power) for matrices in left_out]
    interval = jackknife(record.cosine, cosines, share=share)
    examples = parts.effective(index, relation.needs)
    note = regime(examples, rows, len(left_out), exact=exact, frozen=True, interval=interval)
    record = replace(
        record,
        cosine_corrected=interval.corrected,
        cosine_low=interval.low,
        cosine_high=interval.high,
        interval_note="; ".join(text for text in (note, interval.note) if text),
    )
    if not relation.has_power or math.isnan(record.fitted_power):
        return record
    powers = [fitted_power(*matrices.power_inputs(relation)).power for matrices in left_out]
    fitted = jackknife(record.fitted_power, powers, share=share, clip=None)
    if math.isnan(fitted.low):
        return record
    return replace(record, fitted_power_low=fitted.low, fitted_power_high=fitted.high)


def _cosine(matrices: LayerMatrices, relation: Relation, power: float | None) -> float:
    actual, predicted = matrices.gram(relation), matrices.prediction(relation, power)
    product = float(actual.squared_norm()) * float(predicted.squared_norm())
    return float(actual.inner(predicted)) / math.sqrt(product) if product > 0 else math.nan
