"""`RemoteClient`: a client in another process than the runtime; `Runtime.connect` returns it.

It finds a cluster by the data directory only: the cluster file names the program and its address, a fact in the broker
lists the workflows. Nothing here starts a process or takes a lock.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from stageflow_actors.definition.guesses import closest
from stageflow_actors.definition.result_types import result_types
from stageflow_actors.definition.workflow import Workflow, workflow_of
from stageflow_actors.errors import BrokerUnavailable, StageFlowError
from stageflow_actors.runtime.client.attach import check_reachable, live_address
from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.session import RUNTIME_STOPPED, Session, check_workflow_id
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, ClusterManifest, read_manifest
from stageflow_actors.runtime.system.data_dir import DataDir, absolute_path
from stageflow_actors.runtime.system.surroundings import check_threads
from stageflow_brokers.api import Broker

__all__ = ["RemoteClient"]

logger = logging.getLogger("stageflow_actors.client.remote_client")

CLUSTER_CHECK_SECONDS = 0.5
"""Interval between two reads of the cluster file."""

GRACE_SECONDS = 5.0
"""How long waiting calls go on without a running program: it may be restarting."""


class RemoteClient(Client):
    """A client of the cluster that runs on `data_dir`. Raises `BrokerUnavailable` if none runs there."""

    def __init__(self, data_dir: str | Path) -> None:
        super().__init__(RemoteSession(data_dir))


class RemoteSession(Session):
    """A session that follows the cluster of a data directory from program to program."""

    def __init__(self, data_dir: str | Path) -> None:
        super().__init__()
        check_threads()
        self._path = absolute_path(data_dir)
        if not self._path.is_dir():
            raise self._no_cluster()
        self._data = DataDir(self._path, create=False)
        self.history_path = self._data.history
        self._contexts: dict[tuple[str, int], type[Any]] = {}
        self._result_types: dict[tuple[str, int], dict[str, Any]] = {}
        self._manifest: ClusterManifest | None = None
        self._manifest_outdated = True
        self._closed = False
        self._check_lock = threading.Lock()
        self._checked_at = 0.0
        self._absent_since: float | None = None
        address = live_address(self._data)
        if address is None:
            raise self._no_cluster()
        self.connect(address, f"client {os.getpid()}")
        try:
            self._read_manifest()
        except BaseException:
            self.disconnect()
            raise

    def disconnect(self, reason: str = RUNTIME_STOPPED) -> None:
        """See `Session.disconnect`."""
        self._closed = True
        super().disconnect(reason)

    def disown(self, parent: int) -> None:
        """See `Session.disown`. A closed client reads neither the cluster file nor the manifest."""
        super().disown(parent)
        if self.is_inherited:
            self._closed, self._manifest = True, None

    # the cluster and its workflows

    def broker(self) -> Broker:
        """Return the connection if a cluster runs: a frame sent without one would wait for a later cluster."""
        if self._closed:
            return super().broker()
        self._check_cluster()
        if self._absent_since is not None:
            raise self._no_cluster()
        return super().broker()

    def check_alive(self) -> None:
        """See `Session.check_alive`; also raises if no program has run on the directory for `GRACE_SECONDS`."""
        if not self._closed:
            self._check_cluster()
            if self._absent_since is not None and time.monotonic() - self._absent_since > GRACE_SECONDS:
                raise self._no_cluster()
        super().check_alive()

    def _check_cluster(self) -> None:
        """Read the cluster file, and connect to the broker's new address if it has changed."""
        with self._check_lock:
            now = time.monotonic()
            if now - self._checked_at < CLUSTER_CHECK_SECONDS:
                return
            self._checked_at = now
            record = self._data.read_cluster()
            if record is None or not self._data.is_live(record):
                if self._absent_since is None:
                    self._absent_since = now
                return
            self._absent_since = None
            check_reachable(self._data, record)
            if record.address is not None and record.address != self.address and self.connection is not None:
                self.connection.close(timeout=0.0)
                self.connect(record.address, f"client {os.getpid()}")
                self.events.reopen(record.address)

    def on_connected(self) -> None:
        """Read the manifest again before the next use: another program may serve other workflows."""
        self._manifest_outdated = True

    def _read_manifest(self) -> ClusterManifest:
        self._manifest_outdated = False
        manifest = read_manifest(self.ask(lambda admin: admin.get_fact(MANIFEST_FACT)))
        if manifest is None:
            raise StageFlowError(
                f"the cluster of {self._path} has no list of workflows that this release can read: "
                "is the cluster of another release?"
            )
        self._manifest = manifest
        self.naming = manifest.naming
        self.max_message_bytes = manifest.max_message_bytes
        self.workflows = {
            (plan.id, plan.version): WorkflowRef(
                plan,
                self._contexts.get((plan.id, plan.version), dict),
                self._result_types.get((plan.id, plan.version)),
            )
            for plan in manifest.plans
        }
        return manifest

    def resolve(self, workflow: Workflow[Any] | type[Workflow[Any]] | str) -> WorkflowRef:
        """See `Session.resolve`; the workflows are those of the running cluster."""
        wanted: Workflow[Any] | str = workflow_of(workflow)
        if not isinstance(wanted, Workflow):
            check_workflow_id(wanted)
        manifest = self._manifest
        if manifest is None or self._manifest_outdated or self._find(wanted) is None:
            manifest = self._read_manifest()
        ref = self._find(wanted)
        if ref is None:
            name = repr(wanted) if isinstance(wanted, str) else f"{wanted.id!r} version {wanted.version}"
            meant = closest(wanted, {plan.id for plan in manifest.plans}) if isinstance(wanted, str) else None
            raise StageFlowError(
                f"workflow {name} is not served in {self._path}"
                + (f" (did you mean {meant!r}?)" if meant else "")
                + f": it has {manifest.names}"
            )
        if isinstance(wanted, Workflow) and (
            ref.codec.context_type is not wanted.context or (wanted.id, wanted.version) not in self._result_types
        ):
            ref = self.adopt(wanted)
        return ref

    def _find(self, workflow: Workflow[Any] | str) -> WorkflowRef | None:
        if isinstance(workflow, Workflow):
            return self.workflows.get((workflow.id, workflow.version))
        versions = [ref for (name, _), ref in self.workflows.items() if name == workflow]
        return max(versions, key=lambda ref: ref.plan.version, default=None)

    def adopt(self, workflow: Workflow[Any]) -> WorkflowRef:
        """Use the context class of a workflow object: contexts are checked here, and results have this type."""
        key = (workflow.id, workflow.version)
        plan = self.workflows[key].plan
        if workflow.fingerprint() != plan.fingerprint:
            logger.warning(
                "the definition of workflow %r version %d differs from that of the cluster of %s, which uses its own",
                *key,
                self._path,
            )
        self._contexts[key] = workflow.context
        types = self._result_types[key] = result_types(workflow)
        ref = self.workflows[key] = WorkflowRef(plan, workflow.context, types)
        return ref

    def _no_cluster(self) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"no cluster runs on {self._path}: start its program, or `stageflow up MODULE:RUNTIME --data {self._path}`"
        )
