import shutil

import numpy as np
import pytest
from PIL import Image

from training.config import BadConfig, Source
from training.data import BadTable, UnusableImage
from training.fields import read_points, read_source


def test_no_patient_is_learnt_and_held_out_at_once(folders):
    source = Source(kind="masks", folder=folders / "glands", table="fields.csv", mpp=0.5, share=1, held_out=0.4)
    collection = read_source(source)
    assert len(collection.fields) == 6 and len(collection.held_out) == 4  # two of five patients, two fields each


def test_nuclei_of_one_patient_stay_together_where_the_table_names_them(folders, tmp_path):
    shutil.copytree(folders / "nuclei", tmp_path / "nuclei")
    table = tmp_path / "nuclei" / "points.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text(
        "\n".join([f"{head},patient", *(f"{row},{'first' if row[0] < '5' else 'second'}" for row in rows)])
    )
    source = Source(kind="points", folder=tmp_path / "nuclei", table="points.csv", mpp=0.5, share=1, held_out=0.5)
    assert [field.group for field in read_points(source)[1]] == ["first"] * 5 + ["second"] * 5
    assert len(read_source(source).fields) == len(read_source(source).held_out) == 5


@pytest.fixture
def paired(folders):
    """Coarse fields with a table of near duplicates, still to be written."""
    table = folders / "coarse" / "pairs.csv"
    yield table, Source(kind="classes", folder=folders / "coarse", table="pairs.csv", share=1, held_out=0.5)
    table.unlink()


@pytest.mark.parametrize("seen_from", ["coarse/dark/", "dark/", "dark\\"])
def test_near_duplicates_stay_on_one_side(paired, seen_from):
    table, source = paired
    table.write_text("a,b\n" + "".join(f"{seen_from}{n}.png,{seen_from}{n + 1}.png\n" for n in range(9)))
    dark_learnt = sum(field.label == 0 for field in read_source(source).fields)
    assert dark_learnt in (0, 10)  # a chain of pairs is one group


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a,b\n0.png,1.png\n", r"names no file that is there; the first is 0\.png"), ("a\n0.png\n", "has no column b")],
)
def test_a_table_that_would_not_be_obeyed_is_refused(paired, text, complaint):
    table, source = paired
    table.write_text(text)
    with pytest.raises(BadTable, match=complaint):
        read_source(source)


def test_images_are_found_and_read_as_those_to_be_classified_are(tmp_path):
    see_through = np.zeros((40, 40, 4), np.uint8)
    for place in ("a/1.png", "b/1.png", "a/.thumbs/1.png", ".cache/1.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(see_through).save(tmp_path / place)
    (tmp_path / "a" / "notes.txt").write_text("of no image")
    collection = read_source(Source(kind="classes", folder=tmp_path, share=1, held_out=0))
    assert collection.names == ["a", "b"] and [field.label for field in collection.fields] == [0, 1]
    assert all((field.pixels == 255).all() for field in collection.fields)  # glass, as it is when it is served
    (tmp_path / "b" / "2.png").write_text("no image")
    with pytest.raises(UnusableImage, match=r"2\.png: This is a line of text"):
        read_source(collection.source)


def test_a_source_without_images_or_table_is_named(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadConfig, match="holds no images of kind 'classes'"):
        read_source(Source(kind="classes", folder=tmp_path / "empty", share=1))
    with pytest.raises(BadConfig, match="needs a table"):
        read_source(Source(kind="points", folder=folders / "nuclei", share=1))


def test_more_grades_than_the_loss_tells_apart_are_refused(folders, tmp_path):
    shutil.copytree(folders / "glands", tmp_path / "glands")
    table = tmp_path / "glands" / "fields.csv"
    table.write_text(table.read_text().replace("benign", "adenoma", 1))
    source = Source(kind="masks", folder=tmp_path / "glands", table="fields.csv", mpp=0.5, share=1)
    with pytest.raises(BadConfig, match=r"3 grades \(adenoma, benign, malignant\), expected 2 at most: merge some"):
        read_source(source)


def test_a_source_of_which_nothing_is_left_to_learn_from_is_refused(folders):
    source = Source(kind="classes", folder=folders / "coarse", share=1, held_out=1.0)
    with pytest.raises(BadConfig, match=r"20 groups of images, and held_out = 1 leaves none"):
        read_source(source)
