import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from training.metrics import (
    Estimate,
    Floats,
    Ints,
    Unscorable,
    area_under_roc,
    chance_error,
    draw_weights,
    mean_of,
    paired_difference,
    reliability,
    risk_coverage,
    score,
)

CLASSES = ["Tumor", "Stroma", "Debris"]


def guess(n: int, skill: float = 1.5, seed: int = 0, n_classes: int = 3) -> tuple[Floats, Ints]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n, n_classes))
    logits[np.arange(n), targets] += skill
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True), targets


def holds(estimate: Estimate, value: float) -> bool:
    return estimate.low <= value <= estimate.high


def test_the_values_are_those_of_an_independent_computation():
    probabilities, targets = guess(200)
    predicted = probabilities.argmax(axis=1)
    scores = score(probabilities, targets, CLASSES, resamples=10)
    assert scores.accuracy.value == pytest.approx((predicted == targets).mean())
    assert scores.macro_f1.value == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert scores.macro_auroc is not None
    assert scores.macro_auroc.value == pytest.approx(roc_auc_score(targets, probabilities, multi_class="ovr"))
    assert scores.nll.value == pytest.approx(log_loss(targets, probabilities))
    assert scores.brier.value == pytest.approx(((probabilities - np.eye(3)[targets]) ** 2).sum() / 200)
    assert scores.recall["Stroma"].value == pytest.approx((predicted[targets == 1] == 1).mean())
    assert scores.recall["Stroma"].n == (targets == 1).sum()
    assert scores.confusion.counts[0, 2] == ((targets == 0) & (predicted == 2)).sum()
    assert scores.confusion.counts.sum() == 200
    assert (scores.confusion.low <= scores.confusion.counts).all()
    assert (scores.confusion.high >= scores.confusion.counts).all()


def test_the_interval_is_as_wide_as_theory_says():
    probabilities, targets = guess(400)
    accuracy = score(probabilities, targets, CLASSES, resamples=4000).accuracy
    expected = 2 * 1.96 * np.sqrt(accuracy.value * (1 - accuracy.value) / 400)
    assert accuracy.high - accuracy.low == pytest.approx(expected, rel=0.08)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    found = [score(*guess(150, seed=seed), CLASSES, resamples=200) for seed in range(200)]
    truth = score(*guess(200_000, seed=1_000), CLASSES, resamples=2)
    for name in ("accuracy", "macro_f1", "macro_auroc", "nll", "brier"):
        hits = np.mean([holds(getattr(one, name), getattr(truth, name).value) for one in found])
        assert 0.89 <= hits <= 0.99, name


def test_the_interval_holds_the_truth_where_few_slides_differ():
    """Ten, as many as our tiles come from. The middle 95 % of the draws themselves hold it in 85 to 90 % of cases."""
    truth, slides = 0.6, np.repeat(np.arange(10), [5, 5, 8, 10, 10, 10, 11, 14, 16, 17])
    rng = np.random.default_rng(0)
    hits = []
    for seed in range(300):
        share_right = np.clip(truth + 0.1 * rng.standard_normal(10), 0, 1)
        right = rng.random(len(slides)) < share_right[slides]
        found = mean_of(right, slides, 1000, seed).estimate()
        hits.append(holds(found, truth))
    assert 0.92 <= np.mean(hits) <= 0.98


def test_predicting_a_tile_again_makes_no_interval_narrower():
    probabilities, targets = guess(100)
    tiles = np.tile(np.arange(100), 5)
    once = score(probabilities, targets, CLASSES)
    repeated = score(np.tile(probabilities, (5, 1)), np.tile(targets, 5), CLASSES, groups=tiles)
    assert repeated.accuracy == once.accuracy
    assert repeated.macro_f1 == once.macro_f1
    assert (repeated.n, repeated.predictions) == (100, 500)
    careless = score(np.tile(probabilities, (5, 1)), np.tile(targets, 5), CLASSES).accuracy
    assert careless.high - careless.low < 0.6 * (once.accuracy.high - once.accuracy.low)


