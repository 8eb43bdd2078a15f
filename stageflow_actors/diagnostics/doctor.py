"""`stageflow doctor`: checks the invariants of a data directory and of its cluster, running or not.

The broker is asked for one consistent audit; without a running cluster, its journal is read into a broker in this
process. The history is read after the audit, so that it contains every instance that had ended by then.

This module must not change a file. Only SQLite creates the index (`-shm`) of a history whose write-ahead log is not
empty.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

from msgspec import Struct

from stageflow_actors.core.invariants import (
    ERROR,
    INFO,
    WARNING,
    Finding,
    broker_findings,
    consumed_queues,
    instance_findings,
    lease_findings,
    queue_findings,
)
from stageflow_actors.core.outcome_check import check_outcome
from stageflow_actors.core.plan import FINISHED, Naming
from stageflow_actors.diagnostics.environment import check_environment
from stageflow_actors.errors import StageFlowError
from stageflow_actors.history import HistoryError, HistoryReader
from stageflow_actors.history.schema import in_wal_mode
from stageflow_actors.runtime.client.attach import Attached, attach, live_address
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, read_manifest
from stageflow_actors.runtime.node.history_consistency import HISTORY_FACT
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_actors.runtime.system.processes import start_ticks
from stageflow_brokers.errors import BrokerError, JournalCorrupt
from stageflow_brokers.offline.settlements import EndedGroups, ended_groups

__all__ = ["DoctorReport", "run_checks"]

FAULT_CONFIRM_SECONDS = 3.0
"""Time that a fault in a running cluster must last to be reported: an exit of a worker is noticed after a moment."""
RECHECK_INTERVAL_SECONDS = 0.2
CLOCK_TOLERANCE_SECONDS = 60.0
"""Tolerated change of a clock, and time that the outcome of an instance may take to reach the broker."""
MAX_IDS_NAMED = 3
"""Instances that one finding names."""
MAX_LOOKUPS = 10_000
"""Instances that one query asks the broker for."""
MAX_FINDINGS_PER_CHECK = 20

RESTORE_ADVICE = "restore history.db, and the journal with it, from the last backup"


class DoctorReport(Struct):
    """The findings of one run, and the number of checked objects.

    Attributes:
        live: True if a cluster runs on the directory.
        findings: The findings, errors first.
        checked: The number of live `instances`, `messages`, `queues`, instances in the history (`ended`), and ended
            instances that the journal still contains (`ended_in_journal`), which are compared with the history.
    """

    live: bool
    findings: list[Finding]
    checked: dict[str, int]

    @property
    def is_sound(self) -> bool:
        """True if the invariants hold."""
        return all(finding.severity != ERROR for finding in self.findings)


def run_checks(data: DataDir, *, readable: bool = True) -> DoctorReport:
    """Run all checks on a data directory.

    Args:
        data: The data directory.
        readable: False if the journal is damaged, so that it is not read. Default: True.

    Returns:
        The report. An error of the cluster or of a file is a finding, not an exception.
    """
    report = DoctorReport(False, list(check_environment(data)), {"ended": 0})
    found = report.findings
    ended: EndedGroups | None = None
    audit: dict[str, Any] = {}
    has_journal = any(data.journal.glob("*.journal"))
    try:
        # This waits for a program that has just been started, because its broker holds the journal.
        report.live = live_address(data) is not None
        if has_journal and readable:
            ended = ended_groups(data.journal, FINISHED, audit=not report.live)
            found.extend(_check_ended_groups(data, ended))
        if report.live:
            with attach(data.path, with_history=False) as attached:
                audit = _check_broker(attached, found)
                found.extend(_check_history(data, ended, audit, attached, has_journal, report.checked))
        else:
            if ended is not None:
                audit = ended.audit
                found.extend([*_permanent_findings(audit), *_transient_findings(audit, live=False).values()])
            found.extend(_check_history(data, ended, audit, None, has_journal, report.checked))
    except JournalCorrupt as error:
        found.append(Finding(ERROR, "journal", str(data.journal), str(error), "stageflow journal verify"))
    except (StageFlowError, BrokerError) as error:
        found.append(Finding(ERROR, "broker", str(data.path), str(error), "stageflow health"))
    if not has_journal and not report.live and not data.history.exists():
        what = "nothing has run in this directory yet"
        found.append(Finding(INFO, "journal", str(data.path), what, "check --data"))
    report.checked |= {
        "instances": len(audit.get("live", ())),
        "messages": audit.get("messages", 0),
        "queues": len(audit.get("queues", ())),
        "ended_in_journal": 0 if ended is None else len(ended.ended),
    }
    order = {ERROR: 0, WARNING: 1, INFO: 2}
    found.sort(key=lambda finding: order[finding.severity])
    return report


# the broker


def _check_broker(attached: Attached, found: list[Finding]) -> dict[str, Any]:
    """Return the broker's audit, and add its findings to `found`; transient ones only if they last."""
    deadline = time.monotonic() + FAULT_CONFIRM_SECONDS
    audit: dict[str, Any] = attached.wait(attached.admin.audit())
    found.extend(_permanent_findings(audit))
    transient = _transient_findings(audit, live=True)
    while any(one.severity != INFO for one in transient.values()) and time.monotonic() < deadline:
        time.sleep(RECHECK_INTERVAL_SECONDS)
        current = _transient_findings(attached.wait(attached.admin.audit()), live=True)
        transient = {key: current[key] for key in transient if key in current}
    found.extend(transient.values())
    return audit


