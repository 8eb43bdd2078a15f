"""Named accidents of restarts, lost answers and deleted segments, and the state that must survive each."""

from __future__ import annotations

from typing import Any

from broker_fixtures import Peer, World, assert_same, check_whole, picture

from stageflow_brokers.core import wire
from stageflow_brokers.core.machine import Limits
from stageflow_brokers.core.message import LEASED
from stageflow_brokers.types import (
    ACK,
    FLAG_CLOSE_GROUP,
    FLAG_START,
    FLAG_WATCH,
    RETRY,
    TERMINAL,
    Arrival,
    PublishItem,
    QueueOptions,
    SettleItem,
)

TARGETS = [("q", "a"), ("next", "b"), ("fin", ":end", TERMINAL)]


def same_after_replay(world: World) -> None:
    recovered = world.recover()
    check_whole(recovered)
    assert_same(picture(recovered, clocks_agree=True), picture(world.machine, clocks_agree=True))


def give_back_oldest(world: World) -> None:
    world.disk.seal()
    world.reclaim()


def start(peer: Peer, group: str, *, epoch: int = 1, queue: str = "q", **more: Any) -> Any:
    item = (0, 4, group, epoch, FLAG_START | FLAG_WATCH, 0, 0.0, more.get("ttl", 0.0), b"d")
    return peer.publish([(queue, "a")], [item], [b"body"])


def moves(peer: Peer, target: int = 1) -> list[Any]:
    return [(item.id, item.lease, target, 1, item.group) for item in peer.held.values()]


# segments that are gone


def test_a_move_from_a_segment_that_is_gone_keeps_its_epoch() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    start(peer, "g", epoch=3)
    world.disk.seal()
    peer.settle(TARGETS, moves(peer), bodies=[b"m"])
    world.reclaim()
    same_after_replay(world)
    (message,) = world.recover().state.messages.values()
    assert (message.epoch, message.queue.name) == (3, "next")


def test_what_follows_from_a_message_of_a_segment_that_is_gone_stays_in_its_group() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    start(peer, "g")
    world.disk.seal()
    (item,) = peer.held.values()
    peer.settle(TARGETS, others=[SettleItem([(item.id, item.lease)], ACK, [PublishItem(1, 2)])], bodies=[b"xy"])
    world.reclaim()
    same_after_replay(world)
    group = world.recover().state.groups["g"]
    assert [message.queue.name for message in group.messages()] == ["next"]


def test_a_settled_message_does_not_come_back_when_the_segment_of_its_settlement_is_deleted() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 2})
    start(peer, "long")
    start(peer, "short")
    world.disk.seal()
    long, short = peer.held.values()
    peer.settle([], acks=[(short.id, short.lease, FLAG_CLOSE_GROUP, "short")])
    world.disk.seal()
    # The oldest segment holds the message, the next one its end: only in this order can they go.
    world.reclaim()
    same_after_replay(world)
    world.reclaim()
    same_after_replay(world)
    assert list(world.recover().state.messages) == [long.id]


def test_a_long_lived_message_survives_any_number_of_segments() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    start(peer, "old", ttl=1e6)
    (item,) = peer.held.values()
    peer.send(wire.CHECKPOINT, (item.id, item.lease, "paid"), b"42")
    peer.settle(TARGETS, others=[SettleItem([(item.id, item.lease)], RETRY, [], 5e5, b"boom")])
    for _ in range(10):
        give_back_oldest(world)
        same_after_replay(world)
    world.restart()
    peer.hello()
    world.pass_time(5e5)
    (again,) = peer.held.values()
    assert (again.id, peer.bodies[again.id]) == (item.id, b"body")
    assert again.extra is not None
    assert (again.extra.attempts, again.extra.failure, again.extra.steps) == (
        1,
        b"boom",
        {"paid": b"42"},
    )


# ends and epochs


def test_an_end_published_in_an_old_epoch_ends_nothing() -> None:
    world = World()
    peer = world.peer(1, consume={})
    start(peer, "g")
    peer.query("raise-epoch", "g", 2, "coordinator", "cancel")
    peer.publish(TARGETS, [(2, 3, "g", 1)], [b"end"])
    assert peer.pushes == []
    assert world.machine.state.groups["g"].end_label == ""
    same_after_replay(world)


