"""What answers on tiles that the network never saw say about it: temperature, sets, limits, and every metric.

Logits of a held-out part or of folds enter; the findings leave, as the manifest carries them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.artifact import Calibration, Conformal, Gate, Metric
from model.scope import Reference
from training.calibrate import (
    cross_temperatures,
    fit_conformal,
    fit_temperature,
    max_coverage,
    measure_coverage,
    prediction_sets,
    softmax,
)
from training.data import group_by_slide
from training.fit import Distances, TileSet
from training.floors import floor_features, floor_predictions
from training.folds import OutOfFold
from training.gate import (
    Appearance,
    Signs,
    count_versions,
    cross_fit,
    fit_gate,
    learn_cloud,
    learn_palette,
    measure_appearance,
    signs_of_folds,
    signs_of_held_out,
    signs_without_network,
    verdicts,
)
from training.metrics import (
    BINS,
    Estimate,
    Floats,
    Measure,
    Scores,
    bootstrap,
    calibration_error,
    chance_error,
    mean_of,
    paired_difference,
    reliability,
    risk_coverage,
    score,
    squared_error,
    weighted_mean,
)

COVERAGES = tuple(round(0.5 + 0.01 * step, 2) for step in range(50))  # what may be asked for, where n allows
DEFAULT_COVERAGE = 0.9
JUDGED_COVERAGES = (0.8, DEFAULT_COVERAGE, 0.95)
ANSWERED = (0.5, 0.8, 0.9)  # shares of the tiles, the surest first, for which the error is told
CHANCE_ERROR = "ece expected of perfect confidences"


@dataclass(frozen=True)
class Answers:
    """Answers on unseen tiles, under one protocol; a tile may be answered several times."""

    protocol: str
    logits: NDArray[np.float32]  # (M, K)
    targets: NDArray[np.intp]  # (M,)
    tiles: NDArray[np.intp]  # (M,) the tile of each row
    groups: NDArray[np.intp]  # (M,) the tile, or the slide, of each row: what is drawn together
    folds: NDArray[np.intp]  # (M,) unique over the repeats
    floors: dict[str, NDArray[np.float64]]  # probabilities (M, K) of baselines without a network, on the same rows
    signs: Signs  # what the gate looks at, on the same rows
    source: str  # "random" or "slide" folds, or the protocol of a part held out; of a subset, that of the whole

    def subset(self, chosen: NDArray[np.bool_], protocol: str) -> "Answers":
        return replace(
            self,
            protocol=protocol,
            logits=self.logits[chosen],
            targets=self.targets[chosen],
            tiles=self.tiles[chosen],
            groups=self.groups[chosen],
            folds=self.folds[chosen],
            floors={name: probabilities[chosen] for name, probabilities in self.floors.items()},
            signs=self.signs.subset(chosen),
        )


@dataclass(frozen=True)
class Findings:
    calibration: Calibration
    conformal: Conformal | None
    gate: Gate
    metrics: list[Metric]
    reference: Reference | None = None  # of the network that is exported


def unmeasured(tiles: TileSet) -> Findings:
    """Of a network that was trained on everything, and of which no fold was ever run."""
    calibration = Calibration(temperature=1.0, n=0, protocol="none: nothing was held out")
    appearance = measure_appearance(tiles.tiles, count_versions(len(tiles.targets)))
    gate = fit_gate(signs_without_network(appearance), None, "training tiles, no network asked")
    return Findings(calibration, None, gate.model_copy(update={"min_confidence": 0.5}), [])


def derive_findings(parts: Sequence[Answers], classes: Sequence[str]) -> Findings:
    """Sets and limits from the first part, metrics from each; the temperature from slides left out, where any were.

    Answers on tiles whose slide was learnt are right more often than those on a new slide, and would make the network
    surer than it can be there: docs/decisions/0011.
    """
    main = parts[0]
    calibrating = next((part for part in parts if part.source == "slide"), main)
    temperature = fit_temperature(calibrating.logits, calibrating.targets, calibrating.groups)
    calibration = Calibration(
        temperature=temperature.value, n=temperature.n, protocol=f"{calibrating.protocol}; {temperature.reason}"
    )
    probabilities = softmax(main.logits, temperature.value)
    conformal = find_conformal(main, probabilities)
    gate = fit_gate(main.signs, probabilities.max(axis=1), main.protocol)
    metrics = []
    for part in parts:
        metrics += judge_answers(part, temperature.value, classes)
        if part.source != main.source:  # else sets and limits were fitted on these very answers
            metrics += judge_shipped_sets(part, temperature.value, conformal, main.protocol)
            if part.source != "slide":  # slides left out show the very pictures that the limits were fitted on
                metrics += judge_shipped_gate(part, temperature.value, gate, main.protocol)
    return Findings(calibration, conformal, gate, metrics)


def add_reference(findings: Findings, tiles: TileSet, features: NDArray[np.float32]) -> Findings:
    """With the reference of the network that is exported: the colours and features (N, D) of the tiles it learnt from.

    The limits on them come from the folds, whose networks had references of their own, learnt in the same way.
    """
    palette = learn_palette(measure_appearance(tiles.tiles, count_versions(len(tiles.targets))).colours)
    return replace(findings, reference=Reference(palette, learn_cloud(features)))


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


# -- metrics -------------------------------------------------------------------------------------------------------


def judge_answers(answers: Answers, temperature: float, classes: Sequence[str]) -> list[Metric]:
    """The network's metrics; beside them the floors' accuracy, and what calibration, sets and gate are worth."""
    probabilities = softmax(answers.logits, temperature)
    metrics = name_metrics(score(probabilities, answers.targets, classes, answers.groups), answers.protocol)
    metrics.append(name_metric(CHANCE_ERROR, chance_error(probabilities, answers.tiles), answers.protocol))
    right = probabilities.argmax(axis=1) == answers.targets
    for name, floor in answers.floors.items():
        accuracy = score(floor, answers.targets, classes, answers.groups).accuracy
        above = paired_difference(right, floor.argmax(axis=1) == answers.targets, answers.groups)
        metrics.append(name_metric(f"accuracy of {name}", accuracy, answers.protocol))
        metrics.append(name_metric(f"accuracy above {name}, paired", above, answers.protocol))
    metrics += judge_confidence(answers, probabilities)
    if len(np.unique(answers.folds)) > 1:
        metrics += judge_calibration(answers)
        ok = cross_fit(answers.signs, probabilities.max(axis=1), answers.folds, answers.groups)
        metrics += judge_gate(answers, probabilities, ok, "limits of the other folds")
        metrics += judge_sets(answers, probabilities, classes)
    return metrics


def judge_confidence(answers: Answers, probabilities: NDArray[np.floating]) -> list[Metric]:
    """The bins of the reliability diagram, and the error among the surest answers."""
    correct = probabilities.argmax(axis=1) == answers.targets
    confidence = probabilities.max(axis=1)
    metrics = []
    bars = reliability(probabilities, answers.targets, groups=answers.groups)
    for place, promised in enumerate(bars.confidence):
        estimate = Estimate(bars.accuracy[place], bars.low[place], bars.high[place], int(bars.count[place]))
        name = f"accuracy of bin {place + 1} of {len(bars.confidence)}, mean confidence {promised:.3f}"
        metrics.append(name_metric(name, estimate, f"{answers.protocol}; n counts answers"))
    surest_first = (-confidence).argsort(kind="stable")
    for share in ANSWERED:
        kept = surest_first[: max(1, round(share * len(confidence)))]
        error = mean_of(~correct[kept], answers.groups[kept]).proportion()
        metrics.append(name_metric(f"error of the surest {share:.0%} of the answers", error, answers.protocol))
    area = bootstrap({"area": area_under_risk(confidence, correct)}, answers.groups, 200, 0)["area"].proportion()
    return [*metrics, name_metric("area under risk and coverage", area, answers.protocol)]


def area_under_risk(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> Measure:
    """Rows that are drawn several times stand side by side; those that aren't drawn are left out."""

    def measure(weights: Floats) -> Floats:
        drawn = (np.repeat(np.arange(len(correct)), row.astype(np.intp)) for row in weights)
        return np.array([risk_coverage(confidence[rows], correct[rows]).aurc for rows in drawn])

    return measure


