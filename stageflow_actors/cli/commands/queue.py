"""`stageflow queue`: list, watch, pause, resume and purge queues."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stageflow_actors.cli.options import check_confirmed, data_option, output_option, yes_option
from stageflow_actors.cli.output import Column, clip, count, emit, plain, size, span
from stageflow_actors.core.plural import pluralize

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.attach import Attached

__all__ = ["queue"]

F = TypeVar("F", bound=Callable[..., Any])

COLUMNS = (
    Column("name"),
    Column("ready", count, right=True),
    Column("leased", count, right=True),
    Column("delayed", count, right=True),
    Column("dead", count, right=True),
    Column("oldest", lambda value: span(value or None), right=True),
    Column("actors", count, right=True),
    Column("busy", count, right=True),
    Column("state"),
    Column("breaker"),
)
REASONS = (Column("reason"), Column("next_start_at"))
RATE = Column("rate", lambda value: f"{value:,.1f}/s", right=True)

MESSAGES = (
    Column("id", plain, right=True),
    Column("instance"),
    Column("stage"),
    Column("age", span, right=True),
    Column("attempts", count, right=True),
    Column("deaths", count, right=True),
    Column("size", size, right=True),
    Column("context", clip(60)),
)


@click.group()
def queue() -> None:
    """List, watch, pause, resume and purge queues.

    \b
    stageflow queue list
    stageflow queue watch --prefix stageflow.orders
    stageflow queue peek stageflow.orders.stage0
    stageflow queue pause stageflow.orders.stage1
    """


def _prefix_option(command: F) -> F:
    help_text = "Only queues whose name begins with P.  [default: all queues]"
    return click.option("--prefix", default="", metavar="P", help=help_text)(command)


@queue.command("list")
@_prefix_option
@data_option
@output_option
def list_queues(prefix: str, data: Path, output: str) -> None:
    """List queues with their messages and actors.

    \b
    ready    messages that may be delivered
    leased   messages that an actor holds: in work, or next
    delayed  messages that wait for their time
    dead     dead letters: see `stageflow dlq list`
    oldest   waiting time of the first ready message
    busy     actors with a message in work
    state    open; paused; failing: its workers cannot start, and are
             tried again; closed: until its workers have registered
    breaker  open: the stage kept failing, and its messages wait;
             half-open: one message is tried

    \b
    stageflow queue list
    stageflow queue list --prefix stageflow.orders --output json
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        rows = _rows(attached, prefix)
        emit(rows, COLUMNS if output == "table" else (*COLUMNS, *REASONS), output, empty=_no_queues(prefix))
    if output == "table":
        _print_reasons(rows)


