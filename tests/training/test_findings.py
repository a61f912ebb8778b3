import re
from dataclasses import replace

import numpy as np
import pytest

from training.calibrate import softmax
from training.findings import (
    CHANCE_ERROR,
    answers_of_folds,
    answers_of_held_out,
    derive_findings,
    fold_floors,
    judge_answers,
    judge_calibration,
    judge_confidence,
    judge_sets,
    unmeasured,
)
from training.fit import TileSet, read_tiles
from training.folds import Fold, NumberedFold, OutOfFold, answer_fold


@pytest.fixture(scope="module")
def tiles(small_fit) -> TileSet:
    return read_tiles(small_fit)


def overconfident_logits(targets, rng, repeats=1):
    """Right three times of four, and much too sure of it."""
    logits = rng.normal(size=(repeats, len(targets), 3))
    right = rng.random((repeats, len(targets))) < 0.75
    logits[right, targets[np.nonzero(right)[1]]] += 3
    return (4 * logits).astype(np.float32)


def far(folds):
    return np.random.default_rng(2).normal(1, 0.1, (9, *folds.shape)).astype(np.float32)


def test_the_temperature_takes_the_overconfidence_out(tiles):
    logits = overconfident_logits(tiles.targets, np.random.default_rng(0))[0]
    answers = answers_of_held_out(tiles, tiles, logits, far(np.zeros(30)), "a protocol")
    findings = derive_findings([answers], tiles.classes)
    assert findings.calibration.temperature > 2 and findings.calibration.n == 30
    assert findings.calibration.protocol.startswith("a protocol")
    assert 0 < findings.gate.min_confidence < 1 and findings.gate.min_tissue_share > 0.1


def test_slides_left_out_set_the_temperature_where_there_are_any(tiles):
    """Here the network is sure and right within slides, and sure and often wrong on new ones."""
    rng = np.random.default_rng(0)
    slides = sorted({record.slide for record in tiles.records})
    of_slide = np.array([[slides.index(record.slide) for record in tiles.records]])
    fold_of = np.arange(30)[None] % 5
    sure = (6 * np.eye(3)[tiles.targets])[None].astype(np.float32)
    wrong = overconfident_logits(tiles.targets, rng)
    parts = [
        *answers_of_folds(OutOfFold("random", tiles, sure, fold_of, far(fold_of)), []),
        *answers_of_folds(OutOfFold("slide", tiles, wrong, of_slide, far(of_slide)), []),
    ]
    findings = derive_findings(parts, tiles.classes)
    assert findings.calibration.temperature > 2
    assert findings.calibration.n == len(slides) and findings.calibration.protocol.startswith("leave one of")
    assert derive_findings(parts[:1], tiles.classes).calibration.temperature <= 1


def test_repeated_answers_count_as_one_tile_each(tiles):
    rng = np.random.default_rng(0)
    folds = np.stack([rng.permutation(30) % 5 for _ in range(2)])
    out = OutOfFold("random", tiles, overconfident_logits(tiles.targets, rng, 2), folds, far(folds))
    (answers,) = answers_of_folds(out, [])
    assert answers.logits.shape == (60, 3) and len(np.unique(answers.groups)) == 30
    accuracy = next(metric for metric in judge_answers(answers, 1.0, tiles.classes) if metric.name == "accuracy")
    assert accuracy.n == 30 and accuracy.protocol == "2 x 5 random folds, all tiles"


def test_by_slide_the_slides_are_drawn_again_and_unknown_ones_left_out(tiles):
    slides = sorted({record.slide for record in tiles.records})
    fold_of = np.array([[slides.index(record.slide) for record in tiles.records]])
    fold_of[0, :4] = -1
    out = OutOfFold(
        "slide", tiles, overconfident_logits(tiles.targets, np.random.default_rng(1)), fold_of, far(fold_of)
    )
    (answers,) = answers_of_folds(out, [])
    assert len(answers.targets) == 26
    assert answers.protocol == f"leave one of {len(slides)} slides out, all tiles of known slide"


