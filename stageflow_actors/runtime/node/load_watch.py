"""`LoadWatch`: which pools have a worker that has loaded its code, for the calls of the program that wait for it.

Workers write to their slots whether their code is loaded (`Slot.load_state`); the pools report exits. A pool whose
workers cannot start for another reason is not waited for. This module must not start, stop or kill anything.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from msgspec import Struct

from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.ipc.slots import LOADED, UNLOADABLE, Slot

__all__ = ["LoadReport", "LoadWatch"]

IDLE_SECONDS = 0.2
"""Time without a worker after which a pool is not waited for: it is scaled to zero, paused, or backs off."""
EXTRA_SECONDS = 0.5
"""Time beyond the timeout in which the pool reports itself as failing."""
NOTE_SECONDS = 5.0
"""Time after which the program is notified of the pools that are still loading."""

_ADVICE = (
    ". A worker is another process, which imports the modules of the handlers again: compare what their import reads "
    "there (sys.argv, files, environment, what the script has set before), and put what only the program has to run "
    "under `if __name__ == '__main__':`"
)


class LoadReport(Struct):
    """The end of a wait, or a note during it.

    - `number`: the request of the program; 0 for the start of the node
    - `error`: why the code of a pool cannot be loaded
    - `queues`: the queues that have the error
    - `note`: a notice for the user
    - `is_final`: True if the wait has ended
    """

    number: int
    error: str = ""
    queues: list[str] = []
    note: str = ""
    is_final: bool = True


class _Wait:
    def __init__(self, number: int, specs: Sequence[PoolSpec], now: float, deadline: float) -> None:
        self.number = number
        self.specs = {spec.queue: spec for spec in specs if spec.actors}
        self.note_at = now + NOTE_SECONDS
        self.deadline = deadline
        self.error = ""
        self.failed: list[str] = []
        self.idle_since: dict[str, float] = {}

    def fail(self, queue: str, reason: bytes) -> None:
        text = reason.decode("utf-8", "replace")
        advice = "" if text.startswith("WorkflowDefinitionError") else _ADVICE
        error = f"{self.specs[queue].title}: its code cannot be loaded in a worker: {text}{advice}"
        self.error = self.error or error
        self.failed.append(queue)
        del self.specs[queue]


class LoadWatch:
    """The waits of the program. `begin` and `check` belong to one thread each, `on_exit` to those of the pools."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._waits: list[_Wait] = []
        self._unloadable: set[str] = set()
        self._lock = threading.Lock()

    @property
    def is_waiting(self) -> bool:
        """True if a call of the program waits."""
        return bool(self._waits)

    def raises_for(self, queue: str) -> bool:
        """Return True if a call of the program raises, or has raised, because the code of this pool is unloadable."""
        with self._lock:
            return queue in self._unloadable or any(queue in wait.specs for wait in self._waits)

    def begin(self, number: int, specs: Sequence[PoolSpec], now: float) -> None:
        """Begin to wait for a worker of each of these pools."""
        with self._lock:
            self._waits.append(_Wait(number, specs, now, now + self._timeout + EXTRA_SECONDS))

    def on_exit(self, queue: str, state: int, reason: bytes) -> None:
        """Record that a worker has exited or could not be started; `state` and `reason` are those of its slot."""
        with self._lock:
            for wait in self._waits:
                if queue in wait.specs:
                    if state == UNLOADABLE:
                        wait.fail(queue, reason)
                    else:
                        del wait.specs[queue]

    def check(self, lanes: Mapping[str, Sequence[Slot]], now: float) -> list[LoadReport]:
        """Return the waits that have ended, and notes of those that take long; `lanes` are those of each queue."""
        reports: list[LoadReport] = []
        with self._lock:
            for wait in list(self._waits):
                for queue in list(wait.specs):
                    self._check_queue(wait, queue, lanes.get(queue), now)
                self._unloadable.update(wait.failed)
                if wait.failed or not wait.specs:
                    reports.append(LoadReport(wait.number, wait.error, wait.failed))
                elif now >= wait.deadline:
                    note = f"{_names_of(wait)} not loaded within {self._timeout:g} s (start_timeout)"
                    reports.append(LoadReport(wait.number, note=note))
                elif now >= wait.note_at:
                    wait.note_at = float("inf")
                    note = f"{_names_of(wait)} not loaded yet; waiting up to {self._timeout:g} s"
                    reports.append(LoadReport(wait.number, note=note, is_final=False))
                    continue
                else:
                    continue
                self._waits.remove(wait)
        return reports

    def _check_queue(self, wait: _Wait, queue: str, lanes: Sequence[Slot] | None, now: float) -> None:
        if lanes is not None and not lanes:
            if now - wait.idle_since.setdefault(queue, now) > IDLE_SECONDS:
                del wait.specs[queue]
            return
        wait.idle_since.pop(queue, None)
        for lane in lanes or ():
            if lane.is_outdated:
                if lane.is_busy:  # its successor starts when this message has ended, which may take hours
                    del wait.specs[queue]
                    return
                continue
            state, reason = lane.load_state()
            if state == LOADED or (state != UNLOADABLE and lane.ending_since_ns):  # it has loaded, or cannot start
                del wait.specs[queue]
                return
            if state == UNLOADABLE:
                wait.fail(queue, reason)
                return


def _names_of(wait: _Wait) -> str:
    names = [spec.title for spec in wait.specs.values()]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"the code of {shown} is"
