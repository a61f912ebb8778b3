"""Bytes -> RGB picture -> tile: the one definition of how an image becomes what the model reads,
in training and in service alike.

What cannot be answered is refused, with a text for its sender:

    ImageRefused (ValueError)
        EmptyImage          no bytes
        UnsupportedFormat   not PNG, JPEG, TIFF, WebP or BMP, whatever its name says
        UndecodableImage    cut short, damaged, or of a variant that has no agreed way to 8-bit RGB
        AnimatedImage       more than one picture
        ImageTooLarge       more pixels, or more work for each of them, than allowed
        ImageTooSmall       shorter side under 32 px
        ImageTooNarrow      longer side over 20 times the shorter
        MppOutOfRange       a scale was asked for that no microscope gives
        FieldTooSmall       shows less tissue than a tile holds
"""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import IFD, Base
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from model.scale import stated_mpp

MIN_SIDE_PX = 32
MAX_SIDE_RATIO = 20
MIN_MPP, MAX_MPP = 0.1, 5.0  # from oil immersion to an overview; printing densities (72 dpi) lie far outside
MAX_ANISOTROPY = 0.02
MIN_FIELD_SHARE = 0.95  # a field up to 5 % short of a tile is stretched to it
WIDE_FIELD_TILES = 4

# Pillow keeps every part of a header as Python objects: 30 MB of empty JPEG segments or of TIFF strip offsets
# became 1 GB. Real headers take under 200 reads; large colour profiles have 3 MB, which it reads three times in a TIFF.
MAX_HEADER_READS = 10_000
MAX_HEADER_BYTES = 12 << 20
# Encoders write chunks of 8 KB and more, but a PNG may hide any number of empty ones behind its pixels.
MIN_PIXEL_READ_BYTES = 256
# Every scan of a JPEG passes over all its pixels, and 100 bytes make one: 32 MiB could keep a core busy for hours.
# Encoders write about ten; 100 is what libtiff allows the JPEGs inside TIFFs.
MAX_SCANS = 100
MAX_SHARED_BLOCKS = 4  # times that the bytes of a TIFF may be read: writers share blank blocks, if any
MAX_EXIF_BYTES = 1 << 16  # of one JPEG segment, which is where EXIF belongs
# Text of a PNG unpacks to a thousand times its bytes. Pillow lets 64 MiB pass, half a second of work and 130 MiB of
# memory for a picture of 80 KB; what describes a picture, an editor's history included, seldom has one.
PngImagePlugin.MAX_TEXT_MEMORY = 4 << 20

ACCEPTED = "PNG, JPEG, TIFF, WebP or BMP"
PLUGINS: dict[re.Pattern[bytes], type[ImageFile]] = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): PngImageFile,
    re.compile(rb"\xff\xd8\xff"): JpegImageFile,  # of a phone's MPO, too: the first picture
    re.compile(rb"II[*+]\0|MM\0[*+]"): TiffImageFile,
    re.compile(rb"RIFF.{4}WEBP", re.DOTALL): WebPImageFile,
    re.compile(rb"BM"): BmpImageFile,
}
FOREIGN = {
    re.compile(rb"GIF8[79]a"): "a GIF",
    re.compile(rb"%PDF-"): "a PDF",
    re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL): "an HEIC picture",
    re.compile(rb".{4}ftypavi", re.DOTALL): "an AVIF picture",
    re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"): "a JPEG 2000 picture",
    re.compile(rb".{128}DICM", re.DOTALL): "a DICOM file",
    re.compile(rb"\s*(<\?xml.*?)?<svg", re.DOTALL): "an SVG drawing",
    re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE): "a web page",
    re.compile(rb"PK\x03\x04"): "a ZIP archive",
    re.compile(rb"\x1f\x8b"): "gzip-compressed data, which isn't unpacked here",
    re.compile(rb"data:image/|iVBORw0KGgo|/9j/"): "base64 text instead of the image's bytes",
    re.compile(rb"[\t\n\r -~]{1,255}\Z"): "a line of text (curl sends a file, not its name, with an @ before the name)",
}
JPEG_2000 = ("33003", "33004", "33005", "34712")  # as the compression of a TIFF
PNG_END = b"IEND\xaeB`\x82"
START_OF_SCAN = b"\xff\xda"
PILLOW_REMARKS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MppSource = Literal["request", "tag", "unknown"]


