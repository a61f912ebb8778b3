import numpy as np

from training.fit import read_tiles
from training.folds import split, together
from training.looks import group_looks, look_features
from training.synthetic import draw_tile

PURPLE, PINK = np.array([120, 60, 140]), np.array([230, 150, 190])


def stained(colour: np.ndarray, n: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(-15, 16, (n, 30, 30, 3))
    return (colour + noise).astype(np.uint8)


def test_images_of_one_stain_get_one_group(monkeypatch):
    monkeypatch.setattr("training.looks.LOOKS", 2)
    groups = group_looks(
        np.concatenate([stained(PURPLE, 6), stained(PINK, 6)]), np.zeros(12, int), np.arange(12), seed=0
    )
    assert len(set(groups[:6])) == len(set(groups[6:])) == 1 and groups[0] != groups[6]


def test_classes_have_looks_of_their_own(monkeypatch):
    monkeypatch.setattr("training.looks.LOOKS", 2)
    tiles = np.concatenate([stained(PURPLE, 3), stained(PINK, 3)] * 2)
    groups = group_looks(tiles, np.repeat([0, 1], 6), np.arange(12), seed=0)
    assert not set(groups[:6]) & set(groups[6:]) and len(set(groups)) == 4


def test_near_duplicates_get_one_group_whatever_they_look_like(monkeypatch):
    monkeypatch.setattr("training.looks.LOOKS", 2)
    together = np.arange(12)
    together[[3, 9]] = 3
    groups = group_looks(np.concatenate([stained(PURPLE, 6), stained(PINK, 6)]), np.zeros(12, int), together, seed=0)
    assert groups[9] == groups[3] == groups[0]


def test_a_look_is_the_same_from_all_sides():
    tile = draw_tile("Tumor", 1)
    np.testing.assert_allclose(look_features(tile[None]), look_features(np.rot90(tile)[None]))


def test_whole_groups_are_held_out_and_near_duplicates_come_from_the_table(small_fit, tile_folder, tmp_path):
    first, second = sorted(tile_folder.glob("01_TUMOR/*"))[:2]
    table = tmp_path / "near.csv"
    table.write_text(f"a,b\n{first},{second}\n")
    data = small_fit.data.model_copy(update={"near_duplicates": table})
    config = small_fit.model_copy(update={"data": data, "split": "looks"})
    tiles = read_tiles(config)
    assert (together(tiles) == np.array([0, 0, *range(2, 30)])).all()
    train, parts = split(tiles, config)
    (held_out,) = parts.values()
    assert len(train.targets) + len(held_out.targets) == 30
    groups = dict(
        zip([r.sha256 for r in tiles.records], group_looks(tiles.tiles, tiles.targets, together(tiles), 0), strict=True)
    )
    assert not {groups[r.sha256] for r in train.records} & {groups[r.sha256] for r in held_out.records}