def _permanent_findings(audit: dict[str, Any]) -> list[Finding]:
    """Return the findings on instances, which are consistent in every audit, so that one audit proves them."""
    manifest = read_manifest(audit["facts"].get(MANIFEST_FACT))
    return [*instance_findings(audit, Naming() if manifest is None else manifest.naming), *broker_findings(audit)]


def _transient_findings(audit: dict[str, Any], *, live: bool) -> dict[tuple[str, str], Finding]:
    """Return the findings on workers and queues, which may be over in a moment: workers start and end."""
    manifest = read_manifest(audit["facts"].get(MANIFEST_FACT))
    naming = Naming() if manifest is None else manifest.naming
    consumed = None if manifest is None else consumed_queues(manifest.plans, naming)
    found = [
        *lease_findings(audit, _is_alive if live else lambda pid: True),
        *queue_findings(audit, consumed, naming, live),
    ]
    # All queues without consumers share one finding, whose counts change.
    return {(one.check, "" if one.check == "unserved" else one.where): one for one in found}


def _is_alive(pid: int) -> bool:
    return start_ticks(pid) is not None


def _check_ended_groups(data: DataDir, ended: EndedGroups) -> Iterator[Finding]:
    if ended.idle:
        what = "it is live in the journal, but nothing continues it: no message, gather or timer"
        advice = "the next start deletes it: restore the directory from a backup, or submit the instance again"
        yield Finding(ERROR, "carrier", _join_ids(ended.idle), what, advice)
    yield from _check_clock(data.journal, ended.latest_wall)


def _check_clock(where: object, latest: float) -> Iterator[Finding]:
    ahead = latest - time.time()
    if ahead > CLOCK_TOLERANCE_SECONDS:
        what = f"its latest entry is {ahead:,.0f} s ahead of this machine's clock, which was set back"
        yield Finding(WARNING, "clock", str(where), what, "set the clock; until then, ages and timeouts are wrong")


# the history


def _check_history(
    data: DataDir,
    ended: EndedGroups | None,
    audit: dict[str, Any],
    attached: Attached | None,
    has_journal: bool,
    checked: dict[str, int],
) -> Iterator[Finding]:
    facts: dict[str, str] | None = audit.get("facts", None if ended is None else ended.facts)
    identity = None if facts is None else facts.get(HISTORY_FACT)
    where = str(data.history)
    if not data.history.exists():
        if identity is not None:
            what = "the history is missing, but the journal refers to one"
            yield Finding(ERROR, "history", where, what, RESTORE_ADVICE)
        return
    live = attached is not None and attached.live
    try:
        with closing(HistoryReader.open(data.history, offline=not live)) as reader:
            yield from _check_history_file(reader)
            if reader.count():
                yield from _check_journal_belongs(where, facts, has_journal or live)
            yield from _check_outcomes(reader, checked)
            if identity is not None and reader.identity != identity:
                what = "the journal refers to another one: this history does not belong to it"
                yield Finding(ERROR, "history", where, what, RESTORE_ADVICE)
            yield from _check_clock(where, reader.latest())
            yield from _compare_with_history(reader, ended, audit, attached)
    except HistoryError as error:
        yield Finding(ERROR, "history", where, str(error), RESTORE_ADVICE)


