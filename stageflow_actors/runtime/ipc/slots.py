"""Shared memory in which each worker publishes its current message.

A slot holds the message in work, its start time and its time limit. One anonymous file holds an array of 128-byte
slots; the node creates it, the zygote and the workers inherit it. A worker writes its own slot, twice per message, so
the code for it must not lock, call the system or allocate. The node reads the slots to enforce timeouts, to show busy
workers, and to find the message that a dead worker was running. A worker that runs several messages at once has several
consecutive slots, one for each: its lanes.

::

    cell   0           1         2           3        4          5        6         7
           message_id  since_ns  timeout_ns  started  cancelled  settled  grace_ns  outdated

    cell   8                9 to 15
           turn_since_ns    unused

`since_ns` is the commit mark: it is zero while the other cells change. A worker that dies in the middle of `begin`
therefore looks idle, which is correct: its handler has not started.

Behind the slots, each of them has space for one text: the failure that its retry policy is deciding on, after the
length of that text in two bytes, which is zero while no policy runs. If the policy ends the worker, this is the only
copy of the failure.

Behind these texts, each slot has an area for the life of its worker, of which the first lane's is used: whether the
worker has started and takes messages, since when it is ending, and the step of its start or end that is running.
"""

from __future__ import annotations

import mmap
import os

from msgspec import Struct

__all__ = [
    "CANCEL_GRACE_NS",
    "LIFE_BYTES",
    "LOADED",
    "LOADING",
    "POLICY_TEXT_BYTES",
    "SLOT_BYTES",
    "UNLOADABLE",
    "Slot",
    "SlotState",
    "SlotTable",
]

CANCEL_GRACE_NS = 1_000_000_000
"""Nanoseconds in which a running stage may end (see `ctx.cancelled`) after its instance was cancelled; then the node
kills its worker."""

SLOT_BYTES = 128
"""Two cache lines, which processors fetch together: two workers never write to the same ones."""

POLICY_TEXT_BYTES = 1024
"""Space for the failure text of one slot, its length included. Pages that are never written take no memory."""

LIFE_BYTES = 128
"""Space for the life of a slot's worker: when its end began, whether it takes messages, whether its code is loaded, and
the step of its start or end."""

LOADING, LOADED, UNLOADABLE = range(3)
"""States of a worker's code: not loaded yet, loaded, or an exception has ended the load."""

_CELLS = SLOT_BYTES // 8
_MESSAGE, _SINCE, _TIMEOUT, _STARTED, _CANCELLED, _SETTLED, _GRACE, _OUTDATED, _TURN_SINCE = range(9)
_BYTES_PER_SLOT = SLOT_BYTES + POLICY_TEXT_BYTES + LIFE_BYTES
_READY, _STEP_LENGTH, _LOAD_STATE, _STEP = 8, 9, 10, 11  # offsets in the life area, behind the time in eight bytes


class SlotState(Struct, frozen=True):
    """The content of one slot at one moment.

    Attributes:
        message_id: The message in work, or the last one if the worker is idle.
        since_ns: `CLOCK_MONOTONIC` at the start of the handler; 0 if the worker is idle.
        timeout_ns: Time limit of the handler; 0 for no limit.
        started: Handlers that started since the slot was cleared.
        finished: Handlers that returned or raised since then.
        cancelled: True if the node asked the worker to end the message in work.
        settled: Messages that user code ran for and that the worker settled since then.
        grace_ns: Time beyond the timeout in which the worker itself ends the handler.
        policy_failure: The failure that the retry policy is deciding on since `since_ns`; empty while no policy runs.
        turn_since_ns: When the event loop resumed a coroutine of the message; 0 while all of them wait, and for
            handlers that are not async.
    """

    message_id: int
    since_ns: int
    timeout_ns: int
    started: int
    finished: int
    cancelled: bool
    settled: int = 0
    grace_ns: int = 0
    policy_failure: bytes = b""
    turn_since_ns: int = 0

    @property
    def is_busy(self) -> bool:
        """True if a handler or its policy was running."""
        return self.since_ns != 0

    def is_overdue(self, now_ns: int) -> bool:
        """Return True if timeout and grace had passed at `now_ns` (`CLOCK_MONOTONIC`).

        A policy gets no grace: the worker does not await it, so only a kill ends it.
        """
        grace = 0 if self.policy_failure else self.grace_ns
        return self.since_ns != 0 and self.timeout_ns != 0 and now_ns - self.since_ns > self.timeout_ns + grace


