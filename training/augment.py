"""What a tile may look like and still be the same tissue: batches of uint8 tiles in, float images in [0, 1] out.

Everything runs on whole batches, on the device that trains, so that augmentation is never the brake. All randomness
comes from torch's own generator, which the training loop seeds with (seed, step).
"""

import io
import math
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from model.graph import to_images

# Optical densities of haematoxylin, eosin and their normal (Ruifrok & Johnston 2001), one stain per row.
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
STAINS = STAINS / STAINS.norm(dim=1, keepdim=True)

MOST_MEASURED = 200  # tiles of a collection: more would hardly change its mean
LEAST_MEAN_DENSITY = 0.15  # natural, of the three channels, from which a pixel is tissue, not glass

Share = Annotated[float, Field(ge=0, le=1)]
Density = tuple[float, float, float]  # of red, green and blue light


class Augmentation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    flips: bool = True  # the eight flips and rotations: tissue has no up
    crop: tuple[float, float] = (0.75, 1.0)  # side of the random crop, as a share of the tile's
    stain: float = Field(0.15, ge=0)  # standard deviation of each stain's strength, and of the background's tint
    light: float = Field(0.1, ge=0)  # half width of brightness and contrast
    looks: list[Density] = []  # mean optical densities of other laboratories' tissue, as `mean_density` gives them
    other_look: Share = 0.0  # share of the images that are dyed on the way to one of these looks
    blur: Share = 0.1  # share of the images that are out of focus
    low_resolution: Share = 0.1  # share of the images that are scanned coarser, and enlarged
    jpeg: Share = 0.1  # share of the images that are compressed hard
    mixup: Share = 0.0  # share of the batches whose images are blended pairwise
    cutmix: Share = 0.0  # share of the batches whose images get a square of another


def augment(tiles: Tensor, how: Augmentation, own_look: Tensor | None = None) -> Tensor:
    return move(recolour(tiles, how, own_look), how.crop, how.flips)


def recolour(tiles: Tensor, how: Augmentation, own_look: Tensor | None = None) -> Tensor:
    """All that leaves every pixel in its place: another scanner, another stain, another focus.

    `own_look` (N, 3) is the mean density of the collection that each tile is from.
    """
    images = to_images(compress_some(tiles, how.jpeg))  # (N, 3, S, S)
    images = coarsen_some(images, how.low_resolution)
    images = blur_some(images, how.blur)
    if own_look is not None and how.looks:
        images = dye_some(images, own_look, how)
    return restain(images, how.stain, how.light)


def move(images: Tensor, crop: tuple[float, float], flips: bool) -> Tensor:
    """A random square of each image, flipped and turned, at the full size again: one resampling for all of it."""
    n = len(images)
    side = torch.empty(n, device=images.device).uniform_(*crop)
    shift = torch.empty(n, 2, device=images.device).uniform_(-1, 1) * (1 - side).clamp(min=0).unsqueeze(1)
    turn = dihedral(n, images.device) if flips else torch.eye(2, device=images.device).expand(n, 2, 2)
    affine = torch.cat([turn * side.view(n, 1, 1), shift.unsqueeze(2)], dim=2)  # (N, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def dihedral(n: int, device: torch.device) -> Tensor:
    """One of the eight symmetries of the square for each image, as matrices (N, 2, 2)."""
    mirrored = torch.diag_embed(torch.randint(0, 2, (n, 2), device=device) * 2.0 - 1)
    transposed = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device)
    swap = torch.rand(n, 1, 1, device=device) < 0.5
    return torch.where(swap, mirrored @ transposed, mirrored)


def mean_density(tiles: Tensor) -> Tensor:
    """Of the stained pixels of tiles (N, S, S, 3), or of some of many: (3,), how a collection looks."""
    some = tiles[:: math.ceil(len(tiles) / MOST_MEASURED)]
    density = to_density(to_images(some)).movedim(1, -1)  # (n, S, S, 3)
    stained = density[density.mean(dim=-1) > LEAST_MEAN_DENSITY]  # (M, 3)
    return stained.mean(dim=0) if len(stained) else torch.ones(3, device=tiles.device)


def to_density(images: Tensor) -> Tensor:
    return -torch.log((images * 255 + 1) / 256)


