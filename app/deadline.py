"""How long anybody works on a request: until its deadline, or until its client hangs up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request


class DeadlineExceeded(TimeoutError):
    pass


@asynccontextmanager
async def attended(request: Request, deadline_s: float | None) -> AsyncIterator[None]:
    """Cancels what runs inside at the deadline, or when the client hangs up. The body must have been read before."""
    task = asyncio.current_task()
    assert task is not None
    has_hung_up = False

    async def cancel_on_hang_up() -> None:
        nonlocal has_hung_up
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_hung_up = True
        task.cancel()

    watcher = asyncio.create_task(cancel_on_hang_up())
    try:
        async with asyncio.timeout(deadline_s) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise DeadlineExceeded(
            f"there was no answer within {deadline_s:g} s; the service is too busy, try again"
        ) from None
    except asyncio.CancelledError:
        if not has_hung_up:
            raise
        task.uncancel()
        raise ClientDisconnect("the client closed the connection before it was answered") from None
    finally:
        watcher.cancel()
