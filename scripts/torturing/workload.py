"""A broker engine on a disk in memory, worked round by round by one peer that does a bit of everything.

Seeded: the same seed does the same. It must never look into the engine to decide what to do, only hear what the engine
lets out; what a round let out is what was acknowledged.
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
from stageflow_brokers.testing.simulated_disk import MemoryFiles
from stageflow_brokers.types import (
    AGAIN,
    DEAD,
    DONE,
    LEAVE,
    START,
    TERMINAL,
    Arrival,
    DeliveryItem,
    GatherOpen,
    QueueOptions,
    SettleItem,
)

__all__ = ["DIRECTORY", "PEER", "Picture", "Plant", "picture", "replayed"]

DIRECTORY = Path("/journal")
PEER = 7
QUEUES = ("q", "next", "fin", "joined")

Picture = dict[str, Any]


def picture(machine: Machine) -> Picture:
    """All that has to survive the process, as the journal itself would state it. A lease does not survive."""
    store = machine.store
    told: Picture = {"facts": tuple(sorted(store.facts.items())), "bytes": store.live_bytes}
    for id, message in store.messages.items():
        state = records.message_state(message)
        if state.due_wall <= store.wall:
            state.due_wall = 0.0
        told[f"message {id}"] = wire.encode(state), bytes(machine.ledger.body(message))
    for group in store.groups.values():
        told[f"group {group.id}"] = wire.encode(records.group_state(group))
        for gather in (group.gathers or {}).values():
            waiting = records.gather_state(group, gather)
            waiting.wait = round(waiting.wait, 6)
            told[f"gather {group.id} {gather.key}"] = wire.encode(waiting)
    for queue in store.queues.values():
        if queue.paused or queue.options != QueueOptions(queue.name):
            told[f"queue {queue.name}"] = queue.paused, wire.encode(queue.options)
    return told


def replayed(batches: list[Batch], wall: float) -> Picture:
    """What these batches make of a broker that begins at `wall`."""
    machine = Machine()
    replay = Replay(machine.store)
    for batch in batches:
        replay_batch(replay, batch)
    machine.begin(wall, wall)
    machine.started(wall, wall)
    return picture(machine)


class Plant:
    """One life of one broker. `acknowledged` is the picture after the last round that let something out."""

    def __init__(self, disk: MemoryFiles, seed: int = 0, *, segment_bytes: int = 8 << 10) -> None:
        self.disk = disk
        self.chance = random.Random(seed)
        self.segment_bytes = segment_bytes
        self.wall = 1_000_000.0
        self.frame = 0
        self.started = 0
        self.held: dict[int, tuple[str, DeliveryItem]] = {}
        self.quotes: list[bytes] = []  # bytes of journals, to be sent as bodies
        self.acknowledged: Picture | None = None
        self.said_at = self.wall
        self.pictures: dict[int, tuple[Picture, float]] = {}  # by number of batch, since a segment was last given back
        self._oldest = 0
        self.failed = False
        self.engine: Engine | None = None

    def begin(self) -> None:
        """Start the broker and say hello. What it finds on the disk is acknowledged by that."""
        self.engine = Engine(
            journal_dir=DIRECTORY,
            files=self.disk,
            segment_bytes=self.segment_bytes,
            monotonic=lambda: self.wall,
            wall=lambda: self.wall,
            warn=lambda text: None,
            giving_up=lambda: True,
        )
        self.held.clear()
        consume = [(name, 20) for name in QUEUES]
        hello = wire.encode((wire.PROTOCOL, "client", "", 1, self.frame + 1, consume, [], [], 1))
        self.round(wire.HELLO, hello)

    def round(self, op: bytes, header: bytes, blob: bytes = b"") -> None:
        """One frame, and what is let out because of it. Raises what the engine raises, and insists that it goes on."""
        assert self.engine is not None
        self.wall += 0.001
        try:
            out = self.engine.round([(PEER, op, header, blob)])
        except BaseException:
            self.failed = True
            raise
        assert not self.failed, "a round was acknowledged after a failed one"
        self.acknowledged, self.said_at = self.now(), self.wall
        journal = self.engine.journal
        assert journal is not None
        if (oldest := journal.segments()[0].number) != self._oldest:
            self._oldest = oldest
            self.pictures.clear()
        self.pictures[journal.last_batch] = self.acknowledged, self.wall
        self._hear(out)

    def say(self, op: bytes, *fields: Any, blob: bytes = b"") -> None:
        """The next numbered frame."""
        assert self.engine is not None
        self.frame += 1
        self.round(op, wire.encode((self.engine.machine.store.epoch, self.frame, *fields)), blob)

    def now(self) -> Picture:
        """What the broker has in memory: after a failed round, what that round would have made of it."""
        assert self.engine is not None
        disk = self.disk
        on_call, on_read = disk.on_call, disk.on_read
        disk.on_call = lambda name, path: None  # who looks must not meet a fault
        disk.on_read = lambda path, offset: None
        try:
            return picture(self.engine.machine)
        finally:
            disk.on_call, disk.on_read = on_call, on_read

    def work(self, rounds: int) -> None:
        """Do a bit of everything."""
        for _ in range(rounds):
            self.chance.choice((self.start, self.start, self.settle, self.settle, self.settle, self.rarely))()

    def compact(self) -> None:
        """Ask for compaction, and go on until it is done."""
        assert self.engine is not None
        self.say(wire.QUERY, "compact", (True,))
        while self.engine.machine.compacting:
            self.say(wire.QUERY, "compact", (False,))

    # what the peer does

    def start(self) -> None:
        """New instances: some delayed, some that expire, some in a queue that nobody reads."""
        items, bodies = [], []
        for _ in range(self.chance.randint(1, 3)):
            self.started += 1
            body = self.body()
            delay = self.chance.choice((0.0, 0.0, 0.0, 0.02, 1e6))
            items.append((0, len(body), f"g{self.started}", 1, START, self.chance.randint(0, 2), delay, 0.0, b"digest"))
            bodies.append(body)
        self.say(
            wire.PUBLISH, [(self.chance.choice(("q", "q", "q", "unread")), "a")], items, False, blob=b"".join(bodies)
        )

    def settle(self) -> None:
        """Whatever may become of a message in work."""
        if not self.held:
            return self.start()
        queue, item = self.held.pop(self.chance.choice(sorted(self.held)))
        lease = (item.id, item.lease)
        body = self.body()
        if queue == "fin":
            return self.say(wire.SETTLE, [], [], [(*lease, LEAVE, item.group)], [])
        after = {"q": ("next", "b", 0), "next": ("fin", ":end", TERMINAL), "joined": ("fin", ":end", TERMINAL)}[queue]
        what = self.chance.choice(("move",) * 6 + ("again", "dead", "gather", "checkpoint"))
        if what == "checkpoint":
            self.held[item.id] = queue, item
            return self.say(wire.CHECKPOINT, *lease, self.chance.choice("xyz"), blob=body)
        if what == "again":
            return self.say(wire.SETTLE, [], [], [], [SettleItem([lease], AGAIN, [], 0.01, b"boom")])
        if what == "dead":
            return self.say(wire.SETTLE, [], [], [], [SettleItem([lease], DEAD, [], 0.0, b"hopeless")])
        if what == "gather" and queue == "q":
            opening = GatherOpen("k", self.chance.randint(1, 3), 0, len(body), deadline=1e6)
            settled = SettleItem([lease], DONE, opens=[opening])
            self.say(wire.SETTLE, [("joined", "j", 0)], [], [], [settled], blob=body)
            arrivals = [Arrival("k", slot, 20, item.group, 1) for slot in ("one", "two")]
            return self.say(wire.PUBLISH, [], [], False, [], arrivals, blob=bytes(40))
        return self.say(wire.SETTLE, [after], [(*lease, 0, len(body), item.group)], [], [], blob=body)

    def rarely(self) -> None:
        """What happens now and then."""
        what = self.chance.randrange(6)
        if what == 0:
            self.wall += self.chance.choice((0.05, 5.0))
            self.say(wire.QUERY, "ping", ())
        elif what == 1:
            self.say(wire.QUERY, "fact", (self.chance.choice("abc"), str(self.frame)))
        elif what == 2:
            self.say(wire.QUERY, self.chance.choice(("pause", "resume")), ("unread",))
        elif what == 3 and self.started:
            group = f"g{self.chance.randint(1, self.started)}"
            self.say(wire.QUERY, "raise-epoch", (group, 2, "coordinator", "cancel"))
        elif what == 4 and self.started:
            group = f"g{self.chance.randint(1, self.started)}"
            self.say(wire.QUERY, "cancel", (group, "stop", []))
        else:
            self.say(wire.QUERY, "purge", ("unread", list(range(1, 2 * self.frame, 3))))

    def body(self) -> bytes:
        """Anything; often bytes of a journal, if there are some to quote."""
        if self.quotes and self.chance.random() < 0.5:
            return self.chance.choice(self.quotes)
        return self.chance.randbytes(self.chance.choice((0, 3, 60, 200, 900)))

    def _hear(self, out: list[Outgoing]) -> None:
        for _, header, _ in out:
            for queue, items in wire.decode_out(header).deliveries:
                self.held.update((item.id, (queue, item)) for item in items)
