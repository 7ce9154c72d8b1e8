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
    render_categories,
    render_heatmap,
    render_matrices,
)
from feature_probe.sinks.history import StepHistory
from feature_probe.sinks.palette import (
    STATE_PATTERNS,
    UNDEFINED,
    VERDICT_PATTERNS,
    Pattern,
    colourise,
    diverging_map,
)

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
    legend = grey.sum(axis=1)[rows[-1] + 50 :]
    assert legend.sum() > 200


def test_what_is_not_applicable_is_grey_whatever_its_number() -> None:
    """Grey cells stand where they were asked for, their numbers are gone, the others stay."""
    values = np.array([[0.25, 0.75], [-0.25, -0.75]])
    grey = np.array([[False, True], [False, False]])
    picture = heatmap(values, grey=grey)
    areas = [find(picture, colour).sum() for colour in colourise(values).reshape(4, 3)]
    # The colour bar has a line of each colour, but no more.
    assert [area > 10000 for area in areas] == [True, False, True, True]
    shown = np.argwhere(find(picture, np.array(UNDEFINED, dtype=np.uint8)))
    centre = np.median(shown, axis=0)
    kept = np.argwhere(find(picture, colourise(np.array(-0.75)))).mean(axis=0)
    assert centre[0] < kept[0]
    np.testing.assert_allclose(centre[1], kept[1], atol=20)


def test_trivial_cells_are_hatched_and_told_apart_from_grey_ones() -> None:
    """A hatched row has white lines on grey, a grey one has none, and each has its legend."""
    values = np.full((4, 6), 0.5)
    first, second = np.zeros((4, 6), dtype=bool), np.zeros((4, 6), dtype=bool)
    first[0], second[2] = True, True
    plain, neither = heatmap(values, grey=first), heatmap(values)
    hatched = heatmap(values, hatched=second)
    both = heatmap(values, grey=first, hatched=second)
    lines = np.array((250, 250, 250), dtype=np.uint8)
    assert find(hatched, lines).sum() > 3000 > 10 * find(plain, lines).sum()
    assert plain.shape[0] > neither.shape[0]
    assert plain.shape == both.shape  # two entries fit a line
    undefined = np.array(UNDEFINED, dtype=np.uint8)
    assert 0.5 < find(hatched, undefined).sum() / find(plain, undefined).sum() < 0.9


@pytest.mark.parametrize("is_rising", [True, False])
def test_lines_of_a_pattern_are_slanted(is_rising: bool) -> None:
    """One pixel further down they are one pixel further left where they rise to the right."""
    canvas = Canvas(80, 80)
    pattern = Pattern((100, 100, 100), (0, 0, 0), is_rising)
    canvas.patterns(np.zeros((1, 1), dtype=np.int64), [pattern], (10, 10, 70, 70))
    lines = find(canvas.pixels()[11:69, 11:69], np.array((0, 0, 0), dtype=np.uint8))
    assert 0.2 < lines.mean() < 0.4
    shifted = lines[:-1, 1:] == lines[1:, :-1], lines[:-1, :-1] == lines[1:, 1:]
    assert [bool(same.all()) for same in shifted] == [is_rising, not is_rising]


def test_a_trivial_score_that_is_undefined_is_hatched_only() -> None:
    """One cell has one look: the legend does not name what is not there."""
    values = np.full((4, 6), np.nan)
    everywhere = np.ones((4, 6), dtype=bool)
    once = heatmap(values, hatched=everywhere)
    assert once.shape == heatmap(values, hatched=everywhere, grey=~everywhere).shape
    np.testing.assert_array_equal(once, heatmap(np.zeros((4, 6)), hatched=everywhere))


def test_categories_stand_where_their_layer_and_step_are() -> None:
    """Each cell has its pattern, one of which nothing was said is white, the legend names all."""
    names = list(VERDICT_PATTERNS)
    codes = np.array([[names.index("holds"), names.index("not yet")], [-1, names.index("holds")]])
    drawn = render_categories(
        codes, VERDICT_PATTERNS, layers=["first", "second"], steps=[0, 100], title="title"
    )
    dark, amber = (
        np.argwhere(find(drawn, np.array(VERDICT_PATTERNS[name].fill, dtype=np.uint8)))
        for name in ("holds", "not yet")
    )
    plot = [place[place[:, 1] < 640] for place in (dark, amber)]
    legend = [place[place[:, 1] > 640] for place in (dark, amber)]
    assert len(plot[0]) == pytest.approx(2 * len(plot[1]), rel=0.05)
    np.testing.assert_allclose(plot[0].mean(axis=0), plot[0][[0, -1]].mean(axis=0), atol=2)
    assert plot[1][:, 1].min() > plot[0][0, 1] + 100  # right
    assert plot[1][:, 0].max() < plot[0][-1, 0] - 50  # above
    assert legend[0][:, 0].max() < legend[1][:, 0].min()
    one = render_categories(
        codes * 0, VERDICT_PATTERNS, layers=["a", "b"], steps=[0, 1], title="title"
    )
    assert not find(one, np.array(VERDICT_PATTERNS["not yet"].fill, dtype=np.uint8)).any()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (0, 0), (200, 256), (1000, 256), (3, 1000)])
