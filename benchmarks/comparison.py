"""What is measured, in which order, and where it is written down.

The order is A B C A B C, so that what the machine does meanwhile falls on all. Each step's findings are lines of JSON,
added when it is done: a run that was stopped goes on where it was.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import psutil

from benchmarks import ceiling, growth, load, overload
from benchmarks.servers import ARTIFACT, LOGS, TISSUE, Body, Running, Server, list_versions, run_server
from benchmarks.tiles import Form, Tile, cut_short, load_tiles, mean_bytes
from model.artifact import MANIFEST, Precision, digest, read_manifest
from model.pixels import decode, to_tile
from model.session import available_cores, open_session

T = TypeVar("T")
Sample = dict[str, Any]

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
CONNECTIONS = (1, 8, 32, 100)
PNG_CONNECTIONS = 32
MIX_CONNECTIONS = 8
WARM_UP_S = 1
IDLE_S = 3.0
TOLERANCE = 0.05  # in probability; int8 is this far off at most
OVERLOAD = 2.0  # requests offered, as a multiple of the server's own peak
PEERS_PACKAGES = ["onnxruntime", "pillow", "fastapi", "uvicorn", "litserve", "mosec", "bentoml", "ray"]


@dataclass(frozen=True)
class Step:
    name: str
    run: Callable[[], list[Sample]]


@dataclass(frozen=True)
class Comparison:
    servers: Sequence[Server]
    skipped: Sequence[str]
    seconds: float
    rounds: int
    folder: Path | None  # of the user's own tiles
    results: Path  # JSON lines
    artifact: Path = ARTIFACT

    @cached_property
    def tiles(self) -> dict[Form, list[Tile]]:
        return {"jpeg": load_tiles("jpeg", self.folder), "png": load_tiles("png", self.folder)}

    def steps(self) -> list[Step]:
        steps = [Step("setup", self.describe_setup)]
        for number in range(self.rounds):
            steps += [
                Step(f"ceiling {precision} {number}", partial(self.measure_ceiling, precision))
                for precision in PRECISIONS
            ]
            steps += [Step(f"visit {server.name} {number}", partial(self.visit, server)) for server in self.servers]
        steps += [Step(f"flood {server.name}", partial(self.overwhelm, server)) for server in self.servers]
        if TISSUE in self.servers:
            steps += [Step(f"growth {name}", partial(self.grow, measure)) for name, measure in growth.MEASURES.items()]
        return steps

    def describe_conditions(self) -> Sample:
        """What has to be the same for a run to go on."""
        manifest = read_manifest(self.artifact)
        return {
            "cores": available_cores(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "seconds": self.seconds,
            "rounds": self.rounds,
            "connections": list(CONNECTIONS),
            "skipped": list(self.skipped),
            "own_tiles": self.folder is not None,
            "jpeg_bytes": mean_bytes(self.tiles["jpeg"]),
            "png_bytes": mean_bytes(self.tiles["png"]),
            "model": manifest.name,
            "model_digest": digest(self.artifact / MANIFEST),
            "tissue": importlib.metadata.version("tissue"),
        }

    def check_conditions(self) -> None:
        samples = read_samples(self.results)
        if not samples:
            return
        before = samples[0]
        now = rounded(self.describe_conditions())
        differing = {name: (before[name], value) for name, value in now.items() if before[name] != value}
        if differing:
            raise ValueError(
                f"{self.results} holds a run under other conditions ({differing}, there and here); "
                "go on as it was begun, or take another --folder"
            )

    def describe_setup(self) -> list[Sample]:
        versions = {server.name: list_versions(server, PEERS_PACKAGES) for server in self.servers}
        return [{"kind": "setup", **self.describe_conditions(), "versions": versions}]

    def measure_ceiling(self, precision: Precision) -> list[Sample]:
        manifest = read_manifest(self.artifact)
        graph = self.artifact / manifest.file("predict", precision).path
        tiles, cores, seconds = self.tiles["jpeg"], available_cores(), self.seconds / 4
        measured, _, other_cores = watch(
            lambda: ceiling.measure(graph, tiles, manifest.tile_px, manifest.tile_mpp, cores, seconds)
        )
        figures = {"best_per_s": measured.best_per_s, "other_cores": other_cores}
        return [{"kind": "ceiling", "precision": precision, **figures, **dataclasses.asdict(measured)}]

    def visit(self, server: Server) -> list[Sample]:
        """One start of a server: how long it takes, what it takes when idle, and all closed loops."""
        samples: list[Sample] = []
        with self.started(server) as running:
            self.check_answer(running)
            idle_cores = running.measure_idle(IDLE_S)
            points: list[tuple[Form, int]] = [("jpeg", connections) for connections in CONNECTIONS]
            for form, connections in [*points, ("png", PNG_CONNECTIONS)]:
                bodies = [server.wrap(tile) for tile in self.tiles[form]]
                measured, cpu_s, other_cores = drive(running, bodies, connections, self.seconds)
                samples.append(
                    {
                        "kind": "load",
                        "server": server.name,
                        "form": form,
                        "connections": connections,
                        "good_per_s": measured.good_per_s,
                        "cpu_ms_per_request": 1e3 * cpu_s / max(1, measured.requests),
                        "other_cores": other_cores,
                        **dataclasses.asdict(measured),
                    }
                )
        costs = {"start_s": running.start_s, "idle_cores": idle_cores, "peak_rss_mib": running.peak_rss_mib}
        return [*samples, {"kind": "visit", "server": server.name, **costs}]

    def check_answer(self, running: Running) -> None:
        """A server that gives other answers does other work: its speed couldn't be compared."""
        manifest = read_manifest(self.artifact)
        tile = self.tiles["jpeg"][0]
        pixels = to_tile(decode(tile.data), manifest.tile_px, manifest.tile_mpp).pixels
        session = open_session(self.artifact / manifest.file("predict", "fp32").path, threads=1)
        expected = session.run(["probabilities"], {"tiles": pixels[None]})[0][0]
        answer = json.loads(running.ask(running.server.wrap(tile)).body)
        answered = list((answer[0] if isinstance(answer, list) else answer)["probabilities"].values())
        if not np.allclose(answered, expected, atol=TOLERANCE):
            raise ValueError(f"{running.server.title} answers {answered}, the graph itself {expected.tolist()}")

    def overwhelm(self, server: Server) -> list[Sample]:
        """Twice its own peak, open loop; then one damaged image in eight."""
        peak_per_s = find_peak(read_samples(self.results), server.name)
        bodies = [server.wrap(tile) for tile in self.tiles["jpeg"]]
        bad = server.wrap(cut_short(self.tiles["jpeg"][0]))
        with self.started(server) as running:
            load.drive(running.address, bodies, MIX_CONNECTIONS, WARM_UP_S)
            mixture = overload.mix(running.port, server.path, bodies, bad, MIX_CONNECTIONS, self.seconds)
            flood, _, other_cores = watch(
                lambda: overload.flood(running.port, server.path, bodies, OVERLOAD * peak_per_s, 2 * self.seconds),
                lambda: running.usage().cpu_s,
            )
        return [
            {"kind": "mixture", "server": server.name, **dataclasses.asdict(mixture)},
            {
                "kind": "flood",
                "server": server.name,
                "peak_per_s": peak_per_s,
                "goodput_per_s": flood.goodput_per_s,
                "other_cores": other_cores,
                **dataclasses.asdict(flood),
            },
        ]

    def grow(self, measure: growth.Measure) -> list[Sample]:
        return measure(partial(self.started, TISSUE), self.tiles["jpeg"], self.seconds)

    def started(self, server: Server, **settings: str) -> growth.Start:
        return run_server(server, self.tiles["jpeg"][0], LOGS / f"{server.name}.log", self.artifact, **settings)


