"""α = (K + nλI)⁻¹Y: directly while K fits in memory, by conjugate gradients beyond.

Which of the two is decided by size before anything is computed, never by whether the other failed.
The preconditioner is that of Frangella, Tropp and Udell, *Randomized Nyström preconditioning*
(arXiv:2110.02820), from columns of K drawn at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feature_probe.errors import FeatureProbeError
from feature_probe.rfm.features import blocks
from feature_probe.rfm.kernels import Kernel

Solver = Literal["auto", "cholesky", "iterative"]
SOLVERS: tuple[Solver, ...] = ("auto", "cholesky", "iterative")
#: Of the memory, what K may take; its factor takes its place, the rest is for blocks.
_SHARE = 0.75
_LANDMARKS = 4000


@dataclass(frozen=True)
class Solution:
    """Dual weights, and how they were found.

    Attributes:
        dual: α, ``[n, c]``.
        solver: "cholesky" or "iterative".
        residual: ‖(K + nλI)α − Y‖/‖Y‖ of the worst column; 0 of a direct solution.
        steps: Of conjugate gradients.
    """

    dual: Tensor
    solver: str
    residual: float = 0.0
    steps: int = 0


def chosen_solver(asked: Solver, points: int, dtype: torch.dtype, memory: int) -> str:
    """What is asked for; of "auto" "cholesky" if K takes three quarters of ``memory`` at most."""
    if asked != "auto":
        return asked
    return "cholesky" if points**2 * dtype.itemsize <= _SHARE * memory else "iterative"


def solve(
    kernel: Kernel,
    u: Tensor,
    targets: Tensor,
    ridge: float,
    *,
    solver: Solver = "auto",
    memory: int = 2**32,
    tolerance: float = 1e-4,
    most_steps: int = 1000,
    generator: torch.Generator | None = None,
) -> Solution:
    """α of kernel ridge regression at mapped points.

    Args:
        kernel: k.
        u: Mapped training points, ``[n, d]``.
        targets: Y, ``[n, c]``.
        ridge: λ ≥ 0; n·λ is added to the diagonal of K (FACT paper, Algorithm 1).
        solver: Which; "auto" by size.
        memory: Bytes that K, and what blocks of it are made of, may take.
        tolerance: Of conjugate gradients: relative residual of each column.
        most_steps: Of conjugate gradients; a warning says that they were not enough.
        generator: For the columns of the preconditioner, on the CPU.

    Raises:
        FeatureProbeError: if K + nλI is singular to working precision, or a number is not finite.
    """
    shift = len(u) * ridge
    if chosen_solver(solver, len(u), u.dtype, memory) == "cholesky":
        return _direct(kernel, u, targets, shift, memory)
    return _conjugate(kernel, u, targets, shift, memory, tolerance, most_steps, generator)


def _direct(kernel: Kernel, u: Tensor, targets: Tensor, shift: float, memory: int) -> Solution:
    count = len(u)
    matrix = u.new_empty(count, count)
    for rows in blocks(count, count, u.dtype, memory):
        matrix[rows] = kernel.values(u[rows], u)
    _require_finite(matrix)
    matrix.diagonal().add_(shift)
    # LAPACK's factor takes the place of the matrix if that is stored by columns
    factor, info = matrix.mT, torch.zeros((), dtype=torch.int32, device=u.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    diagonal = factor.diagonal()
    # a pivot of the size of rounding is noise: what it would give are not weights
    noise = diagonal.max().square() * torch.finfo(u.dtype).eps
    if int(info) or not bool((diagonal.square() > noise).all()):
        raise FeatureProbeError(_singular(count, shift, u.dtype))
    # cholesky_solve would copy the factor
    halfway = torch.linalg.solve_triangular(factor, targets, upper=False)
    return Solution(
        _checked(torch.linalg.solve_triangular(factor.mT, halfway, upper=True)), "cholesky"
    )


def _conjugate(
    kernel: Kernel,
    u: Tensor,
    targets: Tensor,
    shift: float,
    memory: int,
    tolerance: float,
    most_steps: int,
    generator: torch.Generator | None,
) -> Solution:
    count = len(u)

    def times(vectors: Tensor) -> Tensor:
        found = torch.empty_like(vectors)
        for rows in blocks(count, count, u.dtype, memory):
            found[rows] = kernel.values(u[rows], u) @ vectors
        return found.add_(vectors, alpha=shift)

    condition = _preconditioner(kernel, u, shift, memory, generator)
    size = targets.norm(dim=0)
    size = torch.where(size == 0, torch.ones_like(size), size)
    dual = torch.zeros_like(targets)
    residual = targets.clone()
    direction = condition(residual)
    along = (residual * direction).sum(0)
    worst, step = float((residual.norm(dim=0) / size).max()), 0
    while worst > tolerance and step < most_steps:
        image = times(direction)
        curvature = (direction * image).sum(0)
        length = torch.where(curvature > 0, along / curvature, torch.zeros_like(along))
        dual += length * direction
        residual -= length * image
        conditioned = condition(residual)
        now = (residual * conditioned).sum(0)
        direction = conditioned + torch.where(along > 0, now / along, torch.zeros_like(now)) * (
            direction
        )
        along = now
        step += 1
        worst = float((residual.norm(dim=0) / size).max())
        _checked(residual)
    # the recurrence drifts from what it stands for
    found = float(((targets - times(_checked(dual))).norm(dim=0) / size).max())
    if found > 1:
        raise FeatureProbeError(
            f"conjugate gradients diverged (relative residual {found:.1e} after {step} steps): "
            + _singular(count, shift, u.dtype)
        )
    if worst > tolerance:
        warnings.warn(
            f"conjugate gradients stopped after {step} steps at a relative residual of "
            f"{found:.1e} (asked: {tolerance:.1e}); a larger ridge converges sooner",
            RuntimeWarning,
            stacklevel=4,
        )
    return Solution(dual, "iterative", found, step)


def _preconditioner(
    kernel: Kernel, u: Tensor, shift: float, memory: int, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """v ↦ P⁻¹v with P = U(Λ + nλ)Uᵀ/(λ_m + nλ) + (I − UUᵀ), UΛUᵀ ≈ K from some of its columns."""
    count = len(u)
    landmarks = min(count, _LANDMARKS, max(16, memory // (4 * count * u.dtype.itemsize)))
    chosen = torch.randperm(count, generator=generator)[:landmarks].to(u.device)
    columns = kernel.values(u, u[chosen])
    _require_finite(columns)
    inner = columns[chosen].double()
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    if float(values[-1]) <= 0:
        raise FeatureProbeError(_singular(count, shift, u.dtype))
    keep = values > values[-1] * landmarks * torch.finfo(u.dtype).eps
    whitened = columns @ (vectors[:, keep] / values[keep].sqrt()).to(u.dtype)
    del columns
    squares, turned = torch.linalg.eigh((whitened.T @ whitened).double())
    keep = squares > squares[-1] * torch.finfo(u.dtype).eps
    squares = squares[keep].to(u.dtype)
    basis = whitened @ (turned[:, keep].to(u.dtype) / squares.sqrt())
    weights = (squares[0] + shift) / (squares + shift) - 1

    def condition(vectors: Tensor) -> Tensor:
        correction: Tensor = basis @ (weights[:, None] * (basis.T @ vectors))
        return vectors + correction

    return condition


def _require_finite(matrix: Tensor) -> None:
    """Refuse kernel values that overflow; a sum tells, without an array of truth values."""
    if not bool(matrix.sum().isfinite()) and not bool(matrix.isfinite().all()):
        raise FeatureProbeError(
            "the kernel's values are not finite: they overflow (give a larger bandwidth, or "
            "standardise X and y), or the kernel function gives NaN"
        )


def _singular(count: int, shift: float, dtype: torch.dtype) -> str:
    wider = ", or float64" if dtype is torch.float32 else ""
    return (
        f"the kernel matrix of {count} points with n·ridge = {shift:g} on its diagonal is "
        f"singular in {str(dtype).removeprefix('torch.')} (equal or nearly equal rows after the "
        "feature map, or a kernel of low rank) or not positive definite (a kernel function that is "
        f"none): give a larger ridge{wider}"
    )


def _checked(tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise FeatureProbeError(
            "the dual weights are not finite: kernel values overflow (a larger bandwidth, or "
            "smaller inputs) or the kernel is not positive definite"
        )
    return tensor
