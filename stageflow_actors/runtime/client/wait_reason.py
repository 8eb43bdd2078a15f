"""`wait_reason`: what an instance waits for, in one sentence.

Pure functions over the broker's descriptions of the instance and of the queues. They must not query a broker.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from stageflow_actors.core.description import failure_text, version_of
from stageflow_actors.core.plan import COMPENSATE, DLQ_PREFIX, ITEM_SUFFIX, RESUME, TIMEOUT, Naming
from stageflow_actors.core.plural import pluralize
from stageflow_brokers.types import QueueStats

__all__ = ["WaitReason", "wait_reason"]

MAX_CLAUSES = 3
"""Most reasons in one sentence."""


class WaitReason(Struct, frozen=True):
    """The reason as text. `is_progressing`: it only waits for its turn, at workers that handle other messages."""

    text: str
    is_progressing: bool = False


def wait_reason(
    group: Mapping[str, Any], queues: Iterable[QueueStats], naming: Naming, now: float, *, live: bool = True
) -> WaitReason | None:
    """Return what an instance waits for, or None if it is at work or has ended.

    Args:
        group: Its group, as the broker's `lookup` or `inspect` describes it.
        queues: The queues of its messages at least.
        naming: The names of queues.
        now: In seconds since the Unix epoch.
        live: False if no cluster runs on the data directory.
    """
    if group["ended"]:
        return None
    by_name = {queue["name"]: queue for queue in queues}
    found: dict[str, WaitReason] = {}
    for message in _kinds_of(group["messages"]):
        reason = _of_message(message, group, by_name.get(message["queue"]), naming, now, live=live)
        if reason is not None:
            found.setdefault(reason.text, reason)
    if not found and any(message["state"] == "leased" for message in group["messages"]):
        return None
    open_gathers = [gather for gather in group["gathers"] if gather["need"] is not None and gather["key"] != TIMEOUT]
    for gather in open_gathers:
        text = _of_gather(gather, now)
        if text and not (found and gather["key"].startswith("reply:")):
            found.setdefault(text, WaitReason(text))
    if not found:
        for gather in open_gathers:
            text = f"{gather['key']!r}, of which {gather['arrived']} of {gather['need']} parts have arrived"
            found.setdefault(text, WaitReason(text))
    if not found:
        return None
    urgent = [reason for reason in found.values() if not reason.is_progressing] or list(found.values())
    texts = [reason.text for reason in urgent]
    more = f"; and {len(texts) - MAX_CLAUSES} more" if len(texts) > MAX_CLAUSES else ""
    return WaitReason("; ".join(texts[:MAX_CLAUSES]) + more, all(reason.is_progressing for reason in urgent))


def _kinds_of(messages: Sequence[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Return one message of each queue, label and state: the items of a map may be a million."""
    first: dict[tuple[str, str, str, bool], Mapping[str, Any]] = {}
    for message in messages:
        key = (message["queue"], message["label"], message["state"], message["evidence"])
        known = first.get(key)
        if known is None or (message["state"] == "delayed" and message["due"] < known["due"]):
            first[key] = message
    return first.values()


def _of_message(
    message: Mapping[str, Any],
    group: Mapping[str, Any],
    queue: QueueStats | None,
    naming: Naming,
    now: float,
    *,
    live: bool,
) -> WaitReason | None:
    state, name = message["state"], message["queue"]
    place = _place_of(message, naming)
    if state == "dead":
        if message["evidence"]:
            return None
        failure = failure_text(message["reason"])
        said = f": {failure}" if failure else ""
        return WaitReason(f"a person: it is parked, its message {message['id']} is in {DLQ_PREFIX}{name}{said}")
    if not live:
        return WaitReason("a cluster: none runs on its data directory")
    if state == "delayed":
        due = _time(message["due"], now)
        if message["label"] == RESUME:
            return WaitReason(f"the end of its delay, {due}")
        failure = failure_text(message["failure"])
        return WaitReason(f"the next attempt of {place}, {due}" + (f", after {failure}" if failure else ""))
    if state != "ready" or queue is None or name in (naming.coordinator, naming.finished):
        return None
    return _of_queue(queue, place, group, naming, now)


def _of_queue(queue: QueueStats, place: str, group: Mapping[str, Any], naming: Naming, now: float) -> WaitReason:
    name = queue["name"]
    cannot = ""
    if queue["reason"]:
        wait = queue["next_start_at"] - now
        then = f"; next try in {wait:.1f} s" if wait > 0 else ""
        cannot = f"the workers of {place} cannot start: {queue['reason']}{then}"
    if queue["state"] == "paused":
        also = f"; {cannot}" if cannot else ""
        return WaitReason(f"queue {name}, which is paused: `stageflow queue resume {name}` resumes it{also}")
    if cannot:
        return WaitReason(f"{cannot} (queue {name})")
    if queue["starting"]:
        return WaitReason(f"the workers of {place} are starting: {queue['starting']} (queue {name})")
    if queue["breaker"] == "open":
        return WaitReason(f"the breaker of {place}, which is open: the stage has failed too often (queue {name})")
    if not queue["consumers"]:
        endpoint = naming.endpoint("")
        if name.startswith(endpoint):
            return WaitReason(f"endpoint {name.removeprefix(endpoint)!r}, which no running node serves")
        version = version_of(group)
        of = f"workflow {version[0]!r} version {version[1]}" if version else "its workflow"
        return WaitReason(
            f"a worker of {place}: none consumes queue {name}; it may be starting, it has been scaled to 0, or {of} "
            "is not registered"
        )
    if queue["state"] == "closed":
        return WaitReason(f"queue {name}, which is closed until its workers have registered again")
    busy = f"{queue['busy']} of {pluralize(queue['consumers'], 'worker')} at work"
    return WaitReason(
        f"its turn at {place}: {pluralize(queue['ready'], 'message')} waiting, {busy} (queue {name})", True
    )


def _place_of(message: Mapping[str, Any], naming: Naming) -> str:
    label: str = message["label"]
    if label.startswith(COMPENSATE):
        return f"the compensation of stage {label.removeprefix(COMPENSATE)!r}"
    if message["queue"].startswith(naming.endpoint("")):
        return f"endpoint {label!r}"
    return f"stage {label.removesuffix(ITEM_SUFFIX)!r}"


def _of_gather(gather: Mapping[str, Any], now: float) -> str:
    """Return the text for a signal or a reply; empty for branches and items, which have messages of their own."""
    kind, _, name = gather["key"].partition(":")
    limit = f" (at the latest {_time(gather['due'], now)})" if gather.get("due") else ""
    if name and kind == "signal":
        return f"signal {name!r}{limit}"
    if name and kind == "reply":
        return f"the reply of endpoint {name.rpartition(':')[0]!r}{limit}"
    return ""


def _time(at: float, now: float) -> str:
    """Return a time as text: with the date if it is not within a day."""
    form = "%H:%M:%S" if abs(at - now) < 86_400 else "%Y-%m-%d %H:%M:%S"
    return f"due at {time.strftime(form, time.localtime(at))} (in {max(0.0, at - now):,.1f} s)"
