"""Trajectory: what the weights did from step to step. A few numbers per row, and three snapshots.

The gradient of one step and the weight it was taken at say what a mean gradient cannot: whether the
weight is scale-invariant (⟨w, g⟩ = 0 on every batch), and how the decay is balanced on average over
the steps. The weights alone say what the optimizer's updates were, whatever the optimizer:

    W_{t+1} = (1 − η_t λ) W_t − η_t U_t   gives   Σ η_t U_t = −(W_T − W_0) − λ Σ η_t W_t

so that the mean update of a window needs one running sum and the window's first weight. Differences
of single steps in float32 would be rounding where ηλ is small.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from feature_probe.capture.sharding import is_sharded
from feature_probe.layers.targets import Target
from feature_probe.sums.outer import sum_dtype
from feature_probe.theory.matrices import to_algebra

#: Steps whose scalars are kept, of this window and those before it.
RING = 32
#: Beyond so many steps of a window, numbers per row are read of every so-manieth alone.
_SPARSE = 8
#: Reports whose norms are kept; older ones are thinned out.
_HISTORY, _RECENT = 64, 16
_NAN = float("nan")


@dataclass
class Path:
    """One layer's steps. Tensors are on the layer's device; nothing here waits for it.

    Attributes:
        ring: Of the latest steps, ``[3, rows]`` each: ⟨w_r, g_r⟩, ‖w_r‖², ‖g_r‖².
        bias: Of the same steps, ``[3, rows]``: b·g_b, b², g_b²; empty without a bias.
        counted: Of the same steps, whether the optimizer took them; None where it surely did.
        steps: Steps of this window.
        totals: Σ_t of ⟨W,G⟩, ‖W‖², ‖G‖² over them, ``[3]``, float64.
        slopes: Those of them whose ‖G‖² is in it: at least the first 32 and then every eighth.
        latest: The same three numbers of the latest step.
        moved: Σ_t ‖W_{t+1} − W_t‖²/η_t over all but the latest of them, where the optimizer's state
            tells; None where it does not.
        crossed: The same for η_t⟨u_t, b_{t+1}⟩ under Nesterov momentum, with u = −ΔW/η.
        behind: ‖W‖² summed over the steps behind ``moved``.
        start: W ``[groups, d_out, d_in]`` at the first of them.
        weighted: Σ_t η_t W_t, where asked for.
        rate: Σ_t η_t.
        last_rate: η of the latest step.
        decays: Smallest and largest λ of the steps, None before the first.
        history: Of each report: decay age and ‖W‖², oldest first.
    """

    ring: deque[Tensor] = field(default_factory=lambda: deque(maxlen=RING))
    bias: deque[Tensor] = field(default_factory=lambda: deque(maxlen=RING))
    counted: deque[Tensor | None] = field(default_factory=lambda: deque(maxlen=RING))
    steps: int = 0
    totals: Tensor | None = None
    slopes: int = 0
    latest: Tensor | None = None
    moved: Tensor | None = None
    crossed: Tensor | None = None
    behind: Tensor | None = None
    start: Tensor | None = None
    weighted: Tensor | None = None
    rate: float | Tensor = 0.0
    last_rate: float | Tensor = 0.0
    decays: tuple[float, float] | None = None
    history: list[tuple[float, float]] = field(default_factory=list)

    def open(self) -> None:
        """A new window begins; the ring and the history go on."""
        self.steps, self.slopes, self.decays = 0, 0, None
        self.rate = self.last_rate = 0.0
        self.totals = self.latest = self.moved = self.crossed = self.behind = None
        self.start = self.weighted = None

    def note(self, age: float, squared_norm: float) -> None:
        """A report was made."""
        self.history.append((age, squared_norm))
        if len(self.history) > _HISTORY:
            self.history = self.history[:-_RECENT:2] + self.history[-_RECENT:]

    def update(self, weight: Tensor, decay: float) -> Tensor | None:
        """U ``[groups, d_out, d_in]``, float64: the mean update, weighted by the learning rate.

        Over the steps of the window but the latest, whose result is not there yet.

        Args:
            weight: W as it stands, before the latest step.
            decay: λ.
        """
        rate = float(self.rate) - float(self.last_rate)
        if self.start is None or self.weighted is None or self.steps < 2 or rate <= 0:
            return None
        now, start, weighted = (to_algebra(t) for t in (weight, self.start, self.weighted))
        mean = (weighted - float(self.last_rate) * now) / rate
        return (start - now) / rate - decay * mean

    def nbytes(self) -> int:
        """Bytes held."""
        held = [self.start, self.weighted, *self.ring, *self.bias]
        return sum(t.numel() * t.element_size() for t in held if t is not None)


class Trajectory:
    """The paths of all layers."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._previous: dict[str, Tensor] = {}

    def path(self, target: Target) -> Path:
        """The path of one layer."""
        return self._paths.setdefault(target.name, Path())

    def start(self) -> None:
        """A new window begins."""
        self._previous.clear()
        for path in self._paths.values():
            path.open()

    def step(
        self,
        target: Target,
        optimizer: Optimizer | None,
        group: Mapping[str, Any],
        *,
        scale: float | Tensor = 1.0,
        taken: Tensor | None = None,
        keep_sum: bool = False,
    ) -> None:
        """A layer's weight and gradient as its optimizer is about to use them.

        Nothing is noted of sharded parameters, of which each process has a part.

        Args:
            target: The layer, with a parameter that has a gradient.
            optimizer: Its optimizer; None where the loop has none to be seen.
            group: The optimizer's group of the parameter.
            scale: What the gradient is still to be divided by; negative where the optimizer
                maximises.
            taken: Whether the optimizer will really step.
            keep_sum: Whether Σ ηW is to be kept, for the mean update.
        """
        parameter = target.parameter
        if parameter is None or parameter.grad is None or is_sharded(parameter):
            return
        gradient = parameter.grad
        if gradient.layout is not torch.strided:
            return
        path = self.path(target)
        weight = target.matrix(parameter.detach())
        slope = target.gradient_matrix(gradient.detach())
        if path.steps < RING or path.steps % _SPARSE == 0:
            total = self._by_row(path, target, weight, slope, scale, taken)
            path.slopes += 1
        else:
            # without momentum ‖G‖² says how far the step went
            known = _is_plain_sgd(optimizer) and not group.get("momentum")
            total = _scalars_of_all(weight, slope, scale, known=known)
            path.slopes += known
        self._follow(path, target, optimizer, group, weight)
        rate = _rate(group)
        if taken is not None:  # what a fused optimizer skips moves nothing
            total = torch.where(taken, total, torch.zeros_like(total))
            rate = torch.where(taken, torch.as_tensor(rate, device=taken.device), 0.0)
        path.latest = total
        path.totals = total if path.totals is None else _beside(path.totals, total) + total
        self._add(path, weight, rate, keep_sum=keep_sum)
        decay = float(group.get("weight_decay") or 0.0)
        low, high = path.decays or (decay, decay)
        path.decays = min(low, decay), max(high, decay)

    def nbytes(self) -> int:
        """Bytes held."""
        copies = sum(t.numel() * t.element_size() for t in self._previous.values())
        return copies + sum(path.nbytes() for path in self._paths.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, by layer; copies. Waits for the device."""
        return {name: _plain(path) for name, path in self._paths.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back from :meth:`state_dict`; tensors go to their layer's device at the next use.

        A Nesterov step that the checkpoint divides is left out of the fluctuations.
        """
        self._previous.clear()
        self._paths = {name: _restored(kept) for name, kept in state.items()}

    def _by_row(
        self,
        path: Path,
        target: Target,
        weight: Tensor,
        slope: Tensor,
        scale: float | Tensor,
        taken: Tensor | None,
    ) -> Tensor:
        """Add a step to the ring; ⟨W,G⟩, ‖W‖², ‖G‖² ``[3]``."""
        rows = _scalars(weight.flatten(0, 1), slope.flatten(0, 1), scale)
        path.ring.append(rows)
        path.counted.append(taken)
        bias = _bias(target)
        if bias is not None and bias.grad is not None:
            part = _scalars(bias.detach()[:, None], bias.grad.detach()[:, None], scale)
            own = part if target.part is None else part[:, target.part[0] : target.part[1]]
            path.bias.append(own)
        return _wide(rows).sum(-1)

    def _add(
        self,
        path: Path,
        weight: Tensor,
        rate: float | Tensor,
        *,
        keep_sum: bool,
    ) -> None:
        if path.start is None:
            path.start = weight.clone()
        if keep_sum:
            if path.weighted is None and path.steps == 0:
                path.weighted = torch.zeros_like(weight, dtype=sum_dtype(weight.dtype))
            if path.weighted is not None:
                path.weighted = _beside(path.weighted, weight)
                if isinstance(rate, Tensor):
                    path.weighted.add_(weight * rate)
                else:
                    path.weighted.add_(weight, alpha=rate)
        path.rate, path.last_rate = path.rate + rate, rate
        path.steps += 1

    def _follow(
        self,
        path: Path,
        target: Target,
        optimizer: Optimizer | None,
        group: Mapping[str, Any],
        weight: Tensor,
    ) -> None:
        """What the step before this one did, read from the state it left: SGD's tells."""
        if not _is_plain_sgd(optimizer):
            return
        nesterov = bool(group.get("nesterov"))
        before = self._previous.pop(target.name, None)
        if path.steps > 0 and path.totals is not None:
            state: Mapping[Any, Any] = optimizer.state
            buffer = state.get(target.parameter, {}).get("momentum_buffer")
            moved = None
            if nesterov and before is not None and buffer is not None:
                change = (before - weight) / path.last_rate
                cross = _total(_dots(change, target.matrix(buffer))) * path.last_rate
                path.crossed = (
                    cross if path.crossed is None else _beside(path.crossed, cross) + cross
                )
                moved = _square(change) * path.last_rate
            elif not nesterov and group.get("momentum") and buffer is not None:
                moved = _square(target.matrix(buffer.detach())) * path.last_rate
            elif not group.get("momentum") and path.latest is not None:
                moved = _plain_change(path.latest, group) * path.last_rate
            if moved is not None:
                path.moved = moved if path.moved is None else _beside(path.moved, moved) + moved
                path.behind = path.totals[1].clone()
        if nesterov:
            self._previous[target.name] = weight.clone()


def _is_plain_sgd(optimizer: Optimizer | None) -> TypeGuard[SGD]:
    """Whether it steps as torch's own does."""
    return isinstance(optimizer, SGD) and type(optimizer).step is SGD.step


def _plain_change(latest: Tensor, group: Mapping[str, Any]) -> Tensor:
    """‖G + λW‖² from ⟨W,G⟩, ‖W‖², ‖G‖²: without momentum, of −ΔW/η."""
    dot, weight, gradient = latest
    decay = float(group.get("weight_decay") or 0.0)
    squared: Tensor = gradient + 2 * decay * dot + decay**2 * weight
    return squared.clamp_min(0.0)


def _scalars(weight: Tensor, gradient: Tensor, scale: float | Tensor) -> Tensor:
    """``[3, rows]``: ⟨w_r, g_r⟩, ‖w_r‖², ‖g_r‖², the gradient divided by ``scale``."""
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    gradient = gradient.to(weight.dtype)
    dot, own, other = _dots(weight, gradient), _squares(weight), _squares(gradient)
    if not isinstance(scale, float) or scale != 1.0:
        dot, other = dot / scale, other / scale**2
    return torch.stack([dot, own, other])


def _scalars_of_all(
    weight: Tensor, gradient: Tensor, scale: float | Tensor, *, known: bool
) -> Tensor:
    """``[3]``, float64: ⟨W, G⟩, ‖W‖² and, where it is to be ``known``, ‖G‖², else 0."""
    gradient = gradient.to(weight.dtype)
    dot = _wide(_dot(weight, gradient)) / scale
    other = _square(gradient) / scale**2 if known else torch.zeros_like(dot)
    return torch.stack([dot, _square(weight), other])


def _square(matrix: Tensor) -> Tensor:
    """‖M‖², float64."""
    return _wide(_dot(matrix, matrix))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """⟨A, B⟩, in float32 or wider; in one pass where they lie in memory alike."""
    if one.dtype not in (torch.float32, torch.float64):
        one, other = one.float(), other.float()
    if one.is_contiguous() and other.is_contiguous():
        return torch.dot(one.view(-1), other.view(-1))
    return _dots(one.flatten(0, -2), other.flatten(0, -2)).sum()


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """The inner products of the rows."""
    products: Tensor = torch.linalg.vecdot(one, other.to(one.dtype))
    return products


def _squares(matrix: Tensor) -> Tensor:
    """The squared norms of the rows: read once, and nothing of the matrix's size is written."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return norms.square()


def _total(rows: Tensor) -> Tensor:
    """The sum of a number per row, in float64."""
    return _wide(rows).sum()


def _bias(target: Target) -> nn.Parameter | None:
    """The bias that is added to a layer's product, one number a row."""
    module = target.module
    name = "in_proj_bias" if isinstance(module, nn.MultiheadAttention) else "bias"
    if target.functional and name == "bias":
        return None
    bias = getattr(module, name, None)
    if not isinstance(bias, nn.Parameter) or bias.dim() != 1 or is_sharded(bias):
        return None
    whole = target.part is not None or len(bias) == target.groups * target.d_out
    return bias if whole else None


def _rate(group: Mapping[str, Any]) -> float | Tensor:
    rate = group.get("lr", _NAN)
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)


