"""`Supervisor`: keeps the zygote and the pools of a node alive, and hands each event to the pool that it concerns.

A zygote that has died is started again at once; its workers died with it, and each pool starts its own anew. What
dies faster than it can be started ends the node with an error that the program is told. The broker, which the
supervisor and everybody else depend on, is kept by a thread of its own (`BrokerProcess.keep`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pykka

from stageflow_actors.core.plan import DEAD, UNANSWERED, Naming
from stageflow_actors.errors import StageFlowError
from stageflow_actors.runtime.ipc.exit_codes import EXIT_NODE_FAILED
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.node.pool import Cancelled, Pool, ReplaceSpec, Retire, ScaleTo, Tick, ZygoteLost
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.system.processes import describe_exit
from stageflow_actors.runtime.system.restart_limit import RestartLimit
from stageflow_actors.runtime.zygote.handle import Exited, Spawned, SpawnFailed, ZygoteGone, ZygoteHandle
from stageflow_brokers.api import QueueOptions

__all__ = ["AddPools", "Supervisor", "queue_options"]

logger = logging.getLogger("stageflow_actors.node.supervisor")

ROLL_CALL_TICKS = 50
"""Ticks after which also pools that have nothing to do are told of one: a worker may have died of itself."""


class AddPools:
    """More queues to serve."""

    __slots__ = ("specs",)

    def __init__(self, specs: Sequence[PoolSpec]) -> None:
        self.specs = specs


class Supervisor(pykka.ThreadingActor):
    """One per node. `make_zygote` starts one and makes it the current; `fail` is told what cannot be mended."""

    use_daemon_thread = True

    def __init__(
        self,
        make_zygote: Callable[[], ZygoteHandle],
        pool_context: PoolContext,
        naming: Naming,
        max_deaths: int,
        fail: Callable[[StageFlowError], None],
    ) -> None:
        super().__init__()
        self._make_zygote = make_zygote
        self._context = pool_context
        self._naming = naming
        self._max_deaths = max_deaths
        self._fail = fail
        self._pools: dict[str, pykka.ActorRef[Pool]] = {}
        self._zygote_restarts = RestartLimit("zygote process")
        self._retiring = False
        self._ticks = 0

    def on_failure(self, *args: Any) -> None:
        """A node without a supervisor is no node: end it, and it is started again."""
        sys.stderr.flush()
        os._exit(EXIT_NODE_FAILED)

    def on_receive(self, message: Any) -> Any:
        """One event."""
        if isinstance(message, Tick):
            self._ticks += 1
            all_of_them = self._ticks % ROLL_CALL_TICKS == 0
            for name, pool in self._pools.items():
                if all_of_them or self._context.is_active(
                    name
                ):  # telling a hundred idle pools fifty times a second adds up
                    pool.tell(message)
        elif isinstance(message, (Spawned, Exited, SpawnFailed)):
            # The pool of a worker is there as long as the node is.
            self._pools[message.worker_id.rpartition("#")[0]].tell(message)
        elif isinstance(message, ZygoteGone):
            self._on_zygote_gone(message)
        elif isinstance(message, AddPools):
            self._add(message.specs)
        elif isinstance(message, ScaleTo):
            if message.queue in self._pools:
                self._pools[message.queue].tell(message)
        elif isinstance(message, Cancelled):
            consumed = self._context.live.get(message.peer)
            if consumed in self._pools:
                self._pools[consumed].tell(message)
        elif isinstance(message, Retire):
            self._retiring = True
            for pool in self._pools.values():
                pool.tell(message)

    def _add(self, specs: Sequence[PoolSpec]) -> None:
        self._context.broker.admin.declare(queue_options(specs, self._naming, self._max_deaths))
        for spec in specs:
            if spec.queue not in self._pools:
                self._pools[spec.queue] = Pool.start(spec, self._context)
            else:
                # Waited for: once this returns no worker parks what only its successor knows.
                self._pools[spec.queue].ask(ReplaceSpec(spec))

    def _on_zygote_gone(self, event: ZygoteGone) -> None:
        lost = self._context.zygote()
        if not self._retiring:
            logger.warning("the zygote process has ended (%s); it is started again", describe_exit(event.status))
            try:
                self._zygote_restarts.record()
                self._make_zygote()
            except (StageFlowError, OSError) as error:
                self._fail(StageFlowError(f"the zygote cannot be started again: {error}"))
                return
        for pool in self._pools.values():
            pool.tell(ZygoteLost(lost))


def queue_options(specs: Sequence[PoolSpec], naming: Naming, max_deaths: int) -> list[QueueOptions]:
    """How each queue treats deaths: where the coordinator takes over, a dead letter is evidence; else it waits."""
    options = []
    for spec in specs:
        place = spec.programs[-1].plan.stage(spec.stage_id)
        failures, reset = (0, 0.0) if place is None else place.breaker
        told, label = "", ""
        if spec.evidence:
            told, label = naming.coordinator, UNANSWERED if spec.kind == "endpoint" else DEAD
        options.append(
            QueueOptions(spec.queue, max_deaths, spec.evidence, told, label, spec.max_length, failures, reset)
        )
    return options
