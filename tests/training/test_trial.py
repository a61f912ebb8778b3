import numpy as np
import pytest

from model.session import open_classifier
from training.data import NoClasses
from training.robustness import measure
from training.synthetic import draw_tile, write_tree
from training.trial import read_trial


def test_tiles_of_some_of_the_classes_are_tried(tiny_artifact, tmp_path):
    write_tree(tmp_path, 2, kinds=("Mucosa", "Stroma"))
    trial = read_trial(open_classifier(tiny_artifact, device="cpu"), tmp_path, None, None, 2, learnt=False)
    assert trial.labelled and trial.targets.tolist() == [1, 1, 5, 5]
    assert trial.protocol.endswith("their classes; the network never saw them; the slides drawn again")
    assert trial.drawn_together(np.array([1, 2, 3])).tolist() == [1, 0, 1]  # the first of each class is of slide one
    assert (trial.tiles[0] == draw_tile("Stroma", 0)).all()


def test_tiles_without_slides_are_drawn_alone(tiny_artifact, tmp_path):
    """One slide of all is as good as none: its tiles say nothing of other slides, but something of each other."""
    classifier = open_classifier(tiny_artifact, device="cpu")
    write_tree(tmp_path / "labelled", 1, kinds=("Mucosa", "Stroma"))
    one_slide = read_trial(classifier, tmp_path / "labelled", None, None, 2, learnt=False)
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (tmp_path / "labelled").rglob("*.png"):
        path.rename(folder / f"{path.parent.name}-{path.name}")
    unlabelled = read_trial(classifier, folder, None, None, 2, learnt=False)
    for trial in (one_slide, unlabelled):
        assert len(trial.tiles) == 2 and trial.drawn_together(np.array([1, 0])).tolist() == [0, 1]
        assert "slides" not in trial.protocol


def test_tiles_of_one_class_mislead_nobody(tiny_artifact, tmp_path):
    write_tree(tmp_path, 2, kinds=("Mucosa", "Adipose"))
    with pytest.raises(NoClasses, match="are all Mucosa: add others"):
        measure([tiny_artifact], tmp_path, None, None, 2, learnt=False)
