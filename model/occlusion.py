"""Occlusion: what the answer loses with each group of patches. One definition, for serving maps and for judging them.

Letters: K classes, G patches along a side, M groups of patches.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

COARSE_GROUPS = 25  # where nobody asks for finer ones; on a grid of 10 x 10 each has 2 x 2 patches


def cut_groups(grid: int, count: int) -> NDArray[np.int64]:
    """Numbers the patches (G, G) by the square group each belongs to; `count` groups in all."""
    side = round(count**0.5)
    band = np.arange(grid) * side // grid
    groups: NDArray[np.int64] = band[:, None] * side + band[None, :]
    return groups


def mask_groups(groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each group a row that keeps all patches but those of the group: (M, G*G)."""
    keeps: NDArray[np.bool_] = groups.reshape(1, -1) != np.arange(groups.max() + 1)[:, None]
    return keeps


def fall_of_logits(whole: Floats, left: Floats, groups: NDArray[np.int64]) -> Floats:
    """How far each class's logit (K,) falls when a group of patches is taken away (M, K): (K, G, G)."""
    fall: Floats = np.moveaxis((whole - left)[groups], 2, 0).astype(np.float32)
    return fall
