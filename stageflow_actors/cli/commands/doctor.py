"""`stageflow doctor`: whether the invariants hold in a data directory and in the cluster that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stageflow_actors.cli.options import data_option
from stageflow_actors.core.plural import counted

if TYPE_CHECKING:
    from stageflow_actors.core.invariants import Finding
    from stageflow_actors.runtime.system.data_dir import DataDir

__all__ = ["doctor"]

COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


@click.command()
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@data_option
def doctor(output: str, data: Path) -> int:
    """Whether the invariants hold, in a running cluster or a directory at rest: exit code 0, or 1 and what is wrong.

    Each live instance has exactly one message, gather or timer that carries it on; no message is held by a worker that
    does not live; journal and history are sound and agree; how each instance ended is told without contradiction; lock,
    sockets, disk and clock are as they should be. For each finding: where, what, and what to do. It changes nothing,
    and may run at any time. Only errors break an invariant; warnings and what is merely told (paused queues, dead
    letters, open breakers) do not. Of what ended long ago the journal tells no more, and only the history is read.

    \b
    stageflow doctor
    stageflow doctor --data /var/lib/orders --output json
    """
    from stageflow_actors.cli.output import print_json
    from stageflow_actors.core.invariants import ERROR, INFO
    from stageflow_actors.diagnostics.doctor import check_up
    from stageflow_actors.runtime.system.data_dir import DataDir

    directory = DataDir(data, create=False)
    journal = _of_journal(directory)
    report = check_up(directory, readable=all(finding.severity == INFO for finding in journal))
    findings = [*(one for one in journal if one.severity == ERROR), *report.findings]
    findings += [one for one in journal if one.severity != ERROR]
    errors = sum(finding.severity == ERROR for finding in findings)
    if output == "json":
        print_json(
            {
                "sound": not errors,
                "cluster": "running" if report.live else "at rest",
                "data": str(directory.path),
                "checked": report.checked,
                "findings": [finding._asdict() for finding in findings],
            }
        )
        return 1 if errors else 0
    for finding in findings:
        _tell(finding)
    checked = report.checked
    compared = checked["ended_in_journal"]
    looked = f"{counted(checked['instances'], 'live instance')}, {counted(checked['messages'], 'message')}, "
    looked += f"{checked['ended']:,} ended (the journal still tells of {compared:,} of them)"
    state = "running" if report.live else "at rest"
    verdict = counted(errors, "error") if errors else "the invariants hold"
    click.echo(f"{verdict}: {looked}, {directory.path}, {state}")
    return 1 if errors else 0


def _tell(finding: Finding) -> None:
    severity = click.style(f"{finding.severity:<8}", fg=COLOURS[finding.severity], bold=True)
    click.echo(f"{severity} {finding.check}: {finding.where}: {finding.what}")
    if finding.advice:
        click.echo(f"         → {finding.advice}")


def _of_journal(data: DataDir) -> list[Finding]:
    """What verifying says: of damage the first places, and the torn end that a crash has left."""
    from stageflow_actors.core.invariants import ERROR, INFO, WARNING, Finding
    from stageflow_brokers.errors import JournalError
    from stageflow_brokers.journal.verify import verify

    if not any(data.journal.glob("*.journal")):
        return []
    try:
        found = verify(data.journal)
    except JournalError as error:
        return [Finding(ERROR, "journal", str(data.journal), str(error))]
    findings = []
    for one in found[:20]:
        where = f"{data.journal / one.file} at offset {one.offset}"
        if one.damage:
            advice = "restore a backup, or give up what lies behind the first damage: stageflow journal repair"
            findings.append(Finding(ERROR, "journal", where, f"damaged: {one.reason}", advice))
        elif one.cut:
            what = f"the end is cut off: {one.reason}. No crash does that, and it may have been acknowledged"
            advice = "restore a backup; the next start goes on with what is left, and forgets what is not"
            findings.append(Finding(WARNING, "journal", where, what, advice))
        else:
            what = f"a torn end: {one.reason}; a crash has left it, and nothing in it was acknowledged"
            findings.append(Finding(INFO, "journal", where, what, "nothing: the next start cuts it off"))
    return findings
