"""Dual weights: direct and by conjugate gradients, chosen by size; what cannot be solved."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from feature_probe import FeatureProbeError
from feature_probe.rfm import Gaussian, Laplace, Polynomial, solve
from feature_probe.rfm.kernels import AutogradKernel
from feature_probe.rfm.solvers import Solver, chosen_solver


def points(count: int = 300, inputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and targets in float64."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, inputs, generator=draw, dtype=torch.float64)
    return x, torch.randn(count, 2, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("kernel", [Laplace(3.0), Gaussian(2.0)])
@pytest.mark.parametrize("solver", ["cholesky", "iterative"])
def test_the_residual_of_the_system(kernel: Laplace, solver: str) -> None:
    """(K + nλI)α = Y, by both, though the second never has all of K."""
    x, y = points()
    found = solve(kernel, x, y, 1e-3, solver=solver, tolerance=1e-9, memory=50_000)  # type: ignore[arg-type]
    matrix = torch.stack([kernel.values(row[None], x)[0] for row in x])
    residual = (matrix + 0.3 * torch.eye(300, dtype=torch.float64)) @ found.dual - y
    assert float(residual.norm() / y.norm()) < 1e-8
    assert found.solver == solver
    assert (found.steps > 0) == (solver == "iterative")
    assert found.residual <= 1e-9


def test_preconditioned_gradients_take_few_steps() -> None:
    """Landmarks are most of what a smooth kernel has: far fewer steps than points."""
    x, y = points()
    assert solve(Gaussian(3.0), x, y, 1e-4, solver="iterative", tolerance=1e-8).steps < 30


def test_the_solver_is_chosen_by_size() -> None:
    """K fits and leaves room for blocks, or not; what is asked for is taken as it is."""
    need = 4 * 1000**2 * 4 // 3
    assert chosen_solver("auto", 1000, torch.float32, need + 1) == "cholesky"
    assert chosen_solver("auto", 1000, torch.float32, need - 1) == "iterative"
    assert chosen_solver("auto", 1000, torch.float64, need) == "iterative"
    assert chosen_solver("cholesky", 1000, torch.float64, 1) == "cholesky"


def test_conjugate_gradients_that_stop_early_say_so() -> None:
    """A warning with the residual that was reached, and the solution as far as it is."""
    x, y = points()
    with pytest.warns(RuntimeWarning, match="stopped after 2 steps"):
        found = solve(Laplace(1.0), x, y, 1e-9, solver="iterative", most_steps=2, memory=1000)
    assert found.residual > 1e-4


def test_a_direct_solution_holds_one_matrix_of_all_pairs() -> None:
    """The factor takes K's place, and K is made in blocks: no other array of its size."""
    script = (
        "import resource, torch; from feature_probe.rfm import Laplace, solve;"
        "x = torch.randn({count}, 5); y = torch.randn({count}, 1);"
        "solve(Laplace(3.0), x, y, 1e-3, memory=2**25, solver='cholesky');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", script.format(count=count)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for count in (100, 4000)
    ]
    matrix = 4000**2 * 4 / 1024
    assert peaks[1] - peaks[0] < 1.6 * matrix


@pytest.mark.parametrize("ridge", [0.0, 1e-30])
def test_singular_at_no_ridge(ridge: float) -> None:
    """Equal rows, and a kernel of low rank: an error that says what to do."""
    x, y = points(50)
    doubled = torch.cat([x, x]), torch.cat([y, y])
    for kernel, (inputs, targets) in (
        (Laplace(2.0), doubled),
        (Polynomial(1.0), (x[:, :2], y)),
    ):
        with pytest.raises(FeatureProbeError, match=r"singular.*larger ridge"):
            solve(kernel, inputs, targets, ridge)
    assert solve(Laplace(2.0), x, y, ridge).dual.isfinite().all()  # different rows: well-posed


@pytest.mark.parametrize("solver", ["cholesky", "iterative"])
def test_values_that_overflow_are_refused(solver: Solver) -> None:
    """A cubic of large inputs in float32, and a function that gives NaN: by their own name."""
    x, y = points(20)
    with pytest.raises(FeatureProbeError, match="values are not finite"):
        solve(Polynomial(1e-14, degree=3), x.float(), y.float(), 1e-3, solver=solver)
    log = AutogradKernel(function=lambda u, v: (u @ v.T).log())
    with pytest.raises(FeatureProbeError, match="values are not finite"):
        solve(log, x, y, 1e-3, solver=solver)


@pytest.mark.parametrize("solver", ["cholesky", "iterative"])
def test_a_function_that_is_no_kernel_is_refused(solver: Solver) -> None:
    """Values whose matrix has negative eigenvalues; float64 is not advised where it is."""
    x, y = points(50)
    negative = AutogradKernel(function=lambda u, v: -torch.exp(-torch.cdist(u, v)))
    with pytest.raises(FeatureProbeError, match=r"not positive definite.*larger ridge$"):
        solve(negative, x, y, 1e-3, solver=solver)


def test_conjugate_gradients_that_diverge_are_refused() -> None:
    """Equal rows with different targets at no ridge have no solution."""
    x, _ = points(60)
    y = torch.randn(120, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FeatureProbeError, match=r"diverged.*singular"):
        solve(Laplace(2.0), torch.cat([x, x]), y, 0.0, solver="iterative")


def test_the_residual_is_the_systems_own() -> None:
    """In float32 the recurrence goes on falling where the solution does not."""
    x, y = points(200)
    kernel, ridge = Laplace(10.0), 1e-6
    found = solve(kernel, x.float(), y.float(), ridge, solver="iterative", tolerance=1e-7)
    system = kernel.values(x, x) + 200 * ridge * torch.eye(200, dtype=torch.float64)
    true = (system @ found.dual.double() - y).norm(dim=0) / y.norm(dim=0)
    assert found.residual == pytest.approx(float(true.max()), rel=0.5, abs=2e-7)
