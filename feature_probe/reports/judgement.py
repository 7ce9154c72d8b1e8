"""Judgement: from the evidence of the first steps to the checks of the self-test.

Per layer and over T steps, Ĝ_t = Σ gᵀh, P_t what the optimizer got, D_t what its step says:

    gradient      Ĝ_t = P_t
    examples      (1/n) Σ_i g_i h_iᵀ = Ĝ_t with the g_i of E (no 1/n where the loss is a sum)
    trajectory    Σ_t (Ĝ_t + λW_t) = Σ_t D_t with the λ in the optimizer's group
    weight decay  λ = ⟨Σ D_t − Σ P_t, Σ W_t⟩/‖Σ W_t‖² is the λ that reports are made with
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_probe.reports.verification import Check
from feature_probe.sums.facts import StepFacts, known_numbers
from feature_probe.sums.verification import LayerEvidence

#: Relative gap up to which two gradients are the same: of weights in float64, in float32, and where
#: a factor of their product is rounded to less (autocast, TF32).
_DOUBLE, _SINGLE, _COARSE = 1e-7, 1e-3, 2e-2
#: The same for sums of one kernel's products, rounded alike.
_ALIKE = 1e-4
#: How near a factor must be to a known number to be called by its name.
_NEAR = 0.01
#: From this share of what is compared on, rounding leaves nothing to be told.
_BLURRED = 0.1
#: Multiples of the estimated size of rounding that are put down to it.
_MARGIN = 4.0


@dataclass(frozen=True)
class Setting:
    """What the steps are judged by.

    Attributes:
        ranks: Processes whose mean Ĝ is.
        alone: Why Ĝ of this process is not all of the gradient, or "".
        wrapper: Class of what the optimizer was given inside, or "".
        decays: λ by layer where it was given to the probe; None: the optimizer's own is taken.
        own: λ by layer as the optimizer's groups say.
    """

    ranks: int
    alone: str
    wrapper: str
    decays: Mapping[str, float | None]
    own: Mapping[str, float | None]


def judge(layers: Mapping[str, LayerEvidence], setting: Setting) -> list[Check]:
    """Every check of every layer."""
    checks = []
    for name, layer in layers.items():
        reason = layer.reason or ("" if layer.steps else "no gradient reached it in these steps")
        if reason:
            checks.append(Check("gradient", name, None, message=reason))
            continue
        if not math.isfinite(sum(f.given + f.own + f.weight for f in layer.steps)):
            text = "gradients or weights were not finite in a step that the optimizer took"
            checks.append(Check("gradient", name, False, message=text))
            continue
        gradient, same = _gradient(name, layer, setting)
        checks += [
            gradient,
            _examples(name, layer, setting.ranks),
            _trajectory(name, layer, use_formed=same and not setting.alone),
            _weights(name, layer, setting.wrapper),
            _weight_decay(name, layer, setting),
        ]
    text = "no parameter's gradient is that of its W (which is computed), or no step used it"
    unseen = [name for name in setting.decays if name not in layers]
    return checks + [Check("gradient", name, None, message=text) for name in unseen]


def _gradient(name: str, layer: LayerEvidence, setting: Setting) -> tuple[Check, bool]:
    """The check, and whether Ĝ may stand for P: no factor, no clipping."""
    if setting.alone:
        return Check("gradient", name, None, message=setting.alone), False
    facts = layer.steps
    given = sum(f.given for f in facts)
    if given == 0:
        zero = sum(f.own for f in facts) == 0
        text = "zero in every step" if zero else "the optimizer got zeros, the calls delivered more"
        return Check("gradient", name, None if zero else False, message=text), zero
    factor, gap, tolerance = sum(f.dot for f in facts) / given, _gap(layer), _allowed(layer)
    if gap <= tolerance:
        return Check("gradient", name, True, factor, gap), True
    ok, text = _difference(layer, setting.ranks, tolerance)
    return Check("gradient", name, ok, factor, gap, text), False


def _gap(layer: LayerEvidence) -> float:
    """‖Ĝ − P‖/‖P‖ over all steps; of a mean over ranks that of their sums."""
    facts = layer.steps
    given = sum(f.given for f in facts)
    if not any(math.isnan(f.gap) for f in facts):
        return math.sqrt(sum(f.gap for f in facts) / given)
    if layer.formed is None or layer.given is None:
        return math.nan
    return float((layer.formed - layer.given).norm()) / math.sqrt(given)


def _difference(layer: LayerEvidence, ranks: int, tolerance: float) -> tuple[bool | None, str]:
    """Whether a difference of Ĝ and P is a failure, and what it looks like."""
    facts = [f for f in layer.steps if f.given > 0]
    factors = [f.dot / f.given for f in facts]
    if all(f.dot > 0 and _straight(f, tolerance) for f in facts):
        return _scaled(layer, factors, ranks, tolerance)
    given = sum(f.given for f in facts)
    if sum(f.clamped for f in facts) <= tolerance**2 * given:
        return True, "the gradient's entries were clipped between backward and step"
    apart, pull = sum(f.gap for f in facts), sum(f.pull for f in facts)
    weight = sum(f.weight for f in facts)
    if apart - pull**2 / weight <= (tolerance**2) * given:
        return False, (
            f"what the optimizer got contains {pull / weight:.4g} × the weight beside the layer's "
            "gradient, as of a penalty on the weights in the loss: G of the reports must be without"
        )
    return False, (
        "what the optimizer got is not what the layer's calls delivered, in direction too: .grad "
        "was changed between backward and step, or the weight is used where the probe does not look"
    )


def _straight(facts: StepFacts, tolerance: float) -> bool:
    """Whether Ĝ and P have one direction; taken for granted of a mean over ranks."""
    if math.isnan(facts.formed):
        return True
    apart = facts.formed - facts.dot**2 / facts.given
    return apart <= max(tolerance, 1e-6) ** 2 * facts.formed


def _scaled(
    layer: LayerEvidence, factors: Sequence[float], ranks: int, tolerance: float
) -> tuple[bool | None, str]:
    """Ĝ_t = c_t P_t: a factor that is wrong throughout, a loss scale, or clipping."""
    spread = max(3 * tolerance, 1e-5)
    middle = sorted(factors)[len(factors) // 2]
    constant = max(factors) <= min(factors) * (1 + spread)
    steady = all(_is_power_of_two(factor, spread) for factor in factors)
    suspects = _suspects(middle, layer.steps, ranks)
    if constant and suspects:
        return False, f"off by a constant factor, which is {' or '.join(suspects)}"
    if len(factors) == 1 and factors[0] > 1:
        return None, "a factor in the one step there is: clipping cannot be told from a loss scale"
    clipped = [1 / factor for factor in factors if factor > 1 + tolerance]
    if not constant and not steady and min(factors) >= 1 - spread:
        mean = sum(clipped) / len(clipped)
        return True, (
            "the gradient was clipped between backward and step in "
            f"{len(clipped)} of {len(factors)} steps (mean factor {mean:.3g})"
        )
    kind = "a constant factor" if constant else "a factor that changes from step to step"
    advice = ", as of a loss scale that the probe was not told of: give loss_scale=" * steady
    return False, f"what the calls delivered is the optimizer's gradient times {kind}{advice}"


def _is_power_of_two(factor: float, spread: float) -> bool:
    return abs(factor / 2.0 ** round(math.log2(factor)) - 1) <= spread


def _suspects(factor: float, facts: Sequence[StepFacts], ranks: int) -> list[str]:
    """The known numbers that a factor is, or is the inverse of."""
    found = []
    for name, value in known_numbers(facts, ranks).items():
        for number, words in ((value, name), (1 / value, f"1/({name})")):
            if abs(factor / number - 1) < _NEAR:
                found.append(f"{words} ({value:g})")
    return found


def _examples(name: str, layer: LayerEvidence, ranks: int) -> Check:
    facts = [f for f in layer.steps if not math.isnan(f.examples_dot)]
    own = sum(f.own for f in facts)
    if not facts or own == 0:
        why = "the micro-batches of each step were of uneven sizes" if not facts else "zero"
        return Check("examples", name, None, message=why)
    factor = sum(f.examples_dot for f in facts) / own
    gap = math.sqrt(sum(f.examples_gap for f in facts) / own)
    if gap <= (_DOUBLE if layer.dtype == torch.float64 else _ALIKE) + _blur(layer):
        return Check("examples", name, True, factor, gap)
    suspects = _suspects(factor, facts, ranks)
    text = "the per-example gradients of E do not add up to the gradient of the step"
    text += f": the factor is {' or '.join(suspects)}" if suspects else ""
    return Check("examples", name, False, factor, gap, text)


def _trajectory(name: str, layer: LayerEvidence, *, use_formed: bool) -> Check:
    """Whether gradients and steps belong together, by the state and by the weights."""
    said, rule = layer.implied, layer.implied.rule
    source = layer.formed if use_formed else layer.given
    reason = _unfollowed(layer)
    if reason or rule is None or source is None or layer.weights is None:
        return Check("trajectory", name, None, message=reason or "no step was followed to its end")
    total = layer.sign * source + rule.decay * layer.weights
    size = max(float(source.norm()), math.sqrt(sum(f.given for f in layer.steps)))
    allowed, gaps, blurred = _allowed(layer), [], False
    sides = [(said.stated, said.state_noise(), "state")]
    sides.append((said.from_weights(), said.weights_noise(), "weights"))
    for implied, noise, side in sides:
        if implied is None or size == 0:
            continue
        rounding = _MARGIN * noise / size
        if rounding > _BLURRED:
            blurred = True
            continue
        gap = float((total - implied).norm()) / size
        gaps.append(gap)
        if not gap <= allowed + rounding:
            factor = float((total * implied).sum() / implied.square().sum())
            return Check("trajectory", name, False, factor, gap, _moved(side, use_formed))
    if not gaps:
        text = "cannot tell: the rounding of the weights is too large beside their steps"
        return Check("trajectory", name, None, message=text if blurred else said.shift_reason)
    note = "" if use_formed else "with .grad in place of what the calls delivered"
    return Check("trajectory", name, True, 1.0, max(gaps), note)


def _moved(side: str, formed: bool) -> str:
    source = "what the calls delivered" if formed else ".grad"
    if side == "state":
        return (
            f"{source} plus the optimizer's weight decay is not what went into its momentum: "
            "the gradient was changed after the probe had read it, or a step was not seen"
        )
    return (
        f"{source} plus the optimizer's weight decay did not move the weights as its rule says: "
        "the learning rate was changed after the probe had read it, or something else moved them"
    )


def _unfollowed(layer: LayerEvidence) -> str:
    implied = layer.implied
    if implied.reason:
        return implied.reason
    if not implied.constant:
        return "the optimizer's weight_decay changed from one step to another"
    if implied.rule is None or implied.steps != len(layer.steps):
        return "not every step was followed to its end"
    return ""


def _weights(name: str, layer: LayerEvidence, wrapper: str) -> Check:
    implied = layer.implied
    if implied.changed and wrapper:
        text = (
            f"changed {implied.changed} times between two steps, it seems by {wrapper}, which the "
            "optimizer is wrapped in and whose rule is not known"
        )
        return Check("weights", name, None, message=text)
    if implied.changed:
        text = (
            f"changed {implied.changed} times between two steps by something other than the "
            "optimizer (a projection or clipping of weights, a swap for averaged ones, a loaded "
            "state): neither decay nor gradient explain where they are"
        )
        return Check("weights", name, False, message=text)
    if implied.compared:
        return Check("weights", name, True)
    return Check("weights", name, None, message="there were no two steps to look between")


def _weight_decay(name: str, layer: LayerEvidence, setting: Setting) -> Check:
    said, rule, reason = layer.implied, layer.implied.rule, _unfollowed(layer)
    implied, noise = said.stated, said.state_noise()
    if implied is None and not reason:
        implied, noise = said.from_weights(), said.weights_noise()
    if rule is None or reason or implied is None or layer.given is None or layer.weights is None:
        text = reason or said.shift_reason or "no step was followed to its end"
        return Check("weight decay", name, None, message=text)
    given, own = setting.decays.get(name), setting.own.get(name)
    if rule.decoupled:
        if given is not None and own is not None and abs(given - own) > _NEAR * own:
            text = f"the optimizer applies λ = {own:.4g}; reports are made with {given:.4g}"
            return Check("weight decay", name, False, own / given if given else math.nan, 1, text)
        text = "decoupled: it does not go through the gradient"
        return Check("weight decay", name, None, message=text)
    claimed = rule.decay if given is None else given
    shown, doubt = _fitted(implied - layer.sign * layer.given, layer.weights, noise)
    if math.isnan(shown):
        return Check("weight decay", name, None, message="the weights are zero or not finite")
    error, within = abs(shown - claimed), _MARGIN * doubt
    factor = shown / claimed if claimed else math.nan
    gap = error / claimed if claimed else math.nan
    if error > within + _NEAR * claimed:
        text = f"the steps show λ = {shown:.4g} ± {doubt:.1g}; reports are made with {claimed:.4g}"
        return Check("weight decay", name, False, factor, gap, text)
    if claimed and doubt > _BLURRED * claimed:
        text = "cannot tell λ: over these steps it is less than the rounding of the weights"
        return Check("weight decay", name, None, factor, gap, text)
    return Check("weight decay", name, True, factor, gap, "" if claimed else "no decay")


def _fitted(rest: Tensor, weights: Tensor, noise: float) -> tuple[float, float]:
    """λ with Σ (D_t − P_t) = λ Σ W_t in the least squares, and what rounding may do to it."""
    size = float(weights.norm())
    if size == 0 or not math.isfinite(size):
        return math.nan, math.nan
    return float((rest * weights).sum()) / size**2, noise / size


def _allowed(layer: LayerEvidence) -> float:
    """Relative gap up to which gradients of the layer are the same."""
    return _tolerance(layer) + _blur(layer)


def _blur(layer: LayerEvidence) -> float:
    """What rounding may do to gradients whose terms cancel, as those of attention's queries do."""
    given = sum(f.given for f in layer.steps)
    # products of low precision are added up in float32
    eps = torch.finfo(torch.float64 if layer.dtype == torch.float64 else torch.float32).eps
    reach = sum(f.reach**2 for f in layer.steps)
    return _MARGIN * eps * math.sqrt(reach / given) if given else 0.0


def _tolerance(layer: LayerEvidence) -> float:
    if layer.dtype == torch.float64 and not layer.coarse:
        return _DOUBLE
    low = layer.coarse or torch.finfo(layer.dtype).bits < 32
    return _COARSE if low else _SINGLE


def broken(error: Exception) -> Check:
    """The self-test itself failed."""
    text = f"it stopped after a failure of its own, {type(error).__name__}: {error}"
    return Check("self-test", "", False, message=text)
