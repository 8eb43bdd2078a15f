"""`stageflow doctor`: check the invariants of a data directory and of the cluster that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stageflow_actors.cli.options import data_option, json_option
from stageflow_actors.core.plural import pluralize

if TYPE_CHECKING:
    from stageflow_actors.core.invariants import Finding
    from stageflow_actors.runtime.system.data_dir import DataDir

__all__ = ["doctor"]

COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


@click.command()
@json_option
@data_option
def doctor(output: str, data: Path) -> int:
    """Check the invariants of a cluster, running or not.

    Prints a line for each finding: the place, the fault and the fix. Exit code 1 if a finding is an error. Warnings and
    notices (paused queues, dead letters, open breakers) break no invariant. The command changes nothing and may run at
    any time.

    \b
    Each live instance has exactly one message, gather or timer.
    No dead worker holds a message.
    Journal and history are undamaged and agree on each outcome.
    Lock, sockets, disk and clock are in order.

    The journal forgets instances that ended long ago; for those only the history is checked.

    \b
    stageflow doctor
    stageflow doctor --data /var/lib/orders --output json
    """
    from stageflow_actors.cli.output import print_json
    from stageflow_actors.core.invariants import ERROR, INFO
    from stageflow_actors.diagnostics.doctor import run_checks
    from stageflow_actors.runtime.system.data_dir import DataDir

    directory = DataDir(data, create=False)
    journal = _check_journal(directory)
    report = run_checks(directory, readable=all(finding.severity == INFO for finding in journal))
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
        _print_finding(finding)
    checked = report.checked
    compared = checked["ended_in_journal"]
    counts = f"{pluralize(checked['instances'], 'live instance')}, {pluralize(checked['messages'], 'message')}, "
    counts += f"{checked['ended']:,} ended ({compared:,} of them still in the journal)"
    state = "running" if report.live else "at rest"
    verdict = pluralize(errors, "error") if errors else "the invariants hold"
    click.echo(f"{verdict}: {counts}, {directory.path}, {state}")
    return 1 if errors else 0


def _print_finding(finding: Finding) -> None:
    severity = click.style(f"{finding.severity:<8}", fg=COLOURS[finding.severity], bold=True)
    click.echo(f"{severity} {finding.check}: {finding.where}: {finding.what}")
    if finding.advice:
        click.echo(f"         → {finding.advice}")


def _check_journal(data: DataDir) -> list[Finding]:
    """Return the findings in the journal: the first damaged places, and the torn end that a crash leaves."""
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
            advice = "restore a backup, or discard the data behind the first damage: stageflow journal repair"
            findings.append(Finding(ERROR, "journal", where, f"damaged: {one.reason}", advice))
        elif one.cut:
            what = f"the end is missing: {one.reason}. No crash causes this; the missing data may be acknowledged"
            advice = "restore a backup; the next start continues without the missing data"
            findings.append(Finding(WARNING, "journal", where, what, advice))
        else:
            what = f"a torn end: {one.reason}; a crash leaves it, and nothing in it was acknowledged"
            findings.append(Finding(INFO, "journal", where, what, "nothing: the next start cuts it off"))
    return findings
