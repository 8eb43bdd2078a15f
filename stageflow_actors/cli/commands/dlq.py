"""`stageflow dlq`: list, show, requeue and delete dead letters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.letters import (
    FoundLetter,
    LetterFilter,
    check_workflow,
    describe_letters,
    find_letters,
    found_letter,
    iterate_letters,
    purge_letters,
    queues_with_letters,
    requeue_letters,
)
from stageflow_actors.cli.options import check_confirmed, data_option, json_option, output_option
from stageflow_actors.cli.output import Column, ago, clip, count, emit, plain, print_facts, print_json, when
from stageflow_actors.cli.selection import check_may_ask, confirm, error_option, selection_options
from stageflow_actors.core.plan import DLQ_PREFIX
from stageflow_actors.core.plural import pluralize

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.attach import Attached

__all__ = ["dlq"]

MAX_SHOWN = 100
"""Length of the list of a dry run."""

COLUMNS = (
    Column("id", plain, right=True),
    Column("instance"),
    Column("workflow"),
    Column("stage"),
    Column("parked", ago, right=True),
    Column("attempts", count, right=True),
    Column("deaths", count, right=True),
    Column("evidence", lambda value: "yes" if value else ""),
    Column("reason", clip(100)),
)


@click.group()
def dlq() -> None:
    """List, show, requeue and delete dead letters.

    A dead letter is a message whose attempts are spent. A command names it by its number or by its instance. A dead
    letter marked `evidence` is kept for inspection only: its instance went on without it, because it was compensated or
    because the stage is optional. It cannot be requeued.

    \b
    stageflow dlq list
    stageflow dlq show ORDER-17
    stageflow dlq requeue ORDER-17
    stageflow dlq requeue --queue stageflow.orders.stage1
    """


def _queue_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--queue", "queue", default="", metavar="NAME", help="Only dead letters of this queue.  [default: all queues]"
    )(command)


def _filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    workflow = click.option(
        "--workflow", default=None, metavar="ID", help="Only dead letters of this workflow.  [default: all]"
    )
    return workflow(error_option(command))


@dlq.command("list")
@_queue_option
@_filter_options
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="Maximum number of dead letters.")
@data_option
@output_option
def list_dead_letters(queue: str, workflow: str | None, error: str | None, limit: int, data: Path, output: str) -> None:
    """List dead letters with reason, age and origin.

    \b
    stageflow dlq list
    stageflow dlq list --queue stageflow.orders.stage1 --output json
    """
    from stageflow_actors.cli.message_rows import message_row
    from stageflow_actors.runtime.client.attach import attach

    filters = LetterFilter(queue, workflow, error)
    with attach(data) as attached:
        total = sum(dead for _, dead in queues_with_letters(attached, queue))
        found = (letter for letter in iterate_letters(attached, queue) if filters.accepts(letter))
        rows = [message_row(letter) for letter in islice(found, limit)]
        if not rows:
            check_workflow(attached, workflow)
    emit(rows, COLUMNS, output, empty="no dead letters")
    if not filters.selects and len(rows) < total and output == "table":
        click.echo(f"{total - len(rows):,} more; see --limit", err=True)


@dlq.command()
@click.argument("letter", metavar="ID")
@_queue_option
@data_option
@json_option
def show(letter: str, queue: str, data: Path, output: str) -> None:
    """Show one dead letter with traceback and context.

    ID is the number of the dead letter, or its instance.

    \b
    stageflow dlq show 4711
    stageflow dlq show ORDER-17 --output json
    """
    from stageflow_actors.cli.message_rows import envelope_of, message_row
    from stageflow_actors.core.description import trail_stages
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        found = _find(attached, (letter,), queue)[0]
    row = message_row(found)
    envelope = envelope_of(found)
    row["stages"] = [] if envelope is None else [_plain_stage(stage) for stage in trail_stages(envelope.trail)]
    if output == "json":
        print_json(row)
        return
    print_facts(
        {
            "dead letter": str(row["id"]),
            "queue": f"{DLQ_PREFIX}{row['queue']}",
            "instance": row["instance"],
            "workflow": row["workflow"],
            "stage": f"compensation of {row['stage']}" if row["compensation"] else row["stage"],
            "reason": row["reason"] or "",
            "kind": row["kind"] or "",
            "parked": f"{when(row['parked'])} ({ago(row['parked'])} ago)" if row["parked"] else "",
            "attempts": str(row["attempts"]),
            "deaths": str(row["deaths"]),
            "stages so far": ", ".join(f"{s['stage_id']} {s['status']}" for s in row["stages"]),
            "requeue": "refused: its instance went on without it" if row["evidence"] else "possible",
        }
    )
    if row["traceback"]:
        click.echo(f"\ntraceback\n{row['traceback']}\n")
    click.echo("context")
    print_json(row["context"])


@dlq.command()
@click.argument("letters", nargs=-1, metavar="[ID]...")
@_queue_option
@_filter_options
@click.option("--all", "everything", is_flag=True, help="All dead letters of all queues.")
@selection_options
@data_option
def requeue(
    letters: tuple[str, ...],
    queue: str,
    workflow: str | None,
    error: str | None,
    everything: bool,
    dry_run: bool,
    yes: bool,
    data: Path,
) -> int:
    """Requeue dead letters: their instances resume there.

    Each ID is the number of a dead letter, or an instance. Without ID, select dead letters by --workflow, --error and
    --queue, or pass --all. Counts of attempts and worker deaths start from zero. Without a running cluster, the
    instances resume at its next start. The command asks first if --workflow or --error selects. Exit code 1 if every
    dead letter is `evidence`, and so none was requeued.

    \b
    stageflow dlq requeue ORDER-17 ORDER-18
    stageflow dlq requeue --queue stageflow.orders.stage1
    stageflow dlq requeue --workflow orders --error "connection refused" --yes
    """
    from stageflow_actors.runtime.client.attach import attach

    filters = LetterFilter(queue, workflow, error)
    _check_choice(letters, filters, everything)
    if dry_run:
        return _show("requeue", letters, filters, data)
    found: list[FoundLetter] = []
    if not letters and filters.selects:
        check_may_ask("requeue", yes)
        found = _select(filters, data, "requeue")
        if not found:
            return 0
        confirm("requeue", describe_letters(found), yes)
    done = refused = 0
    with attach(data, write=True) as attached:
        if filters.selects and not letters:
            done, refused = requeue_letters(attached, found)
        else:
            for name, ids in _by_queue(attached, letters, queue):
                answer = attached.wait(attached.admin.requeue(f"{DLQ_PREFIX}{name}", ids), timeout=60.0)
                done += answer["requeued"]
                refused += len(answer["refused"])
        later = "" if attached.live else "; they resume when a runtime starts on this directory"
    click.echo(f"{done:,} requeued{later}", err=True)
    if refused:
        click.echo(f"{refused:,} not requeued: evidence of instances that went on without them", err=True)
    return 0 if done or not refused else 1


@dlq.command()
@click.argument("letters", nargs=-1, metavar="[ID]...")
@_queue_option
@_filter_options
@click.option("--all", "everything", is_flag=True, help="All dead letters of all queues.")
@selection_options
@data_option
def purge(
    letters: tuple[str, ...],
    queue: str,
    workflow: str | None,
    error: str | None,
    everything: bool,
    dry_run: bool,
    yes: bool,
    data: Path,
) -> int:
    """Delete dead letters and the instances parked with them.

    Each ID is the number of a dead letter, or an instance. Without ID, select dead letters by --workflow, --error and
    --queue, or pass --all. An instance that is parked with a deleted dead letter is deleted too, without a result. The
    command asks first.

    \b
    stageflow dlq purge 4711 --yes
    stageflow dlq purge --queue stageflow.orders.stage1 --yes
    stageflow dlq purge --workflow orders --error KeyError --dry-run
    """
    from stageflow_actors.runtime.client.attach import attach

    filters = LetterFilter(queue, workflow, error)
    _check_choice(letters, filters, everything)
    if dry_run:
        return _show("purge", letters, filters, data)
    found: list[FoundLetter] = []
    if filters.selects and not letters:
        check_may_ask("delete the dead letters", yes)
        found = _select(filters, data, "delete")
        if not found:
            return 0
        confirm("delete", f"{describe_letters(found)} and the instances parked with them", yes)
    else:
        check_confirmed("delete " + (", ".join(letters) or f"all dead letters{f' of {queue}' if queue else ''}"), yes)
    done = gone = 0
    with attach(data, write=True) as attached:
        if filters.selects and not letters:
            done, gone = purge_letters(attached, found)
        else:
            for name, ids in _by_queue(attached, letters, queue):
                answer = attached.wait(attached.admin.purge(f"{DLQ_PREFIX}{name}", ids), timeout=60.0)
                done += answer["purged"]
                gone += len(answer["instances"])
    click.echo(f"{pluralize(done, 'dead letter')} deleted, {pluralize(gone, 'instance')} with them", err=True)
    return 0


def _select(filters: LetterFilter, data: Path, verb: str) -> list[FoundLetter]:
    """Return the dead letters that the filters select; print a line if there is none."""
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        found = find_letters(attached, filters)
    if not found:
        click.echo(f"no dead letter to {verb}", err=True)
    return found


def _check_choice(letters: tuple[str, ...], filters: LetterFilter, everything: bool) -> None:
    if not letters and not filters.queue and not filters.selects and not everything:
        raise click.UsageError(
            "name dead letters by number or instance, or pass --workflow ID, --error SUBSTRING, --queue NAME or --all"
        )
    if everything and (letters or filters.queue):
        raise click.UsageError("--all excludes numbers, instances and --queue")
    if letters and filters.selects:
        raise click.UsageError("name dead letters, or select them by --workflow and --error, not both")


def _show(verb: str, letters: tuple[str, ...], filters: LetterFilter, data: Path) -> int:
    """Print the dead letters that a command would act on."""
    from stageflow_actors.cli.message_rows import message_row
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        if letters:
            chosen = _find(attached, letters, filters.queue)
        else:
            chosen = [letter for letter in iterate_letters(attached, filters.queue) if filters.accepts(letter)]
            if not chosen:
                check_workflow(attached, filters.workflow)
        found = [found_letter(letter) for letter in chosen]
        rows = [message_row(letter) for letter in chosen[:MAX_SHOWN]]
    if rows:
        emit(rows, COLUMNS, "table")
    more = f"; the list shows the first {MAX_SHOWN}" if len(found) > MAX_SHOWN else ""
    click.echo(f"would {verb} {describe_letters(found)}{more}", err=True)
    return 0


def _find(attached: Attached, letters: tuple[str, ...], queue: str) -> list[dict[str, Any]]:
    wanted = set(letters)
    found = [each for each in iterate_letters(attached, queue) if each["group"] in wanted or str(each["id"]) in wanted]
    missing = wanted - {each["group"] for each in found} - {str(each["id"]) for each in found}
    if missing:
        raise click.ClickException(
            f"no dead letter has the number or the instance {min(missing)!r}; `stageflow dlq list` lists them all"
        )
    return found


def _by_queue(attached: Attached, letters: tuple[str, ...], queue: str) -> list[tuple[str, list[int]]]:
    """Return the queues with the numbers of the chosen dead letters; no numbers stand for all of a queue."""
    if not letters:
        return [(name, []) for name, _ in queues_with_letters(attached, queue)]
    by_queue: defaultdict[str, list[int]] = defaultdict(list)
    for letter in _find(attached, letters, queue):
        by_queue[letter["queue"]].append(letter["id"])
    return list(by_queue.items())


def _plain_stage(stage: Any) -> dict[str, Any]:
    return {"stage_id": stage.stage_id, "status": stage.status.value, "attempts": stage.attempts, "error": stage.error}
