"""What peers are to be told: it waits here, session by session, until the records that it speaks of are on disk.

Nothing here decides what is said, and nothing leaves but by `spoken`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from stageflow_brokers.core import wire
from stageflow_brokers.core.message import Group
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState

__all__ = ["UNREAD_PAUSE_BYTES", "Outbox", "Outgoing"]

MARK_BYTES = 4 << 20
"""How much is said to a peer between marks, which it answers as it reads them."""

UNREAD_PAUSE_BYTES = 64 << 20
"""A peer with so many bytes still to be read is answered no further question, and pushed nothing that can wait."""

Outgoing = tuple[int, bytes, bytes]
"""(peer, header, blob) to be sent."""


class Outbox:
    """The broker's side of all conversations. `deaf`: sessions that have left more than `max_unread_bytes` unread."""

    def __init__(self, state: BrokerState, *, max_unread_bytes: int) -> None:
        self._state = state
        self._max_unread_bytes = max_unread_bytes
        self._mark_bytes = min(MARK_BYTES, max_unread_bytes // 4)
        self.slow_peers: list[Session] = []
        self.dirty: dict[Session, None] = {}
        self.subscribers: dict[Session, None] = {}
        self._strangers: dict[int, tuple[str, Any]] = {}

    def add_result(self, session: Session, frame: int, value: Any) -> None:
        """Answer a frame."""
        session.results.append((frame, value))
        self.dirty[session] = None

    def add_notice(self, session: Session, word: str, detail: Any) -> None:
        """Say something that was not asked."""
        session.notices.append((word, detail))
        self.dirty[session] = None

    def add_stranger_notice(self, peer: int, word: str, detail: Any) -> None:
        """Say one thing to a peer that is not known, or not any more."""
        self._strangers[peer] = (word, detail)

    def notify_watchers(self, group: Group, word: str) -> None:
        """Tell whoever watches the group."""
        for session in group.watchers or ():
            self.add_notice(session, word, group.id)

    def notify_subscribers(self, told: list[tuple[str, int, str, bytes]]) -> None:
        """Tell all who have subscribed what follows from the settlements of a frame, as (group, epoch, label, body)."""
        for session in list(self.subscribers):
            if session.connected:
                self.add_notice(session, "settled", told)
            else:
                del self.subscribers[session]

    def push_to_watchers(self, group: Group, label: str, body: bytes) -> None:
        """Send a body to whoever watches the group."""
        for session in group.watchers or ():
            self.add_push(session, group, label, body)

    def add_answer(self, session: Session, frame: int, value: Any) -> None:
        """Answer a question, however much there is to be said to it."""
        raw = msgspec.Raw(wire.encode(value))
        session.owed_bytes += len(raw)
        self.add_result(session, frame, raw)

    def add_push(self, session: Session, group: Group, label: str, body: bytes) -> None:
        """Send a body to one session."""
        session.owed_bytes += len(body)
        session.pushes.append((group.id, label, len(body)))
        session.push_bodies.append(body)
        self.dirty[session] = None

    def disconnect_notice(self, session: Session) -> Outgoing:
        """What is said to a session that is cut off: once it has read so far, it says hello anew."""
        session.read_bytes = session.marked_bytes = session.sent_bytes
        return session.peer, wire.encode((self._state.epoch, -1, (), (), (), (("hello", None),))), b""

    def drain(self) -> list[Outgoing]:
        """All that may leave now."""
        epoch = self._state.epoch
        out = []
        for session in self.dirty:
            if not session.connected and not session.is_leaving:
                session.clear_outgoing()
                continue
            said, owed = session.sent_bytes, session.owed_bytes
            if said + owed - session.marked_bytes > self._mark_bytes:
                if said - session.read_bytes > self._max_unread_bytes:
                    self.slow_peers.append(session)
                    session.clear_outgoing()
                    continue
                session.marked_bytes = said + owed
                session.notices.append(("mark", said + owed))
            acked, results, later = session.received_frame, session.results, None
            if session.deferred_frames:
                acked = min(acked, session.deferred_frames[0] - 1)
                later = [result for result in results if result[0] > acked]
                results = [result for result in results if result[0] <= acked]
            try:
                header = wire.encode(
                    (epoch, acked, results, session.deliveries, session.pushes, session.notices),
                )
                blob = b"".join(session.bodies + session.push_bodies)
            except MemoryError:
                # One that wants more than there is must not be the end of all: it is cut off, and greets anew.
                self.slow_peers.append(session)
                session.clear_outgoing()
                continue
            session.clear_outgoing()
            if later:
                session.results = later
            session.is_leaving = False
            session.sent_bytes = said + len(header) + len(blob)
            out.append((session.peer, header, blob))
        self.dirty.clear()
        for peer, notice in self._strangers.items():
            out.append((peer, wire.encode((epoch, -1, (), (), (), (notice,))), b""))
        self._strangers.clear()
        return out
