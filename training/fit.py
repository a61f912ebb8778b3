"""Labelled tiles to a trained network: once for an artefact, or many times in folds to learn how good it is.

tissue-train fit configs/smoke.toml
tissue-train cv configs/tissue.toml
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from model.graph import to_images
from model.vit import ViT
from training import checkpoint, synthetic
from training.augment import augment, blend, keep_some_patches
from training.config import Fit
from training.data import (
    Fold,
    Record,
    course_split,
    find_lookalikes,
    group_pairs,
    load_tiles,
    number_labels,
    random_folds,
    scan,
    slide_folds,
)
from training.train import batch_indices, best_device, optimise

log = logging.getLogger(__name__)

Tiles = NDArray[np.uint8]
Targets = NDArray[np.intp]
Logits = NDArray[np.float32]
Grouping = Literal["random", "slide"]


@dataclass(frozen=True)
class TileSet:
    tiles: Tiles  # (N, S, S, 3)
    targets: Targets  # (N,)
    records: list[Record]
    classes: list[str]

    def subset(self, indices: NDArray[np.intp]) -> "TileSet":
        records = [self.records[i] for i in indices]
        return TileSet(self.tiles[indices], self.targets[indices], records, self.classes)


def read_tiles(config: Fit) -> TileSet:
    data = config.data
    if data.generate and not data.folder.exists():
        synthetic.write_tree(data.folder, data.generate, config.optimisation.seed)
    found = scan(data.folder, data.table, data.classes)
    for path, reason in found.unreadable:
        log.warning("skipped %s: %s", path, reason)
    tiles = load_tiles(found.records, config.model.tile_px, data.tile_mpp, data.image_mpp)
    return TileSet(tiles, number_labels(found.records, found.classes), found.records, found.classes)


def fit(config: Fit, folder: Path) -> ViT:
    train, held_out = split(read_tiles(config), config)
    return fit_tiles(config, train, folder, held_out)


def split(tiles: TileSet, config: Fit) -> tuple[TileSet, TileSet | None]:
    seed = config.optimisation.seed
    if config.split == "all":
        return tiles, None
    if config.split == "course":
        parts = course_split(tiles.records, seed)
        return tiles.subset(parts.train), tiles.subset(parts.validation)
    fold = random_folds(tiles.targets, 5, seed, together(tiles))[0]
    return tiles.subset(fold.train), tiles.subset(fold.held_out)


def together(tiles: TileSet) -> NDArray[np.intp]:
    """Tiles that show one field get one number, and are never learnt and held out at once."""
    return group_pairs(len(tiles.targets), find_lookalikes(tiles.tiles))


def fit_tiles(config: Fit, train: TileSet, folder: Path, held_out: TileSet | None, title: str = "") -> ViT:
    """Trains one network in `folder`, or goes on with the one that was being trained there."""
    device = best_device()
    how = config.optimisation
    torch.manual_seed(how.seed)
    vit = ViT(config.model, len(train.classes))
    if config.init:
        missing, unused = checkpoint.initialise(vit, config.init)
        log.info("started from %s; new: %s; not used: %s", config.init, missing or "nothing", unused or "nothing")
    vit = vit.to(device)
    tiles = torch.from_numpy(train.tiles).to(device)
    targets = F.one_hot(torch.from_numpy(train.targets), len(train.classes)).float().to(device)

    def loss_of(net: nn.Module, step: int) -> torch.Tensor:
        chosen = batch_indices(len(tiles), how.batch, how.seed, step).to(device)
        images, wanted = blend(augment(tiles[chosen], config.augment), targets[chosen], config.augment)
        kept = keep_some_patches(len(images), config.model.grid**2, how.token_drop, device) if how.token_drop else None
        return F.cross_entropy(net(images, kept=kept).logits.float(), wanted, label_smoothing=how.label_smoothing)

    def accuracy(net: nn.Module) -> float:
        assert isinstance(net, ViT) and held_out is not None
        return float((predict(net, held_out.tiles).argmax(1) == held_out.targets).mean())

    average = optimise(vit, loss_of, how, folder, accuracy if held_out else None, title or config.name)
    assert isinstance(average, ViT)
    return average


@torch.no_grad()
def predict(vit: ViT, tiles: Tiles, batch: int = 64) -> Logits:
    vit.eval()
    device = next(vit.parameters()).device
    parts = [torch.from_numpy(tiles[i : i + batch]).to(device) for i in range(0, len(tiles), batch)]
    return np.concatenate([vit(to_images(part)).logits.float().cpu().numpy() for part in parts])


# -- folds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfFold:
    """Every tile answered by networks that never saw it: R times each, NaN where a tile has no slide to leave out."""

    grouping: Grouping
    tiles: TileSet
    logits: Logits  # (R, N, K)
    folds: NDArray[np.intp]  # (R, N) the fold in which it was held out, -1 for none


def cross_validate(
    config: Fit, tiles: TileSet, folder: Path, grouping: Grouping, tell: Callable[[str], None]
) -> OutOfFold:
    """Each finished fold is kept, so that a run that was killed goes on with the next one."""
    repeats = config.repeats if grouping == "random" else 1
    n = len(tiles.targets)
    logits = np.full((repeats, n, len(tiles.classes)), np.nan, np.float32)
    folds = np.full((repeats, n), -1)
    for repeat in range(repeats):
        for number, fold in enumerate(make_folds(tiles, config, grouping, repeat)):
            place = folder / f"{grouping}-{repeat}-{number}"
            logits[repeat, fold.held_out] = fold_logits(config, tiles, fold, place, repeat)
            folds[repeat, fold.held_out] = number
            right = (logits[repeat, fold.held_out].argmax(1) == tiles.targets[fold.held_out]).mean()
            tell(f"{place.name}, {fold.name}: {right:.3f} of {len(fold.held_out)}")
    return OutOfFold(grouping, tiles, logits, folds)


def make_folds(tiles: TileSet, config: Fit, grouping: Grouping, repeat: int) -> list[Fold]:
    if grouping == "slide":
        return slide_folds(tiles.records)
    return random_folds(tiles.targets, config.folds, repeat, together(tiles))


def fold_logits(config: Fit, tiles: TileSet, fold: Fold, place: Path, repeat: int) -> Logits:
    finished = place / "logits.npy"
    if finished.exists():
        known: Logits = np.load(finished)
        return known
    seeded = config.optimisation.model_copy(update={"seed": config.optimisation.seed + repeat})
    config = config.model_copy(update={"optimisation": seeded})
    vit = fit_tiles(config, tiles.subset(fold.train), place, None, title=place.name)
    answer = predict(vit, tiles.tiles[fold.held_out])
    checkpoint.write_atomically(finished, lambda file: np.save(file, answer))
    (place / "latest.pt").unlink()  # a network per fold is of no further use
    return answer
