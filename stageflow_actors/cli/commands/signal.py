"""`stageflow instances signal`: send a signal to one live instance."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.commands.instances import instances
from stageflow_actors.cli.commands.start import json_of
from stageflow_actors.cli.options import data_option
from stageflow_actors.errors import InstanceNotFound

if TYPE_CHECKING:
    from stageflow_actors.core.plan import WorkflowPlan
    from stageflow_actors.runtime.client.attach import Attached

__all__ = ["signal"]


@instances.command()
@click.argument("instance_id", metavar="ID")
@click.argument("name")
@click.option(
    "--json", "text", default="null", metavar="PAYLOAD", help="Payload as JSON; - reads stdin.  [default: null]"
)
@data_option
def signal(instance_id: str, name: str, text: str, data: Path) -> None:
    """Send a signal to a live instance.

    ID is the instance, NAME the signal. A signal that the instance does not await yet is kept until it does; several
    signals keep their order.

    \b
    stageflow instances signal ORDER-17 approval --json '{"by": "me"}'
    """
    from stageflow_actors.core.codec import encode_value
    from stageflow_actors.core.routing import signal_key
    from stageflow_actors.runtime.client.attach import attach
    from stageflow_brokers.api import Arrival

    if not name:
        raise click.BadParameter("the name of the signal is empty", param_hint="NAME")
    payload = encode_value(json_of(text, "--json"), what=f"the payload of signal {name!r}")
    with attach(data, write=True) as attached:
        group = attached.wait(attached.admin.lookup([instance_id]))["groups"].get(instance_id)
        if group is None or group["ended"]:
            row = None if attached.history is None else attached.history.get(instance_id)
            ended = "" if row is None else f": it has ended ({row.status})"
            raise InstanceNotFound(instance_id, f"no live instance has the id {instance_id!r}{ended}")
        plan = _plan_of(attached, group)
        if plan is not None:
            plan.check_signal(name)
        arrival = Arrival(signal_key(name), os.urandom(8).hex(), len(payload), instance_id)
        answer = attached.broker.publish([], [], [payload], arrivals=[arrival]).result(10.0)
        if answer.refused:
            raise InstanceNotFound(instance_id, f"no live instance has the id {instance_id!r}")


def _plan_of(attached: Attached, group: Mapping[str, Any]) -> WorkflowPlan | None:
    """Return the workflow of a live instance as the cluster last served it; None if it is unknown."""
    from stageflow_actors.core.description import version_of
    from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, read_manifest

    served = read_manifest(attached.wait(attached.admin.get_fact(MANIFEST_FACT)))
    version = version_of(group)
    return next((plan for plan in served.plans if (plan.id, plan.version) == version), None) if served else None
