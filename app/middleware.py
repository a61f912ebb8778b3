"""Around every request, in plain ASGI: headers, request id, access log, metrics, last resort, key check, body limit.

Plain, because Starlette's BaseHTTPMiddleware hides from the handlers that a client has hung up.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.batcher import ShuttingDown
from app.logs import ACCESS
from app.metrics import Metrics
from app.samples import SMALL_BYTES
from app.trace import Trace, choose_request_id

Respond = Callable[[Exception, Scope], Response]

log = logging.getLogger(ACCESS)

STATIC = "/static/"
QUIET = ("/healthz", "/readyz", "/metrics", STATIC)  # asked for so often that their log lines would bury the others
LARGEST_AT_ONCE = 8  # bodies of the largest allowed size that may lie in memory at a time, or as much in smaller ones
BUFFERED_BYTES = 1 << 16  # uvicorn reads this much of a body that nobody asks for

_SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class BodyTooLarge(ValueError):
    pass


class WrongKey(ValueError):
    pass


class TooManyUploads(RuntimeError):
    retry_after_s = 1


class SecurityHeaders:
    """On every response, unless a page brings a policy of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # Answers are about patients' pictures; the page's own files may be kept, but are asked about before each use.
        caching = b"no-cache" if scope["path"].startswith(STATIC) else b"no-store"
        defaults = {**_SECURITY_HEADERS, b"cache-control": caching}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                missing = [(name, value) for name, value in defaults.items() if name not in present]
                message = {**message, "headers": [*message["headers"], *missing]}
            await send(message)

        return await self.app(scope, receive, send_with_headers)