class ImageRefused(ValueError):
    """The text tells the image's sender what is wrong with it and what to do."""


class EmptyImage(ImageRefused): ...


class UnsupportedFormat(ImageRefused): ...


class UndecodableImage(ImageRefused): ...


class AnimatedImage(ImageRefused): ...


class ImageTooLarge(ImageRefused):
    def __init__(self, text: str, megapixels: float = math.inf) -> None:
        """`megapixels`: of a plain picture that would be as much work."""
        super().__init__(text)
        self.megapixels = megapixels


class ImageTooSmall(ImageRefused): ...


class ImageTooNarrow(ImageRefused): ...


class MppOutOfRange(ImageRefused): ...


class FieldTooSmall(ImageRefused): ...


@dataclass(frozen=True)
class Note:
    """A remark for the user: nothing is guessed or changed in silence."""

    code: str
    text: str


@dataclass(frozen=True)
class Picture:
    rgb: np.ndarray  # uint8 (height, width, 3), possibly read-only
    format: str
    tag_mpp: float | None
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Tile:
    pixels: np.ndarray  # uint8 (S, S, 3), possibly read-only
    box: tuple[int, int, int, int]  # left, top, right, bottom of what was used, in the picture's pixels
    mpp: float | None  # of `pixels`: the model's, but where a field was short of a tile and stretched
    picture_mpp: float | None
    mpp_source: MppSource
    notes: tuple[Note, ...]  # of the cut alone; the picture has its own


def decode(data: bytes, max_megapixels: float = 50.0) -> Picture:
    image = open_header(data)
    check_frames(image)
    check_size(image, max_megapixels)
    check_cost(image, data, max_megapixels)
    check_end(image, data)

    rgb, colour_notes = read_pixels(image)
    tag_mpp, scale_notes = read_mpp(image)
    return Picture(rgb, str(image.format), tag_mpp, (*colour_notes, *scale_notes))


class MeteredFile(io.BytesIO):
    """The file as Pillow reads it, up to a number of reads and bytes."""

    reads_left = MAX_HEADER_READS
    bytes_left: float = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(piece)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise UndecodableImage("The image carries too much metadata. Save it again without.")
        return piece


def open_header(data: bytes) -> ImageFile:
    plugin = recognise(data)
    file = MeteredFile(data)
    if plugin is WebPImageFile:  # it takes the whole file at once, for a parser in C
        file.bytes_left = math.inf
    silence_remarks()
    with refusing(plugin.format, "header"):
        # Not Image.open: it looks for more pictures in a JPEG, has a limit of its own and hides why it failed.
        image = plugin(file)
        if isinstance(image, TiffImageFile):
            drop_camera_tags(image)
    file.bytes_left = math.inf
    file.reads_left += len(data) // MIN_PIXEL_READ_BYTES
    return image


def recognise(data: bytes) -> type[ImageFile]:
    """Goes by the first bytes alone: names and declared types lie."""
    if not data:
        raise EmptyImage(f"The image is empty (0 bytes). Send a {ACCEPTED} file.")
    for magic, plugin in PLUGINS.items():
        if magic.match(data):
            return plugin
    start = data[:1024]
    came = next((name for magic, name in FOREIGN.items() if magic.match(start)), "no image of a known kind")
    raise UnsupportedFormat(f"This is {came}. Send a {ACCEPTED} file.")


def silence_remarks() -> None:
    """Keeps Pillow's warnings about broken metadata out of the log, where any sender could write at will.

    What libtiff says of broken pixels goes to stderr all the same, from C; none of it is of the sender's choice.

    One lasting filter, as catch_warnings() swaps the filters of all threads at once; looked at each time, as a caller
    may have put another in front of it, such as "error".
    """
    if warnings.filters[:1] != [PILLOW_REMARKS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def drop_camera_tags(image: TiffImageFile) -> None:
    """Pillow would parse these directories unmetered, after the pixels; nothing here needs them."""
    tags = image.getexif()
    for directory in (IFD.Exif, IFD.GPSInfo, IFD.Interop):
        tags.pop(directory, None)


@contextlib.contextmanager
def refusing(kind: str | None, part: Literal["header", "pixels"]) -> Iterator[None]:
    try:
        yield
    except ImageRefused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"The {kind} has more pixels than can be decoded. Send a smaller field.") from error
    except Exception as error:  # on hostile bytes Pillow's parsers raise almost anything, MemoryError included
        is_unknown = isinstance(error.__cause__ or error, KeyError)  # such as the number of a TIFF's compression
        text = f"unknown value {error}" if is_unknown else str(error)
        if is_unknown and str(error) in JPEG_2000:
            text = f"compression {error} is JPEG 2000, as some slide scanners write, and isn't read here"
        cause = text[:200] or type(error).__name__
        raise UndecodableImage(
            f"The {kind} cannot be decoded: its {part} may be cut short, damaged or of a rare variant ({cause})."
            " Send it again, or save it anew as an 8-bit RGB PNG."
        ) from error


