"""`BrokerAdmin`: each operation is one query under the name that the wire has always had, and is documented."""

from __future__ import annotations

import inspect
from concurrent.futures import Future
from typing import Any

import pytest

from stageflow_brokers.admin import BrokerAdmin
from stageflow_brokers.api import Listener, QueueOptions
from stageflow_brokers.client.query_admin import QueryAdmin
from stageflow_brokers.core.machine import Machine
from stageflow_brokers.memory import MemoryBroker

OPTIONS = [QueueOptions("q")]

FRAMES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "ping": ((), ("ping",)),
    "stats": (("q",), ("stats", "q")),
    "audit": ((), ("audit",)),
    "compact": ((True,), ("compact", True)),
    "get_fact": (("f",), ("fact", "f", None)),
    "set_fact": (("f", "v"), ("fact", "f", "v")),
    "subscribe": ((True,), ("subscribe", True)),
    "declare": ((OPTIONS,), ("declare", OPTIONS)),
    "peek": (("q", 1, 2), ("peek", "q", 1, 2)),
    "pause": (("q",), ("pause", "q")),
    "resume": (("q",), ("resume", "q")),
    "requeue": (("q", [1]), ("requeue", "q", [1])),
    "purge": (("q", [1]), ("purge", "q", [1])),
    "replace": (("q", 1, b"b"), ("replace", "q", 1, b"b")),
    "watch": ((["g"],), ("watch", ["g"])),
    "lookup": ((["g"],), ("lookup", ["g"])),
    "inspect": ((["g"],), ("inspect", ["g"])),
    "list_groups": (("q", 9), ("groups", "q", 9)),
    "live_ids": ((), ("live",)),
    "tally": ((["q"], [b"m"], [1]), ("tally", ["q"], [b"m"], [1])),
    "raise_epoch": (("g", 2, "q", "l"), ("raise-epoch", "g", 2, "q", "l")),
    "cancel": (("g", "why", ["p"]), ("cancel", "g", "why", ["p"])),
    "hand_over": (("g", [1], "q", "l"), ("hand-over", "g", [1], "q", "l")),
    "restart": (("g", "q", "l", b"b"), ("restart", "g", "q", "l", b"b")),
    "report_progress": ((1, 2, b"p"), ("progress", 1, 2, b"p")),
    "notify_supervisor": (("word", 1), ("tell", "word", 1)),
    "report_death": ((1, [2], True, False, b"f"), ("dead", 1, [2], True, False, b"f")),
    "set_workers": (([(1, ["q"])],), ("roster", [(1, ["q"])])),
    "suspend_delivery": ((True,), ("hold", True)),
    "forget_groups": ((["g"],), ("leave", ["g"])),
    "recall": ((1,), ("recall", 1)),
    "retire": ((1,), ("retire", 1)),
    "report_starts": (([("q", True, "why", 1.0)],), ("starts", [("q", True, "why", 1.0)])),
}
"""(arguments, frame) of each operation. The frames are part of the protocol: peers of other releases send them too."""

OPERATIONS = [name for name in vars(BrokerAdmin) if not name.startswith("_")]


def test_every_operation_has_its_frame_here() -> None:
    assert sorted(FRAMES) == sorted(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_sends_the_query_that_the_wire_knows(operation: str) -> None:
    sent: list[tuple[Any, ...]] = []
    answer: Future[Any] = Future()

    def send(name: str, *args: Any) -> Future[Any]:
        sent.append((name, *args))
        return answer

    args, frame = FRAMES[operation]
    assert getattr(QueryAdmin(send), operation)(*args) is answer
    assert sent == [frame]


def test_every_query_of_the_core_has_an_operation_but_those_that_a_connection_sends_itself() -> None:
    assert {frame[0] for _, frame in FRAMES.values()} == set(Machine().admin._queries) - {"consume", "bye"}


def test_a_broker_answers_an_operation() -> None:
    hub = MemoryBroker()
    try:
        admin = hub.connect(Listener()).admin
        assert admin.set_fact("name", "value").result(20) == "value"
        assert admin.get_fact("name").result(20) == "value"
        assert admin.ping().result(20) == {"epoch": 1, "open": True}
    finally:
        hub.close()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_says_what_it_does_and_what_each_argument_is(operation: str) -> None:
    method = getattr(BrokerAdmin, operation)
    doc = inspect.getdoc(method) or ""
    parameters = [name for name in inspect.signature(method).parameters if name != "self"]
    assert [name for name in parameters if f"\n    {name}: " not in doc] == []
    assert ("\nArgs:\n" in doc) == bool(parameters)
