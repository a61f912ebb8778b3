"""Labelled tiles to a trained network: once for an artefact, or many times in folds to learn how good it is.

tissue-train fit configs/smoke.toml
tissue-train cv configs/default.toml
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from model import vit
from model.graph import fill_removed, find_removal, to_images
from model.network import Network, TokenNetwork, build
from training import checkpoint, synthetic
from training.augment import augment, blend, keep_some_patches, mean_density
from training.config import Fit
from training.data import (
    Fold,
    Record,
    course_split,
    find_near_duplicates,
    group_pairs,
    load_tiles,
    number_labels,
    random_folds,
    read_pairs,
    scan,
    slide_folds,
    tell_skipped,
)
from training.distil import distillation_loss
from training.gate import count_versions, learn_cloud, restained_copies
from training.looks import group_looks
from training.rehearsal import read_rehearsal
from training.train import batch_indices, best_device, optimise, refuse_unfilled

log = logging.getLogger(__name__)

Tiles = NDArray[np.uint8]
Targets = NDArray[np.intp]
Logits = NDArray[np.float32]
Features = NDArray[np.float32]
Distances = NDArray[np.float32]
Grouping = Literal["random", "slide"]


@dataclass(frozen=True)
class TileSet:
    tiles: Tiles  # (N, S, S, 3)
    targets: Targets  # (N,)
    records: list[Record]
    classes: list[str]
    near_duplicates: NDArray[np.intp] | None = None  # (N,) one number for each group, where a table tells them

    def subset(self, indices: NDArray[np.intp]) -> "TileSet":
        records = [self.records[i] for i in indices]
        near = None if self.near_duplicates is None else self.near_duplicates[indices]
        return TileSet(self.tiles[indices], self.targets[indices], records, self.classes, near)

    @property
    def digest(self) -> str:
        """Of what is learnt and held out: images, labels, slides, near duplicates."""
        near = [None] * len(self.records) if self.near_duplicates is None else self.near_duplicates.tolist()
        rows = [[r.sha256, r.label, r.slide, group] for r, group in zip(self.records, near, strict=True)]
        return digest_json([self.classes, rows])


def digest_json(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_tiles(config: Fit) -> TileSet:
    data = config.data
    if data.generate and not data.folder.exists():
        synthetic.write_tree(data.folder, data.generate, config.optimisation.seed)
    found = scan(data.folder, data.table, data.classes)
    tell_skipped(found)
    tiles = load_tiles(found.records, config.model.tile_px, data.tile_mpp, data.image_mpp)
    table = data.near_duplicates
    near = None if table is None else group_pairs(len(tiles), read_pairs(table, found))
    return TileSet(tiles, number_labels(found.records, found.classes), found.records, found.classes, near)


def split(tiles: TileSet, config: Fit) -> tuple[TileSet, TileSet | None]:
    seed = config.optimisation.seed
    if config.split == "all":
        return tiles, None
    if config.split == "course":
        return split_course(tiles, config)[:2]
    groups = together(tiles)
    if config.split == "looks":
        groups = group_looks(tiles.tiles, tiles.targets, groups, seed)
    fold = random_folds(tiles.targets, tiles.classes, 5, seed, groups)[0]
    return tiles.subset(fold.train), tiles.subset(fold.held_out)


def split_course(tiles: TileSet, config: Fit) -> tuple[TileSet, TileSet, TileSet]:
    parts = course_split(tiles.records, config.optimisation.seed, config.course, together(tiles))
    return tiles.subset(parts.train), tiles.subset(parts.validation), tiles.subset(parts.test)


def together(tiles: TileSet) -> NDArray[np.intp]:
    """Tiles that show one field get one number, and are never learnt and held out at once."""
    if tiles.near_duplicates is not None:
        return tiles.near_duplicates
    return group_pairs(len(tiles.targets), find_near_duplicates(tiles.tiles))


def fit_tiles(config: Fit, train: TileSet, folder: Path, held_out: TileSet | None, title: str = "") -> Network:
    """Trains one network in `folder`, or goes on with the one that was being trained there."""
    device = best_device()
    how = config.optimisation
    teacher = train_teacher(config, train, folder / "teacher", title)
    torch.manual_seed(how.seed)
    model = build(config.model, len(train.classes))
    if config.init:
        missing, _ = checkpoint.initialise(model, config.init)
        refuse_unfilled(how.frozen, missing)
    model = model.to(device)
    draw_batch = gather_batches(config, train, device)

    def loss_of(net: nn.Module, step: int) -> torch.Tensor:
        batch = draw_batch(step)
        images, wanted = blend(augment(batch.tiles, config.augment, batch.looks), batch.targets, config.augment)
        seen = see(net, images, how.token_drop)
        logits = seen.logits.float()
        loss = mean_loss(opinions_of(seen), wanted, how.label_smoothing)
        if teacher is None or config.distil is None:
            return loss
        with torch.no_grad():
            taught = teacher(images).logits.float()
        return torch.lerp(loss, distillation_loss(logits, taught, config.distil), config.distil.weight)

    def accuracy(net: nn.Module) -> float:
        assert isinstance(net, Network) and held_out is not None
        return float((predict(net, held_out.tiles).argmax(1) == held_out.targets).mean())

    average = optimise(model, loss_of, how, folder, accuracy if held_out else None, title or config.name)
    assert isinstance(average, Network)
    return average


class Batch(NamedTuple):
    tiles: torch.Tensor  # (N, S, S, 3) uint8
    targets: torch.Tensor  # (N, K) one-hot
    looks: torch.Tensor  # (N, 3) mean density of the collection each is from


def gather_batches(config: Fit, train: TileSet, device: torch.device) -> Callable[[int], Batch]:
    """What step i learns from: labelled tiles, and behind them the cuts that are rehearsed, where any are."""
    how, classes = config.optimisation, len(train.classes)
    tiles = torch.from_numpy(train.tiles).to(device)
    targets = F.one_hot(torch.from_numpy(train.targets), classes).float().to(device)
    own_look = mean_density(tiles)
    if config.rehearse is None:
        rehearsal, n_rehearsed = None, 0
    else:
        rehearsal = read_rehearsal(config.rehearse, tuple(train.classes), config.model.tile_px)
        n_rehearsed = round(config.rehearse.share * how.batch)

    def draw(step: int) -> Batch:
        chosen = batch_indices(len(tiles), how.batch - n_rehearsed, how.seed, step).to(device)
        batch = Batch(tiles[chosen], targets[chosen], own_look.expand(len(chosen), 3))
        if rehearsal is None:
            return batch
        also = rehearsal.draw(n_rehearsed)
        labels = F.one_hot(rehearsal.targets[also], classes).float()
        rehearsed = Batch(rehearsal.tiles[also], labels, rehearsal.looks[also])
        return Batch(*(torch.cat([ours, theirs.to(device)]) for ours, theirs in zip(batch, rehearsed, strict=True)))

    return draw


def see(net: nn.Module, images: torch.Tensor, token_drop: float) -> Any:
    """In training, a network with tokens may have to do with some of them.

    Where `keep` of its artefact takes the pixels away as well, every second image loses them here, too: what is left
    beside a hole has to be known, or maps and answers tell more of the holes than of the tissue.
    """
    if not token_drop:
        return net(images)
    assert isinstance(net, TokenNetwork)
    visible = keep_some_patches(len(images), net.config.grid**2, token_drop, images.device)  # (N, M)
    if find_removal(net.config) == "pixels and token":
        stays = torch.zeros(len(images), net.config.grid**2, dtype=torch.bool, device=images.device)
        stays = stays.scatter(1, visible, value=True) | (torch.rand(len(images), 1, device=images.device) < 0.5)
        images = fill_removed(images, stays)
    return net(images, visible=visible)


def opinions_of(seen: Any) -> tuple[torch.Tensor, ...]:
    """Logits of each head; of most networks there is one."""
    return seen.opinions if isinstance(seen, vit.Output) else (seen.logits,)


def mean_loss(opinions: tuple[torch.Tensor, ...], wanted: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Each head has to be right alone: taught by their mean, the faster would leave nothing to the other."""
    losses = [F.cross_entropy(one.float(), wanted, label_smoothing=label_smoothing) for one in opinions]
    return torch.stack(losses).mean()


