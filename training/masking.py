"""Self-supervision: what lies in the patches that were dropped is guessed from those that were kept.

As in masked autoencoders (arXiv 2111.06377) the encoder sees kept patches alone, and a light decoder, thrown away after
pretraining, guesses the others. Not their pixels but a descriptor of them (MaskFeat, arXiv 2112.09133): which way edges
run, how dense each colour is. Letters: N images, S tile side, P = G*G patches, M of them kept, D width, C descriptors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.graph import to_images
from model.network import TokenConfig
from model.vit import Block, ViTConfig
from training.augment import STAINS, to_density

CELLS = 3  # a side of each patch: 5 px, about the width of a nucleus' rim
EDGES, COLOURS = 8 * CELLS**2, 2 * 3
FAINT = 0.3  # length of what a camera adds on glass (median on tissue 1 to 1.5): nothing to be guessed
HEAD_WIDTH = 32  # of the decoder's attention


class Guesser(nn.Module):
    """The decoder: kept tokens and, in the place of each dropped one, the mask token."""

    def __init__(self, config: TokenConfig, width: int) -> None:
        super().__init__()
        self.grid = config.grid
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, width))
        self.block = Block(ViTConfig(width=width, heads=width // HEAD_WIDTH, mlp_ratio=2), drop_path=0)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, EDGES + COLOURS)
        self.standardise = nn.BatchNorm1d(EDGES + COLOURS, affine=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.head.weight)  # the mean of each, before the first step

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """From tokens (N, M, D) of the patches `kept` (N, M) to standardised descriptors of all (N, P, C)."""
        known = self.embed(tokens)
        place = kept.unsqueeze(-1).expand_as(known)
        x = self.mask_token.to(known.dtype).expand(len(kept), self.grid**2, -1).scatter(1, place, known)
        x, _ = self.block(x + self.pos_embed, None, False)
        guesses: Tensor = self.head(self.norm(x))
        return guesses

    def truth(self, tiles: Tensor) -> Tensor:
        """(N, P, C) of the tiles as they came: the encoder, which sees them restained, learns to see through it."""
        descriptors = describe_patches(tiles, self.grid)
        standard: Tensor = self.standardise(descriptors.flatten(0, 1))
        return standard.view_as(descriptors)


def masked_loss(guesser: Guesser, tokens: Tensor, kept: Tensor, tiles: Tensor) -> Tensor:
    """Mean squared error on dropped patches: for who knows only the means it is 1 for edges and 1 for colours."""
    errors: Tensor = (guesser(tokens, kept).float() - guesser.truth(tiles)).square()
    dropped = torch.ones(errors.shape[:2], dtype=torch.bool, device=errors.device).scatter(1, kept, False)
    of_patches = errors[..., :EDGES].mean(dim=2) + errors[..., EDGES:].mean(dim=2)  # (N, P)
    return of_patches[dropped].mean()


def describe_patches(tiles: Tensor, grid: int) -> Tensor:
    """uint8 tiles (N, S, S, 3) -> (N, P, C): edges of the haematoxylin, then density and its spread by colour."""
    density = to_density(to_images(tiles))  # (N, 3, S, S)
    mean = F.adaptive_avg_pool2d(density, grid)
    spread = (F.adaptive_avg_pool2d(density.square(), grid) - mean.square()).clamp(min=0).sqrt()
    colours = torch.cat([mean, spread], dim=1).flatten(2).transpose(1, 2)
    unmix = torch.linalg.inv(STAINS)[:, 0].to(tiles.device)
    return torch.cat([describe_edges((density * unmix.view(3, 1, 1)).sum(dim=1), grid), colours], dim=2)


def describe_edges(image: Tensor, grid: int) -> Tensor:
    """Mean slope of (N, S, S) in eight directions in each cell of each patch, of length 1 together: (N, P, 72)."""
    padded = F.pad(image, [1] * 4, mode="replicate")
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    slopes = (right, down, (right + down) / 2**0.5, (right - down) / 2**0.5)
    cells = [F.adaptive_avg_pool2d(F.relu(slope), CELLS * grid) for way in slopes for slope in (way, -way)]
    patches = F.pixel_unshuffle(torch.stack(cells, dim=1), CELLS).flatten(2).transpose(1, 2)
    lengths: Tensor = torch.linalg.vector_norm(patches, dim=2, keepdim=True)
    return patches / (lengths + FAINT)
