import concurrent.futures
import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

import model.pixels
from model.pixels import (
    MAX_HEADER_BYTES,
    AnimatedImage,
    EmptyImage,
    FieldTooSmall,
    ImageRefused,
    ImageTooLarge,
    ImageTooNarrow,
    ImageTooSmall,
    MppOutOfRange,
    Note,
    Picture,
    UndecodableImage,
    UnsupportedFormat,
    cut,
    decode,
    to_tile,
)
from tests.model.files import chunk, encode, long, painting, png, rgb_tiff, short, tiff

TILE_PX, TILE_MPP = 150, 0.495


def codes(notes: tuple[Note, ...]) -> list[str]:
    return [note.code for note in notes]


def picture(width: int, height: int, tag_mpp: float | None = None) -> Picture:
    return Picture(np.asarray(painting(width, height)), "PNG", tag_mpp, ())


LOSSLESS = {
    "PNG": encode(painting(), "PNG"),
    "TIFF": encode(painting(), "TIFF"),
    "TIFF, LZW": encode(painting(), "TIFF", compression="tiff_lzw"),
    "TIFF, deflate": encode(painting(), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, big": encode(painting(), "TIFF", big_tiff=True),
    "WEBP": encode(painting(), "WEBP", lossless=True),
    "BMP": encode(painting(), "BMP", dpi=(0, 0)),
}
LOSSY = {
    "JPEG": encode(painting(), "JPEG"),
    "JPEG, progressive": encode(painting(), "JPEG", progressive=True),
    "TIFF, JPEG": encode(painting(), "TIFF", compression="jpeg"),
    "WEBP, lossy": encode(painting(), "WEBP"),
}
MPO = encode(painting(), "MPO", save_all=True, append_images=[painting(seed=1)])
ALL = LOSSLESS | LOSSY | {"JPEG, MPO": MPO}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_pixels_of_a_lossless_file_arrive_untouched(kind):
    came = decode(LOSSLESS[kind])
    assert came.format == kind.partition(",")[0]
    assert came.rgb.dtype == np.uint8
    assert np.array_equal(came.rgb, np.asarray(painting()))
    assert (came.tag_mpp, came.notes) == (None, ())


@pytest.mark.parametrize("kind", LOSSY)
def test_the_pixels_of_a_lossy_file_are_those_that_pillow_sees(kind):
    came = decode(LOSSY[kind])
    assert came.format == kind.partition(",")[0]
    assert np.array_equal(came.rgb, np.asarray(Image.open(io.BytesIO(LOSSY[kind])).convert("RGB")))
    assert came.notes == ()


def test_of_a_phones_mpo_the_first_picture_counts_as_a_jpeg():
    assert Image.open(io.BytesIO(MPO)).format == "MPO"
    came = decode(MPO)
    assert came.format == "JPEG"
    assert np.array_equal(came.rgb, decode(LOSSY["JPEG"]).rgb)


def test_a_damaged_index_of_further_pictures_does_not_spoil_the_first():
    at = MPO.index(b"MPF\0") + 4
    damaged = MPO[:at] + bytes(60) + MPO[at + 60 :]
    assert np.array_equal(decode(damaged).rgb, decode(MPO).rgb)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_more_than_one_picture_is_refused(kind):
    several = encode(painting(), kind, save_all=True, append_images=[painting(seed=1)])
    with pytest.raises(AnimatedImage, match=f"The {kind} holds several"):
        decode(several)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_pixels_may_be_longer_than_a_header(kind):
    noise = np.random.default_rng(0).integers(0, 256, (2100, 2100, 3), dtype=np.uint8)
    fast = {"WEBP": {"lossless": True, "quality": 0, "method": 0}, "PNG": {"compress_level": 0}}
    data = encode(Image.fromarray(noise), kind, **fast.get(kind, {}))
    assert len(data) > MAX_HEADER_BYTES
    assert np.array_equal(decode(data).rgb, noise)


def test_an_empty_body_is_refused():
    with pytest.raises(EmptyImage, match="0 bytes"):
        decode(b"")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(painting(), "GIF"), "a GIF"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an HEIC picture"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "an HEIC picture"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "an AVIF picture"),
        (encode(painting(), "JPEG2000"), "a JPEG 2000 picture"),
        (bytes(128) + b"DICM", "a DICOM file"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"data:image/png;base64,iVBORw0KGgo=", "base64 text"),
        (b"iVBORw0KGgoAAAANSUhEUg", "base64 text"),
        (b"tile.png", r"a line of text \(curl sends a file, not its name, with an @"),
        (encode(painting(), "PPM"), "no image of a known kind"),
        (b"\0", "no image of a known kind"),
        (b"RIFF\0\0\0\0WAVE", "no image of a known kind"),
    ],
)
def test_other_kinds_are_refused_by_name_with_the_five_that_are_accepted(data, name):
    with pytest.raises(UnsupportedFormat, match=f"This is {name}.* PNG, JPEG, TIFF, WebP or BMP"):
        decode(data)


