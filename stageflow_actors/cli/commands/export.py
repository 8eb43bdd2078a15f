"""`stageflow instances export`: write all instances to a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from stageflow_actors.cli.commands.instances import instances
from stageflow_actors.cli.options import data_option
from stageflow_actors.cli.selection import LIVE, described, filter_options, unknown_workflow
from stageflow_actors.core.plural import pluralize

if TYPE_CHECKING:
    from stageflow_actors.core.description import InstanceDescription

__all__ = ["export"]

FIELDS = (
    "instance_id",
    "workflow_id",
    "version",
    "status",
    "started_at",
    "finished_at",
    "duration",
    "failed_stage",
    "error",
)
"""The columns, named as the attributes of `WorkflowResult`."""


@instances.command()
@click.argument("target", metavar="FILE", default="-", type=click.Path(dir_okay=False, allow_dash=True))
@filter_options
@click.option(
    "--format",
    "kind",
    type=click.Choice(["jsonl", "csv"]),
    default=None,
    help="Format of FILE.  [default: csv if FILE ends in .csv, otherwise jsonl]",
)
@data_option
def export(
    target: str, status: str | None, workflow: str | None, error: str | None, kind: str | None, data: Path
) -> None:
    """Write all instances to a file, live and finished.

    FILE gets one JSON object per line, or one CSV row without stages and context per instance. `-` is stdout, and the
    default. The file appears under its name complete or not at all.

    \b
    stageflow instances export all.jsonl
    stageflow instances export --status failed failed.csv
    """
    from stageflow_actors.runtime.client.attach import attach

    csv = kind == "csv" or (kind is None and target.endswith(".csv"))
    with attach(data) as attached, _opened(target) as file:
        found = _all(attached, status, workflow)
        number = _write((one for one in found if error is None or error in (one.error or "")), file, csv=csv)
        if not number and workflow is not None and (problem := unknown_workflow(attached, workflow)) is not None:
            click.echo(problem, err=True)
    click.echo(pluralize(number, "instance"), err=True)


@contextmanager
def _opened(target: str) -> Iterator[IO[str]]:
    """Open `target` so that it appears complete or not at all; a pipe or a device is written directly."""
    from stageflow_actors.cli.results_file import is_special

    try:
        # A link, such as /dev/stdout, stands for the file behind it.
        path = os.path.realpath(target) if os.path.islink(target) else target
        opened = click.open_file(path, "w", encoding="utf-8", atomic=target != "-" and not is_special(target))
    except OSError as error:
        raise click.UsageError(f"{target} cannot be written: {error.strerror}") from None
    with opened as file:
        yield file


def _all(attached: Any, status: str | None, workflow: str | None) -> Iterator[InstanceDescription]:
    from stageflow_actors.core.description import describe_finished

    layout_of = attached.layouts()
    seen: set[str] = set()
    # Also for finished instances only: some have ended and are not in the history yet.
    for description in described(attached, attached.wait(attached.admin.live_ids()), status, workflow):
        seen.add(description.instance_id)
        yield description
    if attached.history is not None and status not in LIVE:
        for row in attached.history.iterate(status, workflow):
            if row.instance_id not in seen:
                yield describe_finished(row.instance_id, row.epoch, row.outcome, layout_of)


def _write(descriptions: Iterator[InstanceDescription], file: IO[str], *, csv: bool) -> int:
    import csv as writing

    import orjson

    from stageflow_actors.cli.output import json_default

    number = 0
    writer = writing.DictWriter(file, FIELDS, lineterminator="\n", extrasaction="ignore") if csv else None
    if writer is not None:
        writer.writeheader()
    for description in descriptions:
        number += 1
        row = _row(description, whole=not csv)
        if writer is not None:
            writer.writerow(row)
        else:
            file.write(orjson.dumps(row, option=orjson.OPT_NON_STR_KEYS, default=json_default).decode() + "\n")
    return number


def _row(description: InstanceDescription, *, whole: bool) -> Mapping[str, Any]:
    from stageflow_actors.core.codec import json_view

    finished = description.finished_at or None
    row: dict[str, Any] = {
        "instance_id": description.instance_id,
        "workflow_id": description.workflow_id,
        "version": description.version,
        "status": description.status.value,
        "started_at": description.started_at or None,
        "finished_at": finished,
        "duration": finished - description.started_at if finished else None,
        "failed_stage": description.failed_stage,
        "error": description.error,
    }
    if whole:
        row["stages"] = [
            {
                "stage_id": stage.stage_id,
                "status": stage.status.value,
                "attempts": stage.attempts,
                "started_at": stage.started_at or None,
                "duration": stage.duration if stage.started_at else None,
                "error": stage.error,
                "traceback": stage.traceback,
                "data": stage.data,
            }
            for stage in description.stages
        ]
        row["compensations"] = [
            {
                "stage_id": each.stage_id,
                "status": each.status.value,
                "error": each.error,
                "traceback": each.traceback,
            }
            for each in description.compensations
        ]
        row["context"] = json_view(description.context)
    return row