def _beside(held: Tensor, other: Tensor) -> Tensor:
    """What was held, on the device of ``other``: a state may have been loaded to another."""
    return held if held.device == other.device else held.to(other.device)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.to(torch.float64)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _plain(path: Path) -> dict[str, Any]:
    kept = {name: _copied(getattr(path, name)) for name in ("steps", "slopes", *_TENSORS)}
    return kept | {
        "rate": float(path.rate),
        "last_rate": float(path.last_rate),
        "decays": None if path.decays is None else list(path.decays),
        "history": [list(entry) for entry in path.history],
        "ring": [_copied(rows) for rows in path.ring],
        "bias": [_copied(rows) for rows in path.bias],
        "counted": [_copied(taken) for taken in path.counted],
    }


def _restored(kept: Mapping[str, Any]) -> Path:
    path = Path(**{name: _copied(kept[name]) for name in kept if name not in _REBUILT})
    path.decays = None if kept["decays"] is None else (kept["decays"][0], kept["decays"][1])
    path.history = [(age, norm) for age, norm in kept["history"]]
    for name in ("ring", "bias", "counted"):
        getattr(path, name).extend(_copied(value) for value in kept[name])
    return path


_TENSORS = ("totals", "latest", "moved", "crossed", "behind", "start", "weighted")
_REBUILT = ("decays", "history", "ring", "bias", "counted")
