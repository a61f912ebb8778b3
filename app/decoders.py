"""Threads beside the model's that read and draw pictures.

What waits for them is counted in time, as what waits for the model is: a crowd of large pictures is told so at once,
and not when all the work was done in vain.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.batcher import NEWEST_WEIGHT, QueueFull

T = TypeVar("T")


class Decoders:
    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._jobs = 0  # that wait or run; this and the next: only the event loop writes
        self._seconds_per_job = 0.0

    def check_room(self, patience_s: float) -> None:
        backlog_s = self._jobs * self._seconds_per_job / self._threads
        if backlog_s > patience_s:
            raise QueueFull(f"{self._jobs} pictures", backlog_s)

    async def run(self, work: Callable[[], T]) -> T:
        taken_s: list[float] = []

        def do_timed() -> T:
            started_at = time.monotonic()
            try:
                return work()
            finally:
                taken_s.append(time.monotonic() - started_at)

        self._jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, do_timed)
        finally:
            self._jobs -= 1
            for newest in taken_s:  # none, if its sender has gone before its turn
                mean = self._seconds_per_job or newest
                self._seconds_per_job = mean + NEWEST_WEIGHT * (newest - mean)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
