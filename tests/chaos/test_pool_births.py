"""A pool and its zygotes: workers that cannot be asked for, and zygotes that go while others are made."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.runtime.pool import Pool, Tick, ZygoteLost
from stageflow_actors.runtime.pool_services import PoolServices
from stageflow_actors.runtime.programs import PoolSpec
from stageflow_actors.runtime.slots import SlotTable


class Zygote:
    """Notes what it is asked for, or fails with `error`."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.asked: list[str] = []

    def spawn(self, worker_id: str, payload: bytes, slot: int, env: Any, *, stderr: int) -> None:
        self.asked.append(worker_id)
        if self.error:
            raise OSError(self.error, "no")


class Broker:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def query(self, name: str, *args: Any) -> Any:
        self.told.append((name, *args))
        return SimpleNamespace(add_done_callback=lambda callback: None)


class Nursery:
    """A pool of three actors outside any actor system, so that each step is looked at."""

    def __init__(self, slots: SlotTable) -> None:
        self.zygote = Zygote()
        self.broker = Broker()
        self.said: list[str] = []
        workflow = Workflow("w").add_stage(lambda context: None, id="s")
        plan = compile_plan(workflow, Naming())
        self.services = PoolServices(
            slots=slots,
            zygote=lambda: cast(Any, self.zygote),
            broker=cast(Any, self.broker),
            address="ipc://nowhere",
            naming=Naming(),
            max_message_bytes=1000,
            log_level="WARNING",
            notify=self.said.append,
        )
        spec = PoolSpec("q", "w", "s", "stage", 3, {}, b"", plan)
        self.pool = Pool(spec, self.services)

    def buried(self) -> int:
        return sum(1 for told in self.broker.told if told[0] == "dead")


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    slots = SlotTable.create(16)
    yield Nursery(slots)
    slots.close()


def test_a_zygote_that_is_closed_already_is_asked_once_per_worker_until_its_end_is_told(nursery: Nursery) -> None:
    gone = nursery.zygote = Zygote(errno.EBADF)
    nursery.pool.on_start()
    for _ in range(10):
        nursery.pool.on_receive(Tick())
    assert len(gone.asked) == 3
    successor = nursery.zygote = Zygote()
    nursery.pool.on_receive(ZygoteLost(cast(Any, gone)))
    assert len(successor.asked) == 3
    assert nursery.buried() == 3
    assert nursery.said == []
    assert len(nursery.services.live) == 3


def test_without_room_for_processes_a_pool_asks_again_later_and_not_at_once(nursery: Nursery) -> None:
    full = nursery.zygote = Zygote(errno.EMFILE)
    nursery.pool.on_start()
    for _ in range(10):
        nursery.pool.on_receive(Tick())
    assert len(full.asked) == 1
    assert nursery.services.is_restless("q"), "it wants to be told when time has passed"
    assert nursery.services.live == {}


def test_the_loss_of_a_zygote_does_not_touch_workers_of_its_successor(nursery: Nursery) -> None:
    first = nursery.zygote
    nursery.pool.on_start()
    second = nursery.zygote = Zygote()
    nursery.pool.on_receive(ZygoteLost(cast(Any, first)))
    nursery.pool.on_receive(ZygoteLost(cast(Any, first)))
    assert len(second.asked) == 3
    assert nursery.buried() == 3
    assert not nursery.services.is_restless("q")
