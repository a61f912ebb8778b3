"""What is learnt from and what is held out: the parts of one fit, and the folds that answer every tile.

tissue-train cv configs/default.toml
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold

from training import checkpoint
from training.config import Fit
from training.data import Indices, Record
from training.fit import Distances, Logits, TileSet, fit_tiles, measure_distances, predict
from training.gate import count_versions
from training.looks import LOOKS, group_looks
from training.twins import find_near_duplicates, group_pairs

log = logging.getLogger(__name__)

Grouping = Literal["random", "slide"]

PROTOCOLS = {
    "fifth": "one random fifth held out",
    "looks": f"whole looks held out, about one of {LOOKS} (k-means of stain) of each class",
}


class TooFewImages(ValueError):
    pass


class Split(NamedTuple):
    train: Indices
    validation: Indices
    test: Indices


class Fold(NamedTuple):
    train: Indices
    held_out: Indices
    name: str


class NumberedFold(NamedTuple):
    folder: str
    repeat: int
    number: int
    fold: Fold


class FoldAnswer(NamedTuple):
    one: NumberedFold
    logits: Logits  # (held out, K)
    distances: Distances | None = None  # (C, held out)


@dataclass(frozen=True)
class OutOfFold:
    """Every tile answered by networks that never saw it: R times each, NaN where a tile has no slide to leave out."""

    grouping: Grouping
    tiles: TileSet
    logits: Logits  # (R, N, K)
    folds: Indices  # (R, N) the fold in which it was held out, -1 for none
    # (C, R, N): how far the features of each tile, and of its restained copies, lie from those that were learnt from.
    distances: Distances | None = None


# -- one fit -------------------------------------------------------------------------------------------------------


def split(tiles: TileSet, config: Fit) -> tuple[TileSet, dict[str, TileSet]]:
    """What is learnt from, and by their protocols the parts that are held out."""
    if config.split == "all":
        return tiles, {}
    seed, groups = config.optimisation.seed, together(tiles)
    if config.split == "course":
        parts = course_split(tiles.records, seed, config.course, groups)
        sizes = "/".join(str(n) for n in config.course)
        named = {"validation": parts.validation, "test": parts.test}
        held_out = {f"{sizes} per class, the {name} part": tiles.subset(part) for name, part in named.items()}
        return tiles.subset(parts.train), held_out
    if config.split == "looks":
        groups = group_looks(tiles.tiles, tiles.targets, groups, seed)
    fold = random_folds(tiles.targets, tiles.classes, 5, seed, groups)[0]
    return tiles.subset(fold.train), {PROTOCOLS[config.split]: tiles.subset(fold.held_out)}


def together(tiles: TileSet) -> Indices:
    """Tiles that show one field get one number, and are never learnt and held out at once."""
    if tiles.near_duplicates is not None:
        return tiles.near_duplicates
    return group_pairs(len(tiles.targets), find_near_duplicates(tiles.tiles))


def course_split(
    records: Sequence[Record],
    seed: int,
    per_class: tuple[int, int, int] = (425, 100, 100),
    together: Indices | None = None,
) -> Split:
    """So many of each class for training, validation and test; at random, so tiles of one slide are in all three.

    `together`: a group number for each image. A group that several parts have drawn from goes to the first of them, so
    that sizes may differ by a few.
    """
    labels = np.array([record.label for record in records])
    refuse_small_classes(labels, sum(per_class), f"a split of {' + '.join(map(str, per_class))} of each class")
    rng = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == label))[: sum(per_class)]
        drawn.append(np.split(order, np.cumsum(per_class)[:-1]))
    parts = [np.sort(np.concatenate(part)) for part in zip(*drawn, strict=True)]
    if together is not None:
        part_of = {group: n for n in (2, 1, 0) for group in together[parts[n]]}
        images = np.concatenate(parts)
        place = np.array([part_of[group] for group in together[images]])
        parts = [np.sort(images[place == n]) for n in range(3)]
    return Split(*parts)


def random_folds(
    labels: Indices, classes: Sequence[str], k: int, seed: int, together: Indices | None = None
) -> list[Fold]:
    """Each class spread evenly over k folds. `together`: a group number for each image, whose fold it shares."""
    names = np.array(classes)[labels]
    alike = np.arange(len(labels)) if together is None else together
    _, one_of_each = np.unique(np.stack([labels, alike]), axis=1, return_index=True)
    purpose = f"holding out one of {k} parts, with every class in each,"
    refuse_small_classes(names[one_of_each], k, purpose, " (those that look alike count once)")
    folder = StratifiedKFold if together is None else StratifiedGroupKFold
    folds = folder(k, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, together)
    return [Fold(train, held_out, f"fold {i + 1}") for i, (train, held_out) in enumerate(folds)]


def slide_folds(records: Sequence[Record]) -> list[Fold]:
    """One slide held out at a time. Images that name no slide are in no fold at all."""
    known = [i for i, record in enumerate(records) if record.slide is not None]
    index = np.array(known, dtype=np.intp)
    slides = np.array([records[i].slide for i in known])
    n_slides = len(np.unique(slides))
    if n_slides < 2:
        raise TooFewImages(
            f"{len(known)} of {len(records)} images name {n_slides} slides; expected at least 2: name them in a table"
        )
    return [
        Fold(index[train], index[held_out], f"slide {slides[held_out][0]} held out")
        for train, held_out in LeaveOneGroupOut().split(index, groups=slides)
    ]


def refuse_small_classes(labels: NDArray[np.generic], least: int, purpose: str, note: str = "") -> None:
    small = {label: n for label, n in sorted(Counter(labels.tolist()).items()) if n < least}
    if small:
        counts = ", ".join(f"{label} has {n}" for label, n in small.items())
        raise TooFewImages(
            f"{purpose} needs {least} images of each class{note}, but {counts}: "
            "add images, or name the classes to go on with in data.classes"
        )


# -- folds ---------------------------------------------------------------------------------------------------------


def cross_validate(
    config: Fit, tiles: TileSet, folder: Path, grouping: Grouping, tell: Callable[[str], None]
) -> OutOfFold:
    """Each finished fold is kept, so that a run that was killed goes on with the next one."""
    repeats = config.repeats if grouping == "random" else 1
    if grouping == "slide":
        tell_twins_across_slides(tiles)
    answers = []
    for one in make_folds(tiles, config, grouping, repeats):
        answer = answer_fold(config, tiles, one, folder)
        tell(describe_answer(tiles, answer))
        answers.append(answer)
    return assemble(tiles, grouping, repeats, answers)


def make_folds(tiles: TileSet, config: Fit, grouping: Grouping, repeats: int) -> list[NumberedFold]:
    """All folds of all repeats; a slide can be left out in one way only."""
    if grouping == "slide":
        rounds = [slide_folds(tiles.records)]
    else:
        groups = together(tiles)
        rounds = [random_folds(tiles.targets, tiles.classes, config.folds, seed, groups) for seed in range(repeats)]
    return [
        NumberedFold(f"{grouping}-{repeat}-{number}", repeat, number, fold)
        for repeat, folds in enumerate(rounds)
        for number, fold in enumerate(folds)
    ]


def tell_twins_across_slides(tiles: TileSet) -> None:
    """Folds by slide hold out whole slides: a field that two of them show is learnt and held out at once."""
    first: dict[int, Record] = {}
    for group, record in zip(together(tiles).tolist(), tiles.records, strict=True):
        if record.slide is None:
            continue
        other = first.setdefault(group, record)
        if other.slide != record.slide:
            log.warning("look alike on two slides, so that folds by slide flatter: %s and %s", other.path, record.path)


def answer_fold(config: Fit, tiles: TileSet, one: NumberedFold, folder: Path) -> FoldAnswer:
    """Logits of the held-out tiles, and how far their features lie from those of the others."""
    place, fold = folder / one.folder, one.fold
    finished, beside = place / "logits.npy", place / "distances.npy"
    if finished.exists() and beside.exists():
        return FoldAnswer(one, np.load(finished), np.load(beside))
    seeded = config.optimisation.model_copy(update={"seed": config.optimisation.seed + one.repeat})
    config = config.model_copy(update={"optimisation": seeded})
    net = fit_tiles(config, tiles.subset(fold.train), place, None, title=place.name)
    held_out = tiles.tiles[fold.held_out]
    logits = predict(net, held_out)
    distances = measure_distances(net, tiles.tiles[fold.train], held_out, count_versions(len(tiles.targets)))
    checkpoint.write_atomically(beside, lambda file: np.save(file, distances))
    checkpoint.write_atomically(finished, lambda file: np.save(file, logits))
    (place / "latest.pt").unlink()  # a network per fold is of no further use
    shutil.rmtree(place / "teacher", ignore_errors=True)
    return FoldAnswer(one, logits, distances)


def describe_answer(tiles: TileSet, answer: FoldAnswer) -> str:
    fold = answer.one.fold
    right = (answer.logits.argmax(1) == tiles.targets[fold.held_out]).mean()
    return f"{answer.one.folder}, {fold.name}: {right:.3f} of {len(fold.held_out)}"


def assemble(tiles: TileSet, grouping: Grouping, repeats: int, answers: Sequence[FoldAnswer]) -> OutOfFold:
    n = len(tiles.targets)
    logits = np.full((repeats, n, len(tiles.classes)), np.nan, np.float32)
    folds = np.full((repeats, n), -1)
    distances = np.full((count_versions(n), repeats, n), np.nan, np.float32)
    for one, logits_of_fold, distances_of_fold in answers:
        repeat, held_out = one.repeat, one.fold.held_out
        logits[repeat, held_out] = logits_of_fold
        folds[repeat, held_out] = one.number
        if distances_of_fold is not None:
            distances[:, repeat, held_out] = distances_of_fold
    measured = all(answer.distances is not None for answer in answers)
    return OutOfFold(grouping, tiles, logits, folds, distances if measured else None)
