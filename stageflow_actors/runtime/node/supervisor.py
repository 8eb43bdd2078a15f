"""`Supervisor`: keeps the zygote and the pools of a node alive, and passes each event to the pool concerned.

A zygote that has died is started again at once. Its workers died with it, and each pool starts new ones. If the zygote
dies too often (`RestartLimit`), the node ends and reports the error to the program. The broker process is not
supervised here but by a thread of its own (`BrokerProcess.keep_running`), because the supervisor itself depends on the
broker.
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
from stageflow_actors.runtime.node.pool import Cancelled, Pool, ReplaceSpec, ScaleTo, ShutDown, Tick, ZygoteLost
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.system.processes import describe_exit
from stageflow_actors.runtime.system.restart_limit import RestartLimit
from stageflow_actors.runtime.zygote.handle import Exited, Spawned, SpawnFailed, ZygoteGone, ZygoteHandle
from stageflow_brokers.api import QueueOptions

__all__ = ["AddPools", "Supervisor", "queue_options"]

logger = logging.getLogger("stageflow_actors.node.supervisor")

IDLE_TICK_INTERVAL = 50
"""Every so many ticks, idle pools get a tick too: a worker may have died while no message ran."""


class AddPools:
    """Start pools for more queues, or replace the specification of existing pools."""

    __slots__ = ("specs",)

    def __init__(self, specs: Sequence[PoolSpec]) -> None:
        self.specs = specs


class Supervisor(pykka.ThreadingActor):
    """The supervisor of one node.

    `make_zygote` starts a zygote and makes it the current one. `fail` ends the node with an error for the program.
    """

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
        self._shutting_down = False
        self._ticks = 0

    def on_failure(self, *args: Any) -> None:
        """End the node: without a supervisor no worker is replaced. The program starts the node again."""
        sys.stderr.flush()
        os._exit(EXIT_NODE_FAILED)

    def on_receive(self, message: Any) -> Any:
        """Handle one message: a tick, a report of the zygote, or a command."""
        if isinstance(message, Tick):
            self._ticks += 1
            all_pools = self._ticks % IDLE_TICK_INTERVAL == 0
            # Fifty ticks per second to each of a hundred idle pools would cost too much.
            if all_pools:
                self._context.causes.tick()
            for name, pool in self._pools.items():
                if all_pools or self._context.is_active(name):
                    pool.tell(message)
        elif isinstance(message, (Spawned, Exited, SpawnFailed)):
            # A pool lives as long as its node, so that each report finds the pool of its worker.
            self._pools[message.worker_id.rpartition("#")[0]].tell(message)
        elif isinstance(message, ZygoteGone):
            self._on_zygote_gone(message)
        elif isinstance(message, AddPools):
            self._add(message.specs)
        elif isinstance(message, ScaleTo):
            if message.queue in self._pools:
                self._pools[message.queue].tell(message)
        elif isinstance(message, Cancelled):
            queue = self._context.live.get(message.peer)
            if queue in self._pools:
                self._pools[queue].tell(message)
        elif isinstance(message, ShutDown):
            self._shutting_down = True
            for pool in self._pools.values():
                pool.tell(message)

    def _add(self, specs: Sequence[PoolSpec]) -> None:
        self._context.broker.admin.declare(queue_options(specs, self._naming, self._max_deaths))
        for spec in specs:
            if spec.queue not in self._pools:
                self._pools[spec.queue] = Pool.start(spec, self._context)
            else:
                # Wait for it: afterwards no outdated worker parks a message that only its successor can run.
                self._pools[spec.queue].ask(ReplaceSpec(spec))

    def _on_zygote_gone(self, event: ZygoteGone) -> None:
        lost = self._context.zygote()
        if not self._shutting_down:
            logger.warning("the zygote process has ended (%s); it is started again", describe_exit(event.status))
            try:
                self._zygote_restarts.record()
                self._make_zygote()
            except (StageFlowError, OSError) as error:
                self._fail(StageFlowError(f"the zygote process cannot be started again: {error}"))
                return
        for pool in self._pools.values():
            pool.tell(ZygoteLost(lost))


def queue_options(specs: Sequence[PoolSpec], naming: Naming, max_deaths: int) -> list[QueueOptions]:
    """Return the broker's options for the queue of each pool.

    With `spec.evidence` the coordinator takes over the instance of a message that killed too many workers, and the
    dead letter stays as evidence; otherwise the dead letter waits for a person to requeue it.
    """
    options = []
    for spec in specs:
        planned = spec.programs[-1].plan.stage(spec.stage_id)
        failures, reset = (0, 0.0) if planned is None else planned.breaker
        notify_queue, notify_label = "", ""
        if spec.evidence:
            notify_queue, notify_label = naming.coordinator, UNANSWERED if spec.kind == "endpoint" else DEAD
        options.append(
            QueueOptions(
                spec.queue,
                max_deaths,
                spec.evidence,
                notify_queue,
                notify_label,
                spec.max_length,
                failures,
                reset,
            )
        )
    return options
