"""A way for the command line to steer instances: as a client of the cluster that serves a directory, or at rest.

At rest nothing is delivered, so what is asked for is written down and happens once the cluster runs again: nobody must
wait for it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stageflow_actors.core.routing import CANCELLABLE
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.errors import InstanceNotFound
from stageflow_actors.runtime.client.attach import Attached, attach, live_address
from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.remote_client import Connection
from stageflow_actors.runtime.client.workflow_ref import Known
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, read_manifest
from stageflow_actors.runtime.system.data_dir import DataDir

__all__ = ["AtRest", "steered"]


class AtRest(Client):
    """A client of a broker that delivers nothing, which knows the workflows that were served there last."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self._broker = attached.broker
        self._history_path = attached.data_dir.history
        served = read_manifest(attached.wait(attached.admin.get_fact(MANIFEST_FACT)))
        if served is not None:
            self._naming = served.naming
            self._max_message_bytes = served.max_message_bytes
            self._known = {(plan.id, plan.version): Known(plan, dict) for plan in served.plans}

    def order_cancel(self, instance_id: str, reason: str) -> WorkflowStatus:
        """Have an instance cancelled at the next start; returns where it stands. Raises `InstanceNotFound`."""
        group = self._lookup([instance_id]).get(instance_id)
        if group is None and self._row(instance_id) is None:
            raise InstanceNotFound(instance_id)
        status = self.instance(instance_id).status()
        if not status.terminal and status != WorkflowStatus.compensating:
            text = f"cancelled: {reason}" if reason else "cancelled"
            self._ask(lambda admin: admin.cancel(instance_id, text, list(CANCELLABLE)))
        return status


@contextmanager
def steered(path: Path) -> Iterator[Client]:
    """A client of whoever serves the directory, an `AtRest` where nobody does. Raises as `attach` does."""
    if live_address(DataDir(path, create=False)) is not None:
        with Connection(path) as client:
            yield client
    else:
        with attach(path, write=True) as attached:
            yield AtRest(attached)
