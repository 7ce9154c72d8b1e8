"""Kernels k(u, v) of mapped points u = Wx, and the sums of their gradients that RFMs are made of.

Conventions, L the bandwidth, r = ‖u − v‖ and t = ⟨u, v⟩, so that r and t are those of M = WᵀW:

===============  ================================  =============================================
kernel           k                                 gradient in u, per pair
===============  ================================  =============================================
Laplace          exp(−r/L)                         −k/(L r) (u − v)
Gaussian         exp(−r²/(2L²))                    −k/L² (u − v)
LpExponential    exp(−(‖u − v‖_p/L)^q)             −(q/L^q) k ‖u − v‖_p^(q−p) sgn |u − v|^(p−1)
Polynomial       (offset + t/L²)^degree            (degree/L²)(offset + t/L²)^(degree−1) v
Exponential      exp(t/L²)                         k/L² v
===============  ================================  =============================================

Where a kernel has a kink (Laplace, and LpExponential with q ≤ 1) its gradient at coincident points
is 0. Two points count as coincident where their squared distance is lost in the rounding of their
norms. Nothing here forms an array of pairs by coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, finite_number, positive_integer

#: k(u, v) of ``[n, d]`` and ``[m, d]``, to ``[n, m]``, differentiable by autograd.
KernelFunction = Callable[[Tensor, Tensor], Tensor]
Form = Literal["distance", "inner product"]
#: A squared distance below this many roundings of the squared norms is none.
_ROUNDINGS = 8


class Pairs(ABC):
    """The gradients of k(u_i, v_j) in u_i, for all pairs, to be summed over j."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_j A_ij ∂k(u_i, v_j)/∂u_i: weights A ``[n, m]``, to ``[n, d]``."""

    @abstractmethod
    def stacked(self, dual: Tensor) -> Tensor:
        """∂f_c(u_i)/∂u_i of f = k(·, v)α: dual α ``[m, c]``, to ``[n, c, d]``."""


@dataclass(frozen=True)
class Kernel(ABC):
    """A kernel of mapped points.

    Attributes:
        bandwidth: L > 0.
    """

    bandwidth: float = 1.0

    #: What it depends on beside norms: the one is unchanged if all points are shifted.
    form = "distance"

    def __post_init__(self) -> None:
        finite_number("bandwidth", self.bandwidth, positive=True)

    @abstractmethod
    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """k(u_i, v_j): ``[n, d]`` and ``[m, d]``, to ``[n, m]``."""

    @abstractmethod
    def pairs(self, u: Tensor, v: Tensor) -> Pairs:
        """The gradients of all pairs of ``[n, d]`` and ``[m, d]``."""

    def with_bandwidth(self, bandwidth: float) -> Kernel:
        """The same kernel with another L."""
        return replace(self, bandwidth=bandwidth)

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """What the median heuristic takes the median of: ‖u − v‖, ``[n, m]``."""
        return _squared_distances(u, v).sqrt()


