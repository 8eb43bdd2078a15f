"""`stageflow start`: start one instance on a running cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.options import data_option, wait_options

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.instance import Instance

__all__ = ["context_of", "finished", "json_of", "start"]


@click.command()
@click.argument("workflow")
@click.option(
    "--json", "text", default="{}", metavar="JSON", help="Context as a JSON object; - reads stdin.  [default: {}]"
)
@click.option("--id", "instance_id", default=None, metavar="ID", help="Id of the instance.  [default: a new one]")
@click.option(
    "--priority", default=0, show_default=True, type=click.IntRange(-1000, 1000), help="Higher priorities run first."
)
@wait_options
@data_option
def start(
    workflow: str, text: str, instance_id: str | None, priority: int, wait: bool, timeout: float | None, data: Path
) -> int:
    """Start an instance on a running cluster.

    WORKFLOW is the id of a workflow that the cluster serves. Prints the id of the instance. The context needs the
    fields of the workflow's context type; a check by user code fails the first stage instead. The same --id with the
    same input returns the existing instance. With --wait the exit code is 1 unless the instance completed.

    \b
    stageflow start orders --json '{"order_id": "A-1", "total": 9.5}' --id A-1
    stageflow start orders --json - --wait < order.json
    """
    from stageflow_actors.runtime.runtime import Runtime

    context = context_of(text)
    with Runtime.connect(data) as client:
        instance = client.submit(workflow, context, instance_id=instance_id, priority=priority)
        if wait:
            return finished(instance, timeout)
    click.echo(instance.id)
    return 0


def finished(instance: Instance[Any], timeout: float | None) -> int:
    """Wait until an instance ends, print its result as JSON, and return 0 if it completed, else 1."""
    from stageflow_actors.cli.output import print_json
    from stageflow_actors.core.codec import json_view
    from stageflow_actors.errors import BrokerUnavailable, StageFlowError

    try:
        result = instance.result(timeout)
    except TimeoutError as error:
        raise StageFlowError(str(error)) from None
    except BrokerUnavailable as error:
        raise BrokerUnavailable(f"{error}; instance {instance.id!r} was accepted and goes on there") from None
    print_json(
        {
            "instance_id": result.instance_id,
            "status": result.status.value,
            "error": result.error,
            "failed_stage": result.failed_stage,
            "duration": result.duration,
            "context": json_view(result._outcome_read().context),
        }
    )
    return 0 if result.success else 1


def context_of(text: str) -> dict[str, Any]:
    """Return the context that `--json` gives. Raises `click.BadParameter` for anything but a JSON object."""
    context = json_of(text, "--json")
    if not isinstance(context, dict):
        raise click.BadParameter("the context must be a JSON object", param_hint="--json")
    return context


def json_of(text: str, hint: str) -> Any:
    """Return the value of a JSON option; `-` reads stdin. Raises `click.BadParameter`."""
    from stageflow_actors.cli.inputs.json_text import NotAContext, loads

    given = sys.stdin.read() if text == "-" else text
    try:
        return loads(given.encode(errors="surrogateescape"))
    except NotAContext as error:
        raise click.BadParameter(str(error), param_hint=hint) from None
