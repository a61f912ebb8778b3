import base64
import json
import shutil
import subprocess
import zipfile
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load, servers
from benchmarks.overload import mix
from benchmarks.servers import (
    PEERS,
    SERVERS,
    TISSUE,
    Server,
    as_base64_json,
    as_form,
    install,
    list_versions,
    make_environ,
    pick_servers,
    run_server,
)
from benchmarks.tiles import Tile, cut_short, load_tiles
from model.artifact import read_manifest

TILE = Tile(b"\xff\xd8 pixels", "image/jpeg")


def test_a_form_carries_the_very_bytes():
    content_type, data = as_form(TILE)
    message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + data)
    parts: Any = message.get_payload()
    (part,) = parts
    assert part.get_payload(decode=True) == TILE.data
    assert part.get_param("name", header="content-disposition") == "image"


def test_base64_carries_the_very_bytes():
    assert base64.b64decode(json.loads(as_base64_json(TILE).data)["image"]) == TILE.data


def test_every_peer_says_what_it_installs_and_its_code_compiles():
    for server in SERVERS:
        if server.venv is not None:
            assert "onnxruntime" in (PEERS / f"{server.venv}.txt").read_text().split()
    for path in PEERS.glob("*.py"):
        compile(path.read_text(), path, "exec")


def test_versions_are_those_of_the_servers_own_environment():
    assert list(list_versions(TISSUE, ["numpy", "no-such-package"])) == ["numpy"]


def test_an_environment_is_there_once_all_is_installed_and_no_sooner(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "VENVS", tmp_path / "venv")
    monkeypatch.setattr(servers, "PEERS", tmp_path)
    (tmp_path / "peer.txt").write_text(f"--no-index\n--find-links {tmp_path}\nonnxruntime\n")
    peer = Server("peer", "peer", (), "peer")
    with pytest.raises(subprocess.CalledProcessError):
        install("peer", "0.1")
    assert peer.python.exists() and not peer.is_installed
    with zipfile.ZipFile(tmp_path / "onnxruntime-0.1-py3-none-any.whl", "w") as wheel:
        facts = "onnxruntime-0.1.dist-info"
        wheel.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: onnxruntime\nVersion: 0.1\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
    install("peer", "0.1")
    assert peer.is_installed and list_versions(peer, ["onnxruntime"]) == {"onnxruntime": "0.1"}


def test_left_out_servers_must_be_known():
    assert "ray" not in {server.name for server in pick_servers({"ray"})}
    with pytest.raises(ValueError, match="no server is called rai"):
        pick_servers({"rai"})


def test_a_server_that_ends_at_once_is_told(tmp_path):
    broken = Server("broken", "broken", ("-c", "raise SystemExit(7)"))
    with pytest.raises(RuntimeError, match="ended with status 7"), run_server(broken, TILE, tmp_path / "log"):
        pass


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")
def test_our_own_server_is_started_measured_and_stopped(tiny_artifact, tmp_path):
    tiles = load_tiles("jpeg", side_px=150)
    bodies = [TISSUE.wrap(tile) for tile in tiles]
    with run_server(TISSUE, tiles[0], tmp_path / "log", tiny_artifact) as running:
        before = running.usage()
        found = load.drive(running.address, bodies, 8, 1)
        mixture = mix(running.port, "/predict", bodies, TISSUE.wrap(cut_short(tiles[0])), 8, 0.3)
        used = running.usage().cpu_s - before.cpu_s
        process = running._process
    assert found.requests > 10 and found.errors == 0
    assert 0 < found.p50_ms <= found.p99_ms <= found.max_ms
    assert 0.05 < used < 60
    assert running.start_s > 0.1 and running.peak_rss_bytes > 50e6
    assert mixture.good_sent > 7 and mixture.good_failed == 0 and set(mixture.bad_statuses) == {"422"}
    assert process.poll() == 0


def test_the_shells_settings_do_not_reach_a_server(monkeypatch, tiny_artifact):
    monkeypatch.setenv("TISSUE_MAX_QUEUE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environ = make_environ(TISSUE, tiny_artifact, read_manifest(tiny_artifact), 1)
    assert "TISSUE_MAX_QUEUE" not in environ and "OMP_NUM_THREADS" not in environ
    assert Path(environ["BENCH_MODEL"]).exists()
