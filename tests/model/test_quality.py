import numpy as np
import pytest
from PIL import Image, ImageFilter

from model.quality import PALETTE_SIZE, measure_quality, sharpness


def paint(color: tuple[int, int, int], side: int = 150) -> np.ndarray:
    return np.full((side, side, 3), color, np.uint8)


@pytest.mark.parametrize("color", [(255, 255, 255), (240, 240, 240), (235, 228, 238)])
def test_glass_is_no_tissue(color):
    assert measure_quality(paint(color)).tissue_share == 0


@pytest.mark.parametrize("color", [(230, 150, 200), (110, 60, 140), (40, 20, 60), (0, 0, 0)])
def test_stain_is_tissue(color):
    assert measure_quality(paint(color)).tissue_share == 1


def test_tissue_share_is_a_share():
    tile = paint((245, 245, 245))
    tile[:, :45] = (150, 90, 160)
    assert measure_quality(tile).tissue_share == pytest.approx(0.3, abs=0.01)


def test_blurring_lowers_sharpness_step_by_step():
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, (150, 150, 3), dtype=np.uint8))
    values = [sharpness(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 50 * values[2]


def test_a_flat_tile_has_no_sharpness():
    assert sharpness(paint((255, 0, 255))) == 0


def test_sharpness_against_a_plain_laplacian():
    tile = np.random.default_rng(1).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    grey = tile.astype(float) @ [1, 2, 1] // 4
    laplacian = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, 19)
        for x in range(1, 19)
    ]
    assert sharpness(tile) == pytest.approx(np.var(laplacian), rel=1e-5)


def test_a_tile_without_stain_has_numbers_all_the_same():
    quality = measure_quality(paint((255, 255, 255)), np.zeros(PALETTE_SIZE, bool))
    assert (quality.tissue_share, quality.odd_share, quality.blue_absorption) == (0, 0, 0)
    assert quality.brightness == 255 and quality.foreign_share == 1


@pytest.mark.parametrize(
    ("color", "odd", "blue_most"),
    [
        ((220, 120, 170), 0, False),  # eosin
        ((90, 50, 130), 0, False),  # haematoxylin
        ((140, 100, 60), 1, True),  # diaminobenzidine: brown
        ((60, 110, 180), 1, False),  # blue ink: red is absorbed most
        ((30, 160, 90), 1, True),  # green ink
        ((120, 120, 120), 0, False),  # grey
    ],
)
def test_what_absorbs_green_least_is_no_haematoxylin_or_eosin(color, odd, blue_most):
    quality = measure_quality(paint(color))
    assert quality.odd_share == odd and (quality.blue_absorption > 1) == blue_most


def test_brightness_is_that_of_the_tissue_alone():
    tile = paint((255, 255, 255))
    tile[:75] = (120, 60, 140)
    assert measure_quality(tile).brightness == pytest.approx((120 + 2 * 60 + 140) / 4, abs=8)


def test_colours_outside_the_palette_are_counted():
    tile = paint((200, 100, 150))
    tile[:, :15] = (10, 200, 10)
    palette = np.zeros(PALETTE_SIZE, bool)
    palette[(200 >> 4) << 8 | (100 >> 4) << 4 | 150 >> 4] = True
    assert measure_quality(tile, palette).foreign_share == pytest.approx(0.1, abs=0.01)
    assert measure_quality(tile).foreign_share is None
