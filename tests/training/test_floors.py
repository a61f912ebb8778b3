import numpy as np
import pytest

from training.floors import (
    KIND_OF_CODE,
    colour_histogram_features,
    floor_features,
    floor_predictions,
    mean_colour_features,
    nearest_mean,
    pattern_features,
    vector_machine,
)

RED, BLUE = (200, 60, 90), (90, 60, 200)


def paint(colour, texture, seed, tile_px=40):
    """A tile of one colour on average: `plain`, `noise` or `stripes` of the same histogram."""
    rng = np.random.default_rng(seed)
    signs = {
        "plain": np.zeros((tile_px, tile_px)),
        "noise": rng.permutation(np.arange(tile_px**2) % 2).reshape(tile_px, tile_px) * 2 - 1,
        "stripes": np.tile(np.arange(tile_px) // 4 % 2 * 2 - 1, (tile_px, 1)),
    }[texture]
    return (np.array(colour) + 30 * signs[..., None] + rng.integers(-3, 4, (tile_px, tile_px, 3))).astype(np.uint8)


def paint_set(kinds, n, seed):
    targets = np.arange(n) % len(kinds)
    tiles = [paint(colour, texture, seed * 1000 + i) for i, (colour, texture) in enumerate(kinds[t] for t in targets)]
    return np.array(tiles), targets


def test_mean_colour_is_the_mean():
    tiles = np.array([paint(RED, "plain", 0), paint(BLUE, "plain", 1)])
    assert mean_colour_features(tiles) == pytest.approx(tiles.reshape(2, -1, 3).mean(axis=1))


def test_a_histogram_has_sixteen_bins_for_each_channel():
    tile = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    tile[..., 0], tile[..., 1], tile[..., 2] = 0, 16, 255
    tile[0, 0, :, 1] = 15
    features = colour_histogram_features(tile)[0]
    assert features.shape == (48,)
    assert features[0] == 1
    assert features[16:18].tolist() == [0.25, 0.75]
    assert features[47] == 1


def test_patterns_do_not_change_when_the_tile_is_turned_or_mirrored():
    tile = paint(RED, "stripes", 0)
    turned = np.array([tile, np.rot90(tile), np.rot90(tile, 2), tile[::-1], tile[:, ::-1]])
    features = pattern_features(turned)
    assert features.shape == (5, 30)
    assert (features == features[0]).all()
    assert features.reshape(5, 3, 10).sum(axis=2) == pytest.approx(np.ones((5, 3)))


def test_patterns_see_texture_and_not_brightness():
    noise, stripes = paint(RED, "noise", 0), paint(RED, "stripes", 0)
    features = pattern_features(np.array([noise, noise + np.uint8(10), stripes]))
    assert (features[0] == features[1]).all()
    assert np.abs(features[0] - features[2]).max() > 0.1


def test_a_flat_tile_is_one_pattern():
    flat = np.full((1, 20, 20, 3), (201, 77, 33), dtype=np.uint8)
    assert pattern_features(flat).reshape(3, 10)[:, 8].tolist() == [1, 1, 1]


def test_the_kinds_count_the_known_uniform_patterns():
    assert (KIND_OF_CODE < 9).sum() == 58
    assert KIND_OF_CODE[[0b00000000, 0b00000111, 0b10000001, 0b01010101, 0b11111111]].tolist() == [0, 3, 2, 9, 8]


def test_each_floor_learns_what_it_can_see():
    kinds = [(RED, "noise"), (RED, "stripes"), (BLUE, "noise")]
    tiles, targets = paint_set(kinds, 60, seed=1)
    test_tiles, test_targets = paint_set(kinds, 30, seed=2)
    found = floor_predictions(floor_features(tiles), targets, floor_features(test_tiles), 3)
    right = {name: p.argmax(axis=1) == test_targets for name, p in found.items()}
    assert list(right) == ["mean colour, nearest mean", "colour histogram, SVM", "histogram and patterns, SVM"]
    for name, hits in right.items():
        assert hits[test_targets == 2].all(), name
    assert right["colour histogram, SVM"][test_targets < 2].mean() < 0.9  # the two differ in texture alone
    assert right["histogram and patterns, SVM"].all()


@pytest.mark.parametrize("machine", [nearest_mean, vector_machine])
@pytest.mark.parametrize("present", [[0, 1, 3], [1, 3]])
def test_a_class_without_examples_gets_nothing(machine, present):
    rng = np.random.default_rng(0)
    targets = np.repeat(present, 20)
    features = rng.normal(size=(len(targets), 4)) + 5 * np.eye(4)[targets]
    p = machine(features, targets, features, 4)
    assert p.shape == (len(targets), 4)
    assert p.sum(axis=1) == pytest.approx(np.ones(len(targets)))
    assert (p[:, 2] == 0).all()
    assert (p.argmax(axis=1) == targets).mean() > 0.95


@pytest.mark.parametrize("machine", [nearest_mean, vector_machine])
def test_what_learnt_one_class_answers_it_with_certainty(machine):
    features = np.random.default_rng(0).normal(size=(6, 4))
    assert machine(features, np.full(6, 2), features[:3], 4).tolist() == [[0, 0, 1, 0]] * 3


def test_the_nearest_mean_is_surer_the_nearer():
    features, targets = np.array([[0.0], [2.0], [10.0], [12.0]]), np.array([0, 0, 1, 1])
    p = nearest_mean(features, targets, np.array([[1.0], [5.5], [6.0], [7.0]]), 2)
    assert (np.diff(p[:, 0]) < 0).all()
    assert p[2] == pytest.approx([0.5, 0.5])


def test_tiles_that_are_all_alike_are_no_error():
    tiles = np.full((8, 20, 20, 3), 128, dtype=np.uint8)
    features = floor_features(tiles)
    for p in floor_predictions(features, np.arange(8) % 2, features, 2).values():
        assert p.sum(axis=1) == pytest.approx(np.ones(8))
