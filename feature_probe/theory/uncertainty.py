"""How uncertain a score is that was measured on a sample: a bias-corrected grouped jackknife.

A score is a non-linear function of a mean over examples (K, E or G), so that a finite sample both
scatters and biases it. Splitting the sample into m groups shows both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from feature_probe.errors import ConfigurationError

_NAN = float("nan")
#: Bias of a cosine that is none.
_NEGLIGIBLE = 1e-9
#: Where coverage was measured: examples per row of K, and groups.
_EXAMPLES_PER_ROW, _FEWEST_GROUPS = 10, 8
#: Most bias left, in standard errors, and most relative correction δ, that the coverage stands.
_BIAS_PER_ERROR, _MOST_CORRECTION = 1 / 3, 0.2


@dataclass(frozen=True)
class Interval:
    """A score with its bias-corrected value and interval.

    Attributes:
        estimate: θ̂, the score of the whole sample.
        corrected: θ_bc, with the first-order bias taken off.
        standard_error: SE of both.
        low: Lower end of the interval about ``corrected``.
        high: Upper end.
        groups: m.
        share: f, the share of the data set that the sample holds.
        note: Why numbers are NaN, or what was done to them; "" if nothing.
    """

    estimate: float
    corrected: float
    standard_error: float
    low: float
    high: float
    groups: int
    share: float
    note: str = ""


def jackknife(
    estimate: float,
    leave_one_out: Sequence[float],
    *,
    share: float = 0.0,
    level: float = 0.90,
    clip: tuple[float, float] | None = (-1.0, 1.0),
) -> Interval:
    """θ_bc ± t SE from a score θ̂ and the m scores θ₍₋ᵦ₎ with one group of examples left out.

    With θ̄ the mean of the θ₍₋ᵦ₎ and f the share of the data set seen,

        θ_bc = θ̂ − (1−f)(m−1)(θ̄ − θ̂),    SE² = (1−f)(m−1)/m · Σ_b (θ₍₋ᵦ₎ − θ̄)²,

    and t the quantile of Student's t with m − 1 degrees of freedom (Quenouille's correction and
    Tukey's interval, with the correction for a finite population). The interval without θ_bc is no
    alternative: the bias of a cosine can exceed its standard error many times.

    Args:
        estimate: θ̂, over all groups.
        leave_one_out: θ₍₋ᵦ₎. The groups are to hold equally many examples, whole minibatches.
        share: f from 0 to 1; 0 where examples are drawn with replacement, or are themselves a
            sample of what is meant. At 1 the interval has no width.
        level: Nominal coverage of the interval, between 0 and 1.
        clip: Lowest and highest value that the score can take, a cosine's by default: θ_bc and both
            ends are clipped to it, and the note says so. None for a score without such bounds.

    Returns:
        The interval; NaN with a note where there are fewer than two groups, or where a score is not
        finite. What it covers depends on the sample: see :func:`regime`.

    Raises:
        ConfigurationError: if ``share`` or ``level`` is out of its range, or ``clip`` holds
            no interval.
    """
    if not 0 <= share <= 1:
        raise ConfigurationError(f"share is a part of the data set, from 0 to 1, got {share!r}")
    if not 0 < level < 1:
        raise ConfigurationError(f"level must lie between 0 and 1, got {level!r}")
    if clip is not None and not clip[0] < clip[1]:
        raise ConfigurationError(f"clip must be two increasing numbers, got {clip!r}")
    count = len(leave_one_out)
    undefined = sum(not math.isfinite(score) for score in leave_one_out)
    note = ""
    if not math.isfinite(estimate):
        note = "the score itself is undefined"
    elif count < 2:
        note = f"{count} group{'s' * (count != 1)}: no interval from fewer than 2"
    elif undefined:
        note = f"{undefined} of {count} scores with one group left out are undefined"
    if note:
        return Interval(estimate, _NAN, _NAN, _NAN, _NAN, count, share, note)
    unseen = 1.0 - share
    shifts = [score - estimate for score in leave_one_out]  # small: the differences stay exact
    mean = math.fsum(shifts) / count
    corrected = estimate - unseen * (count - 1) * mean
    squares = math.fsum((shift - mean) ** 2 for shift in shifts)
    error = math.sqrt(unseen * (count - 1) / count * squares)
    half = student_quantile((1 + level) / 2, count - 1) * error
    low, high = corrected - half, corrected + half
    if clip is not None and not clip[0] <= low <= high <= clip[1]:
        corrected, low, high = (min(max(end, clip[0]), clip[1]) for end in (corrected, low, high))
        note = f"clipped to [{clip[0]:g}, {clip[1]:g}]"
    return Interval(estimate, corrected, error, low, high, count, share, note)


def regime(
    n: float,
    d_out: int,
    groups: int,
    *,
    exact: bool,
    frozen: bool,
    interval: Interval | None = None,
) -> str:
    """Whether a nominal 90 % interval of :func:`jackknife` covers the true cosine in 85–95 %.

    That was measured for exact Jacobians at frozen weights, 8 and 16 groups and n ≥ 10·d_out. It
    is not enough in wide layers with flat spectra and for FACT: there what is left of the bias
    exceeds the standard error. Noise adds to ‖X‖² and so divides the cosine of a matrix X linear
    in its mean (FACT, and s = 1) by √(1+ν); the jackknife takes off the first order of ν. With
    δ = 2(θ_bc − θ̂)/θ̂, what it leaves is θ̂(1−δ)^{−1/2} − θ_bc, to be at most a third of the
    standard error, with δ ≤ 0.2; for s < 1 the rule is stricter than needed. A true cosine above
    0.99 is covered more often, up to 99 %, as the interval is clipped at 1. Examples of very
    unequal norm are covered less often, unless ``n`` is their effective number.

    Args:
        n: Number of examples; where their norms differ much, the number that counts
            (:func:`effective_examples`).
        d_out: Side of K or E, or rows of the weight.
        groups: m of the jackknife.
        exact: Whether Jacobians were exact, not random projections.
        frozen: Whether the weights were the same for all examples.
        interval: The interval of a cosine, for the check of what is left of the bias.

    Returns:
        "" where that coverage is claimed; "cannot tell: ..." or "biased low: ..." where it is not.
    """
    doubts = []
    if groups < _FEWEST_GROUPS:
        doubts.append(f"{groups} groups, fewer than {_FEWEST_GROUPS}")
    if not exact:
        doubts.append("random Jacobians, whose own error is not that of the examples")
    if not frozen:
        doubts.append("a training window, whose groups are neither independent nor at one weight")
    if interval is not None and not math.isfinite(interval.standard_error):
        doubts.append(interval.note or "no interval")
    if doubts:
        return "cannot tell: " + "; ".join(doubts)
    biases = []
    if n < _EXAMPLES_PER_ROW * d_out:
        worth = f"the examples are worth {n:.0f} with gradients of one size"
        biases.append(f"{worth}, fewer than {_EXAMPLES_PER_ROW} × {d_out} rows")
    if interval is not None and (left := _bias_left(interval)):
        biases.append(left)
    return "biased low: " + "; ".join(biases) if biases else ""


def effective_examples(n: int, traces: Sequence[float]) -> float:
    """n/(1 + CV²): how many equal examples are worth n whose squared norms ‖J_i‖² vary.

    CV² is the squared coefficient of variation of one example's tr K_i, estimated from the
    group means as (n/m)·Var_b(tr K_b)/(mean_b tr K_b)². Examples that vary together inside a
    group count as fewer as well. Good to about √(2/(m−1)), a half at m = 8, and too optimistic
    where the few largest norms carry the sum.

    Args:
        n: Number of examples, over all groups.
        traces: tr K_b (or tr E_b) of every group's mean.

    Returns:
        The number, at most n; NaN for fewer than two groups or a mean of zero.
    """
    count = len(traces)
    mean = math.fsum(traces) / count if count else 0.0
    if count < 2 or not mean > 0:
        return _NAN
    variance = math.fsum((trace / mean - 1) ** 2 for trace in traces) / (count - 1)
    return n / (1 + n / count * variance)


def _bias_left(interval: Interval) -> str:
    """What the first-order correction leaves of the bias, where it is too much; else ""."""
    estimate, error = interval.estimate, interval.standard_error
    shift = interval.corrected - estimate
    if shift == 0 or estimate == 0:
        return ""
    delta = 2 * shift / estimate
    if delta > _MOST_CORRECTION:
        return f"the correction is {delta / 2:.0%} of the score, too large for its first order"
    left = abs(estimate / math.sqrt(1 - delta) - interval.corrected)
    if left <= max(_BIAS_PER_ERROR * error, _NEGLIGIBLE):
        return ""
    return f"about {left:.2g} of bias is left beside a standard error of {error:.2g}"


@lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t: P(T ≤ t) = ``probability``, by bisection.

    With θ = arctan(t/√ν), P(|T| ≤ t) is a finite sum of powers of cos θ (Abramowitz and Stegun,
    26.7.3 and 26.7.4). The relative error is below 10⁻⁹ for probabilities up to 1 − 10⁻⁶.

    Args:
        probability: From 0.5 up to, not including, 1.
        freedom: ν ≥ 1, degrees of freedom.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile for probability {probability}, {freedom} degrees of freedom")
    if probability == 0.5:
        return 0.0
    target, low, high = 2 * probability - 1, 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _two_sided(middle, freedom) < target:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _two_sided(angle: float, freedom: int) -> float:
    """P(|T| ≤ √ν tan θ): sin θ Σ_j c_j cos^{2j}θ (ν even), (2/π)(θ + sin θ Σ_j …) (ν odd)."""
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for index in range(freedom // 2):
        total += term
        numerator = 2 * index + 1 + odd
        term *= numerator / (numerator + 1) * cosine**2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
