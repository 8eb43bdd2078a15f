"""Files of earlier releases stay readable: each golden file decodes today as on the day it was made.

A format that changes fails here. It then needs a new version beside the old one, which stays readable, and golden files
of its own (scripts/make_golden.py); existing ones are never written again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import (
    Command,
    CompensationRecord,
    CompensationTask,
    Envelope,
    Failure,
    ItemEnd,
    Layout,
    Outcome,
    Reply,
    StagePlace,
    StageRecord,
    decode_command,
    decode_envelope,
    decode_item_end,
    decode_outcome,
    decode_reply,
    decode_trail,
    encode,
)
from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.result import WorkflowResult, result_of_outcome
from stageflow_actors.history.reader import HistoryReader
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.writer import HistoryWriter
from stageflow_brokers.api import Listener
from stageflow_brokers.client.connection import Connection
from stageflow_brokers.core.records import NAMES
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.journal import scan, verify
from stageflow_brokers.journal.format import (
    SECTOR_BYTES,
    Record,
    encode_end,
    encode_header,
    encode_payload,
    encode_segment,
    read_segment,
    span,
)
from stageflow_brokers.memory import MemoryBroker

GOLDEN = Path(__file__).parent / "v1"

WALL = 1_700_000_000.0
CONTEXT = {"order_id": "A-1", "total": 99.5, "raw": b"\x00\xff", "big": 2**64 - 1, "none": None}
DIGEST = bytes(range(16))
TRAIL = [
    ["reserve", "completed", 1, WALL + 1, 0.25, None, {"shelf": 3}, None],
    ["mail", "failed", 2, WALL + 2, 0.5, "OSError: no mail", None, None],
    ["gift", "skipped", 0, WALL + 3, 0.0, "stage 'gift' needs 'mail' to have completed", None, None],
    ["pay", "completed", 3, WALL + 4, 0.125, None, "receipt-7", [["card", 1]]],
    ["ship", "failed", 1, WALL + 5, 0.0625, "ValueError: boom failed", None, None],
]
NO_TRAIL = b"\xdd\x00\x00\x00\x00"
UNDONE = [["pay", "failed", "OSError: stuck", 0.5], ["reserve", "completed", None, 0.0]]


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.msgpack").read_bytes()


def plain(data: bytes) -> Any:
    """What the bytes hold, with no type of ours in between."""
    return msgspec.msgpack.decode(data)


def assert_written_alike(written: bytes, before: bytes) -> None:
    """What is written today says the same in the same places; there may be more behind it."""
    now, then = plain(written), plain(before)
    assert begins(now, then), f"{now} does not begin with {then}"


def begins(now: Any, then: Any) -> bool:
    if isinstance(now, list) and isinstance(then, list):
        return len(now) >= len(then) and all(map(begins, now, then))
    return bool(now == then)


# what travels


def test_a_submitted_envelope_is_read_as_it_was_written_and_written_as_it_was() -> None:
    data = golden("envelope-submitted")
    assert plain(data) == ["orders", 1, "reserve", CONTEXT, NO_TRAIL, WALL, None, None, None, None, DIGEST, 0]
    envelope = decode_envelope(data)
    assert (envelope.workflow_id, envelope.version, envelope.stage_id) == ("orders", 1, "reserve")
    assert ContextCodec(dict).decode(envelope.context) == CONTEXT
    assert decode_trail(envelope.trail) == []
    assert (envelope.started_at, envelope.digest) == (WALL, DIGEST)
    assert_written_alike(encode(envelope), data)


def test_an_envelope_in_the_midst_of_compensation_is_read_as_it_was_written_and_written_as_it_was() -> None:
    data = golden("envelope-compensating")
    head, trail, tail = plain(data)[:4], plain(data)[4], plain(data)[5:]
    assert head == ["orders", 2, "reserve", CONTEXT]
    assert plain(trail) == TRAIL
    assert tail == [
        WALL,
        {"reply": 1},
        "ValueError: boom failed",
        "ship",
        [["reserve"], UNDONE[:1], "compensated"],
        None,
        2,
    ]
    envelope = decode_envelope(data)
    task = envelope.compensation
    assert task is not None
    assert (task.plan, [record.stage_id for record in task.done], task.final_status) == (
        ["reserve"],
        ["pay"],
        "compensated",
    )
    assert plain(bytes(envelope.payload)) == {"reply": 1}
    records = decode_trail(envelope.trail)
    assert [record.stage_id for record in records] == [record[0] for record in TRAIL]
    assert begins([plain(encode(record)) for record in records], TRAIL)
    assert_written_alike(encode(envelope), data)


def test_outcomes_are_read_as_they_were_written_and_written_as_they_were() -> None:
    data = golden("outcome-completed")
    fields = plain(data)
    assert plain(fields.pop(4)) == TRAIL
    assert fields == ["orders", 1, "completed", CONTEXT, WALL, WALL + 9.5, None, None, [], DIGEST]
    assert_written_alike(encode(decode_outcome(data)), data)
    data = golden("outcome-compensation-failed")
    fields = plain(data)
    assert plain(fields.pop(4)) == TRAIL
    error = "ValueError: boom failed"
    assert fields == ["orders", 2, "compensation_failed", None, WALL, WALL + 9.5, error, "ship", UNDONE, None]
    assert_written_alike(encode(decode_outcome(data)), data)


LAYOUT = Layout("orders", 2, [StagePlace(name) for name in ("reserve", "mail", "gift", "pay")])


def test_a_stored_outcome_makes_the_same_result_as_ever() -> None:
    data = golden("outcome-compensation-failed")
    result: WorkflowResult[Any] = result_of_outcome("b", data, ContextCodec(dict), LAYOUT)
    assert (str(result.status), result.error, result.failed_stage) == (
        "compensation_failed",
        "ValueError: boom failed",
        "ship",
    )
    assert [(s.stage_id, str(s.status), s.attempts, s.data) for s in result.stages] == [
        ("reserve", "compensated", 1, {"shelf": 3}),
        ("mail", "failed", 2, None),
        ("gift", "skipped", 0, None),
        ("pay", "completed", 3, "receipt-7"),
        ("ship", "failed", 1, None),
    ]
    assert [(c.stage_id, str(c.status)) for c in result.compensations] == [("pay", "failed"), ("reserve", "completed")]


def test_a_failure_is_read_as_it_was_written_and_written_as_it_was() -> None:
    data = golden("failure")
    assert plain(data) == ["exception", "StageError: busy", "StageError", True]
    assert read_failure(data) == Failure("exception", "StageError: busy", "StageError", True)
    assert_written_alike(encode(read_failure(data)), data)


@pytest.mark.parametrize(
    ("name", "decode", "fields"),
    [
        ("item-end", decode_item_end, [7, "ValueError: boom failed", {"sku": "TEA"}]),
        ("command", decode_command, ["stage:stock", {"sku": "TEA"}, "orders", "stock"]),
        ("reply", decode_reply, [{"left": 3}, "OSError: no stock"]),
    ],
)
def test_what_goes_between_stages_is_read_as_it_was_written_and_written_as_it_was(
    name: str, decode: Any, fields: list[Any]
) -> None:
    data = golden(name)
    assert plain(data) == fields
    assert_written_alike(encode(decode(data)), data)


FIELDS: dict[type[msgspec.Struct], str] = {
    Envelope: "workflow_id version stage_id context trail started_at payload error failed_stage compensation digest "
    "attempts failure steps run since tracebacks",
    Outcome: "workflow_id version status context trail started_at finished_at error failed_stage compensations digest "
    "payload steps run tracebacks places",
    StageRecord: "stage_id status attempts started_at duration error data undo",
    CompensationRecord: "stage_id status error duration finished_at rerun",
    CompensationTask: "plan done final_status steps rerun",
    Failure: "kind message error_type retryable traceback",
    ItemEnd: "result error item steps traceback uncertain",
    Command: "key command workflow_id stage_id run",
    Reply: "value error traceback undecodable",
}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_fields_keep_their_places_and_new_ones_come_last_with_a_default(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.array_like
    assert " ".join(kind.__struct_fields__) == FIELDS[kind]


# the history


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return Path(shutil.copy(GOLDEN / "history.db", tmp_path / "history.db"))


ROWS = {
    "a": HistoryRow(
        "a", 1, "orders", 1, "completed", WALL, WALL + 9.5, None, None, DIGEST, golden("outcome-completed")
    ),
    "b": HistoryRow(
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
        golden("outcome-compensation-failed"),
    ),
    "c": HistoryRow(
        "c", 1, "returns", 1, "completed", WALL + 1, WALL + 2, None, None, None, golden("outcome-completed")
    ),
}


def test_a_history_is_read_as_it_was_written(history: Path) -> None:
    with HistoryReader.open(history) as reader:
        assert reader.check() == []
        assert reader.get_many(ROWS) == ROWS
        assert [row.instance_id for row in reader.list()] == ["c", "b", "a"]
        assert [row.instance_id for row in reader.list(workflow="orders")] == ["b", "a"]
        assert reader.count() == {"completed": 2, "compensation_failed": 1}


def test_a_history_takes_new_rows_beside_the_old(history: Path) -> None:
    with HistoryReader.open(history) as reader:
        identity = reader.identity
    with HistoryWriter.open(history, create=False) as writer:
        assert writer.identity == identity
        writer.write([ROWS["a"]._replace(epoch=2, status="failed"), ROWS["b"]._replace(epoch=2, status="failed")])
    with HistoryReader.open(history) as reader:
        assert [(row.instance_id, row.epoch, row.status) for row in reader.list()] == [
            ("a", 2, "failed"),
            ("c", 1, "completed"),
            ("b", 3, "compensation_failed"),
        ]


# the journal

BATCHES = [
    (1, ["started"]),
    (1, ["queue"]),
    (1, ["fact"]),
    (1, ["publish"]),
    (1, ["checkpoint"]),
    (2, ["settle"]),
    (2, ["queue"]),
    (2, ["forget", "left"]),
    (2, ["group", "copy"]),
    (3, ["settle"]),
    (3, ["mark"]),
    (3, ["started"]),
    (3, ["group", "group", "group", "group", "group", "group", "copy", "copy", "copy", "copy"]),
    (4, ["group", "copy", "copy", "gather"]),
    (4, ["queue", "queue", "queue", "queue", "fact", "sessions", "started"]),
]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "journal", tmp_path / "journal"))


def test_a_journal_is_sound_and_holds_the_batches_that_were_written(journal: Path) -> None:
    assert verify(journal) == []
    batches = list(scan(journal))
    assert [batch.number for batch in batches] == list(range(1, len(BATCHES) + 1))
    assert [(batch.segment, [NAMES[record.kind] for record in batch.records]) for batch in batches] == BATCHES
    assert {batch.wall for batch in batches} == {WALL}


def test_a_journal_written_today_would_be_the_same_bytes(journal: Path) -> None:
    batches = list(scan(journal))
    for number, path in enumerate(sorted(journal.glob("*.journal")), start=1):
        header = read_segment(path.read_bytes()[:SECTOR_BYTES])
        assert not isinstance(header, (int, str))
        made = encode_segment(header)
        for batch in (batch for batch in batches if batch.segment == number):
            records = [Record(*record) for record in batch.records]
            pieces, length, offsets = encode_payload(records, len(made) + 40)
            assert offsets == batch.blob_offsets
            head = encode_header(batch.number, header.salt, batch.wall, pieces, length, len(records))
            made += b"".join([head, *pieces]).ljust(span(length), b"\0")
            last = batch.number
        if len(made) < header.size:
            made += encode_end(last, header.salt)
        assert path.read_bytes() == made.ljust(header.size, b"\0")


@pytest.fixture
def peer(journal: Path) -> Iterator[Connection]:
    """A connection to a broker that has recovered from the golden journal, a minute after it was written."""
    warnings: list[str] = []
    engine = Engine(
        journal_dir=journal, segment_bytes=4096, warn=warnings.append, wall=lambda: WALL + 60, monotonic=lambda: 5.0
    )
    broker = MemoryBroker(engine=engine)
    yield broker.connect(Listener())
    broker.close()
    assert warnings == []


def groups_of(peer: Connection) -> dict[str, Any]:
    found: dict[str, Any] = peer.admin.inspect([f"order-{number}" for number in range(1, 10)]).result(10)
    return found


def test_a_broker_recovers_each_message_where_it_was(peer: Connection) -> None:
    groups = groups_of(peer)
    messages = {id: [(m["queue"], m["label"], m["state"]) for m in group["messages"]] for id, group in groups.items()}
    first = "stageflow.orders.stage0"
    assert messages == {
        "order-1": [("stageflow.orders.stage1", "pay", "ready")],
        "order-2": [(first, "reserve", "delayed")],
        "order-3": [(first, "reserve", "dead")],
        "order-4": [("stageflow.finished", ":finished", "ready")],
        "order-6": [],
        "order-7": [(first, "reserve", "ready")],
        "order-9": [("stageflow.coordinator", ":cancelled", "ready")],
    }
    assert groups["order-1"]["digest"] == DIGEST
    assert groups["order-4"]["ended"] == ":finished"
    [gather] = groups["order-6"]["gathers"]
    assert [gather[name] for name in ("key", "need", "arrived")] == ["approval", 2, 1]
    assert {id: group["epoch"] for id, group in groups.items() if group["epoch"] != 1} == {"order-9": 2}
    assert peer.admin.get_fact("history").result(10) == "identity of the history"


def test_a_broker_recovers_what_had_happened_to_each_message(peer: Connection) -> None:
    told = {id: group["messages"][0] for id, group in groups_of(peer).items() if group["messages"]}
    failure = golden("failure")
    facts = {id: (m["attempts"], m["failure"], m["reason"]) for id, m in told.items()}
    assert facts == {
        "order-1": (0, None, None),
        "order-2": (1, failure, None),
        "order-3": (1, failure, failure),
        "order-4": (0, None, None),
        "order-7": (0, None, None),
        "order-9": (1, failure, None),
    }
    assert told["order-2"]["due"] == WALL + 3600
    assert told["order-3"]["parked"] == WALL


def test_a_broker_recovers_the_bodies(peer: Connection) -> None:
    bodies = {id: group["messages"][0]["body"] for id, group in groups_of(peer).items() if group["messages"]}
    for id in ("order-2", "order-3", "order-7", "order-9"):
        envelope = decode_envelope(bodies[id])
        assert plain(encode(envelope))[:6] == ["orders", 1, "reserve", {"id": id}, NO_TRAIL, WALL]
    moved: Envelope = decode_envelope(bodies["order-1"])
    assert (moved.stage_id, plain(moved.trail)) == ("pay", TRAIL)
    assert decode_outcome(bodies["order-4"]).status == "completed"


def test_a_broker_recovers_its_queues(peer: Connection) -> None:
    queues = {queue["name"]: queue for queue in peer.admin.stats("").result(10)["queues"]}
    assert {name: queue["state"] for name, queue in queues.items()} == {
        "stageflow.coordinator": "open",
        "stageflow.finished": "open",
        "stageflow.orders.stage0": "open",
        "stageflow.orders.stage1": "paused",
    }
    first = queues["stageflow.orders.stage0"]
    assert (first["ready"], first["delayed"], first["dead"]) == (1, 1, 1)