@dataclass(frozen=True)
class _Slopes(Pairs):
    """Gradients P_ij (u_i − v_j), or P_ij v_j of inner products."""

    slopes: Tensor
    u: Tensor
    v: Tensor
    differences: bool

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_j A_ij P_ij (u_i − v_j), or without u_i."""
        return self._summed(self.slopes * weights)

    def _summed(self, product: Tensor) -> Tensor:
        if not self.differences:
            return product @ self.v
        return torch.addmm(product.sum(1, keepdim=True) * self.u, product, self.v, alpha=-1)

    def stacked(self, dual: Tensor) -> Tensor:
        """One product of matrices a group of outputs, as many as make a right side of P's size."""
        count, inputs = self.v.shape
        at_once = max(1, self.slopes.numel() // (count * inputs))
        parts = []
        for start in range(0, dual.shape[1], at_once):
            columns = dual[:, start : start + at_once]
            right = (columns[:, :, None] * self.v[:, None, :]).flatten(1)
            part = (self.slopes @ right).reshape(len(self.u), -1, inputs)
            if self.differences:
                own = (self.slopes @ columns)[:, :, None] * self.u[:, None, :]
                part = own.sub_(part)
            parts.append(part)
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Laplace(Kernel):
    """exp(−r/L), the kernel of the RFM papers on tabular data."""

    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """k(u_i, v_j)."""
        return _squared_distances(u, v).sqrt_().div_(-self.bandwidth).exp_()

    def pairs(self, u: Tensor, v: Tensor) -> Pairs:
        """Slopes −k/(L r), 0 at r = 0, for which r → ∞ stands: its slope is 0 too."""
        r = _squared_distances(u, v, coincident=math.inf).sqrt_().mul_(-self.bandwidth)
        slopes = torch.div(r, self.bandwidth**2).exp_().div_(r)
        return _Slopes(slopes, u, v, differences=True)


@dataclass(frozen=True)
class Gaussian(Kernel):
    """exp(−r²/(2L²))."""

    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """k(u_i, v_j)."""
        return _squared_distances(u, v).div_(-2 * self.bandwidth**2).exp_()

    def pairs(self, u: Tensor, v: Tensor) -> Pairs:
        """Slopes −k/L²."""
        return _Slopes(self.values(u, v).div_(-(self.bandwidth**2)), u, v, differences=True)


@dataclass(frozen=True)
class LpExponential(Kernel):
    """exp(−(‖u − v‖_p/L)^q), positive definite for 0 < q ≤ p ≤ 2; not invariant to rotation.

    Attributes:
        p: Of the norm.
        exponent: q.
    """

    p: float = 1.0
    exponent: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.exponent <= self.p <= 2:
            raise ConfigurationError(
                "LpExponential needs 0 < exponent <= p <= 2, else it is not positive definite; "
                f"got p={self.p!r}, exponent={self.exponent!r}"
            )

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """‖u − v‖_p, ``[n, m]``."""
        if self.p >= 1:
            return torch.cdist(u, v, p=self.p, compute_mode="donot_use_mm_for_euclid_dist")
        total = u.new_zeros(len(u), len(v))
        for column in range(u.shape[1]):
            total += (u[:, column, None] - v[:, column]).abs_().pow_(self.p)
        return total.pow_(1 / self.p)

    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """k(u_i, v_j)."""
        return self.distance(u, v).div_(self.bandwidth).pow_(self.exponent).neg_().exp_()

    def pairs(self, u: Tensor, v: Tensor) -> Pairs:
        """−(q/L^q) k ‖u − v‖_p^(q−p), 0 at u = v."""
        size = self.distance(u, v)
        slopes = torch.exp(-((size / self.bandwidth) ** self.exponent))
        slopes *= -self.exponent / self.bandwidth**self.exponent * size ** (self.exponent - self.p)
        return _ByCoordinate(slopes.masked_fill_(size == 0, 0.0), u, v, self.p)


@dataclass(frozen=True)
class _ByCoordinate(Pairs):
    """Gradients P_ij sgn(u_i − v_j)|u_i − v_j|^(p−1), one coordinate after the other."""

    slopes: Tensor
    u: Tensor
    v: Tensor
    p: float

    def _terms(self, column: int) -> Tensor:
        differences = self.u[:, column, None] - self.v[:, column]
        if self.p == 1:
            return differences.sign_().mul_(self.slopes)
        powers = differences.abs().pow_(self.p - 1)
        # below p = 1 the power is infinite at 0, where the sign is 0 and the gradient, too
        powers.masked_fill_(differences == 0, 0.0)
        return powers.mul_(differences.sign_()).mul_(self.slopes)

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_j A_ij of it."""
        columns = [(self._terms(c) * weights).sum(1) for c in range(self.u.shape[1])]
        return torch.stack(columns, dim=1)

    def stacked(self, dual: Tensor) -> Tensor:
        """Σ_j α_jc of it."""
        return torch.stack([self._terms(c) @ dual for c in range(self.u.shape[1])], dim=2)


@dataclass(frozen=True)
class _InnerProduct(Kernel):
    """k(t), t = ⟨u, v⟩."""

    form = "inner product"

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """k'(t)."""

    def pairs(self, u: Tensor, v: Tensor) -> Pairs:
        """Slopes k'(t)."""
        return _Slopes(self.slope(u @ v.T), u, v, differences=False)


@dataclass(frozen=True)
class Polynomial(_InnerProduct):
    """(offset + t/L²)^degree; degree 2 and offset 0, the quadratic kernel, if not said otherwise.

    Attributes:
        degree: At least 1.
        offset: At least 0, else it is not positive definite.
    """

    degree: int = 2
    offset: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer("degree", self.degree)
        finite_number("offset", self.offset, positive=False)

    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """k(u_i, v_j)."""
        return (u @ v.T).div_(self.bandwidth**2).add_(self.offset).pow_(self.degree)

    def slope(self, t: Tensor) -> Tensor:
        """(degree/L²)(offset + t/L²)^(degree−1)."""
        scale = self.bandwidth**2
        return self.degree / scale * (self.offset + t / scale) ** (self.degree - 1)


@dataclass(frozen=True)
class Exponential(_InnerProduct):
    """exp(t/L²): the Gaussian kernel but for the norms of u and v."""

    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """k(u_i, v_j)."""
        return (u @ v.T).div_(self.bandwidth**2).exp_()

    def slope(self, t: Tensor) -> Tensor:
        """k/L²."""
        scale = self.bandwidth**2
        return torch.exp(t / scale) / scale


@dataclass(frozen=True)
class AutogradKernel(Kernel):
    """A kernel of one's own: ``function(u / L, v / L)``, its gradients by autograd.

    Attributes:
        function: k of ``[n, d]`` and ``[m, d]``, to ``[n, m]``, with a gradient at every pair,
            coincident points included (a square root needs a safeguard at 0).
    """

    function: KernelFunction = torch.inner

    form = "inner product"  # nothing is known of shifts

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise ConfigurationError(f"kernel must be callable, got {self.function!r}")

    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """k(u_i, v_j), checked for its shape."""
        found: object = self.function(u / self.bandwidth, v / self.bandwidth)
        if not isinstance(found, Tensor) or found.shape != (len(u), len(v)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigurationError(
                f"the kernel function must return [{len(u)}, {len(v)}] for [{len(u)}, d] and "
                f"[{len(v)}, d], got {shape}"
            )
        return found

    def pairs(self, u: Tensor, v: Tensor) -> Pairs:
        """By autograd, at each call."""
        return _ByAutograd(self, u, v)


@dataclass(frozen=True)
class _ByAutograd(Pairs):
    kernel: AutogradKernel
    u: Tensor
    v: Tensor

    def weighted(self, weights: Tensor) -> Tensor:
        """The gradient of Σ_ij A_ij k(u_i, v_j) in u."""
        return self._gradients([lambda values: (values * weights).sum()])[0]

    def stacked(self, dual: Tensor) -> Tensor:
        """The gradient of Σ_i f_c(u_i) in u, for each c."""

        def total(column: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda values: (values @ column).sum()

        totals = [total(column) for column in dual.unbind(1)]
        return torch.stack(self._gradients(totals), dim=1)

    def _gradients(self, totals: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        with torch.enable_grad():
            u = self.u.detach().requires_grad_()
            values = self.kernel.values(u, self.v)
            if not values.requires_grad:
                raise ConfigurationError("the kernel function's values do not depend on its input")
            found = [
                torch.autograd.grad(total(values), u, retain_graph=True)[0] for total in totals
            ]
        if not all(bool(gradient.isfinite().all()) for gradient in found):
            raise ConfigurationError(
                "the kernel function's gradient is not finite; where it has a square root, say at "
                "coincident points, take it of max(., tiny) or add a small number inside"
            )
        return found


def _squared_distances(u: Tensor, v: Tensor, coincident: float = 0.0) -> Tensor:
    """‖u_i − v_j‖², ``[n, m]``; ``coincident`` where it is lost in rounding."""
    own = u.square().sum(1, keepdim=True)
    found = torch.addmm(v.square().sum(1), u, v.T, alpha=-2).add_(own)
    # points that coincide have one norm: twice the own one is both
    noise = own.mul_(2 * _ROUNDINGS * torch.finfo(u.dtype).eps)
    return found.masked_fill_(found <= noise, coincident)


#: Kernels by the name that an estimator takes.
KERNELS: dict[str, type[Kernel]] = {
    "laplace": Laplace,
    "gaussian": Gaussian,
    "lp_exponential": LpExponential,
    "quadratic": Polynomial,
    "exponential": Exponential,
}


def make_kernel(kernel: str | Kernel | KernelFunction) -> Kernel:
    """A kernel by name, one that is given, or one around a function.

    Raises:
        ConfigurationError: for a name that there is not, or something else.
    """
    if isinstance(kernel, Kernel):
        return kernel
    given: object = kernel
    if isinstance(given, type) and issubclass(given, Kernel):
        raise ConfigurationError(f"kernel is a class: give an object, {given.__name__}()")
    if isinstance(kernel, str) and kernel in KERNELS:
        return KERNELS[kernel]()
    if not callable(kernel):
        raise ConfigurationError(
            f"unknown kernel {kernel!r}; choose from {', '.join(KERNELS)}, or give a Kernel or a "
            "function of two tensors"
        )
    return AutogradKernel(function=kernel)
