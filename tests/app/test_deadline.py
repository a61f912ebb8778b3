import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request

from app.deadline import DeadlineExceeded, attended

pytestmark = pytest.mark.anyio


async def run(deadline_s, work):
    """`work(gone)` while a client waits, who leaves when `gone` is set."""
    gone = asyncio.Event()

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    async with attended(Request({"type": "http", "headers": []}, receive), deadline_s):
        return await work(gone)


async def forever(gone):
    await asyncio.Event().wait()


async def test_work_in_time_is_left_alone():
    async def work(gone):
        await asyncio.sleep(0)
        return "answer"

    assert await run(10, work) == "answer"


async def test_the_deadline_cancels():
    with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"):
        await run(0.01, forever)


async def test_a_client_that_hangs_up_cancels():
    async def work(gone):
        gone.set()
        await asyncio.Event().wait()

    with pytest.raises(ClientDisconnect):
        await run(10, work)


async def test_errors_of_the_work_come_through():
    async def work(gone):
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        await run(10, work)


def test_being_cancelled_from_outside_stays_that():
    """In a loop of its own, where all tasks are the test's."""

    async def scenario():
        async def receive():
            await asyncio.Event().wait()

        async def work():
            async with attended(Request({"type": "http", "headers": []}, receive), 10):
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
