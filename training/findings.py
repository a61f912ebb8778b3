"""What answers on tiles that the network never saw say about it: temperature, sets, limits, and every metric.

Logits of a held-out part or of folds enter; the findings leave, as the manifest carries them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.artifact import Calibration, Conformal, Gate, Metric
from model.quality import sharpness, tissue_share
from training.calibrate import fit_conformal, fit_temperature, max_coverage, measure_coverage, softmax
from training.fit import OutOfFold, TileSet
from training.floors import floor_predictions
from training.metrics import Scores, score

COVERAGES = tuple(round(0.5 + 0.01 * step, 2) for step in range(50))  # what may be asked for, where n allows
DEFAULT_COVERAGE = 0.9
SHARE_LET_THROUGH = 0.99  # of tiles like those of the training, by each limit of the gate on its own
SHARE_CERTAIN = 0.9  # of held-out answers, by the limit on confidence


@dataclass(frozen=True)
class Answers:
    """Answers on unseen tiles, under one protocol; a tile may be answered several times."""

    protocol: str
    logits: NDArray[np.float32]  # (M, K)
    targets: NDArray[np.intp]  # (M,)
    tiles: NDArray[np.intp]  # (M,) the tile of each row
    groups: NDArray[np.intp]  # (M,) the tile, or the slide, of each row: what is drawn together
    folds: NDArray[np.intp]  # (M,) unique over the repeats
    floors: dict[str, NDArray[np.float64]]  # probabilities (M, K) of machines without a network, on the same rows

    def subset(self, chosen: NDArray[np.bool_], protocol: str) -> "Answers":
        floors = {name: probabilities[chosen] for name, probabilities in self.floors.items()}
        return Answers(
            protocol,
            self.logits[chosen],
            self.targets[chosen],
            self.tiles[chosen],
            self.groups[chosen],
            self.folds[chosen],
            floors,
        )


@dataclass(frozen=True)
class Findings:
    calibration: Calibration
    conformal: Conformal | None
    gate: Gate
    metrics: list[Metric]


def unmeasured(tiles: TileSet) -> Findings:
    """Of a network that was trained on everything, and of which no fold was ever run."""
    calibration = Calibration(temperature=1.0, n=0, protocol="none: nothing was held out")
    return Findings(calibration, None, find_gate(tiles, None, "held-out answers: none"), [])


def find(parts: Sequence[Answers], tiles: TileSet) -> Findings:
    """Calibration, sets and limits from the first part, metrics from each."""
    main = parts[0]
    temperature = fit_temperature(main.logits, main.targets, main.groups)
    calibration = Calibration(
        temperature=temperature.value, n=temperature.n, protocol=f"{main.protocol}; {temperature.reason}"
    )
    probabilities = softmax(main.logits, temperature.value)
    return Findings(
        calibration,
        find_conformal(main, probabilities),
        find_gate(tiles, probabilities.max(axis=1), main.protocol),
        [metric for part in parts for metric in judge(part, temperature.value, tiles.classes)],
    )


def find_conformal(answers: Answers, probabilities: NDArray[np.floating]) -> Conformal | None:
    n = len(np.unique(answers.tiles))
    coverages = [coverage for coverage in COVERAGES if coverage <= max_coverage(n)]
    if not coverages or coverages[-1] < DEFAULT_COVERAGE:
        return None
    thresholds = fit_conformal(probabilities, answers.targets, coverages, answers.tiles)
    return Conformal(
        coverages=list(thresholds.coverages),
        thresholds=thresholds.values.tolist(),
        default=DEFAULT_COVERAGE,
        n=thresholds.n,
        protocol=f"{answers.protocol}; empirical: no guarantee for other laboratories, nor for a refitted network",
    )


def find_gate(tiles: TileSet, confidence: NDArray[np.floating] | None, protocol: str) -> Gate:
    few = 1 - SHARE_LET_THROUGH
    return Gate(
        min_tissue_share=float(np.quantile([tissue_share(tile) for tile in tiles.tiles], few)),
        min_sharpness=float(np.quantile([sharpness(tile) for tile in tiles.tiles], few)),
        min_confidence=0.5 if confidence is None else float(np.quantile(confidence, 1 - SHARE_CERTAIN)),
        protocol=f"{SHARE_LET_THROUGH:.0%} of {len(tiles.tiles)} training tiles pass each limit of the picture, "
        f"{SHARE_CERTAIN:.0%} of the answers the one on confidence ({protocol})",
    )


def judge(answers: Answers, temperature: float, classes: Sequence[str]) -> list[Metric]:
    """The network's metrics and, beside them, the accuracy of every floor and the coverage of the sets."""
    probabilities = softmax(answers.logits, temperature)
    metrics = name_metrics(score(probabilities, answers.targets, classes, answers.groups), answers.protocol)
    for name, floor in answers.floors.items():
        accuracy = score(floor, answers.targets, classes, answers.groups).accuracy
        metrics.append(Metric(name=f"accuracy of {name}", protocol=answers.protocol, **vars(accuracy)))
    if len(np.unique(answers.folds)) > 1 and max_coverage(len(np.unique(answers.tiles))) > DEFAULT_COVERAGE:
        rows = (answers.targets, answers.folds, [DEFAULT_COVERAGE], answers.tiles, answers.groups)
        for coverage in measure_coverage(probabilities, *rows):
            protocol = f"{answers.protocol}; thresholds of the other folds"
            nominal = f"at nominal {coverage.nominal:g}"
            metrics += [
                Metric(name=f"coverage of the sets {nominal}", protocol=protocol, **vars(coverage.measured)),
                Metric(name=f"size of the sets {nominal}", protocol=protocol, **vars(coverage.set_size)),
            ]
    return metrics


