"""What the scripts of this folder share: settings, seeds, figures in one style, and their results.

Every script reproduces one figure or table of a paper: ``python examples/papers/NAME.py`` runs the
paper's own setting, ``--fast`` a small one for the tests. It prints each number beside the paper's,
writes them to ``results/NAME.json``, from which ``table.py`` makes ``examples/README.md``, and
saves ``results/NAME.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from torch import Tensor, nn

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
#: Options that choose what is shown of the numbers, not the numbers.
_SHOWING = ("stored",)
#: Okabe and Ito's colours, told apart by the colour-blind; with these line styles also in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


@dataclass(frozen=True)
class Row:
    """One number of a paper, and ours.

    Attributes:
        what: Which number.
        paper: As printed, "" where the paper gives none.
        values: Ours, one a seed.
        why: What explains a difference, and how that was tested.
    """

    what: str
    paper: str
    values: list[float]
    why: str = ""

    @property
    def ours(self) -> str:
        """Mean and spread over seeds."""
        mean = statistics.fmean(self.values)
        if len(self.values) == 1:
            return f"{mean:.3f}"
        return f"{mean:.3f} ± {statistics.stdev(self.values):.3f}"


@dataclass
class Results:
    """What a script found.

    Attributes:
        name: The script's.
        title: Paper and figure.
        command: The script with its options, which finds the same again.
        fast: Whether at the small setting.
        rows: The numbers.
        note: What is to be said of all of it, and how that was tested.
        columns: Of a result that is a table in the paper too: rows are named "row: column".
        minutes: How long it took, of one core.
    """

    name: str
    title: str
    command: str
    fast: bool
    rows: list[Row] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    note: str = ""
    minutes: float = math.nan

    def __str__(self) -> str:
        setting = " (fast setting)" if self.fast else ""
        lines = [f"{self.title}{setting}: {self.minutes:.1f} minutes"]
        lines += [
            f"  {row.what}: {row.ours}" + (f" (paper: {row.paper})" if row.paper else "")
            for row in self.rows
        ]
        return "\n".join(lines)


class Experiment:
    """Options, the clock and the places of one script's results.

    Args:
        script: Its file.
        doc: Its docstring.
        argv: Arguments; None: the command line's.
        seeds: How many of them, if not given.
        data: What `--data` gives the folder of; "": there is no such option.
        choices: Options of its own, integers: their values, the first of them if not given; of a
            single value: any number.
    """

    def __init__(
        self,
        script: str,
        doc: str,
        argv: Sequence[str] | None,
        seeds: int = 5,
        data: str = "",
        **choices: Sequence[int],
    ) -> None:
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--fast", action="store_true", help="a small setting, for the tests")
        parser.add_argument("--seeds", type=int, default=None, help=f"{seeds} if not given")
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
        if data:
            parser.add_argument("--data", type=Path, default=None, help=f"folder of {data}")
        for name, values in choices.items():
            allowed = values if len(values) > 1 else None
            parser.add_argument(f"--{name}", type=int, choices=allowed, default=values[0])
        self.options = parser.parse_args(argv)
        self.fast: bool = self.options.fast
        self.seeds = range(self.options.seeds or (1 if self.fast else seeds))
        title = doc.splitlines()[0].rstrip(".")
        command = " ".join([Path(script).name, *self._given({"seeds": (None,), **choices})])
        self.results = Results(Path(script).stem, title, command, self.fast)
        #: Minutes of earlier runs whose results are used again.
        self.spent = 0.0
        self._start = time.process_time()
        mpl.rcParams.update(STYLE)

    def _given(self, defaults: Mapping[str, Sequence[int | None]]) -> list[str]:
        """The options that the numbers depend on, where they are not the defaults."""
        given = [
            f"--{name} {getattr(self.options, name)}"
            for name, values in defaults.items()
            if name not in _SHOWING and getattr(self.options, name) != values[0]
        ]
        return [*given, "--data ROOT"] if getattr(self.options, "data", None) else given

    def row(self, what: str, paper: str, values: Sequence[float], why: str = "") -> None:
        """Add a number."""
        self.results.rows.append(Row(what, paper, [float(value) for value in values], why))

    def finish(self, figure: Figure) -> Results:
        """Write figure and numbers, and print them."""
        self.results.minutes = self.spent + (time.process_time() - self._start) / 60
        self.options.out.mkdir(parents=True, exist_ok=True)
        name = self.results.name + ("_fast" if self.fast else "")
        figure.savefig(self.options.out / f"{name}.png")
        plt.close(figure)
        text = json.dumps(asdict(self.results), indent=1, ensure_ascii=False)
        (self.options.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(self.results)
        return self.results


def axes(rows: int, columns: int, width: float = 3.0, height: float = 2.4) -> tuple[Figure, Any]:
    """A grid of axes, ``[rows, columns]``."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def chain_monomial(x: Tensor, rank: int = 5) -> Tensor:
    """Σ_{k=1}^r x_{k mod r}·x_{(k+1) mod r}, ``[n, d]`` to ``[n]`` (C-NFA paper, Eq. 1)."""
    return sum(
        (x[:, k % rank] * x[:, (k + 1) % rank] for k in range(1, rank + 1)), x.new_zeros(len(x))
    )


def mlp(widths: Sequence[int], activation: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    """Linears without bias, an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(nn.Linear(inputs, outputs, bias=False))
        if activation is not None:
            layers.append(activation())
    return nn.Sequential(*(layers if activation is None else layers[:-1]))


def initialise(model: nn.Module, first: float, others: float = 1.0) -> None:
    """W_ij ~ N(0, s/k), k the inputs, with s for the first layer and the others (C-NFA, §2)."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for index, linear in enumerate(linears):
        scale = first if index == 0 else others
        nn.init.normal_(linear.weight, std=math.sqrt(scale / linear.in_features))
