"""What probing costs, in plain training steps of the same model in the same run.

Parts, for every model: ``steps`` (plain, idle, FACT on every step, inside a window, with a report),
``long`` (the default settings end to end), ``memory`` (in a process of its own), ``alternatives``
(other people's code, on the MLP and resnet18); and once ``idle`` (a model so small that nothing
hides the probe), ``layers`` (one layer's report against dense algebra), ``growth`` (with width,
depth, batch, positions and outputs), ``exact`` (exact Jacobians: passes, memory, time) and
``accuracy`` (scores from bfloat16 rows). Training is SGD with momentum 0.9 and weight decay 5e-4,
float32 on the CPU, bfloat16 autocast on CUDA.

    pip install -e '.[benchmarks]'                  # the alternatives; what is missing is left out
    pip install --no-deps --target ELSEWHERE opacus==1.6.0 kronfluence==1.0.1      # two more, with
    PYTHONPATH=ELSEWHERE python tests/benchmarks/cost.py ...        # packages named tests, examples
    python tests/benchmarks/cost.py                 # writes cost.json and cost.md beside this file
    python tests/benchmarks/cost.py --models mlp resnet18 --parts steps memory --out FOLDER
    python tests/benchmarks/cost.py --quick --out FOLDER        # does everything run?

The JSON is written after every part. A part that is measured again takes the place of what was
found before in the same environment; ``--resume`` leaves those alone that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cost_accuracy import accuracy
from cost_alternatives import FITTING, alternatives, quietly
from cost_exact import exact
from cost_growth import growth
from cost_layers import layers
from cost_models import MODELS, Recipe
from cost_parts import idle, long_runs, memory, steps
from cost_profile import profile
from cost_tables import markdown
from cost_wide import wide

#: Parts of every model, and those measured once.
BY_MODEL = ("steps", "long", "memory", "profile", "alternatives")
ONCE = ("idle", "layers", "growth", "exact", "accuracy", "wide")


@dataclass(frozen=True)
class Effort:
    """How long everything is measured.

    Attributes:
        quick: Whether only to see that everything runs.
        seconds: Of a probed long run.
        limit: Seconds after which no further round of a part is begun, after three.
        short: The same for a point of ``growth``; for one of ``exact`` ten times as many.
    """

    quick: bool
    seconds: float
    limit: float = 90.0
    short: float = 1.0

    def of_model(self, part: str, name: str) -> Any:
        """Measure a part of a model."""
        rounds = 1 if self.quick else MODELS[name].effort
        duration = 0.0 if self.quick else self.seconds
        work: dict[str, Callable[[], Any]] = {
            "steps": lambda: steps(name, rounds, self.limit),
            "long": lambda: long_runs(name, duration),
            "memory": lambda: memory(name),
            "profile": lambda: profile(name),
            "alternatives": lambda: alternatives(name, rounds, self.limit),
        }
        return work[part]()

    def once(self, part: str) -> Any:
        """Measure a part that is of no model."""
        quick = self.quick
        work: dict[str, Callable[[], Any]] = {
            "idle": lambda: idle("tiny", 5 if quick else 40, 50 if quick else 300),
            "layers": lambda: layers(2 if quick else 7, quick=quick),
            "growth": lambda: growth(self.short, quick=quick),
            "exact": lambda: exact(1 if quick else 7, 10 * self.short, quick=quick),
            "accuracy": lambda: accuracy(quick=quick),
            "wide": lambda: wide(quick=quick),
        }
        return work[part]()


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        **{name: _version(name) for name in ("torch", "torchvision", "timm")},
        "Python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _processor() -> str:
    """The processor's own name; Linux only, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def reason_to_skip(recipe: Recipe) -> str:
    """Why a model is not trained here, "" if it is."""
    if recipe.needs_cuda and not torch.cuda.is_available():
        return "no CUDA device"
    return ""


class Results:
    """What was found so far, on disk after every part.

    Args:
        folder: Where cost.json and cost.md are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.found: dict[str, Any] = {"environment": environment(), "models": {}, "skipped": {}}
        path = folder / "cost.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["environment"] == self.found["environment"]:
                self.found = before

    def add(self, place: dict[str, Any], part: str, found: Any) -> None:
        """Keep what was found, and write everything."""
        place[part] = found
        self._folder.mkdir(parents=True, exist_ok=True)
        said = json.dumps(self.found, separators=(",", ":"))
        # a line for each mode, not for each number; no string holds an unescaped quote
        said = said.replace('],"', '],\n"').replace('},"', '},\n"')
        (self._folder / "cost.json").write_text(said + "\n", encoding="utf-8")
        (self._folder / "cost.md").write_text(markdown(self.found), encoding="utf-8")


def _asked(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--parts", nargs="+", choices=(*ONCE, *BY_MODEL), default=[*ONCE, *BY_MODEL]
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a probed long run")
    parser.add_argument("--quick", action="store_true", help="only to see that everything runs")
    parser.add_argument("--resume", action="store_true", help="leave alone what is there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write after every part, and print the tables."""
    options = _asked(argv)
    quietly()
    effort, results = Effort(options.quick, options.seconds), Results(options.out)
    models = results.found["models"]

    def keep(title: str, place: dict[str, Any], part: str, work: Callable[[], Any]) -> None:
        if options.resume and part in place:
            return
        start = time.perf_counter()
        results.add(place, part, work())
        print(f"{title}, {part}: {time.perf_counter() - start:.0f} s", flush=True)

    for part in (part for part in ONCE if part in options.parts):
        keep("once", results.found, part, lambda part=part: effort.once(part))
    for name in options.models:
        if why := reason_to_skip(MODELS[name]):
            results.add(results.found["skipped"], name, why)
            continue
        results.found["skipped"].pop(name, None)
        for part in (part for part in BY_MODEL if part in options.parts):
            if part != "alternatives" or name in FITTING:
                work = lambda part=part, name=name: effort.of_model(part, name)  # noqa: E731
                keep(name, models.setdefault(name, {}), part, work)
    print(markdown(results.found))


if __name__ == "__main__":
    main()
