"""The servers of the comparison: how each is installed, started, asked, watched and stopped."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.tiles import Tile
from model.artifact import Manifest, read_manifest

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
BENCH = ROOT / "runs" / "bench"
LOGS = BENCH / "log"
VENVS = BENCH / "venv"
ARTIFACT = ROOT / "model" / "default"

START_LIMIT_S = 120
STOP_LIMIT_S = 15
WATCH_EVERY_S = 1.0  # a look at the process table costs milliseconds of the cores that are measured
BOUNDARY = "tile-boundary"


class Body(NamedTuple):
    content_type: str
    data: bytes


def as_body(tile: Tile) -> Body:
    return Body(tile.content_type, tile.data)


@dataclass(frozen=True)
class Server:
    name: str
    title: str
    command: tuple[str, ...]  # {port} is filled in
    venv: str | None = None  # None: this very environment
    path: str = "/predict"
    wrap: Callable[[Tile], Body] = as_body
    environ: tuple[tuple[str, str], ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.venv is None

    @property
    def python(self) -> Path:
        return VENVS / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    @property
    def is_installed(self) -> bool:
        return self.venv is None or find_stamp(self.venv).exists()


def as_base64_json(tile: Tile) -> Body:
    return Body("application/json", json.dumps({"image": base64.b64encode(tile.data).decode()}).encode())


def as_form(tile: Tile) -> Body:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="tile"\r\n'
        f"Content-Type: {tile.content_type}\r\n\r\n"
    )
    return Body(
        f"multipart/form-data; boundary={BOUNDARY}", head.encode() + tile.data + f"\r\n--{BOUNDARY}--\r\n".encode()
    )


SERVE = ("-m", "app", "serve", "--port", "{port}")


def uvicorn(module: str) -> tuple[str, ...]:
    return ("-m", "uvicorn", f"benchmarks.peers.{module}:app", "--port", "{port}")


TISSUE = Server("tissue", "tissue", SERVE)
SERVERS = (
    TISSUE,
    Server("tissue_int8", "tissue, int8", SERVE, environ=(("TISSUE_PRECISION", "int8"),)),
    Server("fastapi_def", "FastAPI, def", uvicorn("fastapi_def"), "fastapi", environ=(("BENCH_INTRA_THREADS", "0"),)),
    Server(
        "fastapi_def_1",
        "FastAPI, def, one thread a call",
        uvicorn("fastapi_def"),
        "fastapi",
        environ=(("BENCH_INTRA_THREADS", "1"),),
    ),
    Server("fastapi_async", "FastAPI, async def", uvicorn("fastapi_async"), "fastapi"),
    Server("litserve", "LitServe", ("-m", "benchmarks.peers.lit"), "litserve", wrap=as_base64_json),
    Server(
        "mosec",
        "mosec",
        ("-m", "benchmarks.peers.mosec_stages", "--address", "127.0.0.1", "--port", "{port}"),
        "mosec",
        path="/inference",
    ),
    Server(
        "bentoml",
        "BentoML",
        ("-m", "bentoml", "serve", "benchmarks.peers.bento:Tissue", "--host", "127.0.0.1", "--port", "{port}"),
        "bentoml",
        wrap=as_form,
    ),
    Server(
        "ray",
        "Ray Serve",
        ("-m", "benchmarks.peers.ray_serve"),
        "ray",
        environ=(("RAY_worker_niceness", "0"),),  # else its workers would give way to all other programs
    ),
)


def pick_servers(skipped: set[str]) -> list[Server]:
    known = {server.name for server in SERVERS}
    if unknown := skipped - known:
        raise ValueError(f"no server is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return [server for server in SERVERS if server.name not in skipped]


def install(venv: str, onnxruntime_version: str) -> None:
    """An environment of its own, since a peer's pins may conflict with ours; ONNX Runtime in our version."""
    subprocess.run([sys.executable, "-m", "venv", str(VENVS / venv)], check=True)  # completes a half-made one
    requirements = ["-r", str(PEERS / f"{venv}.txt"), f"onnxruntime=={onnxruntime_version}"]
    python = VENVS / venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    find_stamp(venv).touch()


def find_stamp(venv: str) -> Path:
    """What is there once everything is installed."""
    return VENVS / venv / "installed.stamp"


