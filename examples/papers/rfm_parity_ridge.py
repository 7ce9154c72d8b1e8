"""FACT paper, Fig. 3 and 4 once more: which ridge lets an RFM find a parity of k = 4.

The same machines as in rfm_parity.py at d = 20, where n = 1,450 and 2,900 are as many points beside
the products of three inputs, C(d, 3), as the paper's 25,000 and 50,000 are at d = 50. The Gaussian
kernel of bandwidth L at ±1/√d has, a point, the eigenvalue e_j = (dL²)⁻ʲ (but for a common factor
and higher orders) on products of j inputs: λ far above e_j leaves them out of the fit, λ far below
fits them. 8 iterations.

    python examples/papers/rfm_parity_ridge.py
    python examples/papers/rfm_parity_ridge.py --fast
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from paper_lab import COLORS, LINES, Experiment, Results, axes
from rfm_parity import BANDWIDTH, Setting, train

SHOWN = ("FACT-RFM", "NFA-RFM, s = 1")
K, INPUTS, POINTS, ITERATIONS = 4, 20, (1450, 2900), 8
RIDGES = tuple(range(4, 15))


def main(argv: Sequence[str] | None = None) -> Results:
    """Best accuracy by ridge."""
    run = Experiment(__file__, __doc__, argv, seeds=2)
    k, inputs, sizes, ridges = K, INPUTS, POINTS, RIDGES
    if run.fast:
        k, inputs, sizes, ridges = 2, 10, (60,), (1, 4, 10)
    eigenvalues = [(inputs * BANDWIDTH**2) ** -j for j in range(1, k + 1)]
    run.results.columns = list(SHOWN)
    figure, grid = axes(1, len(sizes), width=3.2, height=2.4)
    for axis, points in zip(grid[0], sizes, strict=True):
        best: dict[str, list[float]] = {method: [] for method in SHOWN}
        for ridge in ridges:
            setting = Setting(k, points, inputs, ITERATIONS, 10.0**-ridge, signs=False)
            for method in SHOWN:
                found = [
                    max(step["accuracy"] for step in train(method, setting, seed))
                    for seed in run.seeds
                ]
                best[method].append(statistics.fmean(found))
                run.row(f"n = {points:,}, λ = 1e-{ridge}: {method}", "", found)
        for (method, values), color, line in zip(best.items(), COLORS, LINES, strict=False):
            x = [10.0**-ridge for ridge in ridges]
            axis.plot(x, values, color=color, linestyle=line, marker=".", label=method)
        for order, value in enumerate(eigenvalues, 1):
            axis.axvline(value, color="black", linewidth=0.6, linestyle=":")
            axis.text(value, 0.42, f"e{order}", fontsize=7)
        share = points / math.comb(inputs, k - 1)
        axis.set(title=f"n = {points:,} = {share:.2f} C({inputs}, {k - 1})")
        axis.set(xscale="log", xlabel="λ", ylabel="best test accuracy", ylim=(0.4, 1.03))
    grid[0, 0].legend(fontsize=7, loc="center left", bbox_to_anchor=(0, 0.7))
    powers = ", ".join(f"{value:.0e}" for value in eigenvalues)
    run.results.note = (
        f"Best test accuracy of {ITERATIONS} iterations; e_1 to e_{k} are {powers}. FACT-RFM "
        "learns where λ leaves the parity out of the fit but not all of lower order, whose noise "
        "would cover it in α = (y − f)/(nλ); NFA-RFM needs f itself to have some of the parity, "
        "so λ below e_k and more points."
    )
    return run.finish(figure)


if __name__ == "__main__":
    main()