def test_of_two_ends_in_one_call_the_one_of_the_present_epoch_counts() -> None:
    for epochs in ((1, 2), (2, 1)):
        world = World()
        peer = world.peer(1)
        start(peer, "g")
        peer.query("raise-epoch", "g", 2, "coordinator", "cancel")
        peer.publish(TARGETS, [(2, 1, "g", epoch) for epoch in epochs], [b"%d" % epoch for epoch in epochs])
        assert peer.pushes == [("g", ":end", b"2")]
        assert world.machine.state.groups["g"].end_label == ":end"
        same_after_replay(world)


def test_evidence_of_a_group_that_left_is_not_part_of_its_namesake() -> None:
    world = World(supervised=True)
    supervisor = world.peer(9, role="supervisor", consume={"coordinator": 1})
    supervisor.query("roster", [])
    supervisor.query("declare", [QueueOptions("q", 1, True, "coordinator", "dead")])
    dying = world.peer(2, consume={"q": 1}, role="worker")
    start(supervisor, "g", epoch=3)
    supervisor.query("dead", 2, [*dying.held], True, False, b"crash")
    world.pass_time(0.01)
    (told,) = supervisor.held.values()
    supervisor.settle([], acks=[(told.id, told.lease, FLAG_CLOSE_GROUP, "g")])
    give_back_oldest(world)
    start(supervisor, "g", epoch=1, queue="elsewhere")
    same_after_replay(world)
    group = world.recover().state.groups["g"]
    assert (group.epoch, [message.queue.name for message in group.messages()]) == (1, ["elsewhere"])
    world.restart()
    supervisor.hello()
    assert [letter["evidence"] for letter in supervisor.query("peek", "dlq.q", 0, 9)] == [True]


def test_messages_in_hand_when_their_epoch_was_raised_are_diverted_if_no_worker_claims_them() -> None:
    world = World(supervised=True)
    supervisor = world.peer(9, role="supervisor")
    supervisor.query("roster", [])
    workers = [world.peer(number, consume={"q": 1}, role="worker") for number in (1, 2)]
    start(supervisor, "kept")
    start(supervisor, "lost")
    for group in ("kept", "lost"):
        supervisor.query("raise-epoch", group, 2, "coordinator", "cancel")
    world.restart()
    supervisor.hello()
    supervisor.query("roster", [(1, ["q"]), (2, ["q"])])
    alive, dying = workers
    (lost,) = dying.held.values()
    alive.hello()
    coordinator = world.machine.state.queue("coordinator")
    assert coordinator.ready_count == 0
    supervisor.query("dead", dying.number, 0, False, False, b"")
    world.pass_time(0.01)
    world.round()
    assert [message.id for message in coordinator.iterate_ready()] == [lost.id]
    same_after_replay(world)


def test_what_was_diverted_does_not_outlive_a_group_that_leaves_with_the_same_settlement() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 2})
    start(peer, "g")
    peer.publish([("q", "a")], [(0, 1, "g", 1)], [b"x"])
    moved, left = peer.held.values()
    peer.query("raise-epoch", "g", 2, "coordinator", "cancel")
    peer.settle(
        TARGETS, [(moved.id, moved.lease, 2, 1, "g")], [(left.id, left.lease, FLAG_CLOSE_GROUP, "g")], bodies=[b"m"]
    )
    assert world.machine.state.messages == {}
    same_after_replay(world)
    start(peer, "g")
    same_after_replay(world)


# frames taken in part


def test_what_arrives_with_a_settlement_that_was_taken_in_part_is_kept() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 2})
    start(peer, "g")
    start(peer, "h")
    one, two = peer.held.values()
    peer.settle([], acks=[(one.id, one.lease - 1, 0, "g")], others=[_arrive(two)], bodies=[b"here"])
    assert peer.results[peer.frame] == {"stale": [one.id]}
    same_after_replay(world)
    gathers = world.recover().state.groups["h"].gathers
    assert gathers is not None
    assert gathers["k"].arrivals == {"s": b"here"}


