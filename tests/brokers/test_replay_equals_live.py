"""After any commands, a replay of the journal gives the live state, whichever old segments are deleted."""

from __future__ import annotations

from typing import Any

import pytest
from broker_fixtures import Peer, World, assert_same, check_whole, picture
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stageflow_brokers.core import state as store
from stageflow_brokers.core import wire
from stageflow_brokers.types import (
    ACK,
    DEAD_LETTER,
    FLAG_CHECK,
    FLAG_CLOSE_GROUP,
    FLAG_START,
    FLAG_WATCH,
    PUSH_ONLY,
    RETRY,
    TERMINAL,
    Arrival,
    GatherOpen,
    PublishItem,
    QueueOptions,
    SettleItem,
)

SUPERVISOR = 99
PUBLISHERS = (1, 2)
WORKERS = (0, 1, 2)  # who takes the place of a dead one is another peer
CONSUMED = ({"q0": 3, "q1": 1}, {"q0": 2, "q2": 2}, {"fin": 2, "coord": 2, "q1": 2})

queues = st.sampled_from(["q0", "q1", "q2"])
groups = st.sampled_from(["g0", "g1", "g2"])
some_group = st.sampled_from(["", "g0", "g1", "g2"])
epochs = st.sampled_from([1, 1, 1, 2, 3, 0])
bodies = st.binary(max_size=12)
TARGETS = [
    ("q0", "a", 0),
    ("q1", "b", 0),
    ("q2", "c", 0),
    ("fin", ":end", TERMINAL),
    ("", ":news", PUSH_ONLY),
    ("coord", "failed", 0),
]
PLAIN = st.sampled_from([0, 1, 2, 3, 5])
ANY = st.integers(0, 5)
keys = st.sampled_from(["k0", "k1"])
slots = st.sampled_from(["s0", "s1", "s2", "s3"])


@st.composite
def items(draw: st.DrawFn, group: st.SearchStrategy[str] = some_group) -> tuple[tuple[Any, ...], bytes]:
    body = draw(bodies)
    flags = draw(st.sampled_from([0, 0, FLAG_START, FLAG_START | FLAG_WATCH, FLAG_START | FLAG_CHECK]))
    name = draw(group)
    if not name:
        flags = 0
    return (
        draw(ANY),
        len(body),
        name,
        draw(epochs),
        flags,
        draw(st.sampled_from([0, 0, 0, 1, -1])),
        draw(st.sampled_from([0.0, 0.0, 5.0])),
        draw(st.sampled_from([0.0, 0.0, 7.0])),
        draw(st.sampled_from([b"d0", b"d1"])) if flags else None,
        0,
    ), body


@st.composite
def openings(draw: st.DrawFn, group: st.SearchStrategy[str] = groups) -> tuple[tuple[Any, ...], bytes]:
    body = draw(bodies)
    return (
        draw(keys),
        draw(st.integers(0, 2)),
        draw(PLAIN),
        len(body),
        draw(group),
        draw(epochs),
        draw(st.sampled_from([0.0, 6.0])),
    ), body


@st.composite
def arrivals(draw: st.DrawFn, group: st.SearchStrategy[str] = groups) -> tuple[tuple[Any, ...], bytes]:
    body = draw(bodies)
    return (draw(keys), draw(slots), len(body), draw(group), draw(epochs)), body


