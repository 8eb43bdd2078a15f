"""`WorkerHandle`: the state of one worker, as its pool knows it. Only that pool may change it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stageflow_actors.core.envelope import Failure
from stageflow_actors.runtime.ipc.slots import CANCEL_GRACE_NS, Slot, SlotState
from stageflow_actors.runtime.node.output_relay import WorkerOutput
from stageflow_actors.runtime.zygote.handle import ZygoteHandle

__all__ = ["Kill", "WorkerHandle"]

CANCEL_MEMORY_NS = 60_000_000_000
"""Nanoseconds for which the cancellation of a message is remembered while the worker does not run the message."""


class Kill:
    """The reason for which a pool has killed a worker.

    `responsible` are the messages that carry `failure`; `counted` is True if the kill counts as a death they caused.
    """

    __slots__ = ("counted", "failure", "responsible")

    def __init__(self, responsible: Sequence[int], failure: Failure, counted: bool) -> None:
        self.responsible = responsible
        self.failure = failure
        self.counted = counted


class WorkerHandle:
    """The state of one worker, as its pool knows it. All times are monotonic, in nanoseconds.

    - `lanes`: one slot for each message that the worker runs concurrently, from number `slot`
    - `killed`: the reason for which this pool has killed the worker
    - `stdout`, `stderr`: the pipes to which the worker writes its output
    - `cancelled`: cancelled messages by id, and the time after which the worker is killed if it still runs one
    - `long_message_id`: the long message behind which waiting messages were last recalled; `recall_at`: the next recall
    - `retiring`: the worker was asked to exit after its current messages, because there are too many workers or because
      another version was registered
    - `stop_requested_at`: when the worker was asked to end because the cluster stops; zero before
    - `overdue`: the worker did not end in time and was killed
    - `request_at`: when that request is repeated; requests can be lost when the broker restarts
    - `started_at`: when it was requested from the zygote, in monotonic seconds
    - `report_fd`: the file in which it writes why it cannot start; -1 once it is ready
    - `has_failed`: it is recorded as one that cannot start
    - `step`: the step of its start that was last seen to take long, and `step_since`: since when, in wall time
    - `report_due_since`: since when the zygote owes a report about this worker; zero if none is due
    - `died_before_zygote`: the worker was dead when its unresponsive zygote was killed
    """

    __slots__ = (
        "cancelled",
        "died_before_zygote",
        "has_failed",
        "id",
        "killed",
        "lanes",
        "long_message_id",
        "overdue",
        "peer",
        "pid",
        "pidfd",
        "recall_at",
        "report_due_since",
        "report_fd",
        "request_at",
        "retiring",
        "slot",
        "started_at",
        "stderr",
        "stdout",
        "step",
        "step_since",
        "stop_requested_at",
        "zygote",
    )

    def __init__(
        self, id: str, peer: int, slot: int, lanes: list[Slot], zygote: ZygoteHandle, started_at: float
    ) -> None:
        self.id = id
        self.peer = peer
        self.slot = slot
        self.lanes = lanes
        self.zygote = zygote
        self.started_at = started_at
        self.report_fd = -1
        self.has_failed = False
        self.step = ""
        self.step_since = 0.0
        self.pid = 0
        self.pidfd = -1
        self.killed: Kill | None = None
        self.stdout: WorkerOutput | None = None
        self.stderr: WorkerOutput | None = None
        self.cancelled: dict[int, int] = {}
        self.long_message_id = 0
        self.recall_at = 0
        self.retiring = False
        self.stop_requested_at = 0
        self.overdue = False
        self.request_at = 0
        self.report_due_since = 0
        self.died_before_zygote = False

    def __del__(self) -> None:
        # A pool that ends without its workers, as in a simulated node, does not close it.
        self.close_report()

    def close_report(self) -> None:
        """Close the file of `report_fd`. Idempotent."""
        if self.report_fd >= 0:
            os.close(self.report_fd)
            self.report_fd = -1

    @property
    def ending_since(self) -> int:
        """When the worker's end began: it holds no message any more; zero before."""
        return self.lanes[0].ending_since_ns

    def running(self) -> list[SlotState]:
        """Return the state of each lane that runs a message."""
        # Most lanes are idle, and `is_busy` is cheaper than `read`. The message may end in between: check again.
        states = [lane.read() for lane in self.lanes if lane.is_busy]
        return [state for state in states if state.is_busy]

    def cancel(self, message_id: int, now: int) -> None:
        """Notify the handler that its instance is cancelled, and give it `CANCEL_GRACE_NS` to end (`now` in ns)."""
        self.cancelled[message_id] = now + CANCEL_GRACE_NS
        self.mark_cancelled(now)

    def mark_cancelled(self, now: int) -> None:
        """Mark the lanes that run a cancelled message; a message may begin after its cancellation, or never."""
        for message_id, until in list(self.cancelled.items()):
            if now - until > CANCEL_MEMORY_NS:
                del self.cancelled[message_id]
        for lane in self.lanes:
            state = lane.read()
            if state.message_id in self.cancelled and not state.cancelled:
                lane.cancel(state.message_id)
