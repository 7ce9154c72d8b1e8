"""C-NFA paper, Fig. 1: W^T W and W^T K W agree, not with K's eigenvectors drawn anew.

Chain monomial of rank 5 in 32 dimensions, 384 points, two hidden ReLU layers of width 128, no bias,
labels of standard deviation 1 (App. H). The paper names no learning rate and no number of steps
here: those of its Fig. 2 are used (0.05, 800 steps of full batches). "Initialization scale 0.01" is
read as the variance, W_ij ~ N(0, s/k), as §2 defines it, and as the standard deviation.

    python examples/papers/centered_fig1.py            # 5 seeds, half a minute
    python examples/papers/centered_fig1.py --fast
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from paper_lab import Experiment, Results, axes, chain_monomial, initialise, mlp
from torch.nn import functional as F

from feature_probe import Report, measure

#: Reading of the initialisation scale: s of the first layer's variance s/k.
READINGS = {"variance 0.01/k": 0.01, "standard deviation 0.01/√k": 1e-4}


def train(seed: int, scale: float, points: int, width: int, steps: int) -> tuple[Report, float]:
    """Train one network; its report at the end (nfa at s = 1, first layer) and its loss."""
    torch.manual_seed(seed)
    x = torch.randn(points, 32)
    y = chain_monomial(x)
    y = y / y.std()
    model = mlp((32, width, width, 1))
    initialise(model, scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x).squeeze(1), y).backward()
        optimizer.step()
    report = measure(model, [(x, y)], relations="nfa", powers=1.0, include="0", progress=False)
    return report, F.mse_loss(model(x).squeeze(1), y).item()


def random_eigenvectors(report: Report, seed: int) -> tuple[torch.Tensor, float, float]:
    """WᵀQW with the spectrum of K, its cosine with WᵀW, and K's spread over its mean eigenvalue."""
    statistics = report.statistics["0"]
    assert statistics.jacobian is not None
    weight, jacobian = statistics.weight[0].double(), statistics.jacobian[0].double()
    values = torch.linalg.eigvalsh(jacobian)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(jacobian.shape, generator=generator).double()).Q
    other = weight.T @ (basis * values) @ basis.T @ weight
    gram = weight.T @ weight
    cosine = (gram * other).sum() / gram.norm() / other.norm()
    return other, float(cosine), float(values.std() / values.mean())


def main(argv: Sequence[str] | None = None) -> Results:
    """Run all seeds of both readings."""
    run = Experiment(__file__, __doc__, argv)
    points, width, steps = (128, 64, 200) if run.fast else (384, 128, 800)
    figure, grid = axes(1, 4, width=2.0, height=2.2)
    for reading, scale in READINGS.items():
        own, drawn, levels, spreads = [], [], [], []
        for seed in run.seeds:
            report, _ = train(seed, scale, points, width, steps)
            record = report.record("0", "nfa", 1.0)
            other, cosine, spread = random_eigenvectors(report, seed)
            own.append(record.cosine)
            drawn.append(cosine)
            levels.append(record.shared_weight_cosine)
            spreads.append(spread)
            if seed == 0 and reading == next(iter(READINGS)):
                _draw(grid[0], report, other, (record.cosine, cosine))
        run.row(f"{reading}: ρ(WᵀW, WᵀKW)", "0.93", own)
        run.row(
            f"{reading}: ρ(WᵀW, WᵀQW), Q of K's spectrum, one draw", "0.53", drawn,
            "one draw of Q a network, so that it scatters as the level by chance does (next row)",
        )  # fmt: skip
        run.row(f"{reading}: the same by the record, `shared_weight_cosine`", "", levels)
        run.row(f"{reading}: K's eigenvalues, standard deviation over mean", "5.9", spreads)
    return run.finish(figure)


def _draw(
    grid: Sequence, report: Report, other: torch.Tensor, cosines: tuple[float, float]
) -> None:
    target = torch.zeros(32, 32)  # E[∇y ∇yᵀ]: ∂y/∂x_i is the sum of its two neighbours
    for i in range(5):
        for j in range(5):
            shared = len({(i - 1) % 5, (i + 1) % 5} & {(j - 1) % 5, (j + 1) % 5})
            target[i, j] = float(shared)
    shown = {
        "EGOP of the target": target,
        "WᵀW": report.matrix("0", "nfm"),
        f"WᵀKW, ρ = {cosines[0]:.2f}": report.matrix("0", "nfa", 1.0),
        f"WᵀQW, ρ = {cosines[1]:.2f}": other,
    }
    for axis, (title, matrix) in zip(grid, shown.items(), strict=True):
        limit = float(matrix.abs().max())
        axis.imshow(matrix[:12, :12].numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(visible=False)


if __name__ == "__main__":
    main()
