from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import make_pretraining
from training.config import Rule
from training.cuts import Cutter, obeys, symmetry
from training.fields import NO_LABEL, Field, read_source


def cutter(folders: Path, kind: str) -> Cutter:
    config = make_pretraining(folders)
    source = next(source for source in config.sources if source.kind == kind)
    return Cutter(read_source(source), config)


def test_points_land_in_the_patch_they_lie_in(folders):
    points = cutter(folders, "points")
    long, round_ = points.collection.names
    assert (long, round_) == ("long", "round")
    field = Field(
        np.zeros((100, 120, 3), np.uint8), "", points=np.array([[10, 20, 1], [59, 59, 0], [61, 10, 1]], np.float32)
    )
    cut = points.cut_at(field, left=0, top=0, side=60)  # patches of 15 px
    assert cut.patches[1, 0].tolist() == [0, 1]
    assert cut.patches[3, 3].tolist() == [1, 0]
    assert cut.patches.sum() == 2  # the third lies outside


def test_gland_share_is_that_of_the_mask_under_each_patch(folders):
    masks = cutter(folders, "masks")
    field = masks.collection.fields[0]
    cut = masks.cut_at(field, left=30, top=0, side=60)  # the gland ends at x = 60, half way
    assert cut.patches[:, :2, 0] == pytest.approx(1) and cut.patches[:, 2:, 0] == pytest.approx(0)
    assert (cut.patches[..., 1] == field.grade).all()


@pytest.mark.parametrize("turn", range(8))
def test_tile_and_patches_turn_together(folders, turn):
    masks = cutter(folders, "masks")
    field = masks.collection.fields[0]
    cut = masks.cut_at(field, left=30, top=0, side=60, turn=turn)
    dark = cut.tile[7::15, 7::15, 0] < 175  # at the patches' centres
    np.testing.assert_array_equal(dark, cut.patches[..., 0] > 0.5)


def test_the_eight_symmetries_differ():
    array = np.arange(6).reshape(2, 3, 1)
    assert len({symmetry(array, turn).tobytes() + bytes(symmetry(array, turn).shape) for turn in range(8)}) == 8


def test_a_cut_has_the_tiles_magnification(folders):
    points = cutter(folders, "points")
    assert points.side_px(points.collection.fields[0]) == 60
    coarse = cutter(folders, "classes")
    assert coarse.side_px(coarse.collection.fields[0]) == 80  # no mpp: the whole image


def test_rules_ask_for_amounts_shares_and_absence():
    rule = Rule(label="x", kind="points", at_least={"a": 5}, share={"a": 0.5}, absent=["c"])
    assert obeys({"a": 6, "b": 5, "c": 0}, rule)
    assert not obeys({"a": 4, "b": 0, "c": 0}, rule)
    assert not obeys({"a": 6, "b": 6, "c": 0}, rule)
    assert not obeys({"a": 9, "b": 0, "c": 1}, rule)


def test_weak_labels_come_from_what_lies_in_the_cut(folders):
    masks = cutter(folders, "masks")
    benign, malignant = masks.collection.names
    assert (benign, malignant) == ("benign", "malignant")
    field = next(field for field in masks.collection.fields if field.grade == 1)
    assert masks.cut_at(field, left=0, top=0, side=60).weak_label == 1
    assert masks.cut_at(field, left=60, top=0, side=60).weak_label == NO_LABEL
