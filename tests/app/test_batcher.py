"""The batcher with plain functions in place of a model; threads are held and let go by events, never by sleeping."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from app.batcher import Batcher, CallFailed, QueueFull, ShuttingDown

pytestmark = pytest.mark.anyio

Answering = Callable[[list[int]], Sequence[int | Exception]]


class Gate:
    """A `run` that records its calls and holds each one until it is let go."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Answering | None = None) -> None:
        self.calls: list[tuple[str, list[int], bool]] = []
        self._answer = answer or (lambda items: [item * 10 for item in items])
        self._permits = threading.Semaphore(0)
        self._loop = loop
        self._entered: asyncio.Queue[list[int]] = asyncio.Queue()

    def __call__(self, kind: str, items: list[int], alone: bool) -> Sequence[int | Exception]:
        self.calls.append((kind, items, alone))
        self._loop.call_soon_threadsafe(self._entered.put_nowait, items)
        assert self._permits.acquire(timeout=10)
        return self._answer(items)

    async def entered(self) -> list[int]:
        return await asyncio.wait_for(self._entered.get(), 10)

    def let_go(self, calls: int = 1000) -> None:
        self._permits.release(calls)


class Rig:
    def __init__(
        self, answer: Answering | None = None, *, threads: int = 1, max_batch: int = 4, max_queue: int = 8
    ) -> None:
        self.gate = Gate(asyncio.get_running_loop(), answer)
        self.batcher: Batcher[str, int, int] = Batcher(
            self.gate,
            threads=threads,
            limits={"a": max_batch, "b": 2},
            max_queue=max_queue,
        )

    async def __aenter__(self) -> "Rig":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.gate.let_go()
        self.batcher.close()

    async def ask(self, *items: int, kind: str = "a") -> list[int]:
        with self.batcher.reserve(len(items)) as reservation:
            return (await self.batcher.submit(reservation, kind, items)).results

    def start(self, *items: int, kind: str = "a") -> asyncio.Task[list[int]]:
        return asyncio.create_task(self.ask(*items, kind=kind))


