"""What is left of an artefact's answers when tiles are damaged, after Naseer et al. (arXiv 2105.10497).

    tissue-train robustness model/default --tiles data/tiles --table data/tiles/manifest.csv --folder runs/robustness

Patches missing (any, or those that the network looks at most or least), tiles shuffled, a patch made to mislead, and
worse stains, focus, compression and resolution. All answers come from the exported graphs; only the misleading patch
is learnt with gradients, from the same graph replayed in torch.
"""

import csv
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from model.session import Classifier, open_classifier
from training.augment import STAINS, compress, density_of
from training.data import NoClasses
from training.metrics import mean_of
from training.replay import Replay, Unreplayable
from training.trial import choose_evenly, read_trial

Pixels = NDArray[np.uint8]
Indices = NDArray[np.intp]
Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

BATCH = 10
SHARES = tuple(tenth / 10 for tenth in range(1, 10))
CELLS = (2, 3, 5, 6, 10, 15)  # along a side; those that divide it
PATCH_SHARES = (0.2, 0.3, 0.5)  # of the side: 4, 9 and 25 % of the area; whole patches of a ten by ten grid
ATTACK_STEPS, ATTACK_BATCH, ATTACK_RATE = 40, 8, 0.3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    test: str
    setting: str
    severity: float


Outcome = tuple[Damage, Indices, Indices]  # what was done, to which tiles, and the answers


@dataclass(frozen=True)
class Row:
    artifact: str
    test: str
    setting: str
    severity: float
    value: float  # the share of right answers; of unchanged ones, where the classes aren't known
    low: float
    high: float
    n: int  # tiles, or slides where they are named


def measure(
    artifacts: list[Path],
    folder: Path,
    table: Path | None,
    image_mpp: float | None,
    per_class: int,
    learnt: bool,
    seed: int = 0,
) -> tuple[list[Row], str]:
    rows: list[Row] = []
    protocols: dict[str, str] = {}
    for path, name in zip(artifacts, name_apart(artifacts), strict=True):
        classifier = open_classifier(path, device="cpu", intra_threads=1)
        trial = read_trial(classifier, folder, table, image_mpp, per_class, learnt, seed)
        chosen = choose_evenly(trial.targets, per_class, seed)
        tiles, targets = trial.tiles[chosen], trial.targets[chosen]
        if len(set(targets)) < 2:
            raise NoClasses(f"the tiles of {folder} are all {classifier.manifest.class_names[targets[0]]}: add others")
        log.info("%s: %s", name, trial.protocol)
        graph = path / classifier.manifest.file("predict", "fp32").path
        for damage, tried, answers in answer_all(classifier, graph, tiles, targets, seed):
            groups = trial.drawn_together(chosen[tried])
            estimate = mean_of(answers == targets[tried], groups, seed=seed).proportion()
            rows.append(Row(name, *vars(damage).values(), **vars(estimate)))
        protocols[name] = f"{len(tiles)} of {trial.protocol}"
    return rows, join_protocols(protocols)


def join_protocols(protocols: dict[str, str]) -> str:
    """One for all artefacts where it is the same; without classes each one's answers choose its tiles."""
    if len(set(protocols.values())) == 1:
        return next(iter(protocols.values()))
    return "\n".join(f"{name}: {protocol}" for name, protocol in protocols.items())


def name_apart(artifacts: list[Path]) -> list[str]:
    """Each folder's name; with the one above it, as in x/artifact, where two would be called the same."""
    short = [path.resolve().name for path in artifacts]
    alone = len(set(short)) == len(short) and "artifact" not in short
    return short if alone else ["/".join(path.resolve().parts[-2:]) for path in artifacts]


def answer_all(classifier: Classifier, graph: Path, tiles: Pixels, targets: Indices, seed: int) -> Iterator[Outcome]:
    every = np.arange(len(tiles))
    yield Damage("intact", "", 0), every, answer(classifier, tiles)
    for number, harm in enumerate((drop_patches, shuffle_tiles, worsen), 1):
        for damage, answers in harm(classifier, tiles, np.random.default_rng((seed, number))):
            yield damage, every, answers
    try:
        replay = Replay(graph)
    except Unreplayable as error:
        log.warning("no misleading patch was tried: %s", error)
        return
    yield from mislead(classifier, replay, tiles, targets, np.random.default_rng((seed, 4)))


