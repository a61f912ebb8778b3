from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import BadTable, scan
from training.synthetic import draw_tile
from training.twins import find_near_duplicates, group_pairs, read_pairs


def test_near_duplicates_are_found_through_all_that_is_done_to_images(tmp_path: Path):
    kinds = ("Tumor", "Stroma", "Complex", "Lympho", "Debris", "Mucosa", "Adipose", "Empty")
    tiles = [draw_tile(kind, seed) for kind in kinds for seed in range(5)]
    n = len(tiles)
    mirrored = np.rot90(tiles[3])[:, ::-1]
    stretched = np.clip((tiles[8].astype(float) - 60) * 1.5, 0, 255).astype(np.uint8)
    enlarged = Image.fromarray(stretched).resize((224, 224), Image.Resampling.BICUBIC)
    resized = np.asarray(enlarged.resize((150, 150), Image.Resampling.BICUBIC))
    Image.fromarray(tiles[12]).save(tmp_path / "a.jpg", quality=40)
    with Image.open(tmp_path / "a.jpg") as image:
        compressed = np.asarray(image)
    flat = np.full_like(tiles[0], 200)
    batch = np.stack([*tiles, mirrored, resized, compressed, flat, flat])
    assert find_near_duplicates(batch) == [(3, n), (8, n + 1), (12, n + 2)]


def test_near_duplicates_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.twins.BLOCK", 4)
    tiles = np.stack([draw_tile("Tumor", seed, 40) for seed in range(9)])
    tiles[8] = np.rot90(tiles[0])  # a quarter turn, whose inverse is another one
    tiles[7] = tiles[6]
    assert find_near_duplicates(tiles) == [(0, 8), (6, 7)]


def test_groups_follow_chains():
    assert group_pairs(6, [(0, 1), (3, 4), (1, 3)]).tolist() == [0, 0, 2, 0, 0, 5]


def test_near_duplicates_from_a_table(tree: Path):
    records = scan(tree).records
    names = [record.path.relative_to(tree.parent).as_posix() for record in records]
    assert names[0].startswith("tree/01_TUMOR/")
    table = tree / "near_duplicates.csv"
    table.write_text(f"a,b\n{names[1]},{names[0]}\n{names[0]},{names[1]}\n{names[5]},tree/gone.png\n")
    assert read_pairs(table, scan(tree)) == [(0, 1)]

    inner = [name.removeprefix("tree/") for name in names]
    table.write_text(f"a,b\n{inner[2]},{inner[4]}\n")
    assert read_pairs(table, scan(tree)) == [(2, 4)]


def test_the_twin_of_a_dropped_duplicate_is_kept_together_with_the_one_kept(tree: Path):
    copy = tree / "01_TUMOR" / "z.png"
    copy.write_bytes(min((tree / "01_TUMOR").glob("*.png")).read_bytes())
    other = scan(tree).records[5].path.relative_to(tree)
    table = tree / "near_duplicates.csv"
    table.write_text(f"a,b\n01_TUMOR/z.png,{other.as_posix()}\n")
    assert read_pairs(table, scan(tree)) == [(0, 5)]


def test_a_table_of_other_files_is_refused(tree: Path):
    table = tree / "near_duplicates.csv"
    table.write_text("a,b\nelsewhere/1.png,elsewhere/2.png\n")
    with pytest.raises(BadTable, match=r"names no file that is there; the first is elsewhere/1\.png"):
        read_pairs(table, scan(tree))


def test_a_table_of_pairs_may_have_none(tree: Path, tmp_path: Path):
    (tmp_path / "pairs.csv").write_text("a,b\n")
    assert read_pairs(tmp_path / "pairs.csv", scan(tree)) == []
