"""What the colours of a tile say, without any shape: a table in which each colour has a vote for each class.

A vote counts as far as the training's tiles had the tile's colours. How dark and how blue a tissue is tells much within
a laboratory, and misleads in another, where stains and scanners differ.
Letters: N batch, S tile side, P patch side, G = S/P, K classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLOURS = 4096  # 16 levels of each channel
DRAWN = 16  # pixels, all of which have to be of known colours
STEP = 3  # every third pixel each way tells as much, for a fifth of the time


class ColourVotes(NamedTuple):
    patches: Tensor  # (N, G*G, K) of each patch
    share: Tensor  # (N, 1) of the votes in the logits


class ColourHead(nn.Module):
    """Has no share until it is taught (`training/colours.py`): no colour is known to it before."""

    table: Tensor  # (COLOURS, K + 1) of each colour the votes, and 1 where it is known
    bias: Tensor  # (K,)

    def __init__(self, patch_px: int, classes: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.register_buffer("table", torch.zeros(COLOURS, classes + 1))
        self.register_buffer("bias", torch.zeros(classes))

    def forward(self, images: Tensor) -> Tensor:
        """What is in the table for the pixels of each patch, on average: (N, G*G, K + 1)."""
        step = STEP if self.patch_px % STEP == 0 else 1
        colours = name_colours(images[:, :, step // 2 :: step, step // 2 :: step])  # (N, s, s)
        n, patch, grid = images.shape[0], self.patch_px // step, images.shape[-1] // self.patch_px
        colours = colours.view(n, grid, patch, grid, patch).transpose(2, 3).reshape(n, grid**2, patch**2)
        return F.embedding(colours, self.table).mean(dim=2)


def name_colours(images: Tensor) -> Tensor:
    """The row of the table for each pixel (N, S, S) of images (N, 3, S, S) in [0, 1]."""
    # Half a level up, or rounding would decide at the edges; whole before the sum, for fp16 has no odd ones over 2,048.
    levels = (images * (255 / 16) + 0.5 / 16).floor().int()
    return (levels[:, 0] * 16 + levels[:, 1]) * 16 + levels[:, 2]


def weigh_votes(most: float, known: Tensor) -> Tensor:
    """Their share: as much of the most as pixels drawn at random are likely to be all of known colours.

    With a hundredth of the pixels unknown it is .85 of it, with a tenth .19.
    """
    return most * known**DRAWN