def _arrive(item: Any) -> SettleItem:
    return SettleItem([(item.id, item.lease)], ACK, arrivals=[Arrival("k", "s", 4)])


def test_a_settlement_starts_a_group_only_if_it_is_not_live() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    start(peer, "child")
    (item,) = peer.held.values()
    again = PublishItem(1, 3, "child", 1, FLAG_START, 0, 0.0, 0.0, b"other")
    fresh = PublishItem(1, 3, "new", 1, FLAG_START, 0, 0.0, 0.0, b"d")
    peer.settle(TARGETS, others=[SettleItem([(item.id, item.lease)], RETRY, [again, fresh])], bodies=[b"old", b"new"])
    assert world.machine.state.groups["child"].digest == b"d"
    assert [message.group.id for message in world.machine.state.queue("next").iterate_ready() if message.group] == [
        "new"
    ]
    same_after_replay(world)


# answers that were lost


def test_a_settlement_taken_before_the_crash_and_sent_again_leaves_nothing_held() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    start(peer, "g")
    (item,) = peer.held.values()
    frame = peer.frame_of(wire.SETTLE, (TARGETS, [], [], [SettleItem([(item.id, item.lease)], RETRY)]))
    world.machine.begin(world.now, world.wall)
    world.machine.receive(*frame)
    world.commit()  # it is on disk, and no peer was notified
    world.restart()
    other = world.peer(2, consume={"q": 1})
    # The peer does not know, so it says that it holds the message still, and sends the frame again.
    peer.hello(next_frame=peer.frame)
    assert peer.held == {} or peer.held.keys() == {item.id}
    world.round(
        [
            (
                1,
                wire.SETTLE,
                wire.encode((peer.epoch, peer.frame, TARGETS, [], [], [SettleItem([(item.id, item.lease)], RETRY)])),
                b"",
            )
        ]
    )
    (message,) = world.machine.state.messages.values()
    assert message.ensure_delivery_state().attempts == 1
    holders = [p for p in (peer, other) if item.id in p.held and p.held[item.id].lease == message.lease]
    assert len(holders) == 1


def test_messages_released_before_the_crash_are_released_again() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    start(peer, "g")
    (item,) = peer.held.values()
    frame = peer.frame_of(wire.RELEASE, ([(item.id, item.lease)], "q", 0))
    publish = peer.frame_of(wire.PUBLISH, ([("next", "b")], [(0, 1)]), b"x")
    world.machine.begin(world.now, world.wall)
    for each in (frame, publish):
        world.machine.receive(*each)
    world.commit()
    world.restart()
    peer.hello(next_frame=peer.frame - 1)
    world.round([(1, wire.RELEASE, wire.encode((peer.epoch, peer.frame - 1, [(item.id, item.lease)], "q", 0)), b"")])
    assert world.machine.state.queue("q").ready_count == 1
    assert world.machine.state.queue("next").ready_count == 1


def test_what_was_delivered_and_never_arrived_is_delivered_again() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 3})
    for name in ("a", "b", "c"):
        start(peer, name)
    first, lost, third = peer.held.values()
    del peer.held[lost.id], peer.held[third.id]
    peer.hello()
    again = list(peer.held.values())
    assert [item.id for item in again] == [first.id, lost.id, third.id]
    assert again[0].lease == first.lease
    assert again[1].lease != lost.lease
    assert again[1].extra is None


def test_an_answer_that_was_lost_is_sent_again_within_an_epoch() -> None:
    world = World(limits=Limits(max_message_bytes=100))
    peer = world.peer(1)
    start(peer, "g")
    first = peer.frame + 1
    answers = [
        start(peer, "g"),
        peer.publish([("q", "a")], [(0, 200)], [bytes(200)]),
        peer.query("purge", "q", []),
        peer.query("purge", "q", [12345]),
        peer.publish([("q", "a")], [(0, 1)], [b"x"]),
    ]
    assert answers[2]["purged"] == 1
    start(peer, "g")  # what a second purge of everything would take
    sent = [
        (wire.PUBLISH, ([("q", "a")], [(0, 4, "g", 1, FLAG_START | FLAG_WATCH, 0, 0.0, 0.0, b"d")]), b"body"),
        (wire.PUBLISH, ([("q", "a")], [(0, 200)]), bytes(200)),
        (wire.QUERY, ("purge", ("q", [])), b""),
        (wire.QUERY, ("purge", ("q", [12345])), b""),
        (wire.PUBLISH, ([("q", "a")], [(0, 1)]), b"x"),
    ]
    peer.results.clear()
    peer.hello(next_frame=first)
    for number, (op, fields, blob) in enumerate(sent):
        world.round([(1, op, wire.encode((peer.epoch, first + number, *fields)), blob)])
        assert peer.acked >= first + number
        assert peer.results.get(first + number) == answers[number]
    assert world.machine.state.queue("q").ready_count == 2


