"""Judges maps by what the network does, not by how they look, beside maps that no network drew.

    tissue-train judge-maps model/default --tiles data/slide_tiles --image-mpp 0.495 --unseen --folder runs/maps

Removal: patches are taken away in the order of the map; the sooner the answer falls, the better the order. Focus: of a
mosaic of two classes, how much of the map for one class lies on its own quarters. Beside them: whether a map depends
on the class it is asked for, and on what the network has learnt. All of it goes through the exported explain graph.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import onnx
from numpy.random import Generator
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

from model.artifact import MAP_METHODS, JudgedMaps, Manifest, MapMethod, MapScore, read_manifest, write_manifest
from model.occlusion import COARSE_GROUPS, cut_groups, fall_of_logits, mask_groups
from model.session import Classifier, Explanations, open_session
from training.augment import STAINS, density_of
from training.data import rows_of
from training.metrics import Groups, mean_of
from training.trial import Trial, choose_evenly

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Metric = Literal["removal", "focus", "other_class", "random_weights", "other_tile", "glands"]
Found = dict[tuple[str, Metric], list[float]]

NO_MODEL = ("random", "centre", "edge", "haematoxylin")
QUESTIONS: dict[Metric, str] = {
    "removal": "which patches the answer rests on",
    "focus": "which patches are of which class",
}
STEPS = 10  # tenths of the patches are taken away at a time
LEAST_SHARE = 0.05  # of the probability, by which a class of a mosaic counts as seen
LEAST_CONFIDENCE = 0.5  # of an answer that stands for a class that nobody knows
DEPENDENCE_TILES = 30  # rank correlations are steady, and shuffled weights cost another pass for every mask
MIXED = (0.2, 0.8)  # share of gland in a field that can tell maps apart
RESAMPLES = 2000


class Explainer(Protocol):
    """What is judged: a `model.session.Classifier`, or in tests anything that answers like one."""

    def explain(self, tiles: Pixels, keep: Bools | None = None) -> Explanations: ...


# -- maps ----------------------------------------------------------------------------------------------------------


def draw_model_maps(network: Explainer, tile: Pixels) -> dict[str, Floats]:
    """Each method's map for each class, (K, G, G), as the service gives them by default."""
    whole = network.explain(tile[None])
    k, grid = whole.evidence.shape[1:3]
    groups = cut_groups(grid, min(COARSE_GROUPS, grid**2))
    keeps = mask_groups(groups)
    left = network.explain(np.repeat(tile[None], len(keeps), axis=0), keeps)

    def for_every_class(agnostic: Floats) -> Floats:
        return np.broadcast_to(agnostic, (k, grid, grid))

    maps = {"evidence": whole.evidence[0], "occlusion": fall_of_logits(whole.logits[0], left.logits, groups)}
    if whole.attention.size == 0:  # nothing attends
        return maps
    attention = for_every_class(whole.attention[0, -1].mean(axis=0))
    return {"attention": attention, "rollout": for_every_class(whole.rollout[0])} | maps


def draw_no_model_maps(tile: Pixels, grid: int, rng: Generator) -> dict[str, Floats]:
    """(G, G) each: chance, the middle of the tile, contrast within a patch, and how much haematoxylin it holds."""
    from_middle = np.arange(grid) - (grid - 1) / 2
    distance = from_middle[:, None] ** 2 + from_middle[None, :] ** 2
    contrast = cut_into_patches(tile.mean(axis=2), grid).std(axis=2)
    haematoxylin = (density_of(tile) @ np.linalg.inv(STAINS.numpy().astype(np.float64)))[..., 0]
    return {
        "random": rng.random((grid, grid)),
        "centre": np.exp(-distance / (2 * (grid / 4) ** 2)),
        "edge": contrast,
        "haematoxylin": cut_into_patches(haematoxylin, grid).mean(axis=2),
    }


def cut_into_patches(image: Floats, grid: int) -> Floats:
    side = len(image) // grid
    return image.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid, grid, side * side)


# -- removal -------------------------------------------------------------------------------------------------------


