import asyncio
import itertools
from threading import Event, Thread

import pytest

from benchmarks.overload import arrivals, encode_request, flood, mix, percentile, read_status, summarise
from benchmarks.servers import Body, free_port

GOOD, BAD = Body("image/jpeg", b"good"), Body("image/jpeg", b"bad")


@pytest.fixture
def picky_port():
    """Answers 200 to `good`, 422 to `bad`, and 503 with the body in a chunk to each tenth."""
    ready, stop = Event(), Event()
    ports: list[int] = []

    async def answer(reader, writer):
        numbers = itertools.count(1)
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            body = await reader.readexactly(length)
            if next(numbers) % 10 == 0:
                writer.write(b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n")
            else:
                status = b"200 OK" if body == b"good" else b"422 Bad"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async def serve():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await asyncio.to_thread(stop.wait)
        server.close()

    thread = Thread(target=asyncio.run, args=[serve()])
    thread.start()
    ready.wait()
    yield ports[0]
    stop.set()
    thread.join()


def test_a_flood_offers_what_it_says_and_tells_answers_apart(picky_port):
    found = flood(picky_port, "/predict", [GOOD], per_s=400, seconds=0.5)
    assert 150 < found.sent < 250
    assert found.good + found.refused == found.sent
    assert found.others == {}
    assert found.good_in_window <= found.good and 0 < found.p50_ms <= found.p99_ms
    assert found.generator_cpu_s > 0


def test_a_flood_counts_connections_that_nobody_takes_as_failed(unused_port):
    found = flood(unused_port, "/predict", [GOOD], per_s=200, seconds=0.1)
    assert found.others == {"cut": found.sent} and found.sent > 0 and found.goodput_per_s == 0


@pytest.fixture
def unused_port():
    return free_port()


def test_one_in_eight_is_damaged_and_only_the_good_that_failed_count(picky_port):
    found = mix(picky_port, "/predict", [GOOD], BAD, connections=1, seconds=0.2)
    total = found.good_sent + found.bad_sent
    assert found.bad_sent == total // 8 and total > 80
    assert found.good_failed == total // 10 - found.bad_statuses.get("503", 0)
    assert set(found.bad_statuses) <= {"422", "503"}


def test_arrivals_come_at_the_rate_and_are_the_same_each_time():
    found = list(arrivals(1000, 2))
    assert len(found) == pytest.approx(2000, rel=0.1) and found == sorted(found) == list(arrivals(1000, 2))


@pytest.mark.parametrize(
    ("received", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no", None),
        (b"HTTP/1.1 200 OK\r\ncontent-le", None),
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 0\r\n\r\n", 429),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200),
    ],
)
def test_an_answer_counts_when_it_is_whole(received, status):
    assert read_status(received) == status


def test_late_answers_are_good_but_no_goodput():
    answers = [(200, 0.1, 5.0), (200, 3.0, 12.0), (503, 0.01, 1.0), (500, 0.1, 2.0), (0, 0.1, 2.0), (-1, 5.0, 9.0)]
    found = summarise(answers, per_s=1, seconds=10, window_end=10.0, cpu_s=0.5)
    assert (found.sent, found.good, found.good_in_window, found.good_within_1_s) == (6, 2, 1, 1)
    assert found.refused == 1 and found.others == {"500": 1, "cut": 1, "unanswered": 1}
    assert found.goodput_per_s == 0.1


def test_a_request_says_how_long_it_is():
    assert encode_request("/predict", GOOD).endswith(b"Content-Length: 4\r\n\r\ngood")


def test_nothing_has_no_percentile():
    assert percentile([], 99) == 0 and percentile([1, 3], 50) == 2
