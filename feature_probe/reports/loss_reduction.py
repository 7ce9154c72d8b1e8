"""Judgement of a batch and its halves: is the loss a mean or a sum, and are examples in front."""

from __future__ import annotations

import math

from feature_probe.reports.verification import Check
from feature_probe.sums.halving import Halves
from feature_probe.sums.ledger import Reduction

#: Relative gap up to which two losses in float32 are the same.
_SAME = 1e-3


def judge_loss(halves: Halves, declared: Reduction) -> list[Check]:
    """Whether the loss is reduced as declared, and f has the batch's examples first.

    Args:
        halves: The losses of a batch and its halves.
        declared: ``loss_reduction`` of the probe.
    """
    whole, *parts = halves.losses
    size, *sizes = halves.sizes
    total = {
        "mean": sum(n * loss for n, loss in zip(sizes, parts, strict=True)) / size,
        "sum": sum(parts),
    }
    scale = max(abs(value) for value in total.values())
    apart = {kind: abs(whole - value) / (scale or 1.0) for kind, value in total.items()}
    other: Reduction = "sum" if declared == "mean" else "mean"
    factor = whole / total[declared] if total[declared] else math.nan
    ok: bool | None = apart[declared] <= _SAME
    text = ""
    if scale == 0 or (ok and apart[other] <= _SAME):
        ok, text = None, "cannot tell: the loss of this batch is too near to 0"
    elif not ok and apart[other] <= _SAME:
        text = (
            f"it is a {other} over the examples of a batch, but loss_reduction is {declared!r}: "
            f"the scale of E is wrong; give loss_reduction={other!r}"
        )
    elif not ok:
        ok = None
        text = (
            "it is neither the mean nor the sum of the halves' losses: examples interact, or it is "
            "a mean over a number that differs from one to the other (tokens)"
        )
    return [
        Check("loss", "", ok, factor, apart[declared], text),
        _example_axis(halves),
    ]


def _example_axis(halves: Halves) -> Check:
    outputs, sizes = halves.outputs, halves.sizes
    if all(n * sizes[0] == outputs[0] * size for n, size in zip(outputs, sizes, strict=True)):
        return Check("example axis", "", True)
    text = (
        f"the model's output has {outputs[0]} rows for a batch of {sizes[0]} and {outputs[1]} for "
        f"one of {sizes[1]}: its first axis is not the examples; give output= to pick f [n, ...]"
    )
    return Check("example axis", "", False, message=text)