def removal_curves(network: Explainer, tile: Pixels, target: int, order: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """The target's probability as patches go, most important first and least important first: (STEPS + 1,) each.

    `order` names the patches, most important first.
    """
    n = len(order)
    gone = np.round(np.arange(STEPS + 1) / STEPS * n).astype(int)
    rank = np.empty(n, int)
    rank[order] = np.arange(n)
    first = rank[None, :] >= gone[:, None]  # (STEPS + 1, G*G): kept
    last = rank[None, :] < n - gone[:, None]
    keeps = np.concatenate([first, last[1:-1]])  # both begin with everything and end with nothing
    answer = network.explain(np.repeat(tile[None], len(keeps), axis=0), keeps).probabilities[:, target]
    most, between = answer[: STEPS + 1], answer[STEPS + 1 :]
    return most, np.concatenate([most[:1], between, most[-1:]])


def removal_gap(most_first: Floats, least_first: Floats) -> float:
    """Area between both curves, -1 to 1. Random order has 0 on average; a map of the middle has more, by no skill."""
    return float(np.trapezoid(least_first - most_first, dx=1 / STEPS))


def rank_patches(grid: Floats, rng: Generator) -> NDArray[np.intp]:
    """Most important first; equal ones in random order, as those of one group of an occlusion map are."""
    values = grid.ravel()
    return np.lexsort((rng.random(values.size), -values))


# -- focus ---------------------------------------------------------------------------------------------------------


def lay_mosaic(quarters: Sequence[Pixels], places: Sequence[int]) -> Pixels:
    """Four half-size cuts (S/2, S/2, 3) as one tile; quarter i goes to places[i], counted row by row."""
    half = len(quarters[0])
    tile = np.empty((2 * half, 2 * half, 3), np.uint8)
    for quarter, place in zip(quarters, places, strict=True):
        top, left = divmod(place, 2)
        tile[top * half : (top + 1) * half, left * half : (left + 1) * half] = quarter
    return tile


def focus(grid: Floats, own: Bools, foreign: Bools) -> float:
    """The share of the map's positive part that lies on patches of the class it was asked for.

    As many patches are of the other class, so one half is no skill; a map without anything positive claims nothing.
    """
    positive = np.maximum(grid, 0)
    total = float(positive[own | foreign].sum())
    return float(positive[own].sum()) / total if total > 0 else 0.5


@dataclass(frozen=True)
class Mosaic:
    tile: Pixels  # (S, S, 3)
    first: int  # the class of two quarters
    second: int  # of the other two
    # (G, G) each: patches that lie in its quarters. In a grid of odd side some lie in two quarters, and count for none.
    of_first: Bools
    of_second: Bools


def lay_mosaics(trial: Trial, grid: int, most: int, rng: Generator) -> list[Mosaic]:
    """Two quarters of each of two classes at random places, every pair of classes in turn; no tile is in two mosaics.

    Without classes only tiles that were answered with some confidence stand for the class of their answer.
    """
    sure = np.ones(len(trial.tiles), bool) if trial.labelled else trial.confidence >= LEAST_CONFIDENCE
    classes = np.unique(trial.targets)
    unused = {c: rng.permutation(np.flatnonzero((trial.targets == c) & sure)).tolist() for c in classes.tolist()}
    mosaics: list[Mosaic] = []
    pairs = list(itertools.combinations(unused, 2))
    while len(mosaics) < most and any(len(unused[a]) > 1 and len(unused[b]) > 1 for a, b in pairs):
        for a, b in pairs:
            if len(unused[a]) > 1 and len(unused[b]) > 1 and len(mosaics) < most:
                chosen = [unused[a].pop(), unused[a].pop(), unused[b].pop(), unused[b].pop()]
                mosaics.append(lay_one(trial.tiles[chosen], a, b, grid, rng))
    return mosaics


def lay_one(tiles: Pixels, first: int, second: int, grid: int, rng: Generator) -> Mosaic:
    side = tiles.shape[1]
    half = side // 2
    corners = rng.integers(0, side - half + 1, (4, 2))
    quarters = [tile[y : y + half, x : x + half] for tile, (y, x) in zip(tiles, corners, strict=True)]
    places = rng.permutation(4).tolist()
    start = np.arange(grid)
    row = np.where(start + 1 <= grid / 2, 0, np.where(start >= grid / 2, 1, np.nan))  # nan lies in both
    quarter = 2 * row[:, None] + row[None, :]
    of_first, of_second = np.isin(quarter, places[:2]), np.isin(quarter, places[2:])
    return Mosaic(lay_mosaic(quarters, places), first, second, of_first, of_second)


# -- glands --------------------------------------------------------------------------------------------------------


class Outlined(NamedTuple):
    """The middle of an annotated field, and which of its patches are mostly gland."""

    tile: Pixels  # (S, S, 3)
    is_gland: Bools  # (G, G)
    patient: str


def read_outlined(table: Path, mpp: float, manifest: Manifest) -> list[Outlined]:
    """`table`: CSV with columns image, mask, patient. Fields whose middle is nearly all gland, or nearly none, tell
    no map from another and are left out.
    """
    outlines = []
    side = manifest.tile_px * manifest.tile_mpp / mpp
    for row in rows_of(table, ["image", "mask", "patient"]):
        image, mask = Image.open(table.parent / row["image"]), Image.open(table.parent / row["mask"])
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        tile = np.asarray(image.convert("RGB").resize((manifest.tile_px,) * 2, Image.Resampling.BICUBIC, box))
        share = np.asarray(mask.convert("L").resize((manifest.grid,) * 2, Image.Resampling.BOX, box)) / 255
        outlined = Outlined(tile, share > 0.5, row["patient"])
        if MIXED[0] <= outlined.is_gland.mean() <= MIXED[1]:
            outlines.append(outlined)
    return outlines


def overlap(grid: Floats, truth: Bools, rng: Generator) -> float:
    """Jaccard's index of the truth and as many of the map's highest patches: no threshold to be chosen."""
    marked = np.zeros(truth.size, bool)
    marked[rank_patches(grid, rng)[: truth.sum()]] = True
    return float((marked & truth.ravel()).sum() / (marked | truth.ravel()).sum())


def judge_glands(network: Explainer, fields: Sequence[Outlined], found: Found, rng: Generator) -> None:
    for tile, is_gland, _ in track(fields, description="glands", console=Console(stderr=True)):
        answer = int(network.explain(tile[None]).logits[0].argmax())
        maps = {name: grids[answer] for name, grids in draw_model_maps(network, tile).items()}
        for name, grid in (maps | draw_no_model_maps(tile, len(is_gland), rng)).items():
            note(found, name, "glands", overlap(grid, is_gland, rng))


# -- what a map depends on -----------------------------------------------------------------------------------------


def shuffle_weights(classifier: Classifier, artifact: Path, seed: int = 0) -> Classifier:
    """The same graph with the values of every weight in random order: nothing learnt is left in its maps."""
    proto = onnx.load(artifact / classifier.manifest.file("explain", "fp32").path)
    shuffle_learnt(proto.graph, np.random.default_rng(seed))
    return replace(classifier, explain_session=open_session(proto.SerializeToString(), threads=1))


def shuffle_learnt(graph: onnx.GraphProto, rng: Generator) -> None:
    """Constants before the first convolution make the picture (holes, colours, size): they aren't learnt, and stay."""
    network = itertools.dropwhile(lambda node: node.op_type != "Conv", graph.node)  # nodes follow what they read
    weights = {name for node in network for name in node.input}
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in weights and values.dtype == np.float32 and values.size > 1:
            shuffled = rng.permutation(values.ravel()).reshape(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))


