"""`PoolContext`: the parts that all pools of a node share: slots, zygote, broker, and the list of live workers.

Several threads use it: each pool writes only its own entries, and other threads read them. It must never decide
anything about a worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from stageflow_actors.core.plan import Naming
from stageflow_actors.runtime.ipc.slots import Slot, SlotTable
from stageflow_actors.runtime.node.load_watch import LoadWatch
from stageflow_actors.runtime.node.memory_limits import OomKills
from stageflow_actors.runtime.node.output_relay import OutputRelay
from stageflow_actors.runtime.node.source_watch import SourceWatch
from stageflow_actors.runtime.node.start_causes import StartCauses
from stageflow_actors.runtime.zygote.handle import ZygoteHandle
from stageflow_brokers.api import Broker
from stageflow_brokers.pause_flags import PauseFlags

__all__ = ["PoolContext"]


class PoolContext:
    """The shared parts and the shared state of a node's pools.

    - `live`: the queue of each worker that is not known to be dead, by the worker's peer id
    - `lanes`: the slots of each queue's workers
    - `active`: the queues whose pool needs ticks even while no worker is busy
    - `output`: reads the output and the log records of workers; None if they share the node's
    - `levels_fd`: the shared memory with the program's log levels
    - `pauses`: the flags of paused queues, which the broker sets and the workers read
    - `oom_kills`: the kernel's count of OOM kills
    - `stop_timeout_ns`: the time in which a worker that holds no message has to end
    - `start_timeout`: the time, in seconds, in which a worker of each pool should start
    - `causes`: receives why workers cannot start
    - `initializer`: the code of the runtime's initializer, which each worker calls first; empty if there is none
    - `load_watch`: receives the exits of workers
    - `source_watch`: looks for changed modules when a worker starts
    - `has_exited`: returns True if the process behind a pidfd has exited; by default, only the zygote's reports count
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
        output: OutputRelay | None = None,
        levels_fd: int = -1,
        pauses: PauseFlags | None = None,
        oom_kills: OomKills | None = None,
        has_exited: Callable[[int], bool] | None = None,
        worker_stop_timeout: float = 5.0,
        start_timeout: float = 120.0,
        initializer: bytes = b"",
        load_watch: LoadWatch | None = None,
        source_watch: SourceWatch | None = None,
    ) -> None:
        self.slots = slots
        self.zygote = zygote
        self.broker = broker
        self.address = address
        self.naming = naming
        self.max_message_bytes = max_message_bytes
        self.log_level = log_level
        self.notify = notify
        self.output = output
        self.levels_fd = levels_fd
        self.pauses = pauses
        self.oom_kills = oom_kills or OomKills()
        self.has_exited = has_exited or (lambda pidfd: False)
        self.stop_timeout_ns = int(worker_stop_timeout * 1e9)
        self.start_timeout = start_timeout
        self.causes = StartCauses(broker)
        self.initializer = initializer
        self.load_watch = load_watch or LoadWatch(0.0)
        self.source_watch = source_watch or SourceWatch([])
        self.live: dict[int, str] = {}
        self.lanes: dict[str, list[Slot]] = {}
        self.active: set[str] = set()
        self._free: dict[int, list[int]] = {}
        self._first_unused = 0
        self._lock = threading.Lock()

    def allocate_slots(self, count: int) -> int | None:
        """Allocate `count` consecutive slots for a new worker. Return the first; None if too few are free."""
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
        """Free the slots of a dead worker. They stay together for the next worker with as many lanes."""
        with self._lock:
            self._free.setdefault(count, []).append(first)

    def is_active(self, queue: str) -> bool:
        """Return True if the pool of this queue needs the next tick. The check is cheap for an idle pool."""
        return queue in self.active or any(lane.is_busy for lane in self.lanes.get(queue, ()))
