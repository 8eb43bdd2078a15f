"""`stageflow queue`: what waits where, and stopping and starting deliveries."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.options import confirmed, data_option, output_option
from stageflow_actors.cli.output import Column, clip, count, emit, plain, size, span
from stageflow_actors.core.plural import counted

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.attach import Attached

__all__ = ["queue"]

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
    """Queues: ready, leased, delayed and dead messages, actors, rates.

    \b
    stageflow queue list
    stageflow queue watch --prefix stageflow.orders
    stageflow queue peek stageflow.orders.stage0
    stageflow queue pause stageflow.orders.stage1
    """


@queue.command("list")
@click.option("--prefix", default="", metavar="P", help="Only queues whose name begins like this.")
@data_option
@output_option
def list_queues(prefix: str, data: Path, output: str) -> None:
    """All queues, one a line.

    \b
    ready    may be delivered            leased   with an actor, in work or next
    delayed  waits for its time          dead     dead letters: see `stageflow dlq list`
    oldest   how long the first ready one has waited
    breaker  open: its stage kept failing, and its messages wait; half-open: one of them is tried

    \b
    stageflow queue list
    stageflow queue list --prefix stageflow.orders --output json
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        rows = _rows(attached, prefix)
        emit(rows, COLUMNS, output, empty=_none(prefix))


@queue.command("stats")
@click.argument("name", required=False, default="")
@click.option("--prefix", default="", metavar="P", help="Only queues whose name begins like this.")
@click.option(
    "--seconds", default=1.0, show_default=True, type=click.FloatRange(0.1, 3600), help="How long rates are measured."
)
@data_option
@output_option
def stats_of_queues(name: str, prefix: str, seconds: float, data: Path, output: str) -> None:
    """Queues with their rate: messages settled a second, measured while you wait.

    \b
    stageflow queue stats stageflow.orders.stage0 --seconds 5
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        rows = _rates(attached, name or prefix, seconds if attached.live else 0.0)
    if name:
        rows = [row for row in rows if row["name"] == name]
        if not rows:
            raise click.ClickException(f"no queue is named {name!r}; `stageflow queue list` shows them all")
    columns = (*COLUMNS, Column("delivered", count, right=True), Column("settled", count, right=True), RATE)
    emit(rows, columns, output, empty=_none(prefix))


@queue.command()
@click.argument("name", required=False, default="")
@click.option("--prefix", default="", metavar="P", help="Only queues whose name begins like this.")
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds.")
@click.option("--count", "times", default=0, metavar="N", help="Look N times, then end (0: until Ctrl-C).")
@data_option
@output_option
def watch(name: str, prefix: str, interval: float, times: int, data: Path, output: str) -> None:
    """The list of queues, again and again, until Ctrl-C.

    \b
    stageflow queue watch --prefix stageflow.orders --interval 0.5
    """
    from rich.console import Console
    from rich.live import Live

    from stageflow_actors.cli.output import table
    from stageflow_actors.runtime.client.attach import attach

    columns = (*COLUMNS, RATE)
    looks = range(times) if times else iter(int, 1)
    console = Console()
    with attach(data) as attached:
        if output != "table" or not console.is_terminal:
            for _ in looks:
                emit(_rates(attached, name or prefix, interval), columns, output, empty=_none(prefix))
            return
        try:
            with Live(console=console, auto_refresh=False, screen=False) as live:
                for _ in looks:
                    live.update(table(_rates(attached, name or prefix, interval), columns), refresh=True)
        except KeyboardInterrupt:
            pass  # the way to end it


@queue.command()
@click.argument("name")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Most messages shown.")
@click.option("--offset", default=0, type=click.IntRange(0), help="Messages to pass over.")
@data_option
@output_option
def peek(name: str, limit: int, offset: int, data: Path, output: str) -> None:
    """The messages that are ready in queue NAME, next first, with their contexts. Nothing is taken.

    \b
    stageflow queue peek stageflow.orders.stage0 --limit 3 --output json
    """
    from stageflow_actors.cli.message_rows import message_row
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        rows = [message_row(found) for found in attached.wait(attached.admin.peek(name, offset, limit))]
    emit(rows, MESSAGES, output, empty=f"nothing is ready in {name}")


@queue.command()
@click.argument("name")
@data_option
def pause(name: str, data: Path) -> None:
    """Deliver nothing more from queue NAME; what is in work goes on. It stays so over restarts.

    \b
    stageflow queue pause stageflow.orders.stage1
    """
    from stageflow_actors.runtime.client.attach import attach
    from stageflow_actors.runtime.messaging.pauses import pause

    with attach(data, write=True) as attached:
        pause(lambda operation: attached.wait(operation(attached.admin)), name)
    click.echo(f"{name} is paused; `stageflow queue resume {name}` delivers again", err=True)


@queue.command()
@click.argument("name")
@data_option
def resume(name: str, data: Path) -> None:
    """Deliver again from queue NAME.

    \b
    stageflow queue resume stageflow.orders.stage1
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data, write=True) as attached:
        attached.wait(attached.admin.resume(name))
    click.echo(f"{name} is open", err=True)


@queue.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@data_option
def purge(name: str, yes: bool, data: Path) -> None:
    """Throw away what is ready in queue NAME. The instances it belongs to are gone, without a result.

    \b
    stageflow queue purge stageflow.orders.stage0 --yes
    """
    from stageflow_actors.runtime.client.attach import attach

    confirmed(f"throw away all that is ready in {name}", yes)
    with attach(data, write=True) as attached:
        answer = attached.wait(attached.admin.purge(name, []), timeout=60.0)
    click.echo(
        f"{counted(answer['purged'], 'message')} of {counted(len(answer['instances']), 'instance')} thrown away",
        err=True,
    )


def _none(prefix: str) -> str:
    return f"no queue begins with {prefix!r}" if prefix else "no queues yet"


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
        # A broker that was started anew meanwhile counts from nought.
        row["rate"] = max(0, row["settled"] - before.get(row["name"], row["settled"])) / elapsed if seconds else 0.0
    return rows
