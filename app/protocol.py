"""HTTP as uvicorn speaks it, with an end to what a client can make it hold."""

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_S = 65  # for the head of a request to come; balancers open connections ahead of need as well
HEAD_BYTES = 1 << 16
MOST_WAITING = 16  # requests of one connection that were sent before the one ahead of them was answered
READ_S = 60  # how long an answer may wait to be read
REST_S = 30  # how long the rest of a body may take once its request is answered
HEAD_END = re.compile(rb"\r?\n\r?\n")  # bare line feeds are for the parser to judge
UPGRADE = re.compile(rb"\r\nUpgrade:", re.IGNORECASE)


class TooManyWaiting(Exception):
    pass


class BoundedProtocol(HttpToolsProtocol):
    """Hangs up on whoever connects without asking for anything, never comes to the end of a head, sends one without
    end, doesn't read its answer, or never comes to the end of a body that was refused: no other time limit runs then,
    and such connections would pile up.

    Overlooks the offer to change to HTTP/2 that Java's HttpClient makes with its first request, for httptools would
    take all behind the request's head for the new protocol, and the picture would be lost. Made by a request that was
    sent behind another, or by CONNECT, it ends the connection: nobody could tell the body from the next request.
    """

    _head = b""  # of the next request, as far as it has come
    _unparsed_bytes = 0  # that the parser was given since it last came to the end of a head, or to a body
    _is_between_requests = True
    _is_in_head = True  # or what comes as a header stands behind a chunked body
    _is_at_end = False  # of what this connection will be asked
    _running: RequestResponseCycle | None = None  # which needn't be the newest request's
    _silence: asyncio.TimerHandle | None = None  # runs while a head is owed
    _stall: asyncio.TimerHandle | None = None  # runs while an answer isn't read
    _rest: asyncio.TimerHandle | None = None  # runs while a body comes that nobody waits for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_at_end:
            return None
        if self._is_between_requests:
            data = self._head + data
            end = HEAD_END.search(data)
            self._head = b"" if end else data
            head_bytes = end.start() if end else len(data)
            if head_bytes > HEAD_BYTES:
                return self.send_400_response(f"The head of the request has more than {HEAD_BYTES} bytes.")
            if not end:
                return None
            data = UPGRADE.sub(b"\r\nIgnored:", data[:head_bytes]) + data[head_bytes:]
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > HEAD_BYTES + len(data):  # of a head behind another request, as pipelining has it
            self.transport.abort()
        return None

    def on_message_begin(self) -> None:
        if len(self.pipeline) == MOST_WAITING:  # a reading of the socket may bring thousands, each with a task to come
            raise TooManyWaiting
        self._is_between_requests = False
        self._is_in_head = True
        self._await_head()  # which may be half of one, behind another request
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._unparsed_bytes = 0
        cancel(self._silence)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_between_requests = True
        cancel(self._rest)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_between_requests and self.cycle.response_complete:
            self._rest = self.loop.call_later(REST_S, self.transport.abort)

    def pause_writing(self) -> None:
        self._stall = self.loop.call_later(READ_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        cancel(self._stall)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._silence, self._stall, self._rest):
            cancel(timer)
        if self._running is not None and not self._running.response_complete:  # uvicorn tells the newest alone
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _unsupported_upgrade_warning(self) -> None:
        self._is_at_end = True
        self.cycle.keep_alive = False

    def _await_head(self) -> None:
        cancel(self._silence)
        self._silence = self.loop.call_later(HEAD_S, self.transport.close)


def cancel(timer: asyncio.TimerHandle | None) -> None:
    """Where there is one; to cancel it a second time, or once it has run, does nothing."""
    if timer is not None:
        timer.cancel()
