"""Which method answers a request for a map, and which numbers over the patch grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.schemas import AttentionOptions
from model.artifact import Manifest, MapMethod
from model.occlusion import Floats, fall_of_logits
from model.session import Explanations, Predictions

# Options that one method alone has; given without a method they name theirs.
OWNERS: dict[str, MapMethod] = {"layer": "attention", "head": "attention", "layout": "attention", "masks": "occlusion"}


class TargetUnknown(ValueError):
    pass


class LayerOutOfRange(ValueError):
    pass


class MethodUnavailable(ValueError):
    pass


class UnsuitableOptions(ValueError):
    pass


@dataclass(frozen=True)
class Drawable:
    """A map and what must be said with it."""

    method: MapMethod
    quantity: str
    class_specific: bool
    signed: bool
    grid: Floats  # (G, G), or (L, H, G, G) for all layers and heads
    target: str | None = None
    layer: int | None = None
    head: int | Literal["mean"] | None = None
    uniform_level: float | None = None
    logit_share: float = 1.0  # of the answer's score, how much passes through what the map shows


def choose_method(options: AttentionOptions, default: MapMethod) -> MapMethod:
    """The method that the options mean. One that it would overlook is refused: its map would be taken for another.

    An option at its default counts as not given, since the form of the API docs sends all of them.
    """
    given = [name for name in OWNERS if getattr(options, name) != AttentionOptions.model_fields[name].default]
    owners = {OWNERS[name] for name in given}
    if options.method and owners - {options.method}:
        foreign = next(name for name in given if OWNERS[name] != options.method)
        raise UnsuitableOptions(f"{options.method} has no {foreign}, {OWNERS[foreign]} has; leave one of them out")
    if len(owners) > 1:
        raise UnsuitableOptions(f"no method has {' and '.join(given)}; ask for one map at a time")
    if options.layout == "heads" and len(given) > 1:
        raise UnsuitableOptions("layout=heads shows all layers and heads; leave out layer and head")
    if options.method or owners:
        return options.method or owners.pop()
    # Attention and rollout are of no class, and occlusion isn't merged over views: a default gives way to evidence.
    of_no_class = options.target is not None and default in ("attention", "rollout")
    return "evidence" if of_no_class or (options.tta and default == "occlusion") else default


def check_options(options: AttentionOptions, manifest: Manifest) -> None:
    """Whether the model has the map that they ask for, by a method that is chosen."""
    assert options.method is not None
    check_method(options.method, manifest.maps.methods, manifest.architecture.kind)
    if options.target is not None:
        find_class(manifest.class_names, options.target)
    if options.layer is not None:
        check_range("layer", options.layer, manifest.layers)
    if options.head != "mean":
        check_range("head", options.head, manifest.heads)
    if options.method == "occlusion" and options.tta:
        raise UnsuitableOptions("occlusion asks the model once a mask already; leave out tta, or take another method")
    if options.method == "occlusion" and options.masks > manifest.grid**2:
        raise UnsuitableOptions(f"{options.masks} masks are more than the {manifest.grid**2} patches of this model")


def check_method(method: MapMethod, methods: Sequence[MapMethod], architecture: str) -> None:
    if method not in methods:
        raise MethodUnavailable(
            f"this model ({architecture}) has no {method}: it works without tokens that attend to each other; "
            f"the methods it has are {', '.join(methods)}"
        )


def check_range(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        known = f"{count}, numbered from 0 to {count - 1}" if count else "none"
        raise LayerOutOfRange(f"{name} {index} is out of range: this model has {known}")


def find_class(names: list[str], target: str) -> int:
    if target not in names:
        raise TargetUnknown(f"there is no class {target[:60]!r}; the classes are {', '.join(names)}")
    return names.index(target)


def read_attention(
    explanations: Explanations, layer: int | None, head: int | Literal["mean"], logit_share: float
) -> Drawable:
    attention = explanations.attention[0]  # (L, H, G, G)
    layer = attention.shape[0] - 1 if layer is None else layer
    grid = attention[layer].mean(axis=0) if head == "mean" else attention[layer, head]
    shown = {"layer": layer, "head": head, "uniform_level": 1 / grid.size, "logit_share": logit_share}
    return Drawable("attention", "share of attention", False, False, grid, **shown)


def read_heads(explanations: Explanations, logit_share: float) -> Drawable:
    grids = explanations.attention[0]
    return Drawable("attention", "share of attention", False, False, grids, logit_share=logit_share)


def read_rollout(explanations: Explanations, logit_share: float) -> Drawable:
    grid = explanations.rollout[0]
    spread_evenly = float(grid.mean())  # the residual paths leave a part of it on the class token
    quantity = "share of attention through all layers"
    return Drawable("rollout", quantity, False, False, grid, uniform_level=spread_evenly, logit_share=logit_share)


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
