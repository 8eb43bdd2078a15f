"""`stageflow instances`: the instances of a cluster, live and finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stageflow_actors.cli.options import data_option, json_option, output_option
from stageflow_actors.cli.output import Column, ago, clip, count, emit, print_facts, print_json, span, table, when
from stageflow_actors.errors import InstanceNotFound

if TYPE_CHECKING:
    from stageflow_actors.core.description import InstanceDescription
    from stageflow_actors.runtime.client.attach import Attached

__all__ = ["filter_options", "instances", "report_unknown_workflow"]

F = TypeVar("F", bound=Callable[..., Any])

STATUSES = (
    "pending",
    "running",
    "waiting",
    "compensating",
    "parked",
    "completed",
    "failed",
    "compensated",
    "compensation_failed",
    "cancelled",
)
LIVE = STATUSES[:5]

SEARCHED = 10_000
"""Maximum number of live instances that a filtered list reads: the broker does nothing else until then."""

PAGE = 100

COLUMNS = (
    Column("instance_id"),
    Column("workflow"),
    Column("status"),
    Column("stage"),
    Column("started", when),
    Column("duration", span, right=True),
    Column("error", clip(80)),
)

STAGES = (
    Column("stage"),
    Column("status"),
    Column("attempts", count, right=True),
    Column("started", when),
    Column("duration", span, right=True),
    Column("result", clip(50)),
    Column("error", clip(80)),
)

COMPENSATIONS = (
    Column("compensation"),
    Column("status"),
    Column("duration", span, right=True),
    Column("error", clip(80)),
)


@click.group()
def instances() -> None:
    """List, show, export, signal, cancel and rerun instances.

    \b
    stageflow instances list --status compensated --limit 20
    stageflow instances show ORDER-17
    stageflow instances cancel ORDER-17
    """


def filter_options(command: F) -> F:
    """`--status STATUS` and `--workflow ID`, as `status: str | None` and `workflow: str | None`."""
    status = click.option(
        "--status",
        type=click.Choice(STATUSES),
        default=None,
        metavar="STATUS",
        help=f"Only instances of this status: {', '.join(STATUSES)}.  [default: all]",
    )
    workflow = click.option(
        "--workflow", default=None, metavar="ID", help="Only instances of this workflow.  [default: all]"
    )
    return status(workflow(command))


@instances.command("list")
@filter_options
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="Maximum number of instances.")
@data_option
@output_option
def list_instances(status: str | None, workflow: str | None, limit: int, data: Path, output: str) -> None:
    """List instances, live ones first, then finished ones.

    Both parts begin with the newest instance.

    \b
    stageflow instances list
    stageflow instances list --status parked
    stageflow instances list --workflow orders --output csv
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        found: dict[str, dict[str, Any]] = {}
        for description in _live(attached, status, workflow, limit):
            found[description.instance_id] = _row(description)
        if attached.history is not None and len(found) < limit and status not in LIVE:
            for row in attached.history.list(status, workflow, limit):
                found.setdefault(
                    row.instance_id,
                    {
                        "instance_id": row.instance_id,
                        "workflow": row.workflow_id,
                        "status": row.status,
                        "stage": row.failed_stage,
                        "started": row.started_at,
                        "finished": row.finished_at,
                        "duration": row.finished_at - row.started_at,
                        "error": row.error,
                    },
                )
        if not found and workflow is not None:
            report_unknown_workflow(attached, workflow)
    emit(
        list(islice(found.values(), limit)),
        COLUMNS,
        output,
        empty="no instances of this status" if status else "no instances",
    )


def report_unknown_workflow(attached: Attached, workflow: str) -> None:
    """Write to stderr that no instance is of this workflow, with the workflows that instances are of."""
    from stageflow_actors.core.description import version_of

    groups = attached.wait(attached.admin.list_groups("", SEARCHED), timeout=30.0)
    known = {version[0] for version in map(version_of, groups) if version is not None}
    if attached.history is not None:
        known |= attached.history.workflows()
    if workflow not in known:
        ids = ", ".join(sorted(known)) or "no workflow"
        click.echo(f"no instance is of workflow {workflow!r}: the instances are of {ids}", err=True)


@instances.command()
@click.argument("instance_id", metavar="ID")
@data_option
@json_option
def show(instance_id: str, data: Path, output: str) -> None:
    """Show one instance: status, stages, tracebacks, context.

    \b
    stageflow instances show ORDER-17
    stageflow instances show ORDER-17 --output json
    """
    from stageflow_actors.core.codec import json_view
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        description, waits_for = _describe(attached, instance_id)
    facts = _row(description) | {
        "version": description.version,
        "epoch": description.epoch,
        "failed_stage": description.failed_stage,
        "queue": description.queue or None,
        "waiting": description.waiting,
        "waiting_for": waits_for,
        "progress": _progress(description),
        "stages": [
            {
                "stage_id": stage.stage_id,
                "stage": stage.stage_id,
                "status": stage.status.value,
                "attempts": stage.attempts,
                "started": stage.started_at or None,
                "duration": stage.duration if stage.started_at and stage.status != "running" else None,
                "error": stage.error,
                "traceback": stage.traceback,
                "result": stage.data,
            }
            for stage in description.stages
        ],
        "compensations": [
            {
                "compensation": each.stage_id,
                "status": each.status.value,
                "duration": each.duration,
                "error": each.error,
                "traceback": each.traceback,
            }
            for each in description.compensations
        ],
        "context": json_view(description.context),
    }
    if output == "json":
        print_json(facts)
    else:
        _print(facts)


