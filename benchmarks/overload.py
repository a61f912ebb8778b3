"""Open loop: requests come when they come, whether the server keeps up or not; and a loop with damaged images in it.

No compiled load generator in common use is open loop and also tells latencies apart by status. So this one is Python,
with bytes made beforehand and a protocol of a few lines on uvloop; its own CPU time is part of the result.
"""

import asyncio
import contextlib
import itertools
import random
import resource
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import uvloop

from benchmarks.servers import Body

T = TypeVar("T")

PATIENCE_S = 5.0
SEED = 5
REFUSALS = (429, 503)
CUT, UNANSWERED = 0, -1  # in place of a status
NAMES = {CUT: "cut", UNANSWERED: "unanswered"}


@dataclass(frozen=True)
class Flood:
    offered_per_s: float
    seconds: float
    sent: int
    good: int  # 200 within PATIENCE_S
    good_in_window: int  # of them, those that came while requests were still being sent
    good_within_1_s: int
    refused: int  # 429 or 503
    others: dict[str, int]  # how often each other status; `cut`, or `unanswered` within PATIENCE_S
    p50_ms: float  # of the good
    p99_ms: float
    refusal_p99_ms: float
    generator_cpu_s: float

    @property
    def goodput_per_s(self) -> float:
        return self.good_in_window / self.seconds


@dataclass(frozen=True)
class Mixture:
    good_sent: int
    good_failed: int
    bad_sent: int
    bad_statuses: dict[str, int]


class Exchange(asyncio.Protocol):
    """One connection, one request at a time; the answer is its status."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None
        self._received = b""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> int:
        assert self._transport is not None
        self._received = b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:  # cut, or nobody waits any more: a late answer must not be taken for the next one's
            self.close()
            raise

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has a class of its own

    def data_received(self, data: bytes) -> None:
        self._received += data
        status = read_status(self._received)
        if status is not None and self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed before the answer"))


def read_status(received: bytes) -> int | None:
    """The status of a response that is there as a whole; None while some of it is missing."""
    head, blank_line, body = received.partition(b"\r\n\r\n")
    if not blank_line:
        return None
    lowered = head.lower()
    if b"\r\ntransfer-encoding: chunked" in lowered:
        is_whole = body.endswith(b"0\r\n\r\n")
    else:
        length = lowered.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        is_whole = len(body) >= int(length or 0)
    return int(head[9:12]) if is_whole else None


def encode_request(path: str, body: Body) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {body.content_type}\r\n"
    return f"{head}Content-Length: {len(body.data)}\r\n\r\n".encode() + body.data


def flood(port: int, path: str, bodies: Sequence[Body], per_s: float, seconds: float) -> Flood:
    return run_on_uvloop(send_as_they_come(port, [encode_request(path, body) for body in bodies], per_s, seconds))


def mix(port: int, path: str, good: Sequence[Body], bad: Body, connections: int, seconds: float) -> Mixture:
    """Closed loop with one damaged image in eight."""
    requests = [encode_request(path, body) for body in good]
    return run_on_uvloop(send_mixed(port, requests, encode_request(path, bad), connections, seconds))


def run_on_uvloop(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def send_as_they_come(port: int, requests: Sequence[bytes], per_s: float, seconds: float) -> Flood:
    idle: list[Exchange] = []
    answers: list[tuple[int, float, float]] = []  # status, seconds, when it came

    async def ask(request: bytes, due: float) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                status, exchange = await ask_on(take_open(idle), port, request)
            idle.append(exchange)
        except TimeoutError:
            status = UNANSWERED
        except OSError:
            status = CUT
        now = time.perf_counter()
        answers.append((status, now - due, now))

    cpu_before_s = cpu_seconds()
    started = time.perf_counter()
    tasks = set()
    source = itertools.cycle(requests)
    for after_s in arrivals(per_s, seconds):
        due = started + after_s
        while (early_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(early_s)
        tasks.add(asyncio.create_task(ask(next(source), due)))
    window_end = started + seconds
    await asyncio.gather(*tasks)
    for exchange in idle:
        exchange.close()
    return summarise(answers, per_s, seconds, window_end, cpu_seconds() - cpu_before_s)


async def ask_on(exchange: Exchange | None, port: int, request: bytes) -> tuple[int, Exchange]:
    """On an open connection or a new one.

    A server may close an idle connection while a request is on its way, as some do after an error: clients then ask
    again on another.
    """
    if exchange is not None:
        with contextlib.suppress(OSError):
            return await exchange.ask(request), exchange
    _, fresh = await asyncio.get_running_loop().create_connection(Exchange, "127.0.0.1", port)
    return await fresh.ask(request), fresh


def take_open(idle: list[Exchange]) -> Exchange | None:
    """The connection that was used last; None where the server has closed all."""
    while idle:
        exchange = idle.pop()
        if exchange.is_open:
            return exchange
    return None


def arrivals(per_s: float, seconds: float) -> Iterator[float]:
    """Seconds after the start: a Poisson process, the same in every run."""
    random_gaps = random.Random(SEED)
    at = random_gaps.expovariate(per_s)
    while at < seconds:
        yield at
        at += random_gaps.expovariate(per_s)


def summarise(
    answers: Sequence[tuple[int, float, float]], per_s: float, seconds: float, window_end: float, cpu_s: float
) -> Flood:
    good = [(took_s, came) for status, took_s, came in answers if status == 200]
    refused = [took_s for status, took_s, _ in answers if status in REFUSALS]
    took_ms = [1e3 * took_s for took_s, _ in good]
    others = Counter(NAMES.get(status, str(status)) for status, _, _ in answers if status not in (200, *REFUSALS))
    return Flood(
        offered_per_s=per_s,
        seconds=seconds,
        sent=len(answers),
        good=len(good),
        good_in_window=sum(came <= window_end for _, came in good),
        good_within_1_s=sum(took_s <= 1 for took_s, _ in good),
        refused=len(refused),
        others=dict(sorted(others.items())),
        p50_ms=percentile(took_ms, 50),
        p99_ms=percentile(took_ms, 99),
        refusal_p99_ms=percentile([1e3 * took_s for took_s in refused], 99),
        generator_cpu_s=cpu_s,
    )


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else 0.0


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def send_mixed(port: int, good: Sequence[bytes], bad: bytes, connections: int, seconds: float) -> Mixture:
    ends = time.perf_counter() + seconds
    numbers = itertools.count()
    good_statuses: Counter[int] = Counter()
    bad_statuses: Counter[int] = Counter()

    async def keep_asking() -> None:
        exchange: Exchange | None = None
        while time.perf_counter() < ends:
            number = next(numbers)
            is_bad = number % 8 == 7
            request = bad if is_bad else good[number % len(good)]
            try:
                async with asyncio.timeout(PATIENCE_S):
                    status, exchange = await ask_on(exchange, port, request)
            except (TimeoutError, OSError):
                status, exchange = CUT, None
            (bad_statuses if is_bad else good_statuses)[status] += 1
        if exchange is not None:
            exchange.close()

    await asyncio.gather(*(keep_asking() for _ in range(connections)))
    return Mixture(
        good_sent=good_statuses.total(),
        good_failed=good_statuses.total() - good_statuses[200],
        bad_sent=bad_statuses.total(),
        bad_statuses={str(status): n for status, n in sorted(bad_statuses.items())},
    )
