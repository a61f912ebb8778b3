"""Draws tiles that look like H&E: for tests, samples and the golden tile only. They teach nothing about tissue.

Each tile is drawn as two optical densities, haematoxylin and eosin, at 0.495 um/px; a seed is one field on one slide
with its own stain, focus and noise. Only uniform random numbers and float64 arithmetic, so that a seed gives the same
tile on every machine.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.random import PCG64, Generator
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float64]

KINDS = ("Tumor", "Stroma", "Complex", "Lympho", "Debris", "Mucosa", "Adipose", "Empty")  # the Kather set's order
SHIPPED_KINDS = KINDS[:6]
KATHER_FOLDER = "Kather_texture_2016_image_tiles_5000"

# What one unit of each stain takes from red, green and blue, as optical density (base e). Haematoxylin is close to
# Ruifrok and Johnston's (2001); colon slides show eosins from the bluish to the reddish one.
HAEMATOXYLIN = np.array([1.10, 1.19, 0.60])
EOSIN_BLUISH = np.array([0.16, 0.95, 0.45])
EOSIN_REDDISH = np.array([0.14, 1.00, 0.80])

MARGIN_PX = 16  # drawn beyond the edge, so that the edge cuts through cells


class Canvas(NamedTuple):
    """Densities of both stains, with the margin: (S + 2 margins)^2 each."""

    haematoxylin: Plane
    eosin: Plane
    grain: Plane  # fine noise around 0 that every structure shares
    random: Generator

    @property
    def side(self) -> int:
        return len(self.haematoxylin)


class Shapes(NamedTuple):
    """n rough ellipses, each in a window of its own: windows of (n, W, W), corners of (n,)."""

    cover: Plane  # 0 outside, 1 inside
    depth_px: Plane  # distance to the border, positive inside
    left: NDArray[np.int64]
    top: NDArray[np.int64]

    @property
    def width(self) -> int:
        return int(self.cover.shape[1])


def draw_tile(kind: int | str, seed: int, tile_px: int = 150) -> NDArray[np.uint8]:
    """(S, S, 3). `kind` is one of KINDS, or its number."""
    number = KINDS.index(kind) if isinstance(kind, str) else kind
    random = Generator(PCG64([number, seed]))
    side = tile_px + 2 * MARGIN_PX
    canvas = Canvas(np.zeros((side, side)), np.zeros((side, side)), noise(random, side, 2.5), random)
    PAINTERS[number](canvas)
    return develop(canvas)


def write_tree(folder: Path, per_class: int, seed: int = 0, kinds: Sequence[str] = SHIPPED_KINDS) -> None:
    """A folder per class, files named as in the Kather set, each class spread over ten slides."""
    for kind in kinds:
        for i in range(per_class):
            path = folder / kather_name(kind, i, "png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_tile(kind, seed * 1_000_000 + i)).save(path)


def kather_folder(kind: str) -> str:
    return f"{KINDS.index(kind) + 1:02d}_{kind.upper()}"


def kather_name(kind: str, i: int, suffix: str) -> str:
    """Tile i lies on slide i % 10 + 1, at a place of its own."""
    row, column = divmod(i // 10, 33)  # fields of the set are 33 tiles wide
    name = f"{0x1000 + i:X}_CRC-Prim-HE-{i % 10 + 1:02d}_{i // 1000 + 1:03d}.tif"
    return f"{kather_folder(kind)}/{name}_Row_{150 * row + 1}_Col_{150 * column + 1}.{suffix}"


# -- the eight kinds -----------------------------------------------------------------------------------------------


def paint_tumor(canvas: Canvas) -> None:
    """Crowded, large, irregular nuclei with coarse chromatin, more or less in rows; often a lumen."""
    random, side = canvas.random, canvas.side
    flood(canvas, 0.26 + 0.10 * noise(random, side, 25), 0.52 + 0.15 * noise(random, side, 9))
    lumen = noise(random, side, 45) - between(random, 0.2, 0.9)
    x, y = scatter(random, side, between(random, 13, 16), jitter=0.36)
    x, y = keep(x, y, pick(lumen, x, y) < -0.15)
    n = len(x)
    tilt = between(random, 0, np.pi) + 0.9 * pick(noise(random, side, 60), x, y) + spread(random, -0.5, 0.5, n)
    size = spread(random, 0.75, 1.0, n) + 0.35 * random.random(n) ** 3  # a few very large ones
    nuclei = shapes(canvas, x, y, size * spread(random, 8.5, 11, n), size * spread(random, 5.5, 7.5, n), tilt, 0.17)
    lay_vesicular(canvas, nuclei, darkness=between(random, 0.75, 1.1) * spread(random, 0.75, 1.25, n))
    clear(canvas, np.clip(lumen * 12, 0, 1))


def paint_stroma(canvas: Canvas) -> None:
    """Wavy bundles of pink fibres, white clefts between them, a few thin nuclei that follow the fibres."""
    random, side = canvas.random, canvas.side
    strands, across = fibres(random, side, waviness_px=between(random, 8, 22))
    flood(canvas, 0.07 + 0.03 * strands, 0.72 + 0.26 * strands + 0.12 * noise(random, side, 30))
    clear(canvas, clefts(random, across, strands, width=between(random, -0.1, 0.25)))
    x, y = scatter(random, side, between(random, 27, 36), jitter=0.45)
    lay_spindles(canvas, x, y, across)


def paint_complex(canvas: Canvas) -> None:
    """Loose fibres with all kinds of cells between them: lymphocytes, spindles, single large tumour cells."""
    random, side = canvas.random, canvas.side
    strands, across = fibres(random, side, waviness_px=between(random, 15, 30))
    flood(canvas, 0.13 + 0.04 * strands, 0.62 + 0.17 * strands + 0.14 * noise(random, side, 22))
    clear(canvas, clefts(random, across, strands, width=between(random, -0.35, 0.0)))
    x, y = scatter(random, side, between(random, 19, 22), jitter=0.42)
    role = random.random(len(x)) + 0.25 * pick(noise(random, side, 40), x, y)  # cells of a kind lie together
    lay_spindles(canvas, *keep(x, y, role > 0.66), across)
    lay_lymphocytes(canvas, *keep(x, y, role < 0.42))
    large_x, large_y = keep(x, y, (role > 0.42) & (role < 0.66))
    n = len(large_x)
    large = shapes(
        canvas, large_x, large_y, spread(random, 6, 9, n), spread(random, 4.5, 6.5, n), turns(random, n), 0.06
    )
    lay_vesicular(canvas, large, darkness=spread(random, 0.6, 0.9, n))


def paint_lympho(canvas: Canvas) -> None:
    """Small, round, dark nuclei side by side, hardly any cytoplasm."""
    random, side = canvas.random, canvas.side
    paleness = between(random, 0.1, 0.4)
    flood(
        canvas, 0.20 - 0.3 * paleness + 0.06 * noise(random, side, 8), 0.50 - paleness + 0.12 * noise(random, side, 6)
    )
    x, y = scatter(random, side, between(random, 9.6, 11.0), jitter=0.30)
    lay_lymphocytes(canvas, *keep(x, y, random.random(len(x)) < 0.95))


def paint_debris(canvas: Canvas) -> None:
    """Smudges without structure, froth, outlines of dead cells, crumbs of nuclei."""
    random, side = canvas.random, canvas.side
    smudge = noise(random, side, 38) + 0.5 * noise(random, side, 14) + 0.25 * noise(random, side, 6)
    amount = np.clip(0.55 + 0.8 * smudge, 0.05, 1)
    pinkness = between(random, 0.35, 0.75)
    flood(canvas, 0.22 * amount * (1.25 - pinkness), 0.85 * pinkness * amount)

    x, y = scatter(random, side, 15, jitter=0.5)
    x, y = keep(x, y, random.random(len(x)) < 0.75)
    n = len(x)
    holes = shapes(canvas, x, y, spread(random, 2, 9, n), spread(random, 2, 7, n), turns(random, n), 0.25)
    lay(canvas, holes, 0.04, 0.06, strength=0.75)

    x, y = scatter(random, side, 30, jitter=0.5)
    n = len(x)
    ghosts = shapes(canvas, x, y, spread(random, 5, 9, n), spread(random, 4, 7, n), turns(random, n), 0.15)
    rim = np.exp(-((ghosts.depth_px / 1.3) ** 2))
    lay(canvas, ghosts, 0.12 + 0.15 * rim, 0.25 + 0.35 * rim, strength=0.7)
    soften(canvas, 1.2)

    x, y = scatter(random, side, 9, jitter=0.5)
    x, y = keep(x, y, pick(noise(random, side, 25), x, y) > between(random, 0.2, 0.5))
    n = len(x)
    crumbs = shapes(canvas, x, y, spread(random, 0.9, 3.0, n), spread(random, 0.8, 2.2, n), turns(random, n), 0.3)
    lay(canvas, crumbs, spread(random, 0.5, 1.3, (n, 1, 1)), 0.5, strength=0.9)


def paint_mucosa(canvas: Canvas) -> None:
    """A crypt cut across: nuclei in a ring, pale goblet vacuoles inside it, a narrow lumen; loose cells around."""
    random, side = canvas.random, canvas.side
    flood(canvas, 0.13 + 0.05 * noise(random, side, 12), 0.48 + 0.2 * noise(random, side, 9))
    x, y = scatter(random, side, 15, jitter=0.4)
    lay_lymphocytes(canvas, *keep(x, y, random.random(len(x)) < 0.55))
    turn, reach = between(random, 0, 2 * np.pi), between(random, 10, 38)
    radius_px = between(random, 56, 72)
    for away in (reach, reach - between(random, 2.0, 2.2) * radius_px):
        lay_crypt(canvas, side / 2 + away * np.cos(turn), side / 2 + away * np.sin(turn), radius_px)


def paint_adipose(canvas: Canvas) -> None:
    """Empty fat cells with thin walls."""
    random, side = canvas.random, canvas.side
    cell_px = between(random, 60, 90)
    x, y = scatter(random, side + round(2 * cell_px), cell_px, jitter=0.4)  # with all cells that reach in
    rows, columns = np.mgrid[:side, :side]
    bend = 6 * noise(random, side, 30)
    x, y = x[:, None, None] - cell_px, y[:, None, None] - cell_px
    distance = np.hypot(columns + bend - x, rows + bend - y)  # (n, side, side)
    nearest, second = np.partition(distance, 1, axis=0)[:2]
    wall = np.exp(-(((second - nearest) / between(random, 2.5, 5)) ** 2))
    flood(canvas, 0.12 * wall, 0.03 + 0.5 * wall * (1 + 0.3 * canvas.grain))


def paint_empty(canvas: Canvas) -> None:
    """Glass, with a breath of mounting medium."""
    flood(canvas, 0.01, 0.02 + 0.02 * noise(canvas.random, canvas.side, 50))


PAINTERS = (  # in the order of KINDS
    paint_tumor,
    paint_stroma,
    paint_complex,
    paint_lympho,
    paint_debris,
    paint_mucosa,
    paint_adipose,
    paint_empty,
)


# -- cells and fibres ----------------------------------------------------------------------------------------------


def lay_vesicular(canvas: Canvas, nuclei: Shapes, darkness: Plane) -> None:
    """Open chromatin: a dark border, coarse clumps, and a nucleolus or two."""
    rim = np.exp(-(((nuclei.depth_px - 0.8) / 1.1) ** 2))
    clumps = windows(canvas.grain, nuclei.left, nuclei.top, nuclei.width)
    ink = darkness[:, None, None] * (0.72 + 0.45 * rim + 0.55 * clumps)
    lay(canvas, nuclei, ink, 0.35, strength=0.88)


def lay_lymphocytes(canvas: Canvas, x: Plane, y: Plane) -> None:
    random, n = canvas.random, len(x)
    radius_px = spread(random, 3.7, 5.0, n)
    nuclei = shapes(canvas, x, y, radius_px * spread(random, 1.0, 1.25, n), radius_px, turns(random, n), 0.05)
    ink = spread(random, 1.25, 1.75, (n, 1, 1)) * (
        1 + 0.3 * windows(canvas.grain, nuclei.left, nuclei.top, nuclei.width)
    )
    lay(canvas, nuclei, ink, 0.40, strength=0.94)


def lay_spindles(canvas: Canvas, x: Plane, y: Plane, across: Plane) -> None:
    """Thin nuclei along the fibres, which run where `across` stays the same."""
    random, n = canvas.random, len(x)
    down, right = (np.asarray(slope) for slope in np.gradient(across))
    tilt = np.arctan2(-pick(right, x, y), pick(down, x, y)) + spread(random, -0.2, 0.2, n)
    nuclei = shapes(canvas, x, y, spread(random, 7, 12, n), spread(random, 1.8, 3.3, n), tilt, roughness=0.06)
    ink = spread(random, 0.8, 1.3, (n, 1, 1)) * (
        1 + 0.35 * windows(canvas.grain, nuclei.left, nuclei.top, nuclei.width)
    )
    lay(canvas, nuclei, ink, 0.5, strength=0.9)


def lay_crypt(canvas: Canvas, x: float, y: float, radius_px: float) -> None:
    """From the outside in: basal nuclei, goblet cells, the lumen. Crypts are cut aslant, so the ring is an oval."""
    random = canvas.random
    oval = Oval(x, y, radius_px, between(random, 0.78, 1.0), between(random, 0, np.pi))
    lay(canvas, oval_shape(canvas, oval, 1.0), 0.16, 0.40, strength=1.0)

    nuclei_x, nuclei_y, outward = around(random, oval, 0.91, apart_px=7.0)
    n = len(nuclei_x)
    nuclei = shapes(canvas, nuclei_x, nuclei_y, spread(random, 4.5, 7, n), spread(random, 3, 4.4, n), outward, 0.12)
    lay_vesicular(canvas, nuclei, darkness=spread(random, 0.9, 1.4, n))

    goblet_x, goblet_y, outward = around(random, oval, 0.58, apart_px=19.5)
    n = len(goblet_x)
    size = spread(random, 0.75, 1.1, n)
    goblets = shapes(canvas, goblet_x, goblet_y, 15 * size, 11.5 * size, outward, 0.12)
    rim = np.exp(-(((goblets.depth_px - 0.3) / 1.0) ** 2))
    froth = 0.07 * windows(canvas.grain, goblets.left, goblets.top, goblets.width)
    lay(canvas, goblets, spread(random, 0.10, 0.22, (n, 1, 1)) + 0.28 * rim + froth, 0.07 + 0.3 * rim, strength=0.93)

    lay(canvas, oval_shape(canvas, oval, between(random, 0.12, 0.26)), 0.04, 0.05, strength=0.9)


class Oval(NamedTuple):
    x: float
    y: float
    radius_px: float  # the longer one
    narrowing: float  # the shorter one, as a share of it
    tilt: float


def oval_shape(canvas: Canvas, oval: Oval, share: float) -> Shapes:
    x, y, radius_px, narrowing, tilt = (np.array([value]) for value in oval)
    return shapes(canvas, x, y, share * radius_px, share * narrowing * radius_px, tilt, roughness=0.04 / share**0.5)


def around(random: Generator, oval: Oval, share: float, apart_px: float) -> tuple[Plane, Plane, Plane]:
    """Places on the oval shrunk to `share`, and the directions that point outwards there."""
    n = round(np.pi * (1 + oval.narrowing) * share * oval.radius_px / apart_px)
    turn = (np.arange(n) + spread(random, -0.25, 0.25, n)) * 2 * np.pi / n
    away = oval.radius_px * share * spread(random, 0.94, 1.06, n)
    along, aside = away * np.cos(turn), oval.narrowing * away * np.sin(turn)
    right = np.cos(oval.tilt) * along - np.sin(oval.tilt) * aside
    down = np.sin(oval.tilt) * along + np.cos(oval.tilt) * aside
    return oval.x + right, oval.y + down, np.arctan2(down, right)


def fibres(random: Generator, side: int, waviness_px: float) -> tuple[Plane, Plane]:
    """Strands from -1 to 1, and the coordinate across them in pixels."""
    rows, columns = np.mgrid[:side, :side]
    turn = random.random() * np.pi
    across = np.cos(turn) * rows - np.sin(turn) * columns
    across = across + waviness_px * noise(random, side, 55) + 2.5 * noise(random, side, 16)
    strands = np.zeros((side, side))
    for width_px, strength in ((4.0, 0.28), (7.0, 0.34), (17.0, 0.38)):
        phase = 5 * noise(random, side, 22) + 2 * np.pi * random.random()
        strands += strength * np.sin(2 * np.pi / width_px * across + phase)
    return strands, across


def clefts(random: Generator, across: Plane, strands: Plane, width: float) -> Plane:
    """Where bundles have come apart in cutting: 1 in the open, 0 in the bundle."""
    side = len(across)
    wave = np.sin(2 * np.pi / between(random, 28, 45) * across + 3 * noise(random, side, 40))
    return np.clip(7 * (wave + 0.9 * noise(random, side, 28) + 0.3 * strands - 1.35 + width), 0, 1)


# -- how density is laid down --------------------------------------------------------------------------------------


def shapes(
    canvas: Canvas, x: Plane, y: Plane, long_px: Plane, short_px: Plane, tilt: Plane, roughness: float
) -> Shapes:
    reach = int(np.ceil((1 + roughness) * max(long_px.max(initial=1), short_px.max(initial=1)))) + 1
    left, top = np.floor(x).astype(np.int64) - reach, np.floor(y).astype(np.int64) - reach
    steps = np.arange(2 * reach + 1)
    right = (steps - (x - left)[:, None])[:, None, :]  # (n, 1, W)
    down = (steps - (y - top)[:, None])[:, :, None]  # (n, W, 1)
    cos, sin = np.cos(tilt)[:, None, None], np.sin(tilt)[:, None, None]
    p = (right * cos + down * sin) / long_px[:, None, None]
    q = (down * cos - right * sin) / short_px[:, None, None]

    uneven = roughness * noise(canvas.random, canvas.side, 0.5 * reach)
    bumps = windows(uneven, left, top, 2 * reach + 1)
    depth_px = (1 + bumps - np.sqrt(p * p + q * q)) * np.sqrt(long_px * short_px)[:, None, None]
    return Shapes(np.clip(depth_px / 1.4 + 0.5, 0, 1), depth_px, left, top)


def windows(plane: Plane, left: NDArray[np.int64], top: NDArray[np.int64], width: int) -> Plane:
    """What the plane holds in n square windows, wherever they lie: (n, width, width)."""
    roomy = np.pad(plane, width, mode="reflect")
    last = len(plane) + width
    squares = sliding_window_view(roomy, (width, width))
    return np.asarray(squares[(top + width).clip(0, last), (left + width).clip(0, last)])


def lay(canvas: Canvas, things: Shapes, haematoxylin: float | Plane, eosin: float | Plane, strength: float) -> None:
    """Puts each shape over what is there, one after the other; `strength` says how little shines through."""
    cover, width = strength * things.cover, things.width
    inks = (np.broadcast_to(haematoxylin, cover.shape), np.broadcast_to(eosin, cover.shape))
    for plane, ink in zip((canvas.haematoxylin, canvas.eosin), inks, strict=True):
        roomy = np.pad(plane, width)
        for k, (top, left) in enumerate(zip(things.top + width, things.left + width, strict=True)):
            if min(top, left) >= 0 and max(top, left) <= len(plane) + width:  # else quite outside
                spot = roomy[top : top + width, left : left + width]
                spot += cover[k] * (ink[k] - spot)
        plane[:] = roomy[width:-width, width:-width]


def flood(canvas: Canvas, haematoxylin: float | Plane, eosin: float | Plane) -> None:
    canvas.haematoxylin[:] = haematoxylin
    canvas.eosin[:] = eosin


def clear(canvas: Canvas, openness: Plane) -> None:
    """Glass where `openness` is 1."""
    canvas.haematoxylin[:] *= 1 - openness
    canvas.eosin[:] *= 1 - openness


def soften(canvas: Canvas, sigma_px: float) -> None:
    canvas.haematoxylin[:] = blurred(canvas.haematoxylin, sigma_px)
    canvas.eosin[:] = blurred(canvas.eosin, sigma_px)


def develop(canvas: Canvas) -> NDArray[np.uint8]:
    """Densities to light, through this slide's stains, this scanner's focus, glass and noise."""
    random = canvas.random
    inside = slice(MARGIN_PX, -MARGIN_PX)
    focus_px = between(random, 0.45, 0.85)
    redness = random.random()
    stains = (
        np.exp(between(random, -0.2, 0.25)) * HAEMATOXYLIN * spread(random, 0.93, 1.07, 3),
        np.exp(between(random, -0.25, 0.25)) * (redness * EOSIN_REDDISH + (1 - redness) * EOSIN_BLUISH),
    )
    texture = 1 + 0.16 * canvas.grain
    planes = [blurred(plane * texture, focus_px).clip(0)[inside, inside] for plane in canvas[:2]]
    density = planes[0][..., None] * stains[0] + planes[1][..., None] * stains[1]  # (S, S, 3)
    glass = between(random, 0.90, 0.97) * spread(random, 0.985, 1.0, 3)
    noise_of_light = 0.012 * (random.random(density.shape) + random.random(density.shape) - 1)
    light = np.clip(glass * np.exp(-density) + noise_of_light, 0, 1)
    return np.asarray(np.round(255 * light), dtype=np.uint8)


# -- random fields and places --------------------------------------------------------------------------------------


def between(random: Generator, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def spread(random: Generator, low: float, high: float, size: int | tuple[int, ...]) -> Plane:
    return low + (high - low) * random.random(size)


def turns(random: Generator, size: int | tuple[int, ...]) -> Plane:
    return spread(random, 0, 2 * np.pi, size)


def noise(random: Generator, side: int, cell_px: float) -> Plane:
    """Smooth noise from about -1 to 1, with bumps of `cell_px`: a cubic B-spline through random numbers."""
    first, weights = spline(side, cell_px)
    plane = 2 * random.random((first[-1] + 4, first[-1] + 4)) - 1
    for _ in range(2):  # along the columns, then along the rows; no BLAS, whose threads fight over so small products
        knots, plane = plane, np.zeros((side, plane.shape[1]))
        for k, weight in enumerate(weights):
            plane += weight[:, None] * knots[first + k]
        plane = plane.T
    return 1.6 * plane  # the spline takes the edge off the extremes


@cache
def spline(side: int, cell_px: float) -> tuple[NDArray[np.intp], Plane]:
    """The first of the four knots around each pixel, and their weights (4, side)."""
    place = np.arange(side) / cell_px
    first = np.floor(place).astype(np.intp)
    t = place - first
    return first, np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3]) / 6


def blurred(plane: Plane, sigma_px: float) -> Plane:
    reach = int(np.ceil(3 * sigma_px))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_px) ** 2)
    weights /= weights.sum()
    for _ in range(2):  # along the rows, then along the columns
        side = len(plane)
        roomy = np.pad(plane, ((reach, reach), (0, 0)), mode="edge")
        plane = np.zeros_like(plane)
        for k, weight in enumerate(weights):
            plane += weight * roomy[k : k + side]
        plane = plane.T
    return plane


def scatter(random: Generator, side: int, apart_px: float, jitter: float) -> tuple[Plane, Plane]:
    """Places about `apart_px` apart: a hexagonal grid, each point moved by up to `jitter` of that."""
    rows = int(side / (0.87 * apart_px)) + 2
    columns = int(side / apart_px) + 2
    row, column = np.divmod(np.argsort(random.random(rows * columns)), columns)
    shift = spread(random, -jitter, jitter, (2, rows * columns)) + random.random((2, 1))
    x, y = apart_px * (column + 0.5 * (row % 2) - 1 + shift[0]), apart_px * (0.87 * (row - 1) + shift[1])
    return keep(x, y, (x > 0) & (x < side) & (y > 0) & (y < side))


def keep(x: Plane, y: Plane, chosen: NDArray[np.bool_]) -> tuple[Plane, Plane]:
    return x[chosen], y[chosen]


def pick(plane: Plane, x: Plane, y: Plane) -> Plane:
    """The plane's values at the nearest pixels."""
    last = len(plane) - 1
    return np.asarray(plane[y.astype(int).clip(0, last), x.astype(int).clip(0, last)])
