#!/usr/bin/env python3
"""Makes the golden files: samples of each format that is read for ever, as the release that introduced it wrote them.

    python scripts/make_golden.py tests/golden/v1

They are written once and never again: a release whose formats differ writes a directory of its own beside them, and
the tests go on reading the old ones. So this refuses a directory that is not empty.
"""

from __future__ import annotations

import queue
import shutil
import sys
import tempfile
from pathlib import Path

from msgspec import Raw

from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    Command,
    CompensationRecord,
    CompensationTask,
    Envelope,
    Failure,
    ItemEnd,
    Outcome,
    Reply,
    StageRecord,
    append_record,
    encode,
    raw,
)
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.writer import HistoryWriter
from stageflow_brokers.api import (
    ACK,
    DEAD_LETTER,
    FLAG_CLOSE_GROUP,
    FLAG_START,
    RETRY,
    TERMINAL,
    Arrival,
    DeliveryItem,
    GatherOpen,
    Listener,
    PublishItem,
    QueueOptions,
    SettleItem,
    Target,
)
from stageflow_brokers.client.connection import Connection
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.memory import MemoryBroker

WALL = 1_700_000_000.0
CONTEXT = {"order_id": "A-1", "total": 99.5, "raw": b"\x00\xff", "big": 2**64 - 1, "none": None}
DIGEST = bytes(range(16))

TRAIL = EMPTY_TRAIL
for _record in (
    StageRecord("reserve", "completed", 1, WALL + 1, 0.25, None, raw({"shelf": 3})),
    StageRecord("mail", "failed", 2, WALL + 2, 0.5, "OSError: no mail"),
    StageRecord("gift", "skipped", 0, WALL + 3, 0.0, "stage 'gift' needs 'mail' to have completed"),
    StageRecord("pay", "completed", 3, WALL + 4, 0.125, None, raw("receipt-7"), raw([["card", 1]])),
    StageRecord("ship", "failed", 1, WALL + 5, 0.0625, "ValueError: boom failed"),
):
    TRAIL = append_record(TRAIL, _record)

UNDONE = [CompensationRecord("pay", "failed", "OSError: stuck", 0.5), CompensationRecord("reserve", "completed")]

SAMPLES = {
    "envelope-submitted": Envelope("orders", 1, "reserve", raw(CONTEXT), EMPTY_TRAIL, WALL, digest=DIGEST),
    "envelope-compensating": Envelope(
        "orders",
        2,
        "reserve",
        raw(CONTEXT),
        TRAIL,
        WALL,
        raw({"reply": 1}),
        "ValueError: boom failed",
        "ship",
        CompensationTask(["reserve"], UNDONE[:1], "compensated"),
        None,
        2,
    ),
    "outcome-completed": Outcome("orders", 1, "completed", raw(CONTEXT), TRAIL, WALL, WALL + 9.5, digest=DIGEST),
    "outcome-compensation-failed": Outcome(
        "orders", 2, "compensation_failed", NIL, TRAIL, WALL, WALL + 9.5, "ValueError: boom failed", "ship", UNDONE
    ),
    "failure": Failure("exception", "StageError: busy", "StageError", True),
    "item-end": ItemEnd(raw(7), "ValueError: boom failed", raw({"sku": "TEA"})),
    "command": Command("stage:stock", raw({"sku": "TEA"}), "orders", "stock"),
    "reply": Reply(raw({"left": 3}), "OSError: no stock"),
}

FIRST, SECOND = Target("stageflow.orders.stage0", "reserve"), Target("stageflow.orders.stage1", "pay")
END = Target("stageflow.finished", ":finished", TERMINAL)
IDS = [f"order-{number}" for number in range(1, 10)]


class _Inbox(Listener):
    def __init__(self) -> None:
        self.arrived: queue.SimpleQueue[tuple[DeliveryItem, bytes]] = queue.SimpleQueue()

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        for item, body in zip(items, bodies, strict=True):
            self.arrived.put((item, body))

    def take(self, count: int) -> dict[str, DeliveryItem]:
        """The next `count` deliveries by group."""
        items = [self.arrived.get(timeout=10)[0] for _ in range(count)]
        return {item.group: item for item in items}


