"""Starts of senders that have read the history long ago: the broker remembers a limited number of ended groups."""

from __future__ import annotations

import pytest
from broker_fixtures import Peer, World

from stageflow_brokers.core import state
from stageflow_brokers.types import FLAG_CHECK, FLAG_CLOSE_GROUP, FLAG_START


def start(peer: Peer, group: str, seen: int) -> list[list[object]]:
    item = (0, 1, group, 1, FLAG_START | FLAG_CHECK, 0, 0.0, 0.0, b"d", seen)
    answer = peer.publish([("q", "a")], [item], [b"x"])
    return answer["items"] if answer else []


def run(peer: Peer, group: str, seen: int) -> None:
    """Start a group and end it."""
    assert start(peer, group, seen) == []
    (item,) = peer.held.values()
    peer.settle([], acks=[(item.id, item.lease, FLAG_CLOSE_GROUP, group)])


def test_a_start_that_is_older_than_what_the_broker_remembers_is_sent_to_the_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "MAX_REMEMBERED_CLOSED_GROUPS", 3)
    world = World()
    peer = world.peer(1, consume={"q": 1})

    def seen() -> int:
        known = peer.query("lookup", [])
        return int((known["epoch"] << 40) + known["left_seq"])

    old = seen()
    run(peer, "first", old)
    for number in range(3):
        run(peer, f"other {number}", seen())
    # The end of `first` is forgotten: only the history knows that it has ended.
    assert start(peer, "first", old) == [[0, "look-again", "first"]]
    assert start(peer, "unknown", old) == [[0, "look-again", "unknown"]]
    assert start(peer, "unknown", old + 1) == [], "all that ended since then is remembered"