def train_teacher(config: Fit, train: TileSet, folder: Path, title: str) -> Network | None:
    """On the very tiles its student will learn from: one that had seen more would tell of what is held out."""
    if config.distil is None:
        return None
    how = config.optimisation.model_copy(update={"token_drop": 0.0, "frozen": []})
    changes = {"model": config.distil.teacher, "distil": None, "init": None, "optimisation": how}
    teacher = fit_tiles(config.model_copy(update=changes), train, folder, None, f"{title or config.name}, teacher")
    return teacher.eval()


def predict(net: Network, tiles: Tiles, batch: int = 64) -> Logits:
    return predict_with_features(net, tiles, batch)[0]


@torch.no_grad()
def predict_with_features(net: Network, tiles: Tiles, batch: int = 64) -> tuple[Logits, Features]:
    """What the network says of each tile, and what it said it from."""
    net.eval()
    device = next(net.parameters()).device
    parts = [torch.from_numpy(tiles[i : i + batch]).to(device) for i in range(0, len(tiles), batch)]
    answers = [net(to_images(part)) for part in parts]
    logits = np.concatenate([answer.logits.float().cpu().numpy() for answer in answers])
    return logits, np.concatenate([answer.features.float().cpu().numpy() for answer in answers])


def measure_distances(net: Network, known: Tiles, tiles: Tiles, versions: int) -> Distances:
    """How far the features of tiles (N), and of restained copies, lie from those of the known ones: (C, N)."""
    cloud = learn_cloud(predict_with_features(net, known)[1])
    return np.stack(
        [cloud.distance(predict_with_features(net, version)[1]) for version in restained_copies(tiles, versions)]
    )


