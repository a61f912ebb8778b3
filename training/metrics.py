"""How good predictions are: each number with a 95 % interval from a bootstrap over tiles, or over slides.

Probabilities and true classes enter; estimates leave, ready for JSON, with the curves that the figures draw.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm as normal
from scipy.stats import t as student_t

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Groups = NDArray[Any]  # (N,) one name per row; rows of one name are drawn together
Measure = Callable[[Floats], Floats]  # how often each row counts (R, N) -> a number, or several, per resample (R, ...)

SMALLEST_PROBABILITY = 1e-12  # a softmax in float32 can reach zero, whose logarithm would outweigh all other tiles
BINS = 5  # of equal mass, for the calibration: a tenth of some hundred tiles says little
RESAMPLES = 1000  # of a bootstrap
CHANCE_DRAWS = 200
WEIGHTS_AT_ONCE = 2**20  # 8 MiB of them
RARE = 0.025  # what lies beyond either end of a 95 % interval


class Unscorable(ValueError):
    """The predictions don't fit the targets, or are none."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; n counts what the interval rests on: the tiles, or the slides, drawn again."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Confusion:
    """Rows are the true classes, columns the predicted ones."""

    counts: Ints  # (K, K)
    low: Floats  # (K, K)
    high: Floats  # (K, K)


