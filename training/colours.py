"""Teaches a network's colour head: a convex problem, solved at once, before the rest is trained.

Tiles come as they are, for every jitter of their stain would take from what colours tell. Cuts of other laboratories,
where any are rehearsed, teach it how little colours tell there.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import quality
from model.colours import COLOURS, ColourHead
from training.rehearsal import Rehearsal

log = logging.getLogger(__name__)

FITTED = 512  # colours, 8 levels of each channel: some hundred tiles don't tell more of them apart
PENALTY = 1e-3  # of the squared votes, beside the loss of one tile
KNOWN_PX = 10  # of a colour in a tile
KNOWN_TILES = 2  # with so many pixels of it
ITERATIONS = 1000
FLAT = 1e-3  # is the gradient where the solver ends: logits then lie within a hundredth of where they would go


@torch.no_grad()
def teach(
    head: ColourHead, tiles: Tensor, targets: Tensor, rehearsal: Rehearsal | None, rehearsed_share: float
) -> None:
    """From tiles (N, S, S, 3) uint8 and their classes (N,); all cuts together count as a share of the tiles does."""
    pixels = count_colours(tiles)  # (N, COLOURS)
    shares, weights = share_of_fitted(pixels), torch.ones(len(tiles), dtype=torch.float64)
    if rehearsal is not None:
        cuts = share_of_fitted(count_colours(rehearsal.tiles))
        each = rehearsed_share * len(tiles) / len(cuts)
        shares, targets = torch.cat([shares, cuts]), torch.cat([targets, rehearsal.targets])
        weights = torch.cat([weights, torch.full((len(cuts),), each, dtype=torch.float64)])
    votes, bias = fit_votes(shares, targets, weights, classes=len(head.bias))
    known = (pixels >= KNOWN_PX).sum(dim=0) >= KNOWN_TILES
    head.table.copy_(torch.cat([spread(votes), known.unsqueeze(1)], dim=1))
    head.bias.copy_(bias)
    log.info("colours have a vote: %d of %d are known", known.sum(), COLOURS)


def count_colours(tiles: Tensor) -> Tensor:
    """How many pixels of each tile have each colour: (N, COLOURS)."""
    return torch.from_numpy(np.stack([quality.count_colours(tile) for tile in tiles.numpy()]))


def share_of_fitted(pixels: Tensor) -> Tensor:
    """Two levels of each channel in one: (N, FITTED), of the pixels of each tile."""
    counts = pixels.view(-1, 8, 2, 8, 2, 8, 2).sum(dim=(2, 4, 6)).flatten(1).double()
    return counts / counts.sum(dim=1, keepdim=True)


def spread(votes: Tensor) -> Tensor:
    """The other way: what is said of FITTED colours (FITTED, K), for all COLOURS."""
    return votes.view(8, 1, 8, 1, 8, 1, -1).expand(8, 2, 8, 2, 8, 2, -1).reshape(COLOURS, -1)


@torch.enable_grad()
def fit_votes(shares: Tensor, targets: Tensor, weights: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Logistic regression of the classes (M,) on shares of colours (M, C): votes (C, K) and bias (K,)."""
    votes = torch.zeros(shares.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([votes, bias], max_iter=ITERATIONS, tolerance_grad=FLAT, line_search_fn="strong_wolfe")

    def measure_loss() -> Tensor:
        solver.zero_grad()
        losses = F.cross_entropy(shares @ votes + bias, targets, reduction="none")
        loss = weights @ losses + PENALTY / 2 * (votes.square().sum() + bias.square().sum())
        torch.autograd.backward(loss)
        return loss

    solver.step(measure_loss)  # type: ignore[no-untyped-call]
    return votes.detach(), bias.detach()
