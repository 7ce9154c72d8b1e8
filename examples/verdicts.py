"""Prove the probe's verdicts: networks x optimizers at rest and stopped early, against the truth.

    python examples/verdicts.py                   # everything; writes examples/verdicts.md
    python examples/verdicts.py --jobs 4          # the same in four processes

The truth is worked out by brute force in verdict_lab/truth.py, without feature_probe. What is
expected of a record, in this order, and which words its reason must hold:

- no weight decay on the layer (by the table of the run): "not applicable", no weight decay; a
  frozen layer likewise, frozen;
- gradient forms under decoupled decay, update forms under coupled decay: "not applicable",
  decoupled or coupled decay;
- gradient forms of a layer that can be multiplied by 1.5 without changing the training loss: "not
  applicable", scale-invariant; at frozen weights, which do not show that, "cannot tell", likewise;
- in the loop: "not yet" or "approaching" if further training finds the mean weight to move by more
  than 40 % per unit of decay age, or under coupled decay the mean gradient not to balance the decay
  to 60 %. "cannot tell" will do, too, for Adam with L2, which has no decay age, where the steps'
  own noise is half of what is seen, and where the weight only turns at one size;
- if it moves by less than 10 % and balances to 15 %, it is at rest: "holds" where W and the mean
  gradient or update of the same window agree to a cosine of 0.96 and 13 %, "cannot tell: a longer
  window" where they are more than 17 % apart. Update forms of one step are undefined, and scale
  invariance is not asked for before eight followed steps;
- at frozen weights: "holds" if the full gradient gives WᵀW to a cosine of 0.95 and within 15 %, and
  not so if it balances the decay to no better than 30 %;
- nfa of the last layer: "trivial"; other nfa and enfa, in the loop and frozen: "aligned" if the
  cosine leads the highest of 300 dense random eigenvector draws, and the same network before
  training, by a tenth of the way to 1 and four spreads of the draws; "at chance" or below if more
  than 1 in 20 draws reaches it or their mean is within 7 % of the way (or, with fewer than ten
  examples per output row, "cannot tell").

What lies between is open and not scored.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from verdict_lab.expectations import STAGES, Judged, judge_run
from verdict_lab.training import Setting
from verdict_lab.untrained import TIMM, small_networks, timm_networks

#: Learning rate and λ of the table's runs.
TABLE = {
    "sgd": (0.3, 1e-2),
    "momentum": (0.05, 1e-2),
    "adam+l2": (5e-3, 5e-3),
    "adamw": (8e-3, 0.5),
    "lion": (1.5e-3, 2.0),
}
#: The same for the transformer, which a larger λ brings to zero under SGD.
TRANSFORMER = {"sgd": (0.6, 5e-3), "momentum": (0.08, 5e-3)}
NETWORKS = ("mlp", "mlp+bn", "conv", "conv+bn", "transformer")


def table_settings() -> list[Setting]:
    """The cells of the table."""
    settings = [Setting(net, opt, *TABLE[opt]) for net in NETWORKS[:-1] for opt in TABLE]
    rates = TABLE | TRANSFORMER
    return settings + [
        Setting(NETWORKS[-1], opt, *rates[opt], examples=512, batch=64) for opt in rates
    ]


def held_out_settings(count: int = 44, seed: int = 20) -> list[Setting]:
    """Runs that no threshold was chosen on: drawn at random, with what the table leaves out."""
    draw = random.Random(seed)
    rates = TABLE | {
        "nesterov": (0.04, 1e-2),
        "nadamw": (5e-3, 0.5),
        "radamw": (5e-3, 0.6),
        "muon": (1e-2, 0.4),
    }
    networks = [*NETWORKS, "mlp+ln", "conv+gn", "post-ln"]
    settings = []
    for number in range(count):
        net, opt = networks[number % len(networks)], draw.choice(list(rates))
        attends = net in ("transformer", "post-ln")
        lr, decay = (rates | TRANSFORMER if attends else rates)[opt]
        setting = Setting(
            net, opt, lr * draw.uniform(0.7, 1.3), decay * draw.uniform(0.7, 1.3),
            age=6.0,
            early=draw.choice((0.15, 0.3)),
            width=16 if attends else draw.choice((16, 24, 32)),
            settle=1.5,
            examples=draw.choice((192, 256, 384)),
            batch=draw.choice((16, 32, 64)),
            window=draw.choice((1, 4, 20, 64, 160, 256)),
            schedule=draw.choice(("constant", "warmup", "cosine")),
            activation=draw.choice(("gelu", "relu", "tanh")),
            seed=100 + number,
        )  # fmt: skip
        if number % 11 == 3:
            setting = replace(setting, decay=0.0)
        elif number % 11 == 6 and opt != "muon":
            setting = replace(setting, only=_SOME_LAYER[net])
        elif number % 11 == 9:
            setting = replace(setting, frozen=_SOME_LAYER[net])
        settings.append(setting)
    return settings


_SOME_LAYER = {
    "mlp": "3", "mlp+bn": "3", "mlp+ln": "3", "conv": "3", "conv+bn": "3", "conv+gn": "3",
    "transformer": "block.attention.out", "post-ln": "block.mlp.0",
}  # fmt: skip


#: Which scores a stage is about.
_SCORES = {
    "window": ("fact", "bfact", "update_fact", "update_bfact"),
    "frozen": ("fact", "bfact"),
}
#: What is changed in one run of the table to find out why a score falls short, and what to read.
CAUSES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("window of 128 steps (16 passes over the data)", "window", {}),
    ("window of 32 steps", "window", {"window": 32}),
    ("window of 4 steps: minibatch noise", "window", {"window": 4}),
    ("frozen weights after full batches and a falling learning rate", "frozen", {}),
    ("frozen weights straight from minibatches", "frozen", {"settle": 0.0}),
    ("the same full batches with ReLU for GELU: kinks", "frozen", {"activation": "relu"}),
    ("ReLU, window of 128 steps: kinks average out", "window", {"activation": "relu"}),
)


def run_all(settings: Sequence[Setting], jobs: int, title: str) -> list[list[Judged]]:
    """Judge runs in the order given, in several processes, and tell how it goes."""
    start, found = time.perf_counter(), []
    with ProcessPoolExecutor(jobs) as pool:
        for number, judged in enumerate(pool.map(judge_run, settings), 1):
            found.append(judged)
            bad = [j for j in judged if j.kind not in ("right", "open")]
            took = time.perf_counter() - start
            print(
                f"{title} {number}/{len(settings)}, {took:.0f} s: {judged[0].run}: {_tally(judged)}"
            )
            for j in bad:
                print("   ", _line(j))
    return found


def scores_at_rest(judged: Iterable[Judged], stage: str, *, noisy: bool = False) -> list[Judged]:
    """The equalities of a stage at rest in truth that hold, or are too noisy to show it."""
    expected = "cannot tell" if noisy else "holds"
    return [
        j
        for j in judged
        if j.stage == stage and j.label in _SCORES[stage] and j.at_rest and expected in j.expected
    ]


def _lowest(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.4f}" if found else "–"


def _tally(judged: Iterable[Judged]) -> str:
    kinds = [j.kind for j in judged]
    order = ("right", "false alarm", "miss", "undecided", "wrong reason", "open")
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in order if kinds.count(kind))


def _line(j: Judged) -> str:
    wanted = " or ".join(j.expected)
    return (
        f"{j.kind}: {j.run}, {j.stage}, layer {j.layer}, {j.label}: {j.verdict!r}, expected "
        f"{wanted!r}; {j.because[:120]}"
    )


def untrained_lines(count: int) -> list[str]:
    """Lines on networks without training."""
    lines = []
    for title, networks in (
        (f"{count} small networks, each measured twice", small_networks(count)),
        (f"{len(TIMM)} of timm's", timm_networks()),
    ):
        seen = list(networks)
        for beside in sorted({network.beside_another for network in seen}):
            chosen = [network for network in seen if network.beside_another is beside]
            alarms = [alarm for network in chosen for alarm in network.alarms]
            judged = sum(network.judged for network in chosen)
            how = (
                f", with the score of another untrained one as initial= ({_NOT_SO})"
                if beside
                else ""
            )
            lines.append(f"{title}{how}: {judged} records, {len(alarms)} called aligned")
            lines += [f"  - {alarm}" for alarm in alarms]
        print("\n".join(lines))
    return lines


#: What a census line says of a use that is not meant.
_NOT_SO = "not what it asks for: it must be this network's own before training"


def cells(settings: Sequence[Setting], found: Sequence[Sequence[Judged]]) -> list[str]:
    """The table: one row per run."""
    lines = [
        "| network | optimizer | window (passes) | early | at rest, window | nfa, enfa, window "
        "| at rest, frozen | lowest cosine: window | frozen | too noisy for the window "
        "| those over two units of decay age |",
        "|---" * 11 + "|",
    ]
    for setting, judged in zip(settings, found, strict=True):
        passes = setting.window * setting.batch / setting.examples
        parts = [setting.network, setting.optimizer, f"{setting.window} ({passes:.2g})"]
        parts += [_tally(j for j in judged if j.stage == stage) for stage in STAGES]
        parts += [
            _lowest(j.cosine for j in scores_at_rest(judged, stage))
            for stage in ("window", "frozen")
        ]
        noisy = scores_at_rest(judged, "window", noisy=True)
        lowest = _lowest(j.cosine for j in noisy)
        parts.append(f"{len(noisy)}, lowest {lowest}" if noisy else "–")
        parts.append(_lowest(j.long for j in noisy))
        lines.append(f"| {' | '.join(parts)} |")
    return lines


def why(j: Judged, setting: Setting) -> str:
    """What a verdict that is not right comes from."""
    if j.stage in ("early", "window") and setting.window * setting.batch < setting.examples:
        return "the window is shorter than a pass over the data"
    if "bias it low" in j.because:
        return "fewer than ten examples per output row"
    if j.stage in ("learned", "frozen"):
        return "close to the spreads that are asked for"
    if "minibatch noise alone" in j.because:
        return "no decay age (Adam with L2), and no more than minibatch noise would give"
    return "noise of the window, or of the norm from report to report"


def _errors(settings: Sequence[Setting], found: Sequence[Sequence[Judged]]) -> list[str]:
    """What is not right: counted by stage and cause, then one by one."""
    bad = [
        (j.kind, j.stage, why(j, setting), j)
        for setting, judged in zip(settings, found, strict=True)
        for j in judged
        if j.kind not in ("right", "open")
    ]
    if not bad:
        return ["Nothing."]
    groups = Counter((kind, stage, cause) for kind, stage, cause, _ in bad)
    lines = ["| | stage | cause | verdicts |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {count} |" for key, count in groups.most_common()]
    shown = [f"- {_line(j)}" for _, _, _, j in bad]
    return [*lines, "", "<details><summary>one by one</summary>", "", *shown, "", "</details>"]


def _by_stage(found: Sequence[Sequence[Judged]]) -> list[str]:
    kinds = ("right", "false alarm", "miss", "undecided", "wrong reason", "open")
    lines = [f"| stage | {' | '.join(kinds)} |", "|---" * 7 + "|"]
    for stage in STAGES:
        seen = Counter(j.kind for judged in found for j in judged if j.stage == stage)
        lines.append(f"| {stage} | {' | '.join(str(seen[kind]) for kind in kinds)} |")
    return lines


def _summary(found: Sequence[Sequence[Judged]]) -> str:
    return f"{len(found)} runs, verdicts: {_tally(j for judged in found for j in judged)}."


def _part(settings: Sequence[Setting], found: Sequence[Sequence[Judged]]) -> list[str]:
    """Counts by stage, one row a run, and what is not right."""
    errors = _errors(settings, found)
    return [*_by_stage(found), "", *cells(settings, found), "", "Not right, by cause:", "", *errors]


def page(
    table: Sequence[Sequence[Judged]],
    causes: Sequence[Sequence[Judged]],
    held_out: Sequence[Sequence[Judged]],
    untrained: Sequence[str],
) -> str:
    """examples/verdicts.md."""
    kinds = [j.kind for judged in held_out for j in judged]
    lines = [
        "# Verdicts against the truth",
        "",
        "Written by `python examples/verdicts.py`, where it stands what is expected of a verdict. "
        "False alarm: it is said to hold, to be aligned or not to apply, and that is not so. Miss: "
        "it is so, and not said. Undecided: it does not hold, and the verdict says so for a more "
        "general reason or leaves it open. Open: the truth lies between, not scored.",
        "",
        "Last columns: the lowest cosine of the equalities at rest; how many more are at rest, but "
        "in a window too noisy to show it, with the lowest; and what brute force finds for the "
        "same layers over two units of decay age in its place: noise is what they fall short by.",
        "",
        "## Networks x optimizers",
        "",
        _summary(table),
        "",
        *_part(table_settings(), table),
        "",
        "## What lowers the score at rest",
        "",
        "The plain network under SGD with momentum, one thing changed at a time; the lowest cosine "
        "of FACT over the layers.",
        "",
        "| | lowest cosine |",
        "|---|---|",
        *(
            f"| {what} | {_lowest_fact(judged, stage):.4f} |"
            for (what, stage, _), judged in zip(CAUSES, causes, strict=True)
        ),
        "",
        "## Held-out runs",
        "",
        _summary(held_out),
        "",
        f"**False alarms: {kinds.count('false alarm')}. Misses: {kinds.count('miss')}.**",
        "",
        *_part(held_out_settings(), held_out),
        "",
        "## Untrained networks",
        "",
        *(line if line.startswith("  ") else f"- {line}" for line in untrained),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run everything and write examples/verdicts.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    given = parser.parse_args()
    table = run_all(table_settings(), given.jobs, "table")
    base = Setting("mlp", "momentum", *TABLE["momentum"])
    changed = [replace(base, **change) for _, _, change in CAUSES]
    causes = run_all(changed, given.jobs, "causes")
    held_out = run_all(held_out_settings(), given.jobs, "held out")
    untrained = untrained_lines(112)
    text = page(table, causes, held_out, untrained)
    given.out.write_text(text, encoding="utf-8")
    print(text)


def _lowest_fact(judged: Sequence[Judged], stage: str) -> float:
    return min(j.cosine for j in judged if j.stage == stage and j.label == "fact")


if __name__ == "__main__":
    main()
