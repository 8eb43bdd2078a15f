"""`stageflow instances cancel`, `retry` and `restart`: the end of an instance, and another run of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stageflow_actors.cli.commands.instances import instances
from stageflow_actors.cli.commands.start import context_of, finished
from stageflow_actors.cli.options import data_option
from stageflow_actors.errors import StageFlowError

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.instance import Instance

__all__ = ["cancel", "restart", "retry"]

F = TypeVar("F", bound=Callable[..., Any])


@instances.command()
@click.argument("instance_id", metavar="ID")
@click.option("--reason", default="", metavar="TEXT", help="Kept as the instance's error.")
@data_option
def cancel(instance_id: str, reason: str, data: Path) -> int:
    """Cancel an instance: what has not started does not start, what has completed is compensated.

    A stage in work may end by itself, and is killed a second later. Prints what became of the instance: `cancelled`, or
    how it ended if it was faster (exit code 1 then); `compensating` if undoing takes longer than half a minute. On a
    cluster at rest it is cancelled at the next start.

    \b
    stageflow instances cancel ORDER-17 --reason "changed my mind"
    """
    from stageflow_actors.core.status import WorkflowStatus
    from stageflow_actors.runtime.client.offline_client import AtRest, steered

    with steered(data) as client:
        if isinstance(client, AtRest):
            status = client.order_cancel(instance_id, reason)
            if not status.terminal and status != WorkflowStatus.compensating:
                click.echo(
                    f"{instance_id} is {status} and nothing runs here: it is cancelled at the next start", err=True
                )
                return 0
        else:
            status = client.instance(instance_id).cancel(reason)
    click.echo(status.value)
    return 1 if status.terminal and status != WorkflowStatus.cancelled else 0


def _another_run(command: F) -> F:
    for option in (
        click.argument("instance_id", metavar="ID"),
        click.option("--json", "text", default=None, metavar="JSON", help="Another context; - reads stdin."),
        click.option("--wait", is_flag=True, help="Wait for the end, and print the result."),
        click.option("--timeout", default=None, type=click.FloatRange(0), metavar="SECONDS", help="Wait no longer."),
        data_option,
    ):
        command = option(command)
    return command


@instances.command()
@_another_run
def retry(instance_id: str, text: str | None, wait: bool, timeout: float | None, data: Path) -> int:
    """Run an instance again from the stage that failed: one that is parked, or failed with nothing compensated.

    Prints the instance's id; with --wait the result as JSON, and the exit code is 1 unless it completed. On a cluster
    at rest it goes on at the next start.

    \b
    stageflow instances retry ORDER-17
    stageflow instances retry ORDER-17 --json '{"order_id": "ORDER-17", "total": 9.5}' --wait
    """
    return _run(instance_id, text, wait, timeout, data, lambda instance, context: instance.retry(context))


@instances.command()
@_another_run
def restart(instance_id: str, text: str | None, wait: bool, timeout: float | None, data: Path) -> int:
    """Run an instance anew from the first stage, under the same id: one that has ended or is parked.

    Without --json it begins with the context that the last run left. Prints the instance's id; with --wait the result
    as JSON, and the exit code is 1 unless it completed. On a cluster at rest it begins at the next start.

    \b
    stageflow instances restart ORDER-17 --wait
    """
    return _run(instance_id, text, wait, timeout, data, lambda instance, context: instance.restart(context))


def _run(
    instance_id: str,
    text: str | None,
    wait: bool,
    timeout: float | None,
    data: Path,
    again: Callable[[Instance[Any], dict[str, Any] | None], Instance[Any]],
) -> int:
    from stageflow_actors.runtime.client.offline_client import AtRest, steered

    context = None if text is None else context_of(text)
    with steered(data) as client:
        at_rest = isinstance(client, AtRest)
        if wait and at_rest:
            raise StageFlowError(f"nobody serves {data}, so there is nothing to wait for: leave out --wait")
        instance = again(client.instance(instance_id), context)
        if wait:
            return finished(instance, timeout)
    if at_rest:
        click.echo(f"nothing runs here: {instance_id} goes on at the next start", err=True)
    click.echo(instance_id)
    return 0