def _check_journal_belongs(where: str, facts: dict[str, str] | None, has_journal: bool) -> Iterator[Finding]:
    """Yield a finding if instances finished without a journal that refers to the history; None: it is unreadable."""
    advice = "restore the journal directory from the last backup"
    if not has_journal:
        what = "instances have finished here, but the journal is missing: its live instances are lost"
        yield Finding(ERROR, "journal", where, what, advice)
    elif facts is not None and HISTORY_FACT not in facts:
        what = "instances have finished here, but the journal refers to no history: it is not their journal"
        yield Finding(ERROR, "history", where, what, advice)


def _check_history_file(reader: HistoryReader) -> Iterator[Finding]:
    where = str(reader.path)
    for text in reader.check(thorough=True)[:MAX_FINDINGS_PER_CHECK]:
        yield Finding(ERROR, "history", where, text, RESTORE_ADVICE)
    if not in_wal_mode(reader.path):
        what = "it is not in WAL mode: a program other than stageflow has written it"
        yield Finding(WARNING, "history", where, what, "nothing: the next start sets the mode again")


def _check_outcomes(reader: HistoryReader, checked: dict[str, int]) -> Iterator[Finding]:
    faults: dict[str, str] = {}
    for row in reader.iterate():
        checked["ended"] += 1
        wrong = check_outcome(row.workflow_id, row.version, row.status, row.error, row.failed_stage, row.outcome)
        if wrong is not None:
            faults[row.instance_id] = wrong
            if len(faults) == MAX_FINDINGS_PER_CHECK:
                break
    for id, wrong in faults.items():
        yield Finding(ERROR, "ending", id, f"its row in the history is inconsistent: {wrong}", RESTORE_ADVICE)


def _compare_with_history(
    reader: HistoryReader, ended: EndedGroups | None, audit: dict[str, Any], attached: Attached | None
) -> Iterator[Finding]:
    live: list[str] = audit.get("live", [])
    others: dict[str, int] = audit.get("epochs", {})
    finished = reader.epochs(live)
    both = [id for id in live if id in finished and finished[id] >= others.get(id, 1)]
    if both and attached is not None and attached.live:
        # An instance may have ended since the audit, but one that is still live now had not ended before.
        both = both[:MAX_LOOKUPS]
        groups = attached.wait(attached.admin.lookup(both))["groups"]
        both = [id for id in both if id in groups and not groups[id]["ended"] and groups[id]["epoch"] <= finished[id]]
    if both:
        what = "it is live, but the same run of it is in the history: it would be finished a second time"
        advice = "stageflow instances show {id}; after `journal repair`, cancel it; else restore a backup of both files"
        yield Finding(ERROR, "agreement", _join_ids(both), what, advice.format(id=both[0]))
    if ended is None:
        return
    rows = reader.epochs(ended.ended)
    pruned = reader.pruned_before()
    lost = [
        id
        for id, (epoch, when) in ended.ended.items()
        if rows.get(id, 0) < epoch and (not pruned or when > pruned + CLOCK_TOLERANCE_SECONDS)
    ]
    if lost:
        what = "it has ended according to the journal, but the history does not have it"
        advice = f"{RESTORE_ADVICE}; without it the same ids can be started again"
        yield Finding(ERROR, "agreement", _join_ids(lost), what, advice)


def _join_ids(ids: Iterable[str]) -> str:
    listed = list(ids)
    shown = ", ".join(listed[:MAX_IDS_NAMED])
    return shown if len(listed) <= MAX_IDS_NAMED else f"{shown} and {len(listed) - MAX_IDS_NAMED} more"
