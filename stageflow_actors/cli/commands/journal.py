"""`stageflow journal`: verify, measure, compact and repair the journal of a cluster, running or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.options import check_confirmed, data_option, output_option, yes_option
from stageflow_actors.cli.output import Column, count, emit, print_facts, print_json, size
from stageflow_actors.core.plural import pluralize

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

MAX_NAMED = 10
"""Instances named in one line; a file lists all of them."""


@click.group()
def journal() -> None:
    """Verify, measure, compact and repair the journal.

    The journal is the log on disk from which the broker recovers. The commands work on a running cluster and on a data
    directory at rest; only `repair` needs it at rest.

    \b
    stageflow journal verify
    stageflow journal stats --output json
    """


@journal.command()
@data_option
@output_option
def verify(data: Path, output: str) -> int:
    """Check the whole journal for damage.

    Prints file and offset (bytes) of each damaged place, and exits with 1 if there is one. A torn end is not damage: a
    crash leaves it, nothing in it was acknowledged, and the next start removes it.

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
    if not any(found.damage for found in findings) and (unread := _undecodable(directory)) is not None:
        rows.append({"file": unread.file, "offset": unread.offset, "kind": "damage", "reason": unread.reason})
        findings.append(Finding(unread.file or "", unread.offset or 0, unread.reason or str(unread), damage=True))
    damaged = [found for found in findings if found.damage]
    if output != "table":
        emit(rows, FINDINGS, output)
    else:
        for found in findings:
            word = "damaged" if found.damage else "torn end (the next start removes it)"
            click.echo(f"{found.file} at offset {found.offset}: {word}: {found.reason}", err=found.damage)
        if not damaged:
            segments = sorted(directory.glob("*.journal"))
            click.echo(f"ok: {pluralize(len(segments), 'segment')} in {directory}")
    if damaged:
        click.echo(
            f"{pluralize(len(damaged), 'damaged place')}: restore the directory from a backup, or "
            "discard the data behind the first one with `stageflow journal repair`",
            err=True,
        )
    return 1 if damaged else 0


