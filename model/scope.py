"""Whether a tile, and what the network read in it, is of the kind that the training held.

`Reference` is what the training remembers of its tiles: their colours, and where their features lie. The limits are the
artefact's gate; nothing in here was chosen by hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from model.artifact import CorruptArtifact, Gate, Verdict
from model.quality import PALETTE_SIZE, Palette, Quality

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cloud:
    """Where the features of the training's tiles lie."""

    centre: Floats  # (D,) their mean
    whitening: Floats  # (D, D) makes their shrunk covariance the identity and, scaled, their mean squared distance 1

    def distance(self, features: Floats) -> Floats:
        """Of features (N, D) from the centre: Mahalanobis, in multiples of what is usual for a training tile (N,)."""
        away = (features - self.centre) @ self.whitening
        distances: Floats = np.sqrt((away * away).mean(axis=1))
        return distances


@dataclass(frozen=True)
class Reference:
    palette: Palette
    cloud: Cloud


@dataclass(frozen=True)
class Doubt:
    code: str
    text: str


def write_reference(reference: Reference, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, palette=reference.palette, **vars(reference.cloud))


def read_reference(path: Path, feature_width: int) -> Reference:
    try:
        with path.open("rb") as file, np.load(file) as kept:  # given a path, it leaves a damaged file open
            palette, centre, whitening = (kept[name] for name in ("palette", "centre", "whitening"))
        if not all(np.isfinite(array).all() for array in (palette, centre, whitening)):
            raise ValueError("not all in it are numbers")
        reference = Reference(palette, Cloud(centre, whitening))
    except (ValueError, TypeError, KeyError, OSError, EOFError, BadZipFile) as error:
        raise CorruptArtifact(f"{path} is no reference that `tissue-train export` wrote: {error}") from error
    expected = ((PALETTE_SIZE,), (feature_width,), (feature_width, feature_width))
    found = (reference.palette.shape, reference.cloud.centre.shape, reference.cloud.whitening.shape)
    if found != expected:
        raise CorruptArtifact(f"{path} has arrays of shapes {found}, the manifest means {expected}")
    return reference


def judge(quality: Quality, distance: float | None, confidence: float, gate: Gate) -> tuple[list[Doubt], Verdict]:
    """What doesn't look like stained tissue gets no label to rely on; a doubtful tile may still be labelled rightly.

    Distance only makes doubtful: tissue of other laboratories is often far from the training's.
    Every limit is written so that NaN breaks it.
    """
    foreign = list(find_foreign(quality, gate))
    doubtful = list(find_doubtful(quality, distance, confidence, gate))
    return foreign + doubtful, "out_of_scope" if foreign else "uncertain" if doubtful else "ok"


def find_foreign(quality: Quality, gate: Gate) -> Iterator[Doubt]:
    if not quality.tissue_share >= gate.min_tissue_share:
        yield Doubt(
            "little_tissue",
            f"Only {quality.tissue_share:.0%} of the tile is tissue, at least {gate.min_tissue_share:.0%} is needed.",
        )
    if is_above(quality.odd_share, gate.max_odd_share):
        yield Doubt(
            "foreign_stain",
            f"{quality.odd_share:.0%} of what is coloured absorbs red or blue more than green, which haematoxylin and "
            "eosin hardly do: the ink of a pen, another stain, or no tissue.",
        )
    if is_above(quality.blue_absorption, gate.max_blue_absorption):
        yield Doubt(
            "unusual_hue",
            f"Blue light is absorbed {quality.blue_absorption:.2f} times as much as green, at most "
            f"{gate.max_blue_absorption:.2f} is usual for haematoxylin and eosin: it is grey, brown or yellow.",
        )
    if is_above(quality.foreign_share, gate.max_foreign_share):
        yield Doubt(
            "unusual_colours",
            f"{quality.foreign_share:.0%} of the tile has colours that the training's tiles do not have, even with "
            f"other strengths of stain; at most {gate.max_foreign_share:.1%} is usual.",
        )


def find_doubtful(quality: Quality, distance: float | None, confidence: float, gate: Gate) -> Iterator[Doubt]:
    if is_above(distance, gate.max_distance):
        yield Doubt(
            "unlike_training",
            f"What the network read is unlike all it was trained on: its distance is {distance:.2f}, at most "
            f"{gate.max_distance:.2f} is usual.",
        )
    if not confidence >= gate.min_confidence:
        yield Doubt(
            "low_confidence",
            f"The most likely class has only {confidence:.0%}, at least {gate.min_confidence:.0%} is usual.",
        )
    if not quality.sharpness >= gate.min_sharpness:
        yield Doubt(
            "blurred",
            f"The tile is blurred: its sharpness is {quality.sharpness:.0f}, "
            f"at least {gate.min_sharpness:.0f} is usual.",
        )
    if gate.min_brightness is not None and not quality.brightness >= gate.min_brightness:
        yield Doubt(
            "too_dark",
            f"The tissue is too dark: its mean level is {quality.brightness:.0f} of 255, "
            f"at least {gate.min_brightness:.0f} is usual.",
        )
    if is_above(quality.brightness, gate.max_brightness):
        yield Doubt(
            "too_bright",
            f"The tissue is too bright: its mean level is {quality.brightness:.0f} of 255, "
            f"at most {gate.max_brightness:.0f} is usual.",
        )


def is_above(value: float | None, limit: float | None) -> bool:
    """A value that wasn't measured, or has no limit, isn't above it; NaN is."""
    return value is not None and limit is not None and not value <= limit
