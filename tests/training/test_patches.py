import csv

import numpy as np
import pytest
from PIL import Image

from model.vit import ViTConfig
from training.config import Optimisation, Pretrain, Source
from training.figures import draw_patch_maps
from training.patches import PatchMaps, look_at_held_out
from training.pretrain import Pretrained, open_sources, pretrain


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Pretrain:
    """Dark glands in the left or the right half of pale fields."""
    root = tmp_path_factory.mktemp("glands")
    rows = []
    for n in range(12):
        mask = np.zeros((60, 60), bool)
        mask[:, :30] = n % 2
        mask[:, 30:] = not n % 2
        Image.fromarray(mask).save(root / f"mask{n}.png")
        Image.fromarray(np.where(mask[..., None], 90, 230).astype(np.uint8).repeat(3, 2)).save(root / f"{n}.png")
        rows.append({"image": f"{n}.png", "mask": f"mask{n}.png", "grade": "benign" if n % 3 else "malignant"})
    with (root / "fields.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return Pretrain(
        name="glands",
        tile_mpp=0.5,
        sources=[Source(kind="masks", folder=root, table="fields.csv", mpp=0.5, share=1, held_out=0.25)],
        model=ViTConfig(tile_px=60, width=24, layers=1, heads=3),
        optimisation=Optimisation(steps=40, batch=9, learning_rate=3e-3, ema=0.9, validate_every=40),
    )


def test_what_was_learnt_is_seen_in_fields_that_were_held_out(config, tmp_path):
    cutters = open_sources(config)
    found = look_at_held_out(pretrain(config, cutters, tmp_path), cutters[0])
    assert found is not None and found.names == ["gland"]
    assert found.tiles.shape == (3, 60, 60, 3) and found.truth.shape == found.seen.shape == (3, 4, 4, 1)
    assert found.correlation(0) > 0.8
    draw_patch_maps(found, tmp_path / "held-out.png")
    with Image.open(tmp_path / "held-out.png") as picture:
        assert min(picture.size) > 300


def test_sources_with_nothing_in_their_patches_show_nothing(config):
    folder = config.sources[0].folder
    everything_learnt = config.model_copy(update={"sources": [config.sources[0].model_copy(update={"held_out": 0.0})]})
    images = config.model_copy(update={"sources": [Source(kind="images", folder=folder, share=1)]})
    for other in (everything_learnt, images):
        [cutter] = open_sources(other)
        assert look_at_held_out(Pretrained(other.model, 0, [cutter.collection]), cutter) is None


def test_correlation_is_over_the_patches_of_all_tiles():
    truth = np.zeros((2, 2, 2, 1), np.float32)
    truth[1] = 1
    seen = 3 * truth + 1
    maps = PatchMaps("", ["a"], np.zeros((2, 4, 4, 3), np.uint8), truth, seen)
    assert maps.correlation(0) == pytest.approx(1)
    assert np.isnan(maps._replace(truth=np.zeros_like(truth)).correlation(0))
