"""The gate: what tiles of a known kind look like, and the limits within which an answer is `ok`.

Fitted on tiles of known kind alone, on numbers that were taken while each was held out. No limit is chosen by hand:
each lets the same share through, the smallest with which SHARE_OK of the held-out tiles still pass all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from model.artifact import Gate, Verdict
from model.graph import to_images
from model.quality import PALETTE_SIZE, Palette, Quality, count_colours, measure_quality
from model.scope import Cloud, judge
from training import augment

Floats = NDArray[np.floating[Any]]
Tiles = NDArray[np.uint8]

SHARE_OK = 0.96  # of the held-out tiles; above the 0.9 that is promised, since limits let fewer new tiles through
# Of copies that stand for other laboratories' tissue. Each stain is stronger or weaker by half: with less, glands of
# another collection are refused wholesale; with more, other stains pass (docs/decisions/0005-the-gate.md).
STAIN, LIGHT = 0.5, 0.1
MOST_COPIES, MOST_TILES = 8, 4000  # restained copies of a tile; tiles and copies together
PORTION = 64  # tiles that are restained at once
PALETTE_MASS = 0.999  # of the pixels lie in the palette, the commonest colours first
FOLDS_WITHOUT_NETWORK = 5


@dataclass(frozen=True)
class Appearance:
    """Of tiles and their restained copies; the first copy is the tile itself."""

    colours: NDArray[np.uint16]  # (C, N, 4096)
    brightness: Floats  # (C, N)
    qualities: list[Quality]  # N


@dataclass(frozen=True)
class Signs:
    """What the gate looks at besides the confidence, a row an answer, taken while its tile was held out."""

    qualities: list[Quality]  # M, with their foreign share
    brightness: Floats  # (C, M)
    foreign_share: Floats  # (C, M)
    distance: Floats | None  # (C, M) None where no network was asked

    def subset(self, chosen: NDArray[Any]) -> "Signs":
        rows = np.arange(len(self.qualities))[chosen]
        return Signs(
            [self.qualities[i] for i in rows],
            self.brightness[:, rows],
            self.foreign_share[:, rows],
            None if self.distance is None else self.distance[:, rows],
        )


# -- what is learnt from training tiles ----------------------------------------------------------------------------


def measure_appearance(tiles: Tiles, versions: int) -> Appearance:
    colours = np.zeros((versions, len(tiles), PALETTE_SIZE), np.uint16)
    brightness = np.zeros((versions, len(tiles)))
    qualities = []
    for place, version in enumerate(restained_copies(tiles, versions)):
        for n, tile in enumerate(version):
            quality = measure_quality(tile)
            colours[place, n] = count_colours(tile[::2, ::2])
            brightness[place, n] = quality.brightness
            if place == 0:
                qualities.append(quality)
    return Appearance(colours, brightness, qualities)


def count_versions(n: int) -> int:
    """The tile itself, and as many copies as the number of tiles leaves time for."""
    return 1 + min(MOST_COPIES, max(1, MOST_TILES // n))


def restained_copies(tiles: Tiles, versions: int) -> Iterator[Tiles]:
    """The tiles as they are, then copies of other stains, the same ones every time."""
    yield tiles
    for version in range(1, versions):
        with torch.random.fork_rng():
            torch.manual_seed(version)
            parts = [
                augment.restain(to_images(torch.from_numpy(tiles[i : i + PORTION])), STAIN, LIGHT)
                for i in range(0, len(tiles), PORTION)
            ]
        yield (torch.cat(parts) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def learn_palette(colours: NDArray[np.uint16]) -> Palette:
    """The commonest colours of tiles and copies (..., 4096) that together make up PALETTE_MASS of the pixels."""
    counts = colours.reshape(-1, PALETTE_SIZE).sum(axis=0, dtype=np.int64)
    commonest = (-counts).argsort(kind="stable")
    shares = counts[commonest].cumsum() / counts.sum()
    palette = np.zeros(PALETTE_SIZE, bool)
    palette[commonest[: np.searchsorted(shares, PALETTE_MASS) + 1]] = True
    return palette


def measure_foreign(colours: NDArray[np.uint16], palette: Palette) -> Floats:
    """Share of the pixels that are not in the palette: (..., 4096) -> (...)."""
    shares: Floats = colours[..., ~palette].sum(axis=-1) / colours.sum(axis=-1)
    return shares


def learn_cloud(known: Floats) -> Cloud:
    """Where features (N, D) lie: one cloud for all classes, its covariance shrunk (Ledoit & Wolf 2004)."""
    centre = known.mean(axis=0, dtype=np.float64)
    covariance, _ = ledoit_wolf(known - centre, assume_centered=True)
    values, vectors = np.linalg.eigh(covariance)
    floor = max(float(values.max()) * 1e-6, 1e-12)  # features that are all the same have no spread at all
    whitening = vectors / np.sqrt(np.maximum(values, floor)) @ vectors.T
    cloud = Cloud(centre.astype(np.float32), whitening.astype(np.float32))
    usual = float(np.sqrt((cloud.distance(known.astype(np.float32)) ** 2).mean()))
    return Cloud(cloud.centre, cloud.whitening / np.float32(max(usual, 1e-6)))


# -- signs of held-out tiles ---------------------------------------------------------------------------------------


def signs_of_folds(appearance: Appearance, folds: NDArray[np.intp], distances: Floats | None) -> Signs:
    """Of every tile that a fold (R, N) held out, its colours seen beside the palette of that repeat's other folds."""
    foreign = np.zeros((len(appearance.colours), *folds.shape))  # (C, R, N)
    for repeat, fold_of in enumerate(folds):
        for fold in range(fold_of.max() + 1):
            held_out, others = np.flatnonzero(fold_of == fold), np.flatnonzero((fold_of >= 0) & (fold_of != fold))
            palette = learn_palette(appearance.colours[:, others])
            foreign[:, repeat, held_out] = measure_foreign(appearance.colours[:, held_out], palette)
    seen = folds >= 0
    tiles = np.broadcast_to(np.arange(folds.shape[1]), folds.shape)[seen]
    return put_together(appearance, tiles, foreign[:, seen], None if distances is None else distances[:, seen])


