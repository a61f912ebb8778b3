import numpy as np
import pytest

from training.findings import answers_of_folds, answers_of_held_out, find, judge, unmeasured
from training.fit import OutOfFold, TileSet, read_tiles


@pytest.fixture(scope="module")
def tiles(small_fit) -> TileSet:
    return read_tiles(small_fit)


def overconfident_logits(targets, rng, repeats=1):
    """Right three times of four, and much too sure of it."""
    logits = rng.normal(size=(repeats, len(targets), 3))
    right = rng.random((repeats, len(targets))) < 0.75
    logits[right, targets[np.nonzero(right)[1]]] += 3
    return (4 * logits).astype(np.float32)


def test_the_temperature_takes_the_overconfidence_out(tiles):
    logits = overconfident_logits(tiles.targets, np.random.default_rng(0))[0]
    answers = answers_of_held_out(tiles, tiles, logits, "a protocol")
    findings = find([answers], tiles)
    assert findings.calibration.temperature > 2 and findings.calibration.n == 30
    assert findings.calibration.protocol.startswith("a protocol")
    assert 0 < findings.gate.min_confidence < 1 and findings.gate.min_tissue_share > 0.1


def test_repeated_answers_count_as_one_tile_each(tiles):
    rng = np.random.default_rng(0)
    folds = np.stack([rng.permutation(30) % 5 for _ in range(2)])
    out = OutOfFold("random", tiles, overconfident_logits(tiles.targets, rng, 2), folds)
    (answers,) = answers_of_folds(out, [])
    assert answers.logits.shape == (60, 3) and len(np.unique(answers.groups)) == 30
    accuracy = next(metric for metric in judge(answers, 1.0, tiles.classes) if metric.name == "accuracy")
    assert accuracy.n == 30 and accuracy.protocol == "2 x 5 random folds, all tiles"


def test_by_slide_the_slides_are_drawn_again_and_unknown_ones_left_out(tiles):
    slides = sorted({record.slide for record in tiles.records})
    fold_of = np.array([[slides.index(record.slide) for record in tiles.records]])
    fold_of[0, :4] = -1
    out = OutOfFold("slide", tiles, overconfident_logits(tiles.targets, np.random.default_rng(1)), fold_of)
    (answers,) = answers_of_folds(out, [])
    assert len(answers.targets) == 26
    assert answers.protocol == f"leave one of {len(slides)} slides out, all tiles of known slide"


def test_figures_without_the_doubtful_tiles_stand_beside_those_with(tiles):
    records = [
        type(r)(r.path, r.label, r.slide, r.sha256, "blurred" if i % 3 else None) for i, r in enumerate(tiles.records)
    ]
    marked = TileSet(tiles.tiles, tiles.targets, records, tiles.classes)
    folds = np.arange(30)[None] % 5
    out = OutOfFold("random", marked, overconfident_logits(tiles.targets, np.random.default_rng(1)), folds)
    everything, without = answers_of_folds(out, ["blurred"])
    assert len(everything.targets) == 30 and len(without.targets) == 10
    assert without.protocol.endswith("all tiles but blurred")
    assert {len(floor) for floor in without.floors.values()} == {10}


def test_a_network_that_nobody_tested_says_so(tiles):
    findings = unmeasured(tiles)
    assert findings.metrics == [] and findings.calibration.temperature == 1
    assert "nothing was held out" in findings.calibration.protocol
