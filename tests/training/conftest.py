"""One small run through the whole way, shared by the tests of what it leaves."""

import csv
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.vit import ViTConfig
from training import synthetic
from training.augment import Augmentation
from training.config import Compare, Fit, Labelled, Optimisation, Pretrain, Rule, Source, read_config
from training.synthetic import KATHER_FOLDER, KINDS, draw_tile, kather_folder, kather_name

TILE_PX = 60
MODEL = ViTConfig(tile_px=TILE_PX, width=24, layers=2, heads=3, pool="both")
HOW = Optimisation(steps=3, batch=6, token_drop=0.5, validate_every=3, checkpoint_every=3)


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
        model=ViTConfig(width=32, layers=2, heads=2, pool="both", early_share=0.5, colour_share=0.2),
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


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """Ten small images of each kind of annotation, with what is marked where it can be seen."""
    root: Path = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    points, glands = [], []
    for n in range(10):
        for folder in ("coarse/dark", "coarse/light", "nuclei/images", "glands/images", "glands/masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for label, grey in (("dark", 60), ("light", 200)):
            noise = rng.integers(-20, 20, (80, 80, 3)) + grey
            Image.fromarray(noise.astype(np.uint8)).save(root / "coarse" / label / f"{n}.png")
        field = np.full((100, 120, 3), 220, np.uint8)
        for x, y in rng.integers(5, 95, (6, 2)):
            field[y - 2 : y + 3, x - 2 : x + 3] = (80, 40, 120)
            points.append({"image": f"{n}.png", "x": x, "y": y, "kind": "round" if x < 50 else "long"})
        Image.fromarray(field).save(root / "nuclei/images" / f"{n}.png")
        mask = np.zeros((100, 120), bool)
        mask[:, :60] = True
        Image.fromarray(mask).save(root / "glands/masks" / f"{n}.png")
        Image.fromarray(np.where(mask[..., None], 120, 230).astype(np.uint8).repeat(3, 2)).save(
            root / "glands/images" / f"{n}.png"
        )
        grade = "benign" if n % 2 else "malignant"
        glands.append({"image": f"images/{n}.png", "mask": f"masks/{n}.png", "patient": f"p{n // 2}", "grade": grade})
    for name, rows in (("nuclei/points.csv", points), ("glands/fields.csv", glands)):
        with (root / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return root


def make_pretraining(folders: Path, **changes) -> Pretrain:
    sources = [
        Source(kind="classes", folder=folders / "coarse", share=1, zoom=(0.7, 1.0)),
        Source(kind="points", folder=folders / "nuclei", table="points.csv", mpp=0.5, share=1),
        Source(kind="masks", folder=folders / "glands", table="fields.csv", mpp=0.5, share=1),
    ]
    rules = [
        Rule(label="Round", kind="points", at_least={"round": 3}, absent=["long"]),
        Rule(label="Gland", kind="masks", at_least={"malignant": 0.6}),
    ]
    settings = {
        "optimisation": HOW,
        "tile_mpp": 0.5,
        "classes": ["Round", "Gland"],
        "rules": rules,
        "model": MODEL,
    }
    return Pretrain(name="x", **{"sources": sources, **settings, **changes})


def write_kather_stand_in_archive(path: Path, per_class: int) -> None:
    """Layout, names, kind of file and even the meaningless 72 dpi of the published archive, with drawn tiles."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir(KATHER_FOLDER)
        for kind in KINDS:
            archive.mkdir(f"{KATHER_FOLDER}/{kather_folder(kind)}")
            for i in range(per_class):
                file = BytesIO()
                Image.fromarray(draw_tile(kind, i)).save(file, "TIFF", dpi=(72, 72))
                archive.writestr(f"{KATHER_FOLDER}/{kather_name(kind, i, 'tif')}", file.getvalue())
