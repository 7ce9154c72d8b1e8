"""Verification: what the run-time self-test found, check by check, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from feature_probe.errors import VerificationError

_NAN = math.nan
#: What each check compares, for the reader.
MEANING = {
    "self-test": "whether the probe could follow the steps",
    "gradient": "what the layers' calls delivered (Σ gᵀh) against what the optimizer got (.grad)",
    "examples": "the per-example gradients as E scales them against the gradient of the batch",
    "trajectory": "gradient + weight decay × weight against how the optimizer moved the weights",
    "weights": "whether anything but the optimizer changed the weights",
    "weight decay": "λ as the steps show it against λ as the probe takes it",
    "example axis": "whether the model's output has the batch's examples along its first axis",
    "loss": "the loss of a batch against the losses of its halves",
}
_SHOWN = 8


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: Which, a key of :data:`MEANING`.
        layer: Of which layer; "" where it is of the whole model.
        ok: Whether it holds; None: not checked, or it cannot be told.
        factor: The number by which one side is the other; 1 is right, NaN: none was formed.
        gap: How far the sides lie apart, relatively; NaN likewise.
        message: What is wrong, why nothing can be told, or what else there is to know.
    """

    name: str
    layer: str
    ok: bool | None
    factor: float = _NAN
    gap: float = _NAN
    message: str = ""


@dataclass(frozen=True)
class Verification:
    """The result of :meth:`feature_probe.FeatureProbe.verify`; ``print`` it to read it.

    Attributes:
        checks: All of them.
        steps: Training steps they are made from.
        passed: Whether no check failed, and one at least could be made.
    """

    checks: tuple[Check, ...]
    steps: int
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        verdicts = [check.ok for check in self.checks]
        object.__setattr__(self, "passed", False not in verdicts and True in verdicts)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.ok is False)

    def raise_if_failed(self) -> None:
        """For scripts and continuous integration.

        Raises:
            VerificationError: if a check failed, or none could be made; with what ``print`` shows.
        """
        if not self.passed:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        counts = [sum(c.ok is verdict for c in self.checks) for verdict in (True, False, None)]
        held, failed, untold = counts
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        lines = [
            f"self-test of {steps}: {'passed' if self.passed else 'FAILED'} "
            f"({held} checks hold, {failed} failed, {untold} not made)"
        ]
        for name, meaning in MEANING.items():
            checks = [check for check in self.checks if check.name == name]
            if checks:
                lines += [f"{name}: {meaning}", *_section(checks)]
        return "\n".join(lines)


def _section(checks: Sequence[Check]) -> Iterator[str]:
    """The lines of one check, worst layers first."""
    failed = sorted(
        (check for check in checks if check.ok is False), key=lambda c: -_or(c.gap, math.inf)
    )
    for check in failed[:_SHOWN]:
        yield f"  FAILED    {check.layer or 'model'}: {check.message}{_numbers(check)}"
    if len(failed) > _SHOWN:
        yield f"  FAILED    and {len(failed) - _SHOWN} more layers"
    noted: dict[str, list[Check]] = {}
    for check in checks:
        if check.ok is None:
            noted.setdefault(f"  not made  {{}}: {check.message}", []).append(check)
    for check in checks:
        if check.ok:
            text = "  holds     {}" + (f": {check.message}" if check.message else "")
            noted.setdefault(text, []).append(check)
    for text, group in noted.items():
        worst = max(group, key=lambda c: _or(c.gap, -1.0))
        names = [check.layer or "model" for check in group]
        shown = ", ".join(names[:_SHOWN])
        shown += f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        numbers = f" (largest gap {worst.gap:.1e})" if not math.isnan(worst.gap) else ""
        yield text.replace("{}", shown, 1) + numbers


def _numbers(check: Check) -> str:
    parts = [("factor", check.factor), ("gap", check.gap)]
    told = [f"{name} {value:.4g}" for name, value in parts if not math.isnan(value)]
    return f" ({', '.join(told)})" if told else ""


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
