"""Several networks on the very same folds, and what each answered there, kept line by line.

What was answered outlives the runs: `docs/comparison.jsonl` lies beside the page that is written from it, and a
comparison that was begun on one machine goes on with another.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.config import BadConfig, Compare, Contestant, Fit, read_config
from training.data import name_slides
from training.fit import Logits, TileSet, digest_json
from training.folds import (
    FoldAnswer,
    Grouping,
    NumberedFold,
    OutOfFold,
    answer_fold,
    assemble,
    describe_answer,
    make_folds,
)
from training.run import IGNORED_BY_FOLDS, claim, describe_settings, is_finished

GROUPINGS: tuple[Grouping, ...] = ("random", "slide")
DECIMALS = 3  # of the logits that are kept

Tell = Callable[[str], None]


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
        return None if init is None or is_finished(init) else init


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


# -- what was answered ---------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """Lines of JSON, one for each finished fold of a network: what it was, and its logits of the tiles held out."""

    path: Path
    tiles: TileSet
    answers: dict[tuple[str, str, str], Logits] = field(default_factory=dict)  # by network, fold and its tiles

    @classmethod
    def read(cls, path: Path, entrants: list[Entrant], tiles: TileSet) -> "Ledger":
        """Refuses answers by other settings, from other weights or of other tiles, as they are not the entrants'."""
        ledger = cls(path, tiles)
        known = {entrant.name: ledger.origin(entrant) for entrant in entrants}
        for kept in read_lines(path):
            name = kept["network"]
            if name not in known:
                continue
            # Where the weights that a network starts from are gone, what they were is still written here.
            expected = known[name] if known[name]["weights"] else known[name] | {"weights": kept["weights"]}
            if different := sorted(key for key in expected if kept[key] != expected[key]):
                raise BadConfig(
                    f"{path} holds answers of {name} with other {' and '.join(different)}; "
                    "give it another name, or take its lines out to answer anew"
                )
            ledger.answers[name, kept["fold"], kept["held_out"]] = np.array(kept["logits"], np.float32)
        return ledger

    def origin(self, entrant: Entrant) -> dict[str, str | None]:
        content = describe_settings(entrant.config, self.tiles)
        weights, tiles = content.pop("weights", None), content.pop("tiles")
        return {"settings": digest_json(content), "weights": weights, "tiles": tiles}

    def place(self, entrant: Entrant, one: NumberedFold) -> tuple[str, str, str]:
        """Also tells the tiles held out: a fold that another version of the code drew otherwise is called the same."""
        held_out = [self.tiles.records[i].sha256 for i in one.fold.held_out]
        return entrant.name, one.folder, digest_json(held_out)

    def add(self, entrant: Entrant, one: NumberedFold, logits: Logits) -> None:
        place = self.place(entrant, one)
        rounded = [[round(float(value), DECIMALS) for value in row] for row in logits]
        told = dict(zip(("network", "fold", "held_out"), place, strict=True))
        append_line(self.path, json.dumps({**told, **self.origin(entrant), "logits": rounded}))
        self.answers[place] = np.array(rounded, np.float32)

    def collect(self, entrant: Entrant, grouping: Grouping, rounds: int) -> OutOfFold | None:
        """The answers of folds that are all there; else None."""
        rounds = rounds if grouping == "random" else 1
        answers = []
        for one in make_folds(self.tiles, entrant.config, grouping, rounds):
            logits = self.answers.get(self.place(entrant, one))
            if logits is None:
                return None
            answers.append(FoldAnswer(one, logits))
        return assemble(self.tiles, grouping, rounds, answers)


def read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(split_unfinished(path)[0].splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise BadConfig(
                f"line {number} of {path} is damaged ({error}), expected JSON: take it out, "
                "and its fold is answered anew"
            ) from error
    return lines


def append_line(path: Path, line: str) -> None:
    """On a line of its own; what a kill left of an unfinished one is cut off before."""
    kept, unfinished = split_unfinished(path)
    if unfinished:
        os.truncate(path, len(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n" if kept.endswith(b"\n") or not kept else f"\n{line}\n")


def split_unfinished(path: Path) -> tuple[bytes, bytes]:
    """The whole lines, and what a kill or a full disk left of one more."""
    content = path.read_bytes() if path.exists() else b""
    whole, newline, last = content.rpartition(b"\n")
    try:
        json.loads(last)
    except ValueError:
        return whole + newline, last
    return content, b""  # an editor took the last newline away


# -- folds ---------------------------------------------------------------------------------------------------------


def run_folds(config: Compare, entrants: list[Entrant], ledger: Ledger, tell: Tell) -> None:
    """Random folds of all first, so that there is soon a table; whole slides then; the finalists' rounds last."""
    ready = [entrant for entrant in entrants if entrant.waits_for is None]
    for entrant in entrants:
        if entrant not in ready:
            tell(f"{entrant.name} waits for {entrant.waits_for}")
    for grouping in groupings_of(ledger.tiles):
        for entrant in ready:
            answer(entrant, ledger, grouping, 1, tell)
    for entrant in choose_finalists(config, entrants, ledger):
        if entrant in ready:
            answer(entrant, ledger, "random", config.rounds, tell)


def groupings_of(tiles: TileSet) -> tuple[Grouping, ...]:
    return GROUPINGS if len(name_slides(tiles.records)) > 1 else ("random",)


def answer(entrant: Entrant, ledger: Ledger, grouping: Grouping, rounds: int, tell: Tell) -> None:
    tiles, folder = ledger.tiles, entrant.folder / "folds"
    for one in make_folds(tiles, entrant.config, grouping, rounds):
        if ledger.place(entrant, one) in ledger.answers:
            continue
        claim(folder, entrant.config, tiles, IGNORED_BY_FOLDS)
        answered = answer_fold(entrant.config, tiles, one, folder)
        ledger.add(entrant, one, answered.logits)
        tell(f"{entrant.name}: {describe_answer(tiles, answered)}")


def choose_finalists(config: Compare, entrants: list[Entrant], ledger: Ledger) -> list[Entrant]:
    """The best by one round of random folds; none until that is known of all, those that wait for weights included."""
    collected = {entrant.name: ledger.collect(entrant, "random", 1) for entrant in entrants}
    accuracies = {name: share_right(folds) for name, folds in collected.items() if folds is not None}
    if len(accuracies) < len(entrants):
        return []
    return sorted(entrants, key=lambda entrant: -accuracies[entrant.name])[: config.finalists]


def share_right(folds: OutOfFold) -> float:
    return float((folds.logits[0].argmax(axis=1) == folds.tiles.targets).mean())
