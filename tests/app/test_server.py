"""The real process behind real sockets: under load, in a hurry, and on its way out."""

import asyncio
import json
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse

import httpx
import pytest

from app.server import bind, is_loopback
from app.settings import Settings
from tests.app import conftest
from tests.app.conftest import PATIENCE_S, Process, start
from tests.app.sockets import connect, request_head

IMAGE = {"Content-Type": "image/png"}
# A hundred calls of the explain graph: long enough to be caught in the middle.
SLOW = "/attention?method=occlusion&masks=100&format=npy"


def post(process: Process, path: str, image: bytes, **options) -> httpx.Response:
    return httpx.post(process.url + path, content=image, headers=IMAGE, timeout=PATIENCE_S, **options)


def post_at_once(process: Process, path: str, images: list[bytes]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(images)) as pool:
        return list(pool.map(lambda image: post(process, path, image), images))


def read_answer(response: httpx.Response) -> object:
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_same_bytes_same_answer_whatever_else_is_in_the_queue(tiny_artifact, pictures, precision):
    with start(artifact=tiny_artifact, precision=precision) as process:
        for path in ("/predict", "/attention?method=evidence", "/attention?method=rollout"):
            alone = [read_answer(post(process, path, picture)) for picture in pictures]
            crowd = post_at_once(process, path, pictures * 6)
            assert [read_answer(response) for response in crowd] == alone * 6


def test_seven_good_ones_and_a_bad_one(server, pictures):
    alone = {picture: post(server, "/predict", picture).json() for picture in pictures}
    for _ in range(5):
        images = [pictures[n % len(pictures)] for n in range(7)] + [pictures[0][:2000]]
        *good, bad = post_at_once(server, "/predict", images)
        assert [response.json() for response in good] == [alone[image] for image in images[:7]]
        assert (bad.status_code, bad.json()["code"]) == (422, "undecodable_image")


def test_a_full_queue_answers_503_and_recovers(tiny_artifact, png):
    with start(artifact=tiny_artifact, max_queue=1, infer_threads=1, decode_threads=1) as process:
        statuses: Counter[int] = Counter()
        for response in post_at_once(process, SLOW, [png] * 16):
            statuses[response.status_code] += 1
            if response.status_code == 503:
                assert response.json()["code"] == "queue_full"
                assert 1 <= int(response.headers["retry-after"]) <= 60
        assert set(statuses) == {200, 503}
        assert post(process, "/predict", png).status_code == 200


def test_the_deadline_answers_504(tiny_artifact, png):
    with start(artifact=tiny_artifact, deadline_ms=1) as process:
        response = post(process, SLOW, png)
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        items = httpx.post(
            f"{process.url}/predict/batch?tta=true", files=[("files", ("x.png", png))] * 20, timeout=PATIENCE_S
        ).json()
        assert {item["error"]["code"] for item in items if "error" in item} == {"deadline_exceeded"}


def test_who_hangs_up_costs_no_more_calls(tiny_artifact, png):
    with start(artifact=tiny_artifact, infer_threads=1, max_queue=1000) as process:
        for _ in range(5):
            with connect(process) as connection:
                connection.sendall(request_head(SLOW, f"Content-Length: {len(png)}") + png)
        deadline = time.monotonic() + PATIENCE_S
        while process.read_metric('tissue_problems_total{code="client_hung_up"}') < 5:
            assert time.monotonic() < deadline
        assert process.read_metric("tissue_queue_tiles") == 0
        assert process.read_metric("tissue_model_call_tiles_sum") < 5 * 101 / 2
        assert post(process, "/predict", png).status_code == 200


