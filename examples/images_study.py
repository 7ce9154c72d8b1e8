"""Beyond the papers: a small ResNet and a small ViT on real images, all relations, every layer.

    python examples/images_study.py               # train all, draw, write images_study.md
    python examples/images_study.py --only vit    # train one of them, and draw all
    python examples/images_study.py --only none   # figures and page from the saved results
    python examples/images_study.py --fast --out DIR   # seconds: for the tests

The images are the MNIST subset that ships with the examples; with --data ROOT as many of the whole.
Needs timm and matplotlib: pip install feature-probe[timm,figures].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from images_lab.figures import draw
from images_lab.page import write_page
from images_lab.results import load, save
from images_lab.training import Setting, train
from mnist import load_mnist

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "images_lab" / "results"
SETTINGS = (
    Setting("resnet", "resnet", "sgd", rate=0.08, decay=6e-3),
    Setting("resnet-bn", "resnet+bn", "sgd", rate=0.08, decay=6e-3),
    Setting("vit", "vit", "adamw", rate=3e-3, decay=1.6, width=32),
)


def fast(setting: Setting) -> Setting:
    """The same in seconds: fewer steps, images, reports and channels."""
    return replace(setting, steps=24, images=64, sample=32, window=10, reports=3, width=4)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is asked for, save it, and draw and describe all that is saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a small setting, for the tests")
    parser.add_argument("--only", choices=[*(s.name for s in SETTINGS), "none"], help="one run")
    parser.add_argument("--data", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    for setting in SETTINGS:
        if given.only in (None, setting.name):
            chosen = fast(setting) if given.fast else setting
            outcome = train(chosen, load_mnist(given.data))
            path = save(outcome, given.out)
            print(
                f"{path.name}: test accuracy {outcome.accuracy:.3f}, {outcome.minutes:.1f} minutes"
            )
    paths = [given.out / f"{setting.name}.json.gz" for setting in SETTINGS]
    outcomes = [load(path) for path in paths if path.exists()]
    if not outcomes:
        parser.error(f"{given.out} holds no results: train first, without --only none")
    draw(outcomes, given.out)
    if given.out == RESULTS:
        write_page(outcomes, HERE / "images_study.md")


if __name__ == "__main__":
    main()
