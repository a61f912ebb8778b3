"""What is learnt before the labelled tiles: whole-image classes, nuclei and glands per patch, labels by rule, and with
`[masked]` what dropped patches hold, of images without labels too.

    tissue-train pretrain configs/pretrain.toml

Cuts of every source at the tile's own magnification enter one batch; one trunk and a head for each kind of label
leave. The dense labels (what lies in each patch) fit the patch tokens of a Vision Transformer as they are.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.graph import to_images
from model.network import TokenConfig, build_tokens
from training import checkpoint
from training.augment import keep_some_patches, recolour
from training.config import BadConfig, Masked, Pretrain, Source
from training.cuts import Cut, Cutter, mean_look
from training.fields import NO_LABEL, Collection, read_source
from training.masking import Guesser, masked_loss
from training.train import best_device, optimise, refuse_unfilled

DROPPED = "dropped patches"  # the task of `[masked]`
MOST_ASKED_OF = 500  # held-out fields of a source: more would make a validation longer, not sharper


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
        missing, _ = checkpoint.start_from(model.vit, config.init)
        refuse_unfilled(config.optimisation.frozen, missing)
    how = config.optimisation
    total = sum(source.share for source in config.sources)
    sizes = [max(1, round(how.batch * source.share / total)) for source in config.sources]
    looks = torch.stack([mean_look(cutter) for cutter in cutters])  # (sources, 3)
    own_look = looks.repeat_interleave(torch.tensor(sizes), dim=0).to(device)  # (N, 3)

    def loss_of(net: Pretrained, step: int) -> Tensor:
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

    def validate(net: Pretrained) -> float:
        scores = [held_out_accuracy(net, cutter, device) for cutter in cutters if cutter.collection.held_out]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if known else math.nan

    return optimise(model, loss_of, how, folder, validate, title=config.name)


@torch.no_grad()
def held_out_accuracy(model: Pretrained, cutter: Cutter, device: torch.device) -> float | None:
    """Of whole-image classes, on held-out images looked at whole; what the dense heads see, `patches` shows."""
    if cutter.collection.source.kind != "classes":
        return None
    fields = cutter.collection.held_out
    fields = fields[:: math.ceil(len(fields) / MOST_ASKED_OF)]
    right = 0.0
    for start in range(0, len(fields), 100):
        part = fields[start : start + 100]
        batch = gather([cutter.cut_at(field, 0, 0, min(field.pixels.shape[:2])) for field in part])
        out = model.vit(to_images(batch.tiles.to(device)))
        guessed = model.heads[cutter.collection.task](out.features).argmax(dim=1).cpu()
        right += (guessed == batch.labels).sum().item()
    return right / len(fields)
