"""What every picture is drawn with: a white sheet, text that fits, pixels of numbers, ticks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from feature_probe.sinks.palette import Colour, Pattern, colourise

Box = tuple[int, int, int, int]

INK: Colour = (25, 25, 25)
FAINT: Colour = (95, 95, 95)
PAPER: Colour = (255, 255, 255)
TEXT, TITLE = 25, 31
_TICK = 8
# Width of a pattern's lines and their distance: they outlast being drawn at half the size.
_LINE, _PERIOD = 4, 14
_Cell = TypeVar("_Cell", np.uint8, np.int64)


class Canvas:
    """A white sheet in pixels, y downwards. All text is reduced to ASCII: the font has no more."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def pixels(self) -> NDArray[np.uint8]:
        """The picture, uint8 ``[height, width, 3]``."""
        return np.asarray(self._image)

    def text(
        self, place: tuple[int, int], text: str, size: int = TEXT, colour: Colour = INK,
        anchor: str = "la",
    ) -> None:  # fmt: skip
        """Write one line; ``anchor`` as in Pillow, "la" is left and top."""
        # Twice, a pixel apart: TensorBoard scales down without smoothing, and drops thin strokes.
        for shift in (0, 1):
            at = (place[0] + shift, place[1] + shift)
            self._draw.text(at, _ascii(text), colour, font=_font(size), anchor=anchor)

    def numbers(self, values: NDArray[np.float64], box: Box, limit: float = 1.0) -> None:
        """Paint ``values`` into ``box`` on the scale [−limit, limit], framed, cells not blurred."""
        left, top, right, bottom = box
        if values.size:
            colours = _stretched(colourise(values, limit), box)
            self._image.paste(Image.fromarray(colours), (left, top))
        self._draw.rectangle((left - 1, top - 1, right, bottom), outline=FAINT)

    def patterns(self, codes: NDArray[np.int64], choice: Sequence[Pattern], box: Box) -> None:
        """Paint cells of ``box`` with the pattern that their code chooses; none where it is -1."""
        left, top, right, bottom = box
        size = (right - left, bottom - top)
        for code in np.unique(codes[codes >= 0]).tolist():
            here = _stretched((codes == code).astype(np.uint8) * np.uint8(255), box)
            sheet = _sheet(choice[code], *size)
            self._image.paste(sheet, (left, top), Image.fromarray(here))
        self._draw.rectangle((left - 1, top - 1, right, bottom), outline=FAINT)

    def left_ticks(self, box: Box, labels: Sequence[str], width: int) -> None:
        """Name the rows of ``box`` at its left; where there is no room for all, every k-th."""
        left, top, _, bottom = box
        if not labels:
            return
        every = -(-len(labels) * (TEXT + 1) // (bottom - top))
        for row in range(0, len(labels), every):
            y = top + int((row + 0.5) * (bottom - top) / len(labels))
            self._draw.line((left - _TICK, y, left - 2, y), FAINT, 2)
            self.text((left - _TICK - 6, y), fit_tail(labels[row], width), anchor="rm")

    def bottom_ticks(self, box: Box, labels: Sequence[str]) -> None:
        """Name columns of ``box`` under it: the first, the last, and what fits evenly between."""
        left, _, right, bottom = box
        if not labels:
            return
        widest = text_width(max(labels, key=len))
        fitting = max(2, min(6, (right - left) // (widest + 30)))
        for column in sorted({round(x) for x in np.linspace(0, len(labels) - 1, fitting)}):
            x = left + int((column + 0.5) * (right - left) / len(labels))
            self._draw.line((x, bottom + 1, x, bottom + _TICK), FAINT, 2)
            # The last label keeps clear of what stands at the right.
            centre = min(x, right - text_width(labels[column]) // 2)
            self.text((centre, bottom + _TICK + 4), labels[column], anchor="ma")

    def upright_scale(self, box: Box, limit: float = 1.0) -> None:
        """A colour bar from −limit (bottom) to +limit (top) with its numbers at the right."""
        self.numbers(np.linspace(limit, -limit, 257)[:, None], box, limit)
        _, top, right, bottom = box
        for value in (1.0, 0.5, 0.0, -0.5, -1.0):
            y = int(top + (1.0 - value) / 2 * (bottom - top - 1))
            self._draw.line((right, y, right + _TICK, y), FAINT, 2)
            self.text((right + _TICK + 6, y), f"{value * limit:g}", anchor="lm")

    def flat_scale(self, box: Box, limit: float) -> None:
        """A colour bar from −limit (left) to +limit (right), the numbers under its ends."""
        left, _, right, bottom = box
        self.numbers(np.linspace(-limit, limit, 257)[None, :], box, limit)
        self.text((left, bottom + 6), f"-{limit:.3g}")
        self.text((right, bottom + 6), f"{limit:.3g}", anchor="ra")

    def swatch(self, box: Box, pattern: Pattern) -> None:
        """A framed patch of a pattern."""
        self.patterns(np.zeros((1, 1), dtype=np.int64), [pattern], box)


def _stretched(cells: NDArray[_Cell], box: Box) -> NDArray[_Cell]:
    """One entry a pixel of ``box``; cells are not blurred."""
    left, top, right, bottom = box
    rows = np.arange(bottom - top) * cells.shape[0] // (bottom - top)
    columns = np.arange(right - left) * cells.shape[1] // (right - left)
    stretched: NDArray[_Cell] = cells[rows][:, columns]
    return stretched


@lru_cache(maxsize=32)
def _sheet(pattern: Pattern, width: int, height: int) -> Image.Image:
    """A sheet of this size in a pattern."""
    colours = np.empty((height, width, 3), dtype=np.uint8)
    colours[:] = pattern.fill
    if pattern.lines is not None:
        y, x = np.indices((height, width), dtype=np.int32)
        slant = x + y if pattern.is_rising else x - y
        colours[slant % _PERIOD < _LINE] = pattern.lines
    return Image.fromarray(colours)


@lru_cache(maxsize=8192)
def text_width(text: str, size: int = TEXT) -> int:
    """Width of one line in pixels."""
    return int(_font(size).getlength(_ascii(text))) + 1


def fit(text: str, width: int, size: int = TEXT) -> str:
    """``text``, or as much of its beginning as fits before an ellipsis."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."


def fit_tail(text: str, width: int, size: int = TEXT) -> str:
    """``text``, or as much of its end as fits: a layer's name says most at its end.

    Cut at a dot if one is left, so that neighbours are cut alike.
    """
    if text_width(text, size) <= width:
        return text
    while text and text_width("..." + text, size) > width:
        text = text[1:]
    whole = text.partition(".")[2]
    return "..." + (whole or text)


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Without FreeType Pillow has one small bitmap font instead, and ignores the size.
    return ImageFont.load_default(size)
