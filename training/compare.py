"""Networks and simple machines on the very same folds, each with its interval, its cost, and what it is better by.

    tissue-train compare configs/compare.toml

Every fold's answers are kept: killed and started again, a comparison goes on. What isn't finished, or starts from
weights that aren't there yet, is left open in the table until it is.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from model.graph import PredictGraph, Prediction
from model.network import Network, build
from model.runtime import ort
from training import figures
from training.bench import bare_step
from training.config import BadConfig, Compare, Contestant, Fit, read_config
from training.data import group_by_slide
from training.export import cpu_options, trace
from training.findings import fold_floors
from training.fit import Grouping, OutOfFold, TileSet, cross_validate, make_folds, read_tiles
from training.metrics import Estimate, bootstrap, count_groups, paired_difference, weighted_mean
from training.report import table
from training.run import claim
from training.train import best_device, freeze

GROUPINGS: tuple[Grouping, ...] = ("random", "slide")
SERVED_TILES = 40
TRAINED_STEPS = 6

Tell = Callable[[str], None]
Right = NDArray[np.bool_]


@dataclass(frozen=True)
class Entrant:
    """One network with all that its folds need."""

    name: str
    config: Fit
    folder: Path
    against: str

    @property
    def waits_for(self) -> Path | None:
        init = self.config.init
        return None if init is None or init.exists() else init

    def with_rounds(self, rounds: int) -> Fit:
        return self.config.model_copy(update={"repeats": rounds})


@dataclass(frozen=True)
class Speed:
    trained_per_s: float
    served_per_s: float


def compare(config: Compare, runs: Path, page: Path, tell: Tell, train: bool = True) -> None:
    """Trains what is missing, then writes `page` with its table, and its picture into `images` beside it."""
    entrants = enter(config, runs / config.name)
    tiles = read_tiles(entrants[0].config)
    if train:
        run_folds(config, entrants, tiles, tell)
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.parent / "images" / f"{page.stem}.png"
    page.write_text(render(config, entrants, tiles, picture))


def enter(config: Compare, folder: Path) -> list[Entrant]:
    shared = read_config(config.like, [], Fit)
    first = config.networks[0].name
    entrants = [
        Entrant(n.name, settle(n, shared, config), folder / slug(n.name), n.against or first) for n in config.networks
    ]
    if len({entrant.folder for entrant in entrants}) != len(entrants):
        raise BadConfig("networks of one comparison need names that differ in letters, not only in signs")
    if len({entrant.config.model.tile_px for entrant in entrants}) > 1:
        raise BadConfig("networks of one comparison look at the same tiles: model.tile_px must be the same for all")
    return entrants


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def settle(network: Contestant, shared: Fit, config: Compare) -> Fit:
    """The shared settings, and what this network has of its own."""
    optimisation = shared.optimisation.model_dump() | network.optimisation
    content = shared.model_dump() | {"optimisation": optimisation, "folds": config.folds, "repeats": 1}
    own = {"name": network.name, "model": network.model, "init": network.init, "distil": network.distil}
    return Fit.model_validate(content | own)


# -- folds ---------------------------------------------------------------------------------------------------------


def run_folds(config: Compare, entrants: list[Entrant], tiles: TileSet, tell: Tell) -> None:
    """Random folds of all first, so that there is soon a table; whole slides then; the finalists' rounds last."""
    ready = [entrant for entrant in entrants if entrant.waits_for is None]
    for entrant in entrants:
        if entrant not in ready:
            tell(f"{entrant.name} waits for {entrant.waits_for}")
    for entrant in ready:
        claim(entrant.folder, entrant.config)
    for grouping in groupings_of(tiles):
        for entrant in ready:
            answer(entrant, tiles, grouping, 1, tell)
    for entrant in choose_finalists(config, ready, tiles):
        answer(entrant, tiles, "random", config.rounds, tell)


def groupings_of(tiles: TileSet) -> tuple[Grouping, ...]:
    slides = {record.slide for record in tiles.records if record.slide}
    return GROUPINGS if len(slides) > 1 else ("random",)


def answer(entrant: Entrant, tiles: TileSet, grouping: Grouping, rounds: int, tell: Tell) -> None:
    def tell_whose(line: str) -> None:
        tell(f"{entrant.name}: {line}")

    cross_validate(entrant.with_rounds(rounds), tiles, entrant.folder / "folds", grouping, tell_whose)


