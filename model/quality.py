"""How much of a tile is tissue and how sharp it is: numbers that don't depend on the network.

The training fits the limits that the artefact carries with the same functions.
"""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (S, S, 3)

# Optical density of its darkest channel above which a pixel counts as stained: pale eosin absorbs in the green alone,
# and clear glass stays below 0.1. Density is -log10 of the transmission, so the limit is one on the darkest channel.
_STAINED_DENSITY = 0.15
_STAINED_BELOW = 256 * 10**-_STAINED_DENSITY - 1
_STEP = 2  # every second pixel each way tells the share to well below a per cent


def tissue_share(tile: Pixels) -> float:
    """Share of pixels that are stained, 0 to 1."""
    red, green, blue = np.moveaxis(tile[::_STEP, ::_STEP], 2, 0)
    darkest = np.minimum(np.minimum(red, green), blue)  # (S/2, S/2)
    return float((darkest < _STAINED_BELOW).mean())


def sharpness(tile: Pixels) -> float:
    """Variance of the Laplacian of the grey picture, in squared grey levels; low where the picture is blurred.

    Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000.
    """
    channels = tile.astype(np.int16)
    grey = (channels[:, :, 0] + 2 * channels[:, :, 1] + channels[:, :, 2]) >> 2  # (S, S)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float32))