async def step() -> None:
    """Lets every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_sends_at_once_when_idle_and_gathers_while_busy() -> None:
    async with Rig() as rig:
        first = rig.start(1)
        assert await rig.gate.entered() == [1]
        others = [rig.start(n) for n in range(2, 8)]
        await step()
        rig.gate.let_go()
        assert [await task for task in [first, *others]] == [[10], [20], [30], [40], [50], [60], [70]]
        assert [items for _, items, _ in rig.gate.calls] == [[1], [2, 3, 4, 5], [6, 7]]


async def test_only_one_kind_in_a_call() -> None:
    async with Rig() as rig:
        tasks = [rig.start(1)]
        await rig.gate.entered()
        tasks += [rig.start(2), rig.start(3, 4, 5, kind="b"), rig.start(6)]
        await step()
        rig.gate.let_go()
        await asyncio.gather(*tasks)
        calls = [(kind, items) for kind, items, _ in rig.gate.calls]
        assert calls == [("a", [1]), ("a", [2]), ("b", [3, 4]), ("b", [5]), ("a", [6])]


async def test_says_whether_a_call_is_alone() -> None:
    async with Rig(threads=2, max_batch=1) as rig:
        lone = rig.start(1)
        await rig.gate.entered()
        beside = rig.start(2)
        await rig.gate.entered()
        rig.gate.let_go()
        await asyncio.gather(lone, beside)
        with rig.batcher.reserve(1):  # somebody else is still preparing
            await rig.ask(3)
        await rig.ask(4)
        assert [alone for _, _, alone in rig.gate.calls] == [True, False, False, True]


async def test_as_many_calls_at_a_time_as_threads() -> None:
    async with Rig(threads=2, max_batch=1) as rig:
        task = rig.start(1, 2, 3)
        assert sorted([await rig.gate.entered(), await rig.gate.entered()]) == [[1], [2]]
        assert len(rig.gate.calls) == 2
        rig.gate.let_go()
        assert await task == [10, 20, 30]


async def test_a_call_takes_no_more_than_its_threads_share() -> None:
    async with Rig(threads=2) as rig:
        busy = rig.start(1, 2)
        await rig.gate.entered()
        await rig.gate.entered()
        waiting = rig.start(3, 4, 5)
        await step()
        rig.gate.let_go(2)
        assert sorted([await rig.gate.entered(), await rig.gate.entered()]) == [[3, 4], [5]]
        rig.gate.let_go()
        assert await busy == [10, 20] and await waiting == [30, 40, 50]


async def test_cancelled_items_cost_no_call() -> None:
    async with Rig(max_batch=1) as rig:
        first, gone, last = rig.start(1), rig.start(2, 3), rig.start(4)
        await rig.gate.entered()
        assert rig.batcher.waiting == 3
        gone.cancel()
        await step()
        assert rig.batcher.waiting == 1
        rig.gate.let_go()
        assert await first == [10] and await last == [40]
        assert [items for _, items, _ in rig.gate.calls] == [[1], [4]]


async def test_who_leaves_during_the_call_is_no_trouble() -> None:
    troubles: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: troubles.append(context))
    async with Rig(max_batch=2) as rig:
        gone = rig.start(1)
        await rig.gate.entered()
        gone.cancel()
        await step()
        rig.gate.let_go()
        assert await rig.ask(2) == [20]
    assert not troubles


async def test_an_error_reaches_exactly_the_waiters_of_its_call() -> None:
    def fail_at_two(items: list[int]) -> list[int]:
        if 2 in items:
            raise ArithmeticError("two")
        return [item * 10 for item in items]

    async with Rig(fail_at_two, max_batch=2) as rig:
        tasks = [rig.start(1)]
        await rig.gate.entered()
        tasks += [rig.start(2), rig.start(3), rig.start(4)]
        await step()
        rig.gate.let_go()
        first, second, third, fourth = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(second, CallFailed) and isinstance(second.__cause__, ArithmeticError)
        assert isinstance(third, CallFailed) and third is not second
        assert (first, fourth) == ([10], [40])
        assert await rig.ask(5) == [50]


async def test_an_error_among_the_answers_reaches_one_waiter() -> None:
    def refuse_two(items: list[int]) -> list[int | Exception]:
        return [ArithmeticError("two") if item == 2 else item * 10 for item in items]

    async with Rig(refuse_two) as rig:
        tasks = [rig.start(1)]
        await rig.gate.entered()
        tasks += [rig.start(2), rig.start(3)]
        await step()
        rig.gate.let_go()
        first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(second, ArithmeticError)
        assert (first, third) == ([10], [30])
        answered_at = rig.batcher.last_success
        with pytest.raises(ArithmeticError):
            await rig.ask(2)
        assert rig.batcher.last_success == answered_at


async def test_the_rest_of_a_failed_submission_is_dropped() -> None:
    def fail(items: list[int]) -> list[int]:
        raise ArithmeticError

    async with Rig(fail, max_batch=1) as rig:
        task = rig.start(1, 2, 3, 4)
        await rig.gate.entered()
        rig.gate.let_go(1)
        with pytest.raises(CallFailed):
            await task
        assert rig.batcher.waiting == 0


async def test_a_call_that_answers_too_little_is_an_error() -> None:
    async with Rig(lambda items: items[1:]) as rig:
        rig.gate.let_go()
        with pytest.raises(CallFailed) as failed:
            await rig.ask(1, 2)
        assert "answered 1 of 2" in str(failed.value.__cause__)


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async with Rig(max_batch=1, max_queue=3) as rig:
        tasks = [rig.start(1)]
        await rig.gate.entered()
        tasks.append(rig.start(2, 3))
        await step()
        with pytest.raises(QueueFull) as full:
            await rig.ask(4, 5)
        assert full.value.retry_after_s == 1
        tasks.append(rig.start(4))
        await step()
        with pytest.raises(QueueFull):
            await rig.ask(5)
        rig.gate.let_go()
        assert [await task for task in tasks] == [[10], [20, 30], [40]]
        assert await rig.ask(6) == [60]


async def test_reserved_places_count_and_come_back() -> None:
    async with Rig(max_queue=3) as rig:
        with rig.batcher.reserve(3), pytest.raises(QueueFull):
            await rig.ask(1)
        rig.gate.let_go()
        assert await rig.ask(1) == [10]
        with rig.batcher.reserve(2) as reservation:
            await rig.batcher.submit(reservation, "a", [1])
            with pytest.raises(ValueError, match="1 places are reserved"):
                await rig.batcher.submit(reservation, "a", [1, 2])
        assert rig.batcher.waiting == 0


async def test_an_empty_queue_takes_more_than_its_bound() -> None:
    async with Rig(max_queue=3) as rig:
        rig.gate.let_go()
        assert await rig.ask(*range(8)) == [n * 10 for n in range(8)]


async def test_refuses_what_could_not_be_answered_in_time_and_estimates_from_the_measured_rate() -> None:
    def slow(items: list[int]) -> list[int]:
        time.sleep(0.05 * len(items))
        return items

    async with Rig(slow, max_queue=1000) as rig:
        rig.gate.let_go()
        await rig.ask(1)
        with rig.batcher.reserve(100):  # 5 s of work
            with pytest.raises(QueueFull) as full, rig.batcher.reserve(1, patience_s=2):
                pass
            assert 5 <= full.value.retry_after_s <= 8
            with rig.batcher.reserve(1, patience_s=20):
                pass


async def test_what_is_being_answered_counts_among_what_is_waited_for() -> None:
    def slow(items: list[int]) -> list[int]:
        time.sleep(0.05 * len(items))
        return items

    async with Rig(slow, max_batch=8) as rig:
        rig.gate.let_go(1)
        await rig.ask(1)
        busy = rig.start(*range(8))  # 0.4 s of work, all in one call
        await rig.gate.entered()
        await rig.gate.entered()
        with rig.batcher.reserve(1):  # 0.45 s in all
            with pytest.raises(QueueFull), rig.batcher.reserve(1, patience_s=0.3):
                pass
            with rig.batcher.reserve(1, patience_s=2):
                pass
        rig.gate.let_go()
        await busy


async def test_refusing_lets_finish_who_is_in() -> None:
    async with Rig() as rig:
        rig.batcher.check_open()
        task = rig.start(1)
        await rig.gate.entered()
        rig.batcher.refuse()
        with pytest.raises(ShuttingDown):
            rig.batcher.check_open()
        follower = rig.start(2)  # of one that was let in before
        rig.gate.let_go()
        assert [await task, await follower] == [[10], [20]]


async def test_closing_answers_everybody() -> None:
    rig = Rig(max_batch=1)
    tasks = [rig.start(1), rig.start(2)]
    await rig.gate.entered()
    rig.gate.let_go()
    rig.batcher.close()
    first, second = await asyncio.gather(*tasks, return_exceptions=True)
    # The call under way when the batcher closed may end before or after its caller was told.
    assert first == [10] or isinstance(first, ShuttingDown)
    assert isinstance(second, ShuttingDown) or second == [20]
    assert not any(thread.is_alive() for thread in rig.batcher._threads)


async def test_reports_times_and_sizes() -> None:
    async with Rig() as rig:
        before = time.monotonic()
        first = rig.start(1)
        await rig.gate.entered()
        with rig.batcher.reserve(2) as reservation:
            second = asyncio.create_task(rig.batcher.submit(reservation, "a", [2, 3]))
            await step()
            rig.gate.let_go()
            answer = await second
        await first
        assert 0 < answer.queue_s < time.monotonic() - before
        assert 0 < answer.infer_s < time.monotonic() - before
        assert before < rig.batcher.last_success < time.monotonic()


async def test_idle_threads_use_no_cpu() -> None:
    async with Rig(threads=4):
        before = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - before < 0.05
