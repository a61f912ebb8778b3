"""What is sent: tiles drawn here, so that anybody can run the benchmarks, or those of a folder; and a damaged one."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from training.synthetic import SHIPPED_KINDS, draw_tile

Form = Literal["jpeg", "png"]

COUNT = 24  # more than any server here gathers into one batch
JPEG_QUALITY = 90
PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}


@dataclass(frozen=True)
class Tile:
    data: bytes
    content_type: str


def load_tiles(form: Form, folder: Path | None = None, side_px: int = 150) -> list[Tile]:
    """All are files of one form, whatever form they had in the folder."""
    images = draw_images(side_px) if folder is None else read_images(folder)
    return [encode(image, form) for image in images]


def draw_images(side_px: int) -> list[Image.Image]:
    kinds = [SHIPPED_KINDS[i % len(SHIPPED_KINDS)] for i in range(COUNT)]
    return [Image.fromarray(draw_tile(kind, seed, side_px)) for seed, kind in enumerate(kinds)]


def read_images(folder: Path) -> list[Image.Image]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)[:COUNT]
    if not paths:
        raise ValueError(f"{folder} holds no picture; expected files that end in {', '.join(sorted(PICTURES))}")
    return [read_image(path) for path in paths]


def read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def encode(image: Image.Image, form: Form) -> Tile:
    file = io.BytesIO()
    if form == "jpeg":
        image.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(file, "PNG")
    return Tile(file.getvalue(), f"image/{form}")


def cut_short(tile: Tile) -> Tile:
    """Like an upload that broke off: its header is right, half of its bytes are missing."""
    return Tile(tile.data[: len(tile.data) // 2], tile.content_type)


def mean_bytes(tiles: Sequence[Tile]) -> int:
    return round(sum(len(tile.data) for tile in tiles) / len(tiles))
