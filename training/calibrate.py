"""Makes probabilities mean what they say: one temperature for the logits, and sets that hold the truth.

Both are fitted on predictions for tiles that the model had not seen, out of fold or of a validation set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.optimize import minimize_scalar

from training.metrics import (
    RESAMPLES,
    Estimate,
    Floats,
    Groups,
    Ints,
    bootstrap,
    count_groups,
    divide,
    resample,
    surprise,
    weighted_mean,
)

TEMPERATURES = (0.1, 10.0)  # beyond, the logits carry almost no scale of their own, and none should be invented


class TooFewForCoverage(ValueError):
    pass


@dataclass(frozen=True)
class Temperature:
    """What logits are divided by. Where the best one gains too little it is refused: value 1, and the reason."""

    value: float
    nll_before: float
    nll_after: float  # at the best temperature, refused or not
    n: int  # distinct tiles, or slides, it was fitted on
    accepted: bool
    reason: str


@dataclass(frozen=True)
class Thresholds:
    """A class is in the set where 1 - probability is at most its threshold."""

    coverages: tuple[float, ...]  # ascending
    values: Floats  # (coverages, K)
    n: int  # distinct tiles, or slides
    max_coverage: float


@dataclass(frozen=True)
class Coverage:
    """What sets of a nominal coverage did on tiles that their thresholds were not fitted on."""

    nominal: float
    measured: Estimate
    set_size: Estimate
    per_class: dict[int, Estimate]  # of the classes that are present


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    shares: Floats = special.softmax(logits.astype(np.float64) / temperature, axis=1)
    return shares


# -- temperature ---------------------------------------------------------------------------------------------------


def fit_temperature(logits: Floats, targets: Ints, groups: Groups | None = None) -> Temperature:
    """The temperature of least NLL, if what it gains is more than chance: its bootstrap standard error."""
    groups = np.arange(len(targets)) if groups is None else groups
    best = search_temperature(logits, targets)
    before = surprise(softmax(logits), targets)
    after = surprise(softmax(logits, best), targets)

    gain = float((before - after).mean())
    error = float(resample({"gain": weighted_mean(before - after)}, groups, RESAMPLES, seed=0)["gain"].std())
    reason = judge_temperature(best, gain, error, bool((logits.argmax(axis=1) == targets).all()))
    accepted = reason.startswith("accepted")
    return Temperature(
        value=best if accepted else 1.0,
        nll_before=float(before.mean()),
        nll_after=float(after.mean()),
        n=count_groups(groups),
        accepted=accepted,
        reason=reason,
    )


def cross_temperatures(logits: Floats, targets: Ints, folds: NDArray[Any], groups: Groups) -> Floats:
    """For each row the temperature of the rows that share no group with its fold: no tile, or no slide."""
    temperatures = np.ones(len(targets))
    for fold in np.unique(folds):
        judged = folds == fold
        rest = ~np.isin(groups, groups[judged])
        temperatures[judged] = fit_temperature(logits[rest], targets[rest], groups[rest]).value
    return temperatures


def judge_temperature(best: float, gain: float, error: float, all_right: bool) -> str:
    if all_right:
        return "refused: every answer is right, so the NLL falls without end towards boundless certainty"
    if not TEMPERATURES[0] * 1.01 < best < TEMPERATURES[1] / 1.01:
        return f"refused: the best temperature, {best:.2f}, lies at the edge of what is searched, {TEMPERATURES}"
    gains = f"temperature {best:.3f} lowers the NLL by {gain:.4f}, with a standard error of {error:.4f}"
    return f"accepted: {gains}" if gain > error else f"refused: {gains}"


def search_temperature(logits: Floats, targets: Ints) -> float:
    """Over the logarithm: the NLL is convex in 1/T, so it has one valley."""

    def nll(log_temperature: float) -> float:
        return float(surprise(softmax(logits, math.exp(log_temperature)), targets).mean())

    bounds = tuple(map(math.log, TEMPERATURES))
    best = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(best.x)


# -- conformal sets ------------------------------------------------------------------------------------------------


def max_coverage(n: int) -> float:
    """n scores cut the line into n + 1 parts that a new one falls into equally often; the last has no end."""
    return n / (n + 1)


def fit_conformal(
    probabilities: Floats,
    targets: Ints,
    coverages: Sequence[float],
    tiles: Groups | None = None,
) -> Thresholds:
    """Split conformal thresholds of the score 1 - p(truth) (Sadinle et al. 2019), per class where it has enough tiles.

    The guarantee holds for new tiles like these under this very model. Refitted on all tiles, or taken to another
    laboratory, it is an experience and no longer a guarantee. `tiles` names the tile of each row where tiles were
    predicted repeatedly: n counts tiles, not rows.
    """
    tiles = np.arange(len(targets)) if tiles is None else tiles
    n, n_classes = count_groups(tiles), probabilities.shape[1]
    coverages = sorted(coverages)
    if not 0 < coverages[0] <= coverages[-1] <= max_coverage(n):
        raise TooFewForCoverage(
            f"coverages {coverages} were asked for; {n} tiles allow what is above 0 and at most {max_coverage(n):.3f}"
        )
    scores = 1 - probabilities[np.arange(len(targets)), targets].astype(np.float64)
    tiles_of_class = [count_groups(tiles[targets == c]) for c in range(n_classes)]

    values = np.zeros((len(coverages), n_classes))
    for row, coverage in enumerate(coverages):
        for classes in partition(tiles_of_class, coverage):
            chosen = np.isin(targets, classes)
            values[row, classes] = threshold(scores[chosen], coverage, count_groups(tiles[chosen]))
    # A set never shrinks when more coverage is asked for, although the classes may be pooled otherwise then.
    values = np.maximum.accumulate(values, axis=0)
    return Thresholds(tuple(coverages), np.clip(values, 0, 1), n, max_coverage(n))


def partition(tiles_of_class: Sequence[int], coverage: float) -> list[list[int]]:
    """Classes with enough tiles alone; the others together, joined by the next rarest until they have enough.

    So every class keeps a guarantee, its own or that of the pool. The threshold of all tiles would give the rare
    classes none, and together with the own ones of the others not even one on average.
    """
    rarest_first = sorted(range(len(tiles_of_class)), key=lambda c: tiles_of_class[c])
    pool = [c for c in rarest_first if max_coverage(tiles_of_class[c]) < coverage]
    alone = rarest_first[len(pool) :]
    while pool and alone and max_coverage(sum(tiles_of_class[c] for c in pool)) < coverage:
        pool.append(alone.pop(0))
    return [[c] for c in alone] + ([pool] if pool else [])


def threshold(scores: Floats, coverage: float, n: int) -> float:
    """The ceil((n + 1) coverage) / n quantile, n being the tiles; of their repeated scores each counts alike."""
    rank = math.ceil((n + 1) * coverage - 1e-9)  # 1e-9: rounding must not ask for one rank more
    place = math.ceil(rank / n * len(scores) - 1e-9)
    return float(np.sort(scores)[place - 1])


def prediction_sets(probabilities: Floats, thresholds: Floats) -> NDArray[np.bool_]:
    """Membership (N, K) for thresholds (K,). The top class is always in: no set is empty."""
    members = 1 - probabilities.astype(np.float64) <= thresholds
    members[np.arange(len(members)), probabilities.argmax(axis=1)] = True
    return members


def measure_coverage(
    probabilities: Floats,
    targets: Ints,
    folds: NDArray[Any],
    coverages: Sequence[float],
    tiles: Groups | None = None,
    groups: Groups | None = None,
) -> tuple[Coverage, ...]:
    """Each fold is judged by thresholds from rows that share no group with it: no tile, or no slide.

    `groups` are the tiles by default. Given the slides, the folds must not cut through them, or little is left to fit.
    """
    tiles = np.arange(len(targets)) if tiles is None else tiles
    groups = tiles if groups is None else groups
    coverages = sorted(coverages)
    sets = np.zeros((len(coverages), *probabilities.shape), dtype=bool)  # (coverages, N, K)
    for fold in np.unique(folds):
        judged = folds == fold
        rest = ~np.isin(groups, groups[judged])
        thresholds = fit_conformal(probabilities[rest], targets[rest], coverages, tiles[rest])
        sets[:, judged] = [prediction_sets(probabilities[judged], row) for row in thresholds.values]
    return tuple(
        judge_sets(coverage, members, targets, groups) for coverage, members in zip(coverages, sets, strict=True)
    )


def judge_sets(nominal: float, members: NDArray[np.bool_], targets: Ints, groups: Groups) -> Coverage:
    holds_truth = members[np.arange(len(targets)), targets].astype(np.float64)
    present = np.unique(targets)
    of_class = (targets[:, None] == present).astype(np.float64)  # (N, present)

    def holds_by_class(weights: Floats) -> Floats:
        return divide(weights @ (of_class * holds_truth[:, None]), weights @ of_class)

    intervals = bootstrap(
        {
            "measured": weighted_mean(holds_truth),
            "set_size": weighted_mean(members.sum(axis=1)),
            "per_class": holds_by_class,
        },
        groups,
        resamples=RESAMPLES,
        seed=0,
    )
    per_class = {
        int(c): intervals["per_class"].at(place, groups[targets == c]).proportion() for place, c in enumerate(present)
    }
    set_size = intervals["set_size"].within(1, members.shape[1])
    return Coverage(nominal, intervals["measured"].proportion(), set_size, per_class)
