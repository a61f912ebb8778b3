"""Gathers items of many callers into calls of one function, made by a few threads of its own.

Knows neither images nor HTTP. A call starts the moment a thread is idle and takes its share of what is waiting then, so
nobody waits for a batch to fill; while all threads are busy the queue gathers. The queue is bounded by items, and
places in it are reserved, so that whoever asks several times in a row keeps them.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

_LONGEST_RETRY_S = 60
_NEWEST_WEIGHT = 0.1  # of the newest call in the running mean of seconds per item


class QueueFull(RuntimeError):
    def __init__(self, waiting: str, backlog_s: float) -> None:
        self.retry_after_s = min(_LONGEST_RETRY_S, max(1, math.ceil(backlog_s)))
        super().__init__(f"{waiting} are waiting already; try again in {self.retry_after_s} s")


class ShuttingDown(RuntimeError):
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("this instance is shutting down; try again, another or its successor will answer")


class CallFailed(RuntimeError):
    """The call that should have answered raised what is given as the cause."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[Result]):
    results: list[Result]  # in the order of the items
    queue_s: float  # from submission to the start of the first call
    infer_s: float  # from there to the end of the last call


@dataclass(slots=True)
class Reservation:
    places: int


class _Submission(Generic[Kind, Result]):
    """Items that one caller handed in together and waits for together."""

    def __init__(self, kind: Kind, size: int, done: asyncio.Future[None]) -> None:
        self.kind = kind
        self.size = size
        self.results: dict[int, Result] = {}
        self.done = done
        self.submitted_at = time.monotonic()
        self.started_at = math.inf
        self.finished_at = 0.0


@dataclass(slots=True)
class _Place(Generic[Kind, Item, Result]):
    submission: _Submission[Kind, Result]
    index: int
    item: Item