def collect(entrant: Entrant, tiles: TileSet, grouping: Grouping, rounds: int) -> OutOfFold | None:
    """The answers of folds that are all there; else None."""
    config = entrant.with_rounds(rounds if grouping == "random" else 1)
    shape = (config.repeats, len(tiles.targets))
    logits, folds = np.full((*shape, len(tiles.classes)), np.nan, np.float32), np.full(shape, -1)
    for repeat in range(config.repeats):
        for number, fold in enumerate(make_folds(tiles, config, grouping, repeat)):
            finished = entrant.folder / "folds" / f"{grouping}-{repeat}-{number}" / "logits.npy"
            if not finished.exists():
                return None
            logits[repeat, fold.held_out] = np.load(finished)
            folds[repeat, fold.held_out] = number
    return OutOfFold(grouping, tiles, logits, folds)


def choose_finalists(config: Compare, entrants: list[Entrant], tiles: TileSet) -> list[Entrant]:
    """The best by one round of random folds, where that is known of all."""
    found = [(entrant, collect(entrant, tiles, "random", 1)) for entrant in entrants]
    accuracies = [(right_of(folds)[0].mean(), entrant) for entrant, folds in found if folds is not None]
    best = sorted(accuracies, key=lambda pair: -pair[0])[: config.finalists]
    return [entrant for _, entrant in best] if len(best) == config.finalists else []


# -- figures -------------------------------------------------------------------------------------------------------


def right_of(folds: OutOfFold) -> tuple[Right, NDArray[np.intp]]:
    """Of each answer, whether it was right, and what it is drawn again with: its tile, or its slide."""
    seen = folds.folds >= 0  # (R, N)
    tile = np.broadcast_to(np.arange(seen.shape[1]), seen.shape)
    right = folds.logits.argmax(axis=2) == folds.tiles.targets  # (R, N)
    return right[seen], group_numbers(folds)[tile][seen]


def group_numbers(folds: OutOfFold) -> NDArray[np.intp]:
    if folds.grouping == "random":
        return np.arange(len(folds.tiles.targets))
    return group_by_slide(folds.tiles.records)


def accuracy(right: Right, groups: NDArray[np.intp]) -> Estimate:
    found = bootstrap({"accuracy": weighted_mean(right)}, groups, resamples=1000, seed=0)["accuracy"]
    return found.proportion(count_groups(groups))


def clear_tiles(folds: OutOfFold, doubtful: list[str]) -> Right:
    """Of each answer, whether its tile is of undoubted quality."""
    clear = np.array([(record.quality or "") not in doubtful for record in folds.tiles.records])
    return np.broadcast_to(clear, folds.folds.shape)[folds.folds >= 0]


class Results:
    """What is finished, with every figure computed once."""

    def __init__(self, config: Compare, entrants: list[Entrant], tiles: TileSet) -> None:
        self.config, self.entrants, self.tiles = config, entrants, tiles
        self.doubtful = entrants[0].config.data.doubtful
        self.folds = {
            (entrant.name, grouping): collect(entrant, tiles, grouping, 1)
            for entrant in entrants
            for grouping in groupings_of(tiles)
        }

    def of(self, name: str, grouping: Grouping) -> OutOfFold | None:
        return self.folds.get((name, grouping))

    def accuracy(self, name: str, grouping: Grouping, clear_only: bool = False) -> Estimate | None:
        folds = self.of(name, grouping)
        if folds is None:
            return None
        right, groups = right_of(folds)
        chosen = clear_tiles(folds, self.doubtful) if clear_only else np.ones(len(right), bool)
        return accuracy(right[chosen], groups[chosen])

    def difference(self, entrant: Entrant, grouping: Grouping) -> Estimate | None:
        mine, theirs = self.of(entrant.name, grouping), self.of(entrant.against, grouping)
        if mine is None or theirs is None or entrant.name == entrant.against:
            return None
        right, groups = right_of(mine)
        return paired_difference(right, right_of(theirs)[0], groups)

    @cached_property
    def floors(self) -> dict[str, dict[Grouping, tuple[Estimate, Estimate]]]:
        """Accuracy of the machines without a network on all tiles and on the clear ones; the same folds, once."""
        found: dict[str, dict[Grouping, tuple[Estimate, Estimate]]] = {}
        for grouping in groupings_of(self.tiles):
            folds = next((f for (_, g), f in self.folds.items() if g == grouping and f is not None), None)
            if folds is None:
                continue
            groups, clear = right_of(folds)[1], clear_tiles(folds, self.doubtful)
            targets = np.broadcast_to(self.tiles.targets, folds.folds.shape)[folds.folds >= 0]
            for name, probabilities in fold_floors(folds).items():
                right = probabilities.argmax(axis=1) == targets
                estimates = accuracy(right, groups), accuracy(right[clear], groups[clear])
                found.setdefault(name, {})[grouping] = estimates
        return found


