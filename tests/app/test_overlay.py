from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app import overlay
from app.colormaps import TABLES
from app.overlay import MARGIN_PX, PANEL_PX, UndrawableMap, choose_scale, draw_heads, draw_overlay

G = 10
PATCH_PX = PANEL_PX // G
UNIFORM = 1 / G**2


def grey_tile(level: int = 128) -> np.ndarray:
    return np.full((150, 150, 3), level, np.uint8)


def one_hot(row: int, column: int, value: float = 1.0) -> np.ndarray:
    grid = np.zeros((G, G), np.float32)
    grid[row, column] = value
    return grid


def open_overlay(grid: np.ndarray, tile: np.ndarray | None = None, **changed: Any) -> Image.Image:
    """Without a caption the panels start right below the margin."""
    options: dict[str, Any] = {
        "caption": "",
        "signed": False,
        "uniform_level": None,
        "colormap": "viridis",
        "alpha": 1.0,
        "upsample": "nearest",
        "tile_mpp": None,
    } | changed
    png = draw_overlay(grey_tile() if tile is None else tile, grid, **options)
    picture = Image.open(BytesIO(png))
    picture.load()
    return picture


def left_panel(picture: Image.Image) -> np.ndarray:
    corner = (MARGIN_PX, MARGIN_PX)
    return np.asarray(picture.crop((*corner, corner[0] + PANEL_PX, corner[1] + PANEL_PX)))


def right_panel(picture: Image.Image) -> np.ndarray:
    corner = (2 * MARGIN_PX + PANEL_PX, MARGIN_PX)
    return np.asarray(picture.crop((*corner, corner[0] + PANEL_PX, corner[1] + PANEL_PX)))


