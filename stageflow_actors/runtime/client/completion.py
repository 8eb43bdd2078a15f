"""`Completion`: the knowledge of one handle about the end of one run of an instance.

It is the waiter behind a handle: the connection's thread writes it, any thread waits on it. An unknown outcome is
queried from the broker and read from the history.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.description import live_records, status_of
from stageflow_actors.core.envelope import NIL, Layout, decode_envelope, decode_outcome, head_of
from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.plan import DLQ_PREFIX, ITEM_SUFFIX
from stageflow_actors.core.result import WorkflowResult, parked_result, result_of_outcome
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.errors import InstanceParked, StageFlowError
from stageflow_actors.runtime.client.session import Session
from stageflow_actors.runtime.client.wait_notes import NOTE_SECONDS, REASON_SECONDS
from stageflow_actors.runtime.client.wait_reason import WaitReason
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef

__all__ = ["Completion"]

logger = logging.getLogger("stageflow_actors.client")

WAIT_SECONDS = 1.0
"""Interval between two checks that the cluster is alive while a handle waits."""


class Completion:
    """The state of one run: ended (`outcome`), parked, departed from the broker, or cut off by an error."""

    __slots__ = ("_callbacks", "_event", "_parked", "error", "has_left", "instance_id", "outcome", "ref", "session")

    def __init__(self, session: Session, instance_id: str, ref: WorkflowRef | None) -> None:
        self.session = session
        self.instance_id = instance_id
        self.ref = ref
        self.outcome: bytes | None = None
        self.error: StageFlowError | None = None
        self.has_left = False
        self._parked = False
        self._event = threading.Event()
        self._callbacks: list[Callable[[], None]] | None = None

    @property
    def is_over(self) -> bool:
        """True if there is nothing to wait for: ended, parked, departed or failed."""
        return self.outcome is not None or self._parked or self.has_left or self.error is not None

    @property
    def needs_refresh(self) -> bool:
        """True if it is parked or cut off, both of which can be over without a notification."""
        return self._parked or self.error is not None

    # reading

    def status(self) -> WorkflowStatus:
        """Return the instance's status now. Raises `InstanceNotFound`."""
        self.session.check_process()
        if self.outcome is not None:
            return WorkflowStatus(decode_outcome(self.outcome).status)
        group = self.session.lookup([self.instance_id]).get(self.instance_id)
        if group is not None:
            return status_of(group)
        return WorkflowStatus(decode_outcome(self.load_outcome()).status)

    def waiting_for(self) -> str | None:
        """Return what the instance waits for, or None if it is at work or has ended. Raises `InstanceNotFound`."""
        if self.outcome is not None:
            return None
        found = self.session.wait_reasons([self.instance_id])
        if self.instance_id not in found:
            self.load_outcome()
            return None
        reason = found[self.instance_id]
        return None if reason is None else reason.text

    def _wait_reason(self) -> WaitReason | None:
        """Return what the instance waits for, if the broker answers in time."""
        try:
            return self.session.wait_reasons([self.instance_id], REASON_SECONDS).get(self.instance_id)
        except StageFlowError:
            return None

    def note_wait(self) -> bool:
        """Log what the instance waits for. Return False if it is at work, so that there is nothing to say yet."""
        reason = self._wait_reason()
        if reason is None or reason.is_progressing or self.is_over:
            return False
        logger.warning("waiting for instance %s: %s", self.instance_id, reason.text)
        return True

    def load_outcome(self) -> bytes:
        """Read the outcome of an instance that has left the broker from the history. Raises `InstanceNotFound`."""
        row = self.session.row(self.instance_id)
        if row is None:
            raise self.session.no_instance(self.instance_id)
        self.set_outcome(row.outcome)
        return row.outcome

    def result(self, timeout: float | None) -> WorkflowResult[Any]:
        """Return the result, waiting at most `timeout` seconds for it. Raises as `wait` does."""
        self.session.check_process()
        if self.outcome is None:
            self.wait(timeout)
        assert self.outcome is not None
        return self.decode(self.outcome)

    def parked_result(self) -> WorkflowResult[Any]:
        """Return the result that `map` yields for a parked instance. Raises `InstanceParked` if it has none."""
        group = self.session.ask(lambda admin: admin.inspect([self.instance_id])).get(self.instance_id) or {}
        for message in group.get("messages", ()):
            if message["state"] != "dead" or "body" not in message:
                continue
            failure = read_failure(message["reason"])
            body = message["body"][: message["base"]]
            self._read_version(body)
            envelope = decode_envelope(body)
            is_item = envelope.stage_id.endswith(ITEM_SUFFIX)  # the context of a map stage is in another message
            codec, layout = self._codec()
            records, tracebacks = live_records(group)
            return parked_result(
                self.instance_id,
                envelope.workflow_id,
                codec,
                error=None if failure is None else failure.message,
                failed_stage=envelope.stage_id.removesuffix(ITEM_SUFFIX),
                context=NIL if is_item else envelope.context,
                records=records,
                tracebacks=tracebacks,
                version=envelope.version,
                started_at=envelope.started_at,
                parked_at=message["parked"],
                layout=layout,
            )
        raise self._parked_error()

    def decode(self, outcome: bytes) -> WorkflowResult[Any]:
        """Return the result that an outcome contains."""
        self._read_version(outcome)
        return result_of_outcome(self.instance_id, outcome, *self._codec())

    # waiting

    def wait(self, timeout: float | None, since: float | None = None) -> None:
        """Wait for the outcome, `timeout` seconds from now or from `since` on the monotonic clock.

        Raises `TimeoutError`, `InstanceParked`, `InstanceNotFound`, `BrokerUnavailable`.
        """
        began = time.monotonic() if since is None else since
        deadline = None if timeout is None else began + timeout
        note_at = began + NOTE_SECONDS
        self.refresh()
        watched = self.watch()
        while self.outcome is None:
            if self.error is not None:
                raise self.error
            if self._parked:
                raise self._parked_error()
            if self.has_left:
                self.load_outcome()
                return
            remaining = WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            if remaining <= 0:
                if watched:
                    # This handle did not start the instance: leaving the runtime does not wait for it.
                    self.session.waiters.remove(self.instance_id, self)
                reason = self._wait_reason()
                said = "" if reason is None else f" (waiting for: {reason.text})"
                raise TimeoutError(
                    f"instance {self.instance_id!r} had not ended after {timeout:g} s; it goes on{said}: wait "
                    f"longer, or ask for its result later, by instance({self.instance_id!r}).result()"
                )
            self.session.check_alive()
            if time.monotonic() >= note_at:
                note_at = float("inf") if self.note_wait() else time.monotonic() + NOTE_SECONDS
                continue
            self._event.wait(min(remaining, WAIT_SECONDS))

    def watch(self) -> bool:
        """Register for notifications where needed; return True if the broker had to be asked for them."""
        self.session.check_process()
        if self.is_over or self.session.waiters.has(self.instance_id, self):
            return False
        self.session.watch(self.instance_id, self)
        return True

    def refresh(self) -> None:
        """Drop a state that is over: a requeued dead letter, or a stop of a client that was started again."""
        self.session.check_process()
        if self.error is not None and self.session.failure is None and self.session.connection is not None:
            self.error = None
            self._event.clear()
        if self._parked and self.status() != WorkflowStatus.parked:
            self.clear_parked()

    def clear_parked(self) -> None:
        """Expect another notification of an instance that was parked."""
        if self._parked:
            self._parked = False
            self._event.clear()

    def begin_run(self) -> None:
        """Forget the previous run and wait for the outcome of the run that has just begun."""
        self.outcome, self.error = None, None
        self._parked = self.has_left = False
        self._event.clear()
        self.watch()

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` from the connection's thread when this is settled; at once if it is settled now."""
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)
        if self.is_over:
            callback()

    def remove_callback(self, callback: Callable[[], None]) -> None:
        """Drop a callback. Idempotent."""
        if self._callbacks is not None and callback in self._callbacks:
            self._callbacks.remove(callback)

    # notifications (see `Waiter`)

    def set_outcome(self, outcome: bytes) -> None:
        """Set the outcome that was found in the history."""
        self.outcome = outcome
        self._event.set()

    def on_ended(self, instance_id: str, outcome: bytes) -> None:
        self.outcome = outcome

    def on_parked(self, instance_id: str) -> None:
        self._parked = True

    def on_left(self, instance_id: str) -> None:
        self.has_left = True  # the waiting thread reads the history, not the connection's

    def on_failure(self, error: StageFlowError) -> None:
        self.error = error
        self.wake()

    def wake(self) -> None:
        self._event.set()
        for callback in list(self._callbacks or ()):
            callback()

    # helpers

    def _parked_error(self) -> InstanceParked:
        group = self.session.lookup([self.instance_id]).get(self.instance_id)
        for message in (group or {}).get("messages", ()):
            if message["state"] == "dead":
                failure = read_failure(message["reason"])
                reason = None if failure is None else failure.message
                return InstanceParked(self.instance_id, f"{DLQ_PREFIX}{message['queue']}", reason)
        return InstanceParked(self.instance_id)

    def _read_version(self, body: bytes) -> None:
        """Take the version from the message: several versions of a workflow share its queues."""
        head = head_of(body)
        if head is not None:
            self.ref = self.session.workflow_ref(head[0], head[1]) or self.ref

    def _codec(self) -> tuple[ContextCodec[Any], Layout | None]:
        return (ContextCodec(dict), None) if self.ref is None else (self.ref.codec, self.ref.layout)
