"""The colours of every picture: one map for numbers, one set of patterns for verdicts.

The map is diverging, centred at 0, uniform in OKLab.
Blue is negative, near-white is 0, orange to dark red-brown is positive. Lightness falls with the
same speed on both sides, so the map also reads in greyscale; blue against orange is the pair that
all common kinds of colour blindness keep apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: Colour of an undefined number: a mid grey, which the map itself never takes.
UNDEFINED = (150, 150, 150)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Pattern:
    """What a cell without a number is filled with: one colour, or lines on it.

    Attributes:
        fill: The colour.
        lines: Colour of slanted lines on it, None for none.
        is_rising: Whether the lines rise to the right.
    """

    fill: Colour
    lines: Colour | None = None
    is_rising: bool = True


#: Not applicable or undefined, in the pictures of scores.
GREY = Pattern(UNDEFINED)
#: A score that is no evidence: grey like what has none, and hatched.
HATCHED = Pattern(UNDEFINED, (250, 250, 250))
_WEAK = Pattern((246, 246, 246), (185, 185, 185))
_NO_NUMBER = Pattern(UNDEFINED, (45, 45, 45), is_rising=False)
_DARK_BLUE, _BLUE = Pattern((10, 58, 120)), Pattern((44, 116, 190))
_AMBER, _RED = Pattern((244, 178, 60)), Pattern((168, 54, 14))
#: Verdicts, in the order of a legend. What may stand in one picture differs in lightness or in its
#: lines, so that it can be told apart in greyscale and under every colour blindness.
VERDICT_PATTERNS: Mapping[str, Pattern] = {
    "holds": _DARK_BLUE,
    "approaching": _BLUE,
    "not yet": _AMBER,
    "aligned": _DARK_BLUE,
    "at chance": _AMBER,
    "below chance": _RED,
    "trivial": HATCHED,
    "not applicable": GREY,
    "cannot tell": _WEAK,
    "undefined": _NO_NUMBER,
}
#: States of a layer, likewise.
STATE_PATTERNS: Mapping[str, Pattern] = {
    "at stationarity": _DARK_BLUE,
    "approaching": _BLUE,
    "far": _AMBER,
    "not applicable": GREY,
    "cannot tell": _WEAK,
}
_HALF = 128
_CENTRE = (0.97, 0.0, 0.0)
# Nodes of the two arms in OKLCh: lightness, chroma, hue in degrees.
_POSITIVE = ((0.86, 0.10, 85.0), (0.68, 0.165, 55.0), (0.48, 0.165, 35.0), (0.28, 0.09, 22.0))
_NEGATIVE = ((0.86, 0.06, 225.0), (0.68, 0.12, 245.0), (0.48, 0.14, 260.0), (0.28, 0.10, 270.0))
_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_LINEAR = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@lru_cache(maxsize=1)
def diverging_map() -> NDArray[np.uint8]:
    """The 257 colours from −1 (blue) over 0 (index 128, near white) to +1, ``[257, 3]``."""
    negative, positive = _arm(_NEGATIVE), _arm(_POSITIVE)
    table = _to_srgb(np.concatenate([negative[:0:-1], positive]))
    table.setflags(write=False)
    return table


def colourise(values: NDArray[np.float64], limit: float = 1.0) -> NDArray[np.uint8]:
    """Map numbers to colours on the fixed scale [−limit, limit]; beyond it the end colour.

    Args:
        values: Any shape; NaN and infinities are drawn in :data:`UNDEFINED`.
        limit: Positive number that the darkest colours stand for.

    Returns:
        uint8, the shape of ``values`` with 3 appended.
    """
    defined = np.isfinite(values)
    scaled = np.clip(np.where(defined, values, 0.0) / limit, -1.0, 1.0)
    colours = diverging_map()[np.rint(scaled * _HALF).astype(np.int64) + _HALF]
    return np.where(defined[..., None], colours, np.array(UNDEFINED, dtype=np.uint8))


def _arm(nodes: tuple[tuple[float, float, float], ...]) -> NDArray[np.float64]:
    """129 OKLab colours from the centre outwards, at equal distances along the arm."""
    lightness, chroma, hue = np.array(nodes).T
    angle = np.deg2rad(hue)
    points = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=1)
    points = np.concatenate([[_CENTRE], points])
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    wanted = np.linspace(0.0, along[-1], _HALF + 1)
    return np.stack([np.interp(wanted, along, points[:, i]) for i in range(3)], axis=1)


def _to_srgb(oklab: NDArray[np.float64]) -> NDArray[np.uint8]:
    linear = np.clip((oklab @ _TO_LMS.T) ** 3 @ _TO_LINEAR.T, 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colours: NDArray[np.uint8] = np.rint(encoded * 255).astype(np.uint8)
    return colours
