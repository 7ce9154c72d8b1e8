"""Pictures of scores and verdicts over layers and steps, and of matrices: uint8 pixels out.

Drawn with Pillow, which TensorBoard brings along, about twice as large as TensorBoard's image cards
show them, so that they are legible both in the card and at full size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from feature_probe.sinks.canvas import FAINT, TEXT, TITLE, Box, Canvas, fit, text_width
from feature_probe.sinks.palette import GREY, HATCHED, Pattern

Pixels = NDArray[np.uint8]

WIDTH = 880
_MARGIN, _GAP = 16, 34
_LABEL_WIDTH = 250
_STRIP, _BAR, _BAR_TEXT = 30, 24, 60
_PLOT_HEIGHT, _ROW_HEIGHT, _MIN_ROWS = 364, 52, 4
_PER_LINE, _PANEL, _PANEL_GAP = 4, 192, 26
_ENTRIES, _ENTRY_HEIGHT, _SWATCH = 2, TEXT + 12, 34


def render_heatmap(
    values: NDArray[np.float64],
    *,
    layers: Sequence[str],
    steps: Sequence[int | str],
    title: str,
    subtitle: str = "",
    chance: NDArray[np.float64] | None = None,
    grey: NDArray[np.bool_] | None = None,
    hatched: NDArray[np.bool_] | None = None,
    across: str = "step",
) -> Pixels:
    """Draw layers × steps on the fixed colour scale [−1, 1]; what is not applicable is grey.

    Args:
        values: Scores ``[layers, steps]``, NaN where undefined.
        layers: Row names, drawn from top to bottom; where there is no room for all, every k-th.
        steps: Step of each column, or what else it is of; columns are equally wide.
        title: First line, large.
        subtitle: Second line, small.
        chance: Level expected by chance ``[layers]``, drawn as a strip beside the map.
        grey: Which scores are not applicable ``[layers, steps]``: drawn like undefined ones.
        hatched: Which are trivial, likewise: hatched.
        across: What the columns are.

    Returns:
        uint8 ``[height, WIDTH, 3]``; one pixel of height a layer beyond 364 layers.
    """
    nowhere = np.zeros(values.shape, dtype=np.bool_)
    hatched = nowhere if hatched is None else hatched
    grey = (nowhere if grey is None else grey) | (~np.isfinite(values) & ~hatched)
    captions = {
        "not applicable or undefined": (GREY, grey),
        "trivial: true whatever is learned": (HATCHED, hatched),
    }
    legend = {text: pattern for text, (pattern, there) in captions.items() if there.any()}
    canvas, (top, bottom) = _sheet(values.shape[0], len(legend), title, subtitle)
    bar = WIDTH - _MARGIN - _BAR_TEXT - _BAR
    right = bar - _GAP - (0 if chance is None else _STRIP + _GAP)
    plot = _plot(canvas, (top, right, bottom), layers, steps, across)
    canvas.numbers(values, plot)
    codes = np.where(hatched, 1, np.where(grey, 0, -1)).astype(np.int64)
    canvas.patterns(codes, [GREY, HATCHED], plot)
    if chance is not None:
        left = right + _GAP
        canvas.numbers(chance[:, None], (left, top, left + _STRIP, bottom))
        canvas.text((left + _STRIP // 2, bottom + 12), "chance", anchor="ma")
    canvas.upright_scale((bar, top, bar + _BAR, bottom))
    _legend(canvas, bottom, legend)
    return canvas.pixels()


def render_categories(
    codes: NDArray[np.int64],
    categories: Mapping[str, Pattern],
    *,
    layers: Sequence[str],
    steps: Sequence[int],
    title: str,
    subtitle: str = "",
) -> Pixels:
    """Draw layers × steps in the patterns of categories, with a legend of those that occur.

    Args:
        codes: Places in ``categories`` ``[layers, steps]``, -1 where nothing was said: white.
        categories: Pattern by name, which should be short: the names stand at the right.
        layers: Row names, drawn from top to bottom; where there is no room for all, every k-th.
        steps: Step of each column; columns are equally wide.
        title: First line, large.
        subtitle: Second line, small.

    Returns:
        uint8 ``[height, WIDTH, 3]``; one pixel of height a layer beyond 364 layers.
    """
    found = set(np.unique(codes).tolist())
    legend = {
        name: pattern for code, (name, pattern) in enumerate(categories.items()) if code in found
    }
    canvas, (top, bottom) = _sheet(codes.shape[0], 0, title, subtitle, len(legend))
    # Taller pictures are shown smaller: the legend stands beside the plot, not under it.
    names = max((text_width(name) for name in categories), default=0)
    left = WIDTH - _MARGIN - names - _SWATCH - 10
    plot = _plot(canvas, (top, left - 20, bottom), layers, steps)
    canvas.patterns(codes, list(categories.values()), plot)
    for index, entry in enumerate(legend.items()):
        _entry(canvas, (left, top + index * _ENTRY_HEIGHT), entry, names)
    return canvas.pixels()


def render_matrices(
    matrices: Mapping[str, NDArray[np.float64]],
    *,
    title: str,
    subtitle: str = "",
    max_side: int = 64,
) -> Pixels:
    """Draw matrices side by side, four a line, each on its own colour scale centred at 0.

    Args:
        matrices: By caption; ``[rows, columns]`` each.
        title: First line, large.
        subtitle: Second line, small; what a cell and the colours are follows it.
        max_side: Larger matrices are reduced to at most this many blocks a side, by block mean.

    Returns:
        uint8 ``[height, WIDTH, 3]``.
    """
    top = _MARGIN + TITLE + TEXT + 28
    pitch = _PANEL + 2 * TEXT + 60
    canvas = Canvas(WIDTH, top + math.ceil(len(matrices) / _PER_LINE) * pitch)
    sides = sorted({block_side(matrix, max_side) for matrix in matrices.values()} - {1})
    blocks = " or ".join(f"{side} x {side}" for side in sides)
    cells = f"a cell is the mean of {blocks} entries" if sides else ""
    _heading(canvas, title, "; ".join(filter(None, [subtitle, cells, "each its own colour scale"])))
    for index, (caption, matrix) in enumerate(matrices.items()):
        x = _MARGIN + (index % _PER_LINE) * (_PANEL + _PANEL_GAP)
        y = top + (index // _PER_LINE) * pitch
        canvas.text((x, y), fit(caption, _PANEL))
        _panel(canvas, (x, y + TEXT + 10), matrix, block_side(matrix, max_side))
    return canvas.pixels()


def block_side(matrix: NDArray[np.float64], max_side: int) -> int:
    """Side of the square blocks of which at most ``max_side`` cover a side of ``matrix``.

    A divisor up to twice the smallest possible side is preferred: it leaves no odd last block.
    """
    smallest = max(1, math.ceil(max(matrix.shape) / max_side))
    divisors = (s for s in range(smallest, 2 * smallest) if not any(n % s for n in matrix.shape))
    return next(divisors, smallest)


def block_mean(matrix: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Means over blocks of ``side`` × ``side`` entries; the last ones may hold fewer."""
    starts = [np.arange(0, length, side) for length in matrix.shape]
    sums = np.add.reduceat(np.add.reduceat(matrix, starts[0], axis=0), starts[1], axis=1)
    sizes = [np.diff(np.append(s, n)) for s, n in zip(starts, matrix.shape, strict=True)]
    means: NDArray[np.float64] = sums / np.outer(sizes[0], sizes[1])
    return means


