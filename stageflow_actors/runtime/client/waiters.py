"""`Waiters`: who in this program waits for which instance, and is told how it ends.

The connection's thread tells, any thread may wait. Nothing here asks a broker or reads a history, and what is told must
never block or raise: it would end the connection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from stageflow_actors.errors import StageFlowError

__all__ = ["Waiter", "Waiters"]


class Waiter(Protocol):
    """What is told of an instance: first what there is to tell, for each instance of a batch, then once `_wake`."""

    def _end(self, instance_id: str, outcome: bytes) -> None:
        """It has ended."""

    def _park(self, instance_id: str) -> None:
        """It is parked."""

    def _left(self, instance_id: str) -> None:
        """It has left the broker: the history knows more."""

    def _broken(self, error: StageFlowError) -> None:
        """Nothing more will be heard."""

    def _wake(self) -> None:
        """There is news."""


class Waiters:
    """Waiters by instance id."""

    __slots__ = ("_lock", "_quiet", "by_id")

    def __init__(self) -> None:
        self.by_id: dict[str, Waiter] = {}
        # Reentrant: an iterator that the garbage collector ends in the middle of a batch takes it again.
        self._lock = threading.RLock()
        self._quiet = threading.Condition()

    def add(self, instance_id: str, waiter: Waiter) -> None:
        """Have `waiter` told too."""
        self.add_all((instance_id,), waiter)

    def add_all(self, instance_ids: Iterable[str], waiter: Waiter) -> None:
        """Have `waiter` told too, of each of these."""
        by_id = self.by_id
        with self._lock:
            for instance_id in instance_ids:
                there = by_id.get(instance_id)
                if there is None or there is waiter:
                    by_id[instance_id] = waiter
                elif isinstance(there, _Several):
                    if not there.has(waiter):
                        there.waiters.append(waiter)
                else:
                    by_id[instance_id] = _Several([there, waiter])

    def remove(self, instance_id: str, waiter: Waiter) -> bool:
        """Have `waiter` told no more; whether it was going to be."""
        with self._lock:
            there = self.by_id.get(instance_id)
            if there is waiter:
                del self.by_id[instance_id]
            elif isinstance(there, _Several) and there.has(waiter):
                there.waiters = [other for other in there.waiters if other is not waiter]
                if not there.waiters:
                    del self.by_id[instance_id]
            else:
                return False
        if not self.by_id:
            self._tell_quiet()
        return True

    def abandon(self, instance_id: str, waiter: Waiter) -> None:
        """Nobody looks at `waiter` any more, but the instance is still one that this program waits for."""
        with self._lock:
            if self.remove(instance_id, waiter):
                self.add(instance_id, _FORGOTTEN)

    def forsake(self, instance_id: str) -> None:
        """An instance that was abandoned turns out not to have started: nobody waits for it."""
        self.remove(instance_id, _FORGOTTEN)

    def has(self, instance_id: str, waiter: Waiter) -> bool:
        """Whether `waiter` is going to be told."""
        there = self.by_id.get(instance_id)
        return there is waiter or (isinstance(there, _Several) and there.has(waiter))

    # what the connection's thread says

    def ended(self, pushes: list[tuple[str, str, bytes]]) -> None:
        """Instances have ended, as (id, label, outcome)."""
        by_id = self.by_id
        told = set()
        with self._lock:
            for instance_id, _, outcome in pushes:
                waiter = by_id.get(instance_id)
                if waiter is not None:
                    # First told, then forgotten: whoever finds it forgotten finds it told.
                    waiter._end(instance_id, outcome)
                    del by_id[instance_id]
                    told.add(waiter)
        for waiter in told:
            waiter._wake()
        if not by_id:
            self._tell_quiet()

    def parked(self, instance_id: str) -> None:
        """An instance is parked."""
        self._tell(instance_id, lambda waiter: waiter._park(instance_id))

    def left(self, instance_id: str) -> None:
        """An instance has left the broker."""
        self._tell(instance_id, lambda waiter: waiter._left(instance_id))

    def break_off(self, error: StageFlowError, *, forget: bool) -> None:
        """Nothing more will be heard, for this reason; `forget` who waits now."""
        with self._lock:
            waiters = set(self.by_id.values())
            if forget:
                self.by_id.clear()
        for waiter in waiters:
            waiter._broken(error)
        self._tell_quiet()

    def wait_quiet(self, timeout: float) -> None:
        """Wait until nobody waits, or somebody may have stopped waiting, at most `timeout` seconds."""
        with self._quiet:
            if self.by_id:
                self._quiet.wait(timeout)

    def _tell(self, instance_id: str, what: Callable[[Waiter], None]) -> None:
        with self._lock:
            waiter = self.by_id.get(instance_id)
            if waiter is not None:
                what(waiter)
                del self.by_id[instance_id]
        if waiter is not None:
            waiter._wake()
        self._tell_quiet()

    def _tell_quiet(self) -> None:
        with self._quiet:
            self._quiet.notify_all()


class _Several:
    """More than one waits for the same instance."""

    __slots__ = ("waiters",)

    def __init__(self, waiters: list[Waiter]) -> None:
        self.waiters = waiters

    def has(self, waiter: Waiter) -> bool:
        # By identity: handles of the same instance are equal, and each of them is to be told.
        return any(other is waiter for other in self.waiters)

    def _end(self, instance_id: str, outcome: bytes) -> None:
        for waiter in self.waiters:
            waiter._end(instance_id, outcome)

    def _park(self, instance_id: str) -> None:
        for waiter in self.waiters:
            waiter._park(instance_id)

    def _left(self, instance_id: str) -> None:
        for waiter in self.waiters:
            waiter._left(instance_id)

    def _broken(self, error: StageFlowError) -> None:
        for waiter in self.waiters:
            waiter._broken(error)

    def _wake(self) -> None:
        for waiter in self.waiters:
            waiter._wake()


class _Forgotten:
    """Stands for an iterator that was dropped: its instances are still waited for when the runtime is left."""

    __slots__ = ()

    def _end(self, instance_id: str, outcome: bytes) -> None: ...
    def _park(self, instance_id: str) -> None: ...
    def _left(self, instance_id: str) -> None: ...
    def _broken(self, error: StageFlowError) -> None: ...
    def _wake(self) -> None: ...


_FORGOTTEN = _Forgotten()