def judge_calibration(answers: Answers) -> list[Metric]:
    """What a temperature does for folds that it wasn't fitted on."""
    before = softmax(answers.logits)
    temperatures = cross_temperatures(answers.logits, answers.targets, answers.folds, answers.groups)
    after = softmax(answers.logits / temperatures[:, None])
    ece_before = calibration_error(before, answers.targets, BINS)
    ece_after = calibration_error(after, answers.targets, BINS)
    brier = squared_error(after, answers.targets)
    measures = {
        "ece before temperature": ece_before,
        "ece after temperature": ece_after,
        "change of ece by temperature": lambda weights: ece_after(weights) - ece_before(weights),
        "brier after temperature": weighted_mean(brier),
        "change of brier by temperature": weighted_mean(brier - squared_error(before, answers.targets)),
    }
    intervals = bootstrap(measures, answers.groups, 1000, 0)
    protocol = f"{answers.protocol}; temperature of the other folds, {BINS} bins of equal mass"
    return [name_metric(name, interval.estimate(), protocol) for name, interval in intervals.items()]


def judge_gate(
    answers: Answers, probabilities: NDArray[np.floating], ok: NDArray[np.bool_], limits: str
) -> list[Metric]:
    correct = probabilities.argmax(axis=1) == answers.targets
    protocol = f"{answers.protocol}; {limits}"
    metrics = [name_metric("share answered ok", mean_of(ok, answers.groups).proportion(), protocol)]
    for name, chosen in (("ok", ok), ("not ok", ~ok)):
        if chosen.any():
            accuracy = mean_of(correct[chosen], answers.groups[chosen]).proportion()
            metrics.append(name_metric(f"accuracy of the answers that are {name}", accuracy, protocol))
    return metrics


