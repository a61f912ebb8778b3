"""What a pretrained trunk sees in each patch of fields that it did not learn from, beside what is there."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.graph import to_images
from training.cuts import Cutter
from training.pretrain import Pretrained, gather

DENSE = ("points", "masks")  # the kinds of sources with something in each patch
MOST_FIELDS = 60  # of a source


class PatchMaps(NamedTuple):
    title: str
    names: list[str]  # of what is looked for
    tiles: NDArray[np.uint8]  # (n, S, S, 3)
    truth: NDArray[np.float32]  # (n, G, G, C)
    seen: NDArray[np.float32]  # (n, G, G, C)

    def correlation(self, channel: int) -> float:
        """Over all patches of all tiles; NaN where all are the same, as they are or as they are seen."""
        truth, seen = self.truth[..., channel].ravel(), self.seen[..., channel].ravel()
        if not truth.std() or not seen.std():
            return float("nan")
        return float(np.corrcoef(truth, seen)[0, 1])


@torch.no_grad()
def look_at_held_out(model: Pretrained, cutter: Cutter) -> PatchMaps | None:
    """The middle of each held-out field; None where a source has none, or nothing in its patches."""
    collection = cutter.collection
    fields = collection.held_out[:MOST_FIELDS]
    if collection.source.kind not in DENSE or not fields:
        return None
    cuts = []
    for field in fields:
        height, width = field.pixels.shape[:2]
        side = min(cutter.side_px(field), height, width)
        cuts.append(cutter.cut_at(field, (width - side) / 2, (height - side) / 2, side))
    batch = gather(cuts)
    images = to_images(batch.tiles.to(model.vit.pos_embed.device))
    patches = model.vit.norm(model.vit(images).tokens[-1])[:, 1:]  # (n, G*G, D)
    said = model.heads[collection.task](patches).cpu()  # (n, G*G, C)
    if collection.source.kind == "points":
        names, truth, seen = collection.names, batch.patches, said.exp()
    else:
        names, truth, seen = ["gland"], batch.patches[..., :1], said[..., :1].sigmoid()
    shape = (len(cuts), cutter.grid, cutter.grid, len(names))
    maps = truth.numpy().reshape(shape), seen.numpy().reshape(shape)
    return PatchMaps(f"{collection.task}, held out", names, batch.tiles.numpy(), *maps)
