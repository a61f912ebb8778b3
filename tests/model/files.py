"""Pictures as files, some made byte by byte."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def painting(width: int = 40, height: int = 36, seed: int = 0) -> Image.Image:
    """Blocks of random colours: every corner differs, and JPEG keeps them apart."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((4, 4, 1), np.uint8))[:height, :width])


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, bytes]], body: bytes = b"") -> bytes:
    """Little-endian, one directory; tags: number -> (type, values). The body begins at offset len(tiff(tags))."""
    item_bytes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 12: 8}
    entries, values, start = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for number, (kind, data) in sorted(tags.items()):
        entries += struct.pack("<HHL", number, kind, len(data) // item_bytes[kind])
        entries += data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<L", start + len(values))
        values += data if len(data) > 4 else b""
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + values + body


def short(*values: int) -> tuple[int, bytes]:
    return 3, struct.pack(f"<{len(values)}H", *values)


def long(*values: int) -> tuple[int, bytes]:
    return 4, struct.pack(f"<{len(values)}L", *values)


def rgb_tiff(**more: tuple[int, bytes]) -> bytes:
    """40 x 40 px, black, uncompressed; more tags by `t<number>`."""
    tags = {256: short(40), 257: short(40), 258: short(8, 8, 8), 262: short(2), 277: short(3)}
    tags |= {273: long(8), 278: short(40), 279: long(4800)} | {int(name[1:]): value for name, value in more.items()}
    return tiff(tags, bytes(4800))
