"""Which rescalings of a layer's weight leave the loss unchanged, told from three scalars a step.

Where scaling a block B of parameters does not change the loss (a row before BatchNorm, a head
before a query norm, a whole layer before LayerNorm), ⟨θ_B, ∂L/∂θ_B⟩ = 0 on **every** batch, by
Euler's theorem for functions of degree 0. Such a layer cannot satisfy λW = −∂L/∂W, whatever its
training does, so its FACT says nothing about its features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Fewest steps a statement is made from.
_FEWEST = 8
#: ρ below which a block counts as scale-invariant, and as partly so.
_FULL, _PARTLY = 1e-3, 0.1
#: Share of the rows that must be below.
_SHARE = 0.95
#: Chance of any false statement about one layer; shared evenly among the rules tried on it.
_CHANCE = 1e-4
#: Rows that tell how alike the steps' gradients are: those with ρ above this, at least so many.
_INFORMATIVE, _FEWEST_INFORMATIVE = 0.03, 8
#: Keeps the Cholesky factor of a singular correlation matrix finite; far below what matters.
_RIDGE = 1e-12

Kind = Literal["rows", "groups", "layer"]


@dataclass(frozen=True)
class StepScalars:
    """What a layer's weight and minibatch gradient of the same step say about their directions.

    All tensors float64 on the CPU, steps first, the rows of all groups in order. Any positive
    factor on a step's gradient (loss scale, accumulation) is allowed.

    Attributes:
        dot: ⟨w_r, g_r⟩, ``[T, rows]``.
        weight: ‖w_r‖², ``[T, rows]``.
        gradient: ‖g_r‖², ``[T, rows]``.
        bias: b·g_b, b², g_b² of every row's bias, ``[T, rows, 3]``; None without a bias.
        columns: Parameters of one row, d_in.

    Raises:
        ValueError: if the shapes do not fit.
    """

    dot: Tensor
    weight: Tensor
    gradient: Tensor
    bias: Tensor | None
    columns: int

    def __post_init__(self) -> None:
        shape = self.dot.shape
        if len(shape) != 2 or self.weight.shape != shape or self.gradient.shape != shape:
            shapes = [tuple(x.shape) for x in (self.dot, self.weight, self.gradient)]
            raise ValueError(f"dot, weight and gradient must all be [steps, rows], got {shapes}")
        if self.bias is not None and self.bias.shape != (*shape, 3):
            raise ValueError(f"bias must be {[*shape, 3]}, got {list(self.bias.shape)}")
        if self.columns < 1 or shape[1] < 1:
            raise ValueError(f"a layer has rows and columns, got {shape[1]} × {self.columns}")


@dataclass(frozen=True)
class ScaleInvariance:
    """Whether, and how finely, a layer's weight can be rescaled without changing the loss.

    Attributes:
        kind: The finest rescaling found: of each of the "rows", of equal "groups" of rows, of
            the whole "layer"; "partly" where it nearly holds (ε against a small variance);
            "none"; "unknown" where the steps cannot tell.
        statistic: ρ of the rule that decided (of the rows for "none"), the median over its
            blocks; NaN if unknown.
        blocks: Number of blocks of that rule: the rows, the groups, or 1; 0 if unknown.
        steps: Number of finite steps used.
        reason: In plain words.
    """

    kind: Literal["none", "rows", "groups", "layer", "partly", "unknown"]
    statistic: float
    blocks: int
    steps: int
    reason: str


@dataclass(frozen=True)
class _Rule:
    """One partition of the layer into equal blocks of rows, with or without the biases.

    ``worst`` is the largest ρ among the ``needed`` of the ``alive`` blocks that must be below a
    threshold (95 % of the rows, all groups, the layer); ``log_each`` the log-probability that an
    unrelated direction is below ``worst``.
    """

    kind: Kind
    blocks: int
    alive: int
    with_bias: bool
    median: float
    worst: float
    needed: int
    log_each: float

    def log_chance(self, rules: list[_Rule]) -> float:
        """Log-probability that chance meets this rule, where the coarser ones hold by design.

        If a coarser partition is invariant, the last of its parts follows from the others: two
        halves of a layer before LayerNorm have ⟨w, g⟩ of opposite sign and one size. Every
        coarser block that holds takes one off the blocks that count as evidence.
        """
        coarser = [r.alive for r in rules if r.worst < _FULL and r.alive < self.alive]
        evidence = max(0, self.needed - max(coarser, default=0))
        choices = (
            math.lgamma(self.alive + 1)
            - math.lgamma(self.needed + 1)
            - math.lgamma(self.alive - self.needed + 1)
        )
        return min(0.0, evidence * self.log_each + choices)


def scale_invariance(scalars: StepScalars) -> ScaleInvariance:
    """Tell the finest blocks whose scale the loss does not see.

    For a block B of D parameters, over the T steps given (they need not be adjacent)

        ρ_B = D · Σ_t ⟨θ_B, g_B⟩_t² / Σ_t ‖θ_B‖²_t ‖g_B‖²_t,

    about 1 for an unrelated direction g (D cos² is χ²₁), D for g ∥ θ, below 1e-5 where the loss is
    invariant (rounding, and ε of the norm). A rule holds where ρ_B < 1e-3: for 95 % of the rows;
    for all groups, tried for every division of the rows into equal contiguous groups; for the
    whole layer. Each is tried with the weights alone (BatchNorm, weight standardisation) and, if
    there is one, with the bias in the block (LayerNorm, GroupNorm). Blocks whose weight or
    gradient is zero on every step are left out. The finest rule with ρ_B < 0.1 is reported, as
    "partly" where it is not below 1e-3. A coarser rule that is below is no contradiction: it adds
    up what the finer blocks have left.

    False alarms: a rule counts only where unrelated Gaussian directions would meet it with a
    probability below 1e-4 divided by the number of rules tried, so that a layer's total stays
    below 1e-4. The probability takes blocks as independent but for coarser ones that hold, and
    successive gradients as alike as the rows of the layer show them; if too few rows show it, as
    one single gradient. One block and one repeated gradient (full batches, small learning rate)
    then prove little: "unknown". What this does not guard against: weights that lie almost wholly
    on inputs that are zero on every step.

    Cost: O(T · rows) per division, O(T² · rows) once; T ≤ 32 or so.
    """
    steps = _finite(scalars)
    count = len(steps.dot)
    if count < _FEWEST:
        missing = _FEWEST - count
        return _unknown(
            count, f"seen on {count} finite steps; {_FEWEST} are needed, {missing} more"
        )
    if not bool((steps.gradient > 0).any()):
        return _unknown(count, "no gradient: it is zero on every step")
    if not bool((steps.weight * steps.gradient > 0).any()):
        return _unknown(count, "no row had both a weight and a gradient other than zero")
    rules = list(_rules(steps))  # finest first
    allowed = math.log(_CHANCE / max(1, len(rules)))
    # Of one partition, first what holds in full: a small bias hardly breaks "partly" without it.
    rules.sort(key=lambda rule: (-rule.blocks, rule.worst >= _FULL))
    for rule in rules:
        if rule.worst < _PARTLY and rule.log_chance(rules) < allowed:
            return _found(rule, count)
    return _not_found(rules, steps)


def _unknown(count: int, why: str) -> ScaleInvariance:
    """No statement, with the reason."""
    return ScaleInvariance("unknown", math.nan, 0, count, why)


def _found(rule: _Rule, count: int) -> ScaleInvariance:
    """The statement of a rule that holds."""
    size = "with its bias " if rule.with_bias else ""
    subject = {
        "rows": f"each of its {rule.blocks} rows {size}" if rule.blocks > 1 else "its one row ",
        "groups": f"each of its {rule.blocks} equal groups of rows {size}",
        "layer": f"the layer as a whole {size}",
    }[rule.kind]
    if rule.alive < rule.blocks:
        subject += f"({rule.alive} with a gradient) "
    norm = {
        "rows": "BatchNorm or under weight standardisation",
        "groups": "GroupNorm or a norm per head",
        "layer": "LayerNorm or RMSNorm",
    }[rule.kind]
    if rule.worst >= _FULL:
        reason = (
            f"partly: {subject}is nearly scale-invariant (ρ = {rule.median:.2g}, at most "
            f"{rule.worst:.2g}), as before {norm} whose ε is not small against the variance; "
            "the gradient can balance only part of the weight decay"
        )
        return ScaleInvariance("partly", rule.median, rule.blocks, count, reason)
    reason = (
        f"{subject}is scale-invariant (⟨w, ∂L/∂w⟩ = 0 on every batch, as before {norm}): "
        "the gradient cannot balance weight decay, so FACT cannot hold"
    )
    return ScaleInvariance(rule.kind, rule.median, rule.blocks, count, reason)


def _not_found(rules: list[_Rule], steps: StepScalars) -> ScaleInvariance:
    """No rule holds: none, or unknown where one would hold if chance could be excluded."""
    count, rows = steps.dot.shape
    for rule in rules:
        if rule.worst < _FULL:
            blocks = f"{rule.alive} block{'s' if rule.alive > 1 else ''}"
            return _unknown(
                count,
                f"ρ = {rule.median:.2g} over {blocks} looks scale-invariant, but so few blocks "
                f"on {count} steps with gradients this much alike can do so by chance "
                f"(probability up to {math.exp(rule.log_chance(rules)):.1g})",
            )
    if steps.columns == 1:
        return _unknown(
            count,
            "neither groups of rows nor the layer is scale-invariant; a row of one parameter is "
            "only where its gradient is zero, which rounding hides",
        )
    rule = rules[0]
    reason = (
        f"not scale-invariant: ρ = {rule.median:.2g} is the median over its {rows} rows, "
        f"and no division into blocks is below {_PARTLY} throughout, beyond chance (about 1 for "
        f"an unrelated gradient, below {_FULL} if invariant)"
    )
    return ScaleInvariance("none", rule.median, rule.blocks, count, reason)


def _finite(scalars: StepScalars) -> StepScalars:
    """The steps on which every number is finite, in float64."""
    parts = [x.double() for x in (scalars.dot, scalars.weight, scalars.gradient)]
    bias = None if scalars.bias is None else scalars.bias.double()
    keep = torch.stack([x.isfinite().all(1) for x in parts]).all(0)
    if bias is not None:
        keep &= bias.isfinite().flatten(1).all(1)
        bias = bias[keep]
    dot, weight, gradient = (x[keep] for x in parts)
    return StepScalars(dot, weight, gradient, bias, scalars.columns)


def _rules(steps: StepScalars) -> Iterator[_Rule]:
    """Every rule that can be tried, the finest blocks first, the weights alone before the bias."""
    rows = steps.dot.shape[1]
    correlation = _step_correlation(steps)
    repeated = torch.ones_like(correlation)
    for blocks in (n for n in range(rows, 0, -1) if rows % n == 0):
        kind: Kind = "rows" if blocks == rows else "layer" if blocks == 1 else "groups"
        for with_bias in (False, True) if steps.bias is not None else (False,):
            size = rows // blocks * (steps.columns + with_bias)
            if size == 1:
                continue  # cos² of two numbers is 1
            # What the rows say about the steps is no evidence about the rows themselves.
            alike = repeated if kind == "rows" else correlation
            rule = _rule(kind, blocks, with_bias, steps, size, alike)
            if rule.alive:
                yield rule


def _rule(
    kind: Kind, blocks: int, with_bias: bool, steps: StepScalars, size: int, alike: Tensor
) -> _Rule:
    """Evaluate one partition. ``size``: parameters of a block; ``alike``: see _log_chance."""
    dot, weight, gradient = steps.dot, steps.weight, steps.gradient
    if with_bias and steps.bias is not None:
        bias = steps.bias.unbind(-1)
        dot, weight, gradient = dot + bias[0], weight + bias[1], gradient + bias[2]
    dot, weight, gradient = (x.reshape(len(x), blocks, -1).sum(-1) for x in (dot, weight, gradient))
    products = weight * gradient
    alive = products.sum(0) > 0
    count = int(alive.sum())
    if count == 0:
        return _Rule(kind, blocks, 0, with_bias, math.nan, math.nan, 0, 0.0)
    products = products[:, alive]
    total = products.sum(0)
    ratio = (size * dot[:, alive].square().sum(0) / total).sort().values
    needed = math.ceil(_SHARE * count) if kind == "rows" else count
    worst = float(ratio[needed - 1])
    log_each = _log_chance(worst, products / total, alike)
    median = float(ratio.median())
    return _Rule(kind, blocks, count, with_bias, median, worst, needed, log_each)


def _step_correlation(steps: StepScalars) -> Tensor:
    """How alike the gradients of two steps are, seen along the rows' weights, ``[T, T]``.

    With u_tr = ⟨w_r, g_r⟩_t/(‖w_r‖‖g_r‖)_t, the cosine of u_t and u_s over the rows: 1 if one
    gradient repeats (full batches), about 0 if minibatch noise dominates. Rows that are
    themselves (nearly) invariant hold only rounding and are left out; with fewer than 8 others
    the steps count as repetitions of one.
    """
    products = steps.weight * steps.gradient
    total = products.sum(0)
    ratio = steps.columns * steps.dot.square().sum(0)
    informative = (total > 0) & (ratio > _INFORMATIVE * total)
    if int(informative.sum()) < _FEWEST_INFORMATIVE:
        return torch.ones(len(products), len(products), dtype=torch.float64)
    products = products[:, informative]
    dot = steps.dot[:, informative]
    cosines = torch.where(products > 0, dot / products.clamp_min(1e-300).sqrt(), 0.0)
    directions = cosines / cosines.norm(dim=1, keepdim=True).clamp_min(1e-300)
    correlation: Tensor = directions @ directions.mT
    correlation.diagonal().fill_(1.0)
    return correlation


def _log_chance(below: float, shares: Tensor, correlation: Tensor) -> float:
    """Log of an upper bound of P(Σ_t s_t u_t² ≤ x), the largest over the blocks.

    u is Gaussian with mean 0, variances of 1 and covariance C (``correlation``, ``[T, T]``); s
    (``shares``, ``[T, blocks]``, columns that sum to 1) are the steps' shares of
    Σ_t ‖θ‖²‖g‖², x is ``below``. D cos² of a random direction has a smaller density at 0 than u²,
    so the bound covers it. For any k steps the density at 0 times the volume of the ellipsoid
    gives (x/2)^{k/2}/(Γ(k/2 + 1) √(det C_k Π s_t)); and as (Σ s_t u_t)² ≤ Σ s_t u_t², also
    √(2x/(π sᵀCs)). The smallest of these is taken, steps in order of their share.
    """
    if below <= 0:
        return -math.inf
    order = shares.sum(1).argsort(descending=True)
    shares, correlation = shares[order], correlation[order][:, order]
    count = len(shares)
    ridge = _RIDGE * torch.eye(count, dtype=torch.float64)
    factor = torch.linalg.cholesky(correlation + ridge)
    log_volume = (shares.log().cumsum(0) + 2 * factor.diagonal().log().cumsum(0)[:, None]) / 2
    half = torch.arange(1, count + 1, dtype=torch.float64) / 2
    log_ball = half * math.log(below / 2) - torch.lgamma(half + 1)
    bounds = log_ball[:, None] - log_volume
    spread = (shares * (correlation @ shares)).sum(0)
    mean = 0.5 * (math.log(2 * below / math.pi) - spread.clamp_min(_RIDGE).log())
    return float(torch.cat([bounds, mean[None]]).amin(0).amax().clamp_max(0.0))