def signs_of_held_out(appearance: Appearance, palette: Palette, distance: Floats) -> Signs:
    rows = np.arange(len(appearance.qualities))
    return put_together(appearance, rows, measure_foreign(appearance.colours, palette), distance)


def signs_without_network(appearance: Appearance) -> Signs:
    folds = np.arange(len(appearance.qualities)) % FOLDS_WITHOUT_NETWORK
    return signs_of_folds(appearance, folds[None], None)


def put_together(appearance: Appearance, tiles: NDArray[np.intp], foreign: Floats, distance: Floats | None) -> Signs:
    qualities = [
        replace(appearance.qualities[tile], foreign_share=float(share))
        for tile, share in zip(tiles, foreign[0], strict=True)
    ]
    return Signs(qualities, appearance.brightness[:, tiles], foreign, distance)


# -- limits --------------------------------------------------------------------------------------------------------


def fit_gate(signs: Signs, confidence: Floats | None, protocol: str) -> Gate:
    """Limits that each let the same share through; the strictest ones that SHARE_OK of the rows pass together."""
    low, high = 0.5, 1.0  # too strict, lax enough
    for _ in range(12):
        share = (low + high) / 2
        gate = place_limits(signs, confidence, share)
        if share_ok(signs, confidence, gate) < SHARE_OK:
            low = share
        else:
            high = share
    gate = place_limits(signs, confidence, high)
    passed = share_ok(signs, confidence, gate)
    words = f"{high:.1%} pass each limit, {passed:.1%} of {len(signs.qualities)} answers pass all ({protocol}); "
    words += f"those of brightness, colours and distance also on copies restained by {STAIN:g}"
    return gate.model_copy(update={"protocol": words})


def place_limits(signs: Signs, confidence: Floats | None, share: float) -> Gate:
    def at_least(values: Floats | Sequence[float]) -> float:
        return float(np.quantile(values, 1 - share))

    def at_most(values: Floats | Sequence[float]) -> float:
        return float(np.quantile(values, share))

    q = signs.qualities
    return Gate(
        min_tissue_share=at_least([one.tissue_share for one in q]),
        min_sharpness=at_least([one.sharpness for one in q]),
        min_confidence=0.0 if confidence is None else at_least(confidence),
        min_brightness=at_least(signs.brightness),
        max_brightness=at_most(signs.brightness),
        max_odd_share=at_most([one.odd_share for one in q]),
        max_blue_absorption=at_most([one.blue_absorption for one in q]),
        max_foreign_share=at_most(signs.foreign_share),
        max_distance=None if signs.distance is None else at_most(signs.distance),
        protocol="",  # told by `fit_gate`, when the share is found
    )


def verdicts(signs: Signs, confidence: Floats | None, gate: Gate) -> list[Verdict]:
    """By the very function that the service asks."""
    n = len(signs.qualities)
    distance = [None] * n if signs.distance is None else signs.distance[0].tolist()
    sure = np.ones(n) if confidence is None else confidence
    return [judge(q, d, float(c), gate)[1] for q, d, c in zip(signs.qualities, distance, sure, strict=True)]


def share_ok(signs: Signs, confidence: Floats | None, gate: Gate) -> float:
    return float(np.mean([verdict == "ok" for verdict in verdicts(signs, confidence, gate)]))


def cross_fit(signs: Signs, confidence: Floats, folds: NDArray[np.intp], groups: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each answer is ok by limits from rows that share no group with its fold: no tile, or no slide."""
    ok = np.zeros(len(folds), bool)
    for fold in np.unique(folds):
        judged = folds == fold
        rest = ~np.isin(groups, groups[judged])
        gate = fit_gate(signs.subset(rest), confidence[rest], "")
        ok[judged] = [verdict == "ok" for verdict in verdicts(signs.subset(judged), confidence[judged], gate)]
    return ok
