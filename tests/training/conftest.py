"""One small run through the whole way, shared by the tests of what it leaves."""

from pathlib import Path

import pytest

from model.vit import ViTConfig
from training import synthetic
from training.augment import Augmentation
from training.config import Fit, Labelled, Optimisation


@pytest.fixture(scope="session")
def tile_folder(tmp_path_factory) -> Path:
    """Six classes of ten generated tiles, named as the Kather tiles are, from several slides."""
    folder: Path = tmp_path_factory.mktemp("data") / "tiles"
    synthetic.write_tree(folder, 10, seed=0)
    return folder


@pytest.fixture(scope="session")
def small_fit(tile_folder) -> Fit:
    return Fit(
        name="small",
        data=Labelled(folder=tile_folder, classes=["Tumor", "Stroma", "Lympho"]),
        model=ViTConfig(width=32, layers=2, heads=2, pool="both", early_share=0.5),
        augment=Augmentation(blur=0, low_resolution=0, jpeg=0),
        optimisation=Optimisation(steps=4, batch=8, token_drop=0.5, validate_every=4, checkpoint_every=4),
        repeats=2,
    )
