import numpy as np
import pytest

from model.quality import PALETTE_SIZE, Quality, measure_quality
from training.fit import read_tiles
from training.gate import (
    SHARE_OK,
    Signs,
    count_versions,
    cross_fit,
    fit_gate,
    learn_cloud,
    learn_palette,
    measure_appearance,
    measure_foreign,
    restained_copies,
    share_ok,
    signs_of_folds,
    signs_without_network,
    verdicts,
)


@pytest.fixture(scope="module")
def tiles(small_fit):
    return read_tiles(small_fit).tiles


@pytest.fixture(scope="module")
def appearance(tiles):
    return measure_appearance(tiles, 3)


def random_signs(n, rng):
    numbers = rng.normal(size=(6, n))
    qualities = [Quality(0.5 + 0.05 * column[0], *(10 + column[1:])) for column in numbers.T]
    return Signs(qualities, 10 + rng.normal(size=(2, n)), 10 + rng.normal(size=(2, n)), 1 + 0.1 * rng.random((2, n)))


def test_copies_are_of_other_stains_and_the_same_every_time(tiles):
    first, *copies = restained_copies(tiles[:4], 3)
    np.testing.assert_array_equal(first, tiles[:4])
    assert len(copies) == 2 and not np.array_equal(copies[0], copies[1])
    for copy, again in zip(copies, list(restained_copies(tiles[:4], 3))[1:], strict=True):
        np.testing.assert_array_equal(copy, again)


def test_many_tiles_get_fewer_copies():
    assert count_versions(100) > count_versions(1000) > count_versions(100_000) == 2


def test_a_palette_holds_what_is_common(appearance, tiles):
    palette = learn_palette(appearance.colours)
    assert 20 < palette.sum() < PALETTE_SIZE / 2
    assert measure_foreign(appearance.colours[0], palette).mean() < 0.01
    green = np.zeros((1, PALETTE_SIZE), np.uint16)
    green[0, 0x0F0] = 100
    assert measure_foreign(green, palette) == 1


def test_each_tile_is_held_against_the_palette_of_other_folds(appearance):
    colours = appearance.colours.copy()
    colours[:, 0] = 0
    colours[:, 0, 0x0F0] = 5000  # one tile is green, and knows itself only
    odd = type(appearance)(colours, appearance.brightness, appearance.qualities)
    folds = np.arange(30)[None] % 5
    signs = signs_of_folds(odd, folds, None)
    assert signs.foreign_share[0, 0] == 1 and signs.qualities[0].foreign_share == 1
    assert np.median(signs.foreign_share[0]) < 0.05


def test_features_of_the_training_are_about_one_away_and_others_further():
    rng = np.random.default_rng(0)
    known = (rng.normal(size=(200, 16)) * np.linspace(1, 2, 16)).astype(np.float32)
    cloud = learn_cloud(known)
    assert np.sqrt((cloud.distance(known) ** 2).mean()) == pytest.approx(1, rel=1e-4)
    narrow = np.zeros((1, 16), np.float32)
    narrow[0, 0] = 12  # twelve standard deviations where the spread is least
    assert cloud.distance(narrow)[0] > 2
    assert np.isfinite(learn_cloud(np.ones((5, 3), np.float32)).distance(np.zeros((2, 3), np.float32))).all()


def test_limits_let_as_many_through_as_was_meant_and_no_more():
    rng = np.random.default_rng(0)
    signs, confidence = random_signs(400, rng), rng.random(400)
    gate = fit_gate(signs, confidence, "a protocol")
    assert SHARE_OK <= share_ok(signs, confidence, gate) <= SHARE_OK + 0.02
    assert gate.protocol.startswith("9") and "(a protocol)" in gate.protocol
    outside = Signs([Quality(0, 0, 0, 99, 99, 99)], np.zeros((2, 1)), np.zeros((2, 1)), np.full((2, 1), 9.0))
    assert verdicts(outside, np.array([0.0]), gate) == ["out_of_scope"]


def test_new_tiles_are_judged_by_limits_that_did_not_see_them():
    rng = np.random.default_rng(1)
    signs, confidence, folds = random_signs(400, rng), rng.random(400), np.arange(400) % 5
    signs.qualities[7] = Quality(0.5, 10, 10, 99, 10, 10)
    ok = cross_fit(signs, confidence, folds, np.arange(400))
    assert not ok[7] and 0.9 < ok.mean() < 1


def test_a_fold_that_differs_does_not_widen_its_own_limits():
    """Its features lie farther out than any others, as those of another scanner's tiles."""
    rng = np.random.default_rng(1)
    signs, confidence, folds = random_signs(400, rng), rng.random(400), np.arange(400) % 5
    signs.distance[:, folds == 4] += 5
    ok = cross_fit(signs, confidence, folds, np.arange(400))
    assert not ok[folds == 4].any() and ok[folds < 4].mean() > 0.9


def test_the_answers_of_another_repeat_widen_no_limits_for_the_same_tile():
    rng = np.random.default_rng(1)
    once, confidence = random_signs(200, rng), rng.random(200)
    once.distance[:, :40] += 5
    twice, tiles = once.subset(np.tile(np.arange(200), 2)), np.tile(np.arange(200), 2)
    folds = np.concatenate([np.arange(200) // 40, 5 + np.arange(200) % 5])
    assert not cross_fit(twice, np.tile(confidence, 2), folds, tiles)[folds == 0].any()


def test_without_a_network_the_picture_alone_is_judged(appearance, tiles):
    gate = fit_gate(signs_without_network(appearance), None, "no network")
    assert gate.max_distance is None and gate.max_foreign_share is not None
    photo = np.random.default_rng(0).integers(0, 256, (150, 150, 3)).astype(np.uint8)
    palette = learn_palette(appearance.colours)
    found = Signs([measure_quality(photo, palette)], np.zeros((1, 1)), np.zeros((1, 1)), None)
    assert verdicts(found, None, gate) == ["out_of_scope"]