class Tracing:
    """Request id, Server-Timing, metrics and access log."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, is_draining: Callable[[], bool], paths: frozenset[str]
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.is_draining = is_draining
        self.paths = paths  # of all routes; any other would be a label of its own in the metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        trace = scope["trace"] = Trace(choose_request_id(headers.get("x-request-id")))
        status = 0
        is_held_back = headers.get("expect", "").lower() == "100-continue"  # a body that waits until it is asked for

        async def receive_noted() -> Message:
            nonlocal is_held_back
            is_held_back = False
            return await receive()

        async def send_traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = self._write_headers(trace, int(headers.get("content-length", 0)), is_held_back)
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        self.metrics.in_progress.inc()
        try:
            await self.app(scope, receive_noted if is_held_back else receive, send_traced)
        finally:
            self.metrics.in_progress.dec()
            self._account(scope, trace, status)

    def _write_headers(self, trace: Trace, announced: int, is_held_back: bool) -> Iterable[tuple[bytes, bytes]]:
        yield b"x-request-id", trace.request_id.encode()
        yield b"server-timing", trace.write_server_timing().encode()
        # A body that is held back will never come, and the next request would be taken for it. While draining, clients
        # that keep their connection should go elsewhere in time, but not amid a body: closed then, the connection would
        # be reset, and the answer lost with it.
        if is_held_back or (self.is_draining() and announced <= BUFFERED_BYTES):
            yield b"connection", b"close"

    def _name_route(self, path: str) -> str:
        if path.startswith(STATIC):
            return STATIC
        return path if path in self.paths else "none"

    def _account(self, scope: Scope, trace: Trace, status: int) -> None:
        route = self._name_route(scope["path"])
        seconds = trace.elapsed_s()
        self.metrics.requests.labels(route, scope["method"], status).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        self.metrics.observe_stages(trace.stages_s)
        if trace.problem:
            self.metrics.problems.labels(trace.problem).inc()
        level = logging.DEBUG if route in QUIET and status < 400 else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "request", extra=describe_request(scope, trace, route, status, seconds))


def describe_request(scope: Scope, trace: Trace, route: str, status: int, seconds: float) -> dict[str, object]:
    fields: dict[str, object] = {
        "method": scope["method"],
        "route": route,
        "status": status,
        "ms": round(seconds * 1000, 1),
        **{f"{stage}_ms": round(stage_s * 1000, 1) for stage, stage_s in trace.stages_s.items()},
        "request_id": trace.request_id,
    }
    return {**fields, "problem": trace.problem} if trace.problem else fields


class LastResort:
    """Logs and answers an error that nobody foresaw; answers whoever is still uploading when the service ends."""

    def __init__(self, app: ASGIApp, *, respond: Respond) -> None:
        self.app = app
        self.respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        has_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except asyncio.CancelledError:  # the service ends, and will not wait for the rest of an upload any longer
            if has_begun:
                raise
            await self.respond(ShuttingDown(), scope)(scope, receive, send)
        except Exception as error:
            log.exception("failed", extra={"request_id": scope["trace"].request_id})
            if has_begun:  # the client can only be told by breaking the answer off
                raise
            await self.respond(error, scope)(scope, receive, send)


class KeyCheck:
    """Lets a POST, the model card and the metrics through only with one of the keys."""

    def __init__(self, app: ASGIApp, *, keys: frozenset[str], respond: Respond) -> None:
        self.app = app
        self.respond = respond
        self.digests = [hash_key(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_guarded(scope["method"], scope["path"]):
            return await self.app(scope, receive, send)
        offered = list_keys(Headers(scope=scope))
        if self._admits(offered):
            return await self.app(scope, receive, send)
        came = "the key that came is none of this service's" if offered else "this route needs a key"
        error = WrongKey(f"{came}; send one as header 'X-API-Key: KEY' or 'Authorization: Bearer KEY'")
        return await self.respond(error, scope)(scope, receive, send)

    def _admits(self, offered: list[str]) -> bool:
        # Headers are read as Latin-1 here. Beyond ASCII that is what browsers send; nearly all others send UTF-8.
        forms = [form for key in offered for form in (key.encode(), key.encode("latin-1"))]
        # Digests have one length and every key is compared, so the time taken tells nothing about them.
        matches = [hmac.compare_digest(hash_key(form), digest) for form in forms for digest in self.digests]
        return any(matches)


def list_keys(headers: Headers) -> list[str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token if scheme.lower() == "bearer" else ""
    # Only blanks are taken off: read as Latin-1, the last byte of a letter may look like another kind of space.
    offered = (key.strip(" \t") for key in (headers.get("x-api-key", ""), bearer))
    return [key for key in offered if key]


def is_guarded(method: str, path: str) -> bool:
    return method == "POST" or path in ("/model", "/metrics")


def hash_key(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Refuses a body that is too long, as announced or as it streams in, or too much together with all others.

    Bodies are held in memory until they are answered, and some come slowly: without a limit on their sum a few hundred
    large ones would end the process, and all that is in hand with it. Small ones pass: tiles shouldn't be refused
    because of those who send large bodies.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_held_bytes = LARGEST_AT_ONCE * max_bytes
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = int(Headers(scope=scope).get("content-length", 0))
        received = held = 0

        async def receive_within_limit() -> Message:
            nonlocal received, held
            if not received:  # before anything is read, so that a client that waits for "100 Continue" is spared
                self._check(announced)
            message = await receive()
            if size := len(message.get("body", b"")):
                received += size
                held += size
                self.held_bytes += size
                self._check(received)
            return message

        def let_go() -> None:
            nonlocal held
            self.held_bytes -= held
            held = 0

        async def send_and_let_go(message: Message) -> None:
            let_go()  # nobody needs the body once the answer is there, which the client may read slowly
            await send(message)

        try:
            await self.app(scope, receive_within_limit, send_and_let_go)
        finally:
            let_go()

    def _check(self, size: int) -> None:
        if size > self.max_bytes:
            raise BodyTooLarge(f"the body has {size} bytes or more, the limit here is {self.max_bytes} bytes")
        if size > SMALL_BYTES and self.held_bytes > self.max_held_bytes:
            raise TooManyUploads(
                f"the bodies in hand are {self.max_held_bytes / 2**20:.3g} MiB together already; send fewer or smaller "
                "ones at once"
            )
