"""`Supervisor`: keeps broker, zygote and pools of a node alive, and hands each event to the pool that it concerns.

It starts again what has died: a broker at once (its journal holds everything), a zygote at once (its workers died with
it). What dies faster than it can be started ends the node with an error that the program is told.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pykka

from brokers.api import QueueOptions
from stageflow_actors.core.plan import DEAD, Naming
from stageflow_actors.errors import StageFlowError
from stageflow_actors.runtime.broker_process import BrokerProcess
from stageflow_actors.runtime.pool import Pool, PoolServices, Retire, Tick, ZygoteLost
from stageflow_actors.runtime.programs import PoolSpec
from stageflow_actors.runtime.zygote import Exited, Spawned, SpawnFailed, Zygote, ZygoteGone

__all__ = ["AddPools", "BrokerEnded", "Supervisor", "queue_options"]

logger = logging.getLogger("stageflow.supervisor")

INTENSITY = 10
"""Restarts of the broker or the zygote within `PERIOD` before the node gives up."""
PERIOD = 10.0


class BrokerEnded:
    """The broker process has ended."""


class AddPools:
    """More queues to serve."""

    __slots__ = ("specs",)

    def __init__(self, specs: Sequence[PoolSpec]) -> None:
        self.specs = specs


class _Restarts:
    """How often something was started again of late."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._times: list[float] = []

    def one_more(self) -> None:
        now = time.monotonic()
        self._times = [at for at in self._times if now - at < PERIOD] + [now]
        if len(self._times) > INTENSITY:
            raise StageFlowError(f"the {self._what} ended {len(self._times)} times within {PERIOD:g} s")


class Supervisor(pykka.ThreadingActor):
    """One per node."""

    use_daemon_thread = True

    def __init__(
        self,
        broker: BrokerProcess,
        make_zygote: Callable[[], Zygote],
        services: PoolServices,
        naming: Naming,
        max_deaths: int,
        fail: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._broker = broker
        self._make_zygote = make_zygote
        self._services = services
        self._naming = naming
        self._max_deaths = max_deaths
        self._fail = fail
        self._pools: dict[str, pykka.ActorRef[Pool]] = {}
        self._broker_restarts = _Restarts("broker process")
        self._zygote_restarts = _Restarts("zygote process")
        self._retiring = False

    def on_failure(self, *args: Any) -> None:
        """A node without a supervisor is no node: end it, and it is started again."""
        sys.stderr.flush()
        os._exit(71)

    def on_receive(self, message: Any) -> Any:
        """One event."""
        if isinstance(message, Tick):
            for pool in self._pools.values():
                pool.tell(message)
        elif isinstance(message, (Spawned, Exited, SpawnFailed)):
            queue = message.worker_id.rpartition("#")[0]
            if queue in self._pools:
                self._pools[queue].tell(message)
        elif isinstance(message, ZygoteGone):
            self._zygote_gone(message)
        elif isinstance(message, BrokerEnded):
            self._broker_ended()
        elif isinstance(message, AddPools):
            self._add(message.specs)
        elif isinstance(message, tuple):
            queue, wish = message
            if queue in self._pools:
                self._pools[queue].tell(wish)
        elif isinstance(message, Retire):
            self._retiring = True
            for pool in self._pools.values():
                pool.tell(message)

    def _add(self, specs: Sequence[PoolSpec]) -> None:
        self._services.broker.query("declare", queue_options(specs, self._naming, self._max_deaths))
        for spec in specs:
            if spec.queue not in self._pools:
                self._pools[spec.queue] = Pool.start(spec, self._services)

    def _broker_ended(self) -> None:
        status = self._broker.reap()
        if status is None or self._retiring:
            return
        logger.warning("the broker process has ended (%s); it is started again", status)
        try:
            self._broker_restarts.one_more()
            self._broker.start()
        except StageFlowError as error:
            self._fail(f"the broker cannot be started again: {error}")

    def _zygote_gone(self, event: ZygoteGone) -> None:
        if self._retiring:
            return
        logger.warning("the zygote process has ended (%s); it is started again", event.status)
        try:
            self._zygote_restarts.one_more()
        except StageFlowError as error:
            self._fail(str(error))
            return
        self._make_zygote()
        for pool in self._pools.values():
            pool.tell(ZygoteLost())


def queue_options(specs: Sequence[PoolSpec], naming: Naming, max_deaths: int) -> list[QueueOptions]:
    """How each queue treats deaths: where the coordinator takes over, a dead letter is evidence; else it waits."""
    options = []
    for spec in specs:
        if spec.evidence:
            options.append(QueueOptions(spec.queue, max_deaths, True, naming.coordinator, DEAD, spec.max_length))
        else:
            options.append(QueueOptions(spec.queue, max_deaths, False, "", "", spec.max_length))
    return options
