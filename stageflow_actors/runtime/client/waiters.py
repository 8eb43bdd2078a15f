"""`Waiters`: which objects of this program wait for which instance.

The connection's thread notifies, any thread may wait. Nothing here queries a broker or reads a history. A waiter must
never block or raise when it is notified: that would end the connection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from stageflow_actors.errors import StageFlowError

__all__ = ["Waiter", "Waiters"]


class Waiter(Protocol):
    """The receiver of an outcome: one call per instance of a batch, then `wake` once for the batch."""

    def on_ended(self, instance_id: str, outcome: bytes) -> None:
        """Called when the instance has ended."""

    def on_parked(self, instance_id: str) -> None:
        """Called when the instance is parked."""

    def on_left(self, instance_id: str) -> None:
        """Called when the instance has left the broker; its outcome is in the history."""

    def on_failure(self, error: StageFlowError) -> None:
        """Called when no more notifications will arrive."""

    def wake(self) -> None:
        """Called after one or more of the calls above (not after `on_failure`)."""


class Waiters:
    """Waiters by instance id."""

    __slots__ = ("_empty", "_lock", "by_id")

    def __init__(self) -> None:
        self.by_id: dict[str, Waiter] = {}
        # Reentrant: an iterator that the garbage collector ends in the middle of a batch takes it again.
        self._lock = threading.RLock()
        self._empty = threading.Condition()

    def add(self, instance_id: str, waiter: Waiter) -> None:
        """Notify `waiter` of this instance, in addition to the waiters it has."""
        self.add_all((instance_id,), waiter)

    def add_all(self, instance_ids: Iterable[str], waiter: Waiter) -> None:
        """Notify `waiter` of each of these instances, in addition to the waiters they have."""
        by_id = self.by_id
        with self._lock:
            for instance_id in instance_ids:
                present = by_id.get(instance_id)
                if present is None or present is waiter:
                    by_id[instance_id] = waiter
                elif isinstance(present, _WaiterGroup):
                    if not present.has(waiter):
                        present.waiters.append(waiter)
                else:
                    by_id[instance_id] = _WaiterGroup([present, waiter])

    def remove(self, instance_id: str, waiter: Waiter) -> bool:
        """Stop notifying `waiter` of this instance; return True if it was registered."""
        with self._lock:
            present = self.by_id.get(instance_id)
            if present is waiter:
                del self.by_id[instance_id]
            elif isinstance(present, _WaiterGroup) and present.has(waiter):
                present.waiters = [other for other in present.waiters if other is not waiter]
                if not present.waiters:
                    del self.by_id[instance_id]
            else:
                return False
        if not self.by_id:
            self._wake_empty()
        return True

    def abandon(self, instance_id: str, waiter: Waiter) -> None:
        """Drop `waiter`, but keep the instance among those that this program waits for."""
        with self._lock:
            if self.remove(instance_id, waiter):
                self.add(instance_id, _ABANDONED)

    def remove_abandoned(self, instance_id: str) -> None:
        """Forget an abandoned instance whose start was refused."""
        self.remove(instance_id, _ABANDONED)

    def has(self, instance_id: str, waiter: Waiter) -> bool:
        """Return True if `waiter` is registered for this instance."""
        present = self.by_id.get(instance_id)
        return present is waiter or (isinstance(present, _WaiterGroup) and present.has(waiter))

    def wait_until_empty(self, timeout: float) -> None:
        """Wait until nothing waits, or until a waiter may have been removed, at most `timeout` seconds."""
        with self._empty:
            if self.by_id:
                self._empty.wait(timeout)

    # called by the connection's thread

    def notify_ended(self, pushes: list[tuple[str, str, bytes]]) -> None:
        """Notify that instances have ended, as (id, label, outcome)."""
        by_id = self.by_id
        notified = set()
        with self._lock:
            for instance_id, _, outcome in pushes:
                waiter = by_id.get(instance_id)
                if waiter is not None:
                    # In this order: a waiter that is no longer registered has been notified.
                    waiter.on_ended(instance_id, outcome)
                    del by_id[instance_id]
                    notified.add(waiter)
        for waiter in notified:
            waiter.wake()
        if not by_id:
            self._wake_empty()

    def notify_parked(self, instance_id: str) -> None:
        """Notify that an instance is parked."""
        self._notify(instance_id, lambda waiter: waiter.on_parked(instance_id))

    def notify_left(self, instance_id: str) -> None:
        """Notify that an instance has left the broker."""
        self._notify(instance_id, lambda waiter: waiter.on_left(instance_id))

    def notify_failure(self, error: StageFlowError, *, forget: bool) -> None:
        """Notify every waiter that no more notifications will arrive; `forget`: also remove them."""
        with self._lock:
            waiters = set(self.by_id.values())
            if forget:
                self.by_id.clear()
        for waiter in waiters:
            waiter.on_failure(error)
        self._wake_empty()

    def _notify(self, instance_id: str, notification: Callable[[Waiter], None]) -> None:
        with self._lock:
            waiter = self.by_id.get(instance_id)
            if waiter is not None:
                notification(waiter)
                del self.by_id[instance_id]
        if waiter is not None:
            waiter.wake()
        self._wake_empty()

    def _wake_empty(self) -> None:
        with self._empty:
            self._empty.notify_all()


class _WaiterGroup:
    """Several waiters of one instance."""

    __slots__ = ("waiters",)

    def __init__(self, waiters: list[Waiter]) -> None:
        self.waiters = waiters

    def has(self, waiter: Waiter) -> bool:
        # By identity: each handle of an instance is notified.
        return any(other is waiter for other in self.waiters)

    def on_ended(self, instance_id: str, outcome: bytes) -> None:
        for waiter in self.waiters:
            waiter.on_ended(instance_id, outcome)

    def on_parked(self, instance_id: str) -> None:
        for waiter in self.waiters:
            waiter.on_parked(instance_id)

    def on_left(self, instance_id: str) -> None:
        for waiter in self.waiters:
            waiter.on_left(instance_id)

    def on_failure(self, error: StageFlowError) -> None:
        for waiter in self.waiters:
            waiter.on_failure(error)

    def wake(self) -> None:
        for waiter in self.waiters:
            waiter.wake()


class _Abandoned:
    """Stands for an iterator that was dropped: leaving the runtime still waits for its instances."""

    __slots__ = ()

    def on_ended(self, instance_id: str, outcome: bytes) -> None: ...
    def on_parked(self, instance_id: str) -> None: ...
    def on_left(self, instance_id: str) -> None: ...
    def on_failure(self, error: StageFlowError) -> None: ...
    def wake(self) -> None: ...


_ABANDONED = _Abandoned()