@queue.command("stats")
@click.argument("name", required=False, default="")
@_prefix_option
@click.option(
    "--seconds", default=1.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds to measure rates over."
)
@data_option
@output_option
def stats_of_queues(name: str, prefix: str, seconds: float, data: Path, output: str) -> None:
    """Show queues with their rates.

    The rate is the number of messages settled per second, measured for --seconds. NAME is a queue; without it, all
    queues are shown.

    \b
    stageflow queue stats stageflow.orders.stage0 --seconds 5
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        if name:
            attached.check_queue(name)
        rows = _rates(attached, name or prefix, seconds if attached.live else 0.0)
    if name:
        rows = [row for row in rows if row["name"] == name]
    columns = (*COLUMNS, Column("delivered", count, right=True), Column("settled", count, right=True), RATE)
    emit(rows, columns, output, empty=_no_queues(prefix))


@queue.command()
@click.argument("name", required=False, default="")
@_prefix_option
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds between two lists."
)
@click.option(
    "--count", "times", default=0, metavar="N", help="Number of lists to print; 0: until Ctrl-C.  [default: 0]"
)
@data_option
@output_option
def watch(name: str, prefix: str, interval: float, times: int, data: Path, output: str) -> None:
    """Refresh the list of queues until Ctrl-C.

    On a terminal the list is redrawn in place; otherwise each list is printed below the last one. NAME is the beginning
    of the names to show, as --prefix.

    \b
    stageflow queue watch --prefix stageflow.orders --interval 0.5
    """
    from rich.console import Console
    from rich.live import Live

    from stageflow_actors.cli.output import table
    from stageflow_actors.runtime.client.attach import attach

    columns = (*COLUMNS, RATE)
    rounds = range(times) if times else iter(int, 1)
    console = Console()
    with attach(data) as attached:
        if output != "table" or not console.is_terminal:
            for _ in rounds:
                emit(_rates(attached, name or prefix, interval), columns, output, empty=_no_queues(prefix))
            return
        try:
            with Live(console=console, auto_refresh=False, screen=False) as live:
                for _ in rounds:
                    live.update(table(_rates(attached, name or prefix, interval), columns), refresh=True)
        except KeyboardInterrupt:
            pass  # the way to end it


@queue.command()
@click.argument("name")
@click.option(
    "--limit", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Maximum number of messages."
)
@click.option("--offset", default=0, show_default=True, type=click.IntRange(0), help="Number of messages to skip.")
@data_option
@output_option
def peek(name: str, limit: int, offset: int, data: Path, output: str) -> None:
    """Show the ready messages of a queue.

    Prints the messages of queue NAME in order of delivery, with their contexts. They stay in the queue.

    \b
    stageflow queue peek stageflow.orders.stage0 --limit 3 --output json
    """
    from stageflow_actors.cli.message_rows import message_row
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        attached.check_queue(name)
        rows = [message_row(found) for found in attached.wait(attached.admin.peek(name, offset, limit))]
    emit(rows, MESSAGES, output, empty=f"no message is ready in {name}")


@queue.command()
@click.argument("name")
@data_option
def pause(name: str, data: Path) -> None:
    """Pause a queue: deliver no more messages.

    Messages of queue NAME that are in work are finished. The queue stays paused over restarts, until `stageflow queue
    resume`.

    \b
    stageflow queue pause stageflow.orders.stage1
    """
    from stageflow_actors.runtime.client.attach import attach
    from stageflow_actors.runtime.messaging.pauses import pause

    with attach(data, write=True) as attached:
        attached.check_queue(name)
        pause(lambda operation: attached.wait(operation(attached.admin)), name)
    click.echo(f"{name} is paused; `stageflow queue resume {name}` delivers again", err=True)


@queue.command()
@click.argument("name")
@data_option
def resume(name: str, data: Path) -> None:
    """Resume a paused queue: deliver its messages.

    NAME is the queue.

    \b
    stageflow queue resume stageflow.orders.stage1
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data, write=True) as attached:
        attached.check_queue(name)
        attached.wait(attached.admin.resume(name))
    click.echo(f"{name} is open", err=True)


@queue.command()
@click.argument("name")
@yes_option
@data_option
def purge(name: str, yes: bool, data: Path) -> None:
    """Delete the ready messages of a queue and their instances.

    The instances of the messages of queue NAME are deleted too, without a result.

    \b
    stageflow queue purge stageflow.orders.stage0 --yes
    """
    from stageflow_actors.runtime.client.attach import attach

    check_confirmed(f"delete all ready messages of {name}", yes)
    with attach(data, write=True) as attached:
        attached.check_queue(name)
        answer = attached.wait(attached.admin.purge(name, []), timeout=60.0)
    click.echo(
        f"{pluralize(answer['purged'], 'message')} of {pluralize(len(answer['instances']), 'instance')} deleted",
        err=True,
    )


def _print_reasons(rows: list[dict[str, Any]]) -> None:
    """Print below the table why workers cannot start, which its columns have no room for."""
    for row in rows:
        if row["reason"]:
            wait = row["next_start_at"] - time.time()
            then = f"; next try in {wait:.1f} s" if wait > 0 else ""
            cannot = "its workers cannot start: " if row["state"] == "paused" else ""
            click.echo(f"{row['name']} is {row['state']}: {cannot}{row['reason']}{then}")


def _no_queues(prefix: str) -> str:
    return f"no queue has a name that begins with {prefix!r}" if prefix else "no queues yet"


def _rows(attached: Attached, prefix: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{**queue} for queue in attached.wait(attached.admin.stats(prefix))["queues"]]
    for row in rows:
        row["actors"] = row.pop("consumers")
    return rows


def _rates(attached: Attached, prefix: str, seconds: float) -> list[dict[str, Any]]:
    before = {row["name"]: row["settled"] for row in _rows(attached, prefix)} if seconds else {}
    began = time.monotonic()
    if seconds:
        time.sleep(seconds)
    rows = _rows(attached, prefix)
    elapsed = max(time.monotonic() - began, 1e-6)
    for row in rows:
        # A broker that was restarted in the interval counts from zero.
        row["rate"] = max(0, row["settled"] - before.get(row["name"], row["settled"])) / elapsed if seconds else 0.0
    return rows
