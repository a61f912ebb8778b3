import csv

import numpy as np
import pytest
import torch

from model.session import open_classifier
from training import robustness
from training.augment import STAINS, compress, density_of
from training.figures import draw_robustness
from training.replay import OPERATORS
from training.robustness import (
    answer_all,
    blur,
    coarsen,
    join_protocols,
    learn_patch,
    measure,
    name_apart,
    paint,
    paste,
    scale_stains,
    shuffle,
    write_rows,
)
from training.synthetic import draw_tile


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tile():
    return draw_tile(0, seed=1)


def test_shuffling_moves_whole_cells_and_loses_none(tile, rng):
    numbered = np.repeat(np.kron(np.arange(9).reshape(3, 3), np.ones((50, 50)))[..., None], 3, axis=2).astype(np.uint8)
    mixed = shuffle(numbered, 3, rng)
    assert sorted(mixed[25::50, 25::50, 0].ravel()) == list(range(9)) and not (mixed == numbered).all()
    assert all(len(np.unique(mixed[y : y + 50, x : x + 50])) == 1 for y in (0, 50, 100) for x in (0, 50, 100))
    np.testing.assert_array_equal(np.sort(shuffle(tile, 10, rng), axis=None), np.sort(tile, axis=None))


def test_patches_that_are_not_kept_are_painted(tile):
    keeps = np.ones((1, 100), bool)
    keeps[0, 23] = False
    painted = paint(tile[None], keeps, 255)[0]
    changed = (painted != tile).any(axis=2)
    assert (painted[30:45, 45:60] == 255).all() and not changed[:30].any() and not changed[:, :45].any()


def test_stains_change_by_the_factor_and_glass_stays_glass(tile, rng):
    np.testing.assert_allclose(scale_stains(tile, 0, rng).astype(int), tile, atol=1)
    stains = STAINS.numpy().astype(np.float64)
    pale = (256 * np.exp(-np.array([[[0.2, 0.3, 0.0]]]) @ stains) - 1).round().astype(np.uint8)
    before = density_of(pale) @ np.linalg.inv(stains)
    seen = set()
    for seed in range(20):
        after = density_of(scale_stains(pale, 0.3, np.random.default_rng(seed))) @ np.linalg.inv(stains)
        change = np.log(after / before)[0, 0, :2]
        np.testing.assert_allclose(np.abs(change), 0.3, atol=0.05)  # pixels are whole numbers
        seen.add(tuple(np.sign(change)))
    assert len(seen) == 4  # each stain by itself, up or down
    glass = np.full((30, 30, 3), 255, np.uint8)
    np.testing.assert_array_equal(scale_stains(glass, 0.5, rng), glass)


def test_each_series_gets_worse(tile, rng):
    def distance(damaged):
        return np.abs(damaged.astype(int) - tile).mean()

    for series in (
        [blur(tile, sigma, rng) for sigma in (0.5, 1, 3)],
        [compress(tile, quality) for quality in (80, 40, 10)],
        [coarsen(tile, factor, rng) for factor in (1.25, 2, 4)],
    ):
        far = [distance(damaged) for damaged in series]
        assert far == sorted(far) and far[0] > 0


def test_a_learnt_patch_misleads_where_noise_does_not(rng, monkeypatch):
    """The network: bright tiles are class 0, dark ones class 1. The patch for dark tiles must turn bright."""
    monkeypatch.setattr(robustness, "ATTACK_STEPS", 30)

    def replay(tiles):
        brightness = tiles.mean(dim=(1, 2, 3)) / 255 - 0.4
        return torch.stack([50 * brightness, -50 * brightness], dim=1)

    dark = rng.integers(60, 100, (6, 20, 20, 3)).astype(np.uint8)
    patch = learn_patch(replay, dark, np.ones(6, np.intp), 10, rng)
    assert patch.shape == (10, 10, 3) and patch.mean() > 230
    pasted = np.stack([paste(tile, patch, np.array([5, 5])) for tile in dark])
    assert (replay(torch.from_numpy(pasted).float()).argmax(dim=1) == 0).all()
    assert (replay(torch.from_numpy(dark).float()).argmax(dim=1) == 1).all()
    assert dark.max() < 100  # pasting copies


def test_artefacts_stand_side_by_side_in_table_and_pictures(tiny_artifact, tile_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "ATTACK_STEPS", 1)
    monkeypatch.setattr(robustness, "SHARES", (0.5,))
    twice = [tiny_artifact, tiny_artifact]
    rows, protocol = measure(twice, tile_folder, None, None, per_class=2, learnt=False)
    assert "12 of 60 tiles" in protocol and "never saw them" in protocol
    tests = {row.test for row in rows}
    assert {"intact", "patch drop, removed", "patch drop, white", "shuffle", "stain", "misleading patch"} <= tests
    assert all(0 <= row.low <= row.value <= row.high <= 1 for row in rows)
    assert {row.n for row in rows if row.test != "misleading patch"} == {6}  # slides, of twelve tiles
    assert all(row.n < 6 for row in rows if row.test == "misleading patch")  # those of half of them
    half = len(rows) // 2
    assert rows[:half] == rows[half:]  # the same artefact, the same seed

    write_rows(rows, tmp_path / "robustness.csv")
    with (tmp_path / "robustness.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    draw_robustness(rows, tmp_path, protocol)
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "patch-drop", "shuffle", "misleading-patch", "worse-pictures",
    }  # fmt: skip


def test_a_graph_that_cannot_be_replayed_is_tried_on_all_the_rest(tiny_artifact, tile, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "SHARES", (0.5,))
    monkeypatch.delitem(OPERATORS, "Gelu")
    classifier = open_classifier(tiny_artifact, device="cpu")
    answers = answer_all(classifier, tiny_artifact / "predict.onnx", tile[None], np.zeros(1, np.intp), 0)
    tests = {damage.test for damage, _, _ in answers}
    assert "low resolution" in tests and "misleading patch" not in tests


def test_each_artefact_tells_its_own_protocol_where_they_differ():
    assert join_protocols({"a": "12 of 60 tiles", "b": "12 of 60 tiles"}) == "12 of 60 tiles"
    assert join_protocols({"a": "12 of 60 tiles", "b": "9 of 60 tiles"}) == "a: 12 of 60 tiles\nb: 9 of 60 tiles"


def test_artefacts_of_one_name_are_told_apart(tmp_path):
    assert name_apart([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert name_apart([tmp_path / "plain" / "artifact", tmp_path / "stem" / "artifact"]) == [
        "plain/artifact", "stem/artifact",
    ]  # fmt: skip