@pytest.mark.parametrize("kind", ALL)
def test_a_file_cut_short_anywhere_is_refused(kind):
    data = ALL[kind]
    # what follows the first picture of an MPO is not read
    end = data.index(b"\xff\xd9\xff\xd8") + 2 if kind == "JPEG, MPO" else len(data)
    assert decode(data[:end])
    for length in range(end):
        with pytest.raises(ImageRefused):
            decode(data[:length])


def test_damage_anywhere_raises_nothing_but_a_refusal():
    random = np.random.default_rng(0)
    refused = 0
    for data in ALL.values():
        for _ in range(60):
            damaged = bytearray(data)
            for position in random.integers(min(len(data), random.choice([100, len(data)])), size=3):
                damaged[position] = random.integers(256)
            try:
                decode(bytes(damaged))
            except ImageRefused:
                refused += 1
    assert 100 < refused < 60 * len(ALL)


@pytest.mark.parametrize("kind", ["PNG", "TIFF, deflate"])
def test_pixels_that_fail_their_checksum_are_refused(kind):
    data = bytearray(LOSSLESS[kind])
    data[100] ^= 1  # within the deflated pixels of both
    with pytest.raises(UndecodableImage, match=r"its pixels may be cut short, damaged .*\("):
        decode(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        rgb_tiff(t282=(5, struct.pack("<4L", 1, 1, 1, 1)), t296=short(2)),  # two values where one belongs
        rgb_tiff(t305=(2, b"software")).replace(struct.pack("<HHL", 305, 2, 8), struct.pack("<HHL", 305, 2, 1 << 30)),
        encode(painting(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"),
    ],
    ids=["too many values", "longer than the file", "EXIF"],
)
def test_broken_metadata_is_no_error_even_where_warnings_are(data):
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data)).getexif()
    assert remarks
    assert decode(data).rgb.shape[2] == 3


def test_warnings_of_others_are_left_alone():
    decode(LOSSLESS["TIFF"])
    with pytest.raises(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)


def test_an_unknown_variant_is_named():
    with pytest.raises(
        UndecodableImage, match=r"The TIFF cannot be decoded: its header .*compression 33005 is JPEG 2000"
    ):
        decode(rgb_tiff(t259=short(33005)))


# Size


def test_too_many_pixels_are_refused_before_any_is_decoded():
    only_a_header = png(7072, 7071, 8, 2, b"")
    with pytest.raises(ImageTooLarge, match=r"7072 x 7071 px, 50\.0 megapixels; at most 50 are"):
        decode(only_a_header)
    with pytest.raises(UndecodableImage):
        decode(png(7071, 7071, 8, 2, b""))
    with pytest.raises(ImageTooLarge, match=r"at most 0\.001"):
        decode(LOSSLESS["PNG"], max_megapixels=0.001)


