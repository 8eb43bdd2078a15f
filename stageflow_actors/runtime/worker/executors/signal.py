"""`SignalExecutor`: passes a signal, or its absence, to user code (`on_signal`, `on_timeout`)."""

from __future__ import annotations

from typing import Any

from msgspec import Raw

from stageflow_actors.core.envelope import StageRecord
from stageflow_actors.core.failures import EXPIRED, failure_of
from stageflow_actors.core.plan import WorkflowPlan
from stageflow_actors.core.routing import enter_stage
from stageflow_actors.core.status import StageStatus
from stageflow_actors.core.value_codec import ValueCodec, find_undecodable
from stageflow_actors.definition.callables import asks_for_ctx, with_ctx
from stageflow_actors.errors import StageTimeout
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.messaging.settlements import Result, Settlement, split_parts
from stageflow_actors.runtime.worker.awaitables import check_not_awaitable
from stageflow_actors.runtime.worker.executors.base import Executor, ExecutorEnvironment
from stageflow_actors.runtime.worker.stage_context import check_no_request
from stageflow_brokers.api import DeliveryItem

__all__ = ["SignalExecutor"]


EXPIRED_MARK = ":expired"
"""The step that marks a message whose time has expired and whose context could not be decoded."""


class SignalExecutor(Executor):
    """Executes a signal stage after the signal arrived or its time expired."""

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        on_signal = program.parts["on_signal"]
        self._payload = ValueCodec(program.parts["payload_type"])
        self._on_signal = None if on_signal is None else with_ctx(on_signal, 2)
        late = program.parts["on_timeout"]
        self._on_timeout = None if late is None else late.bind(self.services)
        self._wants_ctx = asks_for_ctx(on_signal, 2) or (late is not None and late.wants_ctx)

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        base, arrivals = split_parts(item, body)
        extra = item.extra
        if extra is not None and not arrivals and extra.failure == EXPIRED:
            extra.fresh = False  # the expiry is the event that this stage handles, not a failed attempt
        expired = extra is not None and (extra.failure is not None or EXPIRED_MARK in (extra.steps or ()))
        opened = self._open(item, base, body)
        if isinstance(opened, Settlement):
            return opened
        if extra is not None and not arrivals and not expired:
            # Neither a signal nor an expiry: the message was parked and requeued, and waits again.
            return self._settle(item, enter_stage(self.plan, self.planned.id, opened, self.naming, self._wall()))
        started = self._wall() if opened.since is None else opened.since
        attempt = 1 if extra is None else extra.attempts + 1
        if not arrivals and self._on_timeout is None:
            # Final without the policy: another attempt would not bring the signal.
            late = StageTimeout(f"no signal {self.planned.signal!r} came within {self.planned.seconds:g} s")
            return self._fail_stage(item, opened, failure_of(late), attempt, started, self._wall() - started)
        try:
            context = self._decode_context(opened)
            ctx = self._stage_context(item, opened, attempt) if self._wants_ctx else None
            if arrivals:
                payload = self._payload.decode_input(arrivals[0][1])
                if self._on_signal is None:
                    value: Any = payload
                else:
                    value = self._on_signal(context, payload, ctx)
                    check_not_awaitable(value, f"on_signal of {self.planned.id!r}")
            else:
                assert self._on_timeout is not None
                value = self._resolve(self._on_timeout(context, ctx))
            check_no_request(value, f"{'on_signal' if arrivals else 'on_timeout'} of {self.planned.id!r}")
            if arrivals and self._on_signal is None:
                data = Raw(arrivals[0][1])
            else:
                context, data = self._split_result(context, value)
            encoded = self.codec.encode(context, stage=self.planned.id)
            record = StageRecord(
                self.planned.id, StageStatus.completed.value, attempt, started, self._wall() - started, None, data
            )
            return self._complete_stage(item, opened, record, encoded)
        except BaseException as error:  # noqa: BLE001 - on_signal and on_timeout are user code
            self._on_error(error)
            if not arrivals and find_undecodable(error) is not None:
                self._store(item).keep(EXPIRED_MARK, b"")
            return self._handle_failure(item, opened, attempt, started, self._wall() - started, error)