# -- speed ---------------------------------------------------------------------------------------------------------


@cache
def measure_speed(config: str) -> Speed:
    """Of a network as its config (JSON) builds it: speed doesn't depend on what the weights are. One thread each."""
    fit = Fit.model_validate_json(config)
    net = build(fit.model, classes=6)
    return Speed(trained_speed(net, fit), served_speed(net, fit.model.tile_px))


def trained_speed(net: Network, config: Fit) -> float:
    """Images a second in forward and backward passes alone."""
    device = best_device()
    net = copy.deepcopy(net).to(device).train()
    freeze(net, config.optimisation.frozen)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = [bare_step(net, config, device) for _ in range(1 + TRAINED_STEPS)][1:]
    finally:
        torch.set_num_threads(before)
    return config.optimisation.batch / median(seconds)


def served_speed(net: Network, tile_px: int) -> float:
    """Tiles a second through the graph that is served, in fp32, one tile a call."""
    tiles = torch.zeros(2, tile_px, tile_px, 3, dtype=torch.uint8)
    graph = trace(PredictGraph(net.cpu().eval(), 1.0), {"tiles": tiles}, Prediction._fields)
    options = cpu_options()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    tile, seconds = tiles[:1].numpy(), []
    for _ in range(SERVED_TILES):
        started = time.perf_counter()
        session.run(None, {"tiles": tile})
        seconds.append(time.perf_counter() - started)
    return 1 / median(seconds)


# -- the page ------------------------------------------------------------------------------------------------------


