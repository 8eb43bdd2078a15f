"""`stageflow history`: prune and compact the store of finished instances."""

from __future__ import annotations

import time
from pathlib import Path

import click

from stageflow_actors.cli.options import check_confirmed, data_option, yes_option
from stageflow_actors.cli.output import size, when
from stageflow_actors.core.plural import pluralize

__all__ = ["history"]

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _Age(click.ParamType[float, object]):
    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        try:
            seconds = float(text[:-1]) * UNITS[text[-1:]]
        except (KeyError, ValueError):
            seconds = -1.0
        if not 0 <= seconds < 1e11:
            self.fail(f"{text!r} is not an age; write 90d, 12h, 30m, 45s or 2w", param, ctx)
        return seconds


@click.group()
def history() -> None:
    """Prune and compact the store of finished instances.

    \b
    stageflow history prune --older-than 90d
    stageflow history vacuum
    """


@history.command()
@click.option(
    "--older-than",
    required=True,
    type=_Age(),
    metavar="AGE",
    help="Age with its unit (s, m, h, d, w), such as 90d, 12h or 2w.",
)
@yes_option
@data_option
def prune(older_than: float, yes: bool, data: Path) -> None:
    """Delete old finished instances and their results.

    Deletes instances that finished longer ago than AGE. Their ids are free for new instances then. `stageflow history
    vacuum` returns the disk space.

    \b
    stageflow history prune --older-than 90d --yes
    """
    from stageflow_actors.history import HistoryWriter
    from stageflow_actors.runtime.client.attach import existing

    path = existing(data).history
    before = time.time() - older_than
    check_confirmed(f"delete all instances that finished before {when(before)}", yes)
    with HistoryWriter.open(path, create=False) as writer:
        pruned = writer.prune(before)
    click.echo(f"{pluralize(pruned, 'instance')} deleted; `stageflow history vacuum` returns the disk space", err=True)


@history.command()
@data_option
def vacuum(data: Path) -> None:
    """Rewrite the store without unused space.

    While it runs it needs free disk space of the size of the store.

    \b
    stageflow history vacuum
    """
    from stageflow_actors.history import HistoryWriter
    from stageflow_actors.runtime.client.attach import existing

    path = existing(data).history
    with HistoryWriter.open(path, create=False) as writer:
        before = path.stat().st_size
        writer.vacuum()
    click.echo(f"{size(before)} before, {size(path.stat().st_size)} now", err=True)
