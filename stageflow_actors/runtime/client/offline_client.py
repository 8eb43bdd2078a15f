"""`OfflineClient` and `open_client`: how the command line controls instances of a running cluster, or of one at rest.

A cluster at rest delivers nothing. Its broker keeps each command, which takes effect when the cluster runs again, so no
caller may wait for the effect here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stageflow_actors.core.routing import CANCELLABLE_GATHER_PREFIXES
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.runtime.client.attach import Attached, attach, live_address
from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.remote_client import RemoteClient
from stageflow_actors.runtime.client.session import Session
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, read_manifest
from stageflow_actors.runtime.system.data_dir import DataDir

__all__ = ["OfflineClient", "open_client"]


class OfflineClient(Client):
    """A client of a broker that delivers nothing; it knows the workflows of the last cluster in the directory."""

    def __init__(self, attached: Attached) -> None:
        session = Session()
        super().__init__(session)
        session.connection = attached.broker
        session.live = attached.live
        session.history_path = attached.data_dir.history
        manifest = read_manifest(attached.wait(attached.admin.get_fact(MANIFEST_FACT)))
        if manifest is not None:
            session.naming = manifest.naming
            session.max_message_bytes = manifest.max_message_bytes
            session.workflows = {(plan.id, plan.version): WorkflowRef(plan, dict) for plan in manifest.plans}

    def order_cancel(self, instance_id: str, reason: str) -> WorkflowStatus:
        """Cancel an instance at the next start, and return its current status. Raises `InstanceNotFound`."""
        session = self._session
        group = session.lookup([instance_id]).get(instance_id)
        if group is None and session.row(instance_id) is None:
            raise session.no_instance(instance_id)
        status = self.instance(instance_id).status()
        if not status.terminal and status != WorkflowStatus.compensating:
            text = f"cancelled: {reason}" if reason else "cancelled"
            session.ask(lambda admin: admin.cancel(instance_id, text, list(CANCELLABLE_GATHER_PREFIXES)))
        return status


@contextmanager
def open_client(path: Path) -> Iterator[Client]:
    """Open a client of the running cluster of a directory, or an `OfflineClient`. Raises as `attach` does."""
    if live_address(DataDir(path, create=False)) is not None:
        with RemoteClient(path) as client:
            yield client
    else:
        with attach(path, write=True) as attached:
            yield OfflineClient(attached)
