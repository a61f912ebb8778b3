"""Puts the parts together: `create_app` makes the service of its settings, `serve` runs it until told to stop."""

import asyncio
import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from ipaddress import ip_address
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app import docs, logs, routes
from app.batcher import Batcher
from app.decoders import Decoders
from app.errors import KINDS, respond
from app.memory import give_back_what_is_free
from app.metrics import Metrics
from app.middleware import STATIC, BodyLimit, KeyCheck, LastResort, SecurityHeaders, Tracing
from app.service import ERRANDS, Item, ModelCall, Service, Work, answer_questions
from app.settings import Settings
from app.workers import STARTUP_FAILED, supervise
from model.artifact import CorruptArtifact
from model.session import CUDA_BATCHES, Classifier, DeviceUnavailable, available_cores, open_classifier

log = logging.getLogger("tissue")

KEEP_ALIVE_S = 65  # longer than the 60 s of common balancers, which else reuse a connection as it is closed
HEAD_S = 65  # balancers open connections ahead of need as well
HEAD_BYTES = 1 << 16
READ_S = 60  # so long an answer may lie unread
CUDA_BATCH = 32
# So long a thread that comes back from a model call waits for the one that holds the interpreter, and its core is idle;
# Python's own 5 ms are half a call.
SWITCH_INTERVAL_S = 0.0001
UPGRADE = re.compile(rb"\r\nUpgrade:", re.IGNORECASE)


def create_app(settings: Settings) -> FastAPI:
    metrics = Metrics()
    app = FastAPI(
        title="Tissue",
        version=version("tissue"),
        summary="Tells which tissue a small H&E image shows, how sure it is, and where it looked.",
        description=docs.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=open_service(settings, metrics),
        middleware=stack_middleware(settings, metrics, is_draining=lambda: app.state.service.batcher.is_refusing),
    )
    app.state.metrics = metrics
    app.include_router(routes.router)
    app.mount(STATIC.rstrip("/"), StaticFiles(directory=routes.WEB))
    for error in (HTTPException, RequestValidationError, *KINDS):
        if error is not Exception:  # left to the last resort, which is outside of Starlette's handlers
            app.add_exception_handler(error, answer_error)
    app.openapi = once(lambda: docs.write_openapi(app, has_keys=bool(settings.read_keys())))  # type: ignore[method-assign]
    return app


def once(write: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    written: list[dict[str, Any]] = []

    def read() -> dict[str, Any]:
        if not written:
            written.append(write())
        return written[0]

    return read


async def answer_error(request: Request, error: Exception) -> Response:
    return respond(error, request.scope)


def stack_middleware(settings: Settings, metrics: Metrics, is_draining: Callable[[], bool]) -> list[Middleware]:
    """From the outside in."""
    keys = settings.read_keys()
    stack = [
        Middleware(SecurityHeaders),
        Middleware(Tracing, metrics=metrics, is_draining=is_draining),
    ]
    if settings.cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-ID", "Server-Timing", "Retry-After"],
            )
        )
    stack.append(Middleware(LastResort, respond=respond))  # within CORS: a page elsewhere must be able to read it
    if keys:
        stack.append(Middleware(KeyCheck, keys=keys, respond=respond))
    stack.append(Middleware(BodyLimit, max_bytes=settings.max_body_bytes))
    return stack


def open_service(settings: Settings, metrics: Metrics) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The application's lifespan: a verified, warm classifier behind a batcher."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        cores = max(1, available_cores() // settings.workers)
        classifier = await asyncio.to_thread(
            open_classifier,
            settings.artifact,
            settings.device,
            settings.precision,
            settings.intra_threads or cores,
        )
        max_batch = choose_max_batch(settings, classifier)
        await asyncio.to_thread(warm, classifier, max_batch)
        batcher: Batcher[Work, Item, Any] = Batcher(
            answer_questions(classifier, lambda call: count_call(metrics, call)),
            threads=settings.infer_threads or (1 if classifier.device == "cuda" else cores),
            limits={"predict": max_batch, "explain": max_batch, "errand": ERRANDS},
            max_queue=settings.max_queue,
        )
        decoders = Decoders(settings.decode_threads or cores)
        app.state.service = service = Service(settings, classifier, batcher, decoders, metrics)
        shown = service.model
        await asyncio.to_thread(app.openapi)  # takes 0.1 s, in which the first reader would stop everybody
        metrics.model.labels(shown.name, shown.version, shown.digest, shown.device, shown.precision).set(1)
        try:
            yield
        finally:
            batcher.refuse()
            batcher.close()
            decoders.close()

    return lifespan


def choose_max_batch(settings: Settings, classifier: Classifier) -> int:
    if classifier.precision == "int8":
        if settings.max_batch not in (None, 1):
            log.warning("TISSUE_MAX_BATCH is left alone: int8 takes one tile a call, whose scale others would change")
        return 1
    return settings.max_batch or (CUDA_BATCH if classifier.device == "cuda" else 1)


def warm(classifier: Classifier, max_batch: int) -> None:
    """Every batch size once, so that no request pays for the first call of its size."""
    side = classifier.manifest.tile_px
    for size in [size for size in CUDA_BATCHES if size < max_batch] + [max_batch]:
        tiles = np.full((size, side, side, 3), 255, np.uint8)
        classifier.predict(tiles, alone=True)
        classifier.predict(tiles, alone=False)
        classifier.explain(tiles)