def correlate_ranks(a: Floats, b: Floats) -> float:
    """Spearman's; a map that is the same everywhere goes with none."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b, axis=None).statistic)


# -- the verdict ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    judged: JudgedMaps
    curves: dict[str, Floats]  # (2, STEPS + 1) per map: mean probability as patches go, most and least important first


def judge_maps(
    network: Explainer,
    shuffled: Explainer,
    trial: Trial,
    per_class: int,
    mosaics: int,
    seed: int,
    fields: Sequence[Outlined] = (),
) -> Judgement:
    rng = np.random.default_rng(seed)
    grid = network.explain(trial.tiles[:1]).evidence.shape[-1]
    chosen = choose_evenly(trial.targets, per_class, seed)
    found: Found = {}
    curves = judge_removal(network, trial, chosen, found, rng)
    few = chosen[:DEPENDENCE_TILES]
    judge_dependence(network, shuffled, trial, few, found)
    laid = lay_mosaics(trial, grid, mosaics, rng)
    kept = judge_focus(network, laid, found, rng)
    protocol = (
        f"{trial.protocol}; removal on {len(chosen)} of them, at most {per_class} per class, for the answered class; "
        f"focus on the {kept} of {len(laid)} mosaics in which both classes get at least {LEAST_SHARE:.0%}"
    )
    judge_glands(network, fields, found, rng)
    patients = np.array([field.patient for field in fields])
    if fields:
        protocol += f"; glands in {len(fields)} fields of {len(set(patients))} patients, the patients drawn again"
    groups: dict[Metric, Groups] = {  # a mosaic has tiles of several slides, and is drawn alone
        "removal": trial.drawn_together(chosen),
        "other_class": trial.drawn_together(few),
        "random_weights": trial.drawn_together(few),
        "other_tile": trial.drawn_together(few[1:]),
        "glands": patients,
    }
    scores = summarise(found, groups, seed)
    return Judgement(JudgedMaps(protocol=protocol, beat_all=beat_all(scores), scores=scores), curves)


def judge_removal(
    network: Explainer, trial: Trial, chosen: NDArray[np.intp], found: Found, rng: Generator
) -> dict[str, Floats]:
    curves: dict[str, list[tuple[Floats, Floats]]] = {}
    for i in track(chosen, description="removal", console=Console(stderr=True)):
        tile, target = trial.tiles[i], int(trial.answers[i])
        maps = {name: grids[target] for name, grids in draw_model_maps(network, tile).items()}
        side = len(next(iter(maps.values())))
        for name, grid in (maps | draw_no_model_maps(tile, side, rng)).items():
            pair = removal_curves(network, tile, target, rank_patches(grid, rng))
            curves.setdefault(name, []).append(pair)
            note(found, name, "removal", removal_gap(*pair))
    return {name: np.mean(pairs, axis=0) for name, pairs in curves.items()}


def judge_dependence(
    network: Explainer, shuffled: Explainer, trial: Trial, chosen: NDArray[np.intp], found: Found
) -> None:
    """Rank correlation of a map with the one for the second class, of shuffled weights, and of another tile."""
    before: dict[str, Floats] = {}
    for i in track(chosen, description="dependence", console=Console(stderr=True)):
        tile = trial.tiles[i]
        second, first = np.argsort(network.explain(tile[None]).logits[0])[-2:]
        random_maps = draw_model_maps(shuffled, tile)
        for name, grids in draw_model_maps(network, tile).items():
            note(found, name, "other_class", correlate_ranks(grids[first], grids[second]))
            note(found, name, "random_weights", correlate_ranks(grids[first], random_maps[name][first]))
            if name in before:
                note(found, name, "other_tile", correlate_ranks(grids[first], before[name]))
            before[name] = grids[first]


def judge_focus(network: Explainer, mosaics: list[Mosaic], found: Found, rng: Generator) -> int:
    """Each mosaic is asked for both its classes: a map that doesn't depend on the class scores one half exactly."""
    kept = 0
    for mosaic in track(mosaics, description="focus", console=Console(stderr=True)):
        probabilities = network.explain(mosaic.tile[None]).probabilities[0]
        if min(probabilities[mosaic.first], probabilities[mosaic.second]) < LEAST_SHARE:
            continue
        kept += 1
        maps = {
            name: (grids[mosaic.first], grids[mosaic.second])
            for name, grids in draw_model_maps(network, mosaic.tile).items()
        }
        blind = draw_no_model_maps(mosaic.tile, len(mosaic.of_first), rng)
        for name, (first, second) in (maps | {name: (grid, grid) for name, grid in blind.items()}).items():
            of_first = focus(first, mosaic.of_first, mosaic.of_second)
            of_second = focus(second, mosaic.of_second, mosaic.of_first)
            note(found, name, "focus", (of_first + of_second) / 2)
    return kept


