"""The description of an instance, from the messages of its group."""

from typing import Any

import pytest

from stageflow_actors.core.codec import decode_value
from stageflow_actors.core.description import describe_live, failure_text, status_of, trail_stages, version_of
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    Command,
    CompensationRecord,
    CompensationTask,
    Envelope,
    Failure,
    Outcome,
    StageRecord,
    append_record,
    encode,
    raw,
)

FIRST, SECOND, UNDO = "stageflow.orders.stage0", "stageflow.orders.stage1", "stageflow.compensation.orders"
TRAIL = append_record(EMPTY_TRAIL, StageRecord("reserve", "completed", 2, 10.0, 0.5, None, raw({"kept": 1})))
DECLINED = encode(Failure("exception", "ValueError: card declined", "ValueError"))


def message(queue: str, label: str, state: str = "ready", **facts: Any) -> dict[str, Any]:
    described = {"id": 1, "queue": queue, "label": label, "state": state, "attempts": 0, "deaths": 0}
    described["base"] = len(facts.get("body") or b"")
    return {**described, "failure": None, "reason": None, "evidence": False, **facts}


def group(*messages: dict[str, Any], ended: str = "", gathers: Any = ()) -> dict[str, Any]:
    return {"id": "i1", "epoch": 1, "ended": ended, "messages": list(messages), "gathers": list(gathers), "heads": []}


def gather(key: str, base: bytes, *, need: int | None = 1, arrived: int = 0, opened: float = 20.0) -> dict[str, Any]:
    return {"key": key, "need": need, "arrived": arrived, "base": base, "parts": [], "opened": opened}


def envelope(**fields: Any) -> bytes:
    return encode(Envelope("orders", 3, "pay", raw({"n": 1}), TRAIL, 9.0, **fields))


OUTCOME = encode(Outcome("orders", 3, "compensated", raw({}), TRAIL, 9.0, 12.0, "ValueError: no", "pay"))


@pytest.mark.parametrize(
    ("described", "status"),
    [
        (group(message(FIRST, "reserve")), "pending"),
        (group(message("other-prefix.x.stage0", "reserve", "delayed")), "pending"),
        (group(message(FIRST, "reserve", "leased")), "running"),
        (group(message(FIRST, "reserve", "delayed", attempts=1)), "running"),
        (group(message(FIRST, "reserve", deaths=1)), "running"),
        (group(message(SECOND, "pay")), "running"),
        (group(message("stageflow.orders.stage01", "pay")), "running"),
        (group(message(SECOND, "cool-off", "delayed")), "waiting"),
        (group(gathers=[{"key": "k", "need": 2, "arrived": 1}]), "waiting"),
        (group(message(SECOND, "pay"), gathers=[{"key": "k", "need": 2, "arrived": 1}]), "running"),
        (group(message(SECOND, "pay", "dead")), "parked"),
        (group(message(SECOND, "a"), message(SECOND, "b", "dead")), "parked"),
        (group(message(SECOND, "pay", "dead", evidence=True), message(UNDO, "compensate:reserve")), "compensating"),
        (group(message("stageflow.coordinator", ":begin")), "pending"),
        (group(message("stageflow.coordinator", ":resume", "delayed")), "waiting"),
        (group(message("stageflow.coordinator", ":failed")), "compensating"),
        (group(message("stageflow.coordinator", ":dead", "leased")), "compensating"),
        (group(message("stageflow.finished", ":finished", body=OUTCOME), ended=":finished"), "compensated"),
        (group(ended=":finished"), "running"),
        (group(), "running"),
    ],
)
def test_the_status_follows_from_the_messages(described: dict[str, Any], status: str) -> None:
    assert status_of(described) == status


