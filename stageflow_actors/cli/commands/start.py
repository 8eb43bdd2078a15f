"""`stageflow start`: one instance on a running cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.options import data_option

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.instance import Instance

__all__ = ["context_of", "finished", "json_of", "start"]


@click.command()
@click.argument("workflow")
@click.option("--json", "text", default="{}", metavar="JSON", help="The context, as a JSON object; - reads stdin.")
@click.option("--id", "instance_id", default=None, metavar="ID", help="The instance's id.  [default: a new one]")
@click.option("--priority", default=0, show_default=True, type=click.IntRange(-1000, 1000), help="Higher goes first.")
@click.option("--wait", is_flag=True, help="Wait for the end, and print the result.")
@click.option("--timeout", default=None, type=click.FloatRange(0), metavar="SECONDS", help="Wait no longer than that.")
@data_option
def start(
    workflow: str, text: str, instance_id: str | None, priority: int, wait: bool, timeout: float | None, data: Path
) -> int:
    """Start an instance of WORKFLOW (its id) on the cluster that serves the data directory; prints the instance's id.

    The context must have the fields of the workflow's, of their types; what only its code can tell fails the first
    stage. The same --id with the same input starts nothing and gives the instance there is. With --wait the result is
    printed as JSON, and the exit code is 1 unless it completed; a wait that ends before leaves the instance running.

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
    """Wait for the end of an instance and print it as JSON; the exit code says whether it completed."""
    from stageflow_actors.cli.output import print_json
    from stageflow_actors.core.codec import json_view
    from stageflow_actors.errors import BrokerUnavailable, StageFlowError

    try:
        result = instance.result(timeout)
    except TimeoutError as error:
        raise StageFlowError(str(error)) from None
    except BrokerUnavailable as error:
        raise BrokerUnavailable(f"{error}; instance {instance.id!r} has been accepted and goes on there") from None
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
    """The context that `--json` gives. Raises `click.BadParameter` for anything but a JSON object."""
    context = json_of(text, "--json")
    if not isinstance(context, dict):
        raise click.BadParameter("the context must be a JSON object", param_hint="--json")
    return context


def json_of(text: str, hint: str) -> Any:
    """What a JSON option says; `-` reads stdin. Raises `click.BadParameter`."""
    import orjson

    given = sys.stdin.read() if text == "-" else text
    try:
        return orjson.loads(given)
    except orjson.JSONDecodeError as error:
        raise click.BadParameter(f"no JSON: {error}", param_hint=hint) from None