def note(found: Found, name: str, metric: Metric, value: float) -> None:
    found.setdefault((name, metric), []).append(value)


def summarise(found: Found, groups: Mapping[Metric, Groups], seed: int) -> list[MapScore]:
    scores = []
    for (name, metric), values in found.items():
        mean = mean_of(np.array(values), groups.get(metric), RESAMPLES, seed).estimate()
        scores.append(MapScore(map=name, metric=metric, **vars(mean)))
    return scores


def beat_all(scores: Sequence[MapScore]) -> list[MapMethod]:
    """Methods better than no model on both questions, the best focus first.

    By removal alone occlusion would always win: it asks the same question.
    """
    winners = [name for name in MAP_METHODS if all(beats_no_model(scores, name, metric) for metric in QUESTIONS)]
    focus_of = {score.map: score.value for score in scores if score.metric == "focus"}
    return sorted(winners, key=lambda name: -focus_of[name])


def beats_no_model(scores: Sequence[MapScore], name: str, metric: Metric) -> bool:
    """Is the whole interval above those of all maps without a model?"""
    of_map = {score.map: score for score in scores if score.metric == metric}
    return name in of_map and of_map[name].low > max(of_map[other].high for other in NO_MODEL)


def choose_default(judged: JudgedMaps) -> MapMethod | None:
    """The best; but occlusion takes 26 passes, so it has to be better than a map of one, the intervals apart."""
    if not judged.beat_all:
        return None
    best = judged.beat_all[0]
    quick = next((name for name in judged.beat_all if name != "occlusion"), None)
    if best != "occlusion" or quick is None:
        return best
    focus = {score.map: score for score in judged.scores if score.metric == "focus"}
    return best if focus[best].low > focus[quick].high else quick


def write_into_manifest(artifact: Path, judged: JudgedMaps) -> Manifest:
    """The best method becomes the default of `POST /attention`; where none is better than no model, it stays."""
    manifest = read_manifest(artifact)
    default = choose_default(judged) or manifest.maps.default
    maps = manifest.maps.model_copy(update={"judged": judged, "default": default})
    manifest = manifest.model_copy(update={"maps": maps})
    write_manifest(Manifest.model_validate(manifest.model_dump()), artifact)
    return manifest
