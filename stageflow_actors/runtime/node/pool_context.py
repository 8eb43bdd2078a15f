"""What the pools of one node have in common: slots, zygote, broker, and the roster of who lives.

Shared between threads: pools write their own entries, others read. Must never decide anything about a worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from stageflow_actors.core.plan import Naming
from stageflow_actors.runtime.ipc.slots import Slot, SlotTable
from stageflow_actors.runtime.node.memory_limits import OomKills
from stageflow_actors.runtime.node.stderr_relay import StderrRelay
from stageflow_actors.runtime.zygote.handle import ZygoteHandle
from stageflow_brokers.api import Broker

__all__ = ["PoolContext"]


class PoolContext:
    """What all pools of a node share.

    `live` is the roster: peers of workers not known to be dead, by queue. `lanes` are the slots of a queue's workers,
    and `active` the queues whose pool has something to do when time passes, though none of them may be busy.
    `stderr` reads what workers write there (None: it is the node's own), `oom_kills` what the kernel has killed;
    `has_exited` says whether the process behind a pidfd has ended (None: there is none, only the zygote's word).
    """

    def __init__(
        self,
        *,
        slots: SlotTable,
        zygote: Callable[[], ZygoteHandle],
        broker: Broker,
        address: str,
        naming: Naming,
        max_message_bytes: int,
        log_level: str,
        notify: Callable[[str], None],
        stderr: StderrRelay | None = None,
        oom_kills: OomKills | None = None,
        has_exited: Callable[[int], bool] | None = None,
    ) -> None:
        self.slots = slots
        self.zygote = zygote
        self.broker = broker
        self.address = address
        self.naming = naming
        self.max_message_bytes = max_message_bytes
        self.log_level = log_level
        self.notify = notify
        self.stderr = stderr
        self.oom_kills = oom_kills or OomKills()
        self.has_exited = has_exited or (lambda pidfd: False)
        self.live: dict[int, str] = {}
        self.lanes: dict[str, list[Slot]] = {}
        self.active: set[str] = set()
        self._free: dict[int, list[int]] = {}
        self._first_unused = 0
        self._lock = threading.Lock()

    def allocate_slots(self, count: int) -> int | None:
        """The first of `count` slots in a row for a new worker; None when all are taken."""
        with self._lock:
            free = self._free.get(count)
            if free:
                return free.pop()
            first = self._first_unused
            if first + count > len(self.slots):
                return None
            self._first_unused = first + count
            return first

    def free_slots(self, first: int, count: int) -> None:
        """The worker of these slots is dead. They are kept together: pools of as many lanes will want them again."""
        with self._lock:
            self._free.setdefault(count, []).append(first)

    def is_active(self, queue: str) -> bool:
        """Whether the pool of this queue is to be told that time has passed. Costs next to nothing if not."""
        return queue in self.active or any(lane.is_busy for lane in self.lanes.get(queue, ()))
