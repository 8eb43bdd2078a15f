"""A broker machine with a journal in memory, peers that talk to it frame by frame, and a clock that is handed in.

For tests of the core without sockets, files or threads. What the machine records is kept by segment, so that a replay,
a restart, and the loss of the oldest segments can be tried at any point.
"""

from __future__ import annotations

from typing import Any

import msgspec

from brokers.core import records, wire
from brokers.core.audit import contradictions
from brokers.core.machine import Limits, Machine
from brokers.core.message import DELAYED, LEASED, PARKED, READY, Message, Place
from brokers.core.queue import Queue
from brokers.core.replay import Replay
from brokers.core.store import GONE
from brokers.types import DeliveryItem, QueueOptions

Batch = tuple[float, list[tuple[records.Record, int]]]


class Disk:
    """Segments of batches; each record's blob at an offset of its own."""

    def __init__(self) -> None:
        self.segments: dict[int, list[Batch]] = {1: []}
        self.blobs: dict[int, bytearray] = {1: bytearray(b"head")}

    @property
    def newest(self) -> int:
        return max(self.segments)

    @property
    def oldest(self) -> int:
        return min(self.segments)

    def commit(self, taken: list[records.Record], wall: float) -> tuple[int, int, list[int]]:
        blob = self.blobs[self.newest]
        batch, offsets = len(blob), []
        for record in taken:
            offsets.append(len(blob))
            blob += record[4] + b"|"
        self.segments[self.newest].append((wall, list(zip(taken, offsets, strict=True))))
        return self.newest, batch, offsets

    def seal(self) -> None:
        new = self.newest + 1
        self.segments[new] = []
        self.blobs[new] = bytearray(b"head")

    def drop_oldest(self) -> None:
        oldest = self.oldest
        del self.segments[oldest], self.blobs[oldest]

    def read(self, segment: int, batch: int, offset: int, size: int) -> bytes:
        return bytes(self.blobs[segment][offset : offset + size])


class World:
    """One broker, its disk and its clock."""

    def __init__(self, *, supervised: bool = False, limits: Limits | None = None) -> None:
        self.supervised = supervised
        self.limits = limits
        self.disk = Disk()
        self.now = 1000.0
        self.wall = 50_000.0
        self.clocks_agree = True
        self.peers: dict[int, Peer] = {}
        self.machine = self.recover()
        self.commit()

    def recover(self, *, paging: bool = True) -> Machine:
        """A new machine from what is on disk; its first record is not written yet."""
        machine = Machine(supervised=self.supervised, limits=self.limits, paging=paging, read_body=self.disk.read)
        replay = Replay(machine.store)
        for segment in sorted(self.disk.segments):
            for wall, batch in self.disk.segments[segment]:
                for record, offset in batch:
                    replay.apply(*record, Place(wall, segment, offset))
        machine.begin(self.now, self.wall)
        machine.started(self.now, self.wall)
        return machine

    def restart(self) -> None:
        """The process dies and another one begins; peers have to say hello again."""
        self.machine = self.recover()
        self.commit()
        for peer in self.peers.values():
            peer.welcomed = False

    def commit(self) -> None:
        taken = self.machine.take_records()
        if taken:
            self.machine.placed(*self.disk.commit(taken, self.wall))

    def round(self, frames: list[tuple[int, bytes, bytes, bytes]] | None = None) -> None:
        """Take frames, commit, and let every peer hear what is said to it."""
        self.machine.begin(self.now, self.wall)
        for frame in frames or ():
            self.machine.receive(*frame)
        self.machine.tick()
        self.commit()
        for peer, header, blob in self.machine.dispatch():
            if peer in self.peers:
                self.peers[peer].hear(header, blob)
            else:
                self.machine.disconnect(peer)

    def pass_time(self, seconds: float, *, drift: float = 0.0) -> None:
        self.now += seconds
        self.wall += seconds + drift
        self.clocks_agree = self.clocks_agree and not drift
        self.round()

    def reclaim(self, budget: int = 200) -> None:
        """Give the oldest segment back, in slices, as the engine does."""
        oldest = self.disk.oldest
        while self.machine.ledger.copy_forward(oldest, budget):
            self.round()
        self.machine.ledger.restate()
        self.round()
        self.disk.drop_oldest()

    def peer(self, number: int, **options: Any) -> Peer:
        """A new peer, welcomed."""
        peer = self.peers[number] = Peer(self, number, **options)
        peer.hello()
        return peer


