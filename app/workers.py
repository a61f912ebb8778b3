"""Several processes that answer on one port, watched by a parent that loads no model itself."""

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from prometheus_client.multiprocess import mark_process_dead

from app.metrics import FOLDER_VARIABLE
from app.settings import Settings

log = logging.getLogger("tissue")

Work = Callable[[Settings, socket.socket], None]

STARTUP_FAILED = 3  # exit status of a worker that would fail the same way again
SHORTEST_LIFE_S = 1.0  # a worker that dies sooner is replaced no faster than this

# Linux spreads connections over all sockets that listen on one port; of one that the workers share, whoever is awake
# would take all that wait while the others idle. On other systems only the last socket to listen would get any.
SPREADS = sys.platform == "linux"

_spawn = multiprocessing.get_context("spawn")  # a fork would copy locks and threads of libraries


def supervise(settings: Settings, listener: socket.socket, work: Work) -> None:
    """Keeps `settings.workers` processes running until SIGTERM or Ctrl-C; each runs `work`."""
    if SPREADS:  # set after it was bound, so that a port that somebody else listens on was refused
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with tempfile.TemporaryDirectory(prefix="tissue-metrics-") as folder:
        os.environ[FOLDER_VARIABLE] = folder  # read by the workers when they import prometheus-client
        family = Family(settings, listener, work, folder)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, family.stop)
        family.watch()
    if family.failed:
        raise SystemExit(STARTUP_FAILED)


class Family:
    def __init__(self, settings: Settings, listener: socket.socket, work: Work, metrics_folder: str) -> None:
        self.failed = False
        self._settings = settings
        self._listener = listener
        self._work = work
        self._metrics_folder = metrics_folder
        self._stopping = False
        self._workers: dict[SpawnProcess, float] = {}  # and when each was started

    def watch(self) -> None:
        for _ in range(self._settings.workers):
            self._start()
        while self._workers:
            wait([worker.sentinel for worker in self._workers])
            for worker in [worker for worker in self._workers if worker.exitcode is not None]:
                self._bury(worker)

    def stop(self, sig: int, frame: FrameType | None) -> None:
        if self._stopping:  # nothing is logged here: the signal may have come in the middle of another line
            for worker in self._workers:
                worker.kill()
            shutil.rmtree(self._metrics_folder, ignore_errors=True)
            os._exit(1)
        self._end()

    def _start(self) -> None:
        worker = _spawn.Process(target=follow_parent, args=(self._work, self._settings, self._listener))
        worker.start()
        self._workers[worker] = time.monotonic()
        if self._stopping:  # the signal came between the decision and here
            worker.terminate()

    def _end(self) -> None:
        self._stopping = True
        for worker in list(self._workers):
            worker.terminate()

    def _bury(self, worker: SpawnProcess) -> None:
        lived_s = time.monotonic() - self._workers.pop(worker)
        mark_process_dead(worker.pid, self._metrics_folder)  # type: ignore[no-untyped-call]
        if self._stopping:
            return
        if worker.exitcode == STARTUP_FAILED:
            self.failed = True
            self._end()
            return
        log.error("a worker died and is replaced", extra={"pid": worker.pid, "status": worker.exitcode})
        time.sleep(max(0, SHORTEST_LIFE_S - lived_s))
        self._start()


def follow_parent(work: Work, settings: Settings, listener: socket.socket) -> None:
    """Runs `work`, and ends in order when the parent is gone, whatever became of it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        work(settings, bind_beside(listener) if SPREADS else listener)
    finally:
        if not parent.is_alive():  # or nobody would take away what it made
            shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)


def bind_beside(listener: socket.socket) -> socket.socket:
    own = socket.socket(listener.family)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        own.setsockopt(socket.SOL_SOCKET, option, 1)
    own.bind(listener.getsockname())
    return own