def test_categories_of_any_size_are_drawn_within_bounds(rows: int, columns: int) -> None:
    """As scores are."""
    drawn = render_categories(
        np.zeros((rows, columns), dtype=np.int64),
        {"holds": VERDICT_PATTERNS["holds"]},
        layers=[f"layer{i}" for i in range(rows)],
        steps=list(range(columns)),
        title="title",
    )
    assert drawn.shape[1:] == (WIDTH, 3)
    assert drawn.shape[0] <= max(rows, 364) + 200


def test_words_of_the_legend_stand_beside_the_plot() -> None:
    """Taller pictures are shown smaller: with many words a picture of few layers is taller."""
    whole = len(VERDICT_PATTERNS)
    codes = np.arange(whole)[None, :]
    sheets = [
        render_categories(
            codes % count, VERDICT_PATTERNS, layers=["a"], steps=list(range(whole)), title="title"
        )
        for count in (1, 5, whole)
    ]
    heights = [sheet.shape[0] for sheet in sheets]
    assert heights[0] == heights[1] < heights[2]
    for sheet in sheets:
        assert (sheet[:, -3:] == 255).all()  # no word leaves the picture
        assert (sheet[:, 660:] != 255).any()


def look(pattern: Pattern, deficiency: list[list[float]]) -> NDArray[np.float64]:
    """The fill as it is seen, in OKLab."""
    return oklab(linear(np.array(pattern.fill, dtype=np.uint8)) @ np.array(deficiency).T)


ONE_PICTURE = {
    "equality": ("holds", "approaching", "not yet", "trivial", "not applicable", "cannot tell",
                 "undefined"),
    "proportionality": ("aligned", "at chance", "below chance", "trivial", "not applicable",
                        "cannot tell", "undefined"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ONE_PICTURE)
@pytest.mark.parametrize("deficiency", [*DEFICIENCIES, "none", "greyscale"])
def test_verdicts_of_one_picture_are_told_apart(kind: str, deficiency: str) -> None:
    """By their colour under every dichromacy, by lightness in print, or by their lines."""
    grey = [[0.2126, 0.7152, 0.0722]] * 3
    seen_as = {**DEFICIENCIES, "none": np.eye(3).tolist(), "greyscale": grey}[deficiency]
    names = ONE_PICTURE[kind]
    for i, first in enumerate(names):
        for second in names[:i]:
            one, other = VERDICT_PATTERNS[first], VERDICT_PATTERNS[second]
            if (one.lines, one.is_rising) != (other.lines, other.is_rising):
                continue
            apart = np.linalg.norm(look(one, seen_as) - look(other, seen_as))
            assert apart > 0.07, (first, second, apart)


def test_states_share_the_patterns_of_the_verdicts_they_lead_to() -> None:
    """One colour has one meaning in all pictures."""
    assert STATE_PATTERNS["at stationarity"] == VERDICT_PATTERNS["holds"]
    assert STATE_PATTERNS["far"] == VERDICT_PATTERNS["not yet"]
    for name in ("approaching", "not applicable", "cannot tell"):
        assert STATE_PATTERNS[name] == VERDICT_PATTERNS[name]


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


def test_a_history_keeps_the_word_on_every_score() -> None:
    """Words by layer and step; another word, none, and an absent layer have no place."""
    history = StepHistory(4)
    history.add(0, {"a": 0.1, "b": 0.2}, {"a": "at chance"})
    history.add(5, {"a": 0.2, "c": 0.1}, {"a": "trivial", "c": "aligned"})
    assert history.layers == ["a", "c", "b"]
    words = ["trivial", "at chance"]
    np.testing.assert_array_equal(history.codes(words), [[1, 0], [-1, -1], [-1, -1]])


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


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_drawing_is_cheap(share: float) -> None:
    """A picture of 200 layers × 256 steps takes well under a fifth of a second, labels cached."""
    values = np.random.default_rng(0).uniform(-1, 1, (200, 256))
    grey, hatched = values < share - 1, values > 1 - share
    heatmap(values, grey=grey, hatched=hatched)
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        heatmap(values, grey=grey, hatched=hatched)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.2
