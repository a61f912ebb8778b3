"""Labelled tiles to a trained network: once for an artefact, or many times in folds to learn how good it is.

tissue-train fit configs/smoke.toml
tissue-train cv configs/tissue.toml
"""

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
from training.config import BadConfig, Fit
from training.data import Record, course_split, find_lookalikes, load_tiles, random_folds, scan, slide_folds
from training.train import batch_indices, best_device, optimise

Tiles = NDArray[np.uint8]
Targets = NDArray[np.int64]
Logits = NDArray[np.float32]
Grouping = Literal["random", "slide"]


@dataclass(frozen=True)
class TileSet:
    tiles: Tiles  # (N, S, S, 3)
    targets: Targets  # (N,)
    records: list[Record]
    classes: list[str]

    def subset(self, indices: NDArray[np.int64]) -> "TileSet":
        records = [self.records[i] for i in indices]
        return TileSet(self.tiles[indices], self.targets[indices], records, self.classes)


@dataclass(frozen=True)
class Fitted:
    vit: ViT
    classes: list[str]
    held_out: TileSet | None  # what it never saw
    logits: Logits | None  # its answers on that


def read_tiles(config: Fit) -> TileSet:
    data = config.data
    if data.generate and not data.folder.exists():
        synthetic.write_tree(data.folder, data.generate, config.optimisation.seed)
    found = scan(data.folder, data.table)
    classes = data.classes or found.classes
    unknown = sorted(set(classes) - set(found.classes))
    if unknown:
        raise BadConfig(f"data.classes names {unknown}, but {data.folder} only has {found.classes}")
    records = [record for record in found.records if record.label in classes]
    tiles = load_tiles(records, config.model.tile_px, data.tile_mpp, data.image_mpp)
    return TileSet(tiles, np.array([classes.index(record.label) for record in records]), records, classes)


def fit(config: Fit, folder: Path) -> Fitted:
    everything = read_tiles(config)
    train, held_out = split(everything, config)
    vit = fit_tiles(config, train, folder, held_out)
    return Fitted(vit, everything.classes, held_out, None if held_out is None else predict(vit, held_out.tiles))


def split(tiles: TileSet, config: Fit) -> tuple[TileSet, TileSet | None]:
    seed = config.optimisation.seed
    if config.split == "all":
        return tiles, None
    if config.split == "course":
        parts = course_split(tiles.records, seed)
        return tiles.subset(parts.train), tiles.subset(parts.validation)
    held_out = random_folds(tiles.targets, 5, seed, find_lookalikes(tiles.tiles))[0]
    return tiles.subset(np.setdiff1d(np.arange(len(tiles.targets)), held_out)), tiles.subset(held_out)


def fit_tiles(config: Fit, train: TileSet, folder: Path, held_out: TileSet | None, title: str = "") -> ViT:
    """Trains one network in `folder`, or goes on with the one that was being trained there."""
    device = best_device()
    how = config.optimisation
    torch.manual_seed(how.seed)
    vit = ViT(config.model, len(train.classes))
    if config.init:
        checkpoint.initialise(vit, config.init)
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
    folds: NDArray[np.int64]  # (R, N) the fold in which it was held out, -1 for none


def cross_validate(
    config: Fit, folder: Path, grouping: Grouping, on_fold: Callable[[str], None] = lambda line: None
) -> OutOfFold:
    """Each finished fold is kept, so that a run that was killed goes on with the next one."""
    tiles = read_tiles(config)
    repeats = config.repeats if grouping == "random" else 1
    n = len(tiles.targets)
    logits = np.full((repeats, n, len(tiles.classes)), np.nan, np.float32)
    folds = np.full((repeats, n), -1)
    for repeat in range(repeats):
        for number, held_out in enumerate(make_folds(tiles, config, grouping, repeat)):
            place = folder / f"{grouping}-{repeat}-{number}"
            logits[repeat, held_out] = fold_logits(config, tiles, held_out, place, repeat)
            folds[repeat, held_out] = number
            right = (logits[repeat, held_out].argmax(1) == tiles.targets[held_out]).mean()
            on_fold(f"{place.name}: {right:.3f} of {len(held_out)}")
    return OutOfFold(grouping, tiles, logits, folds)


def make_folds(tiles: TileSet, config: Fit, grouping: Grouping, repeat: int) -> list[NDArray[np.int64]]:
    if grouping == "slide":
        return slide_folds(tiles.records)
    return random_folds(tiles.targets, config.folds, repeat, find_lookalikes(tiles.tiles))


def fold_logits(config: Fit, tiles: TileSet, held_out: NDArray[np.int64], place: Path, repeat: int) -> Logits:
    finished = place / "logits.npy"
    if finished.exists():
        known: Logits = np.load(finished)
        return known
    others = np.setdiff1d(np.arange(len(tiles.targets)), held_out)
    seeded = config.optimisation.model_copy(update={"seed": config.optimisation.seed + repeat})
    config = config.model_copy(update={"optimisation": seeded})
    vit = fit_tiles(config, tiles.subset(others), place, None, title=place.name)
    answer = predict(vit, tiles.tiles[held_out])
    checkpoint.write_atomically(finished, lambda file: np.save(file, answer))
    (place / "latest.pt").unlink()  # a network per fold is of no further use
    return answer
