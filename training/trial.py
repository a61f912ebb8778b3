"""Tiles to judge an artefact on, and what is known of them: their classes, or else the artefact's own answers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.artifact import Manifest
from model.session import Classifier
from training.data import (
    class_folders,
    group_by_slide,
    load_images,
    load_tiles,
    name_slides,
    number_labels,
    scan,
    tell_skipped,
    unlabelled_images,
)

Pixels = NDArray[np.uint8]
Indices = NDArray[np.intp]

CANDIDATES_PER_TILE = 10  # tiles of a folder without classes that are answered for each one that is wanted


@dataclass(frozen=True)
class Trial:
    tiles: Pixels  # (N, S, S, 3)
    targets: Indices  # (N,) the class, or the answer to the tile as it is
    answers: Indices  # (N,)
    confidence: NDArray[np.float32]  # (N,)
    slides: Indices | None  # (N,) None where no two are named
    labelled: bool
    protocol: str

    def drawn_together(self, chosen: Indices) -> Indices:
        """The slide of each chosen tile, for a bootstrap: tiles of one slide are right, or wrong, together. Where no
        slides are named each tile has a number of its own.
        """
        return np.arange(len(chosen)) if self.slides is None else self.slides[chosen]


def read_trial(
    classifier: Classifier,
    folder: Path,
    table: Path | None,
    image_mpp: float | None,
    per_class: int,
    learnt: bool,
    seed: int = 0,
) -> Trial:
    """A folder per class, or one folder of images without classes. `learnt`: the network was trained on them."""
    m = classifier.manifest
    slides = None
    labelled = table is not None or bool(class_folders(folder))
    if labelled:
        scanned = scan(folder, table, m.class_names, needs_all=False)
        tell_skipped(scanned)
        records = scanned.records
        tiles = load_tiles(records, m.tile_px, m.tile_mpp, image_mpp)
        if len(name_slides(records)) > 1:
            slides = group_by_slide(records)
    else:
        most = CANDIDATES_PER_TILE * per_class * len(m.classes)
        tiles = load_unlabelled(folder, m, image_mpp, most, seed)
    probabilities = np.concatenate([classifier.predict(tile[None]).probabilities for tile in tiles])
    answers = probabilities.argmax(axis=1)
    targets = number_labels(records, m.class_names) if labelled else answers
    known = "their classes" if labelled else "no classes, so the answers to the whole tiles stand for them"
    seen = "the network was trained on them" if learnt else "the network never saw them"
    protocol = f"{len(tiles)} tiles of {folder.name}, {known}; {seen}"
    if slides is not None:
        protocol += "; the slides drawn again"
    return Trial(tiles, targets, answers, probabilities.max(axis=1), slides, labelled, protocol)


def load_unlabelled(folder: Path, m: Manifest, image_mpp: float | None, most: int, seed: int) -> Pixels:
    paths = unlabelled_images(folder)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(paths))[:most])
    return load_images([paths[i] for i in chosen], m.tile_px, m.tile_mpp, image_mpp)


def choose_evenly(classes: Indices, per_class: int, seed: int = 0) -> Indices:
    """At most so many of each class, at random; in random order, so that a part of them is even as well."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(classes == c))[:per_class] for c in np.unique(classes)]
    return rng.permutation(np.concatenate(chosen))
