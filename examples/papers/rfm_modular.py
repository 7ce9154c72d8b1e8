"""FACT paper, Fig. 5 and 6: FACT-RFM and NFA-RFM grok addition modulo 61.

One-hot pairs (x, y), labels x + y mod p one-hot, half of all pairs to train on, 75 iterations,
FACT with geometric averaging (§4.3). The kernel, the ridge and the power of NFA-RFM are not
printed: here the quadratic kernel ⟨u, v⟩² of the inner product, as §5 needs one, λ = 1e-6 and
s = 1/2. At the start the test accuracy is at chance although the training data are fitted.

M, [2p, 2p], has four blocks [p, p]; a circulant one is constant along its diagonals. Fig. 6:
k'(x_iᵀMx_j) and τ(x_i, M, x_j) of pairs of training points, and the line through
0 that fits best.

    python examples/papers/rfm_modular.py
    python examples/papers/rfm_modular.py --fast
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from paper_lab import COLORS, LINES, Experiment, Results, axes
from rfm_parity import root
from torch import Tensor

from feature_probe.rfm import Iteration, RecursiveFeatureMachineClassifier

MODULUS, ITERATIONS, RIDGE = 61, 75, 1e-6
METHODS: dict[str, dict[str, Any]] = {
    "FACT-RFM": {"update": "fact", "geometric_averaging": True},
    "NFA-RFM": {"update": "nfa", "power": 0.5},
}

#: What the paper shows of each.
SHOWN = {"FACT-RFM": "√(FACT·Mᵀ)", "NFA-RFM": "√AGOP"}


def data(p: int) -> tuple[Tensor, Tensor]:
    """All pairs one-hot, ``[p², 2p]``, and their sums mod p."""
    first, second = torch.cartesian_prod(torch.arange(p), torch.arange(p)).unbind(1)
    x = torch.zeros(p * p, 2 * p, dtype=torch.float64)
    x[torch.arange(p * p), first] = 1
    x[torch.arange(p * p), p + second] = 1
    return x, (first + second) % p


def circulant_share(matrix: Tensor) -> float:
    """Share of the variance of M's entries, block by block, that its circulant part has.

    Circulant: entries depend on column less row, mod p. The diagonal of M is left out: it is what M
    starts with. Of random entries 1/p is expected.
    """
    p = len(matrix) // 2
    kept = total = 0.0
    for row, column in ((0, 0), (0, p), (p, 0), (p, p)):
        block = matrix[row : row + p, column : column + p]
        numbers = torch.arange(p)
        lines = torch.stack([block[numbers, (numbers + s) % p] for s in range(p)])
        lines = lines[1:] if row == column else lines
        lines = lines - lines.mean()
        kept += float(lines.mean(1).square().sum()) * p
        total += float(lines.square().sum())
    return kept / total


def train(method: str, p: int, iterations: int, seed: int) -> dict[str, Any]:
    """Test accuracy by iteration; at the end M, and k' and τ of all pairs of training points."""
    x, y = data(p)
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    chosen, held = order[: p * p // 2], order[p * p // 2 :]
    accuracy: list[float] = []

    def read(iteration: Iteration) -> None:
        predicted = iteration.machine(x[held]).argmax(1)
        accuracy.append(float((predicted == y[held]).double().mean()))
        last.append(iteration)

    last: deque[Iteration] = deque(maxlen=1)
    model = RecursiveFeatureMachineClassifier(
        kernel="quadratic", bandwidth=1.0, ridge=RIDGE, iterations=iterations, callbacks=[read],
        history=True, **METHODS[method],
    ).fit(x[chosen], y[chosen])  # fmt: skip
    matrix = model.feature_matrix_
    slopes = 2 * x[chosen] @ matrix @ x[chosen].T
    tau = slopes.T @ slopes / len(slopes)
    return {
        "accuracy": accuracy, "fitted": model.score(x[chosen], y[chosen]), "matrix": matrix,
        "slopes": slopes, "tau": tau, "root": root(last[0], METHODS[method]["update"]),
    }  # fmt: skip


def proportional(slopes: Tensor, tau: Tensor) -> tuple[float, float]:
    """The factor of the best τ ≈ c·k', and R² = 1 − Σ(τ − ck')²/Στ²."""
    factor = (tau * slopes).sum() / slopes.square().sum()
    return float(factor), float(1 - (tau - factor * slopes).square().sum() / tau.square().sum())


def main(argv: Sequence[str] | None = None) -> Results:
    """Run both methods."""
    run = Experiment(__file__, __doc__, argv, seeds=2)
    p, iterations = (29, 45) if run.fast else (MODULUS, ITERATIONS)
    run.results.title = f"FACT paper, Fig. 5 and 6: RFMs on x + y mod {p}"
    found = {m: [train(m, p, iterations, seed) for seed in run.seeds] for m in METHODS}
    for method, runs in found.items():
        run.row(f"{method}: training accuracy at the end", "1", [one["fitted"] for one in runs])
        best = [max(one["accuracy"]) for one in runs]
        run.row(f"{method}: highest test accuracy", "1", best)
        run.row(f"{method}: test accuracy at the end", "", [one["accuracy"][-1] for one in runs])
        late = [_first(one["accuracy"], 0.1) for one in runs]
        run.row(f"{method}: iterations until 10 % are right", "late", late)
        all_right = [_first(one["accuracy"], 0.99) for one in runs]
        run.row(f"{method}: iterations until 99 % are right", "", all_right)
        share = [circulant_share(one["matrix"]) for one in runs]
        run.row(f"{method}: circulant share of M's blocks", "block-circulant", share)
        shown = f"{method}: circulant share of {SHOWN[method]}'s blocks"
        run.row(shown, "block-circulant", [circulant_share(one["root"]) for one in runs])
        fits = [proportional(one["slopes"], one["tau"])[1] for one in runs]
        run.row(f"{method}: R² of τ ∝ k'", "a good fit" if "FACT" in method else "", fits)
    figure, grid = axes(2, 3, width=2.5, height=2.3)
    for (method, runs), row, color, line in zip(found.items(), grid, COLORS, LINES, strict=False):
        one = runs[0]
        row[0].plot(one["accuracy"], color=color, linestyle=line)
        row[0].set(title=method, xlabel="iteration", ylabel="test accuracy", ylim=(-0.02, 1.02))
        matrix = one["root"] - torch.diag(one["root"].diagonal())
        row[1].imshow(matrix.numpy(), cmap="cividis", interpolation="nearest")
        row[1].set(title=f"{SHOWN[method]}, off its diagonal")
        row[1].grid(visible=False)
        draw = torch.Generator().manual_seed(0)
        some = torch.randint(0, one["tau"].numel(), (1000,), generator=draw)
        slopes, tau = one["slopes"].flatten()[some], one["tau"].flatten()[some]
        factor, _ = proportional(one["slopes"], one["tau"])
        row[2].plot(slopes, tau, ".", color=color, markersize=2)
        ends = torch.stack([slopes.min(), slopes.max()])
        row[2].plot(ends, factor * ends, "k-", linewidth=0.8)
        row[2].set(xlabel="k'(x_iᵀMx_j)", ylabel="τ(x_i, M, x_j)", title="1,000 pairs")
    return run.finish(figure)


def _first(accuracy: Sequence[float], above: float) -> float:
    """The first iteration with so many right; infinite where none has."""
    return next((float(i) for i, value in enumerate(accuracy) if value >= above), float("inf"))


if __name__ == "__main__":
    main()
