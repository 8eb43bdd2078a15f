"""Shared memory in which each worker says what it is running, since when and for how long it may.

One anonymous file holds an array of 64-byte slots; the node makes it, the zygote and the workers inherit it. A
worker writes its own slot, twice per message, so no lock, no system call and no allocation belongs here. The node
reads slots to enforce timeouts, to show who is busy, and to know which message a dead worker was running. A worker
that runs several messages at once has as many slots in a row, one for each: its lanes.

::

    cell   0           1         2           3        4          5        6         7
           message_id  since_ns  timeout_ns  started  cancelled  settled  grace_ns  stale

`since_ns` is the commit mark: it is nought while the other cells change. A worker that dies in the middle of
`begin` therefore looks idle, which is the truth: its handler has not started.

Behind the slots each of them has room for a few words: the failure about which a retry policy is being asked, behind
its length in two bytes, nought while none is. Nobody else knows of that failure yet when the policy does not answer.
"""

from __future__ import annotations

import mmap
import os

from msgspec import Struct

__all__ = ["SLOT_BYTES", "WORDS_BYTES", "Slot", "SlotState", "SlotTable"]

SLOT_BYTES = 64
"""A cache line, so that two workers never write to the same one."""

WORDS_BYTES = 1024
"""Room for the words of one slot, their length included; what is never written to takes no memory."""

_CELLS = SLOT_BYTES // 8
_MESSAGE, _SINCE, _TIMEOUT, _STARTED, _CANCELLED, _SETTLED, _GRACE, _STALE = range(8)


class SlotState(Struct, frozen=True):
    """What a worker was doing at one moment.

    `message_id` is that of the message in work, or of the last one when idle. `since_ns` is `CLOCK_MONOTONIC` at
    the handler's start, nought when idle; `timeout_ns` what the handler may take, nought for no limit. `started`
    and `finished` count handlers since the slot was cleared, `settled` the messages handed on since then. `grace_ns`
    is what the worker gets beyond a timeout, because it ends a handler that is over it by itself. `asking` is the
    failure about which a policy is being asked, since `since_ns`; empty while none is.
    """

    message_id: int
    since_ns: int
    timeout_ns: int
    started: int
    finished: int
    cancelled: bool
    settled: int = 0
    grace_ns: int = 0
    asking: bytes = b""

    @property
    def busy(self) -> bool:
        """Whether a handler was running."""
        return self.since_ns != 0

    def overdue(self, now_ns: int) -> bool:
        """Whether the handler had run past its timeout, and the grace, at `now_ns` (`CLOCK_MONOTONIC`).

        A policy gets no grace: it is not awaited, so that nobody ends it but by force.
        """
        grace = 0 if self.asking else self.grace_ns
        return self.since_ns != 0 and self.timeout_ns != 0 and now_ns - self.since_ns > self.timeout_ns + grace


