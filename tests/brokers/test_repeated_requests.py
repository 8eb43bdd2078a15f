"""Requests that change the broker, whose answer was lost: sent again after a reconnect they are answered as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from broker_fixtures import Peer, World

from stageflow_brokers.core import wire
from stageflow_brokers.types import DEAD_LETTER, FLAG_START, SettleItem

Request = tuple[str, tuple[Any, ...]]


def dead_letters(world: World, worker: Peer) -> list[int]:
    """Park the message that the worker holds of each group."""
    ids = []
    for item in list(worker.held.values()):
        worker.settle([], others=[SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, b"why")])
        ids.append(item.id)
    return ids


def requeue(world: World, worker: Peer, client: Peer) -> Request:
    dead_letters(world, worker)
    return "requeue", ("q", [])


def purge(world: World, worker: Peer, client: Peer) -> Request:
    dead_letters(world, worker)
    return "purge", ("dlq.q", [])


def hand_over(world: World, worker: Peer, client: Peer) -> Request:
    client.query("pause", "q")
    worker.release([(item.id, item.lease) for item in worker.held.values()])
    client.query("cancel", "g0", "because", [])
    (message,) = world.machine.state.groups["g0"].messages()
    return "hand-over", ("g0", [message.id], "coordinator", "cancelled")


def replace(world: World, worker: Peer, client: Peer) -> Request:
    return "replace", ("q", dead_letters(world, worker)[0], b"mended")


def restart(world: World, worker: Peer, client: Peer) -> Request:
    dead_letters(world, worker)
    return "restart", ("g0", "q", "again", b"body")


@pytest.mark.parametrize(
    ("prepare", "answer"),
    [
        pytest.param(requeue, {"requeued": 2, "refused": []}, id="requeue"),
        pytest.param(purge, {"purged": 2, "instances": ["g0", "g1"]}, id="purge"),
        pytest.param(hand_over, 1, id="hand_over"),
        pytest.param(replace, {"epoch": 1}, id="replace"),
        pytest.param(restart, {"epoch": 2}, id="restart"),
    ],
)
def test_a_request_that_is_sent_again_after_a_reconnect_gets_the_same_answer(
    prepare: Callable[[World, Peer, Peer], Request], answer: Any
) -> None:
    world = World()
    worker = world.peer(1, consume={"q": 9, "coordinator": 9})
    client = world.peer(2)
    items = [(0, 1, f"g{number}", 1, FLAG_START, 0, 0.0, 0.0, b"d") for number in range(2)]
    client.publish([("q", "a")], items, [b"x", b"y"])
    frames = [client.frame_of(wire.QUERY, prepare(world, worker, client))]
    world.round(frames)
    # A second request was on its way: what it changes must not change the answer to the first one.
    frames.append(client.frame_of(wire.QUERY, ("requeue", ("q", []))))
    world.round(frames[1:])
    answers = {number: client.results.pop(number) for number in (client.frame - 1, client.frame)}
    assert answers[client.frame - 1] == answer
    client.hello(next_frame=client.frame - 1)
    world.round(frames)
    assert {number: client.results.get(number) for number in answers} == answers