def check_frames(image: ImageFile) -> None:
    if getattr(image, "is_animated", False):
        several, advice = "frames", ""
        if isinstance(image, TiffImageFile):
            several, advice = "pages, as whole slides do", "; of a slide, cut tiles first"
        raise AnimatedImage(
            f"The {image.format} holds several {several}. Send one picture in a file of its own{advice}."
        )


def check_size(image: ImageFile, max_megapixels: float) -> None:
    width, height = image.size
    came = f"The image has {width} x {height} px"
    megapixels = width * height / 1e6
    counted = megapixels * (2 if isinstance(image, WebPImageFile) else 1)  # its decoder holds them twice more
    if counted > max_megapixels:
        double = ", which count double in a WebP" if counted > megapixels else ""
        text = f"{came}, {megapixels:.1f} megapixels{double}; at most {max_megapixels:g} are accepted."
        raise ImageTooLarge(f"{text} Send a smaller field.", counted)
    if min(width, height) < MIN_SIDE_PX:
        raise ImageTooSmall(f"{came}; its shorter side must have at least {MIN_SIDE_PX}. Send a larger field.")
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise ImageTooNarrow(
            f"{came}; its longer side may have at most {MAX_SIDE_RATIO} times the pixels of the shorter."
            " Send a squarer field."
        )


def check_cost(image: ImageFile, data: bytes, max_megapixels: float) -> None:
    """A small file can make its decoder work, or allocate, as for a huge one."""
    if isinstance(image, JpegImageFile):
        scans = data.count(START_OF_SCAN)  # pixel data never holds these two bytes
        megapixels = scans * image.width * image.height / MAX_SCANS / 1e6
        if megapixels > max_megapixels:
            text = f"The JPEG draws its pixels in {scans} scans. Save it again as a PNG."
            raise ImageTooLarge(text, megapixels)
    if isinstance(image, BmpImageFile) and image.tile[0].codec_name == "bmp_rle":
        # unpacked by Pillow byte by byte in Python: 14 s for 30 MB
        raise UndecodableImage("The BMP is run-length encoded. Save it again without compression, or as a PNG.")
    if isinstance(image, TiffImageFile):
        with refusing(image.format, "header"):
            width, height = (int(image.tag_v2.get(tag, 0)) for tag in (Base.TileWidth, Base.TileLength))
            lengths = (image.tag_v2.get(tag, ()) for tag in (Base.StripByteCounts, Base.TileByteCounts))
            stored_bytes = sum(sum(length) for length in lengths)
        if stored_bytes > MAX_SHARED_BLOCKS * len(data):  # all may be one stretch of the file, to be read for each
            raise UndecodableImage(
                f"The blocks of the TIFF have {stored_bytes} bytes, the file has {len(data)}. Save it again as a PNG."
            )
        megapixels = width * height / 1e6
        if megapixels > max_megapixels:
            text = (
                f"The TIFF is stored in blocks of {width} x {height} px; at most {max_megapixels:g} megapixels are"
                " accepted. Save it again as a PNG."
            )
            raise ImageTooLarge(text, megapixels)


def check_end(image: ImageFile, data: bytes) -> None:
    """Of the five kinds only a PNG would decode without its last bytes, and then without its checksum."""
    if isinstance(image, PngImageFile) and data.rfind(PNG_END) < 0:
        raise UndecodableImage("The PNG is cut short: its end is missing. Send it again.")


