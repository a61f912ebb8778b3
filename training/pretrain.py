"""What is learnt before the labelled tiles: whole-image classes, nuclei and glands per patch, labels by rule, and with
`[masked]` what dropped patches hold, of images without labels too.

    tissue-train pretrain configs/pretrain.toml

Cuts of every source at the tile's own magnification enter one batch; one trunk and a head for each kind of label
leave. The dense labels (what lies in each patch) fit the patch tokens of a Vision Transformer as they are.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model.graph import to_images
from model.network import TokenConfig, build_tokens
from model.pixels import decode
from training import checkpoint
from training.augment import keep_some_patches, mean_density, recolour
from training.config import BadConfig, Masked, Pretrain, Rule, Source
from training.data import class_folders, images_below, naming, rows_of
from training.masking import Guesser, masked_loss
from training.train import best_device, optimise, refuse_unfilled
from training.twins import group_pairs, number_pairs

Pixels = NDArray[np.uint8]
NO_LABEL = -1  # what torch's cross-entropy is told to ignore
DROPPED = "dropped patches"  # the task of `[masked]`
MOST_GRADES = 2  # the one logit of a grade tells two apart


@dataclass(frozen=True)
class Field:
    """One image with all that is marked on it."""

    pixels: Pixels  # (height, width, 3)
    label: int = NO_LABEL  # of the whole image
    points: NDArray[np.float32] | None = None  # (n, 3): x, y, kind
    mask: Image.Image | None = None  # L, 255 inside glands
    grade: int = NO_LABEL  # of all its glands


@dataclass(frozen=True)
class Collection:
    """A source, read: its fields and the names of what is marked."""

    source: Source
    names: list[str]  # classes, kinds of nuclei, or grades; none of images alone
    fields: list[Field]
    held_out: list[Field]

    @property
    def task(self) -> str:
        return self.source.folder.name


class Cut(NamedTuple):
    tile: Pixels  # (S, S, 3)
    label: int
    patches: NDArray[np.float32]  # (G, G, C): nuclei by kind; or gland share and grade
    weak_label: int


# -- reading -------------------------------------------------------------------------------------------------------


def read_source(source: Source) -> Collection:
    readers = {"classes": read_classes, "points": read_points, "masks": read_masks, "images": read_images}
    read = readers[source.kind]
    names, named = read(source)
    if not named:
        raise BadConfig(f"source '{source.folder}' holds no images of kind '{source.kind}'")
    groups = sorted({group for group, _ in named})
    order = np.random.default_rng(0).permutation(len(groups))
    away = {groups[i] for i in order[: round(source.held_out * len(groups))]}
    fields = [field for group, field in named if group not in away]
    if not fields:
        raise BadConfig(
            f"source '{source.folder}' has {len(groups)} groups of images, and held_out = {source.held_out:g} leaves "
            "none of them to learn from: set it lower"
        )
    return Collection(source, names, fields, [field for group, field in named if group in away])


def read_classes(source: Source) -> tuple[list[str], list[tuple[str, Field]]]:
    """Near duplicates, as a table lists them, get the name of one, so that none is learnt and held out at once."""
    folders = class_folders(source.folder)
    labels = {path: label for label, folder in enumerate(folders) for path in images_below(folder)}
    paths = list(labels)
    numbers = {path.resolve(): number for number, path in enumerate(paths)}
    pairs = number_pairs(source.folder / source.table, numbers) if source.table else []
    names = [paths[group].as_posix() for group in group_pairs(len(paths), pairs)]
    fields = [Field(read_pixels(path), label=label) for path, label in labels.items()]
    return [folder.name for folder in folders], list(zip(names, fields, strict=True))


def read_points(source: Source) -> tuple[list[str], list[tuple[str, Field]]]:
    rows = read_marks(source, ["image", "x", "y", "kind"])
    names = sorted({row["kind"] for row in rows})
    points: dict[str, list[tuple[float, float, int]]] = {}
    for row in rows:
        points.setdefault(row["image"], []).append((float(row["x"]), float(row["y"]), names.index(row["kind"])))
    patients = {row["image"]: row.get("patient") or row["image"] for row in rows}
    fields = []
    for image in sorted(points):
        path = source.folder / "images" / image
        fields.append((patients[image], Field(read_pixels(path), points=np.array(points[image], np.float32))))
    return names, fields


def read_masks(source: Source) -> tuple[list[str], list[tuple[str, Field]]]:
    rows = read_marks(source, ["image", "mask", "grade"])
    names = sorted({row["grade"] for row in rows})
    if len(names) > MOST_GRADES:
        raise BadConfig(
            f"source '{source.folder}' has glands of {len(names)} grades ({', '.join(names)}), expected {MOST_GRADES} "
            f"at most: merge some in column grade of {source.table}"
        )
    fields = []
    for row in rows:
        mask = Image.open(source.folder / row["mask"]).convert("L")
        field = Field(read_pixels(source.folder / row["image"]), mask=mask, grade=names.index(row["grade"]))
        fields.append((row.get("patient") or row["image"], field))
    return names, fields


def read_images(source: Source) -> tuple[list[str], list[tuple[str, Field]]]:
    return [], [(path.as_posix(), Field(read_pixels(path))) for path in images_below(source.folder)]


def read_marks(source: Source, columns: list[str]) -> list[dict[str, str]]:
    if source.table is None:
        raise BadConfig(f"source '{source.folder}' of kind '{source.kind}' needs a table")
    return rows_of(source.folder / source.table, columns)


def read_pixels(path: Path) -> Pixels:
    with naming(path):
        return decode(path.read_bytes()).rgb


# -- cutting -------------------------------------------------------------------------------------------------------


class Cutter:
    """Cuts tiles with their labels out of one collection."""

    def __init__(self, collection: Collection, config: Pretrain) -> None:
        self.collection = collection
        self.tile_px = config.model.tile_px
        self.tile_mpp = config.tile_mpp
        self.grid = config.model.grid
        self.classes = config.classes
        self.rules = [rule for rule in config.rules if rule.kind == collection.source.kind]
        for rule in self.rules:
            refuse_unknown_names(rule, collection, config.classes)

    def side_px(self, field: Field) -> float:
        source = self.collection.source
        if source.mpp is None:
            return float(min(field.pixels.shape[:2]))
        return self.tile_px * self.tile_mpp / source.mpp

    def cut(self, field: Field, rng: Generator) -> Cut:
        """A square at a random place, a little nearer or farther, flipped and turned."""
        height, width = field.pixels.shape[:2]
        side = min(self.side_px(field) * rng.uniform(*self.collection.source.zoom), height, width)
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        return self.cut_at(field, left, top, side, turn=int(rng.integers(8)))

    def cut_at(self, field: Field, left: float, top: float, side: float, turn: int = 0) -> Cut:
        box = (left, top, left + side, top + side)
        tile = np.asarray(Image.fromarray(field.pixels).resize((self.tile_px,) * 2, Image.Resampling.BICUBIC, box))
        patches = self.label_patches(field, left, top, side)
        return Cut(symmetry(tile, turn), field.label, symmetry(patches, turn), self.label_by_rule(field, patches))

    def label_patches(self, field: Field, left: float, top: float, side: float) -> NDArray[np.float32]:
        if field.points is not None:
            patches = np.zeros((self.grid, self.grid, len(self.collection.names)), np.float32)
            column, row = np.floor((field.points[:, :2] - (left, top)) / side * self.grid).astype(int).T
            inside = (column >= 0) & (row >= 0) & (column < self.grid) & (row < self.grid)
            np.add.at(patches, (row[inside], column[inside], field.points[inside, 2].astype(int)), 1)
            return patches
        if field.mask is not None:
            box = (left, top, left + side, top + side)
            share = np.asarray(field.mask.resize((self.grid,) * 2, Image.Resampling.BOX, box), np.float32) / 255
            return np.stack([share, np.full_like(share, field.grade)], axis=2)
        return np.zeros((self.grid, self.grid, 0), np.float32)

    def label_by_rule(self, field: Field, patches: NDArray[np.float32]) -> int:
        if not self.rules:
            return NO_LABEL
        if field.mask is not None:
            amounts = dict.fromkeys(self.collection.names, 0.0)
            amounts[self.collection.names[field.grade]] = float(patches[..., 0].mean())
        else:
            amounts = dict(zip(self.collection.names, patches.sum(axis=(0, 1)).tolist(), strict=True))
        return next((self.classes.index(rule.label) for rule in self.rules if obeys(amounts, rule)), NO_LABEL)


def refuse_unknown_names(rule: Rule, collection: Collection, classes: list[str]) -> None:
    """They would end the training when the first cut asks for them."""
    if rule.label not in classes:
        raise BadConfig(
            f"a rule gives the label '{rule.label}', which is none of the classes {classes}: add it, or mend it"
        )
    if unknown := sorted({*rule.at_least, *rule.share, *rule.absent} - set(collection.names)):
        raise BadConfig(
            f"the rule for '{rule.label}' asks for {', '.join(map(repr, unknown))}, but what is marked in "
            f"'{collection.source.folder}' is {', '.join(map(repr, collection.names))}: mend the rule or the table"
        )


def obeys(amounts: dict[str, float], rule: Rule) -> bool:
    total = sum(amounts.values())
    return (
        all(amounts[name] >= least for name, least in rule.at_least.items())
        and all(amounts[name] > least * total for name, least in rule.share.items())
        and not any(amounts[name] for name in rule.absent)
    )


def symmetry(array: NDArray[Any], turn: int) -> NDArray[Any]:
    """One of the eight flips and rotations of the first two axes."""
    array = np.rot90(array, turn % 4)
    return np.ascontiguousarray(array[::-1] if turn >= 4 else array)


# -- learning ------------------------------------------------------------------------------------------------------


class CutBatch(NamedTuple):
    tiles: Tensor  # (n, S, S, 3) uint8
    labels: Tensor  # (n,)
    patches: Tensor  # (n, G*G, C)
    weak_labels: Tensor  # (n,)


def gather(cuts: list[Cut]) -> CutBatch:
    return CutBatch(
        torch.from_numpy(np.stack([cut.tile for cut in cuts])),
        torch.tensor([cut.label for cut in cuts]),
        torch.from_numpy(np.stack([cut.patches for cut in cuts])).flatten(1, 2),
        torch.tensor([cut.weak_label for cut in cuts]),
    )


class Pretrained(nn.Module):
    """The trunk, whose own head learns the weak labels, one more head for each labelled source, and the guesser."""

    def __init__(
        self, config: TokenConfig, classes: int, collections: list[Collection], masked: Masked | None = None
    ) -> None:
        super().__init__()
        self.vit = build_tokens(config, max(classes, 1))
        self.heads = nn.ModuleDict()
        for collection in collections:
            if collection.source.kind == "classes":
                self.heads[collection.task] = nn.Linear(config.feature_width, len(collection.names))
            elif collection.source.kind != "images":  # kinds of nuclei; or gland share and grade
                width = len(collection.names) if collection.source.kind == "points" else 2
                self.heads[collection.task] = nn.Linear(config.width, width)
        self.guesser = Guesser(config, masked.width) if masked else None


def task_losses(
    model: Pretrained,
    collections: list[Collection],
    batches: list[CutBatch],
    images: Tensor,
    kept: Tensor,
    label_smoothing: float,
) -> dict[str, Tensor]:
    out = model.vit(images, visible=kept)
    patches = model.vit.norm(out.tokens[-1])[:, 1:]  # (N, M, D)
    losses = {}
    start = 0
    for collection, batch in zip(collections, batches, strict=True):
        here = slice(start, start + len(batch.tiles))
        start = here.stop
        kind, task = collection.source.kind, collection.task
        if kind == "images":
            continue
        head = model.heads[task]
        if kind == "classes":
            logits = head(out.features[here]).float()
            losses[task] = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
            continue
        truth = batch.patches.gather(1, kept[here].unsqueeze(-1).expand(-1, -1, batch.patches.shape[-1]))  # (n, M, C)
        loss_of_patches = nuclei_loss if kind == "points" else gland_loss
        losses[task] = loss_of_patches(head(patches[here]).float(), truth)
        if (batch.weak_labels != NO_LABEL).any():
            logits = out.logits[here].float()
            losses[f"{task} by rule"] = F.cross_entropy(
                logits, batch.weak_labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing
            )
    if model.guesser is not None:
        tiles = torch.cat([batch.tiles for batch in batches])
        losses[DROPPED] = masked_loss(model.guesser, patches, kept, tiles)
    return losses


def nuclei_loss(rates: Tensor, counts: Tensor) -> Tensor:
    """Counts of each kind in a patch are Poisson around exp(rate)."""
    return F.poisson_nll_loss(rates, counts, log_input=True, reduction="none").sum(dim=-1).mean()


def gland_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """How much of the patch is gland; and of which grade, asked only where it mostly is."""
    share, grade = truth.unbind(-1)
    loss = F.binary_cross_entropy_with_logits(logits[..., 0], share)
    inside = share > 0.5
    if inside.any():
        loss = loss + F.binary_cross_entropy_with_logits(logits[..., 1][inside], grade[inside])
    return loss


def open_sources(config: Pretrain) -> list[Cutter]:
    for source in config.sources:
        refuse_unusable_name(source)
    return [Cutter(read_source(source), config) for source in config.sources]


def refuse_unusable_name(source: Source) -> None:
    """torch keeps a head under its folder's name, among attributes that a ModuleDict has already."""
    name = source.folder.name
    if source.kind != "images" and (not name or "." in name or hasattr(nn.ModuleDict(), name)):
        raise BadConfig(
            f"source '{source.folder}' gives its head the name '{name}', which torch can't use: give the folder "
            "another, without dots, such as nuclei_v1"
        )