@dataclass(frozen=True)
class Scores:
    classes: tuple[str, ...]
    predictions: int  # rows; more than n where a tile was predicted repeatedly, or slides were drawn
    n: int
    accuracy: Estimate
    macro_f1: Estimate  # over the classes that are present
    macro_auroc: Estimate | None  # one against the rest; None where only one class is present
    nll: Estimate
    brier: Estimate  # summed over the classes: 0 to 2
    ece: Estimate  # biased upwards where n is small, as noise in a bin counts as error: compare `chance_error`
    recall: dict[str, Estimate]  # of the classes that are present
    confusion: Confusion

    def pairs(self) -> Iterator[tuple[str, Estimate]]:
        for name in ("accuracy", "macro_f1", "macro_auroc", "nll", "brier", "ece"):
            if (estimate := getattr(self, name)) is not None:
                yield name, estimate
        for label, estimate in self.recall.items():
            yield f"recall {label}", estimate

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, as JSON takes them."""
        confusion = {name: matrix.tolist() for name, matrix in asdict(self.confusion).items()}
        return asdict(self) | {"classes": list(self.classes), "confusion": confusion}


@dataclass(frozen=True)
class Reliability:
    """What was promised and what came true, in bins of equal mass by confidence."""

    confidence: Floats  # (B,)
    accuracy: Floats  # (B,)
    low: Floats  # (B,)
    high: Floats  # (B,)
    count: Ints  # (B,)


@dataclass(frozen=True)
class RiskCoverage:
    """The error among the answers that remain when the least confident ones are withheld."""

    coverage: Floats  # (N,) ascending
    risk: Floats  # (N,)
    aurc: float


def score(
    probabilities: Floats,
    targets: Ints,
    classes: Sequence[str],
    groups: Groups | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bins: int = BINS,
) -> Scores:
    """`groups` names the slide of each row, or its tile where tiles were predicted repeatedly.

    Rows of unknown slide need a name each: one name for all would make them one slide.
    """
    check_fit(probabilities, targets, classes)
    groups = np.arange(len(targets)) if groups is None else groups
    probabilities = probabilities.astype(np.float64)
    predicted = probabilities.argmax(axis=1)
    present = np.unique(targets)

    measures = {
        "accuracy": weighted_mean(predicted == targets),
        "macro_f1": macro_f1(predicted, targets, len(classes)),
        "nll": weighted_mean(surprise(probabilities, targets)),
        "brier": weighted_mean(squared_error(probabilities, targets)),
        "ece": calibration_error(probabilities, targets, bins),
        "recall": recalls(predicted, targets, len(classes), present),
        "confusion": confusion_counts(predicted, targets, len(classes)),
    }
    if len(present) > 1:
        measures["macro_auroc"] = macro_auroc(probabilities, targets, present)
    intervals = bootstrap(measures, groups, resamples, seed)
    confusion = intervals["confusion"]

    return Scores(
        classes=tuple(classes),
        predictions=len(targets),
        n=count_groups(groups),
        accuracy=intervals["accuracy"].proportion(),
        macro_f1=intervals["macro_f1"].proportion(),
        macro_auroc=intervals["macro_auroc"].proportion() if len(present) > 1 else None,
        nll=intervals["nll"].estimate(),
        brier=intervals["brier"].estimate(),
        ece=intervals["ece"].estimate(),
        recall={
            classes[c]: intervals["recall"].at(place, groups[targets == c]).proportion()
            for place, c in enumerate(present)
        },
        confusion=Confusion(confusion.value.astype(np.intp), confusion.low, confusion.high),
    )


def check_fit(probabilities: Floats, targets: Ints, classes: Sequence[str]) -> None:
    if len(targets) == 0 or probabilities.shape != (len(targets), len(classes)):
        raise Unscorable(
            f"probabilities of shape {probabilities.shape} came for {len(targets)} targets and {len(classes)} classes; "
            "one row per target, one column per class, and at least one row are needed"
        )
    if targets.min() < 0 or targets.max() >= len(classes):
        raise Unscorable(f"targets run from {targets.min()} to {targets.max()}, but there are {len(classes)} classes")
    if not np.isfinite(probabilities).all():
        raise Unscorable(f"{(~np.isfinite(probabilities)).any(axis=1).sum()} rows of probabilities are not finite")


def paired_difference(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    groups: Groups | None = None,
) -> Estimate:
    """By how much a is more often right than b, on the same tiles: both are drawn again together."""
    return mean_of(correct_a.astype(np.float64) - correct_b, groups).within(-1, 1)


def reliability(
    probabilities: Floats,
    targets: Ints,
    groups: Groups | None = None,
) -> Reliability:
    groups = np.arange(len(targets)) if groups is None else groups
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = (probabilities.argmax(axis=1) == targets).astype(np.float64)
    member = split_by_mass(confidence, BINS)  # (N, B)
    count = member.sum(axis=0)

    def accuracy(weights: Floats) -> Floats:
        return divide(weights @ (member * correct[:, None]), weights @ member)

    interval = bootstrap({"accuracy": accuracy}, groups, RESAMPLES, seed=0)["accuracy"]
    bars = [interval.at(b, groups[inside > 0]).proportion() for b, inside in enumerate(member.T)]
    return Reliability(
        confidence=confidence @ member / count,
        accuracy=np.array([bar.value for bar in bars]),
        low=np.array([bar.low for bar in bars]),
        high=np.array([bar.high for bar in bars]),
        count=count.astype(np.intp),
    )


def risk_coverage(confidence: Floats, correct: NDArray[np.bool_]) -> RiskCoverage:
    """Answers of equal confidence share their errors, so that the order of the rows doesn't matter."""
    _, level, count = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors_at = np.bincount(level, weights=~correct) / count
    kept = np.arange(1, len(correct) + 1)
    risk = np.cumsum(np.repeat(errors_at, count)) / kept
    return RiskCoverage(kept / len(correct), risk, float(risk.mean()))


# -- what can be measured under weights ----------------------------------------------------------------------------


def weighted_mean(values: NDArray[Any]) -> Measure:
    return lambda weights: weights @ values.astype(np.float64) / weights.sum(axis=1)


def surprise(probabilities: Floats, targets: Ints) -> Floats:
    of_truth = probabilities[np.arange(len(targets)), targets]
    return -np.log(np.maximum(of_truth, SMALLEST_PROBABILITY))


def squared_error(probabilities: Floats, targets: Ints) -> Floats:
    truth = np.eye(probabilities.shape[1])[targets]
    error: Floats = ((probabilities - truth) ** 2).sum(axis=1)
    return error


