"""The outbox: frames to peers, collected until the round is on disk.

A transactional outbox: `drain` is the only way out, and its caller must call it after the commit. This module must not
decide what is sent.
"""

from __future__ import annotations

from typing import Any

import msgspec

from stageflow_brokers.core import wire
from stageflow_brokers.core.message import Group, Message
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState

__all__ = ["REPORTED_BODY_BYTES", "UNREAD_PAUSE_BYTES", "Outbox", "Outgoing"]

MARK_BYTES = 4 << 20
"""Bytes that are sent to a peer between two marks. The peer answers each mark when it reads it."""

UNREAD_PAUSE_BYTES = 64 << 20
"""Unread bytes of a peer from which on its queries wait, and pushes that can wait are not sent."""

REPORTED_BODY_BYTES = 256
"""Bytes of the body of a dead letter that the supervisor receives: the fields that name it."""

Outgoing = tuple[int, bytes, bytes]
"""(peer, header, blob) to be sent."""


class Outbox:
    """The results, notices, deliveries and pushes of one machine that wait to be sent.

    Attributes:
        slow_peers: Sessions that have more than `max_unread_bytes` unread; the machine disconnects them.
        dirty: Sessions that have something to send, in order.
        subscribers: Sessions that receive the notices `settled`, in order.
    """

    def __init__(self, state: BrokerState, *, max_unread_bytes: int) -> None:
        self._state = state
        self._max_unread_bytes = max_unread_bytes
        self._mark_bytes = min(MARK_BYTES, max_unread_bytes // 4)
        self.slow_peers: list[Session] = []
        self.dirty: dict[Session, None] = {}
        self.subscribers: dict[Session, None] = {}
        self._strangers: dict[int, tuple[str, Any]] = {}

    def add_result(self, session: Session, frame: int, value: Any) -> None:
        """Add the result of a frame."""
        session.results.append((frame, value))
        self.dirty[session] = None

    def add_notice(self, session: Session, word: str, detail: Any) -> None:
        """Add a notice that answers no frame."""
        session.notices.append((word, detail))
        self.dirty[session] = None

    def add_stranger_notice(self, peer: int, word: str, detail: Any) -> None:
        """Set the one notice for a peer without a session."""
        self._strangers[peer] = (word, detail)

    def notify_watchers(self, group: Group, word: str) -> None:
        """Add a notice for each watcher of the group."""
        for session in group.watchers or ():
            self.add_notice(session, word, group.id)

    def report_dead_letter(self, message: Message, head: bytes) -> None:
        """Notify the supervisor of a dead letter, whose body begins with `head`; the notice is not stored."""
        state, group = message.ensure_delivery_state(), message.group
        detail = (
            message.queue.name,
            "" if group is None else group.id,
            message.label,
            state.attempts,
            state.evidence,
            state.reason,
            head,
        )
        for session in self._state.sessions.values():
            if session.role == "supervisor" and session.connected:
                self.add_notice(session, "dead-letter", detail)

    def notify_subscribers(self, settlements: list[tuple[str, int, str, bytes]]) -> None:
        """Notify the subscribers of the messages that follow from a frame's settlements.

        Each is (group, epoch, label or key, body).
        """
        for session in list(self.subscribers):
            if session.connected:
                self.add_notice(session, "settled", settlements)
            else:
                del self.subscribers[session]

    def push_to_watchers(self, group: Group, label: str, body: bytes) -> None:
        """Add a body for each watcher of the group."""
        for session in group.watchers or ():
            self.add_push(session, group, label, body)

    def add_answer(self, session: Session, frame: int, value: Any) -> None:
        """Add the answer to a query.

        Its size counts at once, so that later queries of this round wait.
        """
        raw = msgspec.Raw(wire.encode(value))
        session.owed_bytes += len(raw)
        self.add_result(session, frame, raw)

    def add_push(self, session: Session, group: Group, label: str, body: bytes) -> None:
        """Add a body of a group for one session."""
        session.owed_bytes += len(body)
        session.pushes.append((group.id, label, len(body)))
        session.push_bodies.append(body)
        self.dirty[session] = None

    def disconnect_notice(self, session: Session) -> Outgoing:
        """Return the last frame for a disconnected session.

        When the peer reads it, it sends a new hello.
        """
        session.read_bytes = session.marked_bytes = session.sent_bytes
        return session.peer, wire.encode((self._state.epoch, -1, (), (), (), (("hello", None),))), b""

    def drain(self) -> list[Outgoing]:
        """Return the frames for all peers, and clear them here.

        Call it only after the commit of the round.
        """
        epoch = self._state.epoch
        out = []
        for session in self.dirty:
            if not session.connected and not session.is_leaving:
                session.clear_outgoing()
                continue
            sent, owed = session.sent_bytes, session.owed_bytes
            if sent + owed - session.marked_bytes > self._mark_bytes:
                if sent - session.read_bytes > self._max_unread_bytes:
                    self.slow_peers.append(session)
                    session.clear_outgoing()
                    continue
                session.marked_bytes = sent + owed
                session.notices.append(("mark", sent + owed))
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
                # One peer that asks for more than the memory holds must not end the broker: disconnect only this peer.
                self.slow_peers.append(session)
                session.clear_outgoing()
                continue
            session.clear_outgoing()
            if later:
                session.results = later
            session.is_leaving = False
            session.sent_bytes = sent + len(header) + len(blob)
            out.append((session.peer, header, blob))
        self.dirty.clear()
        for peer, notice in self._strangers.items():
            out.append((peer, wire.encode((epoch, -1, (), (), (), (notice,))), b""))
        self._strangers.clear()
        return out
