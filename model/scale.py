"""What a file says of its scale, in um per pixel across and down; whether to believe it is for `pixels` to judge."""

import contextlib
import html
import re

from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

APERIO_MPP = re.compile(r"\bMPP\s*=\s*([\d.,]+)")
IMAGEJ_UNIT = re.compile(r"^ImageJ=.*^unit=(\S+)$", re.DOTALL | re.MULTILINE)
OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^<>]*>")
OME_SIZE = re.compile(r'\b(PhysicalSize[XY](?:Unit)?)="([^"]*)"')
MICRO = ("u", "\u00b5", "\u03bc", "\u00c2\u00b5", "\u00ce\u00bc")  # the last two: UTF-8 that Pillow read as Latin-1
UNIT_UM = {f"{micro}m": 1.0 for micro in MICRO} | {"nm": 1e-3, "mm": 1e3, "cm": 1e4}
IMAGEJ_UM = UNIT_UM | {name: 1.0 for name in ("micron", "microns", r"\u00B5m")}  # the last as it stands there


def stated_mpp(image: ImageFile) -> tuple[float, float] | None:
    return described_mpp(image) or density_mpp(image)


def described_mpp(image: ImageFile) -> tuple[float, float] | None:
    """From a TIFF's description: Aperio's `MPP = 0.499`, OME's XML, or the unit that ImageJ's resolution is in."""
    if not isinstance(image, TiffImageFile):
        return None
    text = image.tag_v2.get(Base.ImageDescription)
    if not isinstance(text, str):
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError, ArithmeticError):  # no number, or not a unit of length
        if aperio := APERIO_MPP.search(text):
            um = float(aperio[1].replace(",", "."))
            return um, um
        if imagej := IMAGEJ_UNIT.match(text):
            x, y = (float(image.tag_v2[tag]) for tag in (Base.XResolution, Base.YResolution))
            return IMAGEJ_UM[imagej[1]] / x, IMAGEJ_UM[imagej[1]] / y
        if pixels := OME_PIXELS.search(text):
            return ome_mpp(dict(OME_SIZE.findall(pixels[0])))
    return None


def ome_mpp(sizes: dict[str, str]) -> tuple[float, float]:
    def side_um(axis: str) -> float:
        unit = html.unescape(sizes.get(f"PhysicalSize{axis}Unit", "um"))
        return float(sizes[f"PhysicalSize{axis}"]) * UNIT_UM[unit]

    return side_um("X"), side_um("Y")


def density_mpp(image: ImageFile) -> tuple[float, float] | None:
    if not states_density(image):
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError, ArithmeticError):  # none, or not two numbers
        x, y = (25_400 / float(dpi) for dpi in image.info["dpi"])
        if x > 0 and y > 0:
            return x, y
    return None


def states_density(image: ImageFile) -> bool:
    """Where a file says nothing, Pillow says 72 dpi (a JPEG with EXIF) or 1 dpi (a TIFF)."""
    if isinstance(image, JpegImageFile):
        return image.info.get("jfif_unit") in (1, 2)  # inch, cm
    return not isinstance(image, TiffImageFile) or Base.XResolution in image.tag_v2
