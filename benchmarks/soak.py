"""Does memory grow? Many requests at one server, its memory written down as it goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.servers import Server, run_server
from benchmarks.tiles import Tile

CONNECTIONS = 32
SLICE_S = 5


@dataclass(frozen=True)
class Soak:
    requests: list[int]  # answered so far
    rss_mib: list[float]  # then
    errors: int
    peak_rss_mib: float

    @property
    def second_half_growth_mib(self) -> float:
        half = next(i for i, n in enumerate(self.requests) if n >= self.requests[-1] / 2)
        return self.rss_mib[-1] - self.rss_mib[half]


def soak(server: Server, tiles: Sequence[Tile], log: Path, requests: int) -> Soak:
    bodies = [server.wrap(tile) for tile in tiles]
    with run_server(server, tiles[0], log) as running:
        counts, rss_mib, errors = [0], [running.usage().rss_bytes / 2**20], 0
        while counts[-1] < requests:
            measured = load.drive(running.address, bodies, CONNECTIONS, SLICE_S)
            counts.append(counts[-1] + measured.requests)
            rss_mib.append(running.usage().rss_bytes / 2**20)
            errors += measured.errors
    return Soak(counts, rss_mib, errors, running.peak_rss_mib)
