"""The numbers of one layer and step that the self-test compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.sums.staging import Followed
from feature_probe.sums.stepping import StepScale

_NAN = math.nan


@dataclass(frozen=True)
class StepFacts:
    """Numbers of one layer and step.

    Attributes:
        formed: ‖Ĝ‖²; NaN where it is a mean over ranks.
        given: ‖P‖².
        dot: ⟨Ĝ, P⟩.
        gap: ‖Ĝ − P‖²; NaN where Ĝ is a mean over ranks.
        clamped: ‖clamp(Ĝ, ±max|P|) − P‖², likewise.
        pull: ⟨P − Ĝ, W⟩.
        weight: ‖W‖².
        examples_dot: ⟨X, Ĝ⟩ with X the mean (or sum) of the per-example gᵢhᵢᵀ as E scales them;
            NaN where the micro-batches of the step are not of one size.
        examples_gap: ‖X − Ĝ‖², likewise.
        own: ‖Ĝ‖² of this rank.
        reach: Σ ‖g‖‖h‖ over the calls: rounding puts a multiple of it into Ĝ and P, however small
            they are themselves.
        scale: S, the loss scale the probe knows.
        passes: Forward passes of the step.
        examples: n of the step.
    """

    formed: float
    given: float
    dot: float
    gap: float
    clamped: float
    pull: float
    weight: float
    examples_dot: float
    examples_gap: float
    own: float
    reach: float
    scale: float
    passes: int
    examples: int


#: The fields that tensors say, in the order of :func:`step_facts`.
_NUMBERS = (
    "formed", "given", "dot", "gap", "clamped", "pull", "weight", "examples_dot", "examples_gap",
)  # fmt: skip


def step_facts(
    formed: Tensor,
    given: Tensor,
    weight: Tensor,
    by_example: Tensor | None,
    reach: Tensor,
    scale: StepScale,
    followed: Followed,
) -> StepFacts:
    """The numbers of one step, by one wait for the device."""
    limit = given.abs().max()
    numbers = [
        (formed * formed).sum(),
        (given * given).sum(),
        (formed * given).sum(),
        (formed - given).square().sum(),
        (torch.minimum(torch.maximum(formed, -limit), limit) - given).square().sum(),
        ((given - formed) * weight).sum(),
        (weight * weight).sum(),
    ]
    if by_example is not None:
        numbers += [(by_example * formed).sum(), (by_example - formed).square().sum()]
    values: list[float] = torch.stack(numbers).tolist()
    values += [_NAN] * (len(_NUMBERS) - len(values))
    size = float(scale.loss)
    return StepFacts(
        **dict(zip(_NUMBERS, values, strict=True)),
        own=values[0],
        reach=float(reach) / size,
        scale=size,
        passes=followed.passes,
        examples=sum(followed.sizes),
    )


def known_numbers(facts: Sequence[StepFacts], ranks: int) -> dict[str, float]:
    """Numbers a wrong factor would be made of, by their names: of the first step, if constant."""
    first = facts[0]
    numbers = {
        "the loss scale": first.scale,
        "the number of forward passes of a step": float(first.passes),
        "the number of processes": float(ranks),
        "the number of examples of a step": float(first.examples),
        "the number of examples of a forward pass": first.examples / max(first.passes, 1),
    }
    return {name: value for name, value in numbers.items() if value not in (0.0, 1.0)}
