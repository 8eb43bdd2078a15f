"""The messages that a worker holds, from delivery to settlement: none is dropped, run twice or delayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pykka
import pytest

from stageflow_actors.runtime.ipc.slots import Slot, SlotTable
from stageflow_actors.runtime.messaging.settlements import Settlement
from stageflow_actors.runtime.worker.actor import StageActor
from stageflow_actors.runtime.worker.mailbox import WORK, Mailbox
from stageflow_brokers.api import ACK, RETRY, DeliveryItem, SettleItem, Target


class Recorder:
    """A broker that records its calls."""

    def __init__(self) -> None:
        self.settled: list[tuple[int, int]] = []
        self.released: list[tuple[int, int]] = []
        self.prefetch = -1

    def settle(self, targets: Any, moves: Sequence[Any], acks: Any, others: Any, bodies: Any, **more: Any) -> None:
        self.settled += [(move[0], move[1]) for move in moves]
        self.prefetch = more["prefetch"]

    def release(self, leases: Sequence[tuple[int, int]], queue: str, prefetch: int) -> Future[None]:
        self.released += leases
        self.prefetch = prefetch
        self.confirmation: Future[None] = Future()
        return self.confirmation


class Work:
    """A handler that notes what it ran; `during` is called within."""

    targets = (Target("next", "two"),)

    def __init__(self) -> None:
        self.ran: list[tuple[int, int]] = []
        self.during: Callable[[int], None] = lambda id: None
        self.otherwise: dict[int, Settlement] = {}

    def __call__(self, item: DeliveryItem, body: bytes) -> tuple[int, bytes] | Settlement:
        self.ran.append((item.id, item.lease))
        self.during(item.id)
        return self.otherwise.get(item.id, (0, body))


class Hand:
    """A worker's mailbox and actor, with nothing around them."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.mailbox = Mailbox("q")
        self.work = Work()
        self.broker = Recorder()
        given = cast(Any, SimpleNamespace(queue="q", max_tasks=0))
        self.actor = StageActor(cast(Any, self.work), self.mailbox, given, slot)
        self.mailbox.broker = cast(Any, self.broker)
        self.mailbox.actor = cast(Any, SimpleNamespace(actor_ref=SimpleNamespace(tell=lambda word: None)))

    def deliver(self, *leases: tuple[int, int]) -> None:
        items = [DeliveryItem(id, lease, 1, "g", 1) for id, lease in leases]
        self.mailbox.on_deliveries("q", items, [b"x"] * len(items))
        self.mailbox.actor = self.actor

    def run(self) -> None:
        self.actor.on_receive(WORK)


@pytest.fixture
def hand() -> Iterator[Hand]:
    table = SlotTable.create(1)
    yield Hand(table[0])
    pykka.ActorRegistry.stop_all()


def test_what_is_done_is_settled_also_when_the_last_that_came_was_lost(hand: Hand) -> None:
    hand.deliver((1, 11), (2, 12))
    hand.mailbox.on_lost([2])
    hand.run()
    assert hand.work.ran == [(1, 11)]
    assert hand.broker.settled == [(1, 11)]


def test_a_message_that_was_lost_and_comes_again_under_another_lease_is_run(hand: Hand) -> None:
    hand.deliver((1, 11), (2, 12))
    hand.mailbox.on_lost([2, 3])
    hand.run()
    hand.deliver((2, 22), (3, 23))
    hand.run()
    assert hand.work.ran == [(1, 11), (2, 22), (3, 23)]
    assert hand.broker.settled == [(1, 11), (2, 22), (3, 23)]


def test_a_recall_during_a_long_message_hands_on_what_is_done_and_returns_what_has_not_begun(hand: Hand) -> None:
    hand.deliver((1, 11), (2, 12), (3, 13), (4, 14))

    def recall(id: int) -> None:
        if id == 2:
            hand.mailbox.on_notice("recall", None)
            assert hand.broker.settled == [(1, 11)]
            assert hand.broker.released == [(3, 13), (4, 14)]
            assert hand.broker.prefetch == 1
            assert hand.mailbox.holding() == [(2, 12)]

    hand.work.during = recall
    hand.run()
    assert hand.work.ran == [(1, 11), (2, 12)]
    assert hand.broker.settled == [(1, 11), (2, 12)]