def test_a_body_without_end_is_cut_off(tiny_artifact):
    with start(artifact=tiny_artifact, max_body_mib=0.5) as process, connect(process) as connection:
        connection.sendall(request_head("/predict", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(9):
            connection.sendall(chunk)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


def test_a_client_that_waits_for_100_continue_is_spared_the_upload(tiny_artifact, png):
    with start(artifact=tiny_artifact, max_body_mib=0.5) as process:
        with connect(process) as connection:
            connection.sendall(request_head("/predict", f"Content-Length: {len(png)}", "Expect: 100-continue"))
            assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(png)
            head = connection.recv(1 << 16)
            assert head.startswith(b"HTTP/1.1 200") and b"connection: close" not in head
        with connect(process) as connection:
            connection.sendall(request_head("/predict", "Content-Length: 1000000", "Expect: 100-continue"))
            refusal = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # to the end of the connection
            # Left open, it would take the next request for the body that never comes.
            assert refusal.startswith(b"HTTP/1.1 413") and b"\r\nconnection: close\r\n" in refusal


def test_keys_on_the_wire(tiny_artifact, png):
    with start(artifact=tiny_artifact, api_keys="one,two") as process:
        assert post(process, "/predict", png).status_code == 401
        assert post(process, "/predict?", png).status_code == 401
        with_key = httpx.post(f"{process.url}/predict", content=png, headers=IMAGE | {"X-API-Key": "two"})
        assert with_key.status_code == 200
        assert httpx.get(f"{process.url}/docs").status_code == 200


def test_sigterm_under_load_loses_no_request(tiny_artifact, png):
    async def client(process: Process, statuses: Counter[int]) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            while True:  # until it is told to go away, as a client that obeys Retry-After
                response = await http.post(f"{process.url}/predict", content=png, headers=IMAGE)
                statuses[response.status_code] += 1
                if response.status_code != 200:
                    assert response.json()["code"] == "shutting_down"
                    assert response.headers["connection"] == "close" and response.headers["retry-after"]
                    return

    async def scenario(process: Process) -> Counter[int]:
        statuses: Counter[int] = Counter()
        clients = [asyncio.create_task(client(process, statuses)) for _ in range(32)]
        while statuses[200] < 64:
            await asyncio.sleep(0.01)
        process.send(signal.SIGTERM)
        await asyncio.gather(*clients)  # a lost request is an exception here
        return statuses

    with start(artifact=tiny_artifact, drain_ms=1500) as process:
        statuses = asyncio.run(scenario(process))
        assert statuses[503] == 32 and set(statuses) == {200, 503}
        assert process.wait() == 0


def test_sigterm_turns_readiness_off_while_it_still_listens_and_finishes_what_is_in_hand(tiny_artifact, png):
    def post_until_refused(process: Process) -> set[int]:
        statuses: set[int] = set()
        while 503 not in statuses:
            statuses.add(post(process, SLOW, png).status_code)
        return statuses

    with (
        start(artifact=tiny_artifact, drain_ms=1500, max_queue=1000) as process,
        ThreadPoolExecutor(4) as pool,
        connect(process) as upload,
    ):
        upload.sendall(request_head("/predict", f"Content-Length: {len(png)}") + png[:100])
        clients = [pool.submit(post_until_refused, process) for _ in range(4)]
        process.wait_for("request", count=8)  # by when the upload has been let in
        process.send(signal.SIGTERM)
        process.wait_for("stopping")
        upload.sendall(png[100:])
        with HTTPResponse(upload) as answer:
            answer.begin()
            assert answer.status == 200
        ready, alive = (httpx.get(f"{process.url}/{probe}", timeout=PATIENCE_S) for probe in ("readyz", "healthz"))
        assert (ready.status_code, alive.status_code) == (503, 200)
        assert [client.result() for client in clients] == [{200, 503}] * 4
        assert process.wait() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{process.url}/healthz")


def test_ctrl_c_ends_without_waiting(tiny_artifact):
    with start(artifact=tiny_artifact, drain_ms=60_000) as process:
        process.send(signal.SIGINT)
        assert process.wait() == 0


def test_a_second_signal_ends_at_once(tiny_artifact):
    with start(artifact=tiny_artifact, drain_ms=60_000) as process:
        process.send(signal.SIGTERM)
        process.wait_for("stopping")
        process.send(signal.SIGTERM)
        assert process.wait() == 1


# Sends itself a signal in the middle of writing a line.
SERVE_AND_SIGNAL = """
import io, os, signal, sys
from app.server import serve
from app.settings import Settings

class Stderr(io.RawIOBase):
    def writable(self):
        return True

    def write(self, line):
        if b"EVENT" in bytes(line):
            signal.raise_signal(signal.SIGTERM)
        return os.write(2, line)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Stderr()), line_buffering=True)
serve(Settings())
"""


def test_a_second_signal_ends_at_once_while_the_first_is_being_logged(tiny_artifact, monkeypatch):
    monkeypatch.setattr(conftest, "SERVE", SERVE_AND_SIGNAL.replace("EVENT", "stopping"))
    with start(artifact=tiny_artifact, drain_ms=60_000) as process:
        process.send(signal.SIGTERM)
        assert process.wait() == 1


def test_a_signal_amid_a_log_line_ends_in_order(tiny_artifact, monkeypatch):
    monkeypatch.setattr(conftest, "SERVE", SERVE_AND_SIGNAL.replace("EVENT", "ready"))
    with start(artifact=tiny_artifact, drain_ms=0) as process:
        assert process.wait() == 0
        assert process.find("stopping")


def test_a_damaged_artefact_is_refused(tiny_artifact, tmp_path):
    for file in tiny_artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    process = Process(artifact=tmp_path)
    assert process.wait() == 1
    assert any("CorruptArtifact" in event["event"] for event in process.events)
    assert process.process.stderr is not None
    process.process.stderr.close()


def test_listening_to_the_network_without_keys_is_warned_about(tiny_artifact):
    text = "anybody on the network may use this service: set TISSUE_API_KEYS, or TISSUE_HOST=127.0.0.1"
    with start(artifact=tiny_artifact, host="0.0.0.0") as process:
        assert process.find(text)
    with start(artifact=tiny_artifact, host="0.0.0.0", api_keys="key") as process:
        assert not process.find(text)


def test_a_port_that_is_taken_is_named(server, caplog):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(SystemExit):
        bind(Settings(port=port))
    assert vars(caplog.records[-1])["port"] == port


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)]
)
def test_which_hosts_are_this_machine_alone(host, expected):
    assert is_loopback(host) is expected


def test_an_upload_that_never_ends_is_told_of_the_end(tiny_artifact):
    with start(artifact=tiny_artifact, deadline_ms=500, drain_ms=0) as process, connect(process) as connection:
        connection.sendall(request_head("/predict", "Content-Length: 1000") + b"half")
        assert httpx.get(process.url + "/healthz").status_code == 200
        process.send(signal.SIGTERM)
        with HTTPResponse(connection) as answer:
            answer.begin()
            assert answer.status == 503 and json.loads(answer.read())["code"] == "shutting_down"
        assert process.wait() == 0
        assert [entry["status"] for entry in process.find("request")] == [503]
