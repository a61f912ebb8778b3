import math

import numpy as np
import pytest

from training.calibrate import (
    TooFewForCoverage,
    cross_temperatures,
    fit_conformal,
    fit_temperature,
    max_coverage,
    measure_coverage,
    partition,
    prediction_sets,
    softmax,
    threshold,
)
from training.metrics import Floats, Ints


def draw_logits(n: int, temperature: float, seed: int = 0, n_classes: int = 4) -> tuple[Floats, Ints]:
    """Logits whose best temperature is known: the truth is drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes)) * 3 * temperature
    cumulative = softmax(logits, temperature).cumsum(axis=1)
    return logits, (rng.random((n, 1)) > cumulative[:, :-1]).sum(axis=1)


# -- temperature ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.5, 1.7, 4.0])
def test_the_temperature_is_found_again(true):
    logits, targets = draw_logits(20_000, true)
    found = fit_temperature(logits, targets)
    assert found.value == pytest.approx(true, rel=0.03)
    assert found.accepted and found.reason.startswith("accepted")
    assert found.nll_after < found.nll_before
    assert found.n == 20_000


def test_the_temperature_is_the_best_there_is():
    logits, targets = draw_logits(300, 2.0)

    def nll(temperature):
        return -np.log(softmax(logits, temperature)[np.arange(300), targets]).mean()

    found = fit_temperature(logits, targets)
    assert found.nll_after == pytest.approx(min(nll(t) for t in np.linspace(0.5, 5, 2000)), abs=1e-7)
    assert found.nll_after == pytest.approx(nll(found.value))
    assert found.nll_before == pytest.approx(nll(1.0))


def test_logits_that_need_no_temperature_are_left_alone():
    found = [fit_temperature(*draw_logits(200, 1.0, seed)) for seed in range(40)]
    refused = [one for one in found if not one.accepted]
    # By chance the gain (half a chi-squared of one degree) beats its error in some of the samples, not in most.
    assert len(refused) > 25
    assert all(one.value == 1.0 and "standard error" in one.reason for one in refused)


def test_logits_that_are_always_right_are_not_made_infinitely_sure():
    targets = np.arange(50) % 3
    for scale in (0.1, 4, 100):
        found = fit_temperature(np.eye(3)[targets] * scale, targets)
        assert found.value == 1.0
        assert "every answer is right" in found.reason


def test_a_temperature_at_the_edge_of_the_search_is_refused():
    targets = np.arange(300) % 3
    guesses = np.random.default_rng(0).normal(size=(300, 3)) * 1000
    found = fit_temperature(guesses, targets)
    assert found.value == 1.0
    assert "edge" in found.reason


def test_repeated_tiles_make_chance_no_surer():
    logits, targets = draw_logits(60, 1.25, seed=1)
    tiles = np.arange(60)
    once = fit_temperature(logits, targets, tiles)
    repeated = fit_temperature(np.tile(logits, (9, 1)), np.tile(targets, 9), np.tile(tiles, 9))
    assert repeated.reason == once.reason
    assert repeated.n == 60


def test_a_fold_that_differs_does_not_move_its_own_temperature():
    """The first 80 of 400 tiles are three times as sure as the others, in both repeats."""
    logits, targets = draw_logits(400, 2.0)
    logits[:80] *= 3
    tiles = np.tile(np.arange(400), 2)
    folds = np.concatenate([np.arange(400) // 80, 5 + np.arange(400) % 5])  # in the second they are in every fold
    found = cross_temperatures(np.tile(logits, (2, 1)), np.tile(targets, 2), folds, tiles)
    assert found[folds == 0] == pytest.approx(fit_temperature(logits[80:], targets[80:]).value)
    assert (found[folds == 0] < 2.3).all() and (found[folds > 0] > 2.5).all()


def test_softmax_of_large_float32_logits_is_finite_and_sums_to_one():
    p = softmax(np.array([[1e4, 0.0, -1e4]], dtype=np.float32))
    assert p.tolist() == [[1.0, 0.0, 0.0]]
    assert softmax(np.array([[2.0, 0.0]]), 2.0)[0, 0] == pytest.approx(1 / (1 + math.exp(-1)))


# -- conformal sets -------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_quantile_of_finite_samples():
    of_truth = np.linspace(0.99, 0.51, 19)  # nineteen scores from 0.01 to 0.49
    probabilities = np.stack([of_truth, 1 - of_truth], axis=1)
    found = fit_conformal(probabilities, np.zeros(19, dtype=int), [0.5, 0.95])
    ranked = np.sort(1 - of_truth)
    assert found.values[0, 0] == pytest.approx(ranked[9])  # ceil(20 x 0.5) = the tenth
    assert found.values[1, 0] == pytest.approx(ranked[18])  # ceil(20 x 0.95) = the last


@pytest.mark.parametrize("n", [19, 40])
def test_sets_hold_the_truth_as_often_as_promised_and_hardly_more(n):
    held = []
    for seed in range(600):
        logits, targets = draw_logits(n + 100, 1.0, seed)
        p = softmax(logits)
        shared = threshold(1 - p[np.arange(n), targets[:n]], 0.9, n)
        sets = 1 - p[n:] <= shared  # without the top class, which would add to the coverage
        held.append(sets[np.arange(100), targets[n:]].mean())
    error = np.std(held) / math.sqrt(len(held))
    assert 0.9 - 3 * error <= np.mean(held) <= 0.9 + 1 / (n + 1) + 3 * error


def test_each_class_with_enough_tiles_is_covered_on_its_own():
    """The second class is a hard one: a threshold shared by all would starve it."""
    rng = np.random.default_rng(0)
    held: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(300):
        targets = np.repeat([0, 1], 400)
        hardness = np.where(targets == 0, 3.0, 0.5)
        logits = rng.normal(size=(800, 2)) + hardness[:, None] * np.eye(2)[targets]
        p = softmax(logits)
        fitted = rng.permutation(800) < 150
        of_truth = p[fitted][np.arange(150), targets[fitted]]
        own = fit_conformal(p[fitted], targets[fitted], [0.9]).values[0, 1]
        for limit, found in ((own, held[True]), (threshold(1 - of_truth, 0.9, 150), held[False])):
            hard = ~fitted & (targets == 1)
            found.append(float((1 - p[hard, 1] <= limit).mean()))
    assert np.mean(held[True]) >= 0.895
    assert np.mean(held[False]) < 0.85


def test_classes_with_too_few_tiles_share_a_threshold():
    assert partition([40, 30, 19, 18], 0.95) == [[1], [0], [3, 2]]  # 18 < 19 = 1 / 0.05 - 1, so the next joins
    assert partition([40, 30, 19, 18], 0.9) == [[3], [2], [1], [0]]
    assert partition([5, 4, 12, 0], 0.9) == [[2], [3, 1, 0]]
    assert partition([5, 5, 5, 5], 0.95) == [[0, 1, 2, 3]]


def test_classes_that_are_rare_for_a_coverage_share_its_threshold():
    logits, _ = draw_logits(60, 1.0, n_classes=3)
    targets = np.repeat([0, 1, 2], [40, 15, 5])
    found = fit_conformal(softmax(logits), targets, [0.8, 0.9, 0.95])
    assert found.values[2, 1] == found.values[2, 2]
    assert found.values[0, 1] != found.values[0, 2]
    assert found.coverages == (0.8, 0.9, 0.95)
    assert found.n == 60


def test_more_coverage_never_makes_a_set_smaller():
    for seed in range(30):
        logits, targets = draw_logits(60, 1.0, seed)
        found = fit_conformal(softmax(logits), targets, [0.95, 0.5, 0.9, 0.8])
        assert (np.diff(found.values, axis=0) >= 0).all()
        assert ((found.values >= 0) & (found.values <= 1)).all()


def test_no_more_coverage_is_promised_than_the_tiles_allow():
    logits, targets = draw_logits(19, 1.0)
    assert max_coverage(19) == 0.95
    assert fit_conformal(softmax(logits), targets, [0.95]).max_coverage == 0.95
    with pytest.raises(TooFewForCoverage, match=r"19 tiles allow .* at most 0\.950"):
        fit_conformal(softmax(logits), targets, [0.9, 0.96])
    with pytest.raises(TooFewForCoverage, match="above 0"):
        fit_conformal(softmax(logits), targets, [0.0])


def test_repeated_tiles_promise_no_more_and_change_no_threshold():
    logits, targets = draw_logits(30, 1.0)
    p = softmax(logits)
    once = fit_conformal(p, targets, [0.5, 0.8, 0.95])
    repeated = fit_conformal(np.tile(p, (4, 1)), np.tile(targets, 4), [0.5, 0.8, 0.95], np.tile(np.arange(30), 4))
    assert (repeated.values == once.values).all()
    assert repeated.n == 30
    with pytest.raises(TooFewForCoverage):
        fit_conformal(np.tile(p, (4, 1)), np.tile(targets, 4), [0.97], np.tile(np.arange(30), 4))


def test_a_set_always_holds_the_top_class():
    p = np.array([[0.4, 0.35, 0.25], [0.9, 0.06, 0.04]])
    sets = prediction_sets(p, np.array([0.1, 0.1, 0.76]))
    assert sets.tolist() == [[True, False, True], [True, False, False]]


def test_sets_that_were_all_of_one_size_may_yet_be_larger():
    (found,) = measure_coverage(np.tile([0.9, 0.1], (40, 1)), np.zeros(40, dtype=int), np.arange(40) % 5, [0.9])
    assert (found.set_size.value, found.set_size.low) == (1, 1)
    assert found.set_size.high == pytest.approx(1.088, abs=5e-4)


def test_coverage_is_measured_on_folds_that_the_thresholds_did_not_see():
    logits, targets = draw_logits(400, 1.0)
    (found,) = measure_coverage(softmax(logits), targets, np.arange(400) % 5, [0.9])
    assert found.nominal == 0.9
    assert found.measured.low < 0.92 and found.measured.high > 0.89
    assert 1 < found.set_size.value < 4
    assert set(found.per_class) == {0, 1, 2, 3}
    assert sum(one.n for one in found.per_class.values()) == 400
    weighted = sum(one.n * one.value for one in found.per_class.values()) / 400
    assert weighted == pytest.approx(found.measured.value)


def test_a_fold_that_differs_from_the_others_shows():
    """Thresholds fitted on all folds would hide that the fifth slide is another world."""
    logits, targets = draw_logits(500, 1.0)
    p = softmax(logits * 3)
    slides = np.repeat(np.arange(5), 100)
    p[slides == 4] = p[slides == 4][:, ::-1]
    (found,) = measure_coverage(p, targets, slides, [0.9], groups=slides)
    seen = fit_conformal(p, targets, [0.9])
    resubstituted = prediction_sets(p, seen.values[0])[np.arange(500), targets].mean()
    assert found.measured.value < resubstituted - 0.02
    assert found.measured.n == 5


def test_a_repeated_tile_never_judges_itself():
    """Every tile has the same two predictions in both repeats, in folds that differ."""
    logits, targets = draw_logits(60, 1.0)
    p, both = np.tile(softmax(logits), (2, 1)), np.tile(targets, 2)
    tiles = np.tile(np.arange(60), 2)
    folds = np.concatenate([np.arange(60) % 5, 5 + np.arange(60) % 4])
    (found,) = measure_coverage(p, both, folds, [0.8], tiles=tiles)
    rows = [np.flatnonzero(tiles == tile) for tile in (0, 59)]
    assert [len(row) for row in rows] == [2, 2]
    expected = []
    for fold in range(9):
        judged = folds == fold
        rest = ~np.isin(tiles, tiles[judged])
        row = fit_conformal(p[rest], both[rest], [0.8], tiles[rest]).values[0]
        expected.append(prediction_sets(p[judged], row)[np.arange(judged.sum()), both[judged]])
    assert found.measured.value == pytest.approx(np.concatenate(expected).mean())
    assert found.measured.n == 60


def test_tiles_of_few_slides_still_count_as_tiles():
    logits, targets = draw_logits(100, 1.0)
    slides = np.repeat(np.arange(5), 20)
    (found,) = measure_coverage(softmax(logits), targets, slides, [0.95], tiles=np.arange(100), groups=slides)
    assert found.measured.n == 5
    assert found.measured.value > 0.85
