"""Does memory grow? Many requests at one server, its memory written down as it goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.servers import Body, Server, run_server
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
    counts, memory, errors = [0], [0.0], 0
    bodies: list[Body] = [server.wrap(tile) for tile in tiles]
    with run_server(server, tiles[0], log) as running:
        memory[0] = running.usage().rss_bytes / 2**20
        while counts[-1] < requests:
            found = load.drive(running.address, bodies, CONNECTIONS, SLICE_S)
            counts.append(counts[-1] + found.requests)
            memory.append(running.usage().rss_bytes / 2**20)
            errors += found.errors
    return Soak(counts, memory, errors, running.peak_rss_bytes / 2**20)
