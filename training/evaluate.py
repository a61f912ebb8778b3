"""Scores an artefact, not a checkpoint: the very graph that is served, through the very session that serves it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.artifact import Precision, read_manifest
from model.session import open_classifier
from training.data import load_tiles, number_labels, scan
from training.metrics import Scores, score


def evaluate(artifact: Path, images: Path, table: Path | None, image_mpp: float | None) -> Scores:
    m = read_manifest(artifact)
    records = scan(images, table, m.class_names).records
    tiles = load_tiles(records, m.tile_px, m.tile_mpp, image_mpp)
    return score(predict_singly(artifact, tiles), number_labels(records, m.class_names), m.class_names)


def predict_singly(artifact: Path, tiles: NDArray[np.uint8], precision: Precision = "fp32") -> NDArray[np.float32]:
    """One tile a call, as on a CPU it is served: dynamic int8 takes its scales over all that is in one call."""
    classifier = open_classifier(artifact, device="cpu", precision=precision)
    return np.concatenate([classifier.predict(tile[None]).probabilities for tile in tiles])
