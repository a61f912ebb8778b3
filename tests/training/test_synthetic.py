import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import scan
from training.synthetic import (
    KINDS,
    SHIPPED_KINDS,
    draw_tile,
    write_tree,
)


@pytest.fixture(scope="module")
def tiles() -> dict[str, np.ndarray]:
    """Twelve of each kind."""
    return {kind: np.stack([draw_tile(kind, seed) for seed in range(12)]) for kind in KINDS}


def test_a_seed_is_a_tile():
    first = draw_tile("Mucosa", 7)
    assert first.shape == (150, 150, 3) and first.dtype == np.uint8
    assert np.array_equal(first, draw_tile(KINDS.index("Mucosa"), 7))
    assert not np.array_equal(first, draw_tile("Mucosa", 8))
    assert not np.array_equal(first, draw_tile("Tumor", 7))


def test_a_seed_is_the_same_tile_with_every_numpy():
    # Means of the four quarters, drawn with numpy 2.4 on x86-64: another random stream would move them by tens.
    pinned = {
        "Tumor": [118.43, 121.56, 119.65, 116.69],
        "Stroma": [135.68, 149.62, 135.68, 136.43],
        "Complex": [131.33, 130.43, 132.3, 125.35],
        "Lympho": [80.02, 86.81, 87.19, 85.14],
        "Debris": [187.68, 170.49, 170.07, 189.86],
        "Mucosa": [139.42, 149.17, 156.68, 138.36],
    }
    for kind, means in pinned.items():
        quarters = draw_tile(kind, 0).reshape(2, 75, 2, 75, 3).mean(axis=(1, 3, 4)).ravel()
        assert quarters == pytest.approx(means, abs=0.05), kind


@pytest.mark.parametrize(("tile_px", "seeds"), [(32, 20), (60, 2), (224, 1)])
def test_any_side(tile_px: int, seeds: int):
    for kind in KINDS:
        for seed in range(seeds):  # a small field may hold no cell at all
            assert draw_tile(kind, seed, tile_px).shape == (tile_px, tile_px, 3)


def test_kinds_look_as_they_should(tiles: dict[str, np.ndarray]):
    brightness = {kind: tiles[kind].mean() for kind in KINDS}
    red, _, blue = ({kind: tiles[kind][..., channel].mean() for kind in KINDS} for channel in range(3))
    dark_blue = {kind: float(np.mean(tiles[kind][..., 0] < 90)) for kind in KINDS}  # haematoxylin takes the red

    assert (
        brightness["Lympho"] < brightness["Tumor"] < brightness["Stroma"] < brightness["Debris"] < brightness["Empty"]
    )
    assert red["Stroma"] - blue["Stroma"] > 30 > red["Tumor"] - blue["Tumor"]  # pink; purple
    assert dark_blue["Lympho"] > 0.35 and dark_blue["Stroma"] < 0.12
    assert dark_blue["Stroma"] < dark_blue["Complex"] < dark_blue["Lympho"]
    assert brightness["Empty"] > 215 and brightness["Adipose"] > 195


def test_stains_differ_from_seed_to_seed(tiles: dict[str, np.ndarray]):
    for kind in SHIPPED_KINDS:
        assert tiles[kind].mean(axis=(1, 2)).std(axis=0).mean() > 5, kind


def test_drawing_is_fast():
    for kind in SHIPPED_KINDS:
        draw_tile(kind, 0)
    start = time.process_time()
    for seed in range(5):
        for kind in SHIPPED_KINDS:
            draw_tile(kind, seed)
    assert (time.process_time() - start) / 30 < 0.05  # 6 ms on a core of its own


def test_a_written_tree_scans_with_slides(tmp_path: Path):
    write_tree(tmp_path, per_class=3, seed=5)
    found = scan(tmp_path)
    assert found.classes == list(SHIPPED_KINDS)
    assert not found.unreadable and not found.duplicates
    assert [record.slide for record in found.records] == ["01", "02", "03"] * 6
    with Image.open(found.records[0].path) as image:
        assert np.array_equal(np.asarray(image), draw_tile("Tumor", 5_000_000))
