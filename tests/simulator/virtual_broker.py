"""The broker of a simulated cluster: production engine, machine and journal, on a failing disk and network."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any

from virtual_shares import Shares
from virtual_waits import Waits
from virtual_world import Frame, Link, World

from stageflow_brokers.api import DeliveryItem, Listener
from stageflow_brokers.client.connection import Connection
from stageflow_brokers.core.message import Message
from stageflow_brokers.core.replay import Replay
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.engine import engine as engine_module
from stageflow_brokers.engine.engine import Engine, replay_batch
from stageflow_brokers.errors import JournalFailed
from stageflow_brokers.journal.format import Batch
from stageflow_brokers.pause_flags import PauseFlags
from stageflow_brokers.testing.simulated_disk import Crash, SimulatedDisk

JOURNAL = Path("/journal")
ROUND = 0.002
"""Seconds within which a broker gets round to what has arrived."""
SILENCE = 0.5
"""Seconds without a welcome after which a peer says hello again."""


GATHERED = "gathered: "


class SettlementCounts:
    """How often each transition was accepted, by what is on disk: an oracle that is fed records, not asked.

    Gathered messages have `GATHERED` before their label. `waits` receives new messages.
    """

    def __init__(self) -> None:
        self.settled: Counter[tuple[str, int, str]] = Counter()
        self.waits: Waits | None = None
        self._last = 0
        self._replay = Replay(BrokerState(paging=True), on_settled=self._on_settled)

    def take(self, batch: Batch, *, recovered: bool = False) -> None:
        """Record a durable batch once; `recovered`: it is known only since a restart."""
        if batch.number <= self._last:
            return
        self._last = batch.number
        store = self._replay.state
        first = store.next_id
        replay_batch(self._replay, batch)
        if self.waits is not None:
            for id in range(first, store.next_id):
                if id in store.messages:
                    queue = store.messages[id].queue.name
                    self.waits.published(id, queue, batch.wall, recovered=recovered)

    def deaths_of(self, message_id: int) -> int | None:
        """How many deaths a message has on disk; None where there is no such message."""
        message = self._replay.state.messages.get(message_id)
        if message is None:
            return None
        return 0 if message.delivery_state is None else message.delivery_state.deaths

    def _on_settled(self, message: Message | None, group_id: str, label: str) -> None:
        if message is not None:
            if message.delivery_state is not None and message.delivery_state.parts is not None:
                label = GATHERED + label
            self.settled["" if message.group is None else message.group.id, message.epoch, label] += 1


class VirtualBroker:
    """One broker process after the other. `engine` is None while there is none."""

    def __init__(self, world: World, crimes: list[str], *, segment_bytes: int, disorder: int = 0) -> None:
        self.world = world
        self.files = SimulatedDisk(seed=world.random.getrandbits(32))
        self.engine: Engine | None = None
        self.clients: dict[int, VirtualClient] = {}
        self.accounts = SettlementCounts()
        self.crimes = crimes
        self.starts = 0
        self.disorder = disorder
        self.shares = Shares(world, crimes)
        self.paused = self.shares.paused
        self.pause_flags = PauseFlags.create()
        self._left = -1
        self._segment_bytes = segment_bytes
        self._inbox: list[Frame] = []
        self._life = 0
        self._due = float("inf")

    def start(self) -> None:
        """A new process on what the disk has. It may die in the middle of that, as at any time."""
        world = self.world
        self.starts += 1
        self._life += 1
        try:
            self.engine = Engine(
                journal_dir=JOURNAL,
                supervised=True,
                segment_bytes=self._segment_bytes,
                warn=world.say,
                files=self.files,
                monotonic=lambda: world.now,
                wall=lambda: world.wall,
                pause_flags=self.pause_flags,
            )
        except (Crash, JournalFailed) as error:
            self._died(f"while it started: {error!r}")
            return
        self._keep_account(self.engine)
        world.say("broker started")
        self.shares.disturb()
        for client in list(self.clients.values()):
            client.reconnect(0.05)
        self._wake(0.0)

    def take(self, frame: Frame) -> None:
        """A frame has arrived."""
        if self.engine is not None:
            self._inbox.append(frame)
            self._wake(self.world.random.random() * ROUND)

    def kill(self, why: str = "killed") -> None:
        """SIGKILL. Another one is started soon."""
        if self.engine is not None:
            self._died(why)

    def fail_at(self, count: int, error: BaseException | None) -> None:
        """The process dies in its `count`-th call from now on that changes the disk, or that call fails."""
        left = count

        def on_call(name: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left:
                return
            self.files.on_call = lambda name, path: None
            if error is None:
                raise Crash
            if name in ("fdatasync", "fsync", "pwritev"):
                raise error

        self.files.on_call = on_call

    def lose_power(self, chance: Random) -> None:
        """Stop the machine: any part of the unsynced data remains. Nothing restarts automatically."""
        self._end()
        self.files.crash(chance)

    def given(self, queue: str, items: Sequence[DeliveryItem]) -> None:
        """A worker has been given messages: none that was not on its way when the queue was paused."""
        first = self.paused.get(queue)
        if first is not None and any(item.lease >= first for item in items):
            self.crimes.append(f"{queue} is paused, and gives out {[item.id for item in items]}")

    def _died(self, why: str) -> None:
        self.world.say(f"broker died: {why}")
        self.shares.disturb()
        self._end()
        self.files.kill()
        life = self._life
        self.world.soon(0.2, lambda: self.start() if self._life == life and self.engine is None else None)

    def _end(self) -> None:
        self.engine = None
        self._life += 1
        self._inbox.clear()
        self._due = float("inf")
        for client in self.clients.values():
            client.link.lose()

    def _wake(self, seconds: float) -> None:
        due = self.world.now + seconds
        if due >= self._due:
            return
        self._due = due
        life = self._life

        def rise() -> None:
            if life == self._life and self._due == due:
                self._due = float("inf")
                self._round()

        self.world.after(seconds, rise)

    def _round(self) -> None:
        engine = self.engine
        assert engine is not None
        frames, self._inbox = self._inbox, []
        try:
            outgoing = engine.round(frames)
        except (Crash, JournalFailed) as error:
            self._died(repr(error))
            return
        if engine.machine.state.closed_sequence != self._left:
            self._left = engine.machine.state.closed_sequence
            self.crimes.extend(leftovers(engine.machine.state))
        self.shares.after_round(engine.machine)
        for peer, header, blob in outgoing:
            client = self.clients.get(peer)
            if client is None or (client.link.broken and self.world.random.random() < 0.5):
                engine.machine.disconnect(peer)
            else:
                client.link.hear(header, blob)
        self._wake(engine.next_timeout(0.5))

    def _keep_account(self, engine: Engine) -> None:
        journal = engine.journal
        assert journal is not None
        commit = journal.commit

        def counted(batch: Any, wall: float) -> Any:
            number = journal._next
            place = commit(batch, wall)
            self.accounts.take(Batch(number, place.segment, wall, batch, place.blob_offsets, place.batch))
            return place

        journal.commit = counted  # type: ignore[method-assign]


class Waited(Future[Any]):
    """A future whose result is waited for in virtual time: `wait` hands control back until there is one."""

    def __init__(self, future: Future[Any], wait: Callable[[Future[Any]], None]) -> None:
        super().__init__()
        self._of, self._wait = future, wait

    def result(self, timeout: float | None = None) -> Any:
        """When there is one."""
        self._wait(self._of)
        return self._of.result(0)


class VirtualClient(Connection):
    """The production peer over a virtual connection. `wait`: how its process waits for an answer, if it can."""

    def __init__(
        self,
        broker: VirtualBroker,
        listener: Listener,
        *,
        peer: int,
        role: str,
        name: str,
        wait: Callable[[Future[Any]], None] | None = None,
    ) -> None:
        super().__init__(listener, peer=peer, role=role, name=name)
        self.broker = broker
        self.link = Link(broker.world, up=broker.take, down=self._heard, disorder=broker.disorder)
        self.on_heard: Callable[[], None] = lambda: None
        self._wait = wait
        self._greeting = 0
        broker.clients[self.peer] = self
        self.send_hello()

    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        self.link.send((self.peer, op, header, blob))

    def send_hello(self) -> None:
        """Repeat until a welcome arrives."""
        self._greeting += 1
        greeting = self._greeting
        self.link.broken = False
        self.link.send((self.peer, *self._hello()))

        def again() -> None:
            if not self.link.closed and not self._welcomed and greeting == self._greeting:
                self.send_hello()

        self.broker.world.after(SILENCE, again)

    def checkpoint(self, id: int, lease: int, name: str, value: bytes) -> Future[None]:
        """As in production, waited for in virtual time."""
        future = super().checkpoint(id, lease, name, value)
        assert self._wait is not None
        return Waited(future, self._wait)

    def reconnect(self, most: float) -> None:
        """The connection is there again, within `most` seconds."""
        self._greeting += 1
        greeting = self._greeting
        self.broker.world.soon(
            most, lambda: self.send_hello() if not self.link.closed and greeting == self._greeting else None
        )

    def break_off(self) -> None:
        """The connection breaks, and is there again after a while."""
        self.link.lose()
        self.link.broken = True
        self.reconnect(0.3)

    @property
    def unconfirmed(self) -> int:
        """Frames that the broker has not acknowledged."""
        return len(self._unconfirmed)

    def close(self, timeout: float = 5.0) -> None:
        """Its process is gone, or has done."""
        self.link.close()
        self.broker.clients.pop(self.peer, None)

    def _heard(self, header: bytes, blob: bytes) -> None:
        self.on_frame(header, blob)
        self.on_heard()


def leftovers(store: BrokerState) -> Iterator[str]:
    """What is left of groups that have left."""
    for message in store.messages.values():
        group = message.group
        evidence = message.delivery_state is not None and message.delivery_state.evidence
        if group is not None and not evidence and store.groups.get(group.id) is not group:
            yield f"{group.id} has left, and message {message.id} ({message.label}) is still there"
    for (id, key), group in store.gathers.items():
        if store.groups.get(id) is not group or key not in (group.gathers or {}):
            yield f"{id} has left, and what gathers at {key!r} is still there"


def disk_error() -> OSError:
    """What a dying disk says."""
    return OSError(errno.EIO, "input/output error")


def tell_of_recovered(accounts: SettlementCounts) -> Callable[[Replay, Batch], None]:
    """In place of the engine's `replay_batch`: what a crash left behind is on disk as well, and counts."""

    def told(replay: Replay, batch: Batch) -> None:
        replay_batch(replay, batch)
        accounts.take(batch, recovered=True)

    return told


__all__ = ["GATHERED", "SettlementCounts", "VirtualBroker", "VirtualClient", "Waited", "disk_error", "engine_module"]
__all__ += ["tell_of_recovered"]
