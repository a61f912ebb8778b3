"""A run's folder, from its config to its artefact: what the commands `fit`, `cv` and `export` do.

`runs/<name>/` holds config.json, latest.pt, curve.csv and .png, folds/ with out-of-fold logits, artifact/.
"""

import colorsys
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
from numpy.typing import NDArray

from model.artifact import Manifest, Metric, TissueClass, digest
from model.network import Network, build
from training import checkpoint, figures
from training.calibrate import softmax
from training.config import BadConfig, Card, Fit, Pretrain
from training.data import load_images, name_slides, unlabelled_images
from training.export import export, refuse_other_folder
from training.findings import (
    Answers,
    Findings,
    add_reference,
    answers_of_folds,
    answers_of_held_out,
    derive_findings,
    unmeasured,
)
from training.fit import TileSet, fit_tiles, measure_distances, predict, predict_with_features, read_tiles
from training.folds import Grouping, OutOfFold, cross_validate, make_folds, split
from training.gate import Appearance, count_versions, measure_appearance
from training.metrics import reliability, risk_coverage, score
from training.train import best_device

log = logging.getLogger(__name__)

MOST_CHECK_TILES = 3000  # more would make the checks longer, not sharper
# Keys of a config that change nothing in what was learnt; and those that don't matter to folds.
IGNORED_BY_FITS = frozenset({"card", "repeats", "groupings"})
IGNORED_BY_FOLDS = IGNORED_BY_FITS | {"split"}


class UnfinishedRun(ValueError):
    pass


def fit_and_export(config: Fit, folder: Path) -> Manifest:
    tiles = read_tiles(config)
    refuse_other_settings(folder, config, tiles)
    if config.split == "all":  # before hours of training, as the figures come from these folds
        refuse_other_settings(folder / "folds", config, tiles, IGNORED_BY_FOLDS)
    train, parts = split(tiles, config)
    claim(folder, config, tiles)
    fit_tiles(config, train, folder, next(iter(parts.values()), None))
    figures.draw_curves(folder / "curve.csv", folder / "curve.png", config.name)
    return export_run(config, tiles, folder, folder / "artifact")


def claim(
    folder: Path, config: Fit | Pretrain, tiles: TileSet | None = None, ignored: frozenset[str] = IGNORED_BY_FITS
) -> None:
    """Writes the settings into the folder. After all other checks, for a refused run must leave no claim, and before
    the first checkpoint.
    """
    refuse_other_settings(folder, config, tiles, ignored)
    if config.init is not None and not config.init.exists():
        raise BadConfig(f"init is {config.init}, and there is no such file")
    path = folder / "config.json"
    if not path.exists():
        content = json.dumps(describe_settings(config, tiles, ignored), indent=2)
        checkpoint.write_atomically(path, lambda file: file.write(content.encode()))


def refuse_other_settings(
    folder: Path, config: Fit | Pretrain, tiles: TileSet | None = None, ignored: frozenset[str] = IGNORED_BY_FITS
) -> None:
    """A folder belongs to one config, its tiles and the weights it starts from: with others two runs would mix."""
    path = folder / "config.json"
    if not path.exists():
        return
    content, before = describe_settings(config, tiles, ignored), read_settings(path)
    if changed := sorted(key for key in content.keys() | before.keys() if content.get(key) != before.get(key)):
        kept = f" but {folder}/folds" if (folder / "folds").exists() else ""
        raise BadConfig(
            f"{' and '.join(changed)} changed since {folder} was begun; "
            f"give this run another name, or remove all that is in it{kept}"
        )


def read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise BadConfig(
            f"{path} tells what {path.parent} was begun with, and is no JSON ({error}): "
            "give this run another name, or remove that folder"
        ) from error
    return settings


def is_finished(weights: Path) -> bool:
    """False for what isn't there yet, and for the checkpoint of a run that has steps to go."""
    settings = weights.with_name("config.json")
    if weights.name != "latest.pt" or not (weights.exists() and settings.exists()):
        return weights.exists()
    steps: int = read_settings(settings)["optimisation"]["steps"]
    return bool(checkpoint.load(weights)["step"] >= steps)


def describe_settings(
    config: Fit | Pretrain, tiles: TileSet | None = None, ignored: frozenset[str] = IGNORED_BY_FITS
) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.model_dump_json(exclude=set(ignored)))
    if config.init is not None and config.init.exists():
        content["weights"] = digest(config.init)
    if tiles is not None:
        content["tiles"] = tiles.digest
    return content


def cross_validate_and_keep(config: Fit, folder: Path, tell: Callable[[str], None]) -> list[Metric]:
    tiles = read_tiles(config)
    refuse_other_settings(folder / "folds", config, tiles, IGNORED_BY_FOLDS)
    groupings: list[Grouping] = config.groupings
    if "random" in groupings and len(name_slides(tiles.records)) < 2:
        log.warning("no slides are left out, as the tiles name fewer than two: data.table can name them")
        groupings = ["random"]
    for grouping in groupings:
        make_folds(tiles, config, grouping, 1)  # refuses too few images or slides, before anything is learnt
    claim(folder / "folds", config, tiles, IGNORED_BY_FOLDS)
    for grouping in groupings:
        folds = cross_validate(config, tiles, folder / "folds", grouping, tell)
        keep_folds(folds, folder / "folds" / f"{grouping}.npz")
    parts = kept_answers(config, folder, tiles)
    findings = derive_findings(parts, tiles.classes)
    (folder / "folds" / "metrics.json").write_text(json.dumps([vars(m) for m in findings.metrics], indent=2))
    for part in parts:
        draw_figures(
            part, findings.calibration.temperature, tiles.classes, folder / "folds" / re.sub(r"\W+", "-", part.protocol)
        )
    return findings.metrics


