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
    assert trial.protocol.endswith("their classes; the network never saw them")
    assert (trial.tiles[0] == draw_tile("Stroma", 0)).all()


def test_tiles_of_one_class_mislead_nobody(tiny_artifact, tmp_path):
    write_tree(tmp_path, 2, kinds=("Mucosa", "Adipose"))
    with pytest.raises(NoClasses, match="are all Mucosa: add others"):
        measure([tiny_artifact], tmp_path, None, None, 2, learnt=False)
