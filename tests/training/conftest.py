"""One small run through the whole way, shared by the tests of what it leaves."""

from pathlib import Path

import pytest

from model.vit import ViTConfig
from training import synthetic
from training.augment import Augmentation
from training.config import Compare, Fit, Labelled, Optimisation, read_config


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
        data=Labelled(folder=tile_folder, classes=["Tumor", "Stroma", "Lympho"], tile_mpp=0.495),
        model=ViTConfig(width=32, layers=2, heads=2, pool="both", early_share=0.5),
        augment=Augmentation(blur=0, low_resolution=0, jpeg=0),
        optimisation=Optimisation(steps=4, batch=8, token_drop=0.5, validate_every=4, checkpoint_every=4),
        repeats=2,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four tiles each of Tumor and Stroma, on slides 01 to 04."""
    synthetic.write_tree(tmp_path / "tree", 4, kinds=("Tumor", "Stroma"))
    return tmp_path / "tree"


@pytest.fixture
def contest_config(tile_folder, tmp_path) -> Compare:
    """A ViT, a ResNet, and a ViT whose weights aren't there yet."""
    (tmp_path / "shared.toml").write_text(
        f'name = "x"\n[data]\nfolder = "{tile_folder}"\ntile_mpp = 0.495\nclasses = ["Tumor", "Stroma", "Lympho"]\n'
        "[augment]\njpeg = 0.0\nblur = 0.0\nlow_resolution = 0.0\n"
        "[optimisation]\nsteps = 2\nbatch = 8\ntoken_drop = 0.5\nvalidate_every = 2\ncheckpoint_every = 2\n"
    )
    (tmp_path / "compare.toml").write_text(
        f'name = "c"\nlike = "{tmp_path}/shared.toml"\nfolds = 2\nrounds = 2\nfinalists = 1\n'
        '[[networks]]\nname = "small ViT"\nmodel = { width = 24, layers = 1, heads = 2 }\n'
        '[[networks]]\nname = "ResNet"\noptimisation = { token_drop = 0.0, steps = 1 }\n'
        'model = { architecture = "resnet", widths = [8, 8, 8, 8], blocks = [1, 1, 1, 1] }\n'
        '[[networks]]\nname = "ViT from elsewhere"\nmodel = { width = 24, layers = 1, heads = 2 }\n'
        f'init = "{tmp_path}/later.pt"\nagainst = "ResNet"\n'
    )
    return read_config(tmp_path / "compare.toml", [], Compare)
