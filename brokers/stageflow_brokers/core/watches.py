"""Watches: notify peers of the end of groups, subscribers of settlements.

This module must not change messages or groups. It only reads them and fills the outbox.
"""

from __future__ import annotations

from stageflow_brokers.core.outbox import UNREAD_PAUSE_BYTES, Outbox
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState

__all__ = ["Watches"]


class Watches:
    """The watches of one machine.

    A watch belongs to a session and ends with it. It is not recorded: the peer watches again after a broker restart.
    `pending_sessions` are the sessions that watch more ended groups than they have read the ends of.
    """

    def __init__(self, state: BrokerState, writer: RecordWriter, outbox: Outbox) -> None:
        self._state = state
        self._writer = writer
        self._outbox = outbox
        self.pending_sessions: dict[Session, None] = {}

    def subscribe(self, session: Session, wanted: bool) -> None:
        """Start or end the notices `settled` for a session. They end with the session."""
        if wanted:
            self._outbox.subscribers[session] = None
        else:
            self._outbox.subscribers.pop(session, None)

    def watch(self, session: Session, ids: list[str]) -> list[str]:
        """Watch these groups for `session`. Return the ids that are not live; they are also announced as `gone`.

        Ends of groups that have ended already are pushed as fast as the peer reads them (`push_pending_ends`).
        """
        gone = []
        for id in dict.fromkeys(ids):
            group = self._state.groups.get(id)
            if group is None:
                gone.append(id)
                self._outbox.add_notice(session, "gone", id)
                continue
            if group.watchers is None:
                group.watchers = [session]
            elif session not in group.watchers:
                group.watchers = [w for w in group.watchers if w.connected] + [session]
            if group.end_label:
                session.unpushed_ends[id] = None
            elif group.is_halted(self._state.now):
                self._outbox.add_notice(session, "parked", id)
        self.push_pending_ends(session)
        return gone

    def push_pending_ends(self, session: Session) -> None:
        """Push watched ends until the peer has enough to read.

        A group that was closed since then is `gone`.
        """
        if session.unpushed_ends:
            self.pending_sessions[session] = None
        while session.unpushed_ends and session.unread_bytes <= UNREAD_PAUSE_BYTES:
            id = next(iter(session.unpushed_ends))
            del session.unpushed_ends[id]
            group = self._state.groups.get(id)
            if group is None:
                self._outbox.add_notice(session, "gone", id)
                continue
            for message in group.messages():
                if message.label == group.end_label:
                    self._outbox.add_push(session, group, message.label, self._writer.body(message))
        if not session.unpushed_ends:
            self.pending_sessions.pop(session, None)