def confusion_counts(predicted: Ints, targets: Ints, n_classes: int) -> Measure:
    cells = np.eye(n_classes**2)[targets * n_classes + predicted]  # (N, K*K)
    return lambda weights: (weights @ cells).reshape(-1, n_classes, n_classes)


def recalls(predicted: Ints, targets: Ints, n_classes: int, present: Ints) -> Measure:
    counts_under = confusion_counts(predicted, targets, n_classes)

    def measure(weights: Floats) -> Floats:
        counts = counts_under(weights)[:, present]  # (R, present, K)
        return divide(counts[:, np.arange(len(present)), present], counts.sum(axis=2))

    return measure


def macro_f1(predicted: Ints, targets: Ints, n_classes: int) -> Measure:
    counts_under = confusion_counts(predicted, targets, n_classes)

    def measure(weights: Floats) -> Floats:
        counts = counts_under(weights)  # (R, K, K)
        true, named = counts.sum(axis=2), counts.sum(axis=1)  # (R, K)
        hits = np.diagonal(counts, axis1=1, axis2=2)
        return mean_of_defined(divide(2 * hits, np.where(true > 0, true + named, 0)))

    return measure


def macro_auroc(probabilities: Floats, targets: Ints, present: Ints) -> Measure:
    areas = [area_under_roc(probabilities[:, c], targets == c) for c in present]
    return lambda weights: mean_of_defined(np.stack([area(weights) for area in areas], axis=1))


def area_under_roc(scores: Floats, is_positive: NDArray[np.bool_]) -> Measure:
    """The share of pairs of a positive and a negative in which the positive scores higher; ties count half."""
    positive, negative = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
    negative = negative[np.argsort(scores[negative])]
    below = np.searchsorted(scores[negative], scores[positive], "left")
    up_to = np.searchsorted(scores[negative], scores[positive], "right")

    def measure(weights: Floats) -> Floats:
        mass = np.cumsum(weights[:, negative], axis=1)
        mass = np.pad(mass, ((0, 0), (1, 0)))  # (R, negatives + 1)
        beaten = (mass[:, below] + mass[:, up_to]) / 2  # (R, positives)
        own = weights[:, positive]
        return divide((own * beaten).sum(axis=1), own.sum(axis=1) * mass[:, -1])

    return measure


def calibration_error(probabilities: Floats, targets: Ints, bins: int) -> Measure:
    """The bins are those of the whole sample, in every resample."""
    confidence = probabilities.max(axis=1)
    gap = confidence - (probabilities.argmax(axis=1) == targets)
    gap_by_bin = split_by_mass(confidence, bins) * gap[:, None]  # (N, B)
    return lambda weights: np.abs(weights @ gap_by_bin).sum(axis=1) / weights.sum(axis=1)


def chance_error(probabilities: Floats, tiles: Groups) -> Estimate:
    """The calibration error that is left where every probability is true: labels are drawn from these.

    Noise counts as error, so it is above 0. The interval holds 95 % of the draws. All answers to one tile get their
    label from one number, as one tile has one truth.
    """
    names, tile_of_row = np.unique(tiles, return_inverse=True)
    up_to = probabilities.astype(np.float64).cumsum(axis=1)[:, :-1]  # (M, K - 1)
    rng = np.random.default_rng(0)
    whole = np.ones((1, len(probabilities)))
    errors = []
    for _ in range(CHANCE_DRAWS):
        labels = (rng.random(len(names))[tile_of_row, None] > up_to).sum(axis=1)
        errors.append(calibration_error(probabilities, labels, BINS)(whole)[0])
    low, high = np.quantile(errors, [RARE, 1 - RARE])
    return Estimate(float(np.mean(errors)), float(low), float(high), len(names))


def split_by_mass(confidence: Floats, bins: int) -> Floats:
    """Membership (N, B) in bins of about equal size; equal confidences stay together, so bins may be fewer."""
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    place = np.searchsorted(edges, confidence)
    member = np.eye(bins)[place]
    return member[:, member.any(axis=0)]


