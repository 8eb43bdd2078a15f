"""A broker engine on a disk in memory, and one peer that uses every operation round by round.

The same seed gives the same operations. The peer decides only by the answers of the engine, never by its state; the
answers of a round are its acknowledgement.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from stageflow_brokers.core import records, wire
from stageflow_brokers.core.machine import Machine
from stageflow_brokers.core.replay import Replay
from stageflow_brokers.engine.engine import Engine, Outgoing, replay_batch
from stageflow_brokers.journal.format import Batch
from stageflow_brokers.testing.simulated_disk import SimulatedDisk
from stageflow_brokers.types import (
    ACK,
    DEAD_LETTER,
    FLAG_CLOSE_GROUP,
    FLAG_START,
    RETRY,
    TERMINAL,
    Arrival,
    DeliveryItem,
    GatherOpen,
    QueueOptions,
    SettleItem,
)

__all__ = ["DIRECTORY", "PEER", "Picture", "Workload", "picture", "replayed"]

DIRECTORY = Path("/journal")
PEER = 7
QUEUES = ("q", "next", "fin", "joined")

Picture = dict[str, Any]


def picture(machine: Machine) -> Picture:
    """Return the durable state, in the form of journal records. Leases are not durable."""
    store = machine.state
    found: Picture = {"facts": tuple(sorted(store.facts.items())), "bytes": store.live_bytes}
    for id, message in store.messages.items():
        state = records.message_state(message)
        if state.due_wall <= store.wall:
            state.due_wall = 0.0
        found[f"message {id}"] = wire.encode(state), bytes(machine.writer.body(message))
    for group in store.groups.values():
        found[f"group {group.id}"] = wire.encode(records.group_state(group))
        for gather in (group.gathers or {}).values():
            waiting = records.gather_state(group, gather)
            waiting.wait = round(waiting.wait, 6)
            found[f"gather {group.id} {gather.key}"] = wire.encode(waiting)
    for queue in store.queues.values():
        if queue.paused or queue.options != QueueOptions(queue.name):
            found[f"queue {queue.name}"] = queue.paused, wire.encode(queue.options)
    return found


def replayed(batches: list[Batch], wall: float) -> Picture:
    """Return the state of a broker that replays these batches and begins at `wall`."""
    machine = Machine()
    replay = Replay(machine.state)
    for batch in batches:
        replay_batch(replay, batch)
    machine.begin(wall, wall)
    machine.begin_epoch(wall, wall)
    return picture(machine)


class Workload:
    """One run of one broker. `acknowledged` is the state after the last answered round."""

    def __init__(self, disk: SimulatedDisk, seed: int = 0, *, segment_bytes: int = 8 << 10) -> None:
        self.disk = disk
        self.chance = random.Random(seed)
        self.segment_bytes = segment_bytes
        self.wall = 1_000_000.0
        self.frame = 0
        self.started = 0
        self.held: dict[int, tuple[str, DeliveryItem]] = {}
        self.quotes: list[bytes] = []  # bytes of journals, to be sent as bodies
        self.acknowledged: Picture | None = None
        self.acknowledged_at = self.wall
        self.pictures: dict[int, tuple[Picture, float]] = {}  # by batch number, since a segment was last deleted
        self._oldest = 0
        self.failed = False
        self.engine: Engine | None = None

    def begin(self) -> None:
        """Start the broker and send hello. Its answer acknowledges the state found on disk."""
        self.engine = Engine(
            journal_dir=DIRECTORY,
            files=self.disk,
            segment_bytes=self.segment_bytes,
            monotonic=lambda: self.wall,
            wall=lambda: self.wall,
            warn=lambda text: None,
            stop_requested=lambda: True,
        )
        self.held.clear()
        consume = [(name, 20) for name in QUEUES]
        hello = wire.encode((wire.PROTOCOL, "client", "", 1, self.frame + 1, consume, [], [], 1))
        self.round(wire.HELLO, hello)

    def round(self, op: bytes, header: bytes, blob: bytes = b"") -> None:
        """Send one frame and receive the answers. Errors of the engine pass through; none may be answered after one."""
        assert self.engine is not None
        self.wall += 0.001
        try:
            out = self.engine.round([(PEER, op, header, blob)])
        except BaseException:
            self.failed = True
            raise
        assert not self.failed, "a round was acknowledged after a failed one"
        self.acknowledged, self.acknowledged_at = self.now(), self.wall
        journal = self.engine.journal
        assert journal is not None
        if (oldest := journal.segments()[0].number) != self._oldest:
            self._oldest = oldest
            self.pictures.clear()
        self.pictures[journal.last_batch] = self.acknowledged, self.wall
        self._receive(out)

    def send(self, op: bytes, *fields: Any, blob: bytes = b"") -> None:
        """Send the next numbered frame."""
        assert self.engine is not None
        self.frame += 1
        self.round(op, wire.encode((self.engine.machine.state.epoch, self.frame, *fields)), blob)

    def now(self) -> Picture:
        """Return the state in memory; after a failed round, the state that the round would have made."""
        assert self.engine is not None
        disk = self.disk
        on_call, on_read = disk.on_call, disk.on_read
        disk.on_call = lambda name, path: None  # no fault may hit this read
        disk.on_read = lambda path, offset: None
        try:
            return picture(self.engine.machine)
        finally:
            disk.on_call, disk.on_read = on_call, on_read

    def work(self, rounds: int) -> None:
        """Run so many random operations."""
        for _ in range(rounds):
            self.chance.choice((self.start, self.start, self.settle, self.settle, self.settle, self.do_rare_things))()

    def compact(self) -> None:
        """Request a compaction and continue until it is done."""
        assert self.engine is not None
        self.send(wire.QUERY, "compact", (True,))
        while self.engine.machine.compacting:
            self.send(wire.QUERY, "compact", (False,))

    # what the peer does

    def start(self) -> None:
        """Start instances: some delayed, some that expire, some in a queue without a consumer."""
        items, bodies = [], []
        for _ in range(self.chance.randint(1, 3)):
            self.started += 1
            body = self.body()
            delay = self.chance.choice((0.0, 0.0, 0.0, 0.02, 1e6))
            items.append(
                (0, len(body), f"g{self.started}", 1, FLAG_START, self.chance.randint(0, 2), delay, 0.0, b"digest")
            )
            bodies.append(body)
        self.send(
            wire.PUBLISH, [(self.chance.choice(("q", "q", "q", "unread")), "a")], items, False, blob=b"".join(bodies)
        )

    def settle(self) -> None:
        """Settle a message in work in one of all ways."""
        if not self.held:
            return self.start()
        queue, item = self.held.pop(self.chance.choice(sorted(self.held)))
        lease = (item.id, item.lease)
        body = self.body()
        if queue == "fin":
            return self.send(wire.SETTLE, [], [], [(*lease, FLAG_CLOSE_GROUP, item.group)], [])
        after = {"q": ("next", "b", 0), "next": ("fin", ":end", TERMINAL), "joined": ("fin", ":end", TERMINAL)}[queue]
        what = self.chance.choice(("move",) * 6 + ("again", "dead", "gather", "checkpoint"))
        if what == "checkpoint":
            self.held[item.id] = queue, item
            return self.send(wire.CHECKPOINT, *lease, self.chance.choice("xyz"), blob=body)
        if what == "again":
            return self.send(wire.SETTLE, [], [], [], [SettleItem([lease], RETRY, [], 0.01, b"boom")])
        if what == "dead":
            return self.send(wire.SETTLE, [], [], [], [SettleItem([lease], DEAD_LETTER, [], 0.0, b"hopeless")])
        if what == "gather" and queue == "q":
            opening = GatherOpen("k", self.chance.randint(1, 3), 0, len(body), deadline=1e6)
            settled = SettleItem([lease], ACK, opens=[opening])
            self.send(wire.SETTLE, [("joined", "j", 0)], [], [], [settled], blob=body)
            arrivals = [Arrival("k", slot, 20, item.group, 1) for slot in ("one", "two")]
            return self.send(wire.PUBLISH, [], [], False, [], arrivals, blob=bytes(40))
        return self.send(wire.SETTLE, [after], [(*lease, 0, len(body), item.group)], [], [], blob=body)

    def do_rare_things(self) -> None:
        """Run one of the rarer operations."""
        what = self.chance.randrange(6)
        if what == 0:
            self.wall += self.chance.choice((0.05, 5.0))
            self.send(wire.QUERY, "ping", ())
        elif what == 1:
            self.send(wire.QUERY, "fact", (self.chance.choice("abc"), str(self.frame)))
        elif what == 2:
            self.send(wire.QUERY, self.chance.choice(("pause", "resume")), ("unread",))
        elif what == 3 and self.started:
            group = f"g{self.chance.randint(1, self.started)}"
            self.send(wire.QUERY, "raise-epoch", (group, 2, "coordinator", "cancel"))
        elif what == 4 and self.started:
            group = f"g{self.chance.randint(1, self.started)}"
            self.send(wire.QUERY, "cancel", (group, "stop", []))
        else:
            self.send(wire.QUERY, "purge", ("unread", list(range(1, 2 * self.frame, 3))))

    def body(self) -> bytes:
        """Anything; often bytes of a journal, if there are some to quote."""
        if self.quotes and self.chance.random() < 0.5:
            return self.chance.choice(self.quotes)
        return self.chance.randbytes(self.chance.choice((0, 3, 60, 200, 900)))

    def _receive(self, out: list[Outgoing]) -> None:
        for _, header, _ in out:
            for queue, items in wire.decode_broker_frame(header).deliveries:
                self.held.update((item.id, (queue, item)) for item in items)
