"""`BranchExecutor`: calls the selector of a branch and continues with the arm that it names.

The name of the arm is recorded as the result of the branch.
"""

from __future__ import annotations

from msgspec import Raw

from stageflow_actors.core.envelope import StageRecord, encode
from stageflow_actors.core.plan import WorkflowPlan
from stageflow_actors.core.status import StageStatus
from stageflow_actors.definition.callables import asks_for_ctx, with_ctx
from stageflow_actors.errors import StageError
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.messaging.settlements import Result, Settlement
from stageflow_actors.runtime.worker.awaitables import check_not_awaitable
from stageflow_actors.runtime.worker.executors.base import Executor, ExecutorEnvironment
from stageflow_brokers.api import DeliveryItem

__all__ = ["BranchExecutor"]


class BranchExecutor(Executor):
    """Executes one branch."""

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        self._selector = with_ctx(program.parts["selector"], 1)
        self._wants_ctx = asks_for_ctx(program.parts["selector"], 1)
        self._default: str | None = program.parts["default"]

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        opened = self._open(item, body)
        if isinstance(opened, Settlement):
            return opened
        started = self._wall()
        attempt = 1 if item.extra is None else item.extra.attempts + 1
        try:
            ctx = self._stage_context(item, opened, attempt) if self._wants_ctx else None
            key = self._selector(self._decode_context(opened), ctx)
            check_not_awaitable(key, f"the selector of branch {self.planned.id!r}")
            chosen = key if isinstance(key, str) and key in self.planned.arms else self._default
            if chosen is None:
                raise StageError(
                    f"branch {self.planned.id!r} has no arm {key!r} and no default: its arms are "
                    f"{', '.join(map(repr, self.planned.arms))}; add that arm, or a default"
                )
            took = self._wall() - started
            record = StageRecord(
                self.planned.id, StageStatus.completed.value, attempt, started, took, None, Raw(encode(chosen))
            )
            # The first stage of the arm receives the payload, as the next stage would.
            first, payload = self.planned.arms[chosen], opened.payload
            return self._complete_stage(item, opened, record, payload=payload, to=first)
        except BaseException as error:  # noqa: BLE001 - the selector is user code
            self._on_error(error)
            return self._handle_failure(item, opened, attempt, started, self._wall() - started, error)
