"""`StartCauses`: why workers of a node cannot start, each cause reported once, however many workers and pools it stops.

The first pool that a cause stops makes one warning, with one traceback. From then on the cause is counted, and its end
is reported, both at level INFO. The broker receives the state of each pool, for everyone who asks why something waits.
Pools call this from their own threads. It must not decide when a pool tries again.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time

from msgspec import Struct

from stageflow_actors.core.plural import pluralize
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_brokers.api import Broker, BrokerError

__all__ = ["StartCause", "StartCauses"]

logger = logging.getLogger("stageflow_actors.node.pool")

COUNT_SECONDS = 1.0
"""Time after which a cause is first counted; doubled for each further count."""
MAX_COUNT_SECONDS = 60.0
REMEMBERED_SECONDS = 60.0
"""Time after its end in which a cause that comes back is not warned of again."""
MAX_CAUSES = 200
"""Most causes that are remembered."""

_VARYING = re.compile(r"0x[0-9a-fA-F]+|[0-9a-fA-F]{8,}|\d+")
"""Addresses, ids, ports and times in the text of an error: they differ from worker to worker."""


class StartCause(Struct, frozen=True):
    """Why a worker cannot start.

    - `reason`: one line, as in `service 'bank' cannot be made: ConnectionError: no route`
    - `error`: the part of it that identifies a cause
    - `details`: the traceback, or the last lines that the worker wrote
    """

    reason: str
    error: str
    details: str = ""

    @property
    def key(self) -> str:
        """The error without the parts that differ between workers."""
        return _VARYING.sub("#", self.error)


class _Stopped:
    """One cause, with the pools that it stops: the number of workers that each lacks, and the time of its next try."""

    def __init__(self, cause: StartCause, now: float) -> None:
        self.cause = cause
        self.pools: dict[str, tuple[int, float]] = {}
        self.since = self.ended_at = now
        self.count_at = now + COUNT_SECONDS
        self.interval = COUNT_SECONDS
        self.most = (0, 0)

    @property
    def count(self) -> str:
        """The workers and pools as text, as `14 workers of 7 pools`."""
        workers = sum(missing for missing, _ in self.pools.values())
        self.most = max(self.most, (workers, len(self.pools)))
        return _workers_of_pools(workers, len(self.pools))


def _warn(spec: PoolSpec, cause: StartCause) -> None:
    if not logger.isEnabledFor(logging.WARNING):
        return
    path, line, function, _ = logger.findCaller()
    text = "%s: its workers cannot start: %s; they are tried again, after 0.1 s and then less often, up to every 30 s"
    arguments = (spec.title, cause.reason)
    record = logger.makeRecord(logger.name, logging.WARNING, path, line, text, arguments, None, function)
    record.exc_text = cause.details or None
    logger.handle(record)


def _workers_of_pools(workers: int, pools: int) -> str:
    return f"{pluralize(workers, 'worker')} of {pluralize(pools, 'pool')}"


class StartCauses:
    """The causes of one node. Times are monotonic, in seconds."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._lock = threading.Lock()
        self._causes: dict[str, _Stopped] = {}
        self._reported: dict[str, tuple[str, bool, str, float]] = {}

    # what the broker knows

    def report(self, queue: str, failing: bool, text: str, next_start_at: float = 0.0) -> None:
        """Report the state of a pool to the broker, if it has changed: see `BrokerAdmin.report_starts`."""
        state = (queue, failing, text, next_start_at)
        with self._lock:
            if self._reported.get(queue, (queue, False, "", 0.0)) == state:
                return
            if text:
                self._reported[queue] = state
            else:
                del self._reported[queue]
            with contextlib.suppress(BrokerError):  # the node is stopping
                self._broker.admin.report_starts([state])

    def report_again(self) -> None:
        """Report all states to a broker that has restarted."""
        with self._lock:
            if self._reported:
                self._broker.admin.report_starts(list(self._reported.values()))

    # what the user reads

    def record(self, spec: PoolSpec, cause: StartCause, missing: int, next_start: float, *, warn: bool = True) -> None:
        """Record a failed start of a pool that lacks `missing` workers; warn of a cause that is not known yet.

        Without `warn` the program learns the cause in another way: `start()` raises it.
        """
        queue = spec.queue
        now = time.monotonic()
        with self._lock:
            key = cause.key
            for other_key, other in self._causes.items():
                if other_key != key:
                    other.pools.pop(queue, None)  # the cause has changed, and the new one is reported
            known = self._causes.get(key)
            if known is None or (not known.pools and now - known.ended_at > REMEMBERED_SECONDS):
                self._forget_old()
                known = self._causes[key] = _Stopped(cause, now)
                is_new = True
            else:
                is_new = False
                if not known.pools:
                    known.since = now
            known.pools[queue] = (missing, next_start)
            known.ended_at = now
            text = known.count
        if is_new and warn:
            _warn(spec, cause)
        else:
            logger.debug("%s cannot start: %s", text, cause.error)

    def recover(self, queue: str) -> None:
        """Record that a worker of a pool is ready, or that the pool needs none; report a cause that has ended."""
        now = time.monotonic()
        ended = []
        with self._lock:
            for stopped in self._causes.values():
                if stopped.pools.pop(queue, None) is not None and not stopped.pools:
                    stopped.ended_at = now
                    ended.append(stopped)
        for stopped in ended:
            logger.info(
                "%s can start again after %.1f s: the cause has ended (%s)",
                _workers_of_pools(*stopped.most),
                now - stopped.since,
                stopped.cause.error,
            )

    def tick(self) -> None:
        """Report how many workers each cause stops, less often with time."""
        now = time.monotonic()
        lines = []
        with self._lock:
            for stopped in self._causes.values():
                if stopped.pools and now >= stopped.count_at:
                    stopped.interval = min(MAX_COUNT_SECONDS, 2 * stopped.interval)
                    stopped.count_at = now + stopped.interval
                    wait = max(0.0, min(at for _, at in stopped.pools.values()) - now)
                    lines.append((stopped.count, stopped.cause.error, wait))
        for count, error, wait in lines:
            logger.info("%s cannot start: %s; next try in %.1f s", count, error, wait)

    def _forget_old(self) -> None:
        while len(self._causes) >= MAX_CAUSES:
            oldest = next((key for key, one in self._causes.items() if not one.pools), next(iter(self._causes)))
            del self._causes[oldest]
