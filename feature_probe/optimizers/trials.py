"""Trials of an optimizer's rule: what its steps on a small matrix say about its weight decay.

A step is described by the weight W, the gradient G of the loss without decay, the learning rate η
and the decay λ of the parameter group. Twins of the optimizer (:mod:`.twin`) step a small float64
matrix, with two pairs of η and λ whose products are equal:

- *coupled*: with G_t = −λW_t at every step, nothing ever moves (SGD, Adam with L2, LARS);
- *decoupled*: W₊ = (1 − ηλ)W − ηU with the same U, to a relative ηλ, for the twin with λ as for
  one without from another W, given the same gradients, random or orthogonal to both W (AdamW,
  Lion, Muon; the decay may come before, with or after the update, or be implicit);
- both (SGD without momentum): called coupled.

η, λ and W are short binary fractions, so that λW is exact in every precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from feature_probe.optimizers.twin import Twin

#: What makes a twin: W₀, η, λ.
Make = Callable[[Tensor, float, float], Twin]
#: (η, λ) of the twins: one product, so that any other dependence than on ηλ shows.
PAIRS = ((2.0**-10, 2.0**-2), (2.0**-9, 2.0**-3))
#: Steps of a twin, and how many of them an optimizer may use to get going (ADOPT, RAdam).
STEPS, _SETTLED = 10, 6
#: Of ηλ, relative: what a decay that is 1 − ηλ to first order may leave in U; float32 leaves less.
_FIRST_ORDER = 4.0
#: Of ηλ‖W‖∞: what counts as no difference.
TOLERANCE = 1e-4
#: The clock is measured at this ηλ.
_SMALL = 2.0**-26
_NAN = float("nan")


def difference(make: Make, lr: float, decay: float) -> tuple[float, float]:
    """How far the twin with λ moves, and how far from the one without, in units of ηλ‖W‖∞."""
    start = matrix(0)
    unit = lr * decay * float(start.abs().max())
    decaying, plain = make(start, lr, decay), make(start, lr, 0.0)
    motion, gap = 0.0, 0.0
    for step in range(STEPS):
        gradient = matrix(1 + step)
        w, v = decaying.step(gradient), plain.step(gradient)
        motion = max(motion, float((w - start).abs().max()) / unit)
        gap = max(gap, float((w - v).abs().max()) / unit)
    return motion, gap


def rests(make: Make, lr: float, decay: float) -> bool:
    """Whether G = −λW at every step leaves W where it is."""
    start = matrix(0)
    twin, weight = make(start, lr, decay), start
    for _ in range(STEPS):
        weight = twin.step(-decay * weight)
        if not _near(weight, start, 1e-12 * float(start.abs().max())):
            return False
    return True


def decouples(make: Make) -> bool:
    """Whether U = (W − W₊)/η − λW is that of a twin without decay, at another W.

    Tried with a large and with a small W that decays, and with gradients random and orthogonal to W
    (AdamP decays a tenth then; LAMB's trust ratio may be clipped for large W alone).
    """
    large, small = matrix(0), _other()
    return (
        _decouples(make, PAIRS[0], large, small, orthogonal=False)
        and _decouples(make, PAIRS[1], small, large, orthogonal=False)
        and _decouples(make, PAIRS[1], large, small, orthogonal=False)
        and _decouples(make, PAIRS[0], large, small, orthogonal=True)
    )


def _decouples(
    make: Make, pair: tuple[float, float], w: Tensor, v: Tensor, orthogonal: bool
) -> bool:
    """The trial for one pair of η and λ, from w with decay and from v without."""
    lr, decay = pair
    decaying, plain = make(w, lr, decay), make(v, lr, 0.0)
    for step in range(STEPS):
        gradient = _orthogonal(matrix(1 + step), w, v) if orthogonal else matrix(1 + step)
        w_next, v_next = decaying.step(gradient), plain.step(gradient)
        update, reference = (w - w_next) / lr - decay * w, (v - v_next) / lr
        scale = float(reference.abs().max()) + decay * float(w.abs().max())
        if step >= _SETTLED and not _near(update, reference, _FIRST_ORDER * lr * decay * scale):
            return False
        w, v = w_next, v_next
    return True


def clock_rate(make: Make) -> float:
    """Asymptotic decay per step over ηλ without gradients; NaN unless the step is affine in W.

    Affine: the difference of two runs with the same gradients is the run from the difference of
    the starts without gradients. Adam and LARS scale decay and gradient together, and fail. Then
    W_t = x_t W₀ with d_t = x_t − x_{t+1} and d_{t+1} = αd_t + βx_{t+1}, fitted and checked (heavy
    ball and Nesterov: α = μ, β = (1−δ)ηλ as ηλ → 0), and x falls by β/(1−α) of itself per step.
    """
    lr, decay = PAIRS[0]
    first, second = matrix(0), _other()
    twins = [make(start, lr, decay) for start in (first, second, first - second)]
    for step in range(STEPS):
        gradient = matrix(1 + step)
        a, b, c = (
            twin.step(given)
            for twin, given in zip(twins, (gradient, gradient, 0 * gradient), strict=True)
        )
        if not _near(a - b, c, TOLERANCE * lr * decay):
            return _NAN
    twin, zero = make(first, 1.0, _SMALL), torch.zeros_like(first)
    left = torch.stack([twin.step(zero) / first for _ in range(2 * STEPS)])  # [step, ...]
    sizes = left.flatten(1).mean(1)
    if not _near(left, sizes[:, None, None].expand_as(left), 1e-14):
        return _NAN
    drops = (sizes[:-1] - sizes[1:]) / _SMALL
    system = torch.stack([drops[:-1], sizes[1:-1]], dim=1)
    solution = torch.linalg.lstsq(system, drops[1:, None], rcond=1e-6, driver="gelsd").solution
    if not _near(system @ solution, drops[1:, None], 1e-5 * float(drops.abs().max())):
        return _NAN
    old, new = solution.flatten().tolist()
    return float(new / (1 - old)) if new > 0 and old < 1 else _NAN


@functools.lru_cache(maxsize=64)
def matrix(seed: int) -> Tensor:
    """A fixed 4 × 6 matrix of odd eighths in (−2, 2): exact in every precision, never 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    odd = torch.randint(-8, 8, (4, 6), generator=generator)
    return (2.0 * odd.double() + 1.0) / 8.0


def _other() -> Tensor:
    """Another matrix, much smaller: rules that look at ‖W‖ then act otherwise."""
    return matrix(-1) / 64.0


def _orthogonal(gradient: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The gradient with, in each row, its parts along the rows of two weights taken out."""
    basis, _ = torch.linalg.qr(torch.stack([w, v], dim=2))  # [row, d_in, 2]
    along = (basis.transpose(1, 2) @ gradient.unsqueeze(2)).squeeze(2)
    projected: Tensor = gradient - (basis @ along.unsqueeze(2)).squeeze(2)
    return projected


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() <= tolerance).all())  # NaN is not near
