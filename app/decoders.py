"""Threads beside the model's that read and draw pictures.

Large pictures, of more pixels than a tile has, wait only for each other. What waits is counted in time, like what waits
for the model: where there are too many, one more is refused at once, and not after work that was in vain.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from app.batcher import QueueFull
from app.memory import give_back_from_within

T = TypeVar("T")

QUIET_S = 1.0  # after the last large picture, when its request is answered and the memory that it took is free
_OLDER_WEIGHT = 0.9  # of all earlier large pictures, each time that another has been read


class Decoders:
    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._small = ThreadPoolExecutor(threads, "decode")
        self._large = ThreadPoolExecutor(threads, "decode-large")
        self._loop = asyncio.get_running_loop()
        self._pictures = 0  # large ones that wait or are being read; only the event loop writes this and all below
        self._megapixels = 0.0  # of them
        self._tidying: asyncio.TimerHandle | None = None
        self._closed = False
        self._known_megapixels = self._known_s = 0.0  # of recent large pictures, and what reading them took

    async def run(self, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._small, work)

    async def read_large(self, work: Callable[[], T], megapixels: float, patience_s: float) -> T:
        self._check_room(patience_s)
        taken_s = 0.0  # stays so where the picture is never begun

        def do_timed() -> T:
            nonlocal taken_s
            started_at = time.monotonic()
            try:
                return work()
            finally:
                taken_s = time.monotonic() - started_at

        def settle(future: Future[T]) -> None:
            self._loop.call_soon_threadsafe(self._note, megapixels, taken_s)

        self._pictures += 1
        self._megapixels += megapixels
        future = self._large.submit(do_timed)
        future.add_done_callback(settle)  # also of one whose sender has gone, which keeps its thread until it is read
        return await asyncio.wrap_future(future)

    def _check_room(self, patience_s: float) -> None:
        if self._pictures and self._known_megapixels:
            backlog_s = self._megapixels * self._known_s / self._known_megapixels / self._threads
            if backlog_s > patience_s:
                raise QueueFull(f"{self._pictures} large pictures", backlog_s)

    def _note(self, megapixels: float, taken_s: float) -> None:
        self._pictures -= 1
        self._megapixels -= megapixels
        if taken_s:
            self._known_megapixels = _OLDER_WEIGHT * self._known_megapixels + megapixels
            self._known_s = _OLDER_WEIGHT * self._known_s + taken_s
        self._stop_tidying()
        if not self._pictures and not self._closed:
            self._tidying = self._loop.call_later(QUIET_S, self._small.submit, give_back_from_within)

    def _stop_tidying(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()

    def close(self) -> None:
        self._closed = True  # pictures still being read are noted after the pools have ended
        self._stop_tidying()
        for pool in (self._small, self._large):
            pool.shutdown(cancel_futures=True)
