"""A gather that is opened again under its key: each opening has its own deadline."""

from __future__ import annotations

import pytest
from broker_fixtures import Peer, World

from stageflow_brokers.types import ACK, FLAG_START, Arrival, GatherOpen, SettleItem


def wait_for_signal(peer: Peer, deadline: float) -> None:
    """Settle the message that the peer holds; the next one comes with the signal, or at the deadline."""
    (item,) = peer.held.values()
    opening = GatherOpen("signal", 1, 0, 4, deadline=deadline)
    peer.settle([("q", "woken")], others=[SettleItem([(item.id, item.lease)], ACK, opens=[opening])], bodies=[b"base"])
    assert peer.held == {}


def signal(peer: Peer, slot: str) -> None:
    peer.publish([], [], [b"answer"], arrivals=[Arrival("signal", slot, 6, "g", 1)])


def failure(peer: Peer) -> bytes | None:
    """How the message that was published for the gather came about."""
    (item,) = peer.held.values()
    assert item.extra is not None
    assert item.extra.label == "woken"
    return item.extra.failure


@pytest.mark.parametrize("restarted", [False, True], ids=["live", "restarted"])
@pytest.mark.parametrize("second", [60.0, 0.0], ids=["later", "none"])
def test_a_second_wait_for_a_signal_ends_at_no_deadline_of_the_first(second: float, restarted: bool) -> None:
    world = World()
    peer = world.peer(1, consume={"q": 1})
    peer.publish([("q", "a")], [(0, 1, "g", 1, FLAG_START, 0, 0.0, 0.0, b"d")], [b"x"])
    wait_for_signal(peer, 10.0)
    world.pass_time(4.0)
    signal(peer, "first")
    assert failure(peer) is None
    wait_for_signal(peer, second)
    if restarted:
        world.restart()
        peer.hello()
    world.pass_time(30.0)
    assert peer.held == {}, "the deadline of the first wait has passed, not that of the second"
    if second:
        world.pass_time(40.0)
        assert failure(peer) == b"expired"
    else:
        signal(peer, "second")
        assert failure(peer) is None
