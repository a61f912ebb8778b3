import re

import numpy as np
import pytest

from training.compare import choose_finalists, collect, compare, enter, run_folds
from training.config import BadConfig, Compare, Fit, read_config
from training.fit import make_folds, read_tiles
from training.run import claim


@pytest.fixture
def config(tile_folder, tmp_path):
    (tmp_path / "shared.toml").write_text(
        f'name = "x"\n[data]\nfolder = "{tile_folder}"\nclasses = ["Tumor", "Stroma", "Lympho"]\n'
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


def test_networks_share_all_settings_but_their_own(config):
    shared = read_config(config.like, [], Fit)
    vit, resnet, _ = (entrant.config for entrant in enter(config, config.like.parent / "runs"))
    assert vit.data == resnet.data == shared.data and vit.augment == resnet.augment == shared.augment
    assert vit.optimisation == shared.optimisation and vit.folds == 2
    assert (resnet.optimisation.steps, resnet.optimisation.token_drop, resnet.optimisation.batch) == (1, 0, 8)


def test_a_comparison_goes_on_and_ends_in_a_table(config, tmp_path):
    told: list[str] = []
    page = tmp_path / "docs" / "comparison.md"
    compare(config, tmp_path / "runs", page, told.append)
    text = page.read_text()
    assert f"ViT from elsewhere waits for {tmp_path}/later.pt" in told
    assert (tmp_path / "docs" / "images" / "comparison.png").exists()
    rows = dict(re.findall(r"^\| ([^|]+) \| (0\.\d+ \[[^|]+\] \| 0\.\d+ [^|]+ \| 0\.\d+ [^|]+) \|$", text, re.M))
    assert {"small ViT", "ResNet", "colour histogram, SVM"} <= rows.keys()
    assert "| ViT from elsewhere | not finished | not finished | not finished |" in text
    assert re.search(r"\| ResNet \| small ViT \| [+-]0\.\d+ \[", text)
    assert "## The best 1, 2 rounds of folds" in text
    folds = sorted(path.parent.name for path in (tmp_path / "runs" / "c").rglob("logits.npy"))
    assert len([f for f in folds if f.startswith("random-0")]) == 4 and len([f for f in folds if "random-1" in f]) == 2

    killed = tmp_path / "runs" / "c" / "resnet" / "folds" / "slide-0-3" / "logits.npy"
    before = np.load(killed)
    killed.unlink()
    compare(config, tmp_path / "runs", page, told.append, train=False)
    assert not killed.exists()
    assert re.search(r"\| ResNet \| 0\.\d+ [^|]+ \| 0\.\d+ [^|]+ \| not finished \|", page.read_text())
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("logits.npy")}
    entrants = enter(config, tmp_path / "runs" / "c")
    run_folds(config, entrants, read_tiles(entrants[0].config), told.append)
    np.testing.assert_array_equal(np.load(killed), before)
    assert all(path.stat().st_mtime_ns == written for path, written in others.items())


def test_the_best_by_one_round_are_the_finalists(config, tmp_path):
    entrants = enter(config, tmp_path / "runs")[:2]
    tiles = read_tiles(entrants[0].config)
    assert choose_finalists(config, entrants, tiles) == []
    truth = np.eye(3, dtype=np.float32)[tiles.targets]
    for entrant, answers in zip(entrants, (truth[:, ::-1], truth), strict=True):
        for number, fold in enumerate(make_folds(tiles, entrant.config, "random", 0)):
            path = entrant.folder / "folds" / f"random-0-{number}" / "logits.npy"
            path.parent.mkdir(parents=True)
            np.save(path, answers[fold.held_out])
    assert choose_finalists(config, entrants, tiles) == [entrants[1]]
    found = collect(entrants[1], tiles, "random", 1)
    assert found is not None and (found.logits[0].argmax(1) == tiles.targets).all()
    assert collect(entrants[1], tiles, "random", 2) is None


def test_folds_that_began_from_other_weights_are_not_continued(config, tmp_path):
    (tmp_path / "later.pt").write_bytes(b"these")
    entrants = enter(config, tmp_path / "runs")[2:]
    claim(entrants[0].folder, entrants[0].config)
    (tmp_path / "later.pt").write_bytes(b"those")
    with pytest.raises(BadConfig, match=r"holds a run with other \['init_sha256'\]"):
        run_folds(config, entrants, read_tiles(entrants[0].config), print)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "ResNet"', 'name = "small ViT"', "names must differ"),
        ('against = "ResNet"', 'against = "Resnet"', "nothing is named Resnet"),
        ("token_drop = 0.0", "token_drop = 0.5", "resnet has no tokens to drop"),
        ("widths = [8, 8, 8, 8]", "width = 8", "unknown key 'width'; the nearest known one is 'widths'"),
        ('"resnet"', '"vgg"', "vgg"),
    ],
)
def test_what_cannot_be_compared_is_refused(config, tmp_path, old, new, message):
    path = tmp_path / "compare.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((BadConfig, ValueError), match=message):
        enter(read_config(path, [], Compare), tmp_path / "runs")
