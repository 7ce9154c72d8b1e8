"""Kernel machines pair by pair, with autograd: shares no code with feature_probe.rfm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from feature_probe.rfm import (
    AutogradKernel,
    Exponential,
    Gaussian,
    Kernel,
    Laplace,
    LpExponential,
    Polynomial,
)


def cauchy(u: Tensor, v: Tensor) -> Tensor:
    """1/(1 + r²), a kernel of one's own."""
    squares = (u[:, None, :] - v[None, :, :]).square().sum(2)
    return 1 / (1 + squares)


KERNELS: dict[str, Kernel] = {
    "laplace": Laplace(2.0),
    "gaussian": Gaussian(1.5),
    "l1.3": LpExponential(2.0, p=1.3, exponent=0.7),
    "l1": LpExponential(2.0, p=1.0, exponent=1.0),
    "l0.8": LpExponential(2.0, p=0.8, exponent=0.6),
    "quadratic": Polynomial(1.2),
    "cubic": Polynomial(2.0, degree=3, offset=1.0),
    "exponential": Exponential(2.5),
    "own": AutogradKernel(1.5, cauchy),
}


def pair(name: str, u: Tensor, v: Tensor) -> Tensor:
    """k of two points, as the docstring of kernels.py has it."""
    r = (u - v).square().sum().sqrt()
    t = (u * v).sum()
    formulas = {
        "laplace": lambda: torch.exp(-r / 2),
        "gaussian": lambda: torch.exp(-(r**2) / (2 * 1.5**2)),
        "l1.3": lambda: torch.exp(-((((u - v).abs() ** 1.3).sum() ** (1 / 1.3) / 2) ** 0.7)),
        "l1": lambda: torch.exp(-(u - v).abs().sum() / 2),
        "l0.8": lambda: torch.exp(-((((u - v).abs() ** 0.8).sum() ** (1 / 0.8) / 2) ** 0.6)),
        "quadratic": lambda: (t / 1.2**2) ** 2,
        "cubic": lambda: (1 + t / 4) ** 3,
        "exponential": lambda: torch.exp(t / 2.5**2),
        "own": lambda: 1 / (1 + (r / 1.5) ** 2),
    }
    return formulas[name]()


def pair_gradient(name: str, root: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """∂k(Wx, Wz)/∂x; 0 by definition where the kernel has a kink and the points coincide."""
    if torch.equal(x, other) and name in ("laplace", "l1.3", "l1", "l0.8", "own", "gaussian"):
        return torch.zeros_like(x)  # for the smooth ones of distance it is so
    point = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(pair(name, root @ point, root @ other), point)
    return found


def jacobians(name: str, root: Tensor, x: Tensor, dual: Tensor) -> Tensor:
    """∂f_c(x_i)/∂x, ``[n, c, d]``."""
    rows = []
    for point in x:
        terms = [
            weights[:, None] * pair_gradient(name, root, point, other)
            for weights, other in zip(dual, x, strict=True)
        ]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows)


def gram(name: str, root: Tensor, x: Tensor) -> Tensor:
    """K, ``[n, n]``."""
    return torch.stack([torch.stack([pair(name, root @ a, root @ b) for b in x]) for a in x])


def fact(x: Tensor, y: Tensor, predictions: Tensor, jacobian: Tensor, ridge: float) -> Tensor:
    """−(1/nλ) Σ ∇ₓℓ(f(x_i), y_i) x_iᵀ with ℓ = ½‖·‖² (FACT paper, Theorem 3.1)."""
    slopes = torch.stack([(p - t) @ j for p, t, j in zip(predictions, y, jacobian, strict=True)])
    return -(slopes.T @ x) / (len(x) * ridge)


def agop(jacobian: Tensor) -> Tensor:
    """(1/n) Σ_i Σ_c ∇f_c(x_i) ∇f_c(x_i)ᵀ."""
    total = torch.zeros(jacobian.shape[2], jacobian.shape[2], dtype=jacobian.dtype)
    for rows in jacobian:
        for row in rows:
            total += torch.outer(row, row)
    return total / len(jacobian)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a symmetric positive semi-definite matrix, by scipy."""
    from scipy.linalg import fractional_matrix_power  # noqa: PLC0415

    assert math.isfinite(exponent)
    return torch.as_tensor(fractional_matrix_power(matrix.numpy(), exponent).real)
