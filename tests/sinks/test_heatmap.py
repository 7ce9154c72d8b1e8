"""Pictures: colours, cells, labels, bounded histories."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_probe.sinks.canvas import Canvas, fit, fit_tail, text_width
from feature_probe.sinks.heatmap import (
    WIDTH,
    block_mean,
    block_side,
    render_heatmap,
    render_matrices,
)
from feature_probe.sinks.history import StepHistory
from feature_probe.sinks.palette import UNDEFINED, colourise, diverging_map

# Machado et al. 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def linear(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Linear RGB of sRGB colours."""
    scaled = colours / 255
    return np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)


def oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """OKLab of linear RGB (Ottosson 2020), written from the other end than the palette's."""
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(np.clip(rgb, 0, 1) @ np.array(to_lms).T) @ np.array(to_lab).T


def find(picture: NDArray[np.uint8], colour: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a picture has exactly this colour."""
    return (picture == colour).all(axis=-1)


def heatmap(values: NDArray[np.float64], **changes: object) -> NDArray[np.uint8]:
    """A heatmap with plain labels."""
    rows, columns = values.shape
    names = [f"layer{i}" for i in range(rows)]
    given = {"layers": names, "steps": list(range(columns)), "title": "title"} | changes
    return render_heatmap(values, **given)  # type: ignore[arg-type]


def test_the_map_is_perceptually_uniform() -> None:
    """Neighbouring colours are equally far apart in OKLab, up to rounding to 8 bits."""
    distances = np.linalg.norm(np.diff(oklab(linear(diverging_map())), axis=0), axis=1)
    per_eight = distances.reshape(32, 8).sum(axis=1)
    assert per_eight.max() / per_eight.min() < 1.3


def test_lightness_falls_on_both_sides_of_zero() -> None:
    """The map reads in greyscale: the further from 0, the darker."""
    lightness = oklab(linear(diverging_map()))[:, 0]
    assert (np.diff(lightness[:129]) > -1e-3).all()
    assert (np.diff(lightness[128:]) < 1e-3).all()
    assert lightness[128] > 0.95


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_signs_stay_apart_for_the_colour_blind(deficiency: str) -> None:
    """−x and +x differ clearly under every dichromacy, as soon as x is not close to 0."""
    seen = oklab(linear(diverging_map()) @ np.array(DEFICIENCIES[deficiency]).T)
    apart = np.linalg.norm(seen[::-1][144:] - seen[144:], axis=1)
    assert apart.min() > 0.03


def test_undefined_is_no_colour_of_the_map() -> None:
    """Grey means undefined and nothing else."""
    distance = np.abs(diverging_map().astype(int) - np.array(UNDEFINED)).max(axis=1)
    assert distance.min() > 20


def test_numbers_beyond_the_scale_get_its_end_and_nan_gets_grey() -> None:
    """Rounding above 1 does not wrap around, and NaN and infinity are not numbers."""
    colours = colourise(np.array([1.0, 1.0000001, -5.0, -1.0, 0.0, np.nan, np.inf]))
    table = diverging_map()
    expected = [table[256], table[256], table[0], table[0], table[128], UNDEFINED, UNDEFINED]
    assert colours.tolist() == [list(map(int, colour)) for colour in expected]


def test_cells_stand_where_their_layer_and_step_are() -> None:
    """The four corners of a 2 × 2 map have the colours of their numbers."""
    values = np.array([[-0.75, -0.25], [0.25, 0.75]])
    picture = heatmap(values)
    areas = [find(picture, colour) for colour in colourise(values).reshape(4, 3)]
    centres = [np.argwhere(area).mean(axis=0) for area in areas]
    assert all(area.sum() > 1000 for area in areas)
    assert centres[0][0] < centres[2][0]
    assert centres[0][1] < centres[1][1]
    np.testing.assert_allclose(centres[0][0], centres[1][0], atol=12)
    np.testing.assert_allclose(centres[0][1], centres[2][1], atol=12)


def test_the_scale_does_not_depend_on_the_numbers() -> None:
    """0.5 has one colour whatever stands beside it."""
    colour = colourise(np.array(0.5))
    for other in (0.51, 0.99, -1.0):
        assert find(heatmap(np.array([[0.5, other]])), colour).sum() > 1000


def test_an_undefined_row_is_grey_and_explained() -> None:
    """NaN is drawn in grey with a legend, and there is no legend without NaN."""
    values = np.full((5, 10), 0.5)
    undefined = np.array(UNDEFINED, dtype=np.uint8)
    # A few pixels at the edges of letters are any grey.
    assert find(heatmap(values), undefined).sum() < 100
    values[3] = np.nan
    grey = find(heatmap(values), undefined)
    rows = np.flatnonzero(grey.sum(axis=1) > 200)
    assert 40 < len(rows) < 100
    legend = grey.sum(axis=1)[: rows[0] - 50]
    assert legend.sum() > 200


def test_the_chance_level_is_drawn_beside_the_map() -> None:
    """A strip in the colour of the chance level appears, and only if there is one."""
    values, colour = np.zeros((3, 4)), colourise(np.array(-0.6))
    plain = find(heatmap(values), colour).sum()
    beside = find(heatmap(values, chance=np.full(3, -0.6)), colour).sum()
    assert beside > plain + 3000


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (0, 0), (200, 256), (1000, 256), (3, 1000)])
def test_any_size_is_drawn_within_bounds(rows: int, columns: int) -> None:
    """One layer, no layer, many layers, many steps: one width, and a bounded height."""
    picture = heatmap(np.zeros((rows, columns)))
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (WIDTH, 3)
    assert picture.shape[0] <= max(rows, 364) + 200


def test_every_layer_of_a_large_model_has_its_row() -> None:
    """With more layers than usual rows, one odd layer out of a thousand is still visible."""
    values = np.zeros((1000, 8))
    values[617] = 0.93
    assert find(heatmap(values), colourise(np.array(0.93))).sum(axis=1).max() > 200


def test_text_never_leaves_the_picture() -> None:
    """The outermost pixels stay white with the longest names and titles."""
    values = np.zeros((30, 40))
    names = [f"a.very.long.module.name.that.nobody.wants.to.read.{i}" for i in range(30)]
    picture = heatmap(values, layers=names, title="t" * 300, subtitle="s" * 300)
    border = np.concatenate([picture[:, :3], picture[:, -3:]], axis=1)
    assert (border == 255).all()


def test_names_are_shortened_at_their_beginning_and_titles_at_their_end() -> None:
    """A layer's name keeps whole components of its end, a title its beginning."""
    name = "transformer.blocks.11.attention.projection"
    short = fit_tail(name, 250)
    assert short.startswith("...")
    assert name.endswith(f".{short[3:]}")
    assert text_width(short) <= 250
    assert fit_tail("conv1", 250) == "conv1"
    assert fit(name, 250).startswith("transformer.b")
    assert fit(name, 250).endswith("...")
    assert fit("conv1", 250) == "conv1"


def test_letters_the_font_lacks_become_question_marks() -> None:
    """A name in another script draws like question marks, without an error."""
    drawn = []
    for text in ("слой", "????"):
        canvas = Canvas(100, 40)
        canvas.text((5, 5), text)
        drawn.append(canvas.pixels())
    np.testing.assert_array_equal(drawn[0], drawn[1])


def test_block_means_are_the_means_of_their_entries() -> None:
    """Also where the last blocks are smaller."""
    matrix = np.arange(35.0).reshape(5, 7)
    expected = [[matrix[i : i + 3, j : j + 3].mean() for j in (0, 3, 6)] for i in (0, 3)]
    np.testing.assert_allclose(block_mean(matrix, 3), expected, rtol=1e-12)
    np.testing.assert_array_equal(block_mean(matrix, 1), matrix)


@pytest.mark.parametrize(
    ("side", "expected"), [(64, 1), (65, 2), (129, 3), (130, 5), (768, 12), (257, 5)]
)
def test_blocks_divide_the_side_where_they_can(side: int, expected: int) -> None:
    """A divisor up to twice the smallest block is taken, so that no odd last block stands out."""
    chosen = block_side(np.zeros((side, side)), 64)
    assert chosen == expected
    assert -(-side // chosen) <= 64


def test_matrices_are_on_their_own_scales() -> None:
    """The largest entry of each matrix has the darkest colour, its opposite the other end's."""
    matrix = np.array([[4.0, -4.0], [0.0, 0.0]])
    both = render_matrices({"W^T W": matrix, "FACT": matrix / 100}, title="layer")
    one = render_matrices({"W^T W": matrix}, title="layer")
    for colour in (diverging_map()[0], diverging_map()[256]):
        assert find(both, colour).sum() > 1.9 * find(one, colour).sum() > 15000


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_degenerate_matrices_are_drawn(fill: float) -> None:
    """Zeros and undefined matrices have no scale, and raise nothing."""
    picture = render_matrices({"W^T W": np.full((3, 3), fill)}, title="layer")
    assert picture.shape[1:] == (WIDTH, 3)


def test_five_matrices_take_two_lines() -> None:
    """Pictures grow downwards."""
    few = render_matrices({str(i): np.eye(3) for i in range(4)}, title="layer")
    more = render_matrices({str(i): np.eye(3) for i in range(5)}, title="layer")
    assert more.shape[0] > few.shape[0]


def test_a_history_keeps_everything_while_there_is_room() -> None:
    """Below its capacity nothing is dropped, and missing layers are NaN."""
    history = StepHistory(4)
    history.add(0, {"a": 0.1})
    history.add(5, {"b": 0.3, "a": 0.2})
    assert history.steps == [0, 5]
    assert history.layers == ["b", "a"]
    np.testing.assert_array_equal(history.array(), [[np.nan, 0.3], [0.1, 0.2]])


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 63, 64, 1000])
def test_a_history_is_bounded_even_and_up_to_date(count: int) -> None:
    """First and latest report are columns, the others evenly spaced, at most six in all."""
    history = StepHistory(6)
    for step in range(count):
        history.add(step, {"a": float(step)})
        assert len(history.steps) <= 6
        assert history.steps[0] == 0
        assert history.steps[-1] == step
    assert len(set(np.diff(history.steps[:-1]))) <= 1
    assert history.array().tolist() == [[float(step) for step in history.steps]]
    assert len(history.steps) >= min(count, 3)


def test_a_history_of_one_column_is_refused() -> None:
    """It could not hold both the first and the latest report."""
    with pytest.raises(ValueError, match="capacity must be at least 2, got 1"):
        StepHistory(1)


def test_drawing_is_cheap() -> None:
    """A picture of 200 layers × 256 steps takes well under a fifth of a second, labels cached."""
    values = np.random.default_rng(0).uniform(-1, 1, (200, 256))
    heatmap(values)
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        heatmap(values)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.2
