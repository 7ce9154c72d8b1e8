"""Structural quantities as series, charts and pictures: a group of cards per quantity.

A card or a line is of one layer: ranks, balance and the best power differ between layers by what
they are, so that a median over them would say little.
"""

from __future__ import annotations

import math
import re

import numpy as np

from feature_probe.reports.report import Report
from feature_probe.reports.structure import LayerStructure
from feature_probe.sinks.heatmap import Pixels, render_heatmap
from feature_probe.sinks.series import ROOT, Layout
from feature_probe.sinks.wording import PREDICTIONS, gram_name, layer_name
from feature_probe.theory.relations import RELATIONS


def structure_tag(quantity: str, layer: str) -> str:
    """Tag of one layer's number; only the first segment groups cards."""
    return f"{ROOT}.structure.{quantity}/{layer_name(layer).replace('/', '.')}"


def structure_scalars(report: Report) -> dict[str, float]:
    """The structural quantities that are defined, by tag; nothing where none were asked for."""
    return {
        structure_tag(quantity, structure.layer): value
        for structure in report.structures
        for quantity, value in layer_quantities(structure).items()
        if math.isfinite(value)
    }


def layer_quantities(structure: LayerStructure) -> dict[str, float]:
    """One layer's numbers by name; those that are not defined are NaN."""
    found = {"imbalance": structure.imbalance}
    for sweep in structure.sweeps:
        found[f"best_power_{sweep.relation}"] = sweep.best_power
        found[f"best_power_times_depth_{sweep.relation}"] = sweep.depth_product
    for spectrum in structure.spectra:
        found[f"effective_rank_{spectrum.matrix}"] = spectrum.effective_rank
        found[f"participation_ratio_{spectrum.matrix}"] = spectrum.participation_ratio
        found[f"variation_{spectrum.matrix}"] = spectrum.variation
    for reference in structure.references:
        found[f"reference_cosine_{reference.matrix}"] = reference.cosine
        found[f"reference_overlap_{reference.matrix}"] = reference.overlap
    return found


def structure_layout(report: Report) -> Layout:
    """Charts of the structural quantities for the Custom Scalars page, one line a layer."""
    names = dict.fromkeys(
        quantity for structure in report.structures for quantity in layer_quantities(structure)
    )
    if not names:
        return {}
    return {
        f"{ROOT}: structure, by layer (hover over a line for its name)": {
            name.replace("_", " "): [
                "Multiline",
                [
                    f"^{re.escape(structure_tag(name, structure.layer))}$"
                    for structure in report.structures
                    if name in layer_quantities(structure)
                ],
            ]
            for name in names
        }
    }


def sweep_pictures(report: Report) -> dict[str, Pixels]:
    """C(s) of every relation, layers × powers, by tag."""
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for structure in report.structures:
        for sweep in structure.sweeps:
            curve = dict(zip(sweep.powers, sweep.cosines, strict=True))
            curves.setdefault(sweep.relation, {})[layer_name(structure.layer)] = curve
    return {f"{ROOT}.sweeps/{name}": _sweep_picture(name, found) for name, found in curves.items()}


def _sweep_picture(name: str, curves: dict[str, dict[float, float]]) -> Pixels:
    powers = list(next(iter(curves.values())))
    gram, prediction = gram_name(RELATIONS[name]), PREDICTIONS[name]
    return render_heatmap(
        np.array([[curve[power] for power in powers] for curve in curves.values()]),
        layers=list(curves),
        steps=[f"{power:.2g}" for power in powers],
        title=f"{name}: {gram} against {prediction}^s, by s",
        subtitle="cosine: 1 = same up to a factor, 0 = unrelated",
        across="power s     ",  # spaces: the first number below the map is wider than a step
    )