def test_figures_without_the_doubtful_tiles_stand_beside_those_with(tiles):
    records = [replace(r, quality="blurred" if i % 3 else None) for i, r in enumerate(tiles.records)]
    marked = TileSet(tiles.tiles, tiles.targets, records, tiles.classes)
    folds = np.arange(30)[None] % 5
    out = OutOfFold("random", marked, overconfident_logits(tiles.targets, np.random.default_rng(1)), folds, far(folds))
    everything, without = answers_of_folds(out, ["blurred"])
    assert len(everything.targets) == 30 and len(without.targets) == 10
    assert without.protocol.endswith("all tiles but blurred")
    assert {len(floor) for floor in without.floors.values()} == {10}


def fold_answers(tiles, seed=0, repeats=3):
    rng = np.random.default_rng(seed)
    folds = np.stack([rng.permutation(30) % 5 for _ in range(repeats)])
    out = OutOfFold("random", tiles, overconfident_logits(tiles.targets, rng, repeats), folds, far(folds))
    return answers_of_folds(out, [])[0]


def test_confidence_is_judged_bin_by_bin_and_by_what_is_answered(tiles):
    metrics = judge_confidence(fold_answers(tiles), softmax(fold_answers(tiles).logits))
    bins = [metric for metric in metrics if metric.name.startswith("accuracy of bin")]
    assert len(bins) == 5 and sum(metric.n for metric in bins) == 90
    errors = [metric.value for metric in metrics if metric.name.startswith("error of the surest")]
    assert errors[0] <= errors[-1]


def test_what_a_temperature_gains_is_measured_on_folds_it_was_not_fitted_on(tiles):
    found = {metric.name: metric for metric in judge_calibration(fold_answers(tiles))}
    assert found["ece after temperature"].value < found["ece before temperature"].value
    change = found["change of ece by temperature"]
    expected = found["ece after temperature"].value - found["ece before temperature"].value
    assert change.value == pytest.approx(expected) and change.low <= change.value <= change.high
    assert "temperature of the other folds" in change.protocol


def test_coverage_is_measured_where_the_tiles_suffice(tiles):
    answers = fold_answers(tiles)
    names = [metric.name for metric in judge_sets(answers, softmax(answers.logits, 4), tiles.classes)]
    assert "coverage of the sets at nominal 0.9" in names and "coverage of the sets at nominal 0.8" in names
    assert "coverage of the sets at nominal 0.99" not in names
    assert {f"coverage of the sets at nominal 0.9, {name}" for name in tiles.classes} <= set(names)


def slide_answers(tiles, doubtful=()):
    slides = sorted({record.slide for record in tiles.records})
    fold_of = np.array([[slides.index(record.slide) for record in tiles.records]])
    logits = overconfident_logits(tiles.targets, np.random.default_rng(1))
    return answers_of_folds(OutOfFold("slide", tiles, logits, fold_of, far(fold_of)), doubtful)


def shipped_on(findings):
    """Which part what is shipped was tried on, and which it was fitted on."""
    found = [re.fullmatch("(.*); the shipped (thresholds|limits), of (.*)", m.protocol) for m in findings.metrics]
    return {(match[1], match[2], match[3]) for match in found if match}


def test_what_is_shipped_is_tried_on_slides_that_no_network_saw(tiles):
    findings = derive_findings([fold_answers(tiles), *slide_answers(tiles)], tiles.classes)
    tried, fitted = "leave one of 10 slides out, all tiles of known slide", "3 x 5 random folds, all tiles"
    # Other networks answer there, but the pictures are those that the limits of the gate were fitted on.
    assert shipped_on(findings) == {(tried, "thresholds", fitted)}
    (coverage,) = [metric for metric in findings.metrics if "the shipped thresholds" in metric.protocol]
    assert coverage.n == 10


def test_what_is_shipped_is_not_tried_on_what_it_was_fitted_on(tiles):
    records = [replace(r, quality="blurred" if i % 3 else None) for i, r in enumerate(tiles.records)]
    parts = slide_answers(replace(tiles, records=records), ["blurred"])
    assert len(parts) == 2 and shipped_on(derive_findings(parts, tiles.classes)) == set()


