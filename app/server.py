"""Runs the service until it is told to stop: the port, the workers, the signals."""

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from ipaddress import ip_address
from types import FrameType

import uvicorn

from app import logs
from app.main import create_app
from app.memory import give_back_what_is_free
from app.protocol import BoundedProtocol
from app.service import Service
from app.settings import Settings
from app.workers import STARTUP_FAILED, supervise
from model.artifact import CorruptArtifact
from model.session import DeviceUnavailable

log = logging.getLogger("tissue")

KEEP_ALIVE_S = 65  # longer than the 60 s of common balancers, which would else reuse one that is being closed
# How long a thread that returns from a model call waits for the interpreter while its core idles; Python's 5 ms are
# half a call.
SWITCH_INTERVAL_S = 0.0001


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
        http=BoundedProtocol,
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
