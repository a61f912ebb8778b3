import numpy as np
import pytest
from PIL import Image, ImageFilter

from model.quality import sharpness, tissue_share


def paint(color: tuple[int, int, int], side: int = 150) -> np.ndarray:
    return np.full((side, side, 3), color, np.uint8)


@pytest.mark.parametrize("color", [(255, 255, 255), (240, 240, 240), (235, 228, 238)])
def test_glass_is_no_tissue(color):
    assert tissue_share(paint(color)) == 0


@pytest.mark.parametrize("color", [(230, 150, 200), (110, 60, 140), (40, 20, 60), (0, 0, 0)])
def test_stain_is_tissue(color):
    assert tissue_share(paint(color)) == 1


def test_tissue_share_is_a_share():
    tile = paint((245, 245, 245))
    tile[:, :45] = (150, 90, 160)
    assert tissue_share(tile) == pytest.approx(0.3, abs=0.01)


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
