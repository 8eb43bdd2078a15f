"""`stageflow instances`: the instances of a cluster, live and finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.options import data_option, json_option, output_option
from stageflow_actors.cli.output import Column, ago, clip, count, emit, print_facts, print_json, span, table, when
from stageflow_actors.cli.selection import LIVE, SEARCHED, described, filter_options, unknown_workflow
from stageflow_actors.errors import InstanceNotFound

if TYPE_CHECKING:
    from stageflow_actors.core.description import InstanceDescription
    from stageflow_actors.runtime.client.attach import Attached

__all__ = ["instances"]

COLUMNS = (
    Column("instance_id"),
    Column("workflow_id", title="workflow"),
    Column("status"),
    Column("stage"),
    Column("started_at", when, title="started"),
    Column("duration", span, right=True),
    Column("error", clip(80)),
)
"""Named as the attributes of `WorkflowResult`."""

OLD_NAMES = {"workflow": "workflow_id", "started": "started_at", "finished": "finished_at"}
OLD_STAGE_NAMES = {"stage": "stage_id", "started": "started_at", "result": "data"}
OLD_COMPENSATION_NAMES = {"compensation": "stage_id"}
"""Names that release 0.1 gave to values in JSON; programs may read them."""

STAGES = (
    Column("stage_id", title="stage"),
    Column("status"),
    Column("attempts", count, right=True),
    Column("started_at", when, title="started"),
    Column("duration", span, right=True),
    Column("data", clip(50), title="result"),
    Column("error", clip(80)),
)

COMPENSATIONS = (
    Column("stage_id", title="compensation"),
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


@instances.command("list")
@filter_options
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="Maximum number of instances.")
@data_option
@output_option
def list_instances(
    status: str | None, workflow: str | None, error: str | None, limit: int, data: Path, output: str
) -> None:
    """List instances, live ones first, then finished ones.

    Both parts begin with the newest instance.

    \b
    stageflow instances list
    stageflow instances list --status parked --error "connection refused"
    stageflow instances list --workflow orders --output csv
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        found: dict[str, dict[str, Any]] = {}
        for description in _live(attached, status, workflow, error, limit):
            found[description.instance_id] = _row(description)
        if attached.history is not None and len(found) < limit and status not in LIVE:
            for row in attached.history.list(status, workflow, limit, error):
                facts = {
                    "instance_id": row.instance_id,
                    "workflow_id": row.workflow_id,
                    "status": row.status,
                    "stage": row.failed_stage,
                    "started_at": row.started_at,
                    "finished_at": row.finished_at,
                    "duration": row.finished_at - row.started_at,
                    "error": row.error,
                }
                found.setdefault(row.instance_id, _with_old_names(facts, OLD_NAMES))
        if not found and workflow is not None and (problem := unknown_workflow(attached, workflow)) is not None:
            click.echo(problem, err=True)
            if output == "table":
                return
    emit(
        list(islice(found.values(), limit)),
        COLUMNS,
        output,
        empty="no instances"
        + (f" of workflow {workflow!r}" if workflow else "")
        + (f" with status {status}" if status else "")
        + (f" with {error!r} in their error" if error else ""),
    )


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
                "status": stage.status.value,
                "attempts": stage.attempts,
                "started_at": stage.started_at or None,
                "duration": stage.duration if stage.started_at and stage.status != "running" else None,
                "error": stage.error,
                "traceback": stage.traceback,
                "data": stage.data,
            }
            for stage in description.stages
        ],
        "compensations": [
            {
                "stage_id": each.stage_id,
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
        old = facts | {
            "stages": [_with_old_names(row, OLD_STAGE_NAMES) for row in facts["stages"]],
            "compensations": [_with_old_names(row, OLD_COMPENSATION_NAMES) for row in facts["compensations"]],
        }
        print_json(old)
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
            "workflow": f"{facts['workflow_id']} (version {facts['version']})" if facts["workflow_id"] else "",
            "status": facts["status"],
            "failed stage": facts["failed_stage"] or "",
            "error": facts["error"] or "",
            "queue": facts["queue"] or "",
            "waits for": facts["waiting_for"] or ", ".join(facts["waiting"]),
            "progress": facts["progress"] or "",
            "started": f"{when(facts['started_at'])} ({ago(facts['started_at'])} ago)" if facts["started_at"] else "",
            "finished": when(facts["finished_at"]),
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
                heading = f"traceback of {name} {row['stage_id']} (the last failed attempt{before})"
                click.echo(f"\n{heading}\n{row['traceback']}")
    click.echo("\ncontext")
    print_json(facts["context"])


def _live(
    attached: Attached, status: str | None, workflow: str | None, error: str | None, limit: int
) -> Iterator[InstanceDescription]:
    """Yield live instances, newest first."""
    from stageflow_actors.core.description import status_of
    from stageflow_brokers.api import MAX_LISTED_GROUPS

    some = (status, workflow, error) != (None, None, None)
    most = min(limit, MAX_LISTED_GROUPS)  # `stageflow instances export` gives all
    groups = attached.wait(attached.admin.list_groups("", max(most, SEARCHED) if some else most), timeout=30.0)
    wanted = [group["id"] for group in groups if status is None or status_of(group) == status]
    found = described(attached, wanted, None, workflow)
    yield from islice((one for one in found if error is None or error in (one.error or "")), limit)


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
        raise InstanceNotFound(instance_id, data_dir=attached.data_dir.path)
    return describe_finished(instance_id, row.epoch, row.outcome, layout_of), None


def _row(description: InstanceDescription) -> dict[str, Any]:
    """Return the row of an instance; only a finished one has a duration."""
    finished = description.finished_at or None
    facts = {
        "instance_id": description.instance_id,
        "workflow_id": description.workflow_id,
        "status": description.status.value,
        "stage": description.stage,
        "started_at": description.started_at or None,
        "finished_at": finished,
        "duration": finished - description.started_at if finished else None,
        "error": description.error,
    }
    return _with_old_names(facts, OLD_NAMES)


def _with_old_names(facts: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts, and those of other names in release 0.1 under those names too."""
    return facts | {old: facts[name] for old, name in names.items()}
