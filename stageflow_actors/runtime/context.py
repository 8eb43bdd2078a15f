"""`StageContext`: what a handler is told about where it runs, and its means to make parts of itself run once."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from brokers.api import DeliveryExtra, DeliveryItem
from stageflow_actors.core.codec import decode_value, encode_value
from stageflow_actors.core.envelope import Envelope, decode_trail
from stageflow_actors.core.failures import exception_of, read_failure
from stageflow_actors.errors import PayloadTooLarge, StageError

__all__ = ["Lane", "RememberedSteps", "Request", "StageContext", "StepStore", "check_no_request"]

REQUEST_TIMEOUT_SECONDS = 60.0
"""How long the reply to a request may take where nothing else is said."""

PROGRESS_INTERVAL_SECONDS = 0.2
"""Least time between two reports of one stage."""


class Request:
    """A stage's wish to ask an endpoint; see `StageContext.request`."""

    __slots__ = ("command", "endpoint", "steps", "timeout")

    def __init__(self, endpoint: str, command: Any, timeout: float, steps: Mapping[str, bytes]) -> None:
        if not isinstance(endpoint, str) or not endpoint:
            raise ValueError(f"a request needs the name of an endpoint, not {endpoint!r}")
        if not timeout > 0:
            raise ValueError(f"the timeout of a request must be more than 0 seconds, not {timeout!r}")
        self.endpoint = endpoint
        self.command = command
        self.timeout = timeout
        self.steps = steps


def check_no_request(value: Any, what: str) -> None:
    """Only what a stage's handler returns is sent to an endpoint; raises `StageError` for a request from elsewhere."""
    if type(value) is Request:
        raise StageError(
            f"{what} returned ctx.request({value.endpoint!r}, ...), and nobody would be asked: only the handler of a "
            "stage can ask an endpoint, by returning the request",
            retryable=False,
        )


class StepStore(Protocol):
    """Where completed steps go. `keep` returns once the value is durable."""

    def keep(self, name: str, value: bytes) -> None:
        """Keep the result of a step."""

    def report(self, progress: bytes) -> None:
        """Let whoever looks see how far the stage is."""


_remembering = threading.Lock()
"""A handler may keep steps in several threads."""