def judge_sets(answers: Answers, probabilities: NDArray[np.floating], classes: Sequence[str]) -> list[Metric]:
    """On each fold with thresholds of the others, for the coverages that they have enough tiles for."""
    sizes = np.unique(answers.folds, return_counts=True)[1]
    n = len(np.unique(answers.tiles)) - sizes.max()
    wanted = [coverage for coverage in JUDGED_COVERAGES if coverage <= max_coverage(n)]
    if not wanted:
        return []
    protocol = f"{answers.protocol}; thresholds of the other folds"
    metrics = []
    rows = (answers.targets, answers.folds, wanted, answers.tiles, answers.groups)
    for coverage in measure_coverage(probabilities, *rows):
        nominal = f"at nominal {coverage.nominal:g}"
        metrics += [
            name_metric(f"coverage of the sets {nominal}", coverage.measured, protocol),
            name_metric(f"size of the sets {nominal}", coverage.set_size, protocol),
        ]
        if coverage.nominal == DEFAULT_COVERAGE:
            metrics += [
                name_metric(f"coverage of the sets {nominal}, {classes[place]}", estimate, protocol)
                for place, estimate in coverage.per_class.items()
            ]
    return metrics


def judge_shipped_sets(
    answers: Answers, temperature: float, conformal: Conformal | None, fitted_on: str
) -> list[Metric]:
    """How often the shipped sets hold the truth of answers they were not fitted on; the tiles may be the same."""
    if conformal is None:
        return []
    probabilities = softmax(answers.logits, temperature)
    thresholds = np.array(conformal.thresholds[conformal.coverages.index(conformal.default)])
    holds = prediction_sets(probabilities, thresholds)[np.arange(len(answers.targets)), answers.targets]
    name = f"coverage of the sets at nominal {conformal.default:g}"
    protocol = f"{answers.protocol}; the shipped thresholds, of {fitted_on}"
    return [name_metric(name, mean_of(holds, answers.groups).proportion(), protocol)]


