"""What a tile looks like: numbers that don't depend on the network, cheap enough for every request.

The training fits the limits that the artefact carries with the same functions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (S, S, 3)
Colours = NDArray[np.float32]  # (4096,) how many of a tile's pixels have each colour, its channels cut to four bits
Palette = NDArray[np.bool_]  # (4096,) whether a colour, cut likewise, is one that stained tissue has

# Optical density of its darkest channel above which a pixel counts as stained: pale eosin absorbs in the green alone,
# and clear glass stays below 0.1. Density is -log10 of the transmission, so the limit is one on the darkest channel.
_LEAST_DARKEST_DENSITY = 0.15
_STAINED_UP_TO = np.uint8(256 * 10**-_LEAST_DARKEST_DENSITY - 1)
_STEP = 2  # every second pixel each way gives the shares to well below a per cent

_BITS = 4  # of a channel: with more, some hundred tiles leave holes in a palette; with fewer, everything is pink
PALETTE_SIZE = 2 ** (3 * _BITS)


@dataclass(frozen=True, slots=True)
class Quality:
    tissue_share: float  # of pixels that are stained, 0 to 1
    sharpness: float
    brightness: float  # mean level of the stained pixels, 0 to 255; 255 where there are none
    odd_share: float  # of the stained pixels, those that absorb red or blue more than green, as H&E hardly does
    blue_absorption: float  # of the stained pixels, as a multiple of their absorption of green
    foreign_share: float | None  # of pixels whose colour is not in the palette; None without a palette


def measure_quality(tile: Pixels, palette: Palette | None = None) -> Quality:
    seen = tile[::_STEP, ::_STEP]
    least = np.minimum(seen[..., 0], seen[..., 2])  # (S/2, S/2), as all that follow
    stained = np.minimum(least, seen[..., 1]) <= _STAINED_UP_TO
    n_stained = int(np.count_nonzero(stained))
    n_odd = int(np.count_nonzero(stained & (least < seen[..., 1])))
    colours = count_colours(seen)
    counted, light, green, blue = map(float, _COLOUR_WEIGHTS @ colours)
    return Quality(
        tissue_share=n_stained / stained.size,
        sharpness=sharpness(tile),
        brightness=light / counted if counted else 255.0,
        odd_share=n_odd / n_stained if n_stained else 0.0,
        blue_absorption=blue / green if green else 0.0,
        foreign_share=None if palette is None else float(1 - colours @ palette / colours.sum()),
    )


def count_colours(pixels: NDArray[np.uint8]) -> Colours:
    cut = pixels >> (8 - _BITS)  # (..., 3)
    place = cut[..., 0].astype(np.uint16)
    for channel in (cut[..., 1], cut[..., 2]):
        place <<= _BITS
        place |= channel
    return np.bincount(place.ravel(), minlength=PALETTE_SIZE).astype(np.float32)


def weigh_colours() -> NDArray[np.float32]:
    """What a pixel of each colour adds to four sums: stained pixels, their level, absorption of green and of blue."""
    level = (np.arange(2**_BITS) + 0.5) * 2 ** (8 - _BITS)  # the middle of the levels that share these four bits
    red, green, blue = np.meshgrid(level, level, level, indexing="ij")
    stained = np.minimum(np.minimum(red, green), blue) <= _STAINED_UP_TO
    each = [np.ones(stained.shape), (red + 2 * green + blue) / 4, -np.log10(green / 256), -np.log10(blue / 256)]
    return np.stack([(stained * values).ravel() for values in each]).astype(np.float32)  # (4, 4096)


_COLOUR_WEIGHTS = weigh_colours()


def sharpness(tile: Pixels) -> float:
    """Variance of the Laplacian of the grey picture, in squared grey levels; low where the picture is blurred.

    Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000.
    """
    side = tile.shape[1]
    grey = np.add(tile[..., 0], tile[..., 2], dtype=np.int16)
    grey += tile[..., 1].astype(np.int16) << 1
    grey >>= 2
    flat = grey.ravel()  # sums are quickest where memory is contiguous; what wraps around the edge is cut off below
    laplacian = flat[: -2 * side] + flat[2 * side :]
    laplacian -= flat[side:-side] << 2
    laplacian[1:] += flat[side : -side - 1]
    laplacian[:-1] += flat[side + 1 : -side]
    inner = laplacian.reshape(-1, side)[:, 1:-1].astype(np.float32).ravel()
    mean = float(inner.mean())
    return max(0.0, float(inner @ inner) / inner.size - mean * mean)
