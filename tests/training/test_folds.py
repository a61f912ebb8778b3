from pathlib import Path

import numpy as np
import pytest

from training.data import Record
from training.fit import read_tiles
from training.folds import (
    TooFewImages,
    course_split,
    cross_validate,
    make_folds,
    random_folds,
    slide_folds,
    split,
    together,
)
from training.twins import group_pairs


@pytest.fixture(scope="module")
def tiles(small_fit):
    return read_tiles(small_fit)


def named(n: int, label: str = "Tumor", slides: int = 10) -> list[Record]:
    return [Record(Path(f"{label}/{i}.png"), label, f"{i % slides + 1:02d}", f"{label}{i}", None) for i in range(n)]


# -- one fit -------------------------------------------------------------------------------------------------------


def test_a_fifth_is_held_out_of_every_class(small_fit, tiles):
    train, parts = split(tiles, small_fit)
    held_out = parts["one random fifth held out"]
    assert np.bincount(train.targets).tolist() == [8, 8, 8] and np.bincount(held_out.targets).tolist() == [2, 2, 2]
    assert not {r.sha256 for r in train.records} & {r.sha256 for r in held_out.records}


def test_everything_is_learnt_from_where_nothing_is_held_out(small_fit, tiles):
    train, parts = split(tiles, small_fit.model_copy(update={"split": "all"}))
    assert len(train.targets) == 30 and parts == {}


def test_the_course_split_wants_the_full_set(small_fit, tiles):
    with pytest.raises(TooFewImages, match=r"425 \+ 100 \+ 100"):
        split(tiles, small_fit.model_copy(update={"split": "course"}))


def test_the_course_split_holds_out_no_twin_of_what_is_learnt(small_fit, tiles):
    twice = tiles.subset(np.tile(np.arange(30), 2))
    twice.tiles[30:] = twice.tiles[:30, ::-1]
    course = small_fit.model_copy(update={"split": "course", "course": (6, 2, 2)})
    train, parts = split(twice, course)
    assert list(parts) == ["6/2/2 per class, the validation part", "6/2/2 per class, the test part"]
    learnt = {tile.tobytes() for tile in (*train.tiles, *train.tiles[:, ::-1])}
    for part in parts.values():
        assert len(part.targets) and not learnt & {tile.tobytes() for tile in part.tiles}


def test_the_course_split():
    records = named(700, "Tumor") + named(630, "Stroma")
    split = course_split(records, seed=3)
    labels = np.array([record.label for record in records])
    for part, size in zip(split, (425, 100, 100), strict=True):
        assert np.unique(labels[part], return_counts=True)[1].tolist() == [size, size]
    together = np.concatenate(split)
    assert len(np.unique(together)) == len(together) == 1250
    assert all(np.array_equal(a, b) for a, b in zip(split, course_split(records, seed=3), strict=True))
    assert not np.array_equal(split.test, course_split(records, seed=4).test)


def test_the_course_split_keeps_groups_in_one_part():
    records = named(40, "Tumor") + named(40, "Stroma")
    twins = np.tile(np.arange(20), 4)  # two images of each class in every group
    split = course_split(records, 3, (20, 10, 10), twins)
    assert sorted(np.concatenate(split)) == list(range(80))
    groups = [set(twins[part]) for part in split]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    parted = course_split(records, 3, (20, 10, 10))
    assert set(twins[parted.train]) & set(twins[parted.test])


def test_the_course_split_refuses_small_classes():
    with pytest.raises(
        TooFewImages, match=r"425 \+ 100 \+ 100 .* needs 625 images of each class, but Stroma has 12: add images"
    ):
        course_split(named(625, "Tumor") + named(12, "Stroma"), seed=0)


@pytest.mark.parametrize("grouped", [False, True])
def test_random_folds_are_a_stratified_partition(grouped: bool):
    labels = np.repeat([0, 1, 2], [50, 25, 10])
    together = group_pairs(85, [(0, 1), (1, 2), (60, 80)]) if grouped else None
    folds = random_folds(labels, ["a", "b", "c"], 5, 0, together)
    assert sorted(np.concatenate([fold.held_out for fold in folds]).tolist()) == list(range(85))
    for fold in folds:
        assert not set(fold.train) & set(fold.held_out) and len(fold.train) + len(fold.held_out) == 85
        counts = np.bincount(labels[fold.held_out])
        assert np.abs(counts - [10, 5, 2]).max() <= 1
        if grouped:
            assert len({0, 1, 2} & set(fold.held_out)) in (0, 3)
            assert len({60, 80} & set(fold.held_out)) in (0, 2)


