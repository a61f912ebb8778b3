"""Labelled tiles to a trained network, and what it says of others.

tissue-train fit configs/smoke.toml
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from model import vit
from model.colours import ColourHead
from model.graph import fill_removed, find_removal, to_images
from model.network import Network, TokenNetwork, build
from training import checkpoint, colours, synthetic
from training.augment import augment, blend, keep_some_patches, mean_density
from training.config import Fit
from training.data import Record, load_tiles, number_labels, scan, tell_skipped
from training.distil import distillation_loss
from training.gate import learn_cloud, restained_copies
from training.rehearsal import read_rehearsal
from training.train import batch_indices, best_device, optimise, refuse_unfilled
from training.twins import group_pairs, read_pairs

Tiles = NDArray[np.uint8]
Targets = NDArray[np.intp]
Logits = NDArray[np.float32]
Features = NDArray[np.float32]
Distances = NDArray[np.float32]


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
    scanned = scan(data.folder, data.table, data.classes)
    tell_skipped(scanned)
    tiles = load_tiles(scanned.records, config.model.tile_px, data.tile_mpp, data.image_mpp)
    table = data.near_duplicates
    near = None if table is None else group_pairs(len(tiles), read_pairs(table, scanned))
    return TileSet(tiles, number_labels(scanned.records, scanned.classes), scanned.records, scanned.classes, near)


def fit_tiles(config: Fit, train: TileSet, folder: Path, held_out: TileSet | None, title: str = "") -> Network:
    """Trains one network in `folder`, or goes on with the one that was being trained there."""
    device = best_device()
    how = config.optimisation
    teacher = train_teacher(config, train, folder / "teacher", title)
    torch.manual_seed(how.seed)
    model = build(config.model, len(train.classes))
    if config.init:
        missing, _ = checkpoint.start_from(model, config.init)
        refuse_unfilled(how.frozen, missing)
    if isinstance(model, vit.ViT) and model.config.colour_share:
        teach_colours(model.colour_head, config, train)
    model = model.to(device)
    draw_batch = gather_batches(config, train, device)

    def loss_of(net: Network, step: int) -> torch.Tensor:
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

    def accuracy(net: Network) -> float:
        assert held_out is not None
        return float((predict(net, held_out.tiles).argmax(1) == held_out.targets).mean())

    return optimise(model, loss_of, how, folder, accuracy if held_out else None, title or config.name)


def teach_colours(head: ColourHead, config: Fit, train: TileSet) -> None:
    """Before the first step, so that every checkpoint has what it learnt."""
    rehearsal, share = None, 0.0
    if config.rehearse is not None:
        rehearsal = read_rehearsal(config.rehearse, tuple(train.classes), config.model.tile_px)
        share = config.rehearse.share
    colours.teach(head, torch.from_numpy(train.tiles), torch.from_numpy(train.targets), rehearsal, share)


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
    """In training, a network with tokens gets only some of them where `token_drop` says so.

    Where `keep` of its artefact takes the pixels away as well, every second image loses them here, too: the network
    has to know what tissue looks like beside a hole, or its maps and answers tell more of the holes than of the tissue.
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
    """Logits of each head that is trained; of most networks there is one."""
    return seen.opinions if isinstance(seen, vit.Output) else (seen.logits,)


def mean_loss(opinions: tuple[torch.Tensor, ...], wanted: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Each head has to be right alone: if their mean were taught, the faster one would leave nothing to the other."""
    losses = [F.cross_entropy(one.float(), wanted, label_smoothing=label_smoothing) for one in opinions]
    return torch.stack(losses).mean()


def train_teacher(config: Fit, train: TileSet, folder: Path, title: str) -> Network | None:
    """On the very tiles its student will learn from: one that had seen more would give away what is held out."""
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
    """What the network says of each tile, and the features that it says it from."""
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
