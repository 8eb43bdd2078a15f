"""`stageflow instances cancel`, `retry` and `restart`: end instances, or run them again, one or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stageflow_actors.cli.bulk import Bulk
from stageflow_actors.cli.commands.instances import instances
from stageflow_actors.cli.commands.start import context_of, finished
from stageflow_actors.cli.options import data_option, wait_options
from stageflow_actors.cli.output import Column, clip, emit
from stageflow_actors.cli.selection import (
    FoundInstance,
    Selection,
    check_may_ask,
    confirm,
    filter_options,
    selection_options,
    summary,
)
from stageflow_actors.errors import StageFlowError

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.client import Client
    from stageflow_actors.runtime.client.instance import Instance

__all__ = ["cancel", "restart", "retry"]

F = TypeVar("F", bound=Callable[..., Any])

CANCELLED = ("pending", "running", "waiting", "parked")
RETRIED = ("parked", "failed", "compensation_failed")
RESTARTED = ("parked", "failed", "compensated", "compensation_failed", "cancelled")
"""Statuses that each command selects by default: `restart` takes completed instances only by `--status completed`."""

MAX_SHOWN = 100
"""Length of the list of a dry run."""

COLUMNS = (
    Column("instance_id"),
    Column("workflow_id"),
    Column("status"),
    Column("stage"),
    Column("error", clip(80)),
)


def _many(command: F) -> F:
    """The arguments that select instances: IDs, or filters."""
    for option in (
        data_option,
        selection_options,
        filter_options,
        click.argument("ids", nargs=-1, metavar="[ID]..."),
    ):
        command = option(command)
    return command


@instances.command()
@click.option("--reason", default="", metavar="TEXT", help="Stored as the error of the instances.")
@_many
def cancel(
    ids: tuple[str, ...],
    reason: str,
    workflow: str | None,
    status: str | None,
    error: str | None,
    dry_run: bool,
    yes: bool,
    data: Path,
) -> int:
    """Cancel instances and compensate their completed stages.

    Further stages do not start. A stage in work gets one second to end and is then killed. Prints the status of an
    instance: `cancelled`; `compensating` if the compensations take longer than 30 seconds; or the status it ended with
    before the cancellation (exit code 1). Without a running cluster, it is cancelled at the next start.

    Without ID, --workflow, --status and --error select instances that have not ended. The command asks first.

    \b
    stageflow instances cancel ORDER-17 --reason "changed my mind"
    stageflow instances cancel --workflow orders --status waiting --dry-run
    """
    from stageflow_actors.core.status import WorkflowStatus

    def act(client: Client, instance_id: str) -> WorkflowStatus:
        from stageflow_actors.runtime.client.offline_client import OfflineClient

        if isinstance(client, OfflineClient):
            return client.order_cancel(instance_id, reason)
        return client.instance(instance_id).cancel(reason)

    def act_on_one_of_many(client: Client, at_rest: bool, instance_id: str) -> str:
        found = act(client, instance_id)
        if found == WorkflowStatus.cancelled or not found.terminal:
            return "to be cancelled at the next start" if at_rest else found.value
        return f"ended {found.value} before"

    selection = Selection(workflow, status, error)
    if len(ids) != 1 or selection or dry_run:
        return _bulk("cancel", "cancelled", CANCELLED, ids, selection, dry_run, yes, data, act_on_one_of_many)
    with _client(data) as (client, at_rest):
        found = act(client, ids[0])
    if at_rest and not found.terminal and found != WorkflowStatus.compensating:
        click.echo(f"{ids[0]} is {found} and no cluster runs here: it is cancelled at the next start", err=True)
        return 0
    click.echo(found.value)
    return 1 if found.terminal and found != WorkflowStatus.cancelled else 0


def _another_run(command: F) -> F:
    for option in (
        _many,
        click.option(
            "--json",
            "text",
            default=None,
            metavar="JSON",
            help="Context to run with, as a JSON object; - reads stdin.  [default: the context of the last run]",
        ),
        wait_options,
    ):
        command = option(command)
    return command


@instances.command()
@_another_run
def retry(**options: Any) -> int:
    """Run instances again from the stage that failed.

    An instance is parked, or it failed and no stage was compensated; of one whose compensations failed, those run
    again. Prints the id of the instance; with --wait prints the result as JSON, and the exit code is 1 unless the
    instance completed. Without a running cluster, it resumes at the next start.

    Without ID, --workflow, --status and --error select instances that are parked, failed or compensation_failed. The
    command asks first, and the exit code is 1 if an instance is refused.

    \b
    stageflow instances retry ORDER-17
    stageflow instances retry ORDER-17 --json '{"total": 9.5}' --wait
    stageflow instances retry --workflow orders --error "connection refused" --yes
    """
    return _run("retry", "retried", RETRIED, lambda instance, context: instance.retry(context), **options)


@instances.command()
@_another_run
def restart(**options: Any) -> int:
    """Run instances again from the first stage.

    An instance has ended or is parked, and keeps its id. Prints the id; with --wait prints the result as JSON, and the
    exit code is 1 unless the instance completed. Without a running cluster, it starts at the next start.

    Without ID, --workflow, --status and --error select instances that are parked or ended; completed ones only with
    --status completed. The command asks first, and the exit code is 1 if an instance is refused.

    \b
    stageflow instances restart ORDER-17 --wait
    stageflow instances restart --workflow orders --status compensated --yes
    """
    return _run("restart", "restarted", RESTARTED, lambda instance, context: instance.restart(context), **options)


def _run(
    verb: str,
    done: str,
    statuses: tuple[str, ...],
    rerun: Callable[[Instance[Any], dict[str, Any] | None], Instance[Any]],
    *,
    ids: tuple[str, ...],
    text: str | None,
    wait: bool,
    timeout: float | None,
    workflow: str | None,
    status: str | None,
    error: str | None,
    dry_run: bool,
    yes: bool,
    data: Path,
) -> int:
    selection = Selection(workflow, status, error)
    if len(ids) != 1 or selection or dry_run:
        if text is not None or wait:
            raise click.UsageError(f"{'--json' if text is not None else '--wait'} needs one ID, without filters")

        def act(client: Client, at_rest: bool, instance_id: str) -> str:
            rerun(client.instance(instance_id), None)
            return done

        return _bulk(verb, done, statuses, ids, selection, dry_run, yes, data, act)
    context = None if text is None else context_of(text)
    with _client(data) as (client, at_rest):
        if wait and at_rest:
            raise StageFlowError(f"no cluster runs on {data}: leave out --wait, which would wait forever")
        instance = rerun(client.instance(ids[0]), context)
        if wait:
            return finished(instance, timeout)
    if at_rest:
        click.echo(f"no cluster runs here: {ids[0]} goes on at the next start", err=True)
    click.echo(ids[0])
    return 0


@contextmanager
def _client(data: Path) -> Iterator[tuple[Client, bool]]:
    """Open a client of the directory; also yields True if no cluster runs there."""
    from stageflow_actors.runtime.client.offline_client import OfflineClient, open_client

    with open_client(data) as client:
        yield client, isinstance(client, OfflineClient)


def _bulk(
    verb: str,
    done: str,
    statuses: tuple[str, ...],
    ids: tuple[str, ...],
    selection: Selection,
    dry_run: bool,
    yes: bool,
    data: Path,
    act: Callable[[Client, bool, str], str],
) -> int:
    """Act on the named or selected instances; `act` gets the client, whether it is at rest, and an id."""
    _check_choice(verb, statuses, ids, selection)
    if ids:
        if dry_run:
            raise click.UsageError("--dry-run is for a selection by --workflow, --status or --error")
        chosen = list(dict.fromkeys(ids))
    else:
        if not dry_run:
            check_may_ask(verb, yes)
        found = _find(selection, statuses, data)
        if dry_run:
            return _show(verb, found)
        if not found:
            click.echo(f"no instance to {verb}", err=True)
            return 0
        confirm(verb, summary(found), yes)
        chosen = [one.instance_id for one in found]
    bulk = Bulk(done)
    with _client(data) as (client, at_rest):
        bulk.run(chosen, lambda instance_id: act(client, at_rest, instance_id), str)
    bulk.report("; no cluster runs here: they go on at the next start" if at_rest and verb != "cancel" else "")
    return 1 if bulk.refusals else 0


def _check_choice(verb: str, statuses: tuple[str, ...], ids: tuple[str, ...], selection: Selection) -> None:
    if ids and selection:
        raise click.UsageError("name instances, or select them by --workflow, --status and --error, not both")
    if not ids and not selection:
        raise click.UsageError("name instances, or select them by --workflow, --status or --error")
    allowed = (*statuses, "completed") if verb == "restart" else statuses
    if selection.status is not None and selection.status not in allowed:
        listed = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise click.UsageError(f"{verb} is for instances that are {listed}, not for {selection.status} ones")


def _find(selection: Selection, statuses: tuple[str, ...], data: Path) -> list[FoundInstance]:
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        return selection.find(attached, statuses)


def _show(verb: str, found: list[FoundInstance]) -> int:
    if found:
        emit([one._asdict() for one in found[:MAX_SHOWN]], COLUMNS, "table")
    more = f"; the list shows the first {MAX_SHOWN}" if len(found) > MAX_SHOWN else ""
    click.echo(f"would {verb} {summary(found)}{more}", err=True)
    return 0