def test_what_is_fitted_on_one_part_is_tried_on_the_other(tiles):
    rng = np.random.default_rng(0)
    parts = [
        answers_of_held_out(tiles, tiles, overconfident_logits(tiles.targets, rng)[0], far(np.zeros(30)), name)
        for name in ("validation", "test")
    ]
    tried = {("test", kind, "validation") for kind in ("thresholds", "limits")}
    assert shipped_on(derive_findings(parts, tiles.classes)) == tried


# -- nothing that is judged was learnt from -------------------------------------------------------------------------

FIFTH = Fold(np.flatnonzero(np.arange(30) % 5), np.arange(0, 30, 5), "one of five")


def test_floors_answer_without_having_seen_the_tiles_label(tiles):
    fold_of = np.arange(30)[None] % 5
    held_out = fold_of[0] == 0
    other = replace(tiles, targets=np.where(held_out, (tiles.targets + 1) % 3, tiles.targets))
    first, again = (
        fold_floors(OutOfFold("random", one, np.zeros((1, 30, 3), np.float32), fold_of)) for one in (tiles, other)
    )
    for name, probabilities in first.items():
        np.testing.assert_array_equal(probabilities[held_out], again[name][held_out])
        assert (probabilities[~held_out] != again[name][~held_out]).any()  # they learnt from it


def held_out_answers(train, held_out):
    logits = overconfident_logits(held_out.targets, np.random.default_rng(0))[0]
    return answers_of_held_out(train, held_out, logits, far(held_out.targets), "a protocol")


def test_floors_of_a_part_answer_without_having_seen_its_labels(tiles):
    train, held_out = (tiles.subset(part) for part in FIFTH[:2])
    other = replace(held_out, targets=(held_out.targets + 1) % 3)
    first, again = (held_out_answers(train, part).floors for part in (held_out, other))
    for name, probabilities in first.items():
        np.testing.assert_array_equal(probabilities, again[name])


def test_a_part_of_another_colour_is_foreign_to_the_training(tiles):
    train, held_out = (tiles.subset(part) for part in FIFTH[:2])
    green = replace(held_out, tiles=held_out.tiles[..., [1, 0, 2]])  # of tissue, which absorbs green most
    of_tissue, of_green = (held_out_answers(train, part).signs.foreign_share[0] for part in (held_out, green))
    assert np.median(of_tissue) < 0.05 and np.median(of_green) > 0.5


def test_distances_of_held_out_tiles_do_not_depend_on_each_other(small_fit, tiles, tmp_path):
    """Five of six become noise: the sixth lies as far from what the network learnt from as before."""
    noisy = tiles.tiles.copy()
    noisy[FIFTH.held_out[1:]] = np.random.default_rng(0).integers(0, 256, noisy[FIFTH.held_out[1:]].shape)
    one = NumberedFold("random-0-0", 0, 0, FIFTH)
    first = answer_fold(small_fit, tiles, one, tmp_path / "first").distances
    again = answer_fold(small_fit, replace(tiles, tiles=noisy), one, tmp_path / "again").distances
    assert first is not None and again is not None
    np.testing.assert_allclose(first[:, 0], again[:, 0], rtol=1e-3)
    assert (again[0, 1:] > 1.5 * first[0, 1:]).all()


def test_every_interval_by_slide_rests_on_slides(tiles):
    (answers,) = slide_answers(tiles)
    metrics = [m for m in judge_answers(answers, 1.0, tiles.classes) if not m.name.startswith("accuracy of bin")]
    of_part = {m.name: m.n for m in metrics if re.match("error of the surest|accuracy of the answers", m.name)}
    assert max(of_part.values()) <= 10
    of_tiles = {m.name: m.n for m in metrics if m.name == CHANCE_ERROR}
    assert of_tiles == {CHANCE_ERROR: 30}
    assert {m.n for m in metrics if m.name not in of_part | of_tiles} == {10}


def test_a_network_that_nobody_tested_says_so(tiles):
    findings = unmeasured(tiles)
    assert findings.metrics == [] and findings.calibration.temperature == 1
    assert "nothing was held out" in findings.calibration.protocol