class RememberedSteps:
    """Steps that are kept, and are known from then on to whoever settles the delivery they were made under."""

    __slots__ = ("_item", "_store", "report")

    def __init__(self, store: StepStore, item: DeliveryItem) -> None:
        self._store = store
        self._item = item
        self.report = store.report

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`."""
        self._store.keep(name, value)
        with _remembering:
            extra = self._item.extra
            if extra is None:
                extra = self._item.extra = DeliveryExtra()
            extra.steps = {**(extra.steps or {}), name: value}


class Lane(Protocol):
    """Where it is said that the message in work is to be ended."""

    def is_cancelled(self) -> bool:
        """Whether it is."""


class StageContext:
    """One attempt of one stage of one instance.

    `attempt` counts from 1; `deadline` is when the attempt times out, in seconds on the monotonic clock (None: never);
    `idempotency_key` is the same for each attempt; `item` is the number of the item in a map stage, as a string;
    `payload` is what the previous stage handed on: the reply to its request.
    In a compensation, `error` is what failed the workflow and `results[stage_id]` what is being undone.
    """

    __slots__ = (
        "_envelope",
        "_failure",
        "_limit",
        "_progress_at",
        "_results",
        "_scope",
        "_slot",
        "_steps",
        "_store",
        "attempt",
        "deadline",
        "epoch",
        "error",
        "instance_id",
        "item",
        "stage_id",
        "workflow_id",
    )

    def __init__(
        self,
        *,
        envelope: Envelope,
        instance_id: str,
        epoch: int,
        stage_id: str,
        attempt: int,
        timeout: float | None,
        failure: bytes | None,
        steps: dict[str, bytes] | None,
        store: StepStore,
        error: str | None = None,
        item: str | None = None,
        limit: int = 16 << 20,
        slot: Lane | None = None,
    ) -> None:
        self.workflow_id = envelope.workflow_id
        self.instance_id = instance_id
        self.stage_id = stage_id
        self.attempt = attempt
        self.epoch = epoch
        self.deadline: float | None = None if timeout is None else time.monotonic() + timeout
        self.error = error
        self._envelope = envelope
        self._failure = failure
        self._steps = dict(steps) if steps else {}
        self._scope = ""
        self._store = store
        self._limit = limit
        self._slot = slot
        self._progress_at = 0.0
        self.item = item
        self._results: dict[str, Any] | None = None

    def _enter_item(self, number: int | None) -> None:
        """From now on this is about one item of a map stage, which has steps of its own; None: about all again."""
        self.item = None if number is None else str(number)
        self._scope = "" if number is None else f"{number}:"

    @property
    def idempotency_key(self) -> str:
        """A key for side effects: the same for each attempt of this stage of this run of the instance, also after
        `Instance.retry`. Only a restart begins a new run.

        For an item of a map stage, the same for each attempt of this item.
        """
        item = "" if self.item is None else f"[{self.item}]"
        run = self._envelope.run or self.epoch
        suffix = item if run <= 1 else f"{item}:{run}"
        return f"{self.workflow_id}:{self.instance_id}:{self.stage_id}{suffix}"

    @property
    def results(self) -> Mapping[str, Any]:
        """What earlier stages returned, by stage id."""
        if self._results is None:
            records = decode_trail(self._envelope.trail)
            self._results = {r.stage_id: decode_value(r.data) for r in records if r.status == "completed"}
        return self._results

    @results.setter
    def results(self, results: Mapping[str, Any]) -> None:
        self._results = dict(results)

    @property
    def payload(self) -> Any:
        """The reply that the previous stage's request brought, or None.

        A delay, a branch and a stage that is skipped are no stages in this: what comes behind them is given it. Each
        branch of a parallel stage is; items of a map, and what comes behind a signal, are not (see `request`).
        """
        return None if self.item is not None else decode_value(self._envelope.payload)

    def request(self, endpoint: str, command: Any, *, timeout: float | None = None) -> Request:
        """Return this from a stage: `command` goes to `endpoint`, and the next stage has the reply as `ctx.payload`.

        `"next"` hands `command` straight on. No reply within `timeout` seconds (60 by default), or one that is an
        error, fails the attempt.

        Where no stage comes next that could be given it, the reply (or, of `"next"`, the command) is the result of the
        stage that asked: in the last stage of a workflow or a branch of a parallel one, and before a map or a signal.
        """
        return Request(endpoint, command, REQUEST_TIMEOUT_SECONDS if timeout is None else float(timeout), self._steps)

    @property
    def previous_failure(self) -> Exception | None:
        """Why the attempt before this one failed; None on the first."""
        failure = read_failure(self._failure)
        return None if failure is None else exception_of(failure)

    @property
    def logger(self) -> logging.Logger:
        """A logger named after workflow and stage."""
        return logging.getLogger(f"stageflow.{self.workflow_id}.{self.stage_id}")

    @property
    def cancelled(self) -> bool:
        """Whether this instance has been cancelled meanwhile: a stage that ends soon then is not killed."""
        return self._slot is not None and self._slot.is_cancelled()

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Let whoever looks see how far this stage is: `Instance.progress()`, `stageflow instances show`.

        Never durable, and at most five times a second (but always when `done` has come to `total`): call it as often as
        you like. It shows until the stage ends.
        """
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_INTERVAL_SECONDS or done >= total:
            self._progress_at = now
            self._store.report(encode_value([done, total, str(note)], what=f"the progress of {self.stage_id!r}"))

    def step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` once per instance and stage: its result is durable when this returns.

        A later attempt is given the stored result and does not run it. The result is read back from what was
        stored, so that the first attempt sees what every later one would. With an `async def` function it is awaited:
        `await ctx.step("charge", charge, order)`.
        """
        if inspect.iscoroutinefunction(function):
            return self._async_step(name, function, *args)
        if self.is_step_completed(name):
            return self.get_step_result(name)
        return self._keep(name, function(*args))

    def is_step_completed(self, name: str) -> bool:
        """Whether the step has completed, in this attempt or an earlier one."""
        return f"{self._scope}{name}" in self._steps

    def get_step_result(self, name: str) -> Any:
        """The stored result of a step; None for one that has not completed or was only checkpointed."""
        data = self._steps.get(f"{self._scope}{name}")
        return None if data is None else decode_value(data)

    def store_step_result(self, name: str, value: Any) -> None:
        """Mark a step as completed with a result; durable when this returns."""
        self._keep(name, value)

    def checkpoint_step(self, name: str) -> None:
        """Mark a step as completed; durable when this returns."""
        self._keep(name, None)

    async def _async_step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        if self.is_step_completed(name):
            return self.get_step_result(name)
        value = await function(*args)
        return await asyncio.to_thread(self._keep, name, value)  # others are served while it becomes durable

    def _keep(self, name: str, value: Any) -> Any:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a step needs a name that is a string, not {name!r}")
        what = f"the result of step {name!r} of stage {self.stage_id!r}"
        data = encode_value(value, what=what)
        if len(data) > self._limit:
            raise PayloadTooLarge(
                f"{what} is {len(data)} bytes, over max_message_bytes={self._limit}; keep large data in files and pass "
                "their names",
                size=len(data),
                limit=self._limit,
            )
        scoped = f"{self._scope}{name}"
        self._store.keep(scoped, data)
        self._steps[scoped] = data
        return decode_value(data)