def answer(classifier: Classifier, tiles: Pixels) -> Indices:
    parts = [classifier.predict(tiles[i : i + BATCH]).logits for i in range(0, len(tiles), BATCH)]
    labels: Indices = np.concatenate(parts).argmax(axis=1)
    return labels


def answer_without(classifier: Classifier, tiles: Pixels, keeps: Bools) -> Indices:
    parts = [classifier.explain(tiles[i : i + BATCH], keeps[i : i + BATCH]).logits for i in range(0, len(tiles), BATCH)]
    labels: Indices = np.concatenate(parts).argmax(axis=1)
    return labels


# -- missing patches -----------------------------------------------------------------------------------------------


def drop_patches(classifier: Classifier, tiles: Pixels, rng: Generator) -> Iterator[tuple[Damage, Indices]]:
    """Painted black as in the paper, white as glass, or taken from the network's tokens.

    Salient is what the network's own last layer attends to, the mean of its heads; the paper asks another network.
    """
    n, patches = len(tiles), classifier.manifest.grid**2
    orders = {"random": rng.random((n, patches))}
    if "attention" in classifier.manifest.maps.methods:
        attention = np.concatenate([classifier.explain(tile[None]).attention for tile in tiles])  # (N, L, H, G, G)
        salience = attention[:, -1].mean(axis=1).reshape(n, patches)
        orders |= {"salient first": -salience, "salient last": salience}
    for order, values in orders.items():
        rank = values.argsort(axis=1).argsort(axis=1)  # (N, G*G)
        for share in SHARES:
            keeps = rank >= round(share * patches)
            yield Damage("patch drop, removed", order, share), answer_without(classifier, tiles, keeps)
            for colour, value in (("black", 0), ("white", 255)):
                yield Damage(f"patch drop, {colour}", order, share), answer(classifier, paint(tiles, keeps, value))


def paint(tiles: Pixels, keeps: Bools, value: int) -> Pixels:
    grid = round(keeps.shape[1] ** 0.5)
    side = tiles.shape[1] // grid
    shown = np.kron(keeps.reshape(-1, grid, grid), np.ones((1, side, side), bool))
    return np.where(shown[..., None], tiles, np.uint8(value))


# -- shuffled tiles ------------------------------------------------------------------------------------------------


def shuffle_tiles(classifier: Classifier, tiles: Pixels, rng: Generator) -> Iterator[tuple[Damage, Indices]]:
    for cells in CELLS:
        if tiles.shape[1] % cells == 0:
            shuffled = np.stack([shuffle(tile, cells, rng) for tile in tiles])
            yield Damage("shuffle", "cells along a side", cells), answer(classifier, shuffled)


def shuffle(tile: Pixels, cells: int, rng: Generator) -> Pixels:
    side = len(tile) // cells
    pieces = tile.reshape(cells, side, cells, side, 3).swapaxes(1, 2).reshape(cells**2, side, side, 3)
    mixed = rng.permutation(pieces).reshape(cells, cells, side, side, 3)
    return mixed.swapaxes(1, 2).reshape(tile.shape)


# -- worse pictures ------------------------------------------------------------------------------------------------


def worsen(classifier: Classifier, tiles: Pixels, rng: Generator) -> Iterator[tuple[Damage, Indices]]:
    for name, (severities, apply) in WORSE.items():
        for severity in severities:
            damaged = np.stack([apply(tile, severity, rng) for tile in tiles])
            yield Damage(name, UNITS[name], severity), answer(classifier, damaged)


def scale_stains(tile: Pixels, strength: float, rng: Generator) -> Pixels:
    """Haematoxylin and eosin each stronger or weaker by a factor of exp(strength), in optical density."""
    stains = STAINS.numpy().astype(np.float64)
    factors = np.exp(strength * np.append(rng.choice([-1, 1], 2), 0))
    density = density_of(tile) @ np.linalg.inv(stains) @ np.diag(factors) @ stains
    restained: Pixels = (256 * np.exp(-density) - 1).clip(0, 255).round().astype(np.uint8)
    return restained


def blur(tile: Pixels, sigma_px: float, rng: Generator) -> Pixels:
    return np.asarray(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(sigma_px)))


def coarsen(tile: Pixels, factor: float, rng: Generator) -> Pixels:
    """Scanned so many times coarser, and enlarged again."""
    side = len(tile)
    small = Image.fromarray(tile).resize((round(side / factor),) * 2, Image.Resampling.BICUBIC)
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