def density_of(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """As `to_density`, of single tiles as files hold them."""
    density: NDArray[np.float64] = -np.log((pixels + 1.0) / 256)
    return density


def from_density(density: Tensor) -> Tensor:
    return (256 * torch.exp(-density) - 1) / 255


def dye_some(images: Tensor, own_look: Tensor, how: Augmentation) -> Tensor:
    """A collection's tissue as another laboratory would show it: densities scaled as one's mean is to the other's.

    Scaled as a whole collection, not tile by tile: within a laboratory how dark a tile is tells tissues apart. Between
    laboratories the means differ by a factor of two to three, more than any jitter around one's own can span.
    """
    chosen = choose(images, how.other_look)
    if not len(chosen):
        return images
    looks = torch.tensor(how.looks, device=images.device)  # (M, 3)
    wanted = looks[torch.randint(len(looks), (len(chosen),), device=images.device)]  # (n, 3)
    way = torch.rand(len(chosen), 1, device=images.device).sqrt()  # most go most of the way
    gain = (wanted / own_look[chosen]) ** way  # (n, 3)
    dyed = from_density(to_density(images[chosen]) * gain[:, :, None, None]).clamp(0, 1)
    return images.index_copy(0, chosen, dyed)


def restain(images: Tensor, stain: float, light: float) -> Tensor:
    """Another laboratory's stain and scanner: each stain stronger or weaker, in optical density (Tellez 1902.06543)."""
    if stain == 0 and light == 0:
        return images
    n, device = len(images), images.device
    stains = STAINS.to(device)
    density = to_density(images)  # (N, 3, S, S)

    strength = torch.diag_embed(torch.exp(stain * torch.randn(n, 3, device=device)))  # (N, 3, 3)
    mix = torch.linalg.inv(stains) @ strength @ stains  # density as a row: unmix, scale, mix again
    tint = 0.1 * stain * torch.randn(n, 3, 1, 1, device=device)
    density = torch.einsum("ncij,ncd->ndij", density, mix) + tint

    gain = torch.empty(n, 1, 1, 1, device=device).uniform_(1 - light, 1 + light)
    return (gain * from_density(density)).clamp(0, 1)


def blur_some(images: Tensor, share: float) -> Tensor:
    chosen = choose(images, share)
    if len(chosen):
        sigma = torch.empty(len(chosen), 1, device=images.device).uniform_(0.5, 2.0)
        images = images.index_copy(0, chosen, gaussian_blur(images[chosen], sigma))
    return images


def gaussian_blur(images: Tensor, sigma_px: Tensor) -> Tensor:
    n, c, s, _ = images.shape
    reach = 5  # 2.5 sigma of the widest
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)  # (N, 11)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)  # (N*3, 11)
    flat = F.pad(images.reshape(1, n * c, s, s), [reach] * 4, mode="reflect")
    flat = F.conv2d(flat, kernel.view(n * c, 1, 1, -1), groups=n * c)
    flat = F.conv2d(flat, kernel.view(n * c, 1, -1, 1), groups=n * c)
    return flat.view(n, c, s, s)


def coarsen_some(images: Tensor, share: float) -> Tensor:
    chosen = choose(images, share)
    if len(chosen):
        s = images.shape[-1]
        small = int(s * torch.empty(1).uniform_(0.4, 0.8).item())
        coarse = F.interpolate(images[chosen], small, mode="bilinear", antialias=True)
        images = images.index_copy(0, chosen, F.interpolate(coarse, s, mode="bilinear"))
    return images


def compress_some(tiles: Tensor, share: float) -> Tensor:
    chosen = choose(tiles, share)
    if len(chosen):
        qualities = torch.randint(40, 91, (len(chosen),)).tolist()
        compressed = [compress(tile, q) for tile, q in zip(tiles[chosen].cpu().numpy(), qualities, strict=True)]
        tiles = tiles.index_copy(0, chosen, torch.from_numpy(np.stack(compressed)).to(tiles.device))
    return tiles


def compress(tile: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def choose(images: Tensor, share: float) -> Tensor:
    return (torch.rand(len(images), device=images.device) < share).nonzero()[:, 0]


def blend(images: Tensor, targets: Tensor, how: Augmentation) -> tuple[Tensor, Tensor]:
    """Mixup (1710.09412) or CutMix (1905.04899) of the whole batch with itself; targets are one-hot (N, K)."""
    dice = torch.rand(1).item()
    if dice < how.mixup:
        weight = float(torch.distributions.Beta(0.4, 0.4).sample())
        return weight * images + (1 - weight) * images.flip(0), weight * targets + (1 - weight) * targets.flip(0)
    if dice < how.mixup + how.cutmix:
        s = images.shape[-1]
        side = int(s * torch.rand(1).sqrt().item())
        top, left = (int(torch.randint(0, s - side + 1, (1,)).item()) for _ in range(2))
        images = images.clone()
        images[:, :, top : top + side, left : left + side] = images.flip(0)[:, :, top : top + side, left : left + side]
        weight = 1 - (side / s) ** 2
        return images, weight * targets + (1 - weight) * targets.flip(0)
    return images, targets


def keep_some_patches(n: int, patches: int, drop: float, device: torch.device) -> Tensor:
    """Indices (N, M) of the patches that are looked at: PatchDropout (2208.07220), faster and a regulariser."""
    kept = max(1, round(patches * (1 - drop)))
    return torch.rand(n, patches, device=device).argsort(dim=1)[:, :kept]