def test_pixels_of_a_webp_count_double():
    webp = encode(painting(60, 50), "WEBP", lossless=True)
    with pytest.raises(
        ImageTooLarge, match=r"60 x 50 px, 0\.0 megapixels, which count double in a WebP; at most 0\.005"
    ) as refused:
        decode(webp, max_megapixels=0.005)
    assert refused.value.megapixels == pytest.approx(0.006)
    assert decode(webp, max_megapixels=0.006)


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGBA", "WEBP")])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the most memory that was taken")
def test_decoding_takes_ten_bytes_a_pixel(mode, kind, tmp_path):
    side = 3000 if kind != "WEBP" else 2100  # whose pixels count double
    half_way = tuple(128 for _ in mode)
    (tmp_path / "picture").write_bytes(encode(Image.new(mode, (side, side), half_way), kind))
    script = """
import pathlib, re, sys
from model.pixels import decode
data = pathlib.Path(sys.argv[1]).read_bytes()
def most_kib(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = most_kib()
decode(data)
print(most_kib() - before)
"""
    told = subprocess.run([sys.executable, "-c", script, tmp_path / "picture"], capture_output=True, check=True)
    assert 4 < int(told.stdout) * 1024 / 3000**2 < 12


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
def test_our_limit_comes_before_pillows(side):
    tags = {256: long(side), 257: long(side), 258: short(8, 8, 8), 262: short(2), 273: long(8), 277: short(3)}
    jpeg = bytearray(LOSSY["JPEG"])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", side, side)
    canvas = struct.pack("<L", side - 1)[:3] * 2
    webp = b"WEBPVP8X" + struct.pack("<LL", 10, 0) + canvas + LOSSLESS["WEBP"][12:]
    for data in (png(side, side, 8, 2, b""), tiff(tags), bytes(jpeg)):
        with pytest.raises(ImageTooLarge, match=f"{side} x {side}"):
            decode(data)
    with pytest.raises((ImageTooLarge, UndecodableImage)):  # the canvas is not what its one frame fills
        decode(b"RIFF" + struct.pack("<L", len(webp)) + webp)


def test_pillows_limit_stays_behind_a_higher_one():
    tags = {256: long(20_000), 257: long(20_000), 258: short(8, 8, 8), 262: short(2), 273: long(8), 277: short(3)}
    with pytest.raises(ImageTooLarge, match="more pixels than can be decoded"):
        decode(tiff(tags), max_megapixels=1000)


def test_a_tiff_whose_blocks_are_all_one_stretch_of_the_file_is_refused():
    blocks = 9  # of 16 x 16 px: 40 x 40 px; each points at the same bytes
    shared = {322: short(16), 323: short(16), 324: long(*[8] * blocks)}
    tags = {256: short(40), 257: short(40), 258: short(8, 8, 8), 262: short(2), 277: short(3)} | shared
    assert decode(tiff(tags | {325: long(*[768] * blocks)}, bytes(4000)))  # as writers may do with blank ones
    with pytest.raises(
        UndecodableImage, match=r"blocks of the TIFF have 90000 bytes, the file has \d+\. Save it again"
    ):
        decode(tiff(tags | {325: long(*[10_000] * blocks)}, bytes(4000)))


def test_the_shorter_side_needs_32_pixels():
    assert decode(encode(painting(32, 33), "PNG")).rgb.shape == (33, 32, 3)
    for width, height in ((31, 600), (600, 31), (1, 1)):
        with pytest.raises(ImageTooSmall, match=f"{width} x {height} px.* at least 32"):
            decode(encode(painting(width, height), "PNG"))


def test_the_longer_side_has_at_most_twenty_times_the_shorter():
    assert decode(encode(painting(640, 32), "PNG"))
    for width, height in ((641, 32), (32, 641)):
        with pytest.raises(ImageTooNarrow, match="at most 20 times"):
            decode(encode(painting(width, height), "PNG"))


# Files made to exhaust


def test_a_text_that_inflates_a_thousandfold_is_refused():
    bomb = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(50 << 20)))
    with pytest.raises(UndecodableImage, match="Decompressed data too large"):
        decode(png(40, 40, 8, 2, bytes(40 * 121), before=bomb))


@pytest.mark.parametrize("texts", [3, 63])
def test_many_texts_that_inflate_are_refused_together(texts):
    text = zlib.compress(bytes((1 << 20) - 9))
    data = png(
        40, 40, 8, 2, bytes(40 * 121), before=b"".join(chunk(b"zTXt", b"k%d\0\0" % n + text) for n in range(texts))
    )
    if texts < 4:
        assert decode(data).rgb.shape == (40, 40, 3)
    else:
        with pytest.raises(UndecodableImage, match="memory used in text"):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        png(40, 40, 8, 2, bytes(40 * 121), before=chunk(b"abCd", b"") * 10_000),
        png(40, 40, 8, 2, bytes(40 * 121), after=chunk(b"abCd", b"") * 10_000),
        png(40, 40, 8, 2, bytes(40 * 121), before=chunk(b"eXIf", bytes(13 << 20))),
        LOSSY["JPEG"][:2] + b"\xff\xe5\0\2" * 10_000 + LOSSY["JPEG"][2:],
        rgb_tiff(t273=(4, bytes(13 << 20))),
        rgb_tiff(t282=(5, bytes(13 << 20))),
    ],
    ids=["PNG chunks", "PNG chunks at the end", "PNG EXIF", "JPEG segments", "TIFF strips", "TIFF resolutions"],
)
def test_a_flood_of_metadata_is_refused(data):
    with pytest.raises(UndecodableImage, match="too much metadata"):
        decode(data)