WORSE: dict[str, tuple[tuple[float, ...], Callable[[Pixels, float, Generator], Pixels]]] = {
    "stain": ((0.1, 0.2, 0.3, 0.4, 0.5), scale_stains),
    "blur": ((0.5, 1, 1.5, 2, 3), blur),
    "JPEG": ((80, 60, 40, 20, 10), lambda tile, quality, rng: compress(tile, int(quality))),
    "low resolution": ((1.25, 1.5, 2, 3, 4), coarsen),
}
UNITS = {
    "stain": "log of each stain's factor",
    "blur": "sigma, px",
    "JPEG": "quality",
    "low resolution": "times coarser",
}


# -- a patch that misleads -----------------------------------------------------------------------------------------


def mislead(
    classifier: Classifier, replay: Replay, tiles: Pixels, targets: Indices, rng: Generator
) -> Iterator[Outcome]:
    """One patch for all tiles, learnt on one half of them and tried on the other.

    Controls of the same size in the same places: noise, black, and a cut from a tile of another class.
    """
    side = tiles.shape[1]
    step = side // classifier.manifest.grid
    order = rng.permutation(len(tiles))
    learn, tried = order[: len(tiles) // 2], order[len(tiles) // 2 :]
    n = len(tried)
    for share in PATCH_SHARES:
        size = round(share * side)
        learnt = learn_patch(replay, tiles[learn], targets[learn], size, rng)
        noise = rng.integers(0, 256, (size, size, 3), np.uint8)
        places = rng.integers(0, (side - size) // step + 1, (n, 2)) * step
        between = np.where(places + step // 2 <= side - size, places + step // 2, places - step // 2)
        kinds: dict[str, tuple[Sequence[Pixels], Indices]] = {
            "learnt, on the patch grid": ([learnt] * n, places),
            "learnt, off the grid": ([learnt] * n, between),
            "noise": ([noise] * n, places),
            "black": ([np.zeros_like(noise)] * n, places),
            "cut from another class": ([cut_foreign(tiles, targets, i, size, rng) for i in tried], places),
        }
        for name, (patches, where) in kinds.items():
            pasted = np.stack([paste(t, p, w) for t, p, w in zip(tiles[tried], patches, where, strict=True)])
            yield Damage("misleading patch", name, share**2), tried, answer(classifier, pasted)


def paste(tile: Pixels, patch: Pixels, place: NDArray[np.integer[Any]]) -> Pixels:
    top, left = place
    pasted = tile.copy()
    pasted[top : top + len(patch), left : left + len(patch)] = patch
    return pasted


def cut_foreign(tiles: Pixels, targets: Indices, i: int, size: int, rng: Generator) -> Pixels:
    others = np.flatnonzero(targets != targets[i])
    top, left = rng.integers(0, tiles.shape[1] - size + 1, 2)
    return tiles[rng.choice(others), top : top + size, left : left + size]


def learn_patch(
    replay: Callable[[Tensor], Tensor], tiles: Pixels, targets: Indices, size: int, rng: Generator
) -> Pixels:
    """Pixels that make the network's answers wrong wherever they are pasted: Adam on the loss of the true class."""
    side = tiles.shape[1]
    raw = torch.from_numpy(rng.normal(0, 0.1, (size, size, 3))).float().requires_grad_()
    optimiser = torch.optim.Adam([raw], ATTACK_RATE)
    for _ in range(ATTACK_STEPS):
        chosen = rng.integers(0, len(tiles), ATTACK_BATCH)
        images = torch.from_numpy(tiles[chosen]).float()
        patch = 255 * torch.sigmoid(raw)
        padded = []
        for image, (top, left) in zip(images, rng.integers(0, side - size + 1, (ATTACK_BATCH, 2)), strict=True):
            around = (0, 0, left, side - size - left, top, side - size - top)
            shown = F.pad(torch.ones_like(patch), around)
            padded.append(image * (1 - shown) + F.pad(patch, around))
        loss = -F.cross_entropy(replay(torch.stack(padded)), torch.from_numpy(targets[chosen]))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    learnt: Pixels = (255 * torch.sigmoid(raw)).round().byte().detach().numpy()
    return learnt


# -- the table -----------------------------------------------------------------------------------------------------


def write_rows(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            numbers = {
                name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(row).items()
            }
            writer.writerow(numbers)