def judge_shipped_gate(answers: Answers, temperature: float, gate: Gate, fitted_on: str) -> list[Metric]:
    """How much the shipped limits let through of tiles that they were not fitted on."""
    probabilities = softmax(answers.logits, temperature)
    ok = np.array(verdicts(answers.signs, probabilities.max(axis=1), gate)) == "ok"
    return judge_gate(answers, probabilities, ok, f"the shipped limits, of {fitted_on}")


def name_metric(name: str, estimate: Estimate, protocol: str) -> Metric:
    return Metric(name=name, protocol=protocol, **vars(estimate))


def name_metrics(scores: Scores, protocol: str) -> list[Metric]:
    return [name_metric(name, estimate, protocol) for name, estimate in scores.pairs()]


# -- where answers come from ---------------------------------------------------------------------------------------


def answers_of_folds(folds: OutOfFold, doubtful: Sequence[str], appearance: Appearance | None = None) -> list[Answers]:
    """All tiles under the protocol's name; and without those of doubtful quality, where there are any."""
    seen = folds.folds >= 0  # (R, N)
    repeats, n = seen.shape
    tile = np.broadcast_to(np.arange(n), seen.shape)
    slide = group_by_slide(folds.tiles.records)[tile]
    targets = folds.tiles.targets[tile]
    n_folds = folds.folds.max() + 1
    fold = np.arange(repeats)[:, None] * n_folds + folds.folds
    if folds.grouping == "random":
        protocol, groups = f"{repeats} x {n_folds} random folds, all tiles", tile
    else:
        protocol, groups = f"leave one of {n_folds} slides out, all tiles of known slide", slide
    everything = Answers(
        protocol,
        folds.logits[seen],
        targets[seen],
        tile[seen],
        groups[seen],
        fold[seen],
        fold_floors(folds),
        signs_of_folds(
            appearance or measure_appearance(folds.tiles.tiles, count_versions(n)), folds.folds, folds.distances
        ),
        folds.grouping,
    )
    quality = np.array([record.quality or "" for record in folds.tiles.records])[tile[seen]]
    parts = [everything]
    if np.isin(quality, doubtful).any():
        parts.append(everything.subset(~np.isin(quality, doubtful), f"{protocol} but {', '.join(doubtful)}"))
    return parts


def fold_floors(folds: OutOfFold) -> dict[str, NDArray[np.float64]]:
    """Probabilities of the baselines without a network, trained and tried on the very same folds: a row an answer."""
    features, targets = floor_features(folds.tiles.tiles), folds.tiles.targets
    k = len(folds.tiles.classes)
    floors: dict[str, NDArray[np.float64]] = {}
    for repeat, fold_of in enumerate(folds.folds):
        for number in range(fold_of.max() + 1):
            held_out, others = np.flatnonzero(fold_of == number), np.flatnonzero((fold_of >= 0) & (fold_of != number))
            answers = floor_predictions(features.subset(others), targets[others], features.subset(held_out), k)
            for name, p in answers.items():
                floors.setdefault(name, np.zeros((*folds.folds.shape, k)))[repeat, held_out] = p
    return {name: probabilities[folds.folds >= 0] for name, probabilities in floors.items()}


def answers_of_held_out(
    train: TileSet, held_out: TileSet, logits: NDArray[np.float32], distances: Distances, protocol: str
) -> Answers:
    n = len(held_out.targets)
    known, unseen = floor_features(train.tiles), floor_features(held_out.tiles)
    floors = floor_predictions(known, train.targets, unseen, len(train.classes))
    palette = learn_palette(measure_appearance(train.tiles, count_versions(len(train.targets))).colours)
    signs = signs_of_held_out(measure_appearance(held_out.tiles, len(distances)), palette, distances)
    each = np.arange(n)
    return Answers(protocol, logits, held_out.targets, each, each, np.zeros(n, np.intp), floors, signs, protocol)
