"""`Mailbox`: holds deliveries on their way to the actor, and results of `ctx.step` on their way to the broker.

No user code runs on the connection's thread. The thread waits only for the lock, which is held no longer than one
message takes to change its place. The mailbox must not import the actor: it knows a `MailboxActor`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import pykka

from stageflow_actors.errors import StageFlowError
from stageflow_brokers.api import Broker, DeliveryItem, Listener, PayloadTooLarge, ProtocolError, Refused
from stageflow_brokers.pause_flags import NOT_PAUSED

__all__ = ["RETIRE", "WORK", "Mailbox", "MailboxActor"]

logger = logging.getLogger("stageflow_actors.worker")

WORK = "work"
"""The message to an actor: the inbox holds deliveries."""
RETIRE = "retire"
"""The message to an actor: stop once the messages in work are settled. Also the broker's notice of the same meaning."""


class MailboxActor(Protocol):
    """The part of an actor that its mailbox uses. The mailbox's lock is held in each call of a method."""

    min_prefetch: int
    """The number of messages that the actor holds at least."""

    @property
    def actor_ref(self) -> pykka.ActorRef[Any]:
        """The reference through which the actor is notified."""

    def held_leases(self) -> list[tuple[int, int]]:
        """Return (id, lease) of each message that is in work, or finished and not yet settled."""

    def settle_finished(self) -> None:
        """Settle the finished messages and hold no more than those in work."""

    def stop_taking(self) -> None:
        """Start no further message."""


class Mailbox(Listener):
    """The deliveries that have arrived and are not in work.

    `lock` guards the way of a message from the inbox through the actor into the connection: its holder sees each
    message of this worker in at least one place. `signalled`: the actor was notified and has not read the inbox since.
    `paused[0]` is not 0 while the queue is paused: no message may begin then, and the broker recalls those that wait.
    `lost` are the (id, lease) of deliveries that this worker no longer holds.
    """

    def __init__(self, queue: str, paused: Sequence[int] = NOT_PAUSED) -> None:
        self.paused = paused
        self.inbox: deque[tuple[DeliveryItem, bytes]] = deque()
        self.lock = threading.Lock()
        self.actor: MailboxActor | None = None
        self.broker: Broker | None = None
        self.signalled = False
        self.lost: set[tuple[int, int]] = set()
        self._releasing: set[object] = set()
        self._queue = queue

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """Add the deliveries to the inbox and notify the actor once per batch."""
        if self._releasing:
            # These were on their way when earlier messages of the queue were released: they must not overtake them.
            self.release([(item.id, item.lease) for item in items])
            return
        self.inbox.extend(zip(items, bodies, strict=True))
        if self._releasing:
            self._return_late(items)
        if not self.signalled and self.actor is not None:
            self.signalled = True
            self._notify(self.actor, WORK)

    def release(self, leases: list[tuple[int, int]], prefetch: int = -1) -> None:
        """Release messages that have not begun, and hold no more than `prefetch` from now on; -1 for no change."""
        assert self.broker is not None
        release = object()
        self._releasing.add(release)
        sent = self.broker.release(leases, self._queue, prefetch)
        sent.add_done_callback(lambda done: self._releasing.discard(release))

    def _return_late(self, items: list[DeliveryItem]) -> None:
        """Release deliveries that have come into the inbox while the actor released those before them."""
        late = {(item.id, item.lease) for item in items}
        with self.lock:
            kept = [one for one in self.inbox if (one[0].id, one[0].lease) not in late]
            leases = [(item.id, item.lease) for item, _ in self.inbox if (item.id, item.lease) in late]
            self.inbox.clear()
            self.inbox.extend(kept)
        self.release(leases)

    def _notify(self, actor: MailboxActor, message: str) -> None:
        """Notify the actor. A retired one has stopped; the broker releases later deliveries when the worker exits."""
        try:
            actor.actor_ref.tell(message)
        except pykka.ActorDeadError:
            pass

    def on_notice(self, word: str, detail: Any) -> None:
        """Settle finished messages and release waiting ones, on a recall or when the worker is to retire."""
        if word in ("recall", RETIRE) and self.broker is not None and self.actor is not None:
            retiring = word == RETIRE
            with self.lock:
                self.actor.settle_finished()
                leases = [(item.id, item.lease) for item, _ in self.inbox]
                self.inbox.clear()
                if retiring:
                    self.actor.stop_taking()
            self.release(leases, 0 if retiring else self.actor.min_prefetch)
            if retiring:
                self._notify(self.actor, RETIRE)
        elif word == "malformed":
            logger.error("the broker refused a frame: %s", detail)

    def on_connected(self, broker_epoch: int) -> None:
        """Notify the actor: a pause during which deliveries waited may have ended without a recall."""
        if self.inbox and self.actor is not None:
            self.signalled = True
            self._notify(self.actor, WORK)

    def on_lost(self, ids: list[int]) -> None:
        """Mark deliveries that must not start. The same message may arrive again under another lease."""
        gone = set(ids)
        with self.lock:
            self.lost = {(item.id, item.lease) for item, _ in self.inbox if item.id in gone}

    def on_stale(self, ids: list[int]) -> None:
        """Log settlements that were refused: another worker holds these messages now."""
        logger.warning("settlements of %s were refused: no longer held", ids)

    def holding(self) -> list[tuple[int, int]]:
        """Return (id, lease) of each message that was delivered and is not settled."""
        with self.lock:
            held = [(item.id, item.lease) for item, _ in self.inbox]
            return held + self.actor.held_leases() if self.actor is not None else held

    def steps_of(self, item: DeliveryItem) -> _Steps:
        """Return the step store of one delivery."""
        return _Steps(self, item)


class _Steps:
    """A step store in the broker: each step is stored with its message, durable on return."""

    __slots__ = ("_item", "_mailbox")

    def __init__(self, mailbox: Mailbox, item: DeliveryItem) -> None:
        self._mailbox = mailbox
        self._item = item

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`. Raise `StageFlowError` if this worker no longer holds the message."""
        broker = self._mailbox.broker
        assert broker is not None
        try:
            broker.checkpoint(self._item.id, self._item.lease, name, value).result()
        except (Refused, PayloadTooLarge, ProtocolError) as error:
            raise StageFlowError(f"step {name!r} cannot be stored: {error}") from None

    def report(self, progress: bytes) -> None:
        """See `StepStore.report`. The answer is ignored."""
        broker = self._mailbox.broker
        assert broker is not None
        broker.admin.report_progress(self._item.id, self._item.lease, progress)
