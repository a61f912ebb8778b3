"""A tile and a map over its patches in, a PNG out that a reader can judge without asking how it was made.

Every picture states its own limits beside a colour bar, which never starts at the map's own minimum:
a flat map looks flat.
"""

import math
import unicodedata
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from zlib import Z_RLE

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from app.colormaps import TABLES
from app.schemas import Colormap, Upsample

PANEL_PX = 380  # about the side of a panel: one overlay in less than 25 ms, most of it for packing the PNG
CELL_PX = 110  # about the side of one head's panel: twelve layers of six heads make a page
CELL_GAP_PX = 6
MARGIN_PX = 16
BAR_PX = 18
SMALLEST_RULED_PX = 20  # patches drawn smaller than this are told apart without lines
TEXT_PX = 15
SMALL_TEXT_PX = 13
LINE_PX = 21

INK = (32, 32, 32)
PAPER = (255, 255, 255)

# A map weaker than this, in logits or in shares, is rounding and must look like nothing.
SMALLEST_LIMIT = 1e-3


class UndrawableMap(ValueError):
    """The map is no square grid of finite numbers."""


@dataclass(frozen=True)
class Scale:
    """Which number has which colour: `low` and `high` are the ends of `table`, uint8 (256, 3)."""

    low: float
    high: float
    table: np.ndarray
    ticks: tuple[tuple[float, str], ...]  # values to write beside the colour bar, from low to high

    @property
    def limits(self) -> str:
        return f"{self.low:.6g} to {self.high:.6g}"

    def colour(self, values: np.ndarray) -> np.ndarray:
        level = (values - self.low) * (255 / (self.high - self.low))
        return self.table.take(level.round().clip(0, 255).astype(np.uint8), axis=0)


def choose_scale(
    values: np.ndarray,
    *,
    signed: bool,
    uniform_level: float | None,
    colormap: Colormap,
    quantile: float = 1.0,
) -> Scale:
    """From zero to the peak (or to a `quantile` of the values), and for signed values as far to the other side.

    With a uniform level the scale reaches at least twice as high, so that uniform attention is mid-scale
    and a nearly uniform one is not stretched into a pattern.
    """
    peak = float(np.quantile(np.abs(values), quantile))
    if signed:
        limit = max(peak, SMALLEST_LIMIT)
        sides = ((-limit, f"{-limit:.3g} against"), (0.0, "0"), (limit, f"+{limit:.3g} for"))
        return Scale(-limit, limit, TABLES["diverging"], sides)
    high = max(peak, 2 * uniform_level if uniform_level else SMALLEST_LIMIT)
    low = -high if colormap == "diverging" else min(0.0, float(values.min()))
    middle = (low + high) / 2
    ticks = [(low, f"{low:.3g}"), (high, f"{high:.3g}" + (" and above" if values.max() > high else ""))]
    if uniform_level:
        ticks.append((uniform_level, f"{uniform_level:.3g} uniform"))
    # The middle gives way where its label would touch the uniform level's.
    if not uniform_level or abs(middle - uniform_level) > 0.1 * (high - low):
        ticks.append((middle, f"{middle:.3g}"))
    return Scale(low, high, TABLES[colormap], tuple(sorted(ticks)))


