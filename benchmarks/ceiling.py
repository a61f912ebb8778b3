"""What the machine could give: the same graph in ONNX Runtime, in a bare loop without HTTP.

Once with one caller that has all cores, and once with as many callers as cores, a thread each; both with several batch
sizes. The best of them is the ceiling that the servers are measured against.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.overload import percentile
from benchmarks.tiles import Tile
from model.pixels import decode, to_tile
from model.runtime import ort

BATCHES = (1, 4, 8)
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Ceiling:
    alone_per_s: dict[str, float]  # images/s by batch, one caller with all cores
    crowd_per_s: dict[str, float]  # images/s by batch, as many callers as cores
    decoding_crowd_per_s: float  # the same with one tile a call, each caller decoding its own JPEG first
    lone_p50_ms: float  # decode and call, one tile, one caller with all cores
    lone_p99_ms: float

    @property
    def best_per_s(self) -> float:
        return max(*self.alone_per_s.values(), *self.crowd_per_s.values())


def measure(graph: Path, tiles: Sequence[Tile], tile_px: int, tile_mpp: float, cores: int, seconds: float) -> Ceiling:
    """Takes `seconds` for each of its eight loops."""

    def read(tile: Tile) -> NDArray[np.uint8]:
        return to_tile(decode(tile.data), tile_px, tile_mpp).pixels

    pixels = np.stack([read(tile) for tile in tiles])
    batches = {size: np.resize(pixels, (size, *pixels.shape[1:])) for size in BATCHES}
    sessions = {threads: open_bare_session(graph, threads) for threads in {cores, 1}}

    def call(threads: int, batch: NDArray[np.uint8]) -> Any:
        return sessions[threads].run(None, {"tiles": batch})

    alone = {str(size): size / mean_s(call, cores, batch, 1, seconds) for size, batch in batches.items()}
    crowd = {str(size): cores * size / mean_s(call, 1, batch, cores, seconds) for size, batch in batches.items()}
    decoding = time_calls(lambda: call(1, read(tiles[0])[None]), cores, seconds)
    lone = [1e3 * took_s for took_s in time_calls(lambda: call(cores, read(tiles[0])[None]), 1, seconds)]
    return Ceiling(
        alone,
        crowd,
        float(cores / np.mean(decoding)),
        percentile(lone, 50),
        percentile(lone, 99),
    )


def open_bare_session(graph: Path, threads: int) -> ort.InferenceSession:
    """With ONNX Runtime's defaults, not the service's options, by which no thread spins between calls.

    So the ceiling owes nothing to what the service chose.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def mean_s(call: Callable[..., Any], threads: int, batch: NDArray[np.uint8], callers: int, seconds: float) -> float:
    return float(np.mean(time_calls(lambda: call(threads, batch), callers, seconds)))


def time_calls(call: Callable[[], Any], callers: int, seconds: float) -> list[float]:
    """How many seconds each call took, those of all callers in one list; the first few of each don't count."""
    took_s: list[float] = []  # list.append is atomic

    def work() -> None:
        for _ in range(WARM_UP_CALLS):
            call()
        ends = time.perf_counter() + seconds
        while (started := time.perf_counter()) < ends:
            call()
            took_s.append(time.perf_counter() - started)

    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took_s