@pytest.mark.parametrize(
    ("workflow_id", "queue", "status"),
    [
        ("orders.stage0", "stageflow.orders.stage0.stage0", "pending"),
        ("orders.stage0", "stageflow.orders.stage0.stage2", "running"),
        ("orders.stage0", "stageflow.orders.stage0.stage2.pay", "running"),
        ("orders.stage2", "stageflow.orders.stage2.stage0", "pending"),
        ("orders", "stageflow.orders.stage3.stage0", "running"),
        ("orders", "stageflow.orders.stage0.stage3", "pending"),
    ],
)
def test_an_id_that_looks_like_a_first_stage_does_not_change_the_status(
    workflow_id: str, queue: str, status: str
) -> None:
    head = encode(Envelope(workflow_id, 1, "pay", raw({}), TRAIL, 9.0))[:200]
    assert status_of(group(message(queue, "pay")) | {"heads": [head]}) == status


def test_a_stage_that_is_retried_shows_its_attempt_and_what_failed_it() -> None:
    description = describe_live(group(message(SECOND, "pay", "leased", attempts=1, failure=DECLINED, body=envelope())))
    assert (description.workflow_id, description.version, description.started_at) == ("orders", 3, 9.0)
    assert (description.status, description.stage, description.queue) == ("running", "pay", SECOND)
    assert [(s.stage_id, s.status, s.attempts, s.error, s.data) for s in description.stages] == [
        ("reserve", "completed", 2, None, {"kept": 1}),
        ("pay", "running", 2, "ValueError: card declined", None),
    ]


def test_a_parked_one_names_the_stage_and_the_reason() -> None:
    description = describe_live(group(message(SECOND, "pay", "dead", attempts=3, reason=DECLINED, body=envelope())))
    assert (description.failed_stage, description.error) == ("pay", "ValueError: card declined")
    assert [(s.stage_id, s.status) for s in description.stages] == [("reserve", "completed"), ("pay", "failed")]


def test_one_that_is_being_undone_shows_what_has_been() -> None:
    task = CompensationTask(["other"], [CompensationRecord("reserve", "completed", None, 0.5)], "compensated")
    body = envelope(error="ValueError: no", failed_stage="pay", compensation=task)
    description = describe_live(group(message(UNDO, "compensate:other", body=body)))
    assert (description.status, description.error, description.failed_stage) == (
        "compensating",
        "ValueError: no",
        "pay",
    )
    assert [(s.stage_id, s.status) for s in description.stages] == [("reserve", "compensated")]
    assert [(c.stage_id, c.status, c.duration) for c in description.compensations] == [("reserve", "completed", 0.5)]


def test_a_waiting_instance_names_what_it_waits_for() -> None:
    description = describe_live(group(gathers=[{"key": "checks", "need": 3, "arrived": 1}]))
    assert (description.status, description.waiting) == ("waiting", ["checks (1 of 3)"])


def test_an_instance_that_waits_for_a_signal_is_described_from_the_waiting_message() -> None:
    joined = gather("checks", b"", need=None)
    early = gather("signal:other", b"", need=None, arrived=1)
    late = gather(":timeout", encode(60.0))
    description = describe_live(group(gathers=[joined, early, late, gather("signal:approval", envelope())]))
    assert (description.workflow_id, description.version, description.started_at) == ("orders", 3, 9.0)
    assert (description.status, description.stage, description.queue) == ("waiting", "pay", "")
    assert description.waiting == ["signal approval"]
    assert decode_value(description.context) == {"n": 1}
    assert [(s.stage_id, s.status, s.started_at) for s in description.stages] == [
        ("reserve", "completed", 10.0),
        ("pay", "running", 20.0),
    ]


def test_of_several_waiting_messages_the_newest_describes_the_instance() -> None:
    branch = encode(Envelope("orders", 3, "stock", raw({"n": 2}), TRAIL, 9.0))
    waits = [gather("reply:stock:7", branch, opened=21.0), gather("pay", envelope(), need=2, arrived=1)]
    description = describe_live(group(gathers=waits))
    assert (description.stage, description.waiting) == ("stock", ["reply to stock", "pay (1 of 2)"])
    assert [s.stage_id for s in description.stages] == ["reserve", "stock", "pay"]