@journal.command()
@data_option
@output_option
def stats(data: Path, output: str) -> None:
    """Show the contents of the journal in figures.

    Counts the records on disk, without the broker: segments, kinds of records, and how often each transition of each
    instance was accepted (once, if no guarantee was broken). Records of deleted segments are not counted.

    \b
    stageflow journal stats
    stageflow journal stats --output json | jq .settlements
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
                "kinds": dict(accounts.record_kinds),
                "live_messages": accounts.live_messages,
                "live_instances": accounts.live_groups,
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
            "records": ", ".join(f"{count(number)} {kind}" for kind, number in accounts.record_kinds.most_common()),
            "live": f"{pluralize(accounts.live_messages, 'message')} of {pluralize(accounts.live_groups, 'instance')}",
            "transitions": f"{count(sum(row['count'] for row in stages))} of stages, "
            f"{count(sum(row['count'] for row in compensations))} of compensations, "
            f"of {pluralize(len({row['instance'] for row in (*stages, *compensations)}), 'instance')}",
            "unnamed": f"{pluralize(accounts.unnamed, 'settlement')} of messages in deleted segments"
            if accounts.unnamed
            else "",
            "accepted twice": f"{count(len(twice))}, such as {twice[0]}" if twice else "none",
        }
    )


@journal.command()
@data_option
def compact(data: Path) -> None:
    """Compact the journal: rewrite live records, delete old segments.

    Works while the cluster runs. The broker compacts automatically when most of the journal is dead; this command
    compacts now, even if little disk space is gained.

    \b
    stageflow journal compact --data /var/lib/orders
    """
    import time

    from stageflow_actors.runtime.client.attach import attach

    with attach(data, write=True) as attached:
        directory = attached.data_dir.journal
        before = _used(directory)
        unfinished = attached.wait(attached.admin.compact(True))
        while unfinished:
            time.sleep(0.02)
            unfinished = attached.wait(attached.admin.compact(False))
        after = _used(directory)
    then, now = (f"{pluralize(number, 'segment')}, {size(taken)}" for number, taken in (before, after))
    click.echo(f"{then} before; {now} now", err=True)


def _undecodable(directory: Path) -> JournalCorrupt | None:
    """Return the first record that cannot be decoded in an undamaged batch; None without one."""
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
@yes_option
@data_option
def repair(yes: bool, data: Path) -> int:
    """Repair a damaged journal: keep the data before the damage.

    Discards the data from the first damaged place on. Copies each changed file first, and prints the instances that
    lose data, as far as they can be read. No cluster may run on the directory. Exit code 1 if no cluster can start on
    the repaired journal.

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
        click.echo("no damage found; nothing was changed")
        _print_lists(earlier)
        return 0
    check_confirmed("copy the changed files and discard the data from the first damage on", yes)
    report = mend(directory, names_in=groups_in, possible_names_in=possible_groups_in)
    if not report.copies:
        click.echo("no damage found any more; nothing was changed")
        return 0
    copies = report.copies[0].parent
    click.echo(f"{report.file} at offset {report.offset}: {report.reason}; the changed files were copied to {copies}")
    if report.unreadable:
        click.echo(f"{size(report.unreadable)} could not be read from the disk; the copies hold zeros in their place")
    for lost in report.lost[:MAX_NAMED]:
        click.echo(f"discarded ({'a torn end' if lost.is_torn else 'damaged'}): {lost.describe()}")
    if len(report.lost) > MAX_NAMED:
        click.echo(f"and {len(report.lost) - MAX_NAMED:,} more damaged places")
    if any(lost.whole_file for lost in report.lost):
        click.echo("the former contents of such a file cannot be determined")
    if report.batches:
        batches = pluralize(report.batches, "whole batch", "whole batches")
        click.echo(f"discarded: {batches} behind it, {pluralize(report.records, 'record')} of {_named(report.names)}")
    elif report.lost:
        click.echo("no whole batch was discarded")
    else:
        click.echo("nothing was discarded")
    if report.possible_names:
        click.echo(f"possibly in the damaged bytes, as far as they can be read: {_named(report.possible_names)}")
    if report.list_file is not None:
        ids = " with all ids; their data before the damage is kept" if report.names or report.possible_names else ""
        click.echo(f"the discarded data is listed in {report.list_file}{ids}")
    _print_lists(earlier)
    return _print_next_step(data_dir, report.has_segments)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        shown += f" and {len(names) - MAX_NAMED:,} more"
    return pluralize(len(names), "instance") + (f": {shown}" if shown else "")


def _print_next_step(data_dir: DataDir, left: bool) -> int:
    """Print the next step if the repaired journal does not belong to the history: no cluster starts on these."""
    from stageflow_actors.runtime.node.history_consistency import HISTORY_FACT
    from stageflow_brokers.offline.settlements import load_engine

    if not data_dir.history.exists():
        if not left:
            click.echo("the journal is empty and there is no history: the next start begins with an empty cluster")
        return 0
    if left and HISTORY_FACT in load_engine(data_dir.journal).machine.state.facts:
        return 0
    lost = "no longer belongs to the history" if left else "is empty, and there is a history"
    click.echo(
        f"the journal {lost}: a start on {data_dir.path} is refused, because the live instances are lost. "
        "Restore journal and history from one backup; or begin with an empty cluster: move the directory away, or "
        "start with `stageflow run --fresh`, which renames it",
        err=True,
    )
    return 1


def _print_lists(earlier: list[Path]) -> None:
    """Print the lists of earlier repairs: an interrupted repair has listed a part of the discarded data."""
    for listed in earlier:
        click.echo(f"the data that an earlier repair discarded is listed in {listed}")


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
