import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from app.batcher import QueueFull
from app.decoders import Decoders

pytestmark = pytest.mark.anyio


@contextmanager
def start(threads: int) -> Iterator[tuple[Decoders, threading.Event]]:
    """Decoders, and a gate for their work to wait at, which is opened at the end."""
    decoders, gate = Decoders(threads), threading.Event()
    try:
        yield decoders, gate
    finally:
        gate.set()
        decoders.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_who_would_wait_too_long_is_refused_at_once():
    with start(2) as (decoders, gate):
        # Nothing is known yet, so these are let in.
        jobs = [asyncio.create_task(decoders.read_large(gate.wait, 10, patience_s=0)) for _ in range(20)]
        await asyncio.sleep(0)
        decoders._known_megapixels, decoders._known_s = 10, 0.3
        with pytest.raises(QueueFull, match="20 large pictures are waiting already; try again in 3 s") as refused:
            await decoders.read_large(gate.wait, 10, patience_s=2.9)
        assert refused.value.retry_after_s == 3
        jobs.append(asyncio.create_task(decoders.read_large(gate.wait, 10, patience_s=3)))
        await asyncio.sleep(0)
        gate.set()
        assert all(await asyncio.gather(*jobs))
        await until(lambda: decoders._pictures == 0)
        assert await decoders.read_large(lambda: "read", 1000, patience_s=0)  # nobody waits


async def test_small_pictures_do_not_wait_behind_large_ones():
    with start(1) as (decoders, gate):
        large = [asyncio.create_task(decoders.read_large(gate.wait, 10, patience_s=0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await decoders.run(lambda: "small") == "small"
        assert not any(job.done() for job in large)


async def test_what_reading_takes_is_learnt_from_failures_and_from_those_whose_sender_has_gone():
    def fail() -> None:
        raise ArithmeticError

    with start(1) as (decoders, gate):
        with pytest.raises(ArithmeticError):
            await decoders.read_large(fail, 10, patience_s=0)
        await until(lambda: decoders._known_megapixels == 10)
        entered = threading.Event()

        def enter() -> None:
            entered.set()
            gate.wait()

        running, waiting = (
            asyncio.create_task(decoders.read_large(work, 10, patience_s=9)) for work in (enter, gate.wait)
        )
        await asyncio.to_thread(entered.wait)
        for job in (running, waiting):
            job.cancel()
        await until(lambda: decoders._megapixels == 10)  # the one that has its thread keeps it
        gate.set()
        await until(lambda: decoders._pictures == 0)
        assert decoders._known_megapixels == pytest.approx(19)
        assert decoders._megapixels == 0


async def test_what_ends_after_the_end_starts_nothing_more():
    with start(1) as (decoders, gate):
        job = asyncio.create_task(decoders.read_large(gate.wait, 10, patience_s=0))
        await asyncio.sleep(0)
        gate.set()
        decoders.close()
        assert await job
        await until(lambda: decoders._pictures == 0)
        assert decoders._tidying is None
