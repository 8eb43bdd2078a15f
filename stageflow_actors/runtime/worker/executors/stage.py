"""`StageExecutor`: runs the handler of one stage.

This is the hot path. It is written with few function calls from delivery to settlement, so `_on_result` repeats the
decisions of `core.routing` for a stage that is followed by one plain message. A change of one must change the other.
"""

from __future__ import annotations

import time
from typing import Any

from msgspec import Raw, structs

from stageflow_actors.core.envelope import (
    NIL,
    Command,
    Envelope,
    Failure,
    Outcome,
    Reply,
    StageRecord,
    append_record,
    decode_envelope,
    decode_reply,
    encode,
)
from stageflow_actors.core.failures import UNCERTAIN_MARK, UNDECIDED, is_uncertain, read_failure, write_failure
from stageflow_actors.core.gather_results import RequestState, decode_request
from stageflow_actors.core.plan import FINISHED, WorkflowPlan
from stageflow_actors.core.routing import OpenGather, Publish, Transition, missing_dependencies, passes_payload
from stageflow_actors.core.value_codec import (
    UndecodableData,
    ValueCodec,
    encode_message,
    find_undecodable,
    tag_reply,
)
from stageflow_actors.definition.callables import asks_for_ctx, with_ctx
from stageflow_actors.definition.remote import RemoteCall
from stageflow_actors.definition.stage import Replace
from stageflow_actors.definition.type_hints import first_parameter_type
from stageflow_actors.errors import InvalidContext, PayloadTooLarge, StageError
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.messaging.settlements import Result, Settlement, decline, park_undecodable, split_parts
from stageflow_actors.runtime.worker.awaitables import PLAIN_TYPES
from stageflow_actors.runtime.worker.current_attempt import enter_attempt
from stageflow_actors.runtime.worker.executors.base import PARK_MARK, UNDECODED_MARK, ExecutorEnvironment, policy_error
from stageflow_actors.runtime.worker.executors.handler import HandlerExecutor
from stageflow_actors.runtime.worker.stage_context import (
    Request,
    check_no_request,
    check_nothing_lost,
    made_by_attempt,
    take_made,
)
from stageflow_actors.runtime.worker.traceback_text import failure_with_traceback
from stageflow_brokers.api import TERMINAL, DeliveryItem, Target

__all__ = ["StageExecutor"]