def patch_colours(picture: Image.Image) -> np.ndarray:
    """The colour in the middle of each patch: (G, G, 3)."""
    return right_panel(picture)[PATCH_PX // 2 :: PATCH_PX, PATCH_PX // 2 :: PATCH_PX]


def limits(picture: Image.Image) -> tuple[float, float]:
    low, high = picture.info["limits"].split(" to ")
    return float(low), float(high)


def lightness(table: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours (256, 3)."""
    linear = np.where(table <= 10.31, table / 255 / 12.92, ((table / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness: np.ndarray = 116 * np.cbrt(luminance.clip(0.008856)) - 16
    return lightness


@pytest.mark.parametrize("name", ["viridis", "cividis", "magma"])
def test_sequential_tables_are_matplotlibs_and_grow_lighter(name):
    assert (np.diff(lightness(TABLES[name])[2:]) > -0.35).all()
    colormaps = pytest.importorskip("matplotlib").colormaps
    original = colormaps[name](np.arange(256))[:, :3] * 255
    assert np.abs(TABLES[name] - original).max() < (4.5 if name == "cividis" else 1.5)


def test_diverging_table_favours_neither_sign():
    light = lightness(TABLES["diverging"])
    assert np.abs(light - light[::-1]).max() < 6
    assert light[127] > 95 > light[[0, 255]].max()
    blue, orange = TABLES["diverging"][[0, 255]].astype(int)
    assert blue[2] > blue[0] + 100 and orange[0] > orange[2] + 100


def test_left_panel_is_the_tile_itself():
    tile = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    tile[:75, :75] = (200, 30, 90)
    panel = left_panel(open_overlay(one_hot(0, 0), tile))
    assert (panel[20:180, 20:180] == (200, 30, 90)).all()
    np.testing.assert_allclose(panel.mean(axis=(0, 1)), tile.mean(axis=(0, 1)), atol=1)


def test_value_takes_its_colour_at_its_own_patch():
    colours = patch_colours(open_overlay(one_hot(2, 7)))
    assert (colours[2, 7] == TABLES["viridis"][255]).all()
    assert (colours == TABLES["viridis"][0]).all(axis=2).sum() == G**2 - 1


def test_alpha_is_the_share_of_the_colour_and_tissue_is_grey():
    tile = np.zeros((150, 150, 3), np.uint8)
    tile[...] = (160, 60, 140)
    grey = np.asarray(Image.fromarray(tile).convert("L"))[0, 0]
    colours = patch_colours(open_overlay(one_hot(0, 0), tile, alpha=0.25))
    np.testing.assert_allclose(colours[5, 5], 0.75 * grey + 0.25 * TABLES["viridis"][0], atol=1)


def test_colour_bar_wears_the_colours_of_the_map():
    picture = open_overlay(one_hot(0, 0), alpha=0.5)
    bar_px = 3 * MARGIN_PX + 2 * PANEL_PX + overlay.BAR_PX // 2
    bar = np.asarray(picture)[MARGIN_PX : MARGIN_PX + PANEL_PX, bar_px].astype(int)
    colours = patch_colours(picture).astype(int)
    np.testing.assert_allclose(bar[2], colours[0, 0], atol=3)
    np.testing.assert_allclose(bar[-3], colours[9, 9], atol=3)


@pytest.mark.parametrize("colormap", ["viridis", "magma", "diverging"])
def test_signed_map_is_diverging_and_centred_on_zero_whatever_is_asked(colormap):
    grid = one_hot(1, 1, 0.2) - one_hot(8, 8, 0.5)
    picture = open_overlay(grid, signed=True, colormap=colormap)
    assert limits(picture) == (-0.5, 0.5)
    colours = patch_colours(picture)
    table = TABLES["diverging"]
    assert (colours[8, 8] == table[0]).all()
    assert (colours[1, 1] == table[round(0.7 * 255)]).all()
    assert (colours[5, 5] == table[128]).all()


def test_unsigned_map_in_the_diverging_table_keeps_zero_in_its_middle():
    picture = open_overlay(one_hot(0, 0, 0.5), colormap="diverging")
    assert limits(picture) == (-0.5, 0.5)
    assert (patch_colours(picture)[5, 5] == TABLES["diverging"][128]).all()


@pytest.mark.parametrize("upsample", ["nearest", "bicubic"])
def test_flat_attention_is_mid_scale_and_not_stretched(upsample):
    noise = np.random.default_rng(0).normal(scale=1e-5, size=(G, G))
    picture = open_overlay(np.full((G, G), UNIFORM) + noise, uniform_level=UNIFORM, upsample=upsample)
    assert limits(picture) == (0, 2 * UNIFORM)
    np.testing.assert_allclose(patch_colours(picture), np.full((G, G, 3), TABLES["viridis"][128]), atol=2)


def test_rounding_in_a_signed_map_looks_like_nothing():
    noise = np.random.default_rng(0).normal(scale=1e-6, size=(G, G))
    colours = patch_colours(open_overlay(noise, signed=True))
    np.testing.assert_allclose(colours, np.full((G, G, 3), TABLES["diverging"][128]), atol=5)


@pytest.mark.parametrize("value", [0.0, 0.01, 7.0])
@pytest.mark.parametrize("signed", [True, False])
def test_constant_map_is_one_colour(value, signed):
    colours = patch_colours(open_overlay(np.full((G, G), value), signed=signed))
    assert (colours == colours[0, 0]).all()


def test_bicubic_claims_no_more_than_the_map_holds():
    grid = np.full((G, G), 0.4)
    grid[3:6, 3:6] = 0.6
    grid[0, 0] = 1.0  # so that an overshoot at the 0.6 would have a colour of its own
    panel = right_panel(open_overlay(grid, upsample="bicubic"))
    table = [tuple(colour) for colour in TABLES["viridis"].tolist()]
    levels = {table.index(tuple(colour)) for colour in np.unique(panel.reshape(-1, 3), axis=0).tolist()}
    assert min(levels) == round(0.4 * 255)
    assert max(levels) == 255
    assert len(levels) > 50, "bicubic is smooth"


def test_nearest_rules_the_true_patches():
    row = right_panel(open_overlay(np.full((G, G), 1.0)))[PATCH_PX // 2].astype(int)
    edges = np.flatnonzero((row != row[0]).any(axis=1))
    assert edges.tolist() == [edge * PATCH_PX for edge in range(1, G)]
    assert np.abs(row[edges] - row[0]).max() < 80, "faint"


@pytest.mark.parametrize(("mpp", "length_um"), [(0.495, 20), (0.25, 10), (2.0, 100), (0.17, 5)])
def test_scale_bar_has_the_length_it_says(mpp, length_um):
    white = grey_tile(255)
    panel = left_panel(open_overlay(one_hot(0, 0), white, tile_mpp=mpp))
    dark_per_row = (panel < 100).all(axis=2).sum(axis=1)
    um_per_px = 150 * mpp / PANEL_PX
    assert dark_per_row.max() * um_per_px == pytest.approx(length_um, rel=0.02)


def test_no_scale_bar_where_the_scale_is_unknown():
    panel = left_panel(open_overlay(one_hot(0, 0), grey_tile(255)))
    assert (panel == 255).all()


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_values_without_a_colour_are_refused(strange):
    with pytest.raises(UndrawableMap, match="1 of the map's 100 values"):
        open_overlay(one_hot(3, 3, strange))


@pytest.mark.parametrize("shape", [(G,), (G, G + 1), (2, G, G), (0, 0)])
def test_maps_of_another_shape_are_refused(shape):
    with pytest.raises(UndrawableMap, match="shape"):
        open_overlay(np.zeros(shape))


def test_caption_travels_whole_and_long_ones_take_more_lines():
    caption = "Tumör, µm ≥ 3 · " + "very long " * 30
    short, long = open_overlay(one_hot(0, 0), caption="short"), open_overlay(one_hot(0, 0), caption=caption)
    assert long.info["caption"] == caption
    assert long.width == short.width
    assert long.height - short.height == 2 * overlay.LINE_PX


def test_ticks_name_ends_middle_and_uniform_level():
    grid = one_hot(0, 0, 0.1)
    scale = choose_scale(grid, signed=False, uniform_level=UNIFORM, colormap="viridis")
    assert [label for _, label in scale.ticks] == ["0", "0.01 uniform", "0.05", "0.1"]
    flat = choose_scale(grid / 10, signed=False, uniform_level=UNIFORM, colormap="viridis")
    assert [label for _, label in flat.ticks] == ["0", "0.01 uniform", "0.02"]
    signed = choose_scale(grid, signed=True, uniform_level=None, colormap="viridis")
    assert [label for _, label in signed.ticks] == ["-0.1 against", "0", "+0.1 for"]


def test_every_tile_and_grid_size_is_drawn():
    for side_px, patches in [(32, 2), (224, 14), (150, 1), (1000, 50)]:
        tile = np.zeros((side_px, side_px, 3), np.uint8)
        assert open_overlay(np.ones((patches, patches)), tile, tile_mpp=0.5).width > 2 * PANEL_PX * 0.9


def heads(attention: np.ndarray) -> Image.Image:
    png = draw_heads(
        grey_tile(), attention, caption="", colormap="viridis", alpha=1.0, upsample="nearest", tile_mpp=0.5
    )
    picture = Image.open(BytesIO(png))
    picture.load()
    return picture


def test_heads_have_a_row_per_layer_and_a_column_per_head_and_mean():
    attention = np.full((3, 2, G, G), UNIFORM)
    small, large = heads(attention[:, :1]), heads(attention)
    assert large.width - small.width == overlay.CELL_PX + overlay.CELL_GAP_PX
    tall = heads(np.repeat(attention, 4, axis=0))
    middle = TABLES["viridis"][128]
    drawn = (np.asarray(tall) == middle).all(axis=2).sum()
    assert drawn == pytest.approx(12 * 3 * overlay.CELL_PX**2, rel=0.01)


def test_last_column_is_the_mean_of_the_heads():
    one, other = np.full((G, G), 0.25 * UNIFORM), np.full((G, G), 1.25 * UNIFORM)
    picture = np.asarray(heads(np.stack([one, other])[None]))
    mean = TABLES["viridis"][round(0.75 / 2 * 255)]
    assert (picture == mean).all(axis=2).sum() == pytest.approx(overlay.CELL_PX**2, rel=0.02)


def test_heads_share_their_limits():
    weak, strong = np.full((G, G), UNIFORM), np.zeros((G, G))
    strong[0] = 0.1
    picture = heads(np.stack([weak, strong])[None])
    assert limits(picture) == (0, 0.1)
    colours = {tuple(colour) for colour in np.unique(np.asarray(picture).reshape(-1, 3), axis=0).tolist()}
    assert tuple(TABLES["viridis"][round(0.1 * 255)].tolist()) in colours, "the weak head stays weak"
    assert tuple(TABLES["viridis"][255].tolist()) in colours


def test_a_sink_of_attention_does_not_darken_the_other_heads():
    attention = np.full((4, 4, G, G), UNIFORM)
    attention[0, 0] = one_hot(0, 0)
    assert limits(heads(attention)) == (0, 2 * UNIFORM)


def test_entropy_is_that_of_the_shares():
    assert overlay.entropy_bits(np.full((G, G), 0.003)) == pytest.approx(np.log2(G**2))
    assert overlay.entropy_bits(one_hot(4, 4, 0.5)) == 0
    half = one_hot(4, 4, 0.2) + one_hot(5, 5, 0.2)
    assert overlay.entropy_bits(half) == pytest.approx(1)


def test_heads_refuse_what_has_no_colour():
    attention = np.full((1, 1, G, G), UNIFORM)
    attention[0, 0, 0, 0] = np.nan
    with pytest.raises(UndrawableMap):
        heads(attention)