def test_never_having_failed_is_not_certainty():
    """Of 27 tiles all right: the exact binomial interval starts at 0.872, although no draw differs."""
    scores = score(np.tile([0.8, 0.1, 0.1], (27, 1)), np.zeros(27, dtype=int), CLASSES)
    assert scores.accuracy == scores.recall["Tumor"]
    assert (scores.accuracy.value, scores.accuracy.high) == (1, 1)
    assert scores.accuracy.low == pytest.approx(0.872, abs=5e-4)
    never = score(np.tile([0.8, 0.1, 0.1], (27, 1)), np.ones(27, dtype=int), CLASSES).accuracy
    assert (never.value, never.low) == (0, 0)
    assert never.high == pytest.approx(0.128, abs=5e-4)


def test_an_order_that_was_never_wrong_is_not_certain():
    targets = np.arange(16) % 2
    scores = score(np.where(np.eye(2)[targets], 0.8, 0.2), targets, ["a", "b"])
    for found in (scores.macro_auroc, scores.macro_f1):
        assert found is not None and (found.value, found.high) == (1, 1)
        assert found.low == pytest.approx(0.025 ** (1 / 16))


def test_one_slide_alone_says_next_to_nothing():
    found = mean_of(np.arange(20) % 4 > 0, np.zeros(20)).proportion()
    assert (found.value, found.n) == (0.75, 1)
    assert found.low < 0.05 and found.high > 0.95


def test_slides_are_drawn_whole():
    slides = np.repeat([f"slide {i}" for i in range(10)], 20)
    targets = np.zeros(200, dtype=int)
    probabilities = np.where(np.repeat(np.arange(10) < 5, 20)[:, None], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1])
    accuracy = score(probabilities, targets, CLASSES, groups=slides).accuracy
    assert accuracy.n == 10
    assert accuracy.low < 0.25 and accuracy.high > 0.75  # five of ten slides, not a hundred of two hundred tiles


def test_the_draws_are_of_as_many_groups_as_there_are_and_differ():
    weights = np.concatenate(list(draw_weights(np.array(["a", "a", "b", "c"]), 500, seed=0)))
    assert weights.shape == (500, 4)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 1:].sum(axis=1) == 3).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(4), abs=0.12)


def test_many_rows_are_drawn_in_portions_that_make_up_the_whole(monkeypatch):
    monkeypatch.setattr("training.metrics.WEIGHTS_AT_ONCE", 1000)
    portions = list(draw_weights(np.arange(300), 10, seed=0))
    assert [len(portion) for portion in portions] == [3, 3, 3, 1]


def test_equal_scores_count_half():
    scores = np.array([0.1, 0.5, 0.5, 0.9])
    area = area_under_roc(scores, np.array([False, False, True, True]))
    assert area(np.ones((1, 4))) == pytest.approx(3.5 / 4)
    assert area(np.array([[1.0, 0, 1, 0]])) == pytest.approx(1)
    assert np.isnan(area(np.array([[1.0, 1, 0, 0]]))).all()


def test_a_class_without_examples_is_left_out_and_not_counted_as_failure():
    probabilities, targets = guess(100)
    kept = targets != 2
    scores = score(probabilities[kept], targets[kept], CLASSES)
    assert list(scores.recall) == ["Tumor", "Stroma"]
    predicted = probabilities[kept].argmax(axis=1)
    assert scores.macro_f1.value == pytest.approx(f1_score(targets[kept], predicted, average="macro", labels=[0, 1]))
    assert scores.macro_auroc is not None
    assert np.isfinite([scores.macro_auroc.low, scores.macro_auroc.high]).all()
    assert scores.confusion.counts.shape == (3, 3)


