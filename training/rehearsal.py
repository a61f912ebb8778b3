"""Cuts labelled by rule, to be learnt among the labelled tiles: they are of other stains, and there are many.

A pretraining's config goes in, with its fields and rules; tiles with labels leave, of each source up to `per_class` of
each class that its rules name.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.config import BadConfig, Pretrain, Rehearse, read_config
from training.cuts import Cutter, mean_look
from training.fields import NO_LABEL, Field, read_source

TRIES_PER_CUT = 20  # a rule that almost nothing obeys ends with fewer cuts


@dataclass(frozen=True)
class Rehearsal:
    tiles: Tensor  # (M, S, S, 3) uint8
    targets: Tensor  # (M,)
    looks: Tensor  # (M, 3) mean density of the source each is from

    def draw(self, n: int) -> Tensor:
        """Indices of n cuts, every class as often as any other."""
        counts = torch.bincount(self.targets)
        return torch.multinomial(1 / counts[self.targets], n, replacement=True)


@cache
def read_rehearsal(how: Rehearse, classes: tuple[str, ...], tile_px: int) -> Rehearsal:
    """From the fields that the pretraining learns from."""
    config = read_config(Path(how.pretraining), [], Pretrain)
    unknown = {rule.label for rule in config.rules} - set(classes)
    if unknown or not config.rules:
        raise BadConfig(f"{how.pretraining} has rules for {sorted(unknown) or 'nothing'}; the classes are {classes}")
    if config.model.tile_px != tile_px:
        raise BadConfig(f"{how.pretraining} cuts tiles of {config.model.tile_px} px, the network takes {tile_px}")
    rng = np.random.default_rng(0)
    tiles, targets, looks = [], [], []
    sources = [source for source in config.sources if any(rule.kind == source.kind for rule in config.rules)]
    for source in sources:
        collection = read_source(source)
        cutter = Cutter(collection, config)
        look = mean_look(cutter)
        # Of this source: a class that rules find in two sources gets up to twice as many.
        room = {classes.index(rule.label): how.per_class for rule in cutter.rules}
        for field in draw_fields(collection.fields, how.per_class * len(room), rng):
            # Drawn even where nothing more is cut, so that the next source's draws stay the same.
            place = cutter.choose_place(field, rng)
            if not any(room.values()):
                continue
            cut = cutter.cut_at(field, *place)
            target = NO_LABEL if cut.weak_label == NO_LABEL else classes.index(config.classes[cut.weak_label])
            if room.get(target, 0):
                room[target] -= 1
                tiles.append(cut.tile)
                targets.append(target)
                looks.append(look)
    if not tiles:
        raise BadConfig(f"no cut of the fields of {how.pretraining} obeys any of its rules")
    return Rehearsal(torch.from_numpy(np.stack(tiles)), torch.tensor(targets), torch.stack(looks))


def draw_fields(fields: list[Field], n: int, rng: np.random.Generator) -> list[Field]:
    return [fields[i] for i in rng.integers(len(fields), size=n * TRIES_PER_CUT)] if fields else []
