"""Between the connection's thread of a worker and its actor: what has arrived and is not begun, and steps on their way.

No user code runs on the connection's thread, and it waits for nobody but for the lock, which is never held for longer
than a message takes to change hands.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any, Protocol

import pykka

from brokers.api import Broker, DeliveryItem, Listener, PayloadTooLarge, ProtocolError, Refused
from stageflow_actors.errors import StageFlowError

__all__ = ["RETIRE", "WORK", "Mailbox", "MailboxActor"]

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
    """Between the connection's thread and the actor's: what has arrived and is not begun.

    `lock` guards the way of a message from here through the actor's hands into the connection: whoever has it sees
    each message that this worker holds in one place at least.
    """

    def __init__(self, queue: str) -> None:
        self.inbox: deque[tuple[DeliveryItem, bytes]] = deque()
        self.lock = threading.Lock()
        self.actor: MailboxActor | None = None
        self.broker: Broker | None = None
        self.signalled = False
        self.lost: set[tuple[int, int]] = set()
        self._queue = queue

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """Lay them ready; one word to the actor is enough for the batch."""
        self.inbox.extend(zip(items, bodies, strict=True))
        if not self.signalled and self.actor is not None:
            self.signalled = True
            self._notify(self.actor, WORK)

    def _notify(self, actor: MailboxActor, message: str) -> None:
        """A worker that retires has no actor any more while its last settlements are on their way; what comes to it
        then goes back with its end."""
        try:
            actor.actor_ref.tell(message)
        except pykka.ActorDeadError:
            pass

    def on_notice(self, word: str, detail: Any) -> None:
        """Hand on what is done and return what has not begun, when asked to: the message in work takes long, or this
        worker is to end.
        """
        if word in ("recall", RETIRE) and self.broker is not None and self.actor is not None:
            retiring = word == RETIRE
            with self.lock:
                self.actor.settle_finished()
                leases = [(item.id, item.lease) for item, _ in self.inbox]
                self.inbox.clear()
                if retiring:
                    self.actor.stop_taking()
            self.broker.release(leases, self._queue, 0 if retiring else self.actor.min_prefetch)
            if retiring:
                self._notify(self.actor, RETIRE)
        elif word == "malformed":
            logging.getLogger("stageflow.worker").error("the broker refused a frame: %s", detail)

    def on_lost(self, ids: list[int]) -> None:
        """What is not ours any more is not begun. The same message may well come again, under another lease."""
        gone = set(ids)
        with self.lock:
            self.lost = {(item.id, item.lease) for item, _ in self.inbox if item.id in gone}

    def on_stale(self, ids: list[int]) -> None:
        """A settlement was refused: somebody else has these messages now."""
        logging.getLogger("stageflow.worker").warning("settlements of %s were refused: no longer held", ids)

    def holding(self) -> list[tuple[int, int]]:
        """Everything delivered and not yet settled."""
        with self.lock:
            held = [(item.id, item.lease) for item, _ in self.inbox]
            return held + self.actor.held_leases() if self.actor is not None else held

    def steps_of(self, item: DeliveryItem) -> _Steps:
        """Where the steps of one delivery are kept."""
        return _Steps(self, item)


class _Steps:
    """Keeps steps with the message in the broker, durable on return."""

    __slots__ = ("_item", "_mailbox")

    def __init__(self, mailbox: Mailbox, item: DeliveryItem) -> None:
        self._mailbox = mailbox
        self._item = item

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`. Raises `StageFlowError` when this worker no longer holds the message."""
        broker = self._mailbox.broker
        assert broker is not None
        try:
            broker.checkpoint(self._item.id, self._item.lease, name, value).result()
        except (Refused, PayloadTooLarge, ProtocolError) as error:
            raise StageFlowError(f"step {name!r} cannot be kept: {error}") from None

    def report(self, progress: bytes) -> None:
        """See `StepStore.report`. Whether it arrives is nobody's concern."""
        broker = self._mailbox.broker
        assert broker is not None
        broker.admin.report_progress(self._item.id, self._item.lease, progress)