def test_a_class_of_a_single_tile_is_missing_from_a_third_of_the_draws_and_breaks_none():
    probabilities, targets = guess(60)
    targets = np.where(targets == 2, 0, targets)
    targets[0] = 2
    scores = score(probabilities, targets, CLASSES)
    assert all(np.isfinite([e.value, e.low, e.high]).all() for _, e in scores.pairs())


def test_one_class_alone_has_no_auroc():
    probabilities, _ = guess(30)
    scores = score(probabilities, np.ones(30, dtype=int), CLASSES)
    assert scores.macro_auroc is None
    assert "macro_auroc" not in dict(scores.pairs())


def test_scores_are_json():
    probabilities, targets = guess(50)
    groups = np.array(["a", "b"] * 25)
    found = score(probabilities.astype(np.float32), targets, CLASSES, groups, resamples=20)
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(text)["accuracy"]["n"] == 2
    assert json.loads(text)["confusion"]["counts"] == found.confusion.counts.tolist()
    assert json.loads(text)["recall"]["Debris"]["value"] == found.recall["Debris"].value


def test_the_same_seed_gives_the_same_scores():
    probabilities, targets = guess(80)
    assert score(probabilities, targets, CLASSES).as_dict() == score(probabilities, targets, CLASSES).as_dict()
    assert score(probabilities, targets, CLASSES, seed=1).nll != score(probabilities, targets, CLASSES).nll


def test_impossible_truth_costs_much_but_not_infinitely():
    scores = score(np.array([[1.0, 0.0, 0.0]] * 4), np.array([0, 0, 0, 1]), CLASSES)
    assert 5 < scores.nll.value < 10


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        (np.ones((3, 2)) / 2, np.array([0, 1, 0]), r"\(3, 2\) came for 3 targets and 3 classes"),
        (np.ones((0, 3)), np.array([], dtype=int), "at least one row"),
        (np.ones((2, 3)) / 3, np.array([0, 3]), "from 0 to 3, but there are 3 classes"),
        (np.full((2, 3), np.nan), np.array([0, 1]), "2 rows of probabilities are not finite"),
    ],
)
def test_what_can_not_be_scored_is_refused(probabilities, targets, message):
    with pytest.raises(Unscorable, match=message):
        score(probabilities, targets, CLASSES)


# -- calibration error, reliability ---------------------------------------------------------------------------------


def binary(confidence, is_right):
    """Two classes, of which the first is predicted with this confidence."""
    confidence = np.asarray(confidence)
    return np.stack([confidence, 1 - confidence], axis=1), np.where(is_right, 0, 1)


def test_calibration_error_is_the_gap_weighted_by_the_bins():
    probabilities, targets = binary([0.6] * 10 + [0.9] * 10, [True] * 5 + [False] * 5 + [True] * 10)
    ece = score(probabilities, targets, ["a", "b"], bins=2).ece
    assert ece.value == pytest.approx((0.1 + 0.1) / 2)


def test_over_and_under_confidence_cancel_within_a_bin_only():
    probabilities, targets = binary([0.6] * 10 + [0.9] * 10, [True] * 7 + [False] * 3 + [True] * 8 + [False] * 2)
    assert score(probabilities, targets, ["a", "b"], bins=1).ece.value == pytest.approx(0)
    assert score(probabilities, targets, ["a", "b"], bins=2).ece.value == pytest.approx(0.1)


def test_an_interval_holds_its_value_even_where_noise_biases_every_draw():
    is_right = np.repeat([True, False, True, False], [60, 40, 90, 10])  # exactly as often as promised
    probabilities, targets = binary([0.6] * 100 + [0.9] * 100, is_right)
    ece = score(probabilities, targets, ["a", "b"], bins=2).ece
    assert ece.value == pytest.approx(0)
    assert holds(ece, ece.value)
    assert ece.high > 0.05