class Slot:
    """One lane of a worker.

    Of the methods that write, the node calls `cancel`, `mark_outdated` and `clear`, and the worker calls the others.
    """

    __slots__ = ("_cells", "_index", "_life", "_policy_text", "_started", "_table", "_timeout")

    def __init__(
        self,
        cells: memoryview,
        table: SlotTable | None = None,
        index: int = 0,
        policy_text: memoryview | None = None,
        life: memoryview | None = None,
    ) -> None:
        self._cells = cells
        self._policy_text: memoryview | None = (
            table[index]._policy_text if policy_text is None and table is not None else policy_text
        )
        self._life: memoryview = memoryview(bytearray(LIFE_BYTES)) if life is None else life
        self._table = table
        self._index = index
        self._started: int = cells[_STARTED]
        self._timeout: int = cells[_TIMEOUT]

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """Record that the handler for `message_id` starts, with a limit of `timeout_ns` (0 for no limit).

        `now_ns` is `time.monotonic_ns()`, which the caller has already read to measure the stage's duration.
        """
        cells = self._cells
        cells[1] = 0  # literals: a lookup of a constant costs as much as the write itself
        cells[0] = message_id
        if timeout_ns != self._timeout:
            cells[2] = self._timeout = timeout_ns
        cells[3] = self._started = self._started + 1
        cells[1] = now_ns

    def end(self) -> None:
        """Record that no user code runs."""
        self._cells[1] = 0

    def begin_turn(self, now_ns: int) -> None:
        """Record that the event loop resumes a coroutine of the message in work: it blocks the others until it ends."""
        self._cells[8] = now_ns

    def end_turn(self) -> None:
        """Record that this coroutine has returned to the event loop."""
        self._cells[8] = 0

    def excuse(self, blocked_ns: int) -> None:
        """Extend the time limit of the message in work: another one has blocked the event loop for this time."""
        cells = self._cells
        if cells[_SINCE]:
            cells[_SINCE] += blocked_ns

    def time_limit(self, now_ns: int) -> tuple[int, int] | None:
        """Return the time limit of the message in work and the part that is left; None without a limit."""
        cells = self._cells
        timeout: int = cells[_TIMEOUT]
        return (timeout, cells[_SINCE] + timeout - now_ns) if timeout else None

    def set_timeout(self, timeout_ns: int, now_ns: int) -> None:
        """Replace the time limit of the message in work, counted from `now_ns`; 0 is no limit."""
        cells = self._cells
        cells[1] = 0
        cells[2] = self._timeout = timeout_ns
        cells[1] = now_ns

    def begin_policy(self, failure: bytes, timeout_ns: int, now_ns: int) -> None:
        """Record that the handler failed and that its retry policy begins, with a time limit of its own."""
        cells, text = self._cells, self._policy_text
        cells[1] = 0
        if text is not None:
            written = failure[: POLICY_TEXT_BYTES - 2]
            text[2 : 2 + len(written)] = written
            text[:2] = len(written).to_bytes(2, "big")
        self.set_timeout(timeout_ns, now_ns)

    def end_policy(self) -> None:
        """Record that the retry policy returned."""
        if self._policy_text is not None:
            self._policy_text[:2] = b"\0\0"

    def mark_loaded(self) -> None:
        """Record that the worker has loaded its code."""
        self._life[_LOAD_STATE] = LOADED

    def mark_unloadable(self, reason: bytes) -> None:
        """Record that the worker's code cannot be loaded, and why. No policy runs yet: its space holds the reason."""
        text = self._policy_text
        if text is not None:
            written = reason[: POLICY_TEXT_BYTES - 2]
            text[2 : 2 + len(written)] = written
            text[:2] = len(written).to_bytes(2, "big")
        self._life[_LOAD_STATE] = UNLOADABLE

    def load_state(self) -> tuple[int, bytes]:
        """Return the state of the worker's code, and why it cannot be loaded."""
        state, text = self._life[_LOAD_STATE], self._policy_text
        if state != UNLOADABLE or text is None:
            return state, b""
        return state, bytes(text[2 : 2 + int.from_bytes(text[:2], "big")])

    def count_settled(self, count: int) -> None:
        """Add `count` settled messages, which prove that this worker does not die at every message."""
        self._cells[_SETTLED] += count

    def set_grace(self, grace_ns: int) -> None:
        """Set the time beyond each timeout in which the worker itself ends the handler."""
        self._cells[_GRACE] = grace_ns

    def lanes(self, count: int) -> list[Slot]:
        """Return this slot and those that follow it, `count` in total."""
        if count == 1:
            return [self]
        assert self._table is not None
        return self._table.lanes(self._index, count)

    @property
    def is_busy(self) -> bool:
        """True if a handler is running. Cheaper than `read`."""
        return self._cells[1] != 0

    def mark_outdated(self) -> None:
        """Record that this worker does not know all registered versions.

        A version was registered after the worker started.
        """
        self._cells[_OUTDATED] = 1

    @property
    def is_outdated(self) -> bool:
        """True after `mark_outdated`: other workers know versions that this one does not."""
        return self._cells[_OUTDATED] != 0

    def mark_ready(self) -> None:
        """Record that the worker has started: its code and services are there, and it takes messages."""
        self._life[_STEP_LENGTH] = 0
        self._life[_READY] = 1

    @property
    def is_ready(self) -> bool:
        """True after `mark_ready`."""
        return self._life[_READY] != 0

    def begin_end(self, now_ns: int) -> None:
        """Record that the worker ends: it holds no message, and user code that closes resources may run."""
        self._life[:8] = now_ns.to_bytes(8, "little")

    def set_step(self, step: str) -> None:
        """Record the step of the start or the end that begins, as in "the close of service 'bank'"."""
        text = step.encode()[: LIFE_BYTES - _STEP]
        self._life[_STEP_LENGTH] = 0
        self._life[_STEP : _STEP + len(text)] = text
        self._life[_STEP_LENGTH] = len(text)

    @property
    def ending_since_ns(self) -> int:
        """The time of `begin_end`, as `CLOCK_MONOTONIC`; 0 for a worker that is not ending."""
        return int.from_bytes(self._life[:8], "little")

    @property
    def step(self) -> str:
        """The last step that `set_step` recorded; empty before the first one, and while the worker is ready."""
        return bytes(self._life[_STEP : _STEP + self._life[_STEP_LENGTH]]).decode(errors="replace")

    def is_cancelled(self) -> bool:
        """Return True if the node asked the worker to end the message in work."""
        cells = self._cells
        return cells[1] != 0 and cells[4] == cells[0]

    def cancel(self, message_id: int) -> None:
        """Ask the worker to end `message_id`. A request that comes too late affects no other message."""
        self._cells[_CANCELLED] = message_id

    def clear(self) -> None:
        """Empty the slot for the next worker, after the death of the last one."""
        self._cells[_SINCE] = 0
        for cell in range(_CELLS):
            self._cells[cell] = 0
        self.end_policy()
        self._life[:_STEP] = bytes(_STEP)
        self._started = self._timeout = 0

    def read(self) -> SlotState:
        """Return a consistent copy of the slot: cells that change during the read are read again."""
        cells, text = self._cells, self._policy_text
        policy_failure = b""
        while True:
            since = cells[_SINCE]
            message_id, timeout, started, cancelled = (
                cells[_MESSAGE],
                cells[_TIMEOUT],
                cells[_STARTED],
                cells[_CANCELLED],
            )
            grace, turn_since = cells[_GRACE], cells[_TURN_SINCE]
            if text is not None:
                policy_failure = bytes(text[2 : 2 + int.from_bytes(text[:2], "big")])
            if cells[_SINCE] == since:
                break
        busy = since != 0
        return SlotState(
            message_id=message_id,
            since_ns=since,
            timeout_ns=timeout,
            started=started,
            finished=started - busy,
            cancelled=busy and cancelled == message_id,
            settled=cells[_SETTLED],
            grace_ns=grace,
            policy_failure=policy_failure if busy else b"",
            turn_since_ns=turn_since if busy else 0,
        )