def read_pixels(image: ImageFile) -> tuple[np.ndarray, list[Note]]:
    """8-bit RGB, upright, on a white slide.

    An embedded colour profile is not applied: the model was trained on the numbers as scanners stored them.
    """
    notes = []
    with refusing(image.format, "pixels"):
        bits = channel_bits(image)
        image.load()
        picture = upright(image)
        if bits > 8:
            picture = to_eight_bits(picture, bits)
            notes.append(Note("reduced_depth", f"Of the {bits} bits per channel the upper 8 were used."))
        if is_see_through(picture):
            picture = on_white(picture)
            notes.append(Note("transparency", "Transparent parts were filled with white, as on a slide."))
        if picture.mode in ("CMYK", "LAB"):
            text = f"The colours were converted from {picture.mode} to RGB and may differ from the original ones."
            notes.append(Note("converted_colours", text))
        picture = to_rgb(picture)
        if picture is not image:
            image.close()  # or its pixels would be kept beside two copies of these
        rgb = np.asarray(picture)

    if is_grey(rgb):
        text = "The image is in shades of grey. The model reads the colours of the stain, so its answer means little."
        notes.append(Note("greyscale", text))
    return rgb, notes


def channel_bits(image: ImageFile) -> int:
    if isinstance(image, TiffImageFile):
        bits = max(image.tag_v2.get(Base.BitsPerSample, (1,)))
        if bits > 8 and image.tag_v2.get(Base.PhotometricInterpretation) == 0:
            raise UndecodableImage(  # Pillow 13 doesn't turn these round
                f"The TIFF stores {bits}-bit greys of which 0 is white. Save it as an 8-bit RGB PNG."
            )
        if bits > 8 and image.tag_v2.get(Base.PlanarConfiguration) == 2 and image.info["compression"] == "raw":
            raise UndecodableImage(  # Pillow 13 takes the bytes of such planes for pixels
                f"The TIFF stores {bits}-bit colours in separate planes. Save it as an 8-bit RGB PNG."
            )
        return int(bits)
    if isinstance(image, PngImageFile) and image.tile and "16" in str(image.tile[0].args):  # as in "RGB;16B"
        return 16
    return 8


def upright(image: ImageFile) -> Image.Image:
    """As its EXIF orientation says; a TIFF is turned by Pillow while it loads."""
    exif = image.info.get("exif")
    if isinstance(image, TiffImageFile) or not isinstance(exif, bytes) or len(exif) > MAX_EXIF_BYTES:
        return image
    orientation = None
    with contextlib.suppress(Exception):  # damaged EXIF says nothing against the pixels
        tags = Image.Exif()
        tags.load(exif)
        orientation = UPRIGHT.get(tags[Base.Orientation])
    return image if orientation is None else image.transpose(orientation)


def to_eight_bits(picture: Image.Image, bits: int) -> Image.Image:
    """Grey is shifted, never stretched to its darkest and brightest: as Pillow has done with 16-bit RGB already."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture) >> (bits - 8)).astype(np.uint8))


def is_see_through(picture: Image.Image) -> bool:
    return picture.has_transparency_data and with_alpha(picture).getchannel("A").getextrema() != (255, 255)


def on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGB", picture.size, "white")
    layered = with_alpha(picture)
    white.paste(layered, mask=layered.getchannel("A"))
    return white


def with_alpha(picture: Image.Image) -> Image.Image:
    return picture if picture.mode in ("RGBA", "LA") else picture.convert("RGBA")


def to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(picture)
    if picture.mode in ("I", "F", "La"):
        raise UndecodableImage(
            "The pixels are 32-bit, signed or premultiplied numbers, whose black and white are a matter of convention."
            " Save the image as an 8-bit RGB PNG."
        )
    return picture.convert("RGB")


def is_grey(rgb: np.ndarray) -> bool:
    middle = rgb[len(rgb) // 2]  # this one row nearly always decides
    return has_equal_channels(middle) and has_equal_channels(rgb)


def has_equal_channels(rgb: np.ndarray) -> bool:
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.array_equal(red, green) and np.array_equal(green, blue)


def read_mpp(image: ImageFile) -> tuple[float | None, list[Note]]:
    """What the file itself says of its scale, in um per pixel, where it can be believed."""
    stated = stated_mpp(image)
    if stated is None:
        return None, []
    x, y = stated
    if not (MIN_MPP <= x <= MAX_MPP and MIN_MPP <= y <= MAX_MPP):
        text = (
            f"The file's resolution tag says {x:.4g} um per pixel, outside {MIN_MPP:g} to {MAX_MPP:g}"
            " (72 dpi and the like are printing defaults). It was ignored."
        )
        return None, [Note("implausible_resolution_tag", text)]
    if abs(x - y) > MAX_ANISOTROPY * max(x, y):
        text = f"The file's resolution tag says {x:.4g} um per pixel across but {y:.4g} down. It was ignored."
        return None, [Note("anisotropic_resolution_tag", text)]
    return (x + y) / 2, []


def to_tile(picture: Picture, tile_px: int, tile_mpp: float, mpp: float | None = None) -> Tile:
    """The centre of the picture at the tile's scale; its whole centre square where the scale is unknown."""
    picture_mpp, source = choose_mpp(picture, mpp)
    height, width, _ = picture.rgb.shape
    field_px, notes = choose_field(min(width, height), tile_px, tile_mpp, picture_mpp)
    if width * height > WIDE_FIELD_TILES * field_px**2:
        share = field_px**2 / (width * height)
        text = (
            f"Only the centre of the image was looked at, {share:.0%} of its area; all of it: `tissue predict --grid`."
        )
        notes.append(Note("only_centre_used", text))

    pixels, box = cut(picture.rgb, field_px, tile_px)
    return Tile(pixels, box, picture_mpp and picture_mpp * (field_px / tile_px), picture_mpp, source, tuple(notes))