def test_the_camera_directories_of_a_tiff_are_never_read(monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(Image.Exif, "get_ifd", lambda _, tag: seen.append(tag))
    data = rgb_tiff(t34665=long(8), t34853=long(8), t40965=long(8))
    Image.open(io.BytesIO(data)).load()
    assert seen
    seen.clear()
    decode(data)
    assert not seen


def test_a_jpeg_of_many_scans_is_refused_by_its_work_and_not_by_their_number():
    jpeg = LOSSY["JPEG, progressive"]
    tables = jpeg.rindex(b"\xff\xc4")
    bomb = jpeg[:-2] + jpeg[tables:-2] * 400 + b"\xff\xd9"
    assert decode(bomb)
    with pytest.raises(ImageTooLarge, match=r"in 410 scans"):
        decode(bomb, max_megapixels=40 * 36 / 1e6)


def test_a_small_tiff_in_huge_blocks_is_refused():
    blocks = {"t259": short(8), "t322": long(16_000), "t323": long(16_000), "t324": long(8), "t325": long(40)}
    with pytest.raises(ImageTooLarge, match="blocks of 16000 x 16000"):
        decode(rgb_tiff(**blocks))
    with pytest.raises(UndecodableImage):
        decode(rgb_tiff(**blocks | {"t322": (12, struct.pack("<2d", 1.0, 2.0))}))


def test_a_tiff_in_ordinary_blocks_is_read():
    rgb = np.zeros((48, 48, 3), np.uint8)
    rgb[:40, :40] = np.asarray(painting(40, 40))
    blocks = [rgb[top : top + 16, left : left + 16].tobytes() for top in (0, 16, 32) for left in (0, 16, 32)]
    tags = {256: short(40), 257: short(40), 258: short(8, 8, 8), 262: short(2), 277: short(3), 322: short(16)}
    tags |= {323: short(16), 324: long(*[0] * 9), 325: long(*[768] * 9)}
    start = len(tiff(tags))
    tags[324] = long(*range(start, start + 9 * 768, 768))
    assert np.array_equal(decode(tiff(tags, b"".join(blocks))).rgb, rgb[:40, :40])


def test_a_run_length_encoded_bmp_is_refused():
    pixels = b"\x28\x01\0\0" * 40 + b"\0\1"  # 40 rows of 40 times colour 1
    header = struct.pack("<LLLHHLLLLLL", 40, 40, 40, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    bmp = b"BM" + struct.pack("<LHHL", 1078 + len(pixels), 0, 0, 1078) + header + bytes(range(256)) * 4 + pixels
    with pytest.raises(UndecodableImage, match="run-length"):
        decode(bmp)


# Colour


def test_transparent_parts_become_white_and_this_is_said():
    rgba = painting().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    alpha = np.asarray(rgba)[..., 3:] / 255
    expected = np.asarray(painting()) * alpha + 255 * (1 - alpha)
    for kind in ("PNG", "TIFF"):
        came = decode(encode(rgba, kind))
        assert np.abs(came.rgb - expected).max() <= 1
        assert codes(came.notes) == ["transparency"]


def test_the_slightest_transparency_counts():
    rgba = painting().convert("RGBA")
    rgba.putpixel((7, 7), (0, 0, 0, 254))
    assert codes(decode(encode(rgba, "PNG")).notes) == ["transparency"]


def test_an_alpha_channel_that_hides_nothing_is_dropped_without_a_word():
    came = decode(encode(painting().convert("RGBA"), "PNG"))
    assert np.array_equal(came.rgb, np.asarray(painting()))
    assert came.notes == ()


def test_transparency_by_palette_and_by_colour_key_is_seen():
    palette = painting().quantize(16)
    keyed = painting()
    keyed.paste((1, 2, 3), (0, 0, 10, 10))
    first = palette.getpixel((0, 0))
    for data in (
        encode(palette, "PNG", transparency=first),
        encode(palette, "PNG", transparency=bytes([0 if index == first else 255 for index in range(16)])),
        encode(keyed, "PNG", transparency=(1, 2, 3)),
    ):
        came = decode(data)
        assert came.rgb[0, 0].tolist() == [255, 255, 255]
        assert codes(came.notes) == ["transparency"]


def test_a_palette_is_looked_up():
    palette = painting().quantize(16)
    for kind in ("PNG", "TIFF", "BMP"):
        came = decode(encode(palette, kind, dpi=(50_800, 50_800)))
        assert np.array_equal(came.rgb, np.asarray(palette.convert("RGB")))
        assert came.notes == ()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGB"])
def test_grey_becomes_rgb_and_this_is_said(mode):
    grey = painting().convert("L").convert(mode)
    came = decode(encode(grey, "PNG"))
    assert np.array_equal(came.rgb, np.asarray(grey.convert("RGB")))
    assert codes(came.notes) == ["greyscale"]


def test_one_row_in_grey_does_not_make_a_picture_grey():
    rgb = np.asarray(painting()).copy()
    rgb[18] = 128
    assert decode(encode(Image.fromarray(rgb), "PNG")).notes == ()


@pytest.mark.parametrize("colour", [(200, 200, 100), (200, 100, 100), (100, 200, 100)])
def test_two_equal_channels_do_not_make_a_picture_grey(colour):
    assert decode(encode(Image.new("RGB", (40, 40), colour), "PNG")).notes == ()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, LZW"])
def test_of_16_bit_grey_the_upper_8_bits_are_used(kind):
    grey = np.random.default_rng(0).integers(0, 30_000, (40, 40), dtype=np.uint16)  # dark: stretching would show
    options = {"compression": "tiff_lzw"} if "LZW" in kind else {}
    came = decode(encode(Image.fromarray(grey), kind.partition(",")[0], **options))
    assert np.array_equal(came.rgb, np.repeat((grey >> 8)[..., None], 3, axis=2))
    assert codes(came.notes) == ["reduced_depth", "greyscale"]
    assert "16 bits" in came.notes[0].text


def test_16_bit_grey_of_either_byte_order_is_the_same():
    grey = np.random.default_rng(0).integers(0, 1 << 16, (40, 40), dtype=np.uint16)
    big_endian = Image.frombytes("I;16B", (40, 40), grey.astype(">u2").tobytes())
    assert np.array_equal(decode(encode(big_endian, "TIFF")).rgb[..., 0], grey >> 8)


def test_of_16_bit_colours_the_upper_8_bits_are_used():
    rgb = np.random.default_rng(0).integers(0, 30_000, (40, 40, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    tags = {256: short(40), 257: short(40), 258: short(16, 16, 16), 262: short(2), 277: short(3), 273: long(0)}
    tags |= {278: short(40), 279: long(9600)}
    tags[273] = long(len(tiff(tags)))
    for data in (png(40, 40, 16, 2, rows), tiff(tags, rgb.astype("<u2").tobytes())):
        came = decode(data)
        assert np.array_equal(came.rgb, rgb >> 8)
        assert codes(came.notes) == ["reduced_depth"]


def test_12_bit_grey_is_read_by_its_own_depth():
    levels = struct.pack("<3B", 0xAB, 0xC1, 0x23) * 800  # two pixels in three bytes: 0xABC, 0x123
    tags = {256: short(40), 257: short(40), 258: short(12), 262: short(1), 277: short(1), 273: long(0)}
    tags |= {278: short(40), 279: long(2400)}
    tags[273] = long(len(tiff(tags)))
    came = decode(tiff(tags, levels))
    assert came.rgb[0, :2, 0].tolist() == [0xAB, 0x12]
    assert "12 bits" in came.notes[0].text


def test_16_bit_planes_that_pillow_would_garble_are_refused():
    tags = {256: short(40), 257: short(40), 258: short(16, 16, 16), 262: short(2), 277: short(3), 284: short(2)}
    tags |= {273: long(8, 3208, 6408), 278: short(40), 279: long(3200, 3200, 3200)}
    with pytest.raises(UndecodableImage, match="16-bit colours in separate planes"):
        decode(tiff(tags, bytes(9600)))


@pytest.mark.parametrize("compression", [1, 8])
def test_deep_greys_that_pillow_would_leave_inverted_are_refused(compression):
    body = bytes(3200) if compression == 1 else zlib.compress(bytes(3200))
    tags = {256: short(40), 257: short(40), 258: short(16), 259: short(compression), 262: short(0), 277: short(1)}
    tags |= {273: long(0), 278: short(40), 279: long(len(body))}
    tags[273] = long(len(tiff(tags)))
    with pytest.raises(UndecodableImage, match="16-bit greys of which 0 is white"):
        decode(tiff(tags, body))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_print_colours_are_converted_with_white_as_white(kind):
    inks = Image.new("CMYK", (40, 40), (0, 0, 0, 0))
    inks.paste((0, 255, 255, 0), (0, 0, 40, 20))  # red
    came = decode(encode(inks, kind))
    assert came.rgb[35, 20].tolist() == pytest.approx([255, 255, 255], abs=3)
    assert came.rgb[5, 20].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert codes(came.notes) == ["converted_colours"]


def test_lab_colours_are_converted():
    lab = Image.new("LAB", (40, 40), (255, 128, 128))
    lab.paste((136, 208, 195), (0, 0, 40, 20))  # L 53, a 80, b 67: the red of sRGB
    came = decode(encode(lab, "TIFF"))
    assert came.rgb[35, 20].tolist() == pytest.approx([255, 255, 255], abs=4)
    assert came.rgb[5, 20].tolist() == pytest.approx([255, 0, 0], abs=12)  # LAB's steps are coarse
    assert codes(came.notes) == ["converted_colours"]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_an_agreed_white_are_refused(mode):
    with pytest.raises(UndecodableImage, match="black and white are a matter of convention"):
        decode(encode(painting().convert("L").convert(mode), "TIFF"))


def test_a_colour_profile_changes_no_pixel():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes().ljust(3 << 20)  # large ones have 3 MB
    for kind in ("TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        came = decode(encode(painting(), kind, icc_profile=profile, **options))
        assert np.array_equal(came.rgb, np.asarray(painting()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, LZW", "WEBP", "JPEG"])
def test_the_exif_orientation_is_honoured(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"compression": "tiff_lzw"} if "LZW" in kind else {}
    data = encode(painting(), kind.partition(",")[0], exif=exif, **options)
    tagged = painting() if kind != "JPEG" else Image.open(io.BytesIO(encode(painting(), "JPEG")))
    tagged.getexif()[ExifTags.Base.Orientation] = orientation
    assert np.array_equal(decode(data).rgb, np.asarray(ImageOps.exif_transpose(tagged)))


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0" + bytes(1 << 16)],
)
def test_damaged_exif_says_nothing_against_the_pixels(exif):
    came = decode(encode(painting(), "PNG", exif=exif) if exif else LOSSLESS["PNG"])
    assert np.array_equal(came.rgb, np.asarray(painting()))


def test_exif_longer_than_it_can_be_is_not_parsed():
    orientations = struct.pack("<H", 6) * 40_000
    exif = b"II*\0" + struct.pack("<LHHHLLL", 8, 1, 274, 3, 40_000, 26, 0) + orientations
    assert decode(png(40, 36, 8, 2, bytes(36 * 121), before=chunk(b"eXIf", exif))).rgb.shape == (36, 40, 3)


# Tile


def test_a_tile_at_the_models_scale_keeps_its_very_pixels():
    for mpp in (0.495, 0.4951, 0.4936, 0.4965):
        came = picture(150, 150)
        tile = to_tile(came, TILE_PX, TILE_MPP, mpp)
        assert np.array_equal(tile.pixels, came.rgb)
        assert tile.box == (0, 0, 150, 150)
        assert (tile.mpp, tile.picture_mpp, tile.mpp_source, tile.notes) == (mpp, mpp, "request", ())


@pytest.mark.parametrize(("width", "height", "left", "top"), [(200, 180, 25, 15), (201, 151, 25, 0), (150, 299, 0, 74)])
def test_the_centre_of_a_larger_field_at_the_models_scale_is_cut_out_byte_for_byte(width, height, left, top):
    came = picture(width, height)
    tile = to_tile(came, TILE_PX, TILE_MPP, 0.495)
    assert tile.box == (left, top, left + 150, top + 150)
    assert np.array_equal(tile.pixels, came.rgb[top : top + 150, left : left + 150])
    assert tile.pixels.flags.c_contiguous


@pytest.mark.parametrize("mpp", [0.4933, 0.4967])  # fields of 150.5 and 149.5 px
def test_a_scale_off_by_half_a_pixel_is_corrected(mpp):
    came = picture(152, 152)
    assert not np.array_equal(to_tile(came, TILE_PX, TILE_MPP, mpp).pixels, came.rgb[1:151, 1:151])


def test_a_field_that_exceeds_its_box_by_the_last_bit_is_cut():
    pixels, box = cut(picture(1001, 1001).rgb, 299 + 2**-44, TILE_PX)
    assert (pixels.shape, box) == ((150, 150, 3), (351, 351, 650, 650))


def test_the_tile_is_the_same_through_a_file_and_from_the_array():
    came = picture(333, 310)
    through_a_file = decode(encode(Image.fromarray(came.rgb), "PNG"))
    ours, theirs = (to_tile(each, TILE_PX, TILE_MPP, 0.3) for each in (came, through_a_file))
    assert np.array_equal(ours.pixels, theirs.pixels)


@pytest.mark.parametrize(("mpp", "field_px"), [(0.2475, 300), (0.33, 225), (0.99, 75), (1.98, 37.5), (0.45, 165)])
def test_the_field_is_what_a_tile_shows_at_the_pictures_scale(mpp, field_px):
    came = picture(310, 304)
    tile = to_tile(came, TILE_PX, TILE_MPP, mpp)
    x, y = (310 - field_px) / 2, (304 - field_px) / 2
    assert tile.mpp == pytest.approx(TILE_MPP) and tile.picture_mpp == mpp
    left, top, right, bottom = tile.box
    assert (left, top, right, bottom) == (int(x), int(y), int(-(-(x + field_px) // 1)), int(-(-(y + field_px) // 1)))
    crop = Image.fromarray(came.rgb[top:bottom, left:right])
    box = (x - left, y - top, x - left + field_px, y - top + field_px)
    assert np.array_equal(tile.pixels, np.asarray(crop.resize((150, 150), Image.Resampling.BICUBIC, box)))


def test_a_distance_in_the_tissue_is_the_same_number_of_pixels_in_every_tile():
    """A bright bar every 12 um: its period in the tile may not depend on the scale of the scan."""
    for mpp in (0.25, 0.4, 0.495, 0.7, 1.0):
        across = np.arange(int(160 / mpp)) * mpp
        wave = (127 + 100 * np.cos(2 * np.pi * across / 12)).astype(np.uint8)
        rgb = np.broadcast_to(wave[None, :, None], (len(wave), len(wave), 3)).copy()
        tile = to_tile(Picture(rgb, "PNG", None, ()), TILE_PX, TILE_MPP, mpp)
        row = tile.pixels[75, :, 0].astype(float)
        periods = np.fft.rfftfreq(16 * 150)[
            np.abs(np.fft.rfft((row - row.mean()) * np.hanning(150), 16 * 150)).argmax()
        ]
        assert 1 / periods * TILE_MPP == pytest.approx(12, rel=0.02)


def test_reduction_is_antialiased():
    checkers = (np.indices((600, 600)).sum(0) % 2 * 255).astype(np.uint8)
    rgb = np.repeat(checkers[..., None], 3, axis=2)
    tile = to_tile(Picture(rgb, "PNG", None, ()), TILE_PX, TILE_MPP, 0.495 / 4)
    assert np.abs(tile.pixels[5:-5, 5:-5].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("mpp", [0.3, 0.52, 0.77])
def test_turning_the_picture_turns_the_tile(mpp):
    soft = (picture(331, 290).rgb // 2 + 64).astype(np.uint8)  # no overshoot to be clipped between the two passes
    came, turned = (Picture(rgb, "PNG", None, ()) for rgb in (soft, np.rot90(soft)))
    tile, turned_tile = to_tile(came, TILE_PX, TILE_MPP, mpp), to_tile(turned, TILE_PX, TILE_MPP, mpp)
    assert np.abs(np.rot90(tile.pixels).astype(int) - turned_tile.pixels).max() <= 2


def test_the_request_beats_the_tag_and_the_tag_beats_not_knowing():
    assert to_tile(picture(400, 400, 0.25), TILE_PX, TILE_MPP, 0.5).mpp_source == "request"
    tagged = to_tile(picture(400, 400, 0.25), TILE_PX, TILE_MPP)
    assert (tagged.picture_mpp, tagged.mpp_source, tagged.box) == (0.25, "tag", (51, 51, 349, 349))
    assert tagged.notes == ()
    unknown = to_tile(picture(400, 300), TILE_PX, TILE_MPP)
    assert (unknown.mpp, unknown.picture_mpp, unknown.mpp_source) == (None, None, "unknown")
    assert unknown.box == (50, 0, 350, 300)
    assert codes(unknown.notes) == ["unknown_scale"]
    assert unknown.pixels.shape == (150, 150, 3)


def test_at_unknown_scale_a_square_of_the_tiles_size_keeps_its_very_pixels():
    came = picture(190, 150)
    tile = to_tile(came, TILE_PX, TILE_MPP)
    assert np.array_equal(tile.pixels, came.rgb[:, 20:170])
    assert codes(tile.notes) == ["unknown_scale"]


@pytest.mark.parametrize("mpp", [0.0999, 5.001, 0.0, -0.5, float("nan"), float("inf")])
def test_a_requested_scale_outside_the_range_is_refused(mpp):
    with pytest.raises(MppOutOfRange, match=r"must lie in 0\.1 to 5 um per pixel"):
        to_tile(picture(400, 400, 0.25), TILE_PX, TILE_MPP, mpp)


def test_the_ends_of_the_range_are_within():
    assert to_tile(picture(800, 800), TILE_PX, TILE_MPP, 0.1).picture_mpp == 0.1
    assert to_tile(picture(40, 40), TILE_PX, TILE_MPP, 5).picture_mpp == 5


def test_a_field_up_to_5_percent_short_is_stretched_and_this_is_said():
    tile = to_tile(picture(143, 160), TILE_PX, TILE_MPP, 0.495)  # 143 / 150 = 95.3 %
    assert tile.box == (0, 8, 143, 152)
    assert tile.pixels.shape == (150, 150, 3)
    assert tile.mpp == pytest.approx(0.495 * 143 / 150)
    assert codes(tile.notes) == ["field_slightly_small"]


def test_a_smaller_field_is_refused_with_the_pixels_it_needs():
    with pytest.raises(FieldTooSmall, match=r"shows 35\.5 um \(142 px at 0\.25 .* 74\.2 um, which is 297 px"):
        to_tile(picture(142, 400), TILE_PX, TILE_MPP, 0.25)
    with pytest.raises(FieldTooSmall, match="150 px"):
        to_tile(picture(142, 142), TILE_PX, TILE_MPP, 0.495)


def test_a_field_of_more_than_four_tiles_says_that_only_its_centre_was_looked_at():
    assert to_tile(picture(300, 300), TILE_PX, TILE_MPP, 0.495).notes == ()
    wide = to_tile(picture(301, 300), TILE_PX, TILE_MPP, 0.495)
    assert codes(wide.notes) == ["only_centre_used"]
    assert "25% of its area" in wide.notes[0].text
    strip = to_tile(picture(800, 160), TILE_PX, TILE_MPP)
    assert codes(strip.notes) == ["unknown_scale", "only_centre_used"]


@pytest.mark.parametrize("mpp", [0.1, 0.2, 0.31, 0.4936, 0.5, 1.98, 4.99])
@pytest.mark.parametrize("size", [(743, 751), (800, 744), (32, 33), (38, 41), (150, 151)])
def test_whatever_the_scale_the_box_lies_in_the_picture_and_the_tile_is_square(mpp, size):
    try:
        tile = to_tile(picture(*size), TILE_PX, TILE_MPP, mpp)
    except FieldTooSmall:
        return
    left, top, right, bottom = tile.box
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert tile.pixels.shape == (150, 150, 3)
    assert tile.pixels.dtype == np.uint8


# Together


def test_many_threads_get_what_one_gets():
    expected = {kind: decode(data).rgb for kind, data in ALL.items()}
    broken = rgb_tiff(t282=(5, struct.pack("<4L", 1, 1, 1, 1)), t296=short(2))  # makes Pillow warn

    def work(kind: str) -> bool:
        decode(broken)
        return np.array_equal(decode(ALL[kind]).rgb, expected[kind])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, list(ALL) * 20))


def test_the_refusals_are_the_ones_that_the_module_draws():
    defined = {
        name
        for name, thing in vars(model.pixels).items()
        if isinstance(thing, type) and issubclass(thing, ImageRefused)
    }
    drawn = {line.split()[0] for line in (model.pixels.__doc__ or "").splitlines() if line.startswith("    ")}
    assert defined == drawn
    assert issubclass(ImageRefused, ValueError)