class Peer:
    """One side of a conversation, without any of the client's conveniences."""

    def __init__(
        self, world: World, number: int, *, consume: dict[str, int] | None = None, role: str = "client"
    ) -> None:
        self.world = world
        self.number = number
        self.role = role
        self.consuming = dict(consume or {})
        self.frame = 0
        self.talk = 0
        self.epoch = 0
        self.welcomed = False
        self.acked = 0
        self.held: dict[int, DeliveryItem] = {}
        self.bodies: dict[int, bytes] = {}
        self.delivered: list[tuple[str, DeliveryItem, bytes]] = []
        self.results: dict[int, Any] = {}
        self.pushes: list[tuple[str, str, bytes]] = []
        self.notices: list[tuple[str, Any]] = []

    def hello(self, *, next_frame: int | None = None, watching: list[str] | None = None) -> None:
        self.talk += 1
        holding = [(item.id, item.lease) for item in self.held.values()]
        first = self.frame + 1 if next_frame is None else next_frame
        hello = wire.encode(
            (
                wire.PROTOCOL,
                self.role,
                f"peer{self.number}",
                1,
                first,
                list(self.consuming.items()),
                holding,
                watching or [],
                self.talk,
            )
        )
        self.welcomed = False
        self.world.round([(self.number, wire.HELLO, hello, b"")])

    def frame_of(self, op: bytes, fields: tuple[Any, ...], blob: bytes = b"") -> tuple[int, bytes, bytes, bytes]:
        self.frame += 1
        return self.number, op, wire.encode((self.epoch, self.frame, *fields)), blob

    def send(self, op: bytes, fields: tuple[Any, ...], blob: bytes = b"") -> Any:
        """Send one frame; what it was answered, None if nothing."""
        frame = self.frame_of(op, fields, blob)
        self.world.round([frame])
        return self.results.get(self.frame)

    def publish(self, targets: list[Any], items: list[Any], bodies: list[bytes], **more: Any) -> Any:
        fields = (targets, items, more.get("atomic", False), more.get("opens", []), more.get("arrivals", []))
        return self.send(wire.PUBLISH, fields, b"".join(bodies))

    def settle(self, targets: list[Any], moves: Any = (), acks: Any = (), others: Any = (), bodies: Any = ()) -> Any:
        """Settle; held messages whose leases are named are held no longer, whatever the broker says."""
        for id in [move[0] for move in moves] + [ack[0] for ack in acks]:
            self.held.pop(id, None)
        for other in others:
            for id, _ in other[0] if isinstance(other, tuple) else other.leases:
                self.held.pop(id, None)
        return self.send(wire.SETTLE, (targets, moves, acks, others), b"".join(bodies))

    def query(self, name: str, *args: Any) -> Any:
        return self.send(wire.QUERY, (name, args))

    def release(self, leases: list[tuple[int, int]]) -> None:
        for id, _ in leases:
            self.held.pop(id, None)
        self.send(wire.RELEASE, (leases, "", -1))

    def hear(self, header: bytes, blob: bytes) -> None:
        out = wire.decode_out(header)
        for word, detail in out.notices:
            if word == "welcome":
                if detail[0] != self.talk:
                    return
                self.welcomed = True
                self.epoch = out.broker_epoch
                for id in detail[1]:
                    self.held.pop(id, None)
        self.notices.extend(out.notices)
        if not self.welcomed:
            return
        self.acked = max(self.acked, out.acked)
        for frame, raw in out.results:
            self.results[frame] = msgspec.msgpack.decode(raw)
        at = 0
        for queue, items in out.deliveries:
            for item in items:
                self.held[item.id] = item
                self.bodies[item.id] = blob[at : at + item.size]
                self.delivered.append((queue, item, blob[at : at + item.size]))
                at += item.size
        for group, label, size in out.pushes:
            self.pushes.append((group, label, blob[at : at + size]))
            at += size


# what must be the same after a replay, and what must hold at any time


def picture(machine: Machine, *, clocks_agree: bool) -> dict[str, Any]:
    """All that has to survive the process. A lease does not: its holder says hello, or the message is ready again.

    Where the clock on the wall was set meanwhile, a delay may be over by one clock and not by the other.
    """
    store = machine.store
    return {
        "messages": {id: _message(machine, message, clocks_agree) for id, message in store.messages.items()},
        "groups": {
            group.id: (
                group.epoch,
                group.digest,
                group.started,
                group.ended,
                group.divert,
                group.cancelled,
                group.released,
                sorted(message.id for message in group.messages()),
                {
                    gather.key: (
                        gather.need,
                        gather.queue if gather.need is not None else "",
                        gather.label if gather.need is not None else "",
                        gather.epoch if gather.need is not None else 0,
                        gather.base,
                        gather.priority if gather.need is not None else 0,
                        gather.due_wall,
                        gather.wait,
                        list(gather.arrivals.items()),
                        sorted(gather.seen),
                    )
                    for gather in (group.gathers or {}).values()
                },
            )
            for group in store.groups.values()
        },
        "queues": {
            queue.name: (
                queue.options,
                queue.paused,
                sorted(queue.dead),
                sum(_counts(queue)),
            )
            for queue in store.queues.values()
            if queue.options != QueueOptions(queue.name) or queue.paused or any(_counts(queue))
        },
        "facts": dict(store.facts),
        "live_bytes": store.live_bytes,
        "step_bytes": store.step_bytes,
    }


