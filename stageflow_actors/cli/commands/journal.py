"""`stageflow journal`: is it sound, what is in it, make it open again. It reads the files, cluster or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.options import confirmed, data_option, output_option
from stageflow_actors.cli.output import Column, count, emit, print_facts, print_json, size
from stageflow_actors.core.plural import counted

if TYPE_CHECKING:
    from stageflow_actors.runtime.system.data_dir import DataDir
    from stageflow_brokers.errors import JournalCorrupt
    from stageflow_brokers.offline.settlements import SettlementKey

__all__ = ["journal"]

FINDINGS = (Column("file"), Column("offset", count, right=True), Column("kind"), Column("reason"))

SEGMENTS = (
    Column("file"),
    Column("batches", count, right=True),
    Column("records", count, right=True),
    Column("bytes", size, right=True),
)

NAMED = 10
"""Instances named in one line; all of them are in a file."""


@click.group()
def journal() -> None:
    """The journal of a cluster, running or not.

    \b
    stageflow journal verify
    stageflow journal stats --output json
    """


@journal.command()
@data_option
@output_option
def verify(data: Path, output: str) -> int:
    """Read all of the journal. Exit code 1 if anything in it is damaged, with file and offset of each place.

    A torn end is no damage: a crash leaves it, nothing in it was acknowledged, and the next start cuts it off.

    \b
    stageflow journal verify --data /var/lib/orders
    """
    from stageflow_actors.runtime.client.attach import existing
    from stageflow_brokers.journal.verify import Finding
    from stageflow_brokers.journal.verify import verify as findings_of

    directory = existing(data).journal
    findings = findings_of(directory)
    rows = [
        {
            "file": found.file,
            "offset": found.offset,
            "kind": "damage" if found.damage else "torn end",
            "reason": found.reason,
        }
        for found in findings
    ]
    if not any(found.damage for found in findings) and (unread := _not_understood(directory)) is not None:
        rows.append({"file": unread.file, "offset": unread.offset, "kind": "damage", "reason": unread.reason})
        findings.append(Finding(unread.file or "", unread.offset or 0, unread.reason or str(unread), damage=True))
    damaged = [found for found in findings if found.damage]
    if output != "table":
        emit(rows, FINDINGS, output)
    else:
        for found in findings:
            word = "damaged" if found.damage else "torn end (the next start cuts it off)"
            click.echo(f"{found.file} at offset {found.offset}: {word}: {found.reason}", err=found.damage)
        if not damaged:
            segments = sorted(directory.glob("*.journal"))
            click.echo(f"ok: {counted(len(segments), 'segment')} in {directory}")
    if damaged:
        click.echo(
            f"{counted(len(damaged), 'damaged place')}: restore the directory from a backup, or "
            "give up what lies behind the first with `stageflow journal repair`",
            err=True,
        )
    return 1 if damaged else 0


@journal.command()
@data_option
@output_option
def stats(data: Path, output: str) -> None:
    """What is in the journal, and how often each transition of each instance was accepted (once, if all is well).

    Counted from the records on disk, without asking the broker. Segments that were given back are not in it any more.

    \b
    stageflow journal stats
    stageflow journal stats --output json | jq '.settlements[] | select(.count > 1)'
    """
    from stageflow_actors.runtime.client.attach import existing
    from stageflow_brokers.offline.settlements import count_settlements

    accounts = count_settlements(existing(data).journal)
    segments = [
        {"file": use.file, "batches": use.batches, "records": use.records, "bytes": use.bytes}
        for use in accounts.segments
    ]
    stages = _rows(accounts.settled.items(), compensations=False)
    compensations = _rows(accounts.settled.items(), compensations=True)
    if output == "csv":
        emit(segments, SEGMENTS, output)
        return
    if output == "json":
        print_json(
            {
                "segments": segments,
                "batches": accounts.batches,
                "records": accounts.records,
                "bytes": accounts.bytes,
                "kinds": dict(accounts.kinds),
                "live_messages": accounts.live,
                "live_instances": accounts.groups,
                "unnamed": accounts.unnamed,
                "settlements": stages,
                "compensations": compensations,
            }
        )
        return
    emit(segments, SEGMENTS, output, empty="the journal is empty")
    twice = [row for row in (*stages, *compensations) if row["count"] > 1]
    click.echo()
    print_facts(
        {
            "records": ", ".join(f"{count(number)} {kind}" for kind, number in accounts.kinds.most_common()),
            "live": f"{counted(accounts.live, 'message')} of {counted(accounts.groups, 'instance')}",
            "transitions": f"{count(sum(row['count'] for row in stages))} of stages, "
            f"{count(sum(row['count'] for row in compensations))} of compensations, "
            f"of {counted(len({row['instance'] for row in (*stages, *compensations)}), 'instance')}",
            "unnamed": f"{counted(accounts.unnamed, 'settlement')} of messages given back with their segment"
            if accounts.unnamed
            else "",
            "accepted twice": f"{count(len(twice))}, such as {twice[0]}" if twice else "none",
        }
    )


@journal.command()
@data_option
def compact(data: Path) -> None:
    """Write what is alive anew and give all that was there before back, also while the cluster runs.

    The broker does so by itself when most of the journal is dead; this does it now, whatever there is to win.

    \b
    stageflow journal compact --data /var/lib/orders
    """
    import time

    from stageflow_actors.runtime.client.attach import attach

    with attach(data, write=True) as attached:
        directory = attached.data_dir.journal
        before = _used(directory)
        going_on = attached.wait(attached.admin.compact(True))
        while going_on:
            time.sleep(0.02)
            going_on = attached.wait(attached.admin.compact(False))
        after = _used(directory)
    then, now = (f"{counted(number, 'segment')}, {size(taken)}" for number, taken in (before, after))
    click.echo(f"{then} before; {now} now", err=True)


def _not_understood(directory: Path) -> JournalCorrupt | None:
    """What is wrong with what the batches say, where they are whole."""
    from stageflow_brokers.errors import JournalCorrupt
    from stageflow_brokers.offline.settlements import count_settlements

    try:
        count_settlements(directory)
    except JournalCorrupt as error:
        return error
    return None


def _used(directory: Path) -> tuple[int, int]:
    files = list(directory.glob("*.journal"))
    return len(files), sum(file.stat().st_blocks * 512 for file in files if file.exists())


@journal.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@data_option
def repair(yes: bool, data: Path) -> int:
    """Make a damaged journal one that opens: what comes before the damage is kept, what follows it is given up.

    Everything touched is copied aside first, and it is said which instances lose something; of those in the damaged
    bytes themselves only what can still be read. Nothing may run on the directory meanwhile. Exit code 1 if no cluster
    starts on what is left.

    \b
    stageflow journal repair --data /var/lib/orders
    """
    from stageflow_actors.runtime.client.attach import existing
    from stageflow_brokers.journal.repair import LOST_NAMES_PATTERN
    from stageflow_brokers.journal.repair import repair as mend
    from stageflow_brokers.journal.verify import verify as findings_of
    from stageflow_brokers.offline.groups import groups_in, possible_groups_in

    data_dir = existing(data)
    directory = data_dir.journal
    earlier = sorted(directory.glob(f"*/{LOST_NAMES_PATTERN}"))
    if not findings_of(directory):
        click.echo("nothing is wrong; nothing was changed")
        _tell_of(earlier)
        return 0
    confirmed("keep what is before the damage, copy the rest aside and give it up", yes)
    report = mend(directory, names=groups_in, perhaps=possible_groups_in)
    if not report.copies:
        click.echo("nothing is wrong any more; nothing was changed")
        return 0
    copies = report.copies[0].parent
    click.echo(f"{report.file} at offset {report.offset}: {report.reason}; copies of what was touched are in {copies}")
    if report.unreadable:
        click.echo(f"{size(report.unreadable)} of it could not be read from the disk, and are zeros in the copies")
    for lost in report.lost[:NAMED]:
        click.echo(f"{'a torn end' if lost.torn else 'damaged'}, and given up: {lost.told()}")
    if len(report.lost) > NAMED:
        click.echo(f"and {len(report.lost) - NAMED:,} more damaged places")
    if any(lost.whole for lost in report.lost):
        click.echo("what such a file held cannot be known")
    if report.batches:
        batches = counted(report.batches, "whole batch", "whole batches")
        click.echo(f"given up: {batches} behind it, {counted(report.records, 'record')} of {_named(report.names)}")
    elif report.lost:
        click.echo("no whole batch was given up")
    else:
        click.echo("nothing was given up")
    if report.perhaps:
        click.echo(f"possibly in what is damaged, as far as it can be read: {_named(report.perhaps)}")
    if report.listed is not None:
        ids = ", with all ids; what they did before the damage is kept" if report.names or report.perhaps else ""
        click.echo(f"it is listed in {report.listed}{ids}")
    _tell_of(earlier)
    return _what_next(data_dir, report.left)


def _named(names: Sequence[str]) -> str:
    told = ", ".join(names[:NAMED])
    if len(names) > NAMED:
        told += f" and {len(names) - NAMED:,} more"
    return counted(len(names), "instance") + (f": {told}" if told else "")


def _what_next(data_dir: DataDir, left: bool) -> int:
    """Say what to do where the journal, as it is now, does not know the history: no cluster starts on these."""
    from stageflow_actors.runtime.node.history_consistency import HISTORY_FACT
    from stageflow_brokers.offline.settlements import load_engine

    if not data_dir.history.exists():
        if not left:
            click.echo("nothing is left of the journal, and no history is there: the next start begins anew")
        return 0
    if left and HISTORY_FACT in load_engine(data_dir.journal).machine.state.facts:
        return 0
    lost = "does not know the history any more" if left else "has nothing left, while a history is there"
    click.echo(
        f"the journal {lost}: a start on {data_dir.path} is refused, for the instances that were live are lost. "
        "Restore journal and history from one backup; or begin anew: move the directory away, or start with "
        "`stageflow run --fresh`, which renames it",
        err=True,
    )
    return 1


def _tell_of(earlier: list[Path]) -> None:
    """A repair that was interrupted and is run again gives up the rest; its first list has the others."""
    for listed in earlier:
        click.echo(f"what an earlier repair gave up is listed in {listed}")


def _rows(settled: Iterable[tuple[SettlementKey, int]], *, compensations: bool) -> list[dict[str, Any]]:
    from stageflow_actors.core.plan import COMPENSATE

    found: Counter[tuple[str, int, str]] = Counter()
    for (instance, epoch, label), times in settled:
        if not label or label.startswith(":") or label.startswith(COMPENSATE) != compensations:
            continue
        found[instance, epoch, label.removeprefix(COMPENSATE)] += times
    return [
        {"instance": instance, "epoch": epoch, "stage": stage, "count": times}
        for (instance, epoch, stage), times in found.items()
    ]