class Slot:
    """One lane of a worker. `cancel`, `mark_stale` and `clear` are the node's, all else that writes is the worker's."""

    __slots__ = ("_cells", "_index", "_started", "_table", "_timeout", "_words")

    def __init__(
        self, cells: memoryview, table: SlotTable | None = None, index: int = 0, words: memoryview | None = None
    ) -> None:
        self._cells = cells
        self._words: memoryview | None = table[index]._words if words is None and table is not None else words
        self._table = table
        self._index = index
        self._started: int = cells[_STARTED]
        self._timeout: int = cells[_TIMEOUT]

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """The handler for `message_id` starts now, and may run for `timeout_ns` (nought: no limit).

        `now_ns` is `time.monotonic_ns()`, which the caller needs anyway for the stage's duration.
        """
        cells = self._cells
        cells[1] = 0  # literals: looking up a constant per cell would cost as much as writing it
        cells[0] = message_id
        if timeout_ns != self._timeout:
            cells[2] = self._timeout = timeout_ns
        cells[3] = self._started = self._started + 1
        cells[1] = now_ns

    def end(self) -> None:
        """The handler has returned."""
        self._cells[1] = 0

    def limit(self, timeout_ns: int, now_ns: int) -> None:
        """What is in work has another limit from now on (nought: none), and its time begins anew."""
        cells = self._cells
        cells[1] = 0
        cells[2] = self._timeout = timeout_ns
        cells[1] = now_ns

    def ask(self, failure: bytes, timeout_ns: int, now_ns: int) -> None:
        """The handler has failed, and from now on its policy is asked about that, for `timeout_ns` by itself."""
        cells, words = self._cells, self._words
        cells[1] = 0
        if words is not None:
            said = failure[: WORDS_BYTES - 2]
            words[2 : 2 + len(said)] = said
            words[:2] = len(said).to_bytes(2, "big")
        self.limit(timeout_ns, now_ns)

    def answered(self) -> None:
        """The policy has answered."""
        if self._words is not None:
            self._words[:2] = b"\0\0"

    def settle(self, count: int) -> None:
        """So many messages went on as they should: the worker is not one of those that die at everything."""
        self._cells[_SETTLED] += count

    def allow(self, grace_ns: int) -> None:
        """The worker ends handlers at their timeouts by itself, and gets so much longer for it."""
        self._cells[_GRACE] = grace_ns

    def lanes(self, count: int) -> list[Slot]:
        """This slot and those that follow it, `count` in all."""
        if count == 1:
            return [self]
        assert self._table is not None
        return self._table.lanes(self._index, count)

    @property
    def busy(self) -> bool:
        """Whether a handler is running: `read` tells more, and costs more."""
        return self._cells[1] != 0

    def mark_stale(self) -> None:
        """The worker was made before another version was registered: what it does not know, others do."""
        self._cells[_STALE] = 1

    @property
    def stale(self) -> bool:
        """Whether `mark_stale` was said of this worker."""
        return self._cells[_STALE] != 0

    def is_cancelled(self) -> bool:
        """Whether the node has asked for an end of the message in work."""
        cells = self._cells
        return cells[1] != 0 and cells[4] == cells[0]

    def cancel(self, message_id: int) -> None:
        """Asks the worker to end `message_id`; without effect on any other message, however late this comes."""
        self._cells[_CANCELLED] = message_id

    def clear(self) -> None:
        """Empties the slot for its next worker, after the death of its last."""
        self._cells[_SINCE] = 0
        for cell in range(_CELLS):
            self._cells[cell] = 0
        self.answered()
        self._started = self._timeout = 0

    def read(self) -> SlotState:
        """What the worker is doing. Consistent: cells that changed during the reading are read again."""
        cells, words = self._cells, self._words
        asking = b""
        while True:
            since = cells[_SINCE]
            message_id, timeout, started, cancelled = (
                cells[_MESSAGE],
                cells[_TIMEOUT],
                cells[_STARTED],
                cells[_CANCELLED],
            )
            grace = cells[_GRACE]
            if words is not None:
                asking = bytes(words[2 : 2 + int.from_bytes(words[:2], "big")])
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
            asking=asking if busy else b"",
        )


class SlotTable:
    """All slots of a node. `fd` may be inherited; `close` unmaps, and later use of a slot raises `ValueError`."""

    def __init__(self, fd: int, count: int) -> None:
        self.fd = fd
        self._count = count
        self._memory = mmap.mmap(fd, count * (SLOT_BYTES + WORDS_BYTES))
        self._bytes = memoryview(self._memory)
        self._cells = self._bytes.cast("Q")
        self._slots: dict[int, Slot] = {}  # made when they are asked for: a node has room for many more than it uses

    @classmethod
    def create(cls, count: int) -> SlotTable:
        """A new table of `count` empty slots."""
        fd = os.memfd_create("stageflow-slots")
        try:
            os.ftruncate(fd, count * (SLOT_BYTES + WORDS_BYTES))
            return cls(fd, count)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, count: int) -> SlotTable:
        """The table of `count` slots behind the inherited `fd`, which becomes this table's own."""
        return cls(fd, count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Slot:
        if not 0 <= index < self._count:
            raise IndexError(f"there is no slot {index}: this table has {self._count}")
        slot = self._slots.get(index)
        if slot is None:
            cells = self._cells[index * _CELLS : (index + 1) * _CELLS]
            at = self._count * SLOT_BYTES + index * WORDS_BYTES
            slot = self._slots[index] = Slot(cells, self, index, self._bytes[at : at + WORDS_BYTES])
        return slot

    def lanes(self, index: int, count: int) -> list[Slot]:
        """`count` slots in a row, from `index`."""
        return [self[at] for at in range(index, index + count)]

    def close(self) -> None:
        """Unmaps the memory and closes `fd`; other processes keep theirs."""
        for slot in self._slots.values():
            slot._cells.release()
            if slot._words is not None:
                slot._words.release()
        self._slots.clear()
        self._count = 0
        self._cells.release()
        self._bytes.release()
        self._memory.close()
        os.close(self.fd)
