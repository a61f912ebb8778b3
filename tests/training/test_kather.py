"""The configs for the full public set, from the archive to the artefact, on a stand-in of its layout and names."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from model.artifact import read_manifest
from model.vit import ViT, ViTConfig
from tests.conftest import ROOT
from tests.training.conftest import write_kather_stand_in_archive
from training import fetch
from training.commands import cli
from training.config import Fit, read_config
from training.fit import fit_tiles, read_tiles
from training.folds import split
from training.synthetic import KATHER_FOLDER

SMALL = ["optimisation.steps=2", "optimisation.batch=8", "optimisation.validate_every=2", "card.int8=false"]
SMALL += ["model.layers=1", "model.width=32", "model.heads=2", "augment.jpeg=0", "optimisation.precision=fp32"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What `tissue-train data fetch` leaves when the archive has come; ten tiles of each of the eight kinds."""
    target = tmp_path_factory.mktemp("kather2016")
    archive = target / fetch.KATHER_URL.rpartition("/")[2]
    write_kather_stand_in_archive(archive, per_class=10)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    tree = fetch.fetch(fetch.KATHER_URL, target, md5)  # an archive that is there is not downloaded
    assert tree.name == "Kather_texture_2016_image_tiles_5000"
    return tree


@pytest.fixture
def run(tree, tmp_path):
    def run_config(command, name, *overrides):
        arguments = [command, f"{ROOT}/configs/{name}.toml", f"data.folder={tree}", *SMALL, *overrides]
        result = CliRunner().invoke(cli, [*arguments, "--runs", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return run_config


def protocols(artifact):
    manifest = read_manifest(artifact)
    assert manifest.class_names == ["Tumor", "Stroma", "Complex", "Lympho", "Debris", "Mucosa"]
    return {metric.protocol: metric.n for metric in manifest.metrics if metric.name == "accuracy"}


def test_the_courses_split_gives_figures_of_validation_and_test(run):
    folder = run("fit", "kather2016", "course=[6,2,2]")
    names = [f"6/2/2 per class, the {part} part" for part in ("validation", "test")]
    assert protocols(folder / "artifact") == dict.fromkeys(names, 12)


def test_slides_are_held_out_one_by_one(run):
    folds = run("cv", "kather2016-slides") / "folds"
    assert not (folds / "random.npz").exists()
    assert np.load(folds / "slide.npz")["folds"].max() == 9
    accuracy = json.loads((folds / "metrics.json").read_text())[0]
    assert (accuracy["protocol"], accuracy["n"]) == ("leave one of 10 slides out, all tiles of known slide", 10)


def test_training_starts_from_a_checkpoint_with_timms_names(tree, tmp_path, caplog):
    torch.manual_seed(0)
    theirs = ViT(ViTConfig(tile_px=224, patch_px=16, width=32, layers=1, heads=2), classes=1000)
    save_file(theirs.state_dict(), tmp_path / "deit.safetensors")
    caplog.set_level("INFO")
    own = [f"data.folder={tree}", "course=[6,2,2]", f"init={tmp_path}/deit.safetensors"]
    config = read_config(ROOT / "configs" / "kather2016-pretrained.toml", [*SMALL, *own], Fit)
    train, parts = split(read_tiles(config), config)
    net = fit_tiles(config, train, tmp_path / "run", next(iter(parts.values())))
    assert isinstance(net, ViT) and net.head.weight.shape == (6, 32)
    assert "new: head; not used: head" in caplog.text


def test_the_stand_in_archive_has_the_published_layout(tmp_path: Path):
    path = tmp_path / "archive.zip"
    write_kather_stand_in_archive(path, per_class=2)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        classes = "01_TUMOR 02_STROMA 03_COMPLEX 04_LYMPHO 05_DEBRIS 06_MUCOSA 07_ADIPOSE 08_EMPTY"
        folders = [name for name in names if name.endswith("/")]
        assert folders == [f"{KATHER_FOLDER}/", *(f"{KATHER_FOLDER}/{name}/" for name in classes.split())]
        tiles = [name for name in names if name.endswith(".tif")]
        assert len(tiles) == 16 and "CRC-Prim-HE-01_001.tif_Row_1_Col_1.tif" in tiles[0]
        with archive.open(tiles[0]) as file, Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("TIFF", "RGB", (150, 150))
            assert image.info["dpi"] == (72, 72)