@pytest.mark.parametrize("grouped", [False, True])
def test_random_folds_follow_the_seed(grouped: bool):
    labels = np.repeat([0, 1], 20)
    together = np.arange(40) if grouped else None
    first = random_folds(labels, ["a", "b"], 4, 0, together)[0].held_out
    assert np.array_equal(first, random_folds(labels, ["a", "b"], 4, 0, together)[0].held_out)
    assert not np.array_equal(first, random_folds(labels, ["a", "b"], 4, 1, together)[0].held_out)


def test_random_folds_refuse_small_classes():
    with pytest.raises(
        TooFewImages, match=r"one of 5 parts, .* needs 5 images of each class .*, but Stroma has 4: add"
    ):
        random_folds(np.repeat([0, 1], [9, 4]), ["Tumor", "Stroma"], 5, 0)


def test_random_folds_count_images_that_look_alike_once():
    together = group_pairs(15, [(i, i + 1) for i in range(9, 14)])
    with pytest.raises(TooFewImages, match=r"\(those that look alike count once\), but Stroma has 1:"):
        random_folds(np.repeat([0, 1], [9, 6]), ["Tumor", "Stroma"], 5, 0, together)


def test_one_slide_is_left_out_at_a_time():
    records = [*named(6, "Tumor", 3), Record(Path("x.png"), "Tumor", None, "x", None), *named(3, "Stroma", 3)]
    folds = slide_folds(records)
    assert [fold.name for fold in folds] == ["slide 01 held out", "slide 02 held out", "slide 03 held out"]
    for fold in folds:
        assert len({records[i].slide for i in fold.held_out}) == 1
        assert not {records[i].slide for i in fold.train} & {records[i].slide for i in fold.held_out}
        assert 6 not in fold.train and 6 not in fold.held_out  # it may be of the very slide held out
    assert sorted(np.concatenate([fold.held_out for fold in folds]).tolist()) == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_too_few_slides_are_refused():
    nameless = [Record(Path(f"{i}.png"), "Tumor", None, str(i), None) for i in range(5)]
    with pytest.raises(TooFewImages, match="0 of 5 images name 0 slides; expected at least 2"):
        slide_folds(nameless)
    with pytest.raises(TooFewImages, match="5 of 5 images name 1 slides; expected at least 2"):
        slide_folds(named(5, slides=1))


# -- folds ---------------------------------------------------------------------------------------------------------


def test_a_flipped_copy_stays_in_the_fold_of_its_original(small_fit, tiles):
    twice = tiles.subset(np.array([*range(30), 0]))
    twice.tiles[30] = twice.tiles[0][::-1]
    groups = together(twice)
    assert groups[30] == groups[0] and len(set(groups)) == 30
    for _, _, _, fold in make_folds(twice, small_fit, "random", 1):
        assert (0 in fold.held_out) == (30 in fold.held_out)


def test_folds_by_slide_never_split_a_slide(small_fit, tiles):
    for _, _, _, fold in make_folds(tiles, small_fit, "slide", 1):
        out = {tiles.records[i].slide for i in fold.held_out}
        assert len(out) == 1 and not out & {tiles.records[i].slide for i in fold.train}


def test_fields_that_two_slides_show_are_told(small_fit, tiles, tmp_path, caplog):
    slides = {r.slide: i for i, r in enumerate(tiles.records)}
    first, second = list(slides.values())[:2]
    of_two = tiles.subset(np.array([i for i, r in enumerate(tiles.records) if r.slide in list(slides)[:2]]))
    cross_validate(small_fit, of_two, tmp_path / "apart", "slide", print)
    assert "look alike" not in caplog.text
    twins = of_two.subset(np.arange(len(of_two.targets)))
    a, b = (next(i for i, r in enumerate(twins.records) if r.slide == tiles.records[k].slide) for k in (first, second))
    twins.tiles[b] = twins.tiles[a][::-1]
    cross_validate(small_fit, twins, tmp_path / "alike", "slide", print)
    pair = f"{twins.records[min(a, b)].path} and {twins.records[max(a, b)].path}"
    assert f"look alike on two slides, so that folds by slide flatter: {pair}" in caplog.text


def test_every_tile_is_answered_out_of_its_fold_and_finished_folds_are_kept(small_fit, tiles, tmp_path):
    told: list[str] = []
    first = cross_validate(small_fit, tiles, tmp_path, "random", told.append)
    assert first.logits.shape == (2, 30, 3) and np.isfinite(first.logits).all()
    assert len(told) == 10 and told[0].startswith("random-0-0")
    (tmp_path / "random-1-4" / "logits.npy").unlink()  # as if it had been killed in the last fold
    again = cross_validate(small_fit, tiles, tmp_path, "random", told.append)
    np.testing.assert_array_equal(first.logits, again.logits)
