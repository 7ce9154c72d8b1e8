"""Time and peak memory of an RFM iteration, against the package xrfm on the same data.

Both fit the same machine: Laplace kernel, one output, float32, M = AGOP over its largest entry, the
same n·λ, validation points scored at every iteration, on the CPU. xrfm solves with an LU
factorization unless told to take Cholesky's, so it is timed with both. An iteration is a solve, the
validation score and AGOP; a fit of T of them solves once more. The three fits follow each other,
the order turned every time, as often as REPEATS says; ratios are taken within each round. Memory is
the peak of a process of its own, less what it had before the fit.

    pip install xrfm
    python tests/benchmarks/rfm.py                 # writes rfm.json and rfm.md beside this file
    python tests/benchmarks/rfm.py --points 1000 --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_probe.rfm import Iteration, RecursiveFeatureMachine

INPUTS, HELD, BANDWIDTH, RIDGE = 50, 1000, 5.0, 1e-3
#: By n: iterations of a fit, and rounds.
REPEATS = {1000: (5, 15), 5000: (3, 7), 20000: (1, 3)}
OURS, LU, CHOLESKY = "feature_probe", "xrfm, LU (its default)", "xrfm, Cholesky"

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def data(points: int) -> Data:
    """y = 1 where x₀x₁ > 0, and noise: training and held-out points."""
    draw = torch.Generator().manual_seed(points)
    x = torch.randn(points + HELD, INPUTS, generator=draw)
    y = (x[:, 0] * x[:, 1] > 0).float() + 0.3 * torch.randn(len(x), generator=draw)
    y = y[:, None]
    return x[:points], y[:points], x[points:], y[points:]


def ours(given: Data, iterations: int) -> float:
    """Mean squared error on held-out points."""
    x, y, test_x, test_y = given
    last: deque[Iteration] = deque(maxlen=1)  # fit keeps the best, xrfm as called here the last
    RecursiveFeatureMachine(
        update="nfa", kernel="laplace", bandwidth=BANDWIDTH, ridge=RIDGE, iterations=iterations,
        rescale="max", callbacks=[last.append],
    ).fit(x, y, validation=(test_x, test_y))  # fmt: skip
    return float((last[0].machine(test_x) - test_y).square().mean())


def theirs(solver: str, given: Data, iterations: int) -> float:
    """The same of xrfm."""
    from xrfm import RFM  # noqa: PLC0415  (only where it is installed)

    x, y, test_x, test_y = given
    model = RFM(
        kernel="l2", bandwidth=BANDWIDTH, iters=iterations, device="cpu", tuning_metric="mse",
        diag=False, verbose=False, exponent=1.0,
    )  # fmt: skip
    model.fit(
        (x, y), (test_x, test_y), iters=iterations, reg=RIDGE * len(x), method="lstsq",
        solver=solver, verbose=False, return_best_params=False, early_stop_rfm=False,
    )  # fmt: skip
    return float((model.predict(test_x).reshape(-1, 1) - test_y).square().mean())


FITS: dict[str, Callable[[Data, int], float]] = {
    OURS: ours,
    LU: partial(theirs, "solve"),
    CHOLESKY: partial(theirs, "cholesky"),
}


def _report_peak(name: str, points: int, pipe: Connection) -> None:
    """In a process of its own: bytes at the peak of a fit of one iteration over those before it."""
    FITS[name](data(200), 1)
    given = data(points)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
    before = _resident("VmRSS")
    FITS[name](given, 1)
    pipe.send(_resident("VmHWM") - before)


def _resident(entry: str) -> int:
    """Bytes of this process, now (VmRSS) or at their peak (VmHWM); Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {entry} in /proc/self/status")


def peak(name: str, points: int) -> int:
    """Bytes that a fit takes at its peak."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_report_peak, args=(name, points, there))
    process.start()
    there.close()
    try:
        return int(here.recv())
    finally:
        process.join()


def measure(points: int) -> dict[str, Any]:
    """Seconds an iteration by round, errors and peaks, of one n."""
    iterations, rounds = REPEATS[points]
    given = data(points)
    names = list(FITS)
    for fit in FITS.values():
        fit(data(200), 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, float] = {}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            errors[name] = FITS[name](given, iterations)
            seconds[name].append((time.perf_counter() - start) / (iterations + 1))
    peaks = {name: peak(name, points) for name in names}
    return {
        "points": points, "iterations": iterations, "seconds": seconds, "errors": errors,
        "peaks": peaks,
    }  # fmt: skip


def markdown(found: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """Table of ratios: ours over theirs, median and range of the rounds."""
    lines = [
        "# An RFM iteration against xrfm",
        "",
        "`python tests/benchmarks/rfm.py`: ours over theirs, below 1 is faster or smaller; median "
        "(lowest to highest) over rounds. What is compared stands at the top of that file.",
        "",
        "| n | against | time ratio | seconds, ours | peak ratio | MiB, ours | n² float32, MiB "
        "| error, ours | error, theirs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        own = one["seconds"][OURS]
        for name in (LU, CHOLESKY):
            pairs = zip(own, one["seconds"][name], strict=True)
            ratios = [mine / other for mine, other in pairs]
            lines.append(
                f"| {one['points']:,} | {name} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) | {statistics.median(own):.2f} "
                f"| {one['peaks'][OURS] / one['peaks'][name]:.2f} "
                f"| {one['peaks'][OURS] / 2**20:,.0f} | {4 * one['points'] ** 2 / 2**20:,.0f} "
                f"| {one['errors'][OURS]:.5f} | {one['errors'][name]:.5f} |"
            )
    said = ", ".join(f"{name} {value}" for name, value in environment.items())
    return "\n".join([*lines, "", f"{said}."]) + "\n"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "xrfm": version("xrfm"),
        "Python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, nargs="+", choices=REPEATS, default=list(REPEATS))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="xrfm")
    found = [measure(points) for points in options.points]
    kept = {"environment": environment(), "sizes": found}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rfm.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    table = markdown(found, kept["environment"])
    (options.out / "rfm.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
