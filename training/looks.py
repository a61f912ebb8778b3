"""Groups of images of like stain and look, where no slide names tell which belong together.

Images of one slide share stain, thickness and scanner. Where they are split at random, each held-out image has sisters
in the training, and the figures flatter. Groups by colour are no slides, but few large ones take the sisters away: a
whole look of each class is held out, and the others of that class look otherwise.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler

from training.augment import density_of

LOOKS = 5  # of each class: with 40 of all together, a colour histogram alone still got .97 of coarse colon fields


def group_looks(
    tiles: NDArray[np.uint8], targets: NDArray[np.intp], together: NDArray[np.intp], seed: int
) -> NDArray[np.intp]:
    """A group number for each tile; all of one number in `together` get the group of the first of them."""
    features = StandardScaler().fit_transform(look_features(tiles))
    groups = np.empty(len(tiles), np.intp)
    for target in np.unique(targets):
        own = np.flatnonzero(targets == target)
        looks = KMeans(min(LOOKS, len(own)), n_init=1, random_state=seed).fit_predict(features[own])
        groups[own] = target * LOOKS + looks
    _, first, member = np.unique(together, return_index=True, return_inverse=True)
    return groups[first][member]


def look_features(tiles: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean and spread of the optical density in red, green and blue, and the share of bright glass: (N, 7)."""
    features = np.empty((len(tiles), 7))
    for row, tile in zip(features, tiles, strict=True):
        density = density_of(tile.reshape(-1, 3))  # (S*S, 3)
        row[:3], row[3:6] = density.mean(axis=0), density.std(axis=0)
        row[6] = (tile.min(axis=2) > 220).mean()
    return features
