"""Several processes on one port."""

import os
import signal
import socket
import time
from contextlib import ExitStack

import httpx
import psutil
import pytest

from app.server import bind
from app.settings import Settings
from app.workers import SPREADS
from tests.app.conftest import PATIENCE_S, Process, start


@pytest.fixture(scope="module")
def family(tiny_artifact):
    with start(ready=2, artifact=tiny_artifact, workers=2) as process:
        yield process


def post(process: Process, image: bytes) -> int:
    headers = {"Content-Type": "image/png"}
    return httpx.post(f"{process.url}/predict", content=image, headers=headers, timeout=PATIENCE_S).status_code


def list_workers(process: Process) -> list[int]:
    return [event["pid"] for event in process.find("ready")]


def test_metrics_add_up_over_all_workers(family, png):
    before = family.read_metric('tissue_requests_total{method="POST",route="/predict",status="200"}')
    for _ in range(20):
        assert post(family, png) == 200
    after = family.read_metric('tissue_requests_total{method="POST",route="/predict",status="200"}')
    assert after - before == 20


@pytest.mark.skipif(not SPREADS, reason="the workers share one socket here")
def test_connections_are_spread_over_the_workers(family):
    port = httpx.URL(family.url).port
    with ExitStack() as connections:
        for _ in range(64):
            connections.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
        assert httpx.get(family.url + "/healthz").status_code == 200
        held = [len(psutil.Process(pid).net_connections("tcp")) for pid in list_workers(family)]
    assert min(held) > 10  # of 64: chance gives fewer once in ten million times


def test_a_port_with_workers_is_refused_to_others(family):
    with pytest.raises(SystemExit):
        bind(Settings(port=httpx.URL(family.url).port))


def test_the_parent_only_watches(family):
    assert len(set(list_workers(family))) == 2
    assert family.process.pid not in list_workers(family)


def test_a_worker_that_is_killed_is_replaced_while_the_other_goes_on(family, png):
    victim = list_workers(family)[0]
    os.kill(victim, signal.SIGKILL)
    family.wait_for("a worker died and is replaced")
    assert post(family, png) == 200  # by the other
    family.wait_for("ready", count=3)
    assert all(post(family, png) == 200 for _ in range(10))
    assert family.read_metric("tissue_requests_in_progress") == 1  # nothing is left of the dead one


def test_sigterm_ends_all_with_status_0(tiny_artifact, png):
    with start(ready=2, artifact=tiny_artifact, workers=2) as process:
        workers = list_workers(process)
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]


def test_a_second_signal_kills_all_and_leaves_nothing(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with start(ready=2, artifact=tiny_artifact, workers=2, drain_ms=60_000) as process:
        process.send(signal.SIGTERM)
        process.wait_for("stopping", count=2)
        assert [path.name[:14] for path in tmp_path.iterdir()] == ["tissue-metrics"]
        process.send(signal.SIGTERM)
        assert process.wait() == 1
        assert not list(tmp_path.iterdir())


def test_workers_leave_when_their_parent_is_killed_and_leave_nothing(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with start(ready=2, artifact=tiny_artifact, workers=2) as process:
        workers = list_workers(process)
        process.send(signal.SIGKILL)
        process.process.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while any(os.path.exists(f"/proc/{pid}") for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not list(tmp_path.iterdir())


def test_workers_that_cannot_start_end_the_parent(tiny_artifact, tmp_path):
    process = Process(artifact=tmp_path, workers=2)
    assert process.wait() == 3
    assert "manifest.json" in process.find("can't start")[0]["cause"]
    assert process.process.stderr is not None
    process.process.stderr.close()
