"""How the cost of our own service grows: with connections, with the queue, with the size of images, with workers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from PIL import Image

from benchmarks import load
from benchmarks.servers import Body, Running, as_body
from benchmarks.tiles import Tile, encode

Start = AbstractContextManager[Running]


class Starter(Protocol):
    def __call__(self, **settings: str) -> Start: ...


Measure = Callable[[Starter, Sequence[Tile], float], list[dict[str, Any]]]

CONNECTIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUEUES = (1, 32, 128, 512, 1024)
SIDES_PX = (150, 500, 1000, 2000, 4000, 7000)
WORKERS = (1, 2, 4)
CROWD = 32


def by_connections(start: Starter, tiles: Sequence[Tile], seconds: float) -> list[dict[str, Any]]:
    with start() as running:
        bodies = [as_body(tile) for tile in tiles]
        load.drive(running.address, bodies, CROWD, 1)
        return [describe(load.drive(running.address, bodies, n, seconds), connections=n) for n in CONNECTIONS]


def by_queue(start: Starter, tiles: Sequence[Tile], seconds: float) -> list[dict[str, Any]]:
    """As many requests in hand as there are connections, none refused.

    The queues ascend, so that the peak of memory so far is that of the present one.
    """
    with start(TISSUE_MAX_QUEUE="65536", TISSUE_DEADLINE_MS="60000") as running:
        bodies = [as_body(tile) for tile in tiles]
        return [describe_peak(running, bodies, n, seconds, waiting=n) for n in QUEUES]


def by_image_size(start: Starter, tiles: Sequence[Tile], seconds: float) -> list[dict[str, Any]]:
    with start() as running:
        samples = []
        for side_px in SIDES_PX:
            body = as_body(draw_field(side_px))
            samples.append(describe_peak(running, [body], 8, seconds, side_px=side_px, body_bytes=len(body.data)))
        return samples


def by_workers(start: Starter, tiles: Sequence[Tile], seconds: float) -> list[dict[str, Any]]:
    samples, bodies = [], [as_body(tile) for tile in tiles]
    for workers in WORKERS:
        with start(TISSUE_WORKERS=str(workers)) as running:
            load.drive(running.address, bodies, CROWD, 1)
            samples.append(describe_peak(running, bodies, CROWD, seconds, workers=workers))
    return samples


MEASURES: dict[str, Measure] = {
    "connections": by_connections,
    "queue": by_queue,
    "image size": by_image_size,
    "workers": by_workers,
}


def draw_field(side_px: int) -> Tile:
    """Smooth noise with the file size of a scan; drawing real structures at this size would take minutes."""
    coarse = np.random.default_rng(0).integers(120, 255, (side_px // 5, side_px // 5, 3), np.uint8)
    return encode(Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC), "jpeg")


def describe_peak(
    running: Running, bodies: Sequence[Body], connections: int, seconds: float, **point: Any
) -> dict[str, Any]:
    measured = load.drive(running.address, bodies, connections, seconds)
    running.usage()  # looks once more: the peak may be the present
    return describe(measured, peak_rss_mib=running.peak_rss_mib, **point)


def describe(measured: load.Load, **point: Any) -> dict[str, Any]:
    figures = {name: getattr(measured, name) for name in ("good_per_s", "p50_ms", "p99_ms", "errors")}
    return {"kind": "growth", **point, **figures}


def points(samples: Sequence[dict[str, Any]], measure: str, *columns: str) -> list[tuple[float, ...]]:
    step = f"growth {measure}"
    return [tuple(sample[column] for column in columns) for sample in samples if sample["step"] == step]