def test_nothing_begins_once_the_queue_is_paused_and_what_waits_is_released_in_order(hand: Hand) -> None:
    flag = bytearray(1)
    hand.mailbox.paused = flag

    def pause(id: int) -> None:
        flag[0] = id == 2

    hand.work.during = pause
    hand.deliver((1, 11), (2, 12), (3, 13), (4, 14))
    hand.run()
    assert hand.work.ran == [(1, 11), (2, 12)]
    assert hand.broker.settled == [(1, 11), (2, 12)], "what is done does not wait for the end of the pause"
    assert hand.mailbox.holding() == [(3, 13), (4, 14)]
    hand.mailbox.on_notice("recall", None)
    assert hand.broker.released == [(3, 13), (4, 14)]
    assert hand.mailbox.holding() == []


def test_what_was_on_its_way_during_a_release_does_not_overtake_what_was_released(hand: Hand) -> None:
    hand.deliver((1, 11), (2, 12))
    hand.mailbox.on_notice("recall", None)
    first = hand.broker.confirmation
    hand.deliver((3, 13))
    assert hand.broker.released == [(1, 11), (2, 12), (3, 13)]
    first.set_result(None)
    hand.deliver((1, 21))  # the broker has not received the second release: the next ones may be on their way
    assert hand.broker.released[3:] == [(1, 21)]
    hand.broker.confirmation.set_result(None)
    assert hand.mailbox.holding() == []
    hand.run()
    assert hand.work.ran == []


def test_deliveries_after_a_release_was_received_are_kept(hand: Hand) -> None:
    hand.deliver((1, 11), (2, 12))
    hand.mailbox.on_notice("recall", None)
    hand.broker.confirmation.set_result(None)
    hand.deliver((1, 21), (2, 22))
    hand.run()
    assert hand.work.ran == [(1, 21), (2, 22)]


def test_a_message_that_the_executor_declines_is_released_and_not_settled(hand: Hand) -> None:
    declined = Settlement(SettleItem([(2, 12)], RETRY), [], [])
    declined.declined = True
    hand.work.otherwise = {2: declined}
    hand.deliver((1, 11), (2, 12), (3, 13))
    hand.run()
    assert hand.broker.settled == [(1, 11)]
    assert hand.broker.released == [(2, 12)]
    assert hand.mailbox.holding() == [(3, 13)], "no other one begins before the recall"


def test_deliveries_that_waited_for_the_end_of_a_pause_begin_after_a_reconnect(hand: Hand) -> None:
    flag = bytearray(b"\1")
    hand.mailbox.paused = flag
    hand.deliver((1, 11))
    hand.run()
    flag[0] = 0
    told: list[str] = []
    hand.mailbox.actor = cast(Any, SimpleNamespace(actor_ref=SimpleNamespace(tell=told.append)))
    hand.mailbox.on_connected(2)
    assert told == [WORK]
    hand.mailbox.actor = hand.actor
    hand.run()
    assert hand.work.ran == [(1, 11)]


def test_a_worker_whose_messages_have_become_slow_releases_the_last_of_them(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(id: int) -> None:
        now[0] += 0.04

    hand.work.during = work
    hand.deliver(*((id, id + 10) for id in range(1, 9)))
    hand.run()
    assert hand.work.ran == [(id, id + 10) for id in range(1, 4)]
    assert hand.broker.released == [(id, id + 10) for id in range(4, 9)]
    assert hand.broker.prefetch == 2


def test_every_message_is_accounted_for_at_any_moment(hand: Hand) -> None:
    leases = [(id, id + 10) for id in range(1, 9)]

    def look(id: int) -> None:
        assert sorted([*hand.mailbox.holding(), *hand.broker.settled]) == leases

    hand.work.during = look
    hand.deliver(*leases)
    assert hand.mailbox.holding() == leases
    hand.run()
    assert hand.mailbox.holding() == []
    assert hand.broker.settled == leases


def test_only_what_ran_here_counts_as_a_success(hand: Hand) -> None:
    """A worker that has found out how others died, and dies itself, is one more in a row."""

    def settled(id: int, outcome: int) -> Settlement:
        return Settlement(SettleItem([(id, id + 10)], outcome), [], [])

    hand.work.otherwise = {1: settled(1, ACK), 2: settled(2, RETRY)}
    hand.deliver((1, 11), (2, 12))
    hand.run()
    assert hand.slot.read().settled == 0
    hand.work.otherwise = {3: settled(3, ACK).mark_succeeded(), 4: settled(4, RETRY).mark_failed()}
    hand.deliver((3, 13), (4, 14), (5, 15))
    hand.run()
    assert hand.slot.read().settled == 3