def draw_overlay(
    tile: np.ndarray,
    grid: np.ndarray,
    *,
    caption: str,
    signed: bool,
    uniform_level: float | None,
    colormap: Colormap,
    alpha: float,
    upsample: Upsample,
    tile_mpp: float | None,
    quantity: str = "",
) -> bytes:
    """The tile (S, S, 3) beside itself in grey under the map (G, G), with a bar that names the `quantity`."""
    require_finite(grid, dimensions=2)
    scale = choose_scale(grid, signed=signed, uniform_level=uniform_level, colormap=colormap)
    side_px = multiple_near(PANEL_PX, len(grid))
    lines = wrap(caption, 2 * side_px + MARGIN_PX)
    top_px = MARGIN_PX + LINE_PX * len(lines) + (MARGIN_PX // 2 if lines else 0)
    bar_left_px = 3 * MARGIN_PX + 2 * side_px

    sheet = Image.new(
        "RGB", (bar_left_px + bar_width(scale, quantity) + MARGIN_PX, top_px + side_px + MARGIN_PX), PAPER
    )
    write_lines(sheet, lines)
    sheet.paste(enlarge_tile(tile, side_px, tile_mpp), (MARGIN_PX, top_px))
    grey = fade_tile(tile, side_px)
    sheet.paste(cover(grey, grid, scale, alpha, upsample), (2 * MARGIN_PX + side_px, top_px))
    draw_bar(sheet, (bar_left_px, top_px), side_px, scale, alpha, grey, quantity)
    return encode_png(sheet, caption, scale)


def draw_heads(
    tile: np.ndarray,
    attention: np.ndarray,
    *,
    caption: str,
    colormap: Colormap,
    alpha: float,
    upsample: Upsample,
    tile_mpp: float | None,
) -> bytes:
    """All of a tile's attention (L, H, G, G): a row per layer, a column per head and their mean as the last."""
    require_finite(attention, dimensions=4)
    maps = np.concatenate([attention, attention.mean(axis=1, keepdims=True)], axis=1)
    layers, columns, patches = maps.shape[:3]
    # One limit for all, or heads could not be compared; the sharpest hundredth would darken all the rest.
    scale = choose_scale(maps, signed=False, uniform_level=1 / patches**2, colormap=colormap, quantile=0.99)

    cell_px = multiple_near(CELL_PX, patches)
    thumb_px = multiple_near(PANEL_PX // 2, patches)
    cells_left_px = MARGIN_PX + text_width(f"layer {layers}", SMALL_TEXT_PX) + 8
    cells_width_px, cells_height_px = columns * (cell_px + CELL_GAP_PX), layers * (cell_px + LINE_PX)
    side_left_px = cells_left_px + cells_width_px + MARGIN_PX
    width_px = side_left_px + max(thumb_px, bar_width(scale, "share of attention")) + MARGIN_PX
    note = f"{caption} (entropy of each in bits; uniform: {math.log2(patches**2):.2f})"
    lines = wrap(note, width_px - 2 * MARGIN_PX)
    top_px = MARGIN_PX + LINE_PX * (len(lines) + 1)
    bar_top_px = top_px + thumb_px + MARGIN_PX
    bar_px = min(PANEL_PX, max(CELL_PX, cells_height_px - thumb_px - 2 * MARGIN_PX))

    height_px = max(top_px + cells_height_px, bar_top_px + bar_px + MARGIN_PX) + MARGIN_PX // 2
    sheet = Image.new("RGB", (width_px, height_px), PAPER)
    write_lines(sheet, lines)
    grey = fade_tile(tile, cell_px)
    for layer, column in np.ndindex(layers, columns):
        grid = maps[layer, column]
        corner = cells_left_px + column * (cell_px + CELL_GAP_PX), top_px + layer * (cell_px + LINE_PX)
        sheet.paste(cover(grey, grid, scale, alpha, upsample), corner)
        middle_px, below_px = corner[0] + cell_px // 2, corner[1] + cell_px + 2
        write(sheet, (middle_px, below_px), f"{entropy_bits(grid):.2f}", SMALL_TEXT_PX, "ma")
        if layer == 0:
            name = "mean" if column == columns - 1 else f"head {column}"
            write(sheet, (middle_px, top_px - 4), name, SMALL_TEXT_PX, "md")
        if column == 0:
            write(sheet, (MARGIN_PX, corner[1] + cell_px // 2), f"layer {layer}", SMALL_TEXT_PX, "lm")
    sheet.paste(enlarge_tile(tile, thumb_px, tile_mpp), (side_left_px, top_px))
    draw_bar(sheet, (side_left_px, bar_top_px), bar_px, scale, alpha, grey, "share of attention")
    return encode_png(sheet, caption, scale)


def require_finite(values: np.ndarray, dimensions: int) -> None:
    if values.ndim != dimensions or values.shape[-1] != values.shape[-2] or not values.size:
        raise UndrawableMap(
            f"a map of shape {values.shape} came, {dimensions} dimensions with a square grid last are drawn"
        )
    if strange := int((~np.isfinite(values)).sum()):
        raise UndrawableMap(f"{strange} of the map's {values.size} values are not finite: there is no colour for them")


def multiple_near(wanted_px: int, unit_px: int) -> int:
    """A whole multiple of the patches, which are then all of one size."""
    return unit_px * max(1, round(wanted_px / unit_px))


def entropy_bits(values: np.ndarray) -> float:
    total = values.sum()
    shares = values[values > 0] / total
    return float((shares * np.log2(1 / shares)).sum())


def enlarge_tile(tile: np.ndarray, side_px: int, tile_mpp: float | None) -> Image.Image:
    picture = Image.fromarray(tile).resize((side_px, side_px), Image.Resampling.BICUBIC)
    if tile_mpp is not None:
        draw_scale_bar(picture, tile_mpp * len(tile) / side_px)
    return picture


def fade_tile(tile: np.ndarray, side_px: int) -> Image.Image:
    """The tile without colour and with half its contrast, so that white glass doesn't pass for a high value."""
    grey = Image.fromarray(tile).convert("L")
    faded = Image.blend(fill_with_mean(grey, grey.size), grey, 0.5)
    return faded.resize((side_px, side_px), Image.Resampling.BICUBIC).convert("RGB")


def fill_with_mean(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture.resize((1, 1), Image.Resampling.BOX).resize(size)


def cover(grey: Image.Image, grid: np.ndarray, scale: Scale, alpha: float, upsample: Upsample) -> Image.Image:
    """The grey tile under the map's colours, mixed in one constant share."""
    if upsample == "nearest":
        colours = Image.fromarray(scale.colour(grid)).resize(grey.size, Image.Resampling.NEAREST)
        picture = Image.blend(grey, colours, alpha)
        return rule_patches(picture, len(grid)) if grey.width >= SMALLEST_RULED_PX * len(grid) else picture
    smooth = Image.fromarray(grid.astype(np.float32)).resize(grey.size, Image.Resampling.BICUBIC)
    # Bicubic swings beyond its neighbours: nowhere may the picture claim more than the map holds.
    values = np.asarray(smooth).clip(grid.min(), grid.max())
    return Image.blend(grey, Image.fromarray(scale.colour(values)), alpha)


def rule_patches(picture: Image.Image, patches: int) -> Image.Image:
    pen = ImageDraw.Draw(picture, "RGBA")
    for edge in range(1, patches):
        at_px = edge * picture.width // patches
        pen.line([(at_px, 0), (at_px, picture.height)], fill=(*PAPER, 50))
        pen.line([(0, at_px), (picture.width, at_px)], fill=(*PAPER, 50))
    return picture


def draw_scale_bar(picture: Image.Image, um_per_px: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten, at most a third of the field long."""
    longest_um = picture.width * um_per_px / 3
    power = 10.0 ** math.floor(math.log10(longest_um))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= longest_um)
    inset_px = max(6, picture.width // 30)
    left_px, bottom_px = inset_px, picture.height - inset_px
    right_px = left_px + round(length_um / um_per_px)
    pen = ImageDraw.Draw(picture)
    pen.rectangle([left_px, bottom_px - 4, right_px, bottom_px], fill=INK, outline=PAPER)
    middle_px = (left_px + right_px) // 2
    text = f"{length_um:g} um"
    pen.text((middle_px, bottom_px - 8), text, INK, load_font(TEXT_PX), "md", stroke_width=2, stroke_fill=PAPER)


def bar_width(scale: Scale, quantity: str) -> int:
    labels_px = max(text_width(label, SMALL_TEXT_PX) for _, label in scale.ticks)
    return BAR_PX + 14 + labels_px + (LINE_PX if quantity else 0)


def draw_bar(
    sheet: Image.Image,
    corner: tuple[int, int],
    height_px: int,
    scale: Scale,
    alpha: float,
    grey: Image.Image,
    quantity: str,
) -> None:
    """The colours as the map wears them: mixed into the tile's mean grey."""
    left_px, top_px = corner[0] + (LINE_PX if quantity else 0), corner[1]
    colours = Image.fromarray(scale.table[::-1, None]).resize((BAR_PX, height_px), Image.Resampling.BILINEAR)
    sheet.paste(Image.blend(fill_with_mean(grey, colours.size), colours, alpha), (left_px, top_px))
    pen = ImageDraw.Draw(sheet)
    right_px, bottom_px = left_px + BAR_PX, top_px + height_px - 1
    pen.rectangle([left_px, top_px, right_px - 1, bottom_px], outline=INK)
    label_px = float(bottom_px + LINE_PX)
    for value, label in scale.ticks:
        tick_px = bottom_px - (value - scale.low) / (scale.high - scale.low) * (height_px - 1)
        label_px = min(tick_px, label_px - 0.8 * LINE_PX)  # a label too near to the one below is moved up
        pen.line([(right_px, tick_px), (right_px + 4, tick_px), (right_px + 9, label_px)], fill=INK)
        write(sheet, (right_px + 12, round(label_px)), label, SMALL_TEXT_PX, "lm")
    if quantity:
        write_upwards(sheet, (corner[0], top_px + height_px // 2), quantity)


@cache
def load_font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def make_printable(text: str) -> str:
    """Pillow's own font knows little beyond ASCII: letters lose their accents, the rest shows as '?'."""
    plain = unicodedata.normalize("NFKD", text.replace("µ", "u").replace("μ", "u"))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() or letter in "·±°…" else "?" for letter in plain)


def text_width(text: str, size_px: int) -> int:
    return math.ceil(load_font(size_px).getlength(make_printable(text)))


def write(sheet: Image.Image, at: tuple[int, int], text: str, size_px: int, anchor: str) -> None:
    ImageDraw.Draw(sheet).text(at, make_printable(text), INK, load_font(size_px), anchor)


def write_lines(sheet: Image.Image, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        write(sheet, (MARGIN_PX, MARGIN_PX + number * LINE_PX), line, TEXT_PX, "la")


def write_upwards(sheet: Image.Image, at: tuple[int, int], text: str) -> None:
    label = Image.new("RGB", (text_width(text, SMALL_TEXT_PX), LINE_PX), PAPER)
    write(label, (0, LINE_PX // 2), text, SMALL_TEXT_PX, "lm")
    label = label.transpose(Image.Transpose.ROTATE_90)
    sheet.paste(label, (at[0], at[1] - label.height // 2))


def wrap(text: str, width_px: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, TEXT_PX) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def encode_png(sheet: Image.Image, caption: str, scale: Scale) -> bytes:
    texts = PngInfo()
    texts.add_text("caption", caption)
    texts.add_text("limits", scale.limits)
    png = BytesIO()
    # Run lengths alone pack such a picture five times faster than the default, and as small.
    sheet.save(png, "PNG", pnginfo=texts, compress_type=Z_RLE)
    return png.getvalue()
