"""What simple baselines reach without any network: the floors that stand beside every model.

Tiles enter as pixels, uint8 (N, S, S, 3); class probabilities leave, so that floors and models are scored alike.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from training.calibrate import softmax
from training.metrics import Floats, Ints

Tiles = NDArray[np.uint8]
Features = NDArray[np.float64]
Probabilities = NDArray[np.float64]

COLOUR_BINS = 16  # per channel
RADII_PX = (1, 2, 4)  # from chromatin to the edge of a nucleus, at half a micrometre per pixel
NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # once around: down, right
LUMINANCE = np.array([299, 587, 114])  # thousandths, ITU-R BT.601; integers, so that equal pixels stay equal


class FloorFeatures(NamedTuple):
    """All that floors see of tiles, so that it is computed once for many folds."""

    colour: Features  # (N, 3)
    histogram: Features  # (N, 48)
    both: Features  # (N, 78) histogram and patterns

    def subset(self, rows: Ints) -> "FloorFeatures":
        return FloorFeatures(*(features[rows] for features in self))


def floor_predictions(
    known: FloorFeatures, targets: Ints, unseen: FloorFeatures, n_classes: int
) -> dict[str, Probabilities]:
    """Probabilities (N, K) of each floor. Those of the vector machines rank the classes and are not calibrated."""
    return {
        "mean colour, nearest mean": nearest_mean(known.colour, targets, unseen.colour, n_classes),
        "colour histogram, SVM": vector_machine(known.histogram, targets, unseen.histogram, n_classes),
        "histogram and patterns, SVM": vector_machine(known.both, targets, unseen.both, n_classes),
    }


# -- features ------------------------------------------------------------------------------------------------------


def floor_features(tiles: Tiles) -> FloorFeatures:
    histogram = colour_histogram_features(tiles)
    both = np.concatenate([histogram, pattern_features(tiles)], axis=1)
    return FloorFeatures(mean_colour_features(tiles), histogram, both)


def mean_colour_features(tiles: Tiles) -> Features:
    return np.array([tile.mean(axis=(0, 1)) for tile in tiles])  # (N, 3)


def colour_histogram_features(tiles: Tiles) -> Features:
    return np.array([np.concatenate([histogram(tile[..., c]) for c in range(3)]) for tile in tiles])  # (N, 48)


def histogram(channel: NDArray[np.uint8]) -> Features:
    shares: Features = np.bincount(channel.ravel() // (256 // COLOUR_BINS), minlength=COLOUR_BINS) / channel.size
    return shares


def pattern_features(tiles: Tiles) -> Features:
    """Local binary patterns on grey (Ojala et al. 2002): which of a pixel's eight neighbours are not darker than it."""
    return np.array(
        [np.concatenate([patterns(tile @ LUMINANCE, radius_px) for radius_px in RADII_PX]) for tile in tiles]
    )


def patterns(grey: NDArray[np.intp], radius_px: int) -> Features:
    height, width = (side - 2 * radius_px for side in grey.shape)
    centre = grey[radius_px:-radius_px, radius_px:-radius_px]
    code = np.zeros((height, width), dtype=np.intp)
    for bit, (down, right) in enumerate(NEIGHBOURS):
        top, left = radius_px * (1 + down), radius_px * (1 + right)
        code |= (grey[top : top + height, left : left + width] >= centre).astype(np.intp) << bit
    counts = np.bincount(KIND_OF_CODE[code.ravel()], minlength=N_KINDS)
    shares: Features = counts / code.size
    return shares


def kind_of(code: int) -> int:
    """How many neighbours, where they follow each other (tissue has no upright: where they start says nothing)."""
    around = [code >> bit & 1 for bit in range(8)]
    changes = sum(a != b for a, b in pairwise([*around, around[0]]))
    return sum(around) if changes <= 2 else 9  # all that are scattered are one kind


KIND_OF_CODE = np.array([kind_of(code) for code in range(256)])
N_KINDS = 10


# -- baselines -----------------------------------------------------------------------------------------------------


def nearest_mean(features: Features, targets: Ints, test_features: Features, n_classes: int) -> Probabilities:
    """The class whose mean is nearest, as a Gaussian of the same round spread for each class sees it."""
    present = np.unique(targets)
    means = np.array([features[targets == c].mean(axis=0) for c in present])
    spread = ((features - means[np.searchsorted(present, targets)]) ** 2).mean() + 1e-9  # 1e-9: all tiles alike
    distance = ((test_features[:, None] - means) ** 2).sum(axis=2)  # (N, present)
    return to_all_classes(softmax(-distance / (2 * spread)), present, n_classes)


def vector_machine(features: Features, targets: Ints, test_features: Features, n_classes: int) -> Probabilities:
    present = np.unique(targets)
    if len(present) == 1:  # where a slide that is left out has all of the others; a machine needs two
        return to_all_classes(np.ones((len(test_features), 1)), present, n_classes)
    machine = make_pipeline(StandardScaler(), SVC(C=10))  # softer margins lose up to seven points on some hundred tiles
    machine.fit(features, targets)
    decision = machine.decision_function(test_features)
    if decision.ndim == 1:  # of two classes it gives the second's alone
        decision = np.stack([-decision, decision], axis=1)
    return to_all_classes(softmax(decision), machine.classes_, n_classes)


def to_all_classes(probabilities: Floats, present: Ints, n_classes: int) -> Probabilities:
    """Classes without examples in the training get 0."""
    spread = np.zeros((len(probabilities), n_classes))
    spread[:, present] = probabilities
    return spread
