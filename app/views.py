"""The eight views of a tile, and the mean of what the model gives for each.

tile --look_from--> view --model--> map of the view --look_back--> map of the tile
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.session import Explanations

Floats = NDArray[np.float32]

VIEWS = 8  # rotations and reflections of a square


def look_from(tile: NDArray[Any], view: int) -> NDArray[Any]:
    """View 0 is the tile itself; 1 to 3 are turned, 4 to 7 mirrored as well."""
    turned = np.rot90(tile, view % 4, axes=(0, 1))
    return np.ascontiguousarray(turned if view < 4 else turned[:, ::-1])


def look_back(grid: Floats, view: int) -> Floats:
    unmirrored = grid if view < 4 else grid[..., ::-1]
    return np.rot90(unmirrored, -(view % 4), axes=(-2, -1))


def merge_views(views: list[Explanations]) -> Explanations:
    """Maps of all views, turned back onto the tile and averaged, as are the numbers."""
    if len(views) == 1:
        return views[0]
    grids = ("attention", "rollout", "evidence")
    turned = [
        {name: look_back(value, view) if name in grids else value for name, value in vars(explanations).items()}
        for view, explanations in enumerate(views)
    ]
    return Explanations(**{name: np.mean([one[name] for one in turned], axis=0) for name in turned[0]})
