"""Scores an artefact, not a checkpoint: the very graph that is served, through the very session that serves it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from model.artifact import Precision, Verdict, read_manifest
from model.pixels import ImageRefused, decode, to_tile
from model.quality import measure_quality
from model.scope import judge
from model.session import Classifier, open_classifier
from training.data import (
    NoClasses,
    group_by_slide,
    images_below,
    load_tiles,
    name_slides,
    number_labels,
    scan,
    tell_skipped,
)
from training.metrics import Scores, score


def evaluate(artifact: Path, images: Path, table: Path | None, image_mpp: float | None) -> Scores:
    m = read_manifest(artifact)
    scanned = scan(images, table, m.class_names, needs_all=False)
    tell_skipped(scanned)
    records = scanned.records
    tiles = load_tiles(records, m.tile_px, m.tile_mpp, image_mpp)
    targets = number_labels(records, m.class_names)
    # Tiles of one slide are right, or wrong, together, and so are drawn together.
    groups = group_by_slide(records) if len(name_slides(records)) > 1 else None
    return score(predict_singly(artifact, tiles), targets, m.class_names, groups)


def predict_singly(artifact: Path, tiles: NDArray[np.uint8], precision: Precision = "fp32") -> NDArray[np.float32]:
    """One tile a call, as a CPU serves it: dynamic int8 takes its scales over all that is in one call."""
    classifier = open_classifier(artifact, device="cpu", precision=precision)
    return np.concatenate([classifier.predict(tile[None]).probabilities for tile in tiles])


# -- scope ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """What an artefact says of a folder of images, whatever they show."""

    folder: Path
    n: int
    verdicts: Counter[Verdict]
    reasons: Counter[str]  # an image may have several
    refused: int  # unreadable, or too small for a tile

    def not_ok(self) -> tuple[float, float, float]:
        """The share that is not answered ok, and its 95 % interval (Wilson's)."""
        result = binomtest(self.n - self.verdicts["ok"], self.n)
        interval = result.proportion_ci(method="wilson")
        return result.statistic, float(interval.low), float(interval.high)


def tally_scope(artifact: Path, folders: Sequence[Path], image_mpp: float | None) -> list[Tally]:
    """One tally a folder; each image goes the way it goes in the service, with its scale known or not."""
    classifier = open_classifier(artifact, device="cpu")
    return [tally_folder(classifier, folder, image_mpp) for folder in folders]


def tally_folder(classifier: Classifier, folder: Path, image_mpp: float | None) -> Tally:
    m, reference = classifier.manifest, classifier.reference
    verdicts: Counter[Verdict] = Counter()
    reasons: Counter[str] = Counter()
    refused = 0
    for path in images_below(folder):
        try:
            tile = to_tile(decode(path.read_bytes()), m.tile_px, m.tile_mpp, image_mpp).pixels
        except (ImageRefused, OSError):
            refused += 1
            continue
        answer = classifier.predict(tile[None])
        doubts, verdict = judge(
            measure_quality(tile, reference.palette if reference else None),
            float(reference.cloud.distance(answer.features)[0]) if reference else None,
            float(answer.probabilities.max()),
            m.gate,
        )
        verdicts[verdict] += 1
        reasons.update(doubt.code for doubt in doubts)
    if not verdicts:
        raise NoClasses(f"{folder} holds no image that can be read; give a folder of images")
    return Tally(folder, verdicts.total(), verdicts, reasons, refused)
