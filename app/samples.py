"""Image bytes in, and all that is known of the picture before the model sees it.

Runs in a decoding thread, or in one that calls the model.
"""

import hashlib
from dataclasses import dataclass

from model.artifact import Manifest
from model.pixels import Picture, Tile, decode, to_tile
from model.quality import Palette, Quality, measure_quality

# Few files of tiles are larger, and few files of at most this size hold many more pixels than a tile.
SMALL_BYTES = 1 << 17


@dataclass(frozen=True, slots=True)
class Sample:
    picture: Picture
    tile: Tile
    sha256: str
    quality: Quality


def take_sample(
    data: bytes, manifest: Manifest, mpp: float | None, max_megapixels: float, palette: Palette | None = None
) -> Sample:
    picture = decode(data, max_megapixels)
    tile = to_tile(picture, manifest.tile_px, manifest.tile_mpp, mpp)
    sha256 = hashlib.sha256(data).hexdigest()
    return Sample(picture, tile, sha256, measure_quality(tile.pixels, palette))