class BrokerAndItsReplay(RuleBasedStateMachine):
    """Random commands; after each, the state is compared with that of a replay of what is on disk."""

    world: World

    @initialize(supervised=st.booleans())
    def begin(self, supervised: bool) -> None:
        self.world = World(supervised=supervised)
        self.workers: list[Peer] = []
        self.hired = 9
        self.world.peer(SUPERVISOR, role="supervisor")
        for number in PUBLISHERS:
            self.world.peer(number)
        for place in WORKERS:
            self.workers.append(self._hire(place))
        supervisor = self.world.peers[SUPERVISOR]
        supervisor.query("roster", [])
        supervisor.query(
            "declare",
            [
                QueueOptions("q0", 2, True, "coord", "dead"),
                QueueOptions("q1", 1, breaker_failures=1, breaker_reset=3.0),
                QueueOptions("q2", 0),
            ],
        )

    def _hire(self, place: int) -> Peer:
        self.hired += 1
        return self.world.peer(self.hired, consume=CONSUMED[place], role="worker")

    def _worker(self, place: int) -> Peer:
        return self._welcomed(self.workers[place].number)

    def _welcomed(self, number: int) -> Peer:
        peer = self.world.peers[number]
        if not peer.welcomed:
            peer.hello()
        return peer

    # what publishers do

    @rule(
        peer=st.sampled_from(PUBLISHERS),
        new=st.lists(items(), max_size=4),
        opens=st.lists(openings(), max_size=1),
        arrived=st.lists(arrivals(), max_size=2),
        atomic=st.booleans(),
    )
    def publish(self, peer: int, new: list[Any], opens: list[Any], arrived: list[Any], atomic: bool) -> None:
        parts = [*new, *opens, *arrived]
        self._welcomed(peer).publish(
            TARGETS,
            [item for item, _ in new],
            [body for _, body in parts],
            atomic=atomic,
            opens=[opening for opening, _ in opens],
            arrivals=[arrival for arrival, _ in arrived],
        )

    @rule(group=groups, queue=queues, epoch=epochs, more=st.integers(0, 2), ttl=st.sampled_from([0.0, 0.0, 7.0]))
    def start(self, group: str, queue: str, epoch: int, more: int, ttl: float) -> None:
        """One message that starts a group, and others that belong to it."""
        others = [(0, 1, group, epoch)] * more
        start = (0, 1, group, epoch, FLAG_START | FLAG_WATCH, 0, 0.0, ttl, b"d")
        self._welcomed(1).publish([(queue, "a")], [start, *others], [b"x"] * (more + 1))

    # what workers do

    @rule(place=st.sampled_from(WORKERS), data=st.data())
    def settle(self, place: int, data: st.DataObject) -> None:
        worker = self._worker(place)
        held = list(worker.held.values())
        moves: list[Any] = []
        acks: list[Any] = []
        others: list[Any] = []
        move_bodies: list[bytes] = []
        other_bodies: list[bytes] = []
        for item in held:
            what = data.draw(st.sampled_from(["keep", "move", "move", "ack", "leave", "other"]), label=f"to {item.id}")
            lease = item.lease - data.draw(st.sampled_from([0, 0, 0, 0, 1]), label="stale by")
            if what == "move":
                body = data.draw(bodies)
                moves.append((item.id, lease, data.draw(PLAIN), len(body), item.group))
                move_bodies.append(body)
            elif what == "ack":
                acks.append((item.id, lease, 0, item.group))
            elif what == "leave":
                acks.append((item.id, lease, FLAG_CLOSE_GROUP, item.group))
            elif what == "other":
                new = data.draw(st.lists(items(), max_size=2))
                opens = data.draw(st.lists(openings(some_group), max_size=1))
                arrived = data.draw(st.lists(arrivals(some_group), max_size=2))
                others.append(
                    SettleItem(
                        [(item.id, lease)],
                        data.draw(st.sampled_from([ACK, ACK, RETRY, DEAD_LETTER])),
                        [PublishItem(*each) for each, _ in new],
                        data.draw(st.sampled_from([0.0, 4.0])),
                        data.draw(st.sampled_from([None, b"boom"])),
                        [GatherOpen(*each) for each, _ in opens],
                        [Arrival(*each) for each, _ in arrived],
                        data.draw(st.sampled_from(["", "", "", item.group])),
                    )
                )
                other_bodies.extend(body for _, body in (*new, *opens, *arrived))
        if others and len(others) > 1 and data.draw(st.booleans(), label="join two"):
            second = others.pop(1)
            if not (second.publishes or second.opens or second.arrivals):
                others[0].leases.extend(second.leases)
            else:
                others.insert(1, second)
        if moves or acks or others:
            worker.settle(TARGETS, moves, acks, others, move_bodies + other_bodies)

    @rule(place=st.sampled_from(WORKERS), to=PLAIN)
    def move_all_on(self, place: int, to: int) -> None:
        worker = self._worker(place)
        held = list(worker.held.values())
        worker.settle(TARGETS, [(item.id, item.lease, to, 1, item.group) for item in held], bodies=[b"m"] * len(held))

    @rule(place=st.sampled_from(WORKERS), flags=st.sampled_from([0, FLAG_CLOSE_GROUP]))
    def acknowledge_all(self, place: int, flags: int) -> None:
        worker = self._worker(place)
        worker.settle(TARGETS, acks=[(item.id, item.lease, flags, item.group) for item in list(worker.held.values())])

    @rule(
        place=st.sampled_from(WORKERS), outcome=st.sampled_from([RETRY, DEAD_LETTER]), delay=st.sampled_from([0.0, 4.0])
    )
    def fail_all(self, place: int, outcome: int, delay: float) -> None:
        worker = self._worker(place)
        held = list(worker.held.values())
        worker.settle(TARGETS, others=[SettleItem([(each.id, each.lease)], outcome, [], delay, b"no") for each in held])

    @rule(place=st.sampled_from(WORKERS), name=st.sampled_from(["x", "y"]), value=bodies)
    def checkpoint(self, place: int, name: str, value: bytes) -> None:
        worker = self._worker(place)
        if worker.held:
            item = next(iter(worker.held.values()))
            worker.send(wire.CHECKPOINT, (item.id, item.lease, name), value)

    @rule(place=st.sampled_from(WORKERS), count=st.integers(1, 3))
    def release(self, place: int, count: int) -> None:
        worker = self._worker(place)
        worker.release([(item.id, item.lease) for item in list(worker.held.values())[-count:]])

    @rule(place=st.sampled_from(WORKERS), forget=st.integers(0, 2))
    def say_hello_again(self, place: int, forget: int) -> None:
        """As after a broken connection: some of what was delivered never arrived."""
        worker = self.workers[place]
        for id in list(worker.held)[:forget]:
            del worker.held[id]
        worker.hello()

    @rule(
        place=st.sampled_from(WORKERS),
        guilty=st.integers(0, 2),
        charge=st.booleans(),
        attempt=st.booleans(),
        failure=st.sampled_from([b"", b"crash"]),
    )
    def die(self, place: int, guilty: int, charge: bool, attempt: bool, failure: bytes) -> None:
        worker = self.workers[place]
        culprits = list(worker.held)[:guilty]
        self._welcomed(SUPERVISOR).query("dead", worker.number, culprits, charge, attempt, failure)
        self.world.pass_time(0.01)
        del self.world.peers[worker.number]
        self.workers[place] = self._hire(place)

    @rule(place=st.sampled_from(WORKERS), polite=st.booleans())
    def go_and_come_back(self, place: int, polite: bool) -> None:
        worker = self._worker(place)
        if polite:
            worker.query("bye")
        else:
            self.world.machine.disconnect(worker.number)
            self.world.round()
        worker.hello()

    # what operators do

    @rule(group=groups, epoch=st.integers(1, 4))
    def raise_epoch(self, group: str, epoch: int) -> None:
        self._welcomed(1).query("raise-epoch", group, epoch, "coord", "cancel")

    @rule(group=groups, prefixes=st.sampled_from([[], ["k"], ["k1"]]))
    def cancel(self, group: str, prefixes: list[str]) -> None:
        self._welcomed(1).query("cancel", group, "no longer wanted", prefixes)

    @rule(group=groups, ids=st.lists(st.integers(1, 30), max_size=3))
    def hand_over(self, group: str, ids: list[int]) -> None:
        self._welcomed(1).query("hand-over", group, ids, "coord", "passed")

    def _dead_queues(self) -> list[str]:
        return sorted(queue.name for queue in self.world.machine.state.queues.values() if queue.dead_letters)

    @precondition(lambda self: self._dead_queues())
    @rule(choice=st.integers(0, 5), body=bodies)
    def replace_dead_letter(self, choice: int, body: bytes) -> None:
        queues = self._dead_queues()
        queue = queues[choice % len(queues)]
        dead = list(self.world.machine.state.queue(queue).dead_letters)
        self._welcomed(1).query("replace", f"dlq.{queue}", dead[0] if dead else 0, body)

    @rule(group=groups, queue=queues, body=bodies)
    def restart(self, group: str, queue: str, body: bytes) -> None:
        self._welcomed(1).query("restart", group, queue, "again", body)

    @precondition(lambda self: self._dead_queues())
    @rule(choice=st.integers(0, 5), some=st.booleans())
    def requeue(self, choice: int, some: bool) -> None:
        queues = self._dead_queues()
        queue = queues[choice % len(queues)]
        dead = list(self.world.machine.state.queue(queue).dead_letters)
        self._welcomed(1).query("requeue", f"dlq.{queue}", dead[:1] if some else [])

    @rule(queue=queues, dead=st.booleans(), some=st.booleans())
    def purge(self, queue: str, dead: bool, some: bool) -> None:
        known = self.world.machine.state.queue(queue)
        ids = list(known.dead_letters) if dead else [message.id for message in known.iterate_ready()]
        self._welcomed(1).query("purge", f"dlq.{queue}" if dead else queue, ids[:1] if some else [])

    @rule(queue=queues, paused=st.booleans())
    def pause_or_resume(self, queue: str, paused: bool) -> None:
        self._welcomed(1).query("pause" if paused else "resume", queue)

    @rule(value=st.sampled_from(["x", "y"]))
    def keep_fact(self, value: str) -> None:
        self._welcomed(1).query("fact", "name", value)

    # operations without a peer

    @rule(seconds=st.sampled_from([0.5, 4.5, 8.0]), drift=st.sampled_from([0.0, 0.0, 1.5, -1.0]))
    def pass_time(self, seconds: float, drift: float) -> None:
        self.world.pass_time(seconds, drift=drift)

    @rule()
    def next_segment(self) -> None:
        self.world.disk.seal()

    @precondition(lambda self: len(self.world.disk.segments) > 1)
    @rule(budget=st.sampled_from([0, 150, 10_000]))
    def reclaim(self, budget: int) -> None:
        self.world.reclaim(budget)

    @rule()
    def crash_and_restart(self) -> None:
        self.world.restart()
        check_whole(self.world.machine)
        roster = [(worker.number, list(worker.consuming)) for worker in self.workers]
        self._welcomed(SUPERVISOR).query("roster", roster)
        for peer in self.world.peers.values():
            if not peer.welcomed:
                peer.hello()

    @invariant()
    def a_replay_makes_the_same_state(self) -> None:
        world = self.world
        check_whole(world.machine)
        recovered = world.recover()
        check_whole(recovered)
        agree = world.clocks_agree
        assert_same(picture(recovered, clocks_agree=agree), picture(world.machine, clocks_agree=agree))
        frames = {session.peer: session.highest_frame for session in world.machine.state.sessions.values()}
        for peer, frame in recovered.state.last_frames.items():
            assert frame <= frames.get(peer, frame)


TestBrokerAndItsReplay = pytest.mark.usefixtures("shallow")(BrokerAndItsReplay.TestCase)
TestBrokerAndItsReplay.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # Explaining a failure takes longer than finding it, and longer than the test may take.
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Any:
    """Bodies leave memory from the third message of a queue on."""
    before = store.MAX_RESIDENT_BODIES
    store.MAX_RESIDENT_BODIES = 2
    yield
    store.MAX_RESIDENT_BODIES = before