def test_perfect_confidences_have_the_error_that_chance_leaves():
    """The truth of 400 samples of 180 is drawn from the very probabilities."""
    rng = np.random.default_rng(0)
    probabilities, _ = guess(180, skill=1.0)
    expected = chance_error(probabilities, np.arange(180))
    found = []
    for _ in range(400):
        truth = (rng.random((180, 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)
        found.append(score(probabilities, truth, CLASSES, resamples=2).ece.value)
    assert expected.value == pytest.approx(np.mean(found), abs=0.005) and expected.value > 0.03
    assert np.mean([expected.low <= ece <= expected.high for ece in found]) == pytest.approx(0.95, abs=0.03)
    assert expected.n == 180


def test_answering_a_tile_again_takes_no_chance_away():
    probabilities, _ = guess(100)
    again = chance_error(np.tile(probabilities, (4, 1)), np.tile(np.arange(100), 4))
    assert vars(again) == pytest.approx(vars(chance_error(probabilities, np.arange(100))))
    careless = chance_error(np.tile(probabilities, (4, 1)), np.arange(400))
    assert careless.value < 0.7 * again.value


def test_reliability_has_bins_of_equal_mass():
    probabilities, targets = guess(100)
    found = reliability(probabilities, targets)
    assert found.count.tolist() == [20] * 5
    assert (np.diff(found.confidence) > 0).all()
    first = np.argsort(probabilities.max(axis=1))[:20]
    assert found.confidence[0] == pytest.approx(probabilities.max(axis=1)[first].mean())
    assert found.accuracy[0] == pytest.approx((probabilities.argmax(axis=1) == targets)[first].mean())
    assert ((found.low <= found.accuracy) & (found.accuracy <= found.high)).all()


def test_equal_confidences_share_a_bin_so_that_the_order_of_rows_is_nothing():
    probabilities, targets = binary([1.0] * 30 + [0.7] * 10, [True] * 25 + [False] * 5 + [True] * 10)
    found = reliability(probabilities, targets)
    assert found.count.tolist() == [10, 30]
    assert found.accuracy.tolist() == pytest.approx([1, 25 / 30])


# -- comparison, selection ------------------------------------------------------------------------------------------


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    a = rng.random(300) < 0.8
    b = a & (rng.random(300) < 0.95)  # wrong wherever a is, and on a few more
    found = paired_difference(a, b)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert 0 < found.low < found.high < 0.09
    assert found.n == 300


def test_models_that_never_differed_may_yet():
    """On up to 8.8 % of the tiles, of which none is among forty in 2.5 % of cases."""
    right = np.array([True, False] * 20)
    found = paired_difference(right, right)
    assert (found.value, found.n) == (0, 40)
    assert (found.low, found.high) == pytest.approx((-0.088, 0.088), abs=5e-4)


def test_a_model_that_was_always_better_need_not_be():
    found = paired_difference(np.ones(40, bool), np.zeros(40, bool))
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(1 - 2 * 0.088, abs=1e-3)  # where it is worse it falls from 1 to -1


def test_a_paired_difference_of_repeats_rests_on_tiles():
    rng = np.random.default_rng(0)
    a, b = rng.random(50) < 0.8, rng.random(50) < 0.7
    tiles = np.tile(np.arange(50), 4)
    assert paired_difference(np.tile(a, 4), np.tile(b, 4), tiles) == paired_difference(a, b)


def test_risk_falls_as_doubtful_answers_are_withheld():
    confidence = np.array([0.9, 0.5, 0.8, 0.6])
    found = risk_coverage(confidence, np.array([True, False, True, True]))
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert found.risk.tolist() == [0, 0, 0, 0.25]
    assert found.aurc == pytest.approx(0.0625)


def test_confidence_that_says_nothing_has_the_same_risk_everywhere():
    found = risk_coverage(np.full(4, 0.5), np.array([True, False, True, True]))
    assert found.risk.tolist() == pytest.approx([0.25] * 4)