class Batcher(Generic[Kind, Item, Result]):
    """`run(kind, items, alone)` answers items of one kind, in order; `alone` says that nothing else is going on.

    What it raises fails all of them. An exception among its answers fails that one.
    """

    def __init__(
        self,
        run: Callable[[Kind, list[Item], bool], Sequence[Result | Exception]],
        *,
        threads: int,
        limits: Mapping[Kind, int],  # the most items of a kind in one call
        max_queue: int,
    ) -> None:
        self.last_success = -math.inf  # time.monotonic() at the end of the last call that did not fail
        self.limits = limits
        self._run = run
        self._max_queue = max_queue
        self._loop = asyncio.get_running_loop()
        self._submissions: set[_Submission[Kind, Result]] = set()  # this and the next two: only the event loop writes
        self._reserved = 0
        self._refusing = False
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[_Place[Kind, Item, Result]] = deque()
        self._calls = 0
        self._taken = 0  # items in these calls
        self._seconds_per_item = 0.0
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"infer-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def is_refusing(self) -> bool:
        return self._refusing

    @property
    def waiting(self) -> int:
        """Items that are queued, or whose places are reserved."""
        return self._reserved + len(self._queue)

    def check_open(self) -> None:
        if self._refusing:
            raise ShuttingDown

    def check_room(self, places: int, patience_s: float) -> None:
        """Raises where `reserve` would. An empty queue takes any number, or a large submission would never get in."""
        backlog_s = (self.waiting + self._taken) * self._seconds_per_item / len(self._threads)
        if self.waiting and (self.waiting + places > self._max_queue or backlog_s > patience_s):
            raise QueueFull(f"{self.waiting} tiles", backlog_s)

    @contextmanager
    def reserve(self, places: int, patience_s: float = math.inf) -> Iterator[Reservation]:
        """Places in the queue, kept until used or given up; refused where the wait would exceed `patience_s`."""
        self.check_room(places, patience_s)
        reservation = Reservation(places)
        self._reserved += places
        try:
            yield reservation
        finally:
            self._reserved -= reservation.places

    async def submit(self, reservation: Reservation, kind: Kind, items: Sequence[Item]) -> Answer[Result]:
        """Uses up one reserved place an item. Cancel it and its items leave the queue before they cost a call."""
        if not 0 < len(items) <= reservation.places:
            raise ValueError(f"{len(items)} items submitted, but {reservation.places} places are reserved")
        submission: _Submission[Kind, Result] = _Submission(kind, len(items), self._loop.create_future())
        reservation.places -= len(items)
        self._reserved -= len(items)
        self._submissions.add(submission)
        try:
            self._enqueue([_Place(submission, index, item) for index, item in enumerate(items)])
            await submission.done
        except BaseException:
            self._leave(submission)
            del submission  # it holds the exception, which holds this frame: all would stay until garbage is collected
            raise
        self._leave(submission)
        results = [submission.results[index] for index in range(submission.size)]
        queue_s = submission.started_at - submission.submitted_at
        return Answer(results, queue_s, submission.finished_at - submission.started_at)

    def refuse(self) -> None:
        """From now on `check_open` raises; whoever has passed it is still served."""
        self._refusing = True

    def close(self) -> None:
        """Ends the threads after the calls they are in; whoever still waits gets ShuttingDown."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for submission in self._submissions:
            settle(submission.done, ShuttingDown())

    def _enqueue(self, places: list[_Place[Kind, Item, Result]]) -> None:
        with self._changed:
            if self._closed:
                raise ShuttingDown
            self._queue.extend(places)
            self._changed.notify(len(places))

    def _leave(self, submission: _Submission[Kind, Result]) -> None:
        """Takes what is left of a submission out of the queue: its caller has gone, or one of its calls failed."""
        self._submissions.discard(submission)
        if len(submission.results) < submission.size:
            with self._changed:
                self._queue = deque(place for place in self._queue if place.submission is not submission)

    def _work(self) -> None:
        while self._make_a_call():
            pass

    def _make_a_call(self) -> bool:
        """Whether there was one; a function of its own, or an idle thread would hold its last items and answers."""
        taken = self._take()
        if taken is None:
            return False
        places, alone = taken
        started_at = time.monotonic()
        results: Sequence[Result | Exception] = ()
        error: Exception | None = None
        try:
            results = self._run(places[0].submission.kind, [place.item for place in places], alone)
        except Exception as cause:  # whatever it is, it belongs to the callers of this call
            error = cause
        self._finish(places, results, error, started_at)
        return True

    def _take(self) -> tuple[list[_Place[Kind, Item, Result]], bool] | None:
        """Waits for work, then takes the oldest item and its followers of the same kind; None when closed.

        No more than this thread's share: a large call here must not leave the others without work.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            share = math.ceil(len(self._queue) / len(self._threads))
            places = [self._queue.popleft()]
            kind = places[0].submission.kind
            most = min(share, self.limits[kind])
            while self._queue and len(places) < most and self._queue[0].submission.kind == kind:
                places.append(self._queue.popleft())
            self._calls += 1
            self._taken += len(places)
            return places, self._calls == 1 and not self.waiting

    def _finish(
        self,
        places: list[_Place[Kind, Item, Result]],
        results: Sequence[Result | Exception],
        error: Exception | None,
        started_at: float,
    ) -> None:
        finished_at = time.monotonic()
        seconds = finished_at - started_at
        has_answered = any(not isinstance(result, Exception) for result in results)
        with self._changed:
            self._calls -= 1
            self._taken -= len(places)
            if has_answered:
                self.last_success = finished_at
                newest = seconds / len(places)
                mean = self._seconds_per_item or newest
                self._seconds_per_item = mean + _NEWEST_WEIGHT * (newest - mean)
        self._loop.call_soon_threadsafe(deliver, places, results, error, started_at, finished_at)


def deliver(
    places: list[_Place[Kind, Item, Result]],
    results: Sequence[Result | Exception],
    error: Exception | None,
    started_at: float,
    finished_at: float,
) -> None:
    if error is None and len(results) != len(places):
        error = ValueError(f"the call answered {len(results)} of {len(places)} items")
    for position, place in enumerate(places):
        submission = place.submission
        submission.started_at = min(submission.started_at, started_at)
        submission.finished_at = finished_at
        if error is not None:
            failure = CallFailed(f"a call with {len(places)} items failed")
            failure.__cause__ = error  # one failure a waiter: each adds its own traceback
            settle(submission.done, failure)
        elif isinstance(result := results[position], Exception):
            settle(submission.done, result)
        else:
            submission.results[place.index] = result
            if len(submission.results) == submission.size:
                settle(submission.done, None)


def settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():  # the caller has gone, or another call of the same submission failed
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