def list_versions(server: Server, packages: list[str]) -> dict[str, str]:
    code = (
        "import json, sys; from importlib.metadata import distributions\n"
        "found = {d.metadata['Name'].lower(): d.version for d in distributions()}\n"
        f"print(json.dumps({{name: found[name] for name in {packages!r} if name in found}}))"
    )
    done = subprocess.run([server.python, "-c", code], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


class Usage(NamedTuple):
    cpu_s: float
    rss_bytes: int


class Response(NamedTuple):
    status: int  # 0 where nobody listens yet
    body: bytes


class Running:
    """A started server and the whole tree of its processes."""

    def __init__(self, server: Server, process: subprocess.Popen[bytes], port: int) -> None:
        self.server = server
        self.port = port
        self.start_s = 0.0
        self.peak_rss_bytes = 0
        self._process = process
        self._root = psutil.Process(process.pid)
        self._seen: dict[int, psutil.Process] = {process.pid: self._root}
        self._cpu_s: dict[int, float] = {}  # by process, so that those that have ended still count
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.server.path}"

    @property
    def peak_rss_mib(self) -> float:
        return self.peak_rss_bytes / 2**20

    def usage(self) -> Usage:
        """Pages that processes share count once for each of them."""
        rss_bytes = 0
        for process in [self._root, *self._children()]:
            self._seen.setdefault(process.pid, process)
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self._cpu_s[process.pid] = times.user + times.system
                    rss_bytes += process.memory_info().rss
            except psutil.Error:  # it has just ended
                continue
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)
        return Usage(sum(self._cpu_s.values()), rss_bytes)

    def measure_idle(self, seconds: float) -> float:
        """The share of one core that it takes while nobody asks."""
        before = self.usage().cpu_s
        time.sleep(seconds)
        return (self.usage().cpu_s - before) / seconds

    def wait_until_it_answers(self, body: Body, started_at: float) -> None:
        while time.monotonic() - started_at < START_LIMIT_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.server.title} ended with status {self._process.returncode}; see its log")
            if self.ask(body).status == 200:
                self.start_s = time.monotonic() - started_at
                self._watcher.start()
                return
            time.sleep(0.02)
        raise RuntimeError(f"{self.server.title} answered nothing in {START_LIMIT_S} s; see its log")

    def ask(self, body: Body) -> Response:
        """Once, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_LIMIT_S)
        try:
            connection.request("POST", self.server.path, body.data, {"Content-Type": body.content_type})
            response = connection.getresponse()
            return Response(response.status, response.read())
        except (OSError, http.client.HTTPException):
            return Response(0, b"")
        finally:
            connection.close()

    def stop(self) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self.usage()  # notes processes that are about to lose their parent: afterwards they couldn't be found
        self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=STOP_LIMIT_S)
        for process in alive:  # some peers leave workers behind
            process.kill()
        psutil.wait_procs(alive, timeout=STOP_LIMIT_S)
        self._process.wait()

    def _children(self) -> list[psutil.Process]:
        try:
            return list(self._root.children(recursive=True))
        except psutil.Error:
            return []

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_EVERY_S):
            self.usage()


@contextmanager
def run_server(server: Server, tile: Tile, log: Path, artifact: Path = ARTIFACT, **settings: str) -> Iterator[Running]:
    """Started, has answered `tile` once; stopped afterwards. `settings` are environment variables of ours."""
    port = free_port()
    environ = make_environ(server, artifact, read_manifest(artifact), port) | settings
    command = [str(server.python), *(part.format(port=port) for part in server.command)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        started_at = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True)
        running = Running(server, process, port)
        try:
            running.wait_until_it_answers(server.wrap(tile), started_at)
            yield running
        finally:
            running.stop()


def make_environ(server: Server, artifact: Path, manifest: Manifest, port: int) -> dict[str, str]:
    of_the_shell = ("OMP_NUM_THREADS", "TISSUE_")  # would change what is measured
    environ = {name: value for name, value in os.environ.items() if not name.startswith(of_the_shell)}
    return environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TISSUE_ARTIFACT": str(artifact),
        "BENCH_MODEL": str(artifact / manifest.file("predict", "fp32").path),
        "BENCH_TILE_PX": str(manifest.tile_px),
        "BENCH_CLASSES": json.dumps([one.name for one in manifest.classes]),
        "BENCH_PORT": str(port),
        # no server reports to its maker while it is measured
        "ORT_DISABLE_TELEMETRY": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
        **dict(server.environ),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
