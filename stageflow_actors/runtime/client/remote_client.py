"""`Connection`: a client in another process than the runtime; what `Runtime.connect` gives.

It knows a cluster by its data directory alone: who serves it stands in the directory, what is served in the broker.
Nothing here starts a process or takes a lock.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import BrokerUnavailable, StageFlowError
from stageflow_actors.runtime.client.attach import live_address
from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.event_stream import Feed
from stageflow_actors.runtime.client.workflow_ref import Known
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, ClusterManifest, read_manifest
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_brokers.api import Broker

__all__ = ["Connection"]

logger = logging.getLogger("stageflow_actors.client.remote_client")

LOOK_SECONDS = 0.5
"""How long what was read of who serves the directory is believed."""

GRACE_SECONDS = 5.0
"""How long nobody may serve the directory before those who wait are told: a program may be started again meanwhile."""


class Connection(Client):
    """The calls of a client on the cluster that serves `data_dir`. Raises `BrokerUnavailable` where there is none."""

    def __init__(self, data_dir: str | Path) -> None:
        super().__init__()
        self._path = Path(data_dir).absolute()
        if not self._path.is_dir():
            raise self._nobody()
        self._data = DataDir(self._path, create=False)
        self._history_path = self._data.history
        self._contexts: dict[tuple[str, int], type[Any]] = {}
        self._served: ClusterManifest | None = None
        self._renewed = True
        self._closed = False
        self._gate = threading.Lock()
        self._looked_at = 0.0
        self._alone_since: float | None = None
        address = live_address(self._data)
        if address is None:
            raise self._nobody()
        self._attach(address, f"client {os.getpid()}")
        try:
            self._learn()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the cluster, which goes on with all that was submitted. Closing again does nothing."""
        self._closed = True
        super().close()

    # who serves, and what

    def _port(self) -> Broker:
        """The connection, if somebody is at its other end: what is sent to nobody would wait for a later cluster."""
        if self._closed:
            return super()._port()
        self._look()
        if self._alone_since is not None:
            raise self._nobody()
        return super()._port()

    def _check_alive(self) -> None:
        if not self._closed:
            self._look()
            if self._alone_since is not None and time.monotonic() - self._alone_since > GRACE_SECONDS:
                raise self._nobody()
        super()._check_alive()

    def _look(self) -> None:
        """See who serves the directory now, and follow where the broker has moved to."""
        with self._gate:
            now = time.monotonic()
            if now - self._looked_at < LOOK_SECONDS:
                return
            self._looked_at = now
            record = self._data.read_cluster()
            if record is None or not record.program_lives():
                if self._alone_since is None:
                    self._alone_since = now
                return
            self._alone_since = None
            if record.address is not None and record.address != self._address and self._broker is not None:
                self._broker.close(timeout=0.0)
                self._attach(record.address, f"client {os.getpid()}")
                if self._feed is not None:
                    self._feed.close()
                    self._feed = Feed(record.address, f"events {os.getpid()}", self._callbacks, self._form_of)

    def _connected(self) -> None:
        self._renewed = True  # another broker, perhaps of another program with other workflows

    def _learn(self) -> ClusterManifest:
        self._renewed = False
        served = read_manifest(self._ask(lambda admin: admin.get_fact(MANIFEST_FACT)))
        if served is None:
            raise StageFlowError(f"the cluster of {self._path} does not say what it serves: is it of another release?")
        self._served = served
        self._naming = served.naming
        self._max_message_bytes = served.max_message_bytes
        self._known = {
            (plan.id, plan.version): Known(plan, self._contexts.get((plan.id, plan.version), dict))
            for plan in served.plans
        }
        return served

    def _workflow(self, workflow: Workflow[Any] | str) -> Known:
        served = self._served
        if served is None or self._renewed or self._find(workflow) is None:
            served = self._learn()
        known = self._find(workflow)
        if known is None:
            name = repr(workflow) if isinstance(workflow, str) else f"{workflow.id!r} version {workflow.version}"
            raise StageFlowError(f"workflow {name} is not served in {self._path}: there is {served.names}")
        if isinstance(workflow, Workflow) and known.codec.context_type is not workflow.context:
            known = self._adopt(workflow)
        return known

    def _find(self, workflow: Workflow[Any] | str) -> Known | None:
        if isinstance(workflow, Workflow):
            return self._known.get((workflow.id, workflow.version))
        versions = [known for (name, _), known in self._known.items() if name == workflow]
        return max(versions, key=lambda known: known.plan.version, default=None)

    def _adopt(self, workflow: Workflow[Any]) -> Known:
        """With the workflow itself at hand its contexts are checked here, and results come in their type."""
        key = (workflow.id, workflow.version)
        plan = self._known[key].plan
        if workflow.fingerprint() != plan.fingerprint:
            logger.warning(
                "workflow %r version %d is defined otherwise here than in the cluster of %s, which runs its own",
                *key,
                self._path,
            )
        self._contexts[key] = workflow.context
        known = self._known[key] = Known(plan, workflow.context)
        return known

    def _nobody(self) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"nobody serves {self._path}: start its program, or `stageflow up MODULE:RUNTIME --data {self._path}`"
        )