def pretrain(config: Pretrain, cutters: list[Cutter], folder: Path) -> Pretrained:
    device = best_device()
    collections = [cutter.collection for cutter in cutters]
    torch.manual_seed(config.optimisation.seed)
    model = Pretrained(config.model, len(config.classes), collections, config.masked).to(device)
    if config.init:
        missing, _ = checkpoint.initialise(model.vit, config.init)
        refuse_unfilled(config.optimisation.frozen, missing)
    how = config.optimisation
    total = sum(source.share for source in config.sources)
    sizes = [max(1, round(how.batch * source.share / total)) for source in config.sources]
    looks = torch.stack([look_of(cutter) for cutter in cutters])  # (sources, 3)
    own_look = looks.repeat_interleave(torch.tensor(sizes), dim=0).to(device)  # (N, 3)

    def loss_of(net: nn.Module, step: int) -> Tensor:
        assert isinstance(net, Pretrained)
        rng = np.random.default_rng((how.seed, step))
        batches = []
        for cutter, size in zip(cutters, sizes, strict=True):
            fields = cutter.collection.fields
            cuts = [cutter.cut(fields[i], rng) for i in rng.integers(len(fields), size=size)]
            batches.append(CutBatch(*(tensor.to(device) for tensor in gather(cuts))))
        images = recolour(torch.cat([batch.tiles for batch in batches]), config.augment, own_look)
        kept = keep_some_patches(len(images), config.model.grid**2, how.token_drop, device)
        losses = task_losses(net, collections, batches, images, kept, how.label_smoothing)
        if config.masked is not None:
            losses[DROPPED] = config.masked.weight * losses[DROPPED]
        return torch.stack(list(losses.values())).sum()

    def validate(net: nn.Module) -> float:
        assert isinstance(net, Pretrained)
        scores = [held_out_accuracy(net, cutter, device) for cutter in cutters if cutter.collection.held_out]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if known else math.nan

    average = optimise(model, loss_of, how, folder, validate, title=config.name)
    assert isinstance(average, Pretrained)
    return average


def look_of(cutter: Cutter, most: int = 200) -> Tensor:
    """The mean optical density of a source's tissue (3,), from a part of its fields."""
    fields = cutter.collection.fields
    fields = fields[:: -(-len(fields) // most)]
    return mean_density(gather([cutter.cut(field, np.random.default_rng(0)) for field in fields]).tiles)


@torch.no_grad()
def held_out_accuracy(model: Pretrained, cutter: Cutter, device: torch.device, most: int = 500) -> float | None:
    """Of whole-image classes, on held-out images looked at whole; the dense heads are judged by `figures`."""
    if cutter.collection.source.kind != "classes":
        return None
    fields = cutter.collection.held_out
    fields = fields[:: -(-len(fields) // most)]
    right = 0.0
    for start in range(0, len(fields), 100):
        part = fields[start : start + 100]
        batch = gather([cutter.cut_at(field, 0, 0, min(field.pixels.shape[:2])) for field in part])
        out = model.vit(to_images(batch.tiles.to(device)))
        guessed = model.heads[cutter.collection.task](out.features).argmax(dim=1).cpu()
        right += (guessed == batch.labels).sum().item()
    return right / len(fields)