def drive(running: Running, bodies: Sequence[Body], connections: int, seconds: float) -> tuple[load.Load, float, float]:
    """After a warm-up that doesn't count; gives what `watch` gives."""
    load.drive(running.address, bodies, connections, WARM_UP_S)
    return watch(lambda: load.drive(running.address, bodies, connections, seconds), lambda: running.usage().cpu_s)


def watch(work: Callable[[], T], count_server_s: Callable[[], float] = lambda: 0.0) -> tuple[T, float, float]:
    """What `work` returns, the server's CPU seconds during it, and how many cores other programs kept busy meanwhile.

    On a virtual machine its neighbours on the host are among those.
    """
    server_s, others_s, started = count_server_s(), count_busy_s() - count_own_s(), time.monotonic()
    returned = work()
    server_s = count_server_s() - server_s
    others_s = count_busy_s() - count_own_s() - others_s - server_s
    return returned, server_s, max(0.0, others_s / (time.monotonic() - started))


def count_busy_s() -> float:
    """Of all cores since the machine started."""
    times = psutil.cpu_times()._asdict()
    counted_twice = ("guest", "guest_nice")  # within user and nice
    return float(sum(value for name, value in times.items() if name not in ("idle", "iowait", *counted_twice)))


def count_own_s() -> float:
    """Of this process and the load generators that it has waited for."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def find_peak(samples: Iterable[Sample], server: str) -> float:
    by_connections: dict[int, list[float]] = {}
    for sample in samples:
        if sample["kind"] == "load" and sample["server"] == server and sample["form"] == "jpeg":
            by_connections.setdefault(sample["connections"], []).append(sample["good_per_s"])
    return max(median(values) for values in by_connections.values())


def read_samples(results: Path) -> list[Sample]:
    """A last line may have been cut by a kill or a full disk: its whole step is left out, and so measured anew."""
    samples: list[Sample] = []
    lines = results.read_text().splitlines(keepends=True) if results.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ValueError(
                    f"line {number} of {results} is damaged ({error}), expected JSON: take it and the other lines of "
                    "its step out, and that is measured anew"
                ) from error
            return drop_steps(samples, {sample["step"] for sample in samples[-1:]})
    return samples


def drop_steps(samples: Iterable[Sample], steps: Iterable[str]) -> list[Sample]:
    return [sample for sample in samples if sample["step"] not in steps]


def write_samples(results: Path, samples: Iterable[Sample]) -> None:
    """All or nothing, so that no step is ever there in part."""
    results.parent.mkdir(parents=True, exist_ok=True)
    unfinished = results.with_suffix(".part")
    unfinished.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    unfinished.replace(results)


def carry_out(
    comparison: Comparison, limit_s: float = math.inf, announce: Callable[[str], None] = lambda text: None
) -> bool:
    """Carries out the steps that are not in the results yet and tells whether all are done.

    No step starts after `limit_s`.
    """
    started_at = time.monotonic()
    comparison.check_conditions()
    samples = read_samples(comparison.results)
    done = {sample["step"] for sample in samples}
    for step in comparison.steps():
        if step.name in done:
            continue
        if time.monotonic() - started_at > limit_s:
            return False
        announce(step.name)
        samples += [{"step": step.name} | rounded(sample) for sample in step.run()]
        write_samples(comparison.results, samples)
    return True


def drop_disturbed(results: Path, most_other_cores: float) -> list[str]:
    """Takes those steps out of the results, to be repeated, during which other programs took more cores than that."""
    samples = read_samples(results)
    dropped = sorted({one["step"] for one in samples if one.get("other_cores", 0.0) > most_other_cores})
    if dropped:
        write_samples(results, drop_steps(samples, dropped))
    return dropped


def rounded(sample: Sample) -> Sample:
    """To five digits: repetitions agree on fewer."""
    return {name: round_value(value) for name, value in sample.items()}


def round_value(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: round_value(inner) for name, inner in value.items()}
    return value
