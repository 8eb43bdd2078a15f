"""Watching: peers that want to be told how a group ends, that it came to a halt, or all that happens to all groups."""

from __future__ import annotations

from brokers.core.ledger import Ledger
from brokers.core.message import PARKED
from brokers.core.sessions import Session
from brokers.core.store import Store
from brokers.core.talk import Talk

__all__ = ["Watching"]


class Watching:
    """Who watches what. A watch is of a session: it does not outlive it, and is asked for again after a restart."""

    def __init__(self, store: Store, ledger: Ledger, talk: Talk) -> None:
        self._store = store
        self._ledger = ledger
        self._talk = talk

    def subscribe(self, session: Session, wanted: bool) -> None:
        """Tell `session` of each settlement from now on what follows from it, or no more. It ends with the session."""
        if wanted:
            self._talk.subscribers[session] = None
        else:
            self._talk.subscribers.pop(session, None)

    def watch(self, session: Session, ids: list[str]) -> list[str]:
        """Tell `session` how these groups end; those that are not live are returned and announced as gone."""
        gone = []
        for id in ids:
            group = self._store.groups.get(id)
            if group is None:
                gone.append(id)
                self._talk.notice(session, "gone", id)
                continue
            if group.watchers is None:
                group.watchers = [session]
            elif session not in group.watchers:
                group.watchers = [w for w in group.watchers if w.connected] + [session]
            messages = group.messages()
            if group.ended:
                for message in messages:
                    if message.label == group.ended:
                        self._talk.push_to(session, group, message.label, self._ledger.body(message))
            elif messages and all(message.state() == PARKED for message in messages):
                self._talk.notice(session, "parked", id)
        return gone