def divide(above: Floats, below: Floats) -> Floats:
    """Undefined (NaN) where a resample holds nothing to divide by."""
    quotient: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return quotient


def mean_of_defined(values: Floats) -> Floats:
    """Along the last axis."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1))


# -- bootstrap -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """What a measure gives on the whole sample, and the limits beyond which only the rarest of its draws lie."""

    value: Floats
    low: Floats
    high: Floats
    n: int  # the tiles, or the slides, that were drawn again

    def at(self, place: int, groups: Groups) -> "Interval":
        """One of several numbers, that rests on the rows of these groups alone."""
        return Interval(self.value[place], self.low[place], self.high[place], count_groups(groups))

    def estimate(self) -> Estimate:
        return Estimate(float(self.value), float(self.low), float(self.high), self.n)

    def proportion(self) -> Estimate:
        return self.within(0, 1)

    def within(self, least: float, most: float) -> Estimate:
        """Of what lies between these. Where every draw is the same, none of n was unlike the others. Of those not seen
        a share may still be, up to the exact binomial limit, and it may be as unlike as these bounds allow.
        """
        estimate = self.estimate()
        if estimate.low < estimate.high:
            return estimate
        unseen = 1 - RARE ** (1 / self.n)
        value = estimate.value
        return Estimate(value, value - unseen * (value - least), value + unseen * (most - value), self.n)


def mean_of(values: NDArray[Any], groups: Groups | None = None, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Ends in `.proportion()` for what is true or false, `.within()` for other limits, else in `.estimate()`."""
    groups = np.arange(len(values)) if groups is None else groups
    return bootstrap({"mean": weighted_mean(values)}, groups, resamples, seed)["mean"]


def bootstrap(measures: Mapping[str, Measure], groups: Groups, resamples: int, seed: int) -> dict[str, Interval]:
    draws = resample(measures, groups, resamples, seed)
    n = count_groups(groups)
    beyond = share_beyond(n)
    intervals = {}
    for name, measure in measures.items():
        value = measure(np.ones((1, len(groups))))[0]
        low, high = np.nanquantile(draws[name], [beyond, 1 - beyond], axis=0)
        # A biased measure, as the calibration error, may lie beyond its percentiles: they are stretched to hold it.
        intervals[name] = Interval(value, np.fmin(low, value), np.fmax(high, value), n)
    return intervals


def share_beyond(groups: int) -> float:
    """The share of draws that are left out at either end of an interval.

    Of few groups percentiles lie too near: draws spread by 1/G where the truth does by 1/(G-1), and Student's t reaches
    farther than the normal distribution. This is the expanded percentile interval (Hesterberg, arXiv 1411.5279).
    """
    if groups < 2:
        return RARE
    reach = student_t.ppf(1 - RARE, groups - 1) * math.sqrt(groups / (groups - 1))
    return float(normal.cdf(-reach))


def resample(measures: Mapping[str, Measure], groups: Groups, resamples: int, seed: int) -> dict[str, Floats]:
    """Each measure under every draw of as many groups as there are, with replacement: (resamples, ...)."""
    parts = [
        {name: measure(weights) for name, measure in measures.items()}
        for weights in draw_weights(groups, resamples, seed)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in measures}


def draw_weights(groups: Groups, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each row counts, (R, N), in portions that fit the memory."""
    names, group_of_row = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    portion = max(1, WEIGHTS_AT_ONCE // len(groups))
    for start in range(0, resamples, portion):
        size = min(portion, resamples - start)
        drawn = rng.integers(len(names), size=(size, len(names)))
        drawn += np.arange(size)[:, None] * len(names)  # each resample counts in places of its own
        counts = np.bincount(drawn.ravel(), minlength=size * len(names)).reshape(size, -1)
        yield counts[:, group_of_row].astype(np.float64)


def count_groups(groups: Groups) -> int:
    return len(np.unique(groups))
