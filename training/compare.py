"""Networks and simple baselines on the very same folds, each with its interval, its cost, and what it is better by.

    tissue-train compare configs/compare.toml

Every fold's answers are kept beside the page: killed and started again, a comparison goes on. What isn't finished, or
starts from weights that aren't there yet, is left open in the table until it is.
"""

import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from model.graph import PredictGraph, Prediction
from model.network import Network, build
from model.session import open_session
from training import figures
from training.bench import pass_seconds
from training.config import Compare, Fit
from training.contest import Entrant, Ledger, Tell, choose_finalists, enter, groupings_of, run_folds
from training.data import group_by_slide, name_slides
from training.export import trace
from training.findings import fold_floors
from training.fit import read_tiles
from training.folds import Grouping, OutOfFold
from training.metrics import Estimate, mean_of, paired_difference
from training.report import table
from training.train import best_device

SERVED_TILES = 40
TRAINED_STEPS = 6

Bools = NDArray[np.bool_]

GROUPING_NAMES: dict[Grouping, str] = {"random": "random folds", "slide": "leave-slide-out"}


@dataclass(frozen=True)
class Speed:
    trained_per_s: float
    served_per_s: float


def compare(config: Compare, runs: Path, page: Path, tell: Tell, train: bool = True) -> None:
    """Trains what is missing, then writes `page` with its table, and its picture into `images` beside it."""
    entrants = enter(config, runs / config.name)
    ledger = Ledger.read(page.with_suffix(".jsonl"), entrants, read_tiles(entrants[0].config))
    if train:
        run_folds(config, entrants, ledger, tell)
    picture = page.parent / "images" / f"{page.stem}.png"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(config, entrants, ledger, picture))


# -- figures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """The answers of a network, or of a floor, to the tiles of the same folds."""

    right: Bools  # (M,)
    groups: NDArray[np.intp]  # (M,) what each is drawn again with: its tile, or its slide
    clear: Bools  # (M,) whether its tile is of undoubted quality

    def accuracy(self, clear_only: bool = False) -> Estimate:
        chosen = self.clear if clear_only else np.ones(len(self.right), bool)
        return mean_of(self.right[chosen], self.groups[chosen]).proportion()

    def difference(self, other: "Judged") -> Estimate:
        return paired_difference(self.right, other.right, self.groups)


def judge_network(folds: OutOfFold, doubtful: list[str]) -> Judged:
    seen = folds.folds >= 0  # (R, N)
    records = folds.tiles.records
    groups = np.arange(len(records)) if folds.grouping == "random" else group_by_slide(records)
    clear = np.array([(record.quality or "") not in doubtful for record in records])
    right = folds.logits.argmax(axis=2) == folds.tiles.targets  # (R, N)
    return Judged(right[seen], np.broadcast_to(groups, seen.shape)[seen], np.broadcast_to(clear, seen.shape)[seen])


def judge_floors(folds: OutOfFold, network: Judged) -> dict[str, Judged]:
    """Of the baselines without a network, on the folds that a network was judged on."""
    seen = folds.folds >= 0
    targets = np.broadcast_to(folds.tiles.targets, seen.shape)[seen]
    return {
        name: replace(network, right=probabilities.argmax(axis=1) == targets)
        for name, probabilities in fold_floors(folds).items()
    }


class Results:
    """What is finished, networks and floors alike."""

    def __init__(self, config: Compare, entrants: list[Entrant], ledger: Ledger) -> None:
        self.config, self.entrants, self.ledger = config, entrants, ledger
        self.tiles = ledger.tiles
        self.doubtful = entrants[0].config.data.doubtful
        self.floors: list[str] = []
        self.judged: dict[tuple[str, Grouping], Judged] = {}
        for grouping in groupings_of(ledger.tiles):
            self.judge(grouping)

    def judge(self, grouping: Grouping) -> None:
        floors: dict[str, Judged] = {}
        for entrant in self.entrants:
            folds = self.ledger.collect(entrant, grouping, 1)
            if folds is None:
                continue
            network = judge_network(folds, self.doubtful)
            self.judged[entrant.name, grouping] = network
            floors = floors or judge_floors(folds, network)  # the folds are the same for all
        for name, floor in floors.items():
            self.judged[name, grouping] = floor
        self.floors = self.floors or list(floors)

    def names(self) -> list[str]:
        return [*(entrant.name for entrant in self.entrants), *self.floors]

    def accuracy(self, name: str, grouping: Grouping, clear_only: bool = False) -> Estimate | None:
        judged = self.judged.get((name, grouping))
        return None if judged is None else judged.accuracy(clear_only)

    def difference(self, entrant: Entrant, grouping: Grouping) -> Estimate | None:
        mine, theirs = self.judged.get((entrant.name, grouping)), self.judged.get((entrant.against, grouping))
        return None if mine is None or theirs is None else mine.difference(theirs)


