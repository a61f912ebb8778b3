"""The service twice: inside the test, and as the real process that real sockets reach."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from app.main import create_app
from app.settings import Settings
from training.synthetic import draw_tile

ROOT = Path(__file__).parents[2]
SERVE = "from app.server import serve; from app.settings import Settings; serve(Settings())"
PATIENCE_S = 30


def encode(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png() -> bytes:
    return encode(draw_tile("Tumor", 7))


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Different tiles, as different bytes."""
    return [encode(draw_tile(kind, 3)) for kind in range(4)] + [encode(draw_tile(4, 3), "JPEG", quality=90)]


class Client:
    """The whole service in this process, without a socket; its event loop runs while a request does."""

    def __init__(self, app: FastAPI, runner: asyncio.Runner) -> None:
        self.app = app
        self._runner = runner
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._runner.run(self._http.request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def post_image(self, path: str, image: bytes, **options: Any) -> httpx.Response:
        headers = {"Content-Type": "image/png"} | options.pop("headers", {})
        return self.post(path, content=image, headers=headers, **options)


@pytest.fixture(scope="session")
def client(tiny_artifact) -> Iterator[Client]:
    with open_client(artifact=tiny_artifact) as client:
        yield client


@contextmanager
def open_client(**settings: Any) -> Iterator[Client]:
    app = create_app(Settings(**settings))
    with asyncio.Runner() as runner:
        lifespan = app.router.lifespan_context(app)
        runner.run(lifespan.__aenter__())
        try:
            yield Client(app, runner)
        finally:
            runner.run(lifespan.__aexit__(None, None, None))


class Process:
    """`tissue serve` as a process of its own, with its log lines as they come."""

    def __init__(self, **settings: object) -> None:
        variables = {f"TISSUE_{name.upper()}": str(value) for name, value in settings.items()}
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TISSUE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            cwd=ROOT,
            env=environ | {"TISSUE_PORT": "0", "TISSUE_LOG_FORMAT": "json", "TISSUE_DRAIN_MS": "300"} | variables,
            stderr=subprocess.PIPE,
        )
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = str(self.wait_for("starting")["address"])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                try:
                    self.events.append(json.loads(line))
                except ValueError:
                    self.events.append({"event": line.decode()})
                self._changed.notify_all()

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The `count`th event of this name."""
        with self._changed:
            found = self._changed.wait_for(lambda: len(self.find(event)) >= count, PATIENCE_S)
            assert found, f"no {event} after {PATIENCE_S} s: {self.events}"
            return self.find(event)[count - 1]

    def find(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events if entry["event"] == event]

    def send(self, sig: signal.Signals) -> None:
        self.process.send_signal(sig)

    def wait(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def read_metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@contextmanager
def start(ready: int = 1, **settings: object) -> Iterator[Process]:
    process = Process(**settings)
    try:
        process.wait_for("ready", ready)
        yield process
    finally:
        process.process.kill()
        process.wait()
        assert process.process.stderr is not None
        process.process.stderr.close()


@pytest.fixture(scope="session")
def server(tiny_artifact) -> Iterator[Process]:
    with start(artifact=tiny_artifact) as process:
        yield process
