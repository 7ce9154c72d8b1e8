"""FACT paper, Fig. 11: deep linear networks agree with FACT and with AGOP^(1/L), at every depth.

d = 10, c = 5, width 512, L layers without bias, W* standard normal, n = 5,000 standard normal
inputs, MSE (the mean over entries), SGD with batches of 128, learning rate 5e-3, weight decay 1e-2,
5,000 epochs, PyTorch's initialisation (App. C). One run a depth, as the longest takes most of an
hour; the figure shows the depths that were run. Then 250 epochs at a tenth of the learning rate
take the noise of minibatches away and little else: what they change was that noise.

    python examples/papers/fact_fig11.py --depth 2         # minutes on one core: 2; L = 5: 40
    python examples/papers/fact_fig11.py --depth 2 --fast
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from paper_lab import COLORS, Experiment, Results, axes, mlp
from torch.nn import functional as F

from feature_probe import Report, measure

DECAY, RATE, BATCH = 1e-2, 5e-3, 128
POWERS = (1 / 5, 1 / 4, 1 / 3, 1 / 2, 1.0)
DEPTHS = (2, 3, 4, 5)


def train(depth: int, seed: int, fast: bool) -> tuple[Report, Report]:
    """Train one network; its reports over all the data, before and after the slower epochs."""
    torch.manual_seed(seed)
    width, count, epochs, speed = (32, 256, 400, 8) if fast else (512, 5000, 5000, 1)
    slower = 20 if fast else 250
    x = torch.randn(count, 10)
    y = x @ torch.randn(5, 10).T
    model = mlp((10, *[width] * (depth - 1), 5), activation=None)
    # the fast setting runs the decay clock ηλ faster by the larger learning rate
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE * speed, weight_decay=DECAY)
    batches = list(zip(x.split(1000), y.split(1000), strict=True))

    def run(epochs: int) -> Report:
        for _ in range(epochs):
            for chosen in torch.randperm(count).split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
        return measure(
            model, batches, F.mse_loss, weight_decay=DECAY, relations=("fact", "nfa"),
            powers=POWERS, progress=False,
        )  # fmt: skip

    ended = run(epochs)
    for group in optimizer.param_groups:
        group["lr"] /= 10
    return ended, run(slower)


def main(argv: Sequence[str] | None = None) -> Results:
    """Run one depth."""
    run = Experiment(__file__, __doc__, argv, seeds=1, depth=DEPTHS)
    depth = run.options.depth
    run.results.name += f"_depth{depth}"
    run.results.title = f"FACT paper, Fig. 11: linear network of {depth} layers"
    pairs = [train(depth, seed, run.fast) for seed in run.seeds]
    reports, calmed = zip(*pairs, strict=True)

    def first(relation: str, power: float | None = None) -> list[float]:
        return [report.record("0", relation, power).cosine for report in reports]

    layers = reports[0].layers
    after = min(r.record("0", "fact").cosine for r in calmed)
    noise = f"the noise of minibatches: {after:.4f} after the slower epochs"
    short = min(first("fact")) < 0.999 <= after
    run.row("layer 1: cosine of FACT", "≥ 0.999", first("fact"), noise if short else "")
    lowest = [min(r.record(layer, "fact").cosine for layer in layers) for r in reports]
    run.row("lowest cosine of FACT over all layers", "", lowest)
    lowest = [min(r.record(layer, "fact").cosine for layer in layers) for r in calmed]
    run.row("the same after 250 epochs more at a tenth of the rate", "", lowest)
    run.row("layer 1: cosine of AGOP^(1/L)", "close to 1", first("nfa", 1 / depth))
    for power in POWERS:
        if power != 1 / depth:
            run.row(f"layer 1: cosine of AGOP^{power:.3g}", "", first("nfa", power))
    figure, grid = axes(1, 1)
    curves = {depth: [first("nfa", power)[0] for power in POWERS]}
    for path in run.options.out.glob("fact_fig11_depth?.json"):
        other = json.loads(path.read_text(encoding="utf-8"))
        curves.setdefault(int(path.stem[-1]), _read(other["rows"]))
    axis = grid[0, 0]
    for (number, values), color in zip(sorted(curves.items()), COLORS, strict=False):
        axis.plot(POWERS, values, "o-", color=color, label=f"L = {number}", markersize=4)
    axis.set(xlabel="power s", ylabel="cosine of AGOP^s with WᵀW, layer 1", xscale="log")
    axis.set_xticks(POWERS, ["1/5", "1/4", "1/3", "1/2", "1"])
    axis.minorticks_off()
    axis.legend()
    return run.finish(figure)


def _read(rows: list[dict[str, object]]) -> list[float]:
    """The cosines at all powers, from the rows of another depth."""
    found = {}
    for row in rows:
        what, values = str(row["what"]), row["values"]
        assert isinstance(values, list)
        if "AGOP^(1/L)" in what:
            own = values[0]
        elif "AGOP^" in what:
            found[what.rpartition("^")[2]] = values[0]
    return [found.get(f"{power:.3g}", own) for power in POWERS]


if __name__ == "__main__":
    main()
