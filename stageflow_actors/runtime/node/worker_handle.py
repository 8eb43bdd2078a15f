"""One worker as its pool knows it. Only its pool changes anything here."""

from __future__ import annotations

from collections.abc import Sequence

from stageflow_actors.core.envelope import Failure
from stageflow_actors.runtime.ipc.slots import Slot, SlotState
from stageflow_actors.runtime.node.stderr_relay import WorkerStderr
from stageflow_actors.runtime.zygote.handle import ZygoteHandle

__all__ = ["Kill", "WorkerHandle"]

CANCEL_MEMORY_NS = 60_000_000_000
"""Nanoseconds for which it is remembered that a message was cancelled which its worker does not run."""

CANCEL_GRACE_NS = 1_000_000_000
"""Nanoseconds that a stage in work gets to end by itself (`ctx.cancelled`) once its instance has been cancelled."""


class Kill:
    """The messages for which this pool has killed a worker, and why; `counted`: it counts as a death they caused."""

    __slots__ = ("counted", "failure", "responsible")

    def __init__(self, responsible: Sequence[int], failure: Failure, counted: bool) -> None:
        self.responsible = responsible
        self.failure = failure
        self.counted = counted


class WorkerHandle:
    """`lanes`: one slot for each message that it runs at once, from number `slot`. `killed`: why this pool has killed
    it; `stderr`: what it writes there. `cancelled`: messages that it may run until a time (monotonic, ns), no longer.
    `retiring`: it has been asked to end when it is done with what it runs, because there are too many, or another
    version was registered since it was made; `ask_at`: when to ask again (monotonic, ns), as words get lost with a
    broker. `missed_at`: since when its zygote owes a report of it (monotonic, ns; nought: it does not); `forsaken`: it
    was dead before its zygote was ended for that.
    """

    __slots__ = (
        "ask_at",
        "cancelled",
        "forsaken",
        "id",
        "killed",
        "lanes",
        "long",
        "missed_at",
        "peer",
        "pid",
        "pidfd",
        "recall_at",
        "retiring",
        "slot",
        "stderr",
        "zygote",
    )

    def __init__(self, id: str, peer: int, slot: int, lanes: list[Slot], zygote: ZygoteHandle) -> None:
        self.id = id
        self.peer = peer
        self.slot = slot
        self.lanes = lanes
        self.zygote = zygote
        self.pid = 0
        self.pidfd = -1
        self.killed: Kill | None = None
        self.stderr: WorkerStderr | None = None
        self.cancelled: dict[int, int] = {}
        self.long = 0
        self.recall_at = 0
        self.retiring = False
        self.ask_at = 0
        self.missed_at = 0
        self.forsaken = False

    def running(self) -> list[SlotState]:
        """What its lanes are at."""
        # Most are idle, and asking that costs less than reading all of a lane; it may have ended in between.
        states = [lane.read() for lane in self.lanes if lane.busy]
        return [state for state in states if state.busy]

    def cancel(self, message_id: int, now: int) -> None:
        """The instance of this message has been cancelled: its handler is told, and gets a grace (`now` in ns)."""
        self.cancelled[message_id] = now + CANCEL_GRACE_NS
        self.remind(now)

    def remind(self, now: int) -> None:
        """Mark the lanes of what has been cancelled: it may have begun since that was heard of, or never begin."""
        for message_id, until in list(self.cancelled.items()):
            if now - until > CANCEL_MEMORY_NS:
                del self.cancelled[message_id]
        for lane in self.lanes:
            state = lane.read()
            if state.message_id in self.cancelled and not state.cancelled:
                lane.cancel(state.message_id)