def choose_mpp(picture: Picture, mpp: float | None) -> tuple[float | None, MppSource]:
    if mpp is None:
        return picture.tag_mpp, "unknown" if picture.tag_mpp is None else "tag"
    check_mpp(mpp)
    return mpp, "request"


def check_mpp(mpp: float) -> None:
    if not MIN_MPP <= mpp <= MAX_MPP:
        raise MppOutOfRange(
            f"mpp is {mpp}; it must lie in {MIN_MPP:g} to {MAX_MPP:g} um per pixel (a 20x scan has about 0.5)."
        )


def choose_field(shorter_px: int, tile_px: int, tile_mpp: float, mpp: float | None) -> tuple[float, list[Note]]:
    """The side of the centre square that becomes the tile, in the picture's pixels."""
    tile_um = tile_px * tile_mpp
    if mpp is None:
        text = (
            f"The scale is unknown: the whole centre square of the image was taken for the {tile_um:.0f} um of a tile."
            " Where that is wrong its cells look too large or too small, and the answer means little: give um per pixel"
            " (mpp)."
        )
        return shorter_px, [Note("unknown_scale", text)]

    field_px = tile_um / mpp
    if abs(field_px - tile_px) < 0.5:  # resampling would blur every pixel to shift the outermost by a quarter of one
        field_px = tile_px
    if field_px <= shorter_px:
        return field_px, []

    shown = f"The shorter side of the image shows {shorter_px * mpp:.1f} um ({shorter_px} px at {mpp:g} um per pixel)"
    if shorter_px < MIN_FIELD_SHARE * field_px:
        raise FieldTooSmall(
            f"{shown}; a tile needs {tile_um:.1f} um, which is {math.ceil(field_px)} px. Send a larger field."
        )
    return shorter_px, [Note("field_slightly_small", f"{shown} and was stretched to the {tile_um:.1f} um of a tile.")]


def cut(rgb: np.ndarray, field_px: float, tile_px: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The centre square in one resampling, or its very pixels where they are the tile's already."""
    height, width, _ = rgb.shape
    x, y = (width - field_px) / 2, (height - field_px) / 2
    if field_px == tile_px:
        x, y = math.floor(x), math.floor(y)
    left, top = math.floor(x), math.floor(y)
    right, bottom = math.ceil(x + field_px), math.ceil(y + field_px)

    pixels = np.ascontiguousarray(rgb[top:bottom, left:right])
    if field_px != tile_px:
        pixels = resample(pixels, x - left, y - top, field_px, tile_px)
    return pixels, (left, top, right, bottom)


def resample(rgb: np.ndarray, x: float, y: float, field_px: float, tile_px: int) -> np.ndarray:
    """Bicubic, which Pillow widens into an antialiasing filter where it reduces.

    It keeps nuclei sharper than bilinear does, and rings less at their rims than Lanczos.
    """
    box = (x, y, x + field_px, y + field_px)
    return np.asarray(Image.fromarray(rgb).resize((tile_px, tile_px), Image.Resampling.BICUBIC, box))
