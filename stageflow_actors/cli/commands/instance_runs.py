"""`stageflow instances cancel`, `retry` and `restart`: end an instance, or run it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stageflow_actors.cli.commands.instances import instances
from stageflow_actors.cli.commands.start import context_of, finished
from stageflow_actors.cli.options import data_option, wait_options
from stageflow_actors.errors import StageFlowError

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.instance import Instance

__all__ = ["cancel", "restart", "retry"]

F = TypeVar("F", bound=Callable[..., Any])


@instances.command()
@click.argument("instance_id", metavar="ID")
@click.option("--reason", default="", metavar="TEXT", help="Stored as the error of the instance.")
@data_option
def cancel(instance_id: str, reason: str, data: Path) -> int:
    """Cancel an instance and compensate its completed stages.

    Further stages do not start. A stage in work gets one second to end and is then killed. Prints the status of the
    instance: `cancelled`; `compensating` if the compensations take longer than 30 seconds; or the status it ended with
    before the cancellation (exit code 1). Without a running cluster, it is cancelled at the next start.

    \b
    stageflow instances cancel ORDER-17 --reason "changed my mind"
    """
    from stageflow_actors.core.status import WorkflowStatus
    from stageflow_actors.runtime.client.offline_client import OfflineClient, open_client

    with open_client(data) as client:
        if isinstance(client, OfflineClient):
            status = client.order_cancel(instance_id, reason)
            if not status.terminal and status != WorkflowStatus.compensating:
                click.echo(
                    f"{instance_id} is {status} and no cluster runs here: it is cancelled at the next start", err=True
                )
                return 0
        else:
            status = client.instance(instance_id).cancel(reason)
    click.echo(status.value)
    return 1 if status.terminal and status != WorkflowStatus.cancelled else 0


def _another_run(command: F) -> F:
    for option in (
        click.argument("instance_id", metavar="ID"),
        click.option(
            "--json",
            "text",
            default=None,
            metavar="JSON",
            help="Context to run with, as a JSON object; - reads stdin.  [default: the context of the last run]",
        ),
        wait_options,
        data_option,
    ):
        command = option(command)
    return command


@instances.command()
@_another_run
def retry(instance_id: str, text: str | None, wait: bool, timeout: float | None, data: Path) -> int:
    """Run an instance again from the stage that failed.

    The instance is parked, or it failed and no stage was compensated. Prints the id of the instance; with --wait prints
    the result as JSON, and the exit code is 1 unless the instance completed. Without a running cluster, it resumes at
    the next start.

    \b
    stageflow instances retry ORDER-17
    stageflow instances retry ORDER-17 --json '{"total": 9.5}' --wait
    """
    return _run(instance_id, text, wait, timeout, data, lambda instance, context: instance.retry(context))


@instances.command()
@_another_run
def restart(instance_id: str, text: str | None, wait: bool, timeout: float | None, data: Path) -> int:
    """Run an instance again from the first stage.

    The instance has ended or is parked, and keeps its id. Prints the id; with --wait prints the result as JSON, and the
    exit code is 1 unless the instance completed. Without a running cluster, it starts at the next start.

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
    rerun: Callable[[Instance[Any], dict[str, Any] | None], Instance[Any]],
) -> int:
    from stageflow_actors.runtime.client.offline_client import OfflineClient, open_client

    context = None if text is None else context_of(text)
    with open_client(data) as client:
        at_rest = isinstance(client, OfflineClient)
        if wait and at_rest:
            raise StageFlowError(f"no cluster runs on {data}: leave out --wait, which would wait forever")
        instance = rerun(client.instance(instance_id), context)
        if wait:
            return finished(instance, timeout)
    if at_rest:
        click.echo(f"no cluster runs here: {instance_id} goes on at the next start", err=True)
    click.echo(instance_id)
    return 0