def test_of_two_that_claim_a_message_after_a_restart_the_later_lease_counts() -> None:
    for order in ((1, 2), (2, 1)):
        world = World()
        peers = {1: world.peer(1, consume={"q": 1}), 2: world.peer(2, consume={"q": 1})}
        peers[2].query("consume", "q", 0)
        start(peers[1], "g")
        (item,) = peers[1].held.values()
        old = dict(peers[1].held)
        peers[1].query("consume", "q", 0)
        peers[2].query("consume", "q", 1)
        peers[1].release([(item.id, item.lease)])
        peers[1].held = dict(old)  # it was stopped, and knows nothing of that
        assert list(peers[2].held) == [item.id]
        world.restart()
        for number in order:
            peers[number].hello()
        assert world.machine.state.messages[item.id].lease == peers[2].held[item.id].lease
        assert peers[1].settle([], acks=[(item.id, item.lease, 0, "g")]) == {"stale": [item.id]}
        assert peers[2].settle([], acks=[(item.id, peers[2].held[item.id].lease, 0, "g")]) is None


def test_a_wall_clock_that_was_set_back_makes_no_delay_longer_than_it_was() -> None:
    world = World()
    peer = world.peer(1)
    peer.publish([("q", "a")], [(0, 0, "", 0, 0, 0, 60.0), (0, 0, "", 0, 0, 0, 0.0, 30.0)], [])
    world.wall -= 10_000
    world.restart()
    due = world.machine.next_deadline()
    assert due is not None
    assert due - world.now <= 60.0
    (waiting,) = world.machine.state.queue("q").iterate_ready()
    assert waiting.ensure_delivery_state().expires - world.now <= 30.0


def test_a_death_that_is_reported_again_after_a_restart_is_charged_once() -> None:
    world = World(supervised=True)
    supervisor, worker = world.peer(1, role="supervisor"), world.peer(2, consume={"q": 1}, role="worker")
    supervisor.query("declare", [QueueOptions("q", 3)])
    supervisor.query("roster", [])
    supervisor.publish([("q", "a")], [(0, 1, "g", 1, FLAG_START)], [b"1"])
    ((id, _),) = worker.held.items()
    death = (2, id, True, False, b"SIGSEGV")
    supervisor.query("dead", *death)
    world.pass_time(0.01)
    told = supervisor.frame
    assert world.machine.state.messages[id].delivery_state.deaths == 1  # type: ignore[union-attr]
    del world.peers[2]
    world.restart()
    supervisor.hello(next_frame=told)
    world.round([(1, wire.QUERY, wire.encode((supervisor.epoch, told, "dead", death)), b"")])
    world.pass_time(0.01)
    extra = world.machine.state.messages[id].delivery_state
    assert extra is not None
    assert (extra.deaths, extra.failure) == (1, b"SIGSEGV")
    check_whole(world.machine)
    assert_same(picture(world.recover(), clocks_agree=True), picture(world.machine, clocks_agree=True))


def test_a_delayed_message_that_has_been_delivered_stays_its_holders_though_the_clock_is_set_back() -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    peer.publish([("q", "a")], [(0, 1, "g", 1, FLAG_START, 0, 5.0)], [b"1"])
    world.pass_time(6.0)
    ((id, item),) = peer.held.items()
    world.wall -= 100
    world.restart()
    peer.hello()
    assert list(peer.held) == [id]
    assert world.machine.state.messages[id].state() == LEASED
    assert peer.settle([], acks=[(id, item.lease, 0, "g")]) is None