# -- folds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfFold:
    """Every tile answered by networks that never saw it: R times each, NaN where a tile has no slide to leave out."""

    grouping: Grouping
    tiles: TileSet
    logits: Logits  # (R, N, K)
    folds: NDArray[np.intp]  # (R, N) the fold in which it was held out, -1 for none
    distances: Distances | None = (
        None  # (C, R, N) of its features, and those of its restained copies, from those learnt from
    )


def cross_validate(
    config: Fit, tiles: TileSet, folder: Path, grouping: Grouping, tell: Callable[[str], None]
) -> OutOfFold:
    """Each finished fold is kept, so that a run that was killed goes on with the next one."""
    repeats = config.repeats if grouping == "random" else 1
    if grouping == "slide":
        tell_twins_across_slides(tiles)
    n = len(tiles.targets)
    logits = np.full((repeats, n, len(tiles.classes)), np.nan, np.float32)
    folds = np.full((repeats, n), -1)
    distances = np.full((count_versions(n), repeats, n), np.nan, np.float32)
    for one in make_folds(tiles, config, grouping, repeats):
        place, held_out = folder / one.name, one.fold.held_out
        answer = answer_fold(config, tiles, one.fold, place, one.repeat)
        logits[one.repeat, held_out], distances[:, one.repeat, held_out] = answer
        folds[one.repeat, held_out] = one.number
        right = (answer[0].argmax(1) == tiles.targets[held_out]).mean()
        tell(f"{one.name}, {one.fold.name}: {right:.3f} of {len(held_out)}")
    return OutOfFold(grouping, tiles, logits, folds, distances)


class NumberedFold(NamedTuple):
    name: str  # as its folder is called
    repeat: int
    number: int
    fold: Fold


def make_folds(tiles: TileSet, config: Fit, grouping: Grouping, repeats: int) -> list[NumberedFold]:
    """All folds of all repeats; a slide can be left out in one way only."""
    if grouping == "slide":
        rounds = [slide_folds(tiles.records)]
    else:
        groups = together(tiles)
        rounds = [random_folds(tiles.targets, tiles.classes, config.folds, seed, groups) for seed in range(repeats)]
    return [
        NumberedFold(f"{grouping}-{repeat}-{number}", repeat, number, fold)
        for repeat, folds in enumerate(rounds)
        for number, fold in enumerate(folds)
    ]


def tell_twins_across_slides(tiles: TileSet) -> None:
    """Folds by slide hold out whole slides: a field that two of them show is learnt and held out at once."""
    first: dict[int, Record] = {}
    for group, record in zip(together(tiles).tolist(), tiles.records, strict=True):
        if record.slide is None:
            continue
        other = first.setdefault(group, record)
        if other.slide != record.slide:
            log.warning("look alike on two slides, so that folds by slide flatter: %s and %s", other.path, record.path)


def answer_fold(config: Fit, tiles: TileSet, fold: Fold, place: Path, repeat: int) -> tuple[Logits, Distances]:
    """Logits of the held-out tiles, and how far their features lie from those of the others."""
    finished, beside = place / "logits.npy", place / "distances.npy"
    if finished.exists() and beside.exists():
        return np.load(finished), np.load(beside)
    seeded = config.optimisation.model_copy(update={"seed": config.optimisation.seed + repeat})
    config = config.model_copy(update={"optimisation": seeded})
    net = fit_tiles(config, tiles.subset(fold.train), place, None, title=place.name)
    held_out = tiles.tiles[fold.held_out]
    logits = predict(net, held_out)
    distances = measure_distances(net, tiles.tiles[fold.train], held_out, count_versions(len(tiles.targets)))
    checkpoint.write_atomically(beside, lambda file: np.save(file, distances))
    checkpoint.write_atomically(finished, lambda file: np.save(file, logits))
    (place / "latest.pt").unlink()  # a network per fold is of no further use
    shutil.rmtree(place / "teacher", ignore_errors=True)
    return logits, distances
