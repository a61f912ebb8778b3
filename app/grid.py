"""A field larger than a tile: cut into adjoining tiles, and their answers drawn over it, as QuPath reads them."""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.export import Answer, spread
from app.settings import MOST_MEGAPIXELS
from model.pixels import MIN_SIDE_PX, ImageRefused, ImageTooSmall, Note, choose_field, choose_mpp, decode

UNKNOWN = "#808080"  # colour of a class that the card lacks, as the service has changed its model meanwhile


class Place(NamedTuple):
    """In the pixels of the upright field, from its top left."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Field:
    rgb: NDArray[np.uint8]  # (height, width, 3)
    mpp: float
    side_px: int  # of a tile; whole pixels, so that each tile is a picture of its own
    notes: tuple[Note, ...]  # about the field's file, which the pictures of its tiles don't tell
    origin: dict[str, str]  # likewise: what an answer's `input` says of the file, not of the tile


def read_field(data: bytes, tile_px: int, tile_mpp: float, mpp: float | None) -> Field:
    picture = decode(data, MOST_MEGAPIXELS)
    mpp, source = choose_mpp(picture, mpp)
    if mpp is None:
        raise ImageRefused("The file doesn't tell its scale, which says how large a tile is. Give --mpp, um per pixel.")
    shorter_px = min(picture.rgb.shape[:2])
    side_px = math.ceil(choose_field(shorter_px, tile_px, tile_mpp, mpp)[0])
    if side_px < MIN_SIDE_PX:
        raise ImageTooSmall(
            f"At {mpp:g} um per pixel a tile has {side_px} x {side_px} px; it must have at least {MIN_SIDE_PX}."
            " Send the field at a higher magnification."
        )
    origin = {"format": picture.format, "mpp_source": source, "sha256": hashlib.sha256(data).hexdigest()}
    return Field(picture.rgb, mpp, side_px, picture.notes, origin)


def cut_field(field: Field) -> Iterator[tuple[Place, bytes]]:
    """Row by row, each as a PNG; what remains at the right and at the bottom is no whole tile and left out."""
    side = field.side_px
    height, width, _ = field.rgb.shape
    for y in range(0, height - side + 1, side):
        for x in range(0, width - side + 1, side):
            yield Place(x, y, side, side), encode(field.rgb[y : y + side, x : x + side])


def encode(rgb: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1)  # soon unpacked again
    return buffer.getvalue()


def to_geojson(answers: Iterable[Answer], colors: Mapping[str, str]) -> dict[str, Any]:
    """A polygon for each tile that was answered; `colors` has each class's, as #rrggbb."""
    features = [draw_tile(answer, colors) for answer in answers if "error" not in answer]
    return {"type": "FeatureCollection", "features": features}


def draw_tile(answer: Answer, colors: Mapping[str, str]) -> dict[str, Any]:
    """QuPath wants a classification's colour as three numbers, and as measurements nothing but numbers."""
    label = answer["label"]
    measurements = {"confidence": answer["confidence"], **spread("p_", answer["probabilities"])}
    properties = {"objectType": "tile", "measurements": measurements, "metadata": {"verdict": answer["verdict"]}}
    if answer["verdict"] != "out_of_scope":  # or glass would be painted as a tissue
        properties["classification"] = {"name": label, "color": list(bytes.fromhex(colors.get(label, UNKNOWN)[1:]))}
    geometry = {"type": "Polygon", "coordinates": [outline(Place(**answer["box"]))]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def outline(place: Place) -> list[list[int]]:
    """Closed: the last corner is the first."""
    left, top, right, bottom = place.x, place.y, place.x + place.width, place.y + place.height
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
