import asyncio
import threading

import pytest

from app.batcher import QueueFull
from app.decoders import Decoders


def test_who_would_wait_too_long_is_refused_at_once():
    async def scenario() -> None:
        decoders = Decoders(threads=2)
        gate = threading.Event()
        try:
            decoders.check_room(patience_s=0)  # nothing is known yet, and nobody waits
            decoders._seconds_per_job = 0.3  # as of large pictures
            jobs = [asyncio.create_task(decoders.run(gate.wait)) for _ in range(20)]
            await asyncio.sleep(0)
            decoders.check_room(patience_s=3)
            with pytest.raises(QueueFull, match="20 pictures are waiting already; try again in 3 s") as refused:
                decoders.check_room(patience_s=2.9)
            assert refused.value.retry_after_s == 3
            gate.set()
            assert all(await asyncio.gather(*jobs))
            decoders.check_room(patience_s=0)
        finally:
            gate.set()
            decoders.close()

    asyncio.run(scenario())


def test_what_a_job_takes_is_learnt_and_one_that_fails_took_its_time_as_well():
    def fail() -> None:
        raise ArithmeticError

    async def scenario() -> None:
        decoders = Decoders(threads=1)
        try:
            assert await decoders.run(lambda: 7) == 7
            assert 0 < (first := decoders._seconds_per_job) < 1
            with pytest.raises(ArithmeticError):
                await decoders.run(fail)
            assert decoders._seconds_per_job != first
        finally:
            decoders.close()

    asyncio.run(scenario())
