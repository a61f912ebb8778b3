"""Tiles cut out of fields, at the tiles' own magnification, with the labels of what lies in them."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.augment import mean_density
from training.config import BadConfig, Pretrain, Rule
from training.fields import NO_LABEL, Collection, Field, Pixels

MOST_LOOKED_AT = 200  # fields of a source: more would hardly change its mean


class Place(NamedTuple):
    left: float
    top: float
    side: float
    turn: int  # which of the eight flips and rotations


class Cut(NamedTuple):
    tile: Pixels  # (S, S, 3)
    label: int
    patches: NDArray[np.float32]  # (G, G, C): nuclei by kind; or gland share and grade
    weak_label: int


class Cutter:
    """Cuts tiles with their labels out of one collection."""

    def __init__(self, collection: Collection, config: Pretrain) -> None:
        self.collection = collection
        self.tile_px = config.model.tile_px
        self.tile_mpp = config.tile_mpp
        self.grid = config.model.grid
        self.classes = config.classes
        self.rules = [rule for rule in config.rules if rule.kind == collection.source.kind]
        for rule in self.rules:
            refuse_unknown_names(rule, collection, config.classes)

    def side_px(self, field: Field) -> float:
        source = self.collection.source
        if source.mpp is None:
            return float(min(field.pixels.shape[:2]))
        return self.tile_px * self.tile_mpp / source.mpp

    def cut(self, field: Field, rng: Generator) -> Cut:
        return self.cut_at(field, *self.choose_place(field, rng))

    def choose_place(self, field: Field, rng: Generator) -> Place:
        """A square anywhere, a little nearer or farther, flipped and turned."""
        height, width = field.pixels.shape[:2]
        side = min(self.side_px(field) * rng.uniform(*self.collection.source.zoom), height, width)
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        return Place(left, top, side, turn=int(rng.integers(8)))

    def cut_at(self, field: Field, left: float, top: float, side: float, turn: int = 0) -> Cut:
        box = (left, top, left + side, top + side)
        tile = np.asarray(Image.fromarray(field.pixels).resize((self.tile_px,) * 2, Image.Resampling.BICUBIC, box))
        patches = self.label_patches(field, left, top, side)
        return Cut(symmetry(tile, turn), field.label, symmetry(patches, turn), self.label_by_rule(field, patches))

    def label_patches(self, field: Field, left: float, top: float, side: float) -> NDArray[np.float32]:
        if field.points is not None:
            patches = np.zeros((self.grid, self.grid, len(self.collection.names)), np.float32)
            column, row = np.floor((field.points[:, :2] - (left, top)) / side * self.grid).astype(int).T
            inside = (column >= 0) & (row >= 0) & (column < self.grid) & (row < self.grid)
            np.add.at(patches, (row[inside], column[inside], field.points[inside, 2].astype(int)), 1)
            return patches
        if field.mask is not None:
            box = (left, top, left + side, top + side)
            share = np.asarray(field.mask.resize((self.grid,) * 2, Image.Resampling.BOX, box), np.float32) / 255
            return np.stack([share, np.full_like(share, field.grade)], axis=2)
        return np.zeros((self.grid, self.grid, 0), np.float32)

    def label_by_rule(self, field: Field, patches: NDArray[np.float32]) -> int:
        if not self.rules:
            return NO_LABEL
        if field.mask is not None:
            amounts = dict.fromkeys(self.collection.names, 0.0)
            amounts[self.collection.names[field.grade]] = float(patches[..., 0].mean())
        else:
            amounts = dict(zip(self.collection.names, patches.sum(axis=(0, 1)).tolist(), strict=True))
        return next((self.classes.index(rule.label) for rule in self.rules if obeys(amounts, rule)), NO_LABEL)


def refuse_unknown_names(rule: Rule, collection: Collection, classes: list[str]) -> None:
    """They would end the training when the first cut asks for them."""
    if rule.label not in classes:
        raise BadConfig(
            f"a rule gives the label '{rule.label}', which is none of the classes {classes}: add it, or mend it"
        )
    if unknown := sorted({*rule.at_least, *rule.share, *rule.absent} - set(collection.names)):
        raise BadConfig(
            f"the rule for '{rule.label}' asks for {', '.join(map(repr, unknown))}, but what is marked in "
            f"'{collection.source.folder}' is {', '.join(map(repr, collection.names))}: mend the rule or the table"
        )


def obeys(amounts: dict[str, float], rule: Rule) -> bool:
    total = sum(amounts.values())
    return (
        all(amounts[name] >= least for name, least in rule.at_least.items())
        and all(amounts[name] > least * total for name, least in rule.share.items())
        and not any(amounts[name] for name in rule.absent)
    )


def symmetry(array: NDArray[Any], turn: int) -> NDArray[Any]:
    """One of the eight flips and rotations of the first two axes."""
    array = np.rot90(array, turn % 4)
    return np.ascontiguousarray(array[::-1] if turn >= 4 else array)


def mean_look(cutter: Cutter) -> Tensor:
    """The mean optical density of a source's tissue (3,), from a part of its fields."""
    fields = cutter.collection.fields
    fields = fields[:: math.ceil(len(fields) / MOST_LOOKED_AT)]
    cuts = [cutter.cut(field, np.random.default_rng(0)) for field in fields]
    return mean_density(torch.from_numpy(np.stack([cut.tile for cut in cuts])))
