import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import BadConfig, Fit, Labelled, Pretrain, Rehearse, read_config
from training.fields import read_source
from training.fit import fit_tiles, predict, read_tiles
from training.rehearsal import read_rehearsal

CLASSES = ("Dense", "Sparse")

CONFIG = """
name = "x"
tile_mpp = 0.5
classes = ["Sparse", "Dense"]

[[sources]]
kind = "points"
folder = "{folder}"
table = "points.csv"
mpp = 0.5
share = 1.0
zoom = [1.0, 1.0]
held_out = 0.25

[[rules]]
label = "Dense"
kind = "points"
at_least = {{ nucleus = 5 }}

[[rules]]
label = "Sparse"
kind = "points"
at_least = {{ nucleus = 1 }}

[model]
tile_px = 30
"""


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory) -> Path:
    """Eight fields of nuclei that lie close in every second one; dense fields are dark all over."""
    folder: Path = tmp_path_factory.mktemp("nuclei")
    (folder / "images").mkdir()
    rows = []
    for n in range(8):
        step = 8 if n % 2 else 20
        Image.fromarray(np.full((60, 60, 3), (90 if n % 2 else 210) + n, np.uint8)).save(folder / "images" / f"{n}.png")
        rows += [
            {"image": f"{n}.png", "x": x, "y": y, "kind": "nucleus"}
            for x in range(4, 60, step)
            for y in range(4, 60, step)
        ]
    with (folder / "points.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    path = folder / "pretrain.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def test_cuts_are_labelled_by_rule_in_the_order_of_the_tiles_classes(pretraining):
    found = read_rehearsal(Rehearse(pretraining=pretraining, per_class=10), CLASSES, 30)
    assert torch.bincount(found.targets).tolist() == [10, 10]
    darkness = found.tiles.float().mean(dim=(1, 2, 3))
    assert (darkness[found.targets == 0] < 100).all() and (darkness[found.targets == 1] > 200).all()
    assert found.looks.shape == (20, 3)


def test_every_class_is_drawn_as_often_as_the_other(pretraining):
    torch.manual_seed(0)
    found = read_rehearsal(Rehearse(pretraining=pretraining, per_class=10), CLASSES, 30)
    drawn = torch.bincount(found.targets[found.draw(1000)])
    assert (drawn - 500).abs().max() < 60


def test_what_is_held_out_is_never_rehearsed(pretraining):
    found = read_rehearsal(Rehearse(pretraining=pretraining, per_class=3), CLASSES, 30)
    (source,) = read_config(pretraining, [], Pretrain).sources
    seen = set(found.tiles[:, 0, 0, 0].tolist())
    kept_away = {int(field.pixels[0, 0, 0]) for field in read_source(source).held_out}
    assert seen and kept_away and not seen & kept_away


@pytest.mark.parametrize(
    ("classes", "tile_px", "complaint"),
    [(("Dense", "Other"), 30, "Sparse"), (CLASSES, 45, "tiles of 30 px, the network takes 45")],
)
def test_a_pretraining_that_does_not_fit_is_refused(pretraining, classes, tile_px, complaint):
    with pytest.raises(BadConfig, match=complaint):
        read_rehearsal(Rehearse(pretraining=pretraining), classes, tile_px)


def test_a_fit_learns_from_the_rehearsed_cuts_too(pretraining, tmp_path, small_fit):
    """Tiles of one class alone teach nothing of the other; what is rehearsed does."""
    for n in range(8):
        (tmp_path / "tiles/Dense").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiles/Sparse").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 90 + n, np.uint8)).save(tmp_path / "tiles/Dense" / f"{n}.png")
        Image.fromarray(np.full((40, 40, 3), 100 + n, np.uint8)).save(tmp_path / "tiles/Sparse" / f"{n}.png")
    how = small_fit.optimisation.model_copy(update={"steps": 30, "batch": 8, "learning_rate": 3e-3})
    config = small_fit.model_copy(
        update={
            "data": Labelled(folder=tmp_path / "tiles", tile_mpp=0.5),
            "model": small_fit.model.__class__(tile_px=30, width=24, layers=1, heads=3),
            "optimisation": how,
            "rehearse": Rehearse(pretraining=pretraining, share=0.75, per_class=20),
        }
    )
    assert isinstance(config, Fit)
    tiles = read_tiles(config)
    net = fit_tiles(config, tiles, tmp_path / "run", None)
    asked = np.stack([np.full((30, 30, 3), level, np.uint8) for level in (90, 210)])
    assert predict(net, asked).argmax(1).tolist() == [0, 1]