def _progress(description: InstanceDescription) -> str | None:
    if description.progress is None:
        return None
    done, total, note = description.progress
    return f"{done:g} of {total:g}" + (f": {note}" if note else "")


def _print(facts: dict[str, Any]) -> None:
    from stageflow_actors.cli.output import console

    print_facts(
        {
            "instance": facts["instance_id"],
            "workflow": f"{facts['workflow']} (version {facts['version']})" if facts["workflow"] else "",
            "status": facts["status"],
            "failed stage": facts["failed_stage"] or "",
            "error": facts["error"] or "",
            "queue": facts["queue"] or "",
            "waits for": facts["waiting_for"] or ", ".join(facts["waiting"]),
            "progress": facts["progress"] or "",
            "started": f"{when(facts['started'])} ({ago(facts['started'])} ago)" if facts["started"] else "",
            "finished": when(facts["finished"]),
            "duration": span(facts["duration"]),
            "run": str(facts["epoch"]) if facts["epoch"] > 1 else "",
        }
    )
    for rows, columns in ((facts["stages"], STAGES), (facts["compensations"], COMPENSATIONS)):
        if rows:
            click.echo()
            console().print(table(rows, columns))
    for name, rows in (("stage", facts["stages"]), ("compensation", facts["compensations"])):
        for row in rows:
            if row["traceback"]:
                before = ", before it completed" if row["status"] == "completed" else ""
                heading = f"traceback of {name} {row[name]} (the last failed attempt{before})"
                click.echo(f"\n{heading}\n{row['traceback']}")
    click.echo("\ncontext")
    print_json(facts["context"])


def _live(attached: Attached, status: str | None, workflow: str | None, limit: int) -> Iterator[InstanceDescription]:
    """Live instances, newest first."""
    from stageflow_actors.core.description import status_of
    from stageflow_brokers.api import MAX_LISTED_GROUPS

    some = status is not None or workflow is not None
    most = min(limit, MAX_LISTED_GROUPS)  # `stageflow instances export` gives all
    groups = attached.wait(attached.admin.list_groups("", max(most, SEARCHED) if some else most), timeout=30.0)
    wanted = [group["id"] for group in groups if status is None or status_of(group) == status]
    yield from islice(_described(attached, wanted, None, workflow), limit)


def _described(
    attached: Attached, ids: Iterable[str], status: str | None, workflow: str | None
) -> Iterator[InstanceDescription]:
    """Yield the live ones of these instances, of that status and workflow; reads a page at a time."""
    from stageflow_actors.core.description import describe_live

    layout_of = attached.layouts()
    rest = iter(ids)
    while page := list(islice(rest, PAGE)):
        described = attached.wait(attached.admin.inspect(page))
        for instance_id in page:
            if instance_id not in described:
                continue  # it has ended since, and is in the history
            group = described[instance_id]
            if not all("body" in message for message in group["messages"]):
                # The answer for the page had no room for its bodies.
                group = attached.wait(attached.admin.inspect([instance_id])).get(instance_id, group)
            description = describe_live(group, layout_of)
            if workflow in (None, description.workflow_id) and status in (None, description.status.value):
                yield description


def _describe(attached: Attached, instance_id: str) -> tuple[InstanceDescription, str | None]:
    """Return the state of an instance, and what it waits for."""
    from stageflow_actors.core.description import describe_finished, describe_live
    from stageflow_actors.runtime.client.wait_reason import wait_reason

    layout_of = attached.layouts()
    group = attached.wait(attached.admin.inspect([instance_id])).get(instance_id)
    if group is not None:
        queues = attached.wait(attached.admin.stats(""))["queues"]
        reason = wait_reason(group, queues, attached.read_naming(), time.time(), live=attached.live)
        return describe_live(group, layout_of), None if reason is None else reason.text
    # Asked after the broker: an instance is in the history before the broker forgets it.
    row = None if attached.history is None else attached.history.get(instance_id)
    if row is None:
        raise InstanceNotFound(instance_id)
    return describe_finished(instance_id, row.epoch, row.outcome, layout_of), None


def _row(description: InstanceDescription) -> dict[str, Any]:
    """Return the row of an instance; only a finished one has a duration."""
    finished = description.finished_at or None
    return {
        "instance_id": description.instance_id,
        "workflow": description.workflow_id,
        "status": description.status.value,
        "stage": description.stage,
        "started": description.started_at or None,
        "finished": finished,
        "duration": finished - description.started_at if finished else None,
        "error": description.error,
    }
