"""`BrokerAdmin` by query frames: each method sends the name and the arguments that the broker's core knows.

The names are part of the protocol and must never change, whatever the methods are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from stageflow_brokers.admin import BrokerAdmin
from stageflow_brokers.types import (
    BrokerStats,
    CancelResult,
    EpochResult,
    LookupResult,
    PingResult,
    PurgeResult,
    QueueOptions,
    RaiseEpochResult,
    RequeueResult,
    TallyResult,
)

__all__ = ["QueryAdmin", "SendQuery"]


class SendQuery(Protocol):
    """Send one query frame; the future resolves with its answer."""

    def __call__(self, name: str, /, *args: Any) -> Future[Any]: ...


class QueryAdmin(BrokerAdmin):
    """The administrative operations of any connection that can send a query frame."""

    __slots__ = ("_send",)

    def __init__(self, send: SendQuery) -> None:
        self._send = send

    # the broker as a whole

    def ping(self) -> Future[PingResult]:
        return self._send("ping")

    def stats(self, prefix: str) -> Future[BrokerStats]:
        return self._send("stats", prefix)

    def audit(self) -> Future[dict[str, Any]]:
        return self._send("audit")

    def compact(self, begin: bool) -> Future[bool]:
        return self._send("compact", begin)

    def get_fact(self, name: str) -> Future[str | None]:
        return self._send("fact", name, None)

    def set_fact(self, name: str, value: str) -> Future[str | None]:
        return self._send("fact", name, value)

    def subscribe(self, on: bool) -> Future[Any]:
        return self._send("subscribe", on)

    # queues

    def declare(self, options: Sequence[QueueOptions]) -> Future[None]:
        return self._send("declare", options)

    def peek(self, queue: str, offset: int, limit: int) -> Future[list[dict[str, Any]]]:
        return self._send("peek", queue, offset, limit)

    def pause(self, queue: str) -> Future[None]:
        return self._send("pause", queue)

    def resume(self, queue: str) -> Future[None]:
        return self._send("resume", queue)

    def requeue(self, queue: str, ids: Sequence[int]) -> Future[RequeueResult]:
        return self._send("requeue", queue, ids)

    def purge(self, queue: str, ids: Sequence[int]) -> Future[PurgeResult]:
        return self._send("purge", queue, ids)

    def replace(self, queue: str, id: int, body: bytes) -> Future[EpochResult]:
        return self._send("replace", queue, id, body)

    # groups

    def watch(self, ids: Sequence[str]) -> Future[list[str]]:
        return self._send("watch", ids)

    def lookup(self, ids: Sequence[str]) -> Future[LookupResult]:
        return self._send("lookup", ids)

    def inspect(self, ids: Sequence[str]) -> Future[dict[str, dict[str, Any]]]:
        return self._send("inspect", ids)

    def list_groups(self, queue_prefix: str, limit: int) -> Future[list[dict[str, Any]]]:
        return self._send("groups", queue_prefix, limit)

    def live_ids(self) -> Future[list[str]]:
        return self._send("live")

    def tally(self, shared: Sequence[str], marks: Sequence[bytes], at: Sequence[int]) -> Future[TallyResult]:
        return self._send("tally", shared, marks, at)

    def raise_epoch(self, group: str, epoch: int, queue: str, label: str) -> Future[RaiseEpochResult]:
        return self._send("raise-epoch", group, epoch, queue, label)

    def cancel(self, group: str, reason: str, prefixes: Sequence[str]) -> Future[CancelResult]:
        return self._send("cancel", group, reason, prefixes)

    def hand_over(self, group: str, ids: Sequence[int], queue: str, label: str) -> Future[int]:
        return self._send("hand-over", group, ids, queue, label)

    def restart(self, group: str, queue: str, label: str, body: bytes) -> Future[EpochResult]:
        return self._send("restart", group, queue, label, body)

    # consumers

    def report_progress(self, id: int, lease: int, progress: bytes) -> Future[None]:
        return self._send("progress", id, lease, progress)

    def notify_supervisor(self, word: str, detail: Any) -> Future[bool]:
        return self._send("tell", word, detail)

    # the supervisor alone

    def report_death(
        self, peer: int, responsible: int | Sequence[int], charge: bool, attempt: bool, failure: bytes
    ) -> Future[None]:
        return self._send("dead", peer, responsible, charge, attempt, failure)

    def set_workers(self, peers: Sequence[tuple[int, Sequence[str]]]) -> Future[None]:
        return self._send("roster", peers)

    def suspend_delivery(self, suspended: bool) -> Future[None]:
        return self._send("hold", suspended)

    def forget_groups(self, ids: Sequence[str]) -> Future[int]:
        return self._send("leave", ids)

    def recall(self, peer: int) -> Future[None]:
        return self._send("recall", peer)

    def retire(self, peer: int) -> Future[bool]:
        return self._send("retire", peer)

    def report_starts(self, queues: Sequence[tuple[str, bool, str, float]]) -> Future[None]:
        return self._send("starts", queues)