class StageExecutor(HandlerExecutor):
    """Executes one stage. `targets[0]` is the next queue if the happy path is one plain message."""

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        # Read for each message: one attribute lookup instead of two.
        self._id, self._version, self._prerequisites = self.planned.id, self.plan.version, self.planned.after
        when = self.stage.when
        self._when = None if when is None else with_ctx(when, 1)
        self._wants_ctx = self._wants_ctx or asks_for_ctx(when, 1)
        remote = self.stage.handler
        on_reply = remote.on_reply if isinstance(remote, RemoteCall) else None
        self._reply = ValueCodec(Any if on_reply is None else first_parameter_type(on_reply, 1))
        following = plan.next_stage(self.planned)
        self._following = following
        if following is None:
            self.targets = [Target(self.naming.finished, FINISHED, TERMINAL)]
        else:
            self.targets = [Target(following.queue, following.id)]
        self._passes_payload = passes_payload(plan, self.planned)
        # The happy path is plain if it is one message to one queue.
        self._plain = not self.planned.joins and (
            following is None or (not following.ttl and following.takes_plain_message)
        )

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        extra = item.extra
        if extra is not None and extra.parts is not None:
            return self._on_reply(item, body)
        envelope = decode_envelope(body)
        if envelope.stage_id != self._id or envelope.version != self._version:
            return self._forward_or_park(item, envelope, body)
        attempt = envelope.attempts + 1
        if attempt < 1 and (extra is None or extra.cancelled is None):
            return self._park_on_arrival(item, envelope)
        if extra is not None:
            attempt += extra.attempts
            if extra.cancelled is not None:
                return self._skip_cancelled(item, envelope)
            if extra.fresh:
                return self._handle_lost_attempt(item, envelope, attempt)
        if self._prerequisites:
            missing = missing_dependencies(self._prerequisites, envelope.trail)
            if missing:
                return self._settle_unmet(item, envelope, missing, attempt)
        started = self._wall()
        clock = time.perf_counter()
        enter_attempt((envelope.workflow_id, item.group, self._id, attempt))
        try:
            context = self.codec.decode(envelope.context)
        except InvalidContext as error:
            take_made(envelope)
            return self._park_undecodable(item, UndecodableData(str(error), field=error.field))
        try:
            ctx = self._stage_context(item, envelope, attempt) if self._wants_ctx else None
            if extra is not None and ctx is not None and extra.steps is not None and UNDECODED_MARK in extra.steps:
                ctx.results[extra.steps[UNDECODED_MARK].decode()]
            if self._paused[0]:
                return decline(item)
            if self._when is not None and not self._holds(self._when, context, ctx):
                take_made(envelope)
                return self._skip(item, envelope)
            value = self._call(context, ctx)
            if type(value) not in PLAIN_TYPES:
                value = self._resolve_call(value)
        except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of a handler are its failures
            return self._handler_failed(item, envelope, attempt, started, clock, error)
        return self._after_call(item, envelope, attempt, started, clock, context, value)

    def _on_result(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, context: Any, value: Any
    ) -> Result:
        stage_id = self._id
        made = take_made(envelope) if made_by_attempt else None
        try:
            if made:
                check_nothing_lost(made, value, stage_id)
            data = NIL
            if value is not None:
                if type(value) is Replace:
                    context = value.value
                elif not self._is_dict and isinstance(value, self._context_type):
                    context = value
                elif type(value) is Request:
                    return self._send_request(item, envelope, attempt, started, clock, context, value)
                else:
                    data = self._encode_result(value)
            encoded = self.codec.encode(context, stage=stage_id)
        except BaseException as error:  # noqa: BLE001 - the encoding of a user's object may raise anything
            return self._handler_failed(item, envelope, attempt, started, clock, error)
        record = StageRecord(stage_id, "completed", attempt, started, time.perf_counter() - clock, None, data)
        before, trail = envelope.context, envelope.trail
        envelope.context = Raw(encoded)
        envelope.trail = append_record(trail, record)
        if not self._plain or item.extra is not None or envelope.attempts:
            return self._complete_with_transition(item, envelope, attempt, started, record, before, trail)
        following = self._following
        if following is None:
            done = encode(
                Outcome(
                    envelope.workflow_id,
                    envelope.version,
                    "completed",
                    envelope.context,
                    envelope.trail,
                    envelope.started_at,
                    self._wall(),
                    None,
                    None,
                    [],
                    envelope.digest,
                    tracebacks=envelope.tracebacks,
                )
            )
        else:
            envelope.stage_id = following.id
            envelope.payload = NIL
            envelope.steps = None
            done = encode(envelope)
        if len(done) > self._limit and len(done) - len(envelope.tracebacks or b"") > self._limit:
            envelope.context, envelope.trail, envelope.stage_id = before, trail, stage_id
            return self._handle_failure(item, envelope, attempt, started, record.duration, self._too_large(len(done)))
        return self.first_target, done

    def _handler_failed(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, error: BaseException
    ) -> Settlement:
        take_made(envelope)
        return super()._handler_failed(item, envelope, attempt, started, clock, error)

    def _complete_with_transition(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        attempt: int,
        started: float,
        record: StageRecord,
        before: Raw,
        trail: bytes,
    ) -> Settlement:
        """Complete the stage where the happy path is more than one plain message."""
        context, envelope.context, envelope.trail = envelope.context, before, trail
        try:
            return self._complete_stage(item, envelope, record, context)
        except PayloadTooLarge as error:
            return self._handle_failure(item, envelope, attempt, started, record.duration, error)

    def _park_on_arrival(self, item: DeliveryItem, envelope: Envelope) -> Settlement:
        """Park a message that was published to be parked.

        The broker counts an attempt first, then the message is marked, and only then parked: a crash between leaves the
        attempt, while a requeue resets the attempts and leaves the mark.
        """
        extra = item.extra
        marked = extra is not None and extra.steps is not None and PARK_MARK in extra.steps
        failure = read_failure(envelope.failure) or Failure("exception", "")
        if extra is None or not extra.attempts:
            if not marked:
                return self._retry(item, 0.0, failure)
            envelope.attempts, envelope.failure = 0, None
            return self._settle(item, Transition([Publish(self.planned.queue, self.planned.id, encode(envelope))]))
        if not marked:
            self._store(item).keep(PARK_MARK, b"")
        return self._park(item, failure)

    # requests

    def _send_request(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        attempt: int,
        started: float,
        clock: float,
        context: Any,
        request: Request,
    ) -> Settlement:
        """Send the request; the changed context and the delivered one wait for the reply in a gather."""
        stage_id = self.planned.id
        command = Raw(encode_message(request.command, what=f"the command of stage {stage_id!r}"))
        encoded = self.codec.encode(context, stage=stage_id)
        if request.endpoint == "next":
            return self._pass_payload(item, envelope, attempt, started, time.perf_counter() - clock, command, encoded)
        key = f"reply:{stage_id}:{item.id}"
        steps = dict(request.steps) or None
        before, payload = envelope.context, envelope.payload
        request_state = RequestState(attempt, started, request.endpoint, request.timeout, before, payload, steps)
        sent = encode(Command(key, command, envelope.workflow_id, stage_id, envelope.run))
        if len(sent) > self._limit:
            raise self._too_large(len(sent), f"the request to endpoint {request.endpoint!r} is")
        envelope.context, envelope.payload = Raw(encoded), Raw(encode(request_state))
        waits = encode(envelope)
        envelope.context, envelope.payload = before, payload
        size = len(waits) - len(before)  # the delivered context only waits in the gather and is never sent on
        if size > self._limit:
            raise self._too_large(size)
        command_message = Publish(self.naming.endpoint(request.endpoint), request.endpoint, sent, ttl=request.timeout)
        return self._settle(
            item,
            Transition([command_message], [OpenGather(key, 1, self.planned.queue, stage_id, waits, request.timeout)]),
        )

    def _pass_payload(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        attempt: int,
        started: float,
        duration: float,
        payload: Raw,
        context: bytes | None = None,
        endpoint: str = "",
    ) -> Settlement:
        """Complete the stage with `payload` for the next one, or as its own result if no next stage takes it.

        The payload is a reply of `endpoint`, if that is not empty.
        """
        data, handed = payload, NIL
        if self._passes_payload:
            data, handed = NIL, tag_reply(self.codec, endpoint, payload)
        record = StageRecord(self.planned.id, "completed", attempt, started, duration, None, data)
        return self._complete_stage(item, envelope, record, context, payload=handed)

    def _on_reply(self, item: DeliveryItem, body: bytes) -> Result:
        base, arrivals = split_parts(item, body)
        envelope = decode_envelope(base)
        if not self._belongs_here(envelope):
            return self._forward_or_park(item, envelope, body)
        request_state, extra = decode_request(envelope.payload), item.extra
        if extra is not None:
            request_state.attempt += extra.attempts
            if extra.cancelled is not None or (extra.fresh and arrivals):
                envelope.context, envelope.payload = request_state.before, request_state.payload
            if extra.cancelled is not None:
                return self._skip_cancelled(item, envelope, sent=True)
            if extra.fresh and arrivals:
                # A worker died at the reply. The message still contains it: no new request is needed.
                return self._handle_lost_attempt(item, envelope, request_state.attempt)
        if not arrivals:
            last = read_failure(extra.failure) if extra is not None and extra.fresh else None
            if last is not None and last.kind == UNDECIDED:
                return self._request_failed(item, envelope, request_state, last)
            late = (
                f"StageTimeout: endpoint {request_state.endpoint!r} did not answer within {request_state.timeout:g} s"
            )
            return self._request_failed(item, envelope, request_state, Failure("timeout", late, "StageTimeout"))
        reply = decode_reply(arrivals[0][1])
        if reply.undecodable:
            return self._on_undecodable_command(item, envelope, base, request_state, reply)
        if reply.error is not None:
            text = f"StageError: endpoint {request_state.endpoint!r} answered with an error: {reply.error}"
            failure = Failure("exception", text, "StageError", True, reply.traceback)
            return self._request_failed(item, envelope, request_state, failure)
        duration = max(0.0, self._wall() - request_state.started)
        enter_attempt((envelope.workflow_id, item.group, self._id, request_state.attempt))
        remote = self.stage.handler
        try:
            if isinstance(remote, RemoteCall):
                return self._apply_reply(item, envelope, request_state, reply.value, remote, duration)
            return self._pass_payload(
                item,
                envelope,
                request_state.attempt,
                request_state.started,
                duration,
                reply.value,
                endpoint=request_state.endpoint,
            )
        except BaseException as error:  # noqa: BLE001 - on_reply is user code
            self._on_error(error)
            undecodable = find_undecodable(error)
            if undecodable is not None:
                return self._park_undecodable(item, undecodable)
            failure = failure_with_traceback(error)
            return self._request_failed(item, envelope, request_state, failure, policy_error(error))

    def _on_undecodable_command(
        self, item: DeliveryItem, envelope: Envelope, base: bytes, request_state: RequestState, reply: Reply
    ) -> Settlement:
        """Park this message; after a requeue send the command again, and wait for another reply."""
        endpoint, seconds = request_state.endpoint, request_state.timeout
        if item.extra is None or PARK_MARK not in (item.extra.steps or ()):
            self._store(item).keep(PARK_MARK, b"")
            place = f"endpoint {endpoint!r}, which received a command of {self.display_name},"
            return park_undecodable(item, place, self.plan.id, self.plan.version, StageError(reply.error or ""))
        key = f"reply:{self._id}:{item.id}"
        sent = encode(Command(key, reply.value, envelope.workflow_id, self._id, envelope.run))
        again = Publish(self.naming.endpoint(endpoint), endpoint, sent, ttl=seconds)
        return self._settle(
            item, Transition([again], [OpenGather(key, 1, self.planned.queue, self._id, base, seconds)])
        )

    def _apply_reply(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        request_state: RequestState,
        value: Raw,
        remote: RemoteCall,
        duration: float,
    ) -> Settlement:
        """Complete a remote stage with its reply, through `on_reply`."""
        data, encoded = value, None
        if remote.on_reply is not None:
            context = self._decode_context(envelope)
            ctx = None
            if asks_for_ctx(remote.on_reply, 2):
                before = structs.replace(envelope, payload=request_state.payload)
                ctx = self._stage_context(item, before, request_state.attempt)
                ctx._place = f"on_reply of {self.planned.id!r}"
            reply = self._reply.decode_stored(value, what=f"the reply of endpoint {request_state.endpoint!r}")
            given = with_ctx(remote.on_reply, 2)(context, reply, ctx)
            check_no_request(given, f"on_reply of {self.planned.id!r}")
            context, data = self._split_result(context, given)
            encoded = self.codec.encode(context, stage=self.planned.id)
        record = StageRecord(
            self.planned.id, "completed", request_state.attempt, request_state.started, duration, None, data
        )
        return self._complete_stage(item, envelope, record, encoded)

    def _request_failed(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        request_state: RequestState,
        failure: Failure,
        error: Exception | None = None,
    ) -> Settlement:
        """Publish another attempt with the delivered context, or fail the stage."""
        envelope.context, envelope.payload, envelope.steps = (
            request_state.before,
            request_state.payload,
            request_state.steps,
        )
        if self.planned.when_uncertain and is_uncertain(failure):
            envelope.steps = {**(envelope.steps or {}), UNCERTAIN_MARK: b""}
        delay, failure = self._ask_policy(request_state.attempt, failure, error)
        self._log_failed(item, envelope.workflow_id, request_state.attempt, failure, delay)
        if delay is None and self.planned.required and self.plan.on_failure == "park":
            # This message contains an obsolete reply: a new message is parked in its place.
            envelope.attempts, delay = -1, 0.0
        elif delay is not None:
            envelope.attempts = request_state.attempt
        if delay is not None:
            envelope.failure = write_failure(failure)
            again = Publish(self.planned.queue, self.planned.id, encode(envelope), delay=delay)
            return self._settle(item, Transition([again])).mark_failed()
        duration = max(0.0, self._wall() - request_state.started)
        enter_attempt((envelope.workflow_id, item.group, self._id, request_state.attempt))
        envelope.attempts, envelope.failure = 0, None
        return self._fail_stage(
            item, envelope, failure, request_state.attempt, request_state.started, duration
        ).mark_failed()
