"""Which numbers over the patch grid answer a request for a map, and the eight views of a tile and back.

tile --look_from--> view --model--> map of the view --look_back--> map of the tile
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.maps import Floats, Method, fall_of_logits
from model.session import Explanations, Predictions

VIEWS = 8  # rotations and reflections of a square


class TargetUnknown(ValueError):
    pass


class LayerOutOfRange(ValueError):
    pass


class MethodUnavailable(ValueError):
    pass


@dataclass(frozen=True)
class Drawable:
    """A map and what must be said with it."""

    method: Method
    quantity: str
    class_specific: bool
    signed: bool
    grid: Floats  # (G, G), or (L, H, G, G) for all layers and heads
    target: str | None = None
    layer: int | None = None
    head: int | Literal["mean"] | None = None
    uniform_level: float | None = None


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


def find_class(names: list[str], target: str) -> int:
    if target not in names:
        raise TargetUnknown(f"there is no class {target[:60]!r}; the classes are {', '.join(names)}")
    return names.index(target)


def read_attention(explanations: Explanations, layer: int | None, head: int | Literal["mean"]) -> Drawable:
    attention = explanations.attention[0]  # (L, H, G, G)
    layer = attention.shape[0] - 1 if layer is None else layer
    check_range("layer", layer, attention.shape[0])
    if head != "mean":
        check_range("head", head, attention.shape[1])
    grid = attention[layer].mean(axis=0) if head == "mean" else attention[layer, head]
    return Drawable(
        "attention", "share of attention", False, False, grid, layer=layer, head=head, uniform_level=1 / grid.size
    )


def read_heads(explanations: Explanations) -> Drawable:
    return Drawable("attention", "share of attention", False, False, explanations.attention[0])


def read_rollout(explanations: Explanations) -> Drawable:
    grid = explanations.rollout[0]
    spread_evenly = float(grid.mean())  # the residual paths leave a part of it on the class token
    return Drawable("rollout", "share of attention through all layers", False, False, grid, uniform_level=spread_evenly)


def read_evidence(explanations: Explanations, names: list[str], target: int) -> Drawable:
    grid = explanations.evidence[0, target]
    return Drawable("evidence", "contribution to the logit", True, True, grid, target=names[target])


def read_occlusion(
    whole: Explanations, masked: Sequence[Predictions], groups: NDArray[np.int64], names: list[str], target: int
) -> Drawable:
    """How far the target's logit falls when a group of patches is taken away."""
    left = np.concatenate([answer.logits for answer in masked])  # (M, K)
    grid = fall_of_logits(whole.logits[0], left, groups)[target]
    return Drawable("occlusion", "fall of the logit without the patch", True, True, grid, target=names[target])


def check_method(method: Method, methods: Sequence[Method], architecture: str) -> None:
    if method not in methods:
        raise MethodUnavailable(
            f"this model ({architecture}) has no {method}: it works without tokens that attend to each other; "
            f"the methods it has are {', '.join(methods)}"
        )


def check_range(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        known = f"{count}, numbered from 0 to {count - 1}" if count else "none"
        raise LayerOutOfRange(f"{name} {index} is out of range: this model has {known}")
