"""The state that a retry resumes from: bounded steps, and the position of each branch."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, StageRecord, append_record, decode_envelope, encode
from stageflow_actors.core.resume_state import (
    TOO_LARGE,
    completed_branch,
    limit_steps,
    resume_branches,
    save_branches,
    steps_of_branch,
)


def packed(value: Any) -> Raw:
    return Raw(encode(value))


def ended(name: str, status: str, context: Any, steps: dict[str, bytes] | None = None) -> tuple[str, bytes]:
    trail = append_record(EMPTY_TRAIL, StageRecord(name, status))
    return name, encode(Envelope("w", 1, name, packed(context), trail, 0.0, steps=steps))


KEPT = save_branches(
    packed({"n": 1}),
    [
        ended("left", "completed", {"n": 1, "left": True}, {"old": b"1"}),
        ended("right", "failed", {"n": 1}, {"charge": b"2"}),
        ended("third", "skipped", {"n": 1}),
    ],
)


def context_of(body: bytes | None) -> Any:
    assert body is not None
    return msgspec.msgpack.decode(decode_envelope(body).context)


def test_branches_that_failed_begin_with_the_context_before_and_their_steps() -> None:
    found = resume_branches(KEPT, None)
    assert found is not None
    data, taken = found
    assert msgspec.msgpack.decode(data) == {"n": 1}
    assert context_of(completed_branch(taken, "left")) == {"n": 1, "left": True}
    assert (completed_branch(taken, "right"), steps_of_branch(taken, "right")) == (None, {"charge": b"2"})
    assert context_of(completed_branch(taken, "third")) == {"n": 1}, "it was not to be run, which is an end, too"
    assert steps_of_branch(taken, "left") is None


def test_in_another_context_what_completed_branches_changed_is_changed_again() -> None:
    found = resume_branches(KEPT, packed({"n": 2, "left": False, "more": 3}))
    assert found is not None
    data, taken = found
    assert msgspec.msgpack.decode(data) == {"n": 2, "left": False, "more": 3}
    assert context_of(completed_branch(taken, "left")) == {"n": 2, "left": True, "more": 3}
    assert context_of(completed_branch(taken, "third")) == {"n": 2, "left": False, "more": 3}


def test_where_nothing_was_kept_nothing_is_taken_up() -> None:
    assert resume_branches({}, None) is None
    assert resume_branches({"a step": b""}, packed({})) is None


def test_more_than_a_message_may_be_is_not_kept_and_that_is_reported() -> None:
    assert limit_steps(None, 10) is None
    assert limit_steps({"a": b"12345", "b": b"12345"}, 10) == {"a": b"12345", "b": b"12345"}
    assert limit_steps({"a": b"12345", "b": b"123456"}, 10) == {TOO_LARGE: b""}