def assert_same(recovered: dict[str, Any], live: dict[str, Any]) -> None:
    """Two pictures are one; if not, only what differs is shown."""
    different = [
        f"{kind} {name}: recovered {recovered[kind].get(name)!r}, live {live[kind].get(name)!r}"
        for kind in ("messages", "groups", "queues", "facts")
        for name in recovered[kind].keys() | live[kind].keys()
        if recovered[kind].get(name) != live[kind].get(name)
    ]
    different += [
        f"{count}: recovered {recovered[count]}, live {live[count]}"
        for count in ("live_bytes", "step_bytes")
        if recovered[count] != live[count]
    ]
    if different:
        raise AssertionError("\n".join(different))


def _counts(queue: Queue) -> tuple[int, int, int]:
    unsettled = queue.ready_count + sum(len(consumer.held) for consumer in queue.consumers)
    return unsettled, queue.delayed, len(queue.dead)


def _message(machine: Machine, message: Message, clocks_agree: bool) -> tuple[Any, ...]:
    extra = message.details()
    state = message.state()
    return (
        message.queue.name,
        "" if message.group is None else message.group.id,
        message.epoch,
        message.label,
        message.priority,
        message.place.wall,
        machine.ledger.body(message),
        READY if state == LEASED or (state == DELAYED and not clocks_agree) else state,
        extra.attempts,
        extra.deaths,
        extra.failure,
        extra.fresh,
        extra.steps,
        extra.parts,
        extra.due_wall if clocks_agree else 0.0,
        extra.delay,
        extra.expires_wall,
        extra.parked_wall,
        extra.evidence,
        extra.reason,
    )


def check_whole(machine: Machine) -> None:
    """The indexes of a store agree with what they index, and no counter has gone astray."""
    store = machine.store
    ready: dict[str, int] = {}
    dead: dict[str, set[int]] = {}
    delayed: dict[str, int] = {}
    in_groups: dict[str, set[int]] = {}
    for id, message in store.messages.items():
        assert message.id == id
        assert message.holder is not GONE
        name = message.queue.name
        assert store.queues[name] is message.queue
        state = message.state()
        if state == LEASED:
            assert message.holder is not None
            assert message.holder.held[id] is message
            assert message.holder.session.consumers[name] is message.holder
        elif state == PARKED:
            dead.setdefault(name, set()).add(id)
        elif state == READY:
            ready[name] = ready.get(name, 0) + 1
        else:
            delayed[name] = delayed.get(name, 0) + 1
        if message.group is not None and not (message.extra is not None and message.extra.evidence):
            assert store.groups[message.group.id] is message.group
            in_groups.setdefault(message.group.id, set()).add(id)
    for name, queue in store.queues.items():
        assert queue.skip >= 0
        assert queue.delayed == delayed.get(name, 0)
        assert queue.ready_count == ready.get(name, 0)
        assert [m.id for m in queue.waiting() if store.messages[m.id] is not m] == []
        assert set(queue.dead) == dead.get(name, set())
        for consumer in queue.consumers:
            assert consumer.session.consumers[name] is consumer
            assert store.sessions[consumer.session.peer] is consumer.session
            for id, message in consumer.held.items():
                assert store.messages[id] is message
    kept = sum(message.size for message in store.messages.values())
    gathers = set()
    for id, group in store.groups.items():
        assert group.id == id
        assert {message.id for message in group.messages()} == in_groups.get(id, set())
        for key, gather in (group.gathers or {}).items():
            gathers.add((id, key))
            kept += gather.weight
            assert gather.weight == len(gather.base) + sum(map(len, gather.arrivals.values()))
    steps = [m.extra.steps for m in store.messages.values() if m.extra is not None and m.extra.steps]
    assert store.step_bytes == sum(len(name) + len(value) for each in steps for name, value in each.items())
    assert store.fact_bytes == sum(len(name) + len(value) for name, value in store.facts.items())
    assert set(store.gathers) == gathers
    assert list(contradictions(store)) == []
    assert store.live_bytes == kept
    for things in (
        [message.place for message in store.messages.values()],
        [group.place for group in store.groups.values()],
        [store.groups[id].gathers[key].place for id, key in store.gathers],  # type: ignore[index]
    ):
        lying = [place.segment for place in things if place.segment >= 0]
        assert lying == sorted(lying), "what lies in the oldest segment is in front"