def test_of_a_map_stage_its_context_is_shown_and_not_its_items() -> None:
    item = encode(Envelope("orders", 3, "pay[item]", raw(None), EMPTY_TRAIL, 9.0))
    work = [
        message(f"{SECOND}.pay", "pay[item]", state, id=id, body=item) for id, state in enumerate(("ready", "leased"))
    ]
    description = describe_live(group(*work, gathers=[gather("pay", envelope(), need=3, arrived=1)]))
    assert (description.status, description.stage, description.waiting) == ("running", "pay", ["pay (1 of 3)"])
    assert decode_value(description.context) == {"n": 1}
    assert [(s.stage_id, s.status) for s in description.stages] == [("reserve", "completed"), ("pay", "running")]
    parked = message(f"{SECOND}.pay", "pay[item]", "dead", id=5, body=item, reason=DECLINED)
    description = describe_live(group(*work, parked, gathers=[gather("pay", envelope(), need=3, arrived=1)]))
    assert (description.status, description.failed_stage, description.error) == (
        "parked",
        "pay",
        "ValueError: card declined",
    )
    assert [(s.stage_id, s.status) for s in description.stages] == [("reserve", "completed"), ("pay", "failed")]


def test_an_instance_at_an_endpoint_is_described_from_the_message_that_waits_for_the_reply() -> None:
    command = message("stageflow.endpoint.bank", "bank", body=encode(Command("reply:pay:3", raw(1), "orders", "pay")))
    description = describe_live(group(command, gathers=[gather("reply:pay:3", envelope())]))
    assert (description.workflow_id, description.stage, description.waiting) == ("orders", "pay", ["reply to pay"])
    assert [s.stage_id for s in description.stages] == ["reserve", "pay"]


def test_one_in_a_delay_names_the_delay() -> None:
    body = encode(Envelope("orders", 3, "cool-off", raw({}), TRAIL, 9.0))
    description = describe_live(group(message("stageflow.coordinator", ":resume", "delayed", body=body)))
    assert (description.status, description.stage) == ("waiting", "cool-off")
    assert [(s.stage_id, s.status) for s in description.stages] == [("reserve", "completed"), ("cool-off", "pending")]


def test_the_workflow_of_a_group_is_read_from_its_bodies() -> None:
    assert version_of(group()) is None
    assert version_of(group() | {"heads": [encode(60.0), envelope()[:200]]}) == ("orders", 3)
    assert version_of(group() | {"heads": [envelope()[:4]]}) is None


def test_a_finished_instance_is_described_from_its_outcome() -> None:
    description = describe_live(group(message("stageflow.finished", ":finished", body=OUTCOME), ended=":finished"))
    assert (description.status, description.finished_at, description.error) == ("compensated", 12.0, "ValueError: no")


def test_of_a_stage_that_was_reached_twice_the_last_time_counts() -> None:
    trail = append_record(TRAIL, StageRecord("pay", "failed", 1))
    trail = append_record(trail, StageRecord("pay", "completed", 2))
    found = trail_stages(trail, [CompensationRecord("pay", "failed"), CompensationRecord("reserve", "completed")])
    assert [(s.stage_id, s.status, s.attempts) for s in found] == [
        ("reserve", "compensated", 2),
        ("pay", "completed", 2),
    ]


def test_reasons_are_one_line_and_never_break_anything() -> None:
    assert failure_text(None) is None
    assert failure_text(b"expired") == "StageError: the message waited in its queue for longer than its ttl"
    assert failure_text(encode(Failure("exception", "ValueError: two\nlines"))) == "ValueError: two lines"
    assert failure_text(encode(Failure("died", ""))) == "died"
    assert failure_text(b"\xff not msgpack") == "(an unreadable failure)"


def test_a_message_of_an_unknown_kind_is_shown_as_far_as_it_is_known() -> None:
    description = describe_live(group(message(SECOND, "odd", body=b"\xff")))
    assert (description.stage, description.queue, description.workflow_id, description.stages) == (
        "odd",
        SECOND,
        "",
        [],
    )
