import shutil

import numpy as np
import pytest
from PIL import Image

from model.session import open_classifier
from training.data import NoClasses, class_name, load_tiles, scan
from training.evaluate import evaluate, predict_singly, tally_scope


@pytest.fixture(scope="module")
def tiles(tile_folder):
    return load_tiles(scan(tile_folder).records[::10], 150, 0.495)


def test_an_artefact_is_scored_by_its_own_graph(tiny_artifact, tile_folder):
    scores = evaluate(tiny_artifact, tile_folder, None, None)
    assert scores.predictions == 60 and len(scores.classes) == 6
    classifier = open_classifier(tiny_artifact, device="cpu")
    records = scan(tile_folder, None, classifier.manifest.class_names).records
    predicted = classifier.predict(load_tiles(records, 150, 0.495)).probabilities.argmax(1)
    right = [classifier.manifest.class_names[p] == record.label for p, record in zip(predicted, records, strict=True)]
    assert scores.accuracy.value == pytest.approx(np.mean(right))


def test_images_that_are_left_out_are_told(tiny_artifact, tile_folder, tmp_path, caplog):
    shutil.copytree(tile_folder, tmp_path / "tiles")
    first = next((tmp_path / "tiles").rglob("*.png"))
    shutil.copy(first, first.with_name("again.png"))
    first.with_name("broken.png").write_bytes(b"no picture")
    assert evaluate(tiny_artifact, tmp_path / "tiles", None, None).predictions == 60
    assert "broken.png" in caplog.text and "the same bytes as" in caplog.text


def test_tiles_of_one_slide_are_drawn_together(tiny_artifact, tile_folder, tmp_path):
    names = [path.relative_to(tile_folder) for path in sorted(tile_folder.rglob("*.png"))]
    for slides, drawn in ((3, 3), (1, 60)):
        rows = [f"{name},{class_name(name.parent.name)},slide {n % slides}" for n, name in enumerate(names)]
        table = tmp_path / "table.csv"
        table.write_text("file,label,slide\n" + "\n".join(rows))
        assert evaluate(tiny_artifact, tile_folder, table, None).n == drawn


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_neighbours_in_a_list_do_not_change_an_answer(tiny_artifact, tiles, precision):
    together = predict_singly(tiny_artifact, tiles, precision)
    alone = predict_singly(tiny_artifact, tiles[2:3], precision)
    np.testing.assert_array_equal(together[2:3], alone)


def test_folders_of_anything_are_counted_by_verdict(tiny_artifact, tile_folder, tmp_path):
    Image.new("RGB", (150, 150), "white").save(tmp_path / "glass.png")
    Image.new("RGB", (150, 150), (200, 120, 170)).save(tmp_path / "flat.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tissue, other = tally_scope(tiny_artifact, [tile_folder, tmp_path], None)
    assert tissue.n == 60 and tissue.verdicts["ok"] > 50
    assert (other.n, other.refused) == (2, 1)
    assert other.verdicts == {"out_of_scope": 1, "uncertain": 1}
    assert other.reasons["little_tissue"] == 1 and other.reasons["blurred"] == 2
    share, low, high = other.not_ok()
    assert share == 1 and 0.3 < low < high == 1


def test_a_folder_without_pictures_is_refused(tiny_artifact, tmp_path):
    with pytest.raises(NoClasses, match="no image that can be read"):
        tally_scope(tiny_artifact, [tmp_path], None)


def test_images_of_other_classes_are_refused(tiny_artifact, tmp_path, tile_folder):
    for name in ("CATS", "DOGS"):
        (tmp_path / name).mkdir()
        image = next(tile_folder.rglob("*.png"))
        (tmp_path / name / "x.png").write_bytes(image.read_bytes())
    with pytest.raises(NoClasses):
        evaluate(tiny_artifact, tmp_path, None, None)