def count_call(metrics: Metrics, call: ModelCall) -> None:
    metrics.call_seconds.labels(call.graph).observe(call.seconds)
    metrics.call_tiles.labels(call.graph).observe(call.tiles)


class Protocol(HttpToolsProtocol):
    """uvicorn's own, with an end to what a client can make it hold.

    It hangs up on whoever connects without asking for anything, never comes to the end of a head, sends one without
    end, or doesn't read its answer: no other time to wait runs then, and such connections would pile up. And it
    overlooks the offer to change to HTTP/2 that Java's HttpClient makes with its first request, for httptools would
    take all behind the request's head for the new protocol, and the picture would be lost.
    """

    _head = b""  # of the next request, as far as it has come
    _unparsed_bytes = 0  # that the parser was given since it last came to the end of a head, or to a body
    _is_between_requests = True
    _silence: asyncio.TimerHandle | None = None  # runs while a head is owed
    _stall: asyncio.TimerHandle | None = None  # runs while an answer isn't read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_between_requests:
            data = self._head + data
            head, end, rest = data.partition(b"\r\n\r\n")
            self._head = b"" if end else data
            if len(head) > HEAD_BYTES:
                return self.send_400_response(f"The head of the request has more than {HEAD_BYTES} bytes.")
            if not end:
                return None
            data = UPGRADE.sub(b"\r\nIgnored:", head) + end + rest
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > HEAD_BYTES + len(data):  # of a head behind another request, as pipelining has it
            self.transport.abort()
        return None

    def on_message_begin(self) -> None:
        self._is_between_requests = False
        self._await_head()  # which may be half of one, behind another request
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        self._stop_awaiting_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_between_requests = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._stall = self.loop.call_later(READ_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._cancel_stall()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting_head()
        self._cancel_stall()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._stop_awaiting_head()
        self._silence = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_awaiting_head(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _cancel_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


class Server(uvicorn.Server):
    """On SIGTERM it first says that it isn't ready and refuses new work, still listening, so that balancers notice;
    then it stops listening, finishes what is in hand, and ends with status 0. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, *, drain_s: float, obeys_ctrl_c: bool) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s
        self._obeys_ctrl_c = obeys_ctrl_c
        self._closes_at = math.inf
        self._signal: signal.Signals | None = None  # that came and was not yet logged

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        model = self._service.model.model_dump()
        log.info("ready", extra={f"model_{name}": value for name, value in model.items()})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and not self._obeys_ctrl_c:
            return
        # Nothing is logged in here: the signal may have come in the middle of another line, and a stream that is being
        # written to fails if it is written to once more.
        if self._closes_at < math.inf:
            os._exit(1)  # threads in a model call or a decoder would keep the process for as long as they take
        # Nobody balances load onto a terminal, so Ctrl-C need not wait.
        self._closes_at = time.monotonic() + (0 if sig == signal.SIGINT else self._drain_s)
        self._service.batcher.refuse()
        self._signal = signal.Signals(sig)

    async def on_tick(self, counter: int) -> bool:
        logs.write_gathered()
        if self._signal is not None:
            log.info("stopping", extra={"signal": self._signal.name})
            self._signal = None
        self.should_exit = self.should_exit or time.monotonic() >= self._closes_at
        return await super().on_tick(counter)


def serve(settings: Settings) -> None:
    """Runs until SIGTERM or Ctrl-C. Raises CorruptArtifact or DeviceUnavailable where there is nothing to serve."""
    logs.configure(settings.log_format)
    listener = bind(settings)
    warn_if_open(settings)
    if settings.workers == 1:
        run_worker(settings, listener)
    else:
        supervise(settings, listener, start_worker)


def bind(settings: Settings) -> socket.socket:
    """Takes the port; whoever connects is refused until the workers listen, which they do when they are ready."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        log.error("can't listen", extra={"host": settings.host, "port": settings.port, "cause": error.strerror})
        raise SystemExit(1) from None
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    log.info("starting", extra={"address": address, "docs": f"{address}/docs"})
    return listener


def warn_if_open(settings: Settings) -> None:
    if not settings.read_keys() and not is_loopback(settings.host):
        log.warning(
            "anybody on the network may use this service: set TISSUE_API_KEYS, or TISSUE_HOST=127.0.0.1",
            extra={"host": settings.host},
        )


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run_worker(settings: Settings, listener: socket.socket, *, obeys_ctrl_c: bool = True) -> None:
    """One process that answers. The service is opened outside of uvicorn, so that what fails is raised as it is."""
    give_back_what_is_free()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=Protocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody here asks who the client is
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.deadline_ms / 1000) + 1,
    )

    async def run() -> None:
        async with app.router.lifespan_context(app):
            drain_s = settings.drain_ms / 1000
            server = Server(config, app.state.service, drain_s=drain_s, obeys_ctrl_c=obeys_ctrl_c)
            await server.serve(sockets=[listener])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())


def start_worker(settings: Settings, listener: socket.socket) -> None:
    """What a worker process runs; the parent turns Ctrl-C into a SIGTERM for all."""
    logs.configure(settings.log_format)
    try:
        run_worker(settings, listener, obeys_ctrl_c=False)
    except (CorruptArtifact, DeviceUnavailable) as error:
        log.error("can't start", extra={"cause": str(error)})
        sys.exit(STARTUP_FAILED)
