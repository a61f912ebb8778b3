"""Threads beside the model's that read and draw pictures.

Large pictures wait behind each other alone, and what waits is counted in time, as what waits for the model is: a crowd
of them is told so at once, and not when all the work was done in vain.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from app.batcher import QueueFull
from app.memory import give_back_from_within
from app.samples import SMALL_BYTES

T = TypeVar("T")

QUIET_S = 1.0  # so long after the last large picture its request is answered, and what it took is free
_OLDER_WEIGHT = 0.9  # of all before, when another large picture has been read


class Decoders:
    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._small = ThreadPoolExecutor(threads, "decode")
        self._large = ThreadPoolExecutor(threads, "decode-large")
        self._loop = asyncio.get_running_loop()
        self._pictures = 0  # large ones that wait or are being read; this and what follows: only the event loop writes
        self._bytes = 0  # in them
        self._tidying: asyncio.TimerHandle | None = None
        self._closed = False
        self._known_bytes = self._known_s = 0.0  # in those of late, and what reading them took

    def check_room(self, size: int, patience_s: float) -> None:
        backlog_s = self._bytes * self._known_s / max(1.0, self._known_bytes) / self._threads
        if size > SMALL_BYTES and backlog_s > patience_s:
            raise QueueFull(f"{self._pictures} large pictures", backlog_s)

    async def run(self, work: Callable[[], T], size: int = 0) -> T:
        """`size` is that of the picture's file; to draw one takes next to nothing."""
        if size <= SMALL_BYTES:
            return await self._loop.run_in_executor(self._small, work)
        taken_s: list[float] = []

        def do_timed() -> T:
            started_at = time.monotonic()
            try:
                return work()
            finally:
                taken_s.append(time.monotonic() - started_at)

        def settle(future: Future[T]) -> None:
            self._loop.call_soon_threadsafe(self._note, size, sum(taken_s))

        self._pictures += 1
        self._bytes += size
        future = self._large.submit(do_timed)
        future.add_done_callback(settle)  # also of one whose sender has gone, which keeps its thread until it is read
        return await asyncio.wrap_future(future)

    def _note(self, size: int, taken_s: float) -> None:
        self._pictures -= 1
        self._bytes -= size
        if taken_s:
            self._known_bytes = _OLDER_WEIGHT * self._known_bytes + size
            self._known_s = _OLDER_WEIGHT * self._known_s + taken_s
        self._stop_tidying()
        if not self._pictures and not self._closed:
            self._tidying = self._loop.call_later(QUIET_S, self._small.submit, give_back_from_within)

    def _stop_tidying(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()

    def close(self) -> None:
        self._closed = True  # what is still being read is noted once the pools have ended
        self._stop_tidying()
        for pool in (self._small, self._large):
            pool.shutdown(cancel_futures=True)