# -- speed ---------------------------------------------------------------------------------------------------------


@cache
def measure_speed(config: str) -> Speed:
    """Of a network as its config (JSON) builds it: speed doesn't depend on what the weights are. One thread each."""
    fit = Fit.model_validate_json(config)
    net = build(fit.model, classes=6)
    return Speed(trained_speed(net, fit), served_speed(net, fit.model.tile_px))


def trained_speed(net: Network, config: Fit) -> float:
    """Images a second in forward and backward passes alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return config.optimisation.batch / median(pass_seconds(net, config, TRAINED_STEPS))
    finally:
        torch.set_num_threads(before)


def served_speed(net: Network, tile_px: int) -> float:
    """Tiles a second through the graph that is served, in fp32, one tile a call."""
    tiles = torch.zeros(2, tile_px, tile_px, 3, dtype=torch.uint8)
    graph = trace(PredictGraph(net.cpu().eval(), 1.0), {"tiles": tiles}, Prediction._fields)
    session = open_session(graph.SerializeToString(), threads=1)
    tile, seconds = tiles[:1].numpy(), []
    for _ in range(SERVED_TILES):
        started = time.perf_counter()
        session.run(None, {"tiles": tile})
        seconds.append(time.perf_counter() - started)
    return 1 / median(seconds)


# -- the page ------------------------------------------------------------------------------------------------------


def render(config: Compare, entrants: list[Entrant], ledger: Ledger, picture: Path) -> str:
    results = Results(config, entrants, ledger)
    draw_accuracy(results, picture)
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
    slides = name_slides(tiles.records)
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
    for name in results.names():
        cells = [
            results.accuracy(name, "random"),
            results.accuracy(name, "random", clear_only=True),
            results.accuracy(name, "slide"),
        ]
        rows.append([name, *map(show, cells)])
    head = ["", "folds, all tiles", f"folds, without {', '.join(results.doubtful) or 'none'}", "leave-slide-out"]
    text = table(head, rows)
    waiting = [
        f"{e.name} (starts from `{e.waits_for}`)"
        for e in results.entrants
        if e.waits_for and (e.name, "random") not in results.judged
    ]
    if waiting:
        text += f"\n\nNot run, as the weights they start from are not there, or not finished: {', '.join(waiting)}."
    return text


def render_differences(results: Results) -> str:
    rows = []
    for entrant in results.entrants:
        if entrant.name != entrant.against:
            cells = [results.difference(entrant, "random"), results.difference(entrant, "slide")]
            rows.append([entrant.name, entrant.against, *(show(cell, signed=True) for cell in cells)])
    text = "By how much more often the first is right than the second, on the same folds' answers, drawn together."
    return f"{text}\n\n" + table(["", "against", "folds, all tiles", "leave-slide-out"], rows)


def render_finalists(results: Results) -> str:
    config, ledger = results.config, results.ledger
    if config.rounds < 2:
        return ""
    title = f"## The best {config.finalists}, {config.rounds} rounds of folds"
    finalists = choose_finalists(config, results.entrants, ledger)
    if not finalists:
        return f"{title}\n\nLeft open until every network has answered the one round of random folds that chooses them."
    found = [(entrant.name, ledger.collect(entrant, "random", config.rounds)) for entrant in finalists]
    known = {name: judge_network(folds, results.doubtful) for name, folds in found if folds}
    if len(known) < len(finalists):
        names = ", ".join(entrant.name for entrant in finalists)
        return f"{title}\n\nChosen by the first round: {names}. Their other rounds are not finished."
    rows = [[name, show(judged.accuracy()), show(judged.accuracy(clear_only=True))] for name, judged in known.items()]
    (best, judged), *others = known.items()
    differences = [f"{best} against {name}: {show(judged.difference(other), signed=True)}." for name, other in others]
    head = ["", "all tiles", f"without {', '.join(results.doubtful) or 'none'}"]
    note = "They were chosen by the first round, which is among these, so this flatters them a little."
    return "\n\n".join([title, table(head, rows), " ".join(differences), note])


def render_cost(results: Results) -> str:
    rows = []
    for entrant in results.entrants:
        fit = entrant.config
        parameters = sum(p.numel() for p in build(fit.model, len(results.tiles.classes)).parameters())
        shape = fit.model_copy(update={"name": "speed", "distil": None})  # measured once for all that are alike
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


def draw_accuracy(results: Results, path: Path) -> None:
    rows: dict[str, dict[str, Estimate]] = {}
    for name in results.names():
        for grouping, words in GROUPING_NAMES.items():
            if (name, grouping) in results.judged:
                rows.setdefault(name, {})[words] = results.judged[name, grouping].accuracy()
    figures.draw_protocols(rows, path)