def make_journal(directory: Path) -> None:
    """A journal over which nine instances have gone, each left in another state, with records of every kind."""
    engine = _open(directory)
    broker = MemoryBroker(engine=engine)
    inbox = _Inbox()
    peer = broker.connect(inbox, role="worker", name="golden", peer=7)
    options = QueueOptions(FIRST.queue, 3, True, "stageflow.coordinator", ":dead", 100)
    peer.admin.declare([options]).result(10)
    peer.admin.set_fact("history", "identity of the history").result(10)
    bodies = [encode(Envelope("orders", 1, "reserve", raw({"id": id}), EMPTY_TRAIL, WALL)) for id in IDS]
    items = [
        PublishItem(0, len(body), id, 1, FLAG_START, 0, 0.0, 0.0, DIGEST if id == IDS[0] else None)
        for id, body in zip(IDS, bodies, strict=True)
    ]
    peer.publish([FIRST], items, bodies).result(10)
    peer.consume(FIRST.queue, len(IDS))
    held = inbox.take(len(IDS))
    leases = {id: [(item.id, item.lease)] for id, item in held.items()}
    failure = encode(SAMPLES["failure"])

    peer.checkpoint(*leases["order-2"][0], "charge", encode({"receipt": 7})).result(10)
    moves = [(*leases[id][0], place, len(body), id) for id, place, body in _moved()]
    others = [
        SettleItem(leases["order-2"], RETRY, [], 3600.0, failure),
        SettleItem(leases["order-3"], DEAD_LETTER, [], 0.0, failure),
        SettleItem(
            leases["order-6"], ACK, opens=[GatherOpen("approval", 2, 0, 4)], arrivals=[Arrival("approval", "a", 3)]
        ),
        SettleItem(leases["order-7"], DEAD_LETTER, [], 0.0, failure),
        SettleItem(leases["order-8"], DEAD_LETTER, [], 0.0, failure),
        SettleItem(leases["order-9"], RETRY, [], 3600.0, failure),
    ]
    moved = [body for _, _, body in _moved()]
    peer.settle([SECOND, END], moves, [], others, [*moved, b"base", b"yes"])
    peer.admin.ping().result(10)

    peer.admin.pause(SECOND.queue).result(10)
    dead = {message["group"]: message["id"] for message in peer.admin.peek(f"dlq.{FIRST.queue}", 0, 9).result(10)}
    peer.admin.purge(f"dlq.{FIRST.queue}", [dead["order-8"]]).result(10)
    peer.admin.raise_epoch("order-9", 2, "stageflow.coordinator", ":cancelled").result(10)
    peer.consume(END.queue, 1)
    (ended,) = inbox.take(1).values()
    peer.settle([], [], [(ended.id, ended.lease, FLAG_CLOSE_GROUP, ended.group)], [], [])
    peer.admin.ping().result(10)
    _requeue_last(peer, dead["order-7"])
    peer.close()
    broker.close()
    # As it is when the machine stops after what lives in the oldest segments has been written again, before those go.
    engine = _open(directory)
    for segment in (1, 2):
        engine.machine.writer.copy_live(segment, 1 << 20)
        engine.round([])
    engine.machine.writer.record_global_state()
    engine.round([])
    engine.close()


def _open(directory: Path) -> Engine:
    return Engine(journal_dir=directory, segment_bytes=4096, wall=lambda: WALL, monotonic=lambda: 100.0)


def _moved() -> list[tuple[str, int, bytes]]:
    """What goes on: (instance, target, body). The first of those that ended is also taken from the queue of ends."""
    envelope = Envelope("orders", 1, "pay", raw({"id": "order-1"}), TRAIL, WALL)
    outcome = Outcome("orders", 1, "completed", Raw(encode(CONTEXT)), TRAIL, WALL, WALL + 9.5)
    return [("order-1", 0, encode(envelope)), ("order-5", 1, encode(outcome)), ("order-4", 1, encode(outcome))]


def _requeue_last(peer: Connection, id: int) -> None:
    """Publish last, so that no consumer is there to receive it."""
    peer.consume(FIRST.queue, 0)
    peer.admin.requeue(f"dlq.{FIRST.queue}", [id]).result(10)


def make_history(path: Path) -> None:
    """A history of three instances, one with all there is to say."""
    completed, failed = encode(SAMPLES["outcome-completed"]), encode(SAMPLES["outcome-compensation-failed"])
    with HistoryWriter.open(path, create=True) as history:
        history.write(
            [
                HistoryRow("a", 1, "orders", 1, "completed", WALL, WALL + 9.5, None, None, DIGEST, completed),
                HistoryRow(
                    "b",
                    3,
                    "orders",
                    2,
                    "compensation_failed",
                    WALL,
                    WALL + 9.5,
                    "ValueError: boom failed",
                    "ship",
                    None,
                    failed,
                ),
                HistoryRow("c", 1, "returns", 1, "completed", WALL + 1, WALL + 2, None, None, None, completed),
            ]
        )
        history.vacuum()


def main() -> int:
    """Write everything into the directory given."""
    if len(sys.argv) != 2:
        print("usage: make_golden.py DIRECTORY", file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    if target.exists() and any(target.iterdir()):
        print(f"{target} holds golden files already; they are never overwritten", file=sys.stderr)
        return 1
    target.mkdir(parents=True, exist_ok=True)
    for name, sample in SAMPLES.items():
        (target / f"{name}.msgpack").write_bytes(encode(sample))
    make_history(target / "history.db")
    with tempfile.TemporaryDirectory() as made:
        make_journal(Path(made))
        (target / "journal").mkdir()
        for segment in Path(made).glob("*.journal"):
            shutil.copy(segment, target / "journal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