def name_metrics(scores: Scores, protocol: str) -> list[Metric]:
    return [Metric(name=name, protocol=protocol, **vars(estimate)) for name, estimate in scores.pairs()]


# -- where answers come from ---------------------------------------------------------------------------------------


def answers_of_folds(folds: OutOfFold, doubtful: Sequence[str]) -> list[Answers]:
    """All tiles under the protocol's name; and without those of doubtful quality, where there are any."""
    seen = folds.folds >= 0  # (R, N)
    repeats, n = seen.shape
    tile = np.broadcast_to(np.arange(n), seen.shape)
    slides = [record.slide or f"unknown, {i}" for i, record in enumerate(folds.tiles.records)]
    slide = np.unique(slides, return_inverse=True)[1][tile]
    targets = folds.tiles.targets[tile]
    n_folds = folds.folds.max() + 1
    fold = np.arange(repeats)[:, None] * n_folds + folds.folds
    if folds.grouping == "random":
        protocol, groups = f"{repeats} x {n_folds} random folds, all tiles", tile
    else:
        protocol, groups = f"leave one of {n_folds} slides out, all tiles of known slide", slide
    everything = Answers(
        protocol, folds.logits[seen], targets[seen], tile[seen], groups[seen], fold[seen], fold_floors(folds)
    )
    quality = np.array([record.quality or "" for record in folds.tiles.records])[tile[seen]]
    parts = [everything]
    if np.isin(quality, doubtful).any():
        parts.append(everything.subset(~np.isin(quality, doubtful), f"{protocol} but {', '.join(doubtful)}"))
    return parts


def fold_floors(folds: OutOfFold) -> dict[str, NDArray[np.float64]]:
    """The machines without a network, trained and tried on the very same folds: rows as in the logits seen."""
    tiles, targets = folds.tiles.tiles, folds.tiles.targets
    k = len(folds.tiles.classes)
    found: dict[str, NDArray[np.float64]] = {}
    for repeat, fold_of in enumerate(folds.folds):
        for number in range(fold_of.max() + 1):
            held_out, others = np.flatnonzero(fold_of == number), np.flatnonzero((fold_of >= 0) & (fold_of != number))
            for name, p in floor_predictions(tiles[others], targets[others], tiles[held_out], k).items():
                found.setdefault(name, np.zeros((*folds.folds.shape, k)))[repeat, held_out] = p
    return {name: probabilities[folds.folds >= 0] for name, probabilities in found.items()}


def answers_of_held_out(train: TileSet, held_out: TileSet, logits: NDArray[np.float32], protocol: str) -> Answers:
    n = len(held_out.targets)
    floors = floor_predictions(train.tiles, train.targets, held_out.tiles, len(train.classes))
    each = np.arange(n)
    return Answers(protocol, logits, held_out.targets, each, each, np.zeros(n, np.intp), floors)
