import numpy as np
import pytest

from model.session import open_classifier
from training.data import NoClasses, load_tiles, scan
from training.evaluate import evaluate, predict_singly


@pytest.fixture(scope="module")
def tiles(tile_folder):
    return load_tiles(scan(tile_folder).records[::10], 150, 0.495)


def test_an_artefact_is_scored_by_its_own_graph(tiny_artifact, tile_folder):
    scores = evaluate(tiny_artifact, tile_folder, None, None)
    assert scores.n == 60 and len(scores.classes) == 6
    classifier = open_classifier(tiny_artifact, device="cpu")
    records = scan(tile_folder, None, classifier.manifest.class_names).records
    predicted = classifier.predict(load_tiles(records, 150, 0.495)).probabilities.argmax(1)
    right = [classifier.manifest.class_names[p] == record.label for p, record in zip(predicted, records, strict=True)]
    assert scores.accuracy.value == pytest.approx(np.mean(right))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_neighbours_in_a_list_do_not_change_an_answer(tiny_artifact, tiles, precision):
    together = predict_singly(tiny_artifact, tiles, precision)
    alone = predict_singly(tiny_artifact, tiles[2:3], precision)
    np.testing.assert_array_equal(together[2:3], alone)


def test_images_of_other_classes_are_refused(tiny_artifact, tmp_path, tile_folder):
    for name in ("CATS", "DOGS"):
        (tmp_path / name).mkdir()
        image = next(tile_folder.rglob("*.png"))
        (tmp_path / name / "x.png").write_bytes(image.read_bytes())
    with pytest.raises(NoClasses):
        evaluate(tiny_artifact, tmp_path, None, None)
