"""`stageflow dlq`: list, show, requeue and delete dead letters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.options import check_confirmed, data_option, json_option, output_option, yes_option
from stageflow_actors.cli.output import Column, ago, clip, count, emit, plain, print_facts, print_json, when
from stageflow_actors.core.plan import DLQ_PREFIX
from stageflow_actors.core.plural import pluralize

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.attach import Attached

__all__ = ["dlq"]

PAGE = 1_000

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


@dlq.command("list")
@_queue_option
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="Maximum number of dead letters.")
@data_option
@output_option
def list_dead_letters(queue: str, limit: int, data: Path, output: str) -> None:
    """List dead letters with reason, age and origin.

    \b
    stageflow dlq list
    stageflow dlq list --queue stageflow.orders.stage1 --output json
    """
    from stageflow_actors.cli.message_rows import message_row
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        total = sum(dead for _, dead in _queues(attached, queue))
        rows = [message_row(letter) for letter in islice(_letters(attached, queue), limit)]
    emit(rows, COLUMNS, output, empty="no dead letters")
    if len(rows) < total and output == "table":
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
@click.option("--all", "everything", is_flag=True, help="All dead letters of all queues.")
@data_option
def requeue(letters: tuple[str, ...], queue: str, everything: bool, data: Path) -> int:
    """Requeue dead letters: their instances resume there.

    Each ID is the number of a dead letter, or an instance. Without ID, name a queue with --queue, or pass --all. Counts
    of attempts and worker deaths start from zero. Without a running cluster, the instances resume at its next start.
    Exit code 1 if every dead letter is `evidence`, and so none was requeued.

    \b
    stageflow dlq requeue ORDER-17 ORDER-18
    stageflow dlq requeue --queue stageflow.orders.stage1
    stageflow dlq requeue --all
    """
    from stageflow_actors.runtime.client.attach import attach

    _check_choice(letters, queue, everything)
    done = refused = 0
    with attach(data, write=True) as attached:
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
@click.option("--all", "everything", is_flag=True, help="All dead letters of all queues.")
@yes_option
@data_option
def purge(letters: tuple[str, ...], queue: str, everything: bool, yes: bool, data: Path) -> None:
    """Delete dead letters and the instances parked with them.

    Each ID is the number of a dead letter, or an instance. Without ID, name a queue with --queue, or pass --all. An
    instance that is parked with a deleted dead letter is deleted too, without a result.

    \b
    stageflow dlq purge 4711 --yes
    stageflow dlq purge --queue stageflow.orders.stage1 --yes
    """
    from stageflow_actors.runtime.client.attach import attach

    _check_choice(letters, queue, everything)
    check_confirmed("delete " + (", ".join(letters) or f"all dead letters{f' of {queue}' if queue else ''}"), yes)
    done = gone = 0
    with attach(data, write=True) as attached:
        for name, ids in _by_queue(attached, letters, queue):
            answer = attached.wait(attached.admin.purge(f"{DLQ_PREFIX}{name}", ids), timeout=60.0)
            done += answer["purged"]
            gone += len(answer["instances"])
    click.echo(f"{pluralize(done, 'dead letter')} deleted, {pluralize(gone, 'instance')} with them", err=True)


def _check_choice(letters: tuple[str, ...], queue: str, everything: bool) -> None:
    if not letters and not queue and not everything:
        raise click.UsageError("name dead letters by number or instance, or pass --queue NAME or --all")
    if everything and (letters or queue):
        raise click.UsageError("--all excludes numbers, instances and --queue")


def _queues(attached: Attached, queue: str) -> list[tuple[str, int]]:
    """Return the queues with dead letters and their numbers, or only that of `queue`."""
    name = queue.removeprefix(DLQ_PREFIX)
    queues = attached.wait(attached.admin.stats(name))["queues"]
    if name and not any(each["name"] == name for each in queues):
        raise click.ClickException(f"no queue is named {name!r}; `stageflow queue list` lists them all")
    return [(each["name"], each["dead"]) for each in queues if each["dead"] and name in ("", each["name"])]


def _letters(attached: Attached, queue: str) -> Iterator[dict[str, Any]]:
    for name, dead in _queues(attached, queue):
        for offset in range(0, dead, PAGE):
            yield from attached.wait(attached.admin.peek(f"{DLQ_PREFIX}{name}", offset, PAGE))


def _find(attached: Attached, letters: tuple[str, ...], queue: str) -> list[dict[str, Any]]:
    wanted = set(letters)
    found = [each for each in _letters(attached, queue) if each["group"] in wanted or str(each["id"]) in wanted]
    missing = wanted - {each["group"] for each in found} - {str(each["id"]) for each in found}
    if missing:
        raise click.ClickException(
            f"no dead letter has the number or the instance {min(missing)!r}; `stageflow dlq list` lists them all"
        )
    return found


def _by_queue(attached: Attached, letters: tuple[str, ...], queue: str) -> list[tuple[str, list[int]]]:
    """Return the queues with the numbers of the chosen dead letters; no numbers stand for all of a queue."""
    if not letters:
        return [(name, []) for name, _ in _queues(attached, queue)]
    by_queue: defaultdict[str, list[int]] = defaultdict(list)
    for letter in _find(attached, letters, queue):
        by_queue[letter["queue"]].append(letter["id"])
    return list(by_queue.items())


def _plain_stage(stage: Any) -> dict[str, Any]:
    return {"stage_id": stage.stage_id, "status": stage.status.value, "attempts": stage.attempts, "error": stage.error}