def draw_figures(answers: Answers, temperature: float, classes: list[str], folder: Path) -> None:
    """What was confused with what, what confidence is worth, and the network beside the baselines without one."""
    folder.mkdir(exist_ok=True)
    probabilities = softmax(answers.logits, temperature)
    scores = score(probabilities, answers.targets, classes, answers.groups)
    (folder / "scores.json").write_text(json.dumps(scores.as_dict(), indent=2))
    figures.draw_confusion(scores, folder / "confusion.png", answers.protocol)
    bars = reliability(probabilities, answers.targets, groups=answers.groups)
    figures.draw_reliability(bars, scores.ece, folder / "reliability.png", answers.protocol)
    curve = risk_coverage(probabilities.max(axis=1), probabilities.argmax(axis=1) == answers.targets)
    figures.draw_risk_coverage(curve, folder / "risk-coverage.png", answers.protocol)
    floors = {
        name: score(floor, answers.targets, classes, answers.groups).accuracy for name, floor in answers.floors.items()
    }
    figures.draw_comparison({"network": scores.accuracy, **floors}, folder / "comparison.png", answers.protocol)


def keep_folds(folds: OutOfFold, path: Path) -> None:
    def write(file: BinaryIO) -> None:
        assert folds.distances is not None  # cross_validate measures them
        np.savez(file, logits=folds.logits, folds=folds.folds, distances=folds.distances)

    checkpoint.write_atomically(path, write)


def kept_answers(config: Fit, folder: Path, tiles: TileSet) -> list[Answers]:
    """What `cv` left, if it was run on these very tiles, with these settings."""
    if not (folder / "folds" / "config.json").exists():
        return []
    refuse_other_settings(folder / "folds", config, tiles, IGNORED_BY_FOLDS)
    answers: list[Answers] = []
    appearance: Appearance | None = None
    for grouping in get_args(Grouping):
        path = folder / "folds" / f"{grouping}.npz"
        if not path.exists():
            continue
        with np.load(path) as kept:
            folds = OutOfFold(grouping, tiles, kept["logits"], kept["folds"], kept["distances"])
        appearance = appearance or measure_appearance(tiles.tiles, count_versions(len(tiles.targets)))
        answers += answers_of_folds(folds, config.data.doubtful, appearance)
    return answers


def export_run(config: Fit, tiles: TileSet, folder: Path, target: Path) -> Manifest:
    refuse_other_folder(target)  # before the minutes that measuring takes
    refuse_other_settings(folder, config, tiles)
    state = checkpoint.load(folder / "latest.pt")
    if state["step"] < config.optimisation.steps:
        raise UnfinishedRun(
            f"{folder} stopped at step {state['step']} of {config.optimisation.steps}: "
            "`tissue-train fit` with the same config goes on with it, and exports it"
        )
    net = build(config.model, len(tiles.classes))
    net.load_state_dict(state["weights"])
    net = net.to(best_device())
    log.info("judging it, and baselines without a network, on what was held out")
    findings = collect_findings(config, folder, tiles, net)
    log.info("writing the artefact, and comparing its graphs with the network: minutes")
    card = complete_card(config.card, tiles.classes)
    return export(net, config.name, card, findings, config.data.tile_mpp, choose_check_tiles(config, tiles), target)


def collect_findings(config: Fit, folder: Path, tiles: TileSet, net: Network) -> Findings:
    """From the parts that the run held out; else from its folds; else nothing is known."""
    train, parts = split(tiles, config)
    if parts and (folder / "folds").exists():
        log.warning('the folds in %s are not used: with split = "all" the figures would come from them', folder)
    answers = [judge_part(protocol, train, part, net) for protocol, part in parts.items()]
    answers = answers or kept_answers(config, folder, tiles)
    if not answers:
        log.warning("nothing was held out: the artefact tells no figures and no sets; run cv, then fit again")
    findings = derive_findings(answers, tiles.classes) if answers else unmeasured(tiles)
    return add_reference(findings, train, predict_with_features(net, train.tiles)[1])


def judge_part(protocol: str, train: TileSet, part: TileSet, net: Network) -> Answers:
    distances = measure_distances(net, train.tiles, part.tiles, count_versions(len(part.targets)))
    return answers_of_held_out(train, part, predict(net, part.tiles), distances, protocol)


def complete_card(card: Card, classes: list[str]) -> Card:
    """Classes that nobody described get their folders' names and a colour each."""
    if not card.classes:
        return card.model_copy(
            update={"classes": [describe_class(i, len(classes), name) for i, name in enumerate(classes)]}
        )
    if [c.name for c in card.classes] != classes:
        raise BadConfig(
            f"card.classes are {[c.name for c in card.classes]}, the tiles' are {classes}: same order needed"
        )
    return card


def describe_class(i: int, n: int, name: str) -> TissueClass:
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(i / n, 0.45, 0.6))
    return TissueClass(name=name, description=name, color=f"#{red:02x}{green:02x}{blue:02x}")


def choose_check_tiles(config: Fit, tiles: TileSet) -> NDArray[np.uint8]:
    """The labelled tiles, and all images of the card's own folder, cut to the tile's size in the middle."""
    if config.card.check_tiles is None:
        return tiles.tiles[:: math.ceil(len(tiles.tiles) / MOST_CHECK_TILES)]
    mpp = config.data.tile_mpp
    extra = load_images(unlabelled_images(config.card.check_tiles), config.model.tile_px, mpp, mpp)
    return np.concatenate([tiles.tiles, extra])
