"""Asks a running service for everything once: `python3 deploy/smoke.py http://127.0.0.1:8000`. Python alone is enough.

Exits with 0 where the answers make sense, else says which one didn't.
"""

import argparse
import json
import math
import os
import re
import struct
import sys
import time
import zlib
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

READY_WITHIN_S = 60
ANSWER_WITHIN_S = 30
TILE_PX = 150
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Server:
    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/") + "/"
        self._headers = {"X-API-Key": key} if key else {}

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, str, bytes]:
        """Status, content type and body of the answer; with a body of its own it is a POST."""
        headers = self._headers | ({"Content-Type": "image/png"} if body is not None else {})
        request = Request(urljoin(self.url, path), data=body, headers=headers)
        try:
            with urlopen(request, timeout=ANSWER_WITHIN_S) as answer:
                return answer.status, answer.headers.get_content_type(), answer.read()
        except HTTPError as error:
            with error:
                return error.code, error.headers.get_content_type(), error.read()


def check(server: Server) -> str:
    wait_until_ready(server)
    check_pages(server)
    prediction = check_prediction(server, draw_tile())
    check_overlay(server, draw_tile())
    check_refusal(server)
    model = prediction["model"]
    return f"{model['name']} {model['version']} in {model['precision']} on {model['device']} answers"


def wait_until_ready(server: Server) -> None:
    until = time.monotonic() + READY_WITHIN_S
    cause = "it answers, but isn't ready"
    while time.monotonic() < until:
        try:
            if server.ask("readyz")[0] == 200:
                return
        except (URLError, ConnectionError, TimeoutError) as error:
            cause = str(error)
        time.sleep(0.2)
    sys.exit(f"{server.url} is not ready after {READY_WITHIN_S} s: {cause}")


def check_pages(server: Server) -> None:
    """The pages and all that they load, from the service itself."""
    for page in ("", "docs", "redoc"):
        markup = expect(server.ask(page), 200, "text/html", page or "the page").decode()
        for asset in re.findall(r'(?:<script src|<link [^>]*href)="([^"]+)"', markup):
            expect(server.ask(asset), 200, None, asset)
    json.loads(expect(server.ask("openapi.json"), 200, "application/json", "openapi.json"))


def check_prediction(server: Server, tile: bytes) -> dict[str, Any]:
    prediction: dict[str, Any] = json.loads(expect(server.ask("predict", tile), 200, "application/json", "predict"))
    probabilities = prediction["probabilities"]
    if not math.isclose(sum(probabilities.values()), 1, abs_tol=1e-3):
        sys.exit(f"the probabilities add up to {sum(probabilities.values())}, expected 1: {probabilities}")
    if prediction["label"] not in probabilities:
        sys.exit(f"the label {prediction['label']} is none of the classes {list(probabilities)}")
    return prediction


def check_overlay(server: Server, tile: bytes) -> None:
    picture = expect(server.ask("attention?method=evidence&format=png", tile), 200, "image/png", "attention")
    width_px, height_px, rows = read_png(picture)
    if min(width_px, height_px) < TILE_PX or len(set(rows)) < 2:
        sys.exit(f"the overlay of {width_px} x {height_px} px is no picture of a tile")


def check_refusal(server: Server) -> None:
    refusal = expect(server.ask("predict", b"no picture"), 415, "application/problem+json", "predict without a picture")
    if json.loads(refusal)["code"] != "unsupported_format":
        sys.exit(f"no picture came, and the service says {refusal.decode()}")


def expect(answer: tuple[int, str, bytes], status: int, content_type: str | None, asked: str) -> bytes:
    if answer[0] != status or content_type not in (None, answer[1]):
        sys.exit(
            f"{asked}: expected {status} {content_type or ''}, got {answer[0]} {answer[1]}: {answer[2][:500].decode()}"
        )
    return answer[2]


def draw_tile() -> bytes:
    """Pink with purple rings, as a PNG."""
    rows = (b"\0" + b"".join(color(x, y) for x in range(TILE_PX)) for y in range(TILE_PX))
    header = struct.pack(">IIBBBBB", TILE_PX, TILE_PX, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def color(x: int, y: int) -> bytes:
    return bytes((110, 60, 150)) if 36 < (x % 30 - 15) ** 2 + (y % 30 - 15) ** 2 < 90 else bytes((232, 190, 214))


def read_png(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and the unpacked rows."""
    width_px, height_px = struct.unpack(">II", data[16:24])
    packed, at = b"", len(PNG_SIGNATURE)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += length + 12
    return width_px, height_px, zlib.decompress(packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="where the service is, e.g. http://127.0.0.1:8000")
    parser.add_argument(
        "--api-key", default=os.environ.get("TISSUE_API_KEY"), help="or TISSUE_API_KEY, where it asks for one"
    )
    arguments = parser.parse_args()
    sys.stdout.write(f"smoke test: {check(Server(arguments.url, arguments.api_key))}\n")


if __name__ == "__main__":
    main()
