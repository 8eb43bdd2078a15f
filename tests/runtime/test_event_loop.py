"""The turns of messages on an event loop: who is resumed, whose time a blocked loop does not count against."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from stageflow_actors import StageError, StageTimeout
from stageflow_actors.runtime.worker.event_loop import EventLoop, LoopCall


class Slot:
    """A slot that records what the loop writes. `turn`: a coroutine of the message is being resumed."""

    def __init__(self, timeout_ns: int = 0) -> None:
        self.turn = False
        self.turns = 0
        self.cancelled = False
        self.excused_ns = 0
        self.timeout_ns = timeout_ns
        self.graces: list[int] = []

    def begin_turn(self, now_ns: int) -> None:
        self.turn = True
        self.turns += 1

    def end_turn(self) -> None:
        self.turn = False

    def excuse(self, blocked_ns: int) -> None:
        self.excused_ns += blocked_ns

    def is_cancelled(self) -> bool:
        return self.cancelled

    def set_grace(self, grace_ns: int) -> None:
        self.graces.append(grace_ns)

    def time_limit(self, now_ns: int) -> tuple[int, int] | None:
        return (self.timeout_ns, self.timeout_ns) if self.timeout_ns else None


def start(loop: EventLoop, slot: Slot, coroutine: Any) -> LoopCall:
    """Begin a message, as the actor of async handlers does."""
    call = LoopCall(loop, slot)
    context = contextvars.copy_context()
    context.run(call.enter)
    call.task = loop.loop.create_task(coroutine, context=context)
    call.task.add_done_callback(lambda task: call.close())
    return call


@pytest.fixture
def loop() -> Any:
    made = EventLoop()
    yield made
    if not made.loop.is_running():  # in a thread of its own: to the end of the process, as in a worker
        made.loop.close()


def finish(loop: EventLoop, *calls: LoopCall) -> list[Any]:
    async def wait() -> list[Any]:
        return await asyncio.gather(*(call.task for call in calls if call.task), return_exceptions=True)

    return loop.loop.run_until_complete(wait())


async def twice(seen: Callable[[], Any]) -> list[Any]:
    first = seen()
    await asyncio.sleep(0)
    return [first, seen()]


async def in_a_task(seen: Callable[[], Any]) -> list[Any]:
    return await asyncio.create_task(twice(seen))


async def in_a_group(seen: Callable[[], Any]) -> list[Any]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(twice(seen))
    return task.result()


async def under_a_timeout(seen: Callable[[], Any]) -> list[Any]:
    return await asyncio.wait_for(twice(seen), 10)


async def after_an_error(seen: Callable[[], Any]) -> list[Any]:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_exception, ValueError("thrown into it"))
    try:
        await future
    except ValueError:
        return [seen(), seen()]
    return []


@pytest.mark.parametrize("form", [twice, in_a_task, in_a_group, under_a_timeout, after_an_error])
def test_each_resumption_is_a_turn_of_its_message_and_of_no_other(loop: EventLoop, form: Any) -> None:
    slots = [Slot() for _ in range(3)]

    def seen() -> list[bool]:
        return [slot.turn for slot in slots]

    results = finish(loop, *(start(loop, slot, form(seen)) for slot in slots))
    assert results == [[[number == me for number in range(3)]] * 2 for me in range(3)]
    assert not any(slot.turn for slot in slots)
    assert all(slot.turns >= 2 for slot in slots)


def test_a_task_that_outlives_its_message_takes_no_turn_in_a_slot_that_serves_another(loop: EventLoop) -> None:
    slot = Slot()
    seen: list[bool] = []
    left: list[asyncio.Task[None]] = []

    async def outlive(gate: asyncio.Event) -> None:
        await gate.wait()
        seen.append(slot.turn)

    async def leave() -> None:
        left.append(asyncio.create_task(outlive(gate)))
        await asyncio.sleep(0)

    gate = asyncio.Event()
    finish(loop, start(loop, slot, leave()))
    turns = slot.turns
    gate.set()
    loop.loop.run_until_complete(left[0])
    assert (seen, slot.turns) == ([False], turns)


def test_time_in_which_another_message_blocks_the_loop_counts_against_nobody_else(loop: EventLoop) -> None:
    patient, blocking = Slot(), Slot()
    begun = asyncio.Event()

    async def wait() -> str:
        begun.set()
        await asyncio.sleep(0.25)
        return "finished"

    async def block() -> None:
        await begun.wait()
        time.sleep(0.3)  # noqa: ASYNC251 - what this is about

    calls = start(loop, patient, wait()), start(loop, blocking, block())
    for call in calls:
        call.limit(0.2, StageTimeout("late"))
    results = finish(loop, *calls)
    assert results[0] == "finished", "it had 0.2 s of its own, and 0.3 s more"
    assert (patient.excused_ns >= 300_000_000, blocking.excused_ns) == (True, 0)


def test_a_message_over_its_time_is_cancelled_and_the_others_go_on(loop: EventLoop) -> None:
    async def work(gate: asyncio.Event) -> str:
        await gate.wait()
        return "finished"

    async def open_gate(gate: asyncio.Event, late: LoopCall) -> None:
        await asyncio.wait([late.task] if late.task else [])
        gate.set()

    gate = asyncio.Event()
    calls = [start(loop, Slot(), work(asyncio.Event() if number == 2 else gate)) for number in range(5)]
    calls[2].limit(0.01, StageTimeout("late"))
    loop.loop.create_task(open_gate(gate, calls[2]))
    results = finish(loop, *calls)
    assert [result == "finished" for result in results] == [True, True, False, True, True]
    assert isinstance(results[2], asyncio.CancelledError)
    assert str(calls[2].reason) == "late"
    assert [calls[number].reason for number in (0, 1, 3, 4)] == [None] * 4


def test_a_message_that_the_node_cancels_is_cancelled_while_a_thread_waits_for_it(loop: EventLoop) -> None:
    slots = [Slot() for _ in range(3)]
    ended: list[tuple[int, str]] = []

    async def work(number: int) -> None:
        try:
            slots[number].cancelled = number == 1
            if number != 1:
                return
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append((number, "cleaned up"))
            raise

    def serve(number: int) -> None:
        try:
            loop.run(work(number), slots[number], "stage 's'")
            ended.append((number, "finished"))
        except StageError as error:
            ended.append((number, str(error)))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(ended) == [
        (0, "finished"),
        (1, "cleaned up"),
        (1, "the instance was cancelled"),
        (2, "finished"),
    ]


def test_a_thread_waits_for_what_runs_on_the_loop_of_the_worker(loop: EventLoop) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    slots = [Slot(10**10) for _ in range(4)]
    together = threading.Barrier(4)
    results: list[Any] = []

    async def work(name: str, slot: Slot) -> Any:
        await asyncio.sleep(0)
        return name, variable.get(), slot.turn, id(asyncio.get_running_loop())

    async def fail() -> None:
        raise SystemExit(3)

    def serve(name: str, slot: Slot) -> None:
        variable.set(f"of {name}")
        together.wait(10)
        results.append(loop.run(work(name, slot), slot, "stage 's'"))
        with pytest.raises(SystemExit):
            loop.run(fail(), slot, "stage 's'")
        results.append(loop.run(work(name, slot), slot, "stage 's'"))

    threads = [threading.Thread(target=serve, args=(str(n), slots[n])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == sorted([(n, f"of {n}", True, id(loop.loop)) for n in "0123"] * 2)
    assert slots[0].graces[:2] == [1_000_000_000, 0]
    with pytest.raises(StageTimeout, match=r"stage 's' ran longer than its timeout of 0\.01 s"):
        loop.run(asyncio.sleep(60), Slot(10_000_000), "stage 's'")
