"""Watching: peers that want to be told how a group ends, that it came to a halt, or all that happens to all groups."""

from __future__ import annotations

from stageflow_brokers.core.outbox import UNREAD_PAUSE_BYTES, Outbox
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState

__all__ = ["Watches"]


class Watches:
    """Who watches what. A watch is of a session: it does not outlive it, and is asked for again after a restart.

    `behind`: sessions that have asked for more ends than they have read yet.
    """

    def __init__(self, state: BrokerState, writer: RecordWriter, outbox: Outbox) -> None:
        self._state = state
        self._writer = writer
        self._outbox = outbox
        self.pending_sessions: dict[Session, None] = {}

    def subscribe(self, session: Session, wanted: bool) -> None:
        """Tell `session` of each settlement from now on what follows from it, or no more. It ends with the session."""
        if wanted:
            self._outbox.subscribers[session] = None
        else:
            self._outbox.subscribers.pop(session, None)

    def watch(self, session: Session, ids: list[str]) -> list[str]:
        """Tell `session` how these groups end; those that are not live are returned and announced as gone.

        How those have ended that are still here is told as fast as it is read: see `go_on`.
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
            if group.ended:
                session.unpushed_ends[id] = None
            elif group.is_halted(self._state.now):
                self._outbox.add_notice(session, "parked", id)
        self.push_pending_ends(session)
        return gone

    def push_pending_ends(self, session: Session) -> None:
        """Push ends that a session has asked for, until it has enough to read. What has left meanwhile is gone."""
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
                if message.label == group.ended:
                    self._outbox.add_push(session, group, message.label, self._writer.body(message))
        if not session.unpushed_ends:
            self.pending_sessions.pop(session, None)