def _heading(canvas: Canvas, title: str, subtitle: str) -> None:
    width = WIDTH - 2 * _MARGIN
    canvas.text((_MARGIN, _MARGIN), fit(title, width, TITLE), TITLE)
    canvas.text((_MARGIN, _MARGIN + TITLE + 10), fit(subtitle, width), colour=FAINT)


def _sheet(
    rows: int, below: int, title: str, subtitle: str, beside: int = 0
) -> tuple[Canvas, tuple[int, int]]:
    """A sheet with its heading; top and bottom of its plot.

    It has room for so many rows, and entries of a legend below or beside the plot.
    """
    height = max(min(max(rows, _MIN_ROWS) * _ROW_HEIGHT, _PLOT_HEIGHT), rows)
    height = max(height, beside * _ENTRY_HEIGHT)
    top = _MARGIN + TITLE + TEXT + 22
    bottom = top + height
    lines = math.ceil(below / _ENTRIES)
    canvas = Canvas(WIDTH, bottom + TEXT + 28 + lines * _ENTRY_HEIGHT)
    _heading(canvas, title, subtitle)
    return canvas, (top, bottom)


def _plot(
    canvas: Canvas,
    edges: tuple[int, int, int],
    layers: Sequence[str],
    steps: Sequence[int | str],
    across: str = "step",
) -> Box:
    """Name the rows and columns of a plot with these edges; its box, right of the names."""
    top, right, bottom = edges
    # what the columns are stands left of the first tick
    names = min(max(text_width(name) for name in (*layers, across)), _LABEL_WIDTH)
    plot = (_MARGIN + names + 16, top, right, bottom)
    canvas.left_ticks(plot, layers, names)
    canvas.bottom_ticks(plot, [s if isinstance(s, str) else f"{s:,}" for s in steps])
    canvas.text((_MARGIN, bottom + 12), across)
    return plot


def _legend(canvas: Canvas, bottom: int, entries: Mapping[str, Pattern]) -> None:
    """What the patterns are, two a line, under the steps of a plot that ends at ``bottom``."""
    pitch = (WIDTH - 2 * _MARGIN) // _ENTRIES
    for index, entry in enumerate(entries.items()):
        line, place = divmod(index, _ENTRIES)
        corner = (_MARGIN + place * pitch, bottom + TEXT + 26 + line * _ENTRY_HEIGHT)
        _entry(canvas, corner, entry, pitch - _SWATCH - 16)


def _entry(canvas: Canvas, corner: tuple[int, int], entry: tuple[str, Pattern], width: int) -> None:
    """A pattern and what it is called."""
    x, y = corner
    canvas.swatch((x, y, x + _SWATCH, y + TEXT), entry[1])
    canvas.text((x + _SWATCH + 10, y - 1), fit(entry[0], width))


def _panel(canvas: Canvas, place: tuple[int, int], matrix: NDArray[np.float64], side: int) -> None:
    x, y = place
    blocks = block_mean(matrix, side)
    # A last block with fewer entries holds more of the diagonal: it must not set the scale.
    whole = blocks[: max(1, matrix.shape[0] // side), : max(1, matrix.shape[1] // side)]
    # A matrix of zeros has no scale of its own; any will do.
    limit = float(np.abs(whole[np.isfinite(whole)]).max(initial=0.0)) or 1.0
    canvas.numbers(blocks, (x, y, x + _PANEL, y + _PANEL), limit)
    canvas.flat_scale((x, y + _PANEL + 8, x + _PANEL, y + _PANEL + 22), limit)
