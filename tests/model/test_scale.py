"""Through `decode`, which also judges what a file says."""

import struct

import pytest
from PIL import Image

from model.pixels import decode
from tests.model.files import chunk, encode, painting, png, rgb_tiff, short

JPEG = encode(painting(), "JPEG")


def ome(attributes: str) -> tuple[int, bytes]:
    return 2, f'<?xml version="1.0"?><OME><Image><Pixels {attributes}/></Image></OME>\0'.encode()


def test_a_description_of_a_hundred_thousand_openings_takes_no_time():
    assert decode(rgb_tiff(t270=(2, b"<Pixels " * 100_000))).tag_mpp is None


def imagej(unit: str, numerator: int = 4, denominator: int = 1) -> bytes:
    text = f"ImageJ=1.54f\nunit={unit}\nmin=0.0\nmax=255.0\n\0".encode("latin-1")
    pixels_a_unit = rational(numerator, denominator)
    return rgb_tiff(t270=(2, text), t282=pixels_a_unit, t283=pixels_a_unit, t296=short(1))


def rational(numerator: int, denominator: int = 1) -> tuple[int, bytes]:
    return 5, struct.pack("<LL", numerator, denominator)


def phys(x: int, y: int, unit: int = 1) -> bytes:
    return png(40, 40, 8, 2, bytes(40 * 121), before=chunk(b"pHYs", struct.pack(">LLB", x, y, unit)))


def jfif(unit: int, x: int, y: int) -> bytes:
    at = JPEG.index(b"JFIF\0") + 7
    return JPEG[:at] + struct.pack(">BHH", unit, x, y) + JPEG[at + 5 :]


@pytest.mark.parametrize(
    ("data", "mpp"),
    [
        (rgb_tiff(t282=rational(254_000, 5), t283=rational(254_000, 5), t296=short(2)), 0.5),
        (rgb_tiff(t282=rational(254_000, 5), t283=rational(254_000, 5)), 0.5),  # the inch is TIFF's default
        (rgb_tiff(t282=rational(20_000), t283=rational(20_000), t296=short(3)), 0.5),
        (rgb_tiff(t282=rational(20_000), t283=rational(20_200), t296=short(3)), 0.49752),
        (rgb_tiff(t270=(2, b"Aperio Image Library\r\n40x40 Q=30|AppMag = 20|MPP = 0.4990|Left = 2\0")), 0.499),
        (rgb_tiff(t270=(2, b"|MPP = 0.25\0"), t282=rational(20_000), t283=rational(20_000), t296=short(3)), 0.25),
        (rgb_tiff(t270=(2, b"|MPP = 0,4990|Left = 2\0")), 0.499),
        (imagej("micron"), 0.25),
        (imagej(r"\u00B5m"), 0.25),
        (imagej("\u00b5m"), 0.25),
        (imagej("nm", 4, 1000), 0.25),
        (rgb_tiff(t270=ome('SizeX="4" PhysicalSizeX="0.5" PhysicalSizeXUnit="µm" PhysicalSizeY="0.5"')), 0.5),
        (rgb_tiff(t270=ome('PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m" PhysicalSizeY="0.5"')), 0.5),
        (
            rgb_tiff(
                t270=ome('PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="5e-4" PhysicalSizeYUnit="mm"')
            ),
            0.5,
        ),
        (phys(2_000_000, 2_000_000), 0.5),
        (jfif(2, 20_000, 20_000), 0.5),
        (jfif(1, 50_800, 50_800), 0.5),
        (encode(painting(), "BMP", dpi=(50_800, 50_800)), 0.5),
    ],
)
def test_the_files_own_scale_is_read(data, mpp):
    came = decode(data)
    assert came.tag_mpp == pytest.approx(mpp, rel=1e-4)
    assert not {"implausible_resolution_tag", "anisotropic_resolution_tag"} & {note.code for note in came.notes}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encode(painting(), "PNG", dpi=(72, 72)), "implausible_resolution_tag"),
        (encode(painting(), "JPEG", dpi=(300, 300)), "implausible_resolution_tag"),
        (encode(painting(), "TIFF", dpi=(96, 96)), "implausible_resolution_tag"),
        (rgb_tiff(t270=(2, b"|MPP = 0.05\0")), "implausible_resolution_tag"),
        (rgb_tiff(t270=ome('PhysicalSizeX="nan" PhysicalSizeY="nan"')), "implausible_resolution_tag"),
        (phys(2_000_000, 2_100_000), "anisotropic_resolution_tag"),
        (rgb_tiff(t270=ome('PhysicalSizeX="0.5" PhysicalSizeY="0.52"')), "anisotropic_resolution_tag"),
    ],
)
def test_a_scale_that_cannot_be_believed_is_unknown_and_this_is_said(data, code):
    came = decode(data)
    assert came.tag_mpp is None
    assert code in {note.code for note in came.notes}


@pytest.mark.parametrize(
    "data",
    [
        phys(2_000_000, 2_000_000, unit=0),
        phys(0, 0),
        jfif(0, 20_000, 20_000),
        jfif(1, 0, 0),
        encode(painting(), "JPEG", exif=Image.Exif()),
        rgb_tiff(),
        rgb_tiff(t282=rational(20_000), t283=rational(20_000), t296=short(1)),
        rgb_tiff(t282=rational(1, 0), t283=rational(1, 0), t296=short(2)),
        rgb_tiff(t282=(2, b"fifty\0"), t283=(2, b"fifty\0"), t296=short(2)),
        rgb_tiff(t270=(2, b"|MPP = 0.4.9\0")),
        imagej("pixel"),
        imagej("micron", 0),
        rgb_tiff(t270=(2, b"ImageJ=1.54f\nunit=micron\n\0")),
        rgb_tiff(t270=(2, b"ImageJ=1.54f\nunit=micron\n\0"), t282=(2, b"four\0"), t283=(2, b"four\0"), t296=short(1)),
        rgb_tiff(t270=ome('PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel" PhysicalSizeY="0.5"')),
        rgb_tiff(t270=ome('PhysicalSizeX="0.5"')),
        rgb_tiff(t270=(1, b"|MPP = 0.5\0")),
        png(40, 40, 8, 2, bytes(40 * 121), before=chunk(b"tEXt", b"dpi\0fifty thousand")),
    ],
)
def test_a_file_that_states_no_scale_gets_none_and_no_remark(data):
    came = decode(data)
    assert came.tag_mpp is None
    assert not {"implausible_resolution_tag", "anisotropic_resolution_tag"} & {note.code for note in came.notes}
