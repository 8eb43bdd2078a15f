"""A pool and its zygotes: workers that cannot be started, and zygotes that end while others are made."""

from __future__ import annotations

import errno
from typing import Any

from stageflow_actors.runtime.node.pool import Tick, ZygoteLost


def test_a_zygote_that_is_closed_already_is_asked_once_per_worker_until_its_end_is_reported(nursery: Any) -> None:
    nursery = nursery()
    gone = nursery.new_zygote(errno.EBADF)
    nursery.pool.on_start()
    for _ in range(10):
        nursery.pool.on_receive(Tick())
    assert len(gone.asked) == 3
    successor = nursery.new_zygote()
    nursery.pool.on_receive(ZygoteLost(gone))
    assert len(successor.asked) == 3
    assert len(nursery.buried()) == 3
    assert nursery.said == []
    assert len(nursery.pool_context.live) == 3


def test_without_room_for_processes_a_pool_asks_again_later_and_not_at_once(nursery: Any) -> None:
    nursery = nursery()
    full = nursery.new_zygote(errno.EMFILE)
    nursery.pool.on_start()
    for _ in range(10):
        nursery.pool.on_receive(Tick())
    assert len(full.asked) == 1
    assert nursery.pool_context.is_active("q"), "it wants to be told when time has passed"
    assert nursery.pool_context.live == {}


def test_the_loss_of_a_zygote_does_not_touch_workers_of_its_successor(nursery: Any) -> None:
    nursery = nursery()
    first = nursery.zygote
    nursery.pool.on_start()
    second = nursery.new_zygote()
    nursery.pool.on_receive(ZygoteLost(first))
    nursery.pool.on_receive(ZygoteLost(first))
    assert len(second.asked) == 3
    assert len(nursery.buried()) == 3
    for id in second.asked:
        nursery.ready(nursery.birth(id))
    nursery.pool.on_receive(Tick())
    assert not nursery.pool_context.is_active("q")