def render(config: Compare, entrants: list[Entrant], tiles: TileSet, picture: Path) -> str:
    results = Results(config, entrants, tiles)
    draw(results, picture)
    sections = [
        "# Networks compared",
        "<!-- Written by `tissue-train compare`: change its config, not this. -->",
        describe_protocol(results),
        f"![Accuracy of each network and floor, with 95 % intervals](images/{picture.name})",
        "## Accuracy\n\n" + render_accuracy(results),
        "## Paired differences\n\n" + render_differences(results),
        render_finalists(results),
        "## Cost\n\n" + render_cost(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def describe_protocol(results: Results) -> str:
    tiles, config = results.tiles, results.config
    slides = {record.slide for record in tiles.records if record.slide}
    known = sum(record.slide is not None for record in tiles.records)
    clear = sum((record.quality or "") not in results.doubtful for record in tiles.records)
    parts = [
        f"{len(tiles.targets)} tiles of {len(tiles.classes)} classes, one round of {config.folds} random folds, the "
        "same for all; near duplicates lie in one fold."
    ]
    if clear < len(tiles.targets):
        parts.append(f"Without the quality {', '.join(results.doubtful)}: {clear} tiles.")
    if len(slides) > 1:
        parts.append(f"Leave-slide-out: {known} tiles name one of {len(slides)} slides, each held out in turn.")
    parts.append(
        "In brackets the 95 % interval of a bootstrap over tiles (over slides, where slides are held out). "
        f"Data, augmentation and, where nothing else is said below, optimisation are those of `{config.like}`."
    )
    if results.entrants[0].config.rehearse:
        parts.append("All learn from cuts labelled by rule as well, those that start from nothing included.")
    return " ".join(parts)


def render_accuracy(results: Results) -> str:
    rows = []
    for entrant in results.entrants:
        cells = [
            results.accuracy(entrant.name, "random"),
            results.accuracy(entrant.name, "random", clear_only=True),
            results.accuracy(entrant.name, "slide"),
        ]
        rows.append([entrant.name, *map(show, cells)])
    for name, floors in results.floors.items():
        random, slide = floors.get("random"), floors.get("slide")
        rows.append([name, *map(show, [random and random[0], random and random[1], slide and slide[0]])])
    head = ["", "folds, all tiles", f"folds, without {', '.join(results.doubtful) or 'none'}", "leave-slide-out"]
    text = table(head, rows)
    waiting = [f"{e.name} (starts from `{e.waits_for}`)" for e in results.entrants if e.waits_for]
    if waiting:
        text += f"\n\nNot run, as the weights they start from are not there: {', '.join(waiting)}."
    return text


def render_differences(results: Results) -> str:
    rows = []
    for entrant in results.entrants:
        cells = [results.difference(entrant, "random"), results.difference(entrant, "slide")]
        if entrant.name != entrant.against:
            rows.append([entrant.name, entrant.against, *(show(cell, signed=True) for cell in cells)])
    text = "By how much more often the first is right than the second, on the same folds' answers, drawn together."
    return f"{text}\n\n" + table(["", "against", "folds, all tiles", "leave-slide-out"], rows)


def render_finalists(results: Results) -> str:
    config, tiles = results.config, results.tiles
    finalists = choose_finalists(config, results.entrants, tiles)
    found = [(entrant.name, collect(entrant, tiles, "random", config.rounds)) for entrant in finalists]
    known = [(name, right_of(folds), clear_tiles(folds, results.doubtful)) for name, folds in found if folds]
    if not known or len(known) < config.finalists or config.rounds < 2:
        return ""
    rows = [
        [name, show(accuracy(right, groups)), show(accuracy(right[clear], groups[clear]))]
        for name, (right, groups), clear in known
    ]
    (first, (right, groups), _), *others = known
    differences = [
        f"{first} against {name}: {show(paired_difference(right, theirs, groups), signed=True)}."
        for name, (theirs, _), _ in others
    ]
    head = ["", "all tiles", f"without {', '.join(results.doubtful) or 'none'}"]
    title = f"## The best {config.finalists}, {config.rounds} rounds of folds"
    note = "They were chosen by the first round, which is among these, so this flatters them a little."
    return "\n\n".join([title, table(head, rows), " ".join(differences), note])


def render_cost(results: Results) -> str:
    rows = []
    for entrant in results.entrants:
        fit = entrant.config
        parameters = sum(p.numel() for p in build(fit.model, len(results.tiles.classes)).parameters())
        shape = fit.model_copy(update={"name": "", "init": None, "distil": None})
        speed = measure_speed(shape.model_dump_json())
        how = fit.optimisation
        settings = f"{how.steps} steps of {how.batch}, rate {how.learning_rate:g}, token drop {how.token_drop:g}"
        start = f"`{fit.init}`" if fit.init else "nothing"
        sizes = f"{parameters / 1e6:.2f} M", f"{speed.trained_per_s:.0f}", f"{speed.served_per_s:.0f}"
        rows.append([entrant.name, *sizes, settings, start])
    head = ["", "parameters", "trained, images/s", "served, tiles/s", "trained for", "from"]
    device = "the GPU" if best_device().type == "cuda" else "one core"
    text = (
        f"Trained: forward and backward passes on {device}, median of {TRAINED_STEPS}. Served: ONNX Runtime in fp32 on "
        f"one core, one tile a call, median of {SERVED_TILES}."
    )
    return f"{text}\n\n" + table(head, rows)


def show(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "not finished"
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def draw(results: Results, path: Path) -> None:
    rows: dict[str, dict[str, Estimate]] = {}
    for entrant in results.entrants:
        found = {g: results.accuracy(entrant.name, g) for g in groupings_of(results.tiles)}
        rows[entrant.name] = {NAMES[g]: estimate for g, estimate in found.items() if estimate is not None}
    for name, floors in results.floors.items():
        rows[name] = {NAMES[grouping]: estimates[0] for grouping, estimates in floors.items()}
    figures.draw_protocols({name: found for name, found in rows.items() if found}, path)


NAMES: dict[Grouping, str] = {"random": "random folds", "slide": "leave-slide-out"}
