"""`EndpointExecutor`: runs an endpoint's handler on a command and replies to the stage that sent the request.

An endpoint belongs to no workflow and receives no context.
"""

from __future__ import annotations

from typing import Any

from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    Command,
    Envelope,
    Failure,
    Reply,
    decode_command,
    encode,
)
from stageflow_actors.core.plan import WorkflowPlan
from stageflow_actors.core.routing import GatherArrival, Transition
from stageflow_actors.core.value_codec import ValueCodec, find_undecodable
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.messaging.settlements import Result, Settlement, decline
from stageflow_actors.runtime.worker.current_attempt import enter_attempt
from stageflow_actors.runtime.worker.executors.base import ExecutorEnvironment, lost_attempt_failure, policy_error
from stageflow_actors.runtime.worker.executors.handler import HandlerExecutor
from stageflow_actors.runtime.worker.stage_context import check_no_request
from stageflow_actors.runtime.worker.traceback_text import failure_with_traceback
from stageflow_brokers.api import DeliveryItem

__all__ = ["EndpointExecutor"]

REPLY_SLOT = "reply"
"""The one slot in the gather of a request: a second reply changes nothing."""


class EndpointExecutor(HandlerExecutor):
    """Executes the commands to one endpoint."""

    kind = "endpoint"

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        self._command = ValueCodec(program.parts["item_type"])
        self._reply = ValueCodec(program.parts["result_type"])

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        command = decode_command(body)
        extra = item.extra
        attempt = 1 if extra is None else extra.attempts + 1
        if extra is not None and extra.cancelled is not None:
            return self._send_reply(item, command, Reply(NIL, extra.cancelled))
        if extra is not None and extra.fresh:
            failure = lost_attempt_failure(extra.failure)
            return self._retry_or_reply_error(item, command, attempt, failure, None)
        enter_attempt((command.workflow_id, item.group, self.planned.id, attempt))
        try:
            ctx = self._stage_context(item, self._as_envelope(command), attempt) if self._wants_ctx else None
            value = self._command.decode_stored(command.command, what="the command")
            if self._paused[0]:
                return decline(item)
            value = self._resolve_call(self._call(value, ctx))
        except BaseException as error:  # noqa: BLE001 - the handler is user code
            return self._handler_failed(item, command, attempt, 0.0, 0.0, error)
        return self._after_call(item, command, attempt, 0.0, 0.0, None, value)

    def _on_result(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, context: Any, value: Any
    ) -> Result:
        try:
            check_no_request(value, f"endpoint {self.planned.id!r}")
            what = f"the reply of {self.planned.id!r}"
            reply = Reply(NIL if value is None else self._keep(self._reply, value, what))
        except BaseException as error:  # noqa: BLE001 - the encoding of a user's object may raise anything
            return self._handler_failed(item, envelope, attempt, started, clock, error)
        return self._send_reply(item, envelope, reply).mark_succeeded()

    def _handler_failed(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, error: BaseException
    ) -> Settlement:
        self._on_error(error)
        undecodable = find_undecodable(error)
        if undecodable is not None:  # the stage that sent the command is parked, and sends it again
            return self._send_reply(item, envelope, Reply(envelope.command, str(undecodable), undecodable=True))
        known = policy_error(error)
        return self._retry_or_reply_error(item, envelope, attempt, failure_with_traceback(error), known).mark_failed()

    def _retry_or_reply_error(
        self, item: DeliveryItem, command: Command, attempt: int, failure: Failure, error: Exception | None
    ) -> Settlement:
        delay, failure = self._ask_policy(attempt, failure, error)
        self._log_failed(item, command.workflow_id, attempt, failure, delay)
        if delay is not None:
            return self._retry(item, delay, failure)
        return self._send_reply(item, command, Reply(NIL, failure.message, failure.traceback))

    def _send_reply(self, item: DeliveryItem, command: Command, reply: Reply) -> Settlement:
        return self._settle(item, Transition(arrivals=[GatherArrival(command.key, REPLY_SLOT, encode(reply))]))

    def _as_envelope(self, command: Command) -> Envelope:
        return Envelope(command.workflow_id, 1, command.stage_id, NIL, EMPTY_TRAIL, 0.0, run=command.run)