class SlotTable:
    """All slots of a node.

    Child processes may inherit `fd`. After `close`, each use of a slot raises `ValueError`.
    """

    def __init__(self, fd: int, count: int) -> None:
        self.fd = fd
        self._count = count
        self._memory = mmap.mmap(fd, count * _BYTES_PER_SLOT)
        self._bytes = memoryview(self._memory)
        self._cells = self._bytes.cast("Q")
        self._slots: dict[int, Slot] = {}  # created on demand: a table has many more slots than a node uses

    @classmethod
    def create(cls, count: int) -> SlotTable:
        """Create a table of `count` empty slots."""
        fd = os.memfd_create("stageflow-slots")
        try:
            os.ftruncate(fd, count * _BYTES_PER_SLOT)
            return cls(fd, count)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, count: int) -> SlotTable:
        """Open the table of `count` slots in the inherited `fd`, which `close` closes."""
        return cls(fd, count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Slot:
        if not 0 <= index < self._count:
            raise IndexError(f"slot {index} does not exist: this table has {self._count} slots")
        slot = self._slots.get(index)
        if slot is None:
            cells = self._cells[index * _CELLS : (index + 1) * _CELLS]
            at = self._count * SLOT_BYTES + index * POLICY_TEXT_BYTES
            life = self._count * (SLOT_BYTES + POLICY_TEXT_BYTES) + index * LIFE_BYTES
            slot = self._slots[index] = Slot(
                cells,
                self,
                index,
                self._bytes[at : at + POLICY_TEXT_BYTES],
                self._bytes[life : life + LIFE_BYTES],
            )
        return slot

    def open_again(self, index: int) -> Slot:
        """Return a slot with the counts and the time limit that are in memory now.

        A slot that the zygote has read keeps those of the worker before; the node has cleared them.
        """
        self._slots.pop(index, None)
        return self[index]

    def lanes(self, index: int, count: int) -> list[Slot]:
        """Return `count` consecutive slots, from `index`."""
        return [self[at] for at in range(index, index + count)]

    def close(self) -> None:
        """Unmap the memory and close `fd`; other processes keep their own mappings."""
        for slot in self._slots.values():
            slot._cells.release()
            slot._life.release()
            if slot._policy_text is not None:
                slot._policy_text.release()
        self._slots.clear()
        self._count = 0
        self._cells.release()
        self._bytes.release()
        self._memory.close()
        os.close(self.fd)
