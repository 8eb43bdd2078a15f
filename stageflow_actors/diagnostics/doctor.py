"""A check-up: whether the invariants hold in the cluster of a data directory, running or at rest.

The broker is asked for one consistent picture; at rest, its journal is read into a broker in this process. The history
is read after it, so that whatever had ended by then is in it. Nothing on disk is changed: of a history with an
unfinished log SQLite makes its index (`-shm`) anew, and nothing else.
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
"""Seconds that something wrong in a running cluster must last: deaths take a moment to be known."""
RECHECK_INTERVAL_SECONDS = 0.2
CLOCK_TOLERANCE_SECONDS = 60.0
"""Seconds by which clocks may be set back, and an instance may take from its end to the broker."""
MAX_IDS_NAMED = 3
MAX_LOOKUPS = 10_000
MAX_FINDINGS_PER_CHECK = 20

RESTORE_ADVICE = "restore history.db, and the journal with it, from the last backup"


class DoctorReport(Struct):
    """What was looked at, and what was found.

    `checked` is how many there were: live `instances`, `messages`, `queues`, `ended` in the history, and of those
    `ended_in_journal`, whose end the journal still tells too, so that the two could be compared.
    """

    live: bool
    findings: list[Finding]
    checked: dict[str, int]

    @property
    def sound(self) -> bool:
        """Whether the invariants hold."""
        return all(finding.severity != ERROR for finding in self.findings)


def run_checks(data: DataDir, *, readable: bool = True) -> DoctorReport:
    """Look at everything. `readable`: whether the journal is undamaged, so that it can be read through.

    Raises `StageFlowError` where nothing can be looked at.
    """
    report = DoctorReport(False, list(check_environment(data)), {"ended": 0})
    found = report.findings
    gone: EndedGroups | None = None
    picture: dict[str, Any] = {}
    has_journal = any(data.journal.glob("*.journal"))
    try:
        # A program that has just been started is waited for: its broker answers for the journal.
        report.live = live_address(data) is not None
        if has_journal and readable:
            gone = ended_groups(data.journal, FINISHED, audit=not report.live)
            found.extend(_of_departures(data, gone))
        if report.live:
            with attach(data.path, with_history=False) as attached:
                picture = _look(attached, found)
                found.extend(_of_history(data, gone, picture, attached, has_journal, report.checked))
        else:
            if gone is not None:
                picture = gone.audit
                found.extend([*_lasting(picture), *_passing(picture, live=False).values()])
            found.extend(_of_history(data, gone, picture, None, has_journal, report.checked))
    except JournalCorrupt as error:
        found.append(Finding(ERROR, "journal", str(data.journal), str(error), "stageflow journal verify"))
    except (StageFlowError, BrokerError) as error:
        found.append(Finding(ERROR, "broker", str(data.path), str(error), "stageflow health"))
    if not has_journal and not report.live and not data.history.exists():
        what = "nothing has run in this directory yet"
        found.append(Finding(INFO, "journal", str(data.path), what, "is --data right?"))
    report.checked |= {
        "instances": len(picture.get("live", ())),
        "messages": picture.get("messages", 0),
        "queues": len(picture.get("queues", ())),
        "ended_in_journal": 0 if gone is None else len(gone.ended),
    }
    order = {ERROR: 0, WARNING: 1, INFO: 2}
    found.sort(key=lambda finding: order[finding.severity])
    return report


# the broker


def _look(attached: Attached, found: list[Finding]) -> dict[str, Any]:
    """The broker's picture; what is wrong in it, and stays wrong, is added to `found`."""
    deadline = time.monotonic() + FAULT_CONFIRM_SECONDS
    picture: dict[str, Any] = attached.wait(attached.admin.audit())
    found.extend(_lasting(picture))
    passing = _passing(picture, live=True)
    while any(one.severity != INFO for one in passing.values()) and time.monotonic() < deadline:
        time.sleep(RECHECK_INTERVAL_SECONDS)
        now = _passing(attached.wait(attached.admin.audit()), live=True)
        passing = {key: now[key] for key in passing if key in now}
    found.extend(passing.values())
    return picture


def _lasting(picture: dict[str, Any]) -> list[Finding]:
    """What the broker knows of instances is true at any one moment."""
    served = read_manifest(picture["facts"].get(MANIFEST_FACT))
    return [*instance_findings(picture, Naming() if served is None else served.naming), *broker_findings(picture)]


def _passing(picture: dict[str, Any], *, live: bool) -> dict[tuple[str, str], Finding]:
    """What may be over in a moment: workers come and go, and it takes a moment to be known."""
    served = read_manifest(picture["facts"].get(MANIFEST_FACT))
    naming = Naming() if served is None else served.naming
    known = None if served is None else consumed_queues(served.plans, naming)
    found = [
        *lease_findings(picture, _alive if live else lambda pid: True),
        *queue_findings(picture, known, naming, live),
    ]
    # Of the queues that nobody serves there is one finding, whose figures change.
    return {(one.check, "" if one.check == "unserved" else one.where): one for one in found}


def _alive(pid: int) -> bool:
    return start_ticks(pid) is not None


def _of_departures(data: DataDir, gone: EndedGroups) -> Iterator[Finding]:
    if gone.idle:
        what = "by the journal it is live, and nothing continues it: no message, gather or timer"
        advice = "the next start forgets it; restore the directory from a backup, or start it anew"
        yield Finding(ERROR, "carrier", _named(gone.idle), what, advice)
    yield from _of_clock(data.journal, gone.latest_wall)


def _of_clock(where: object, latest: float) -> Iterator[Finding]:
    ahead = latest - time.time()
    if ahead > CLOCK_TOLERANCE_SECONDS:
        what = f"its latest entry is {ahead:,.0f} s ahead of this machine's clock, which was set back"
        yield Finding(WARNING, "clock", str(where), what, "set the clock; until then ages and timeouts are wrong")


# the history


def _of_history(
    data: DataDir,
    gone: EndedGroups | None,
    picture: dict[str, Any],
    attached: Attached | None,
    has_journal: bool,
    checked: dict[str, int],
) -> Iterator[Finding]:
    facts: dict[str, str] | None = picture.get("facts", None if gone is None else gone.facts)
    identity = None if facts is None else facts.get(HISTORY_FACT)
    where = str(data.history)
    if not data.history.exists():
        if identity is not None:
            what = "the journal says that there is a history of finished instances, and it is missing"
            yield Finding(ERROR, "history", where, what, RESTORE_ADVICE)
        return
    live = attached is not None and attached.live
    try:
        with closing(HistoryReader.open(data.history, offline=not live)) as reader:
            yield from _of_file(reader)
            if reader.count():
                yield from _of_journal(where, facts, has_journal or live)
            yield from _of_rows(reader, checked)
            if identity is not None and reader.identity != identity:
                what = "it is not the history that belongs to this journal, but another one"
                yield Finding(ERROR, "history", where, what, RESTORE_ADVICE)
            yield from _of_clock(where, reader.latest())
            yield from _agreement(reader, gone, picture, attached)
    except HistoryError as error:
        yield Finding(ERROR, "history", where, str(error), RESTORE_ADVICE)


def _of_journal(where: str, facts: dict[str, str] | None, has_journal: bool) -> Iterator[Finding]:
    """Where instances have finished there is a journal that knows of the history; None: it cannot be read."""
    advice = "restore the journal directory from the last backup"
    if not has_journal:
        what = "instances have finished here, and the journal is missing: which ones were live is not known any more"
        yield Finding(ERROR, "journal", where, what, advice)
    elif facts is not None and HISTORY_FACT not in facts:
        what = "instances have finished here, and the journal knows of no history: it is not the one they lived in"
        yield Finding(ERROR, "history", where, what, advice)


def _of_file(reader: HistoryReader) -> Iterator[Finding]:
    where = str(reader.path)
    for text in reader.check(thorough=True)[:MAX_FINDINGS_PER_CHECK]:
        yield Finding(ERROR, "history", where, text, RESTORE_ADVICE)
    if not in_wal_mode(reader.path):
        what = "it is not in WAL mode: something other than stageflow has written it"
        yield Finding(WARNING, "history", where, what, "nothing: the next start sets it again")


def _of_rows(reader: HistoryReader, checked: dict[str, int]) -> Iterator[Finding]:
    faults: dict[str, str] = {}
    for row in reader.iterate():
        checked["ended"] += 1
        wrong = check_outcome(row.workflow_id, row.version, row.status, row.error, row.failed_stage, row.outcome)
        if wrong is not None:
            faults[row.instance_id] = wrong
            if len(faults) == MAX_FINDINGS_PER_CHECK:
                break
    for id, wrong in faults.items():
        yield Finding(ERROR, "ending", id, f"what the history keeps of it is not sound: {wrong}", RESTORE_ADVICE)


def _agreement(
    reader: HistoryReader, gone: EndedGroups | None, picture: dict[str, Any], attached: Attached | None
) -> Iterator[Finding]:
    live: list[str] = picture.get("live", [])
    others: dict[str, int] = picture.get("epochs", {})
    finished = reader.epochs(live)
    both = [id for id in live if id in finished and finished[id] >= others.get(id, 1)]
    if both and attached is not None and attached.live:
        # It may have ended since the picture was taken, but whoever is still live now was not finished before.
        both = both[:MAX_LOOKUPS]
        groups = attached.wait(attached.admin.lookup(both))["groups"]
        both = [id for id in both if id in groups and not groups[id]["ended"] and groups[id]["epoch"] <= finished[id]]
    if both:
        what = "it is live, and in the history the same run of it has finished: it would be finished a second time"
        advice = "stageflow instances show {id}; after a `journal repair` cancel it, else restore a backup of both"
        yield Finding(ERROR, "agreement", _named(both), what, advice.format(id=both[0]))
    if gone is None:
        return
    rows = reader.epochs(gone.ended)
    pruned = reader.pruned_before()
    lost = [
        id
        for id, (epoch, when) in gone.ended.items()
        if rows.get(id, 0) < epoch and (not pruned or when > pruned + CLOCK_TOLERANCE_SECONDS)
    ]
    if lost:
        what = "by the journal it has ended and is in the history, and the history does not have it"
        advice = f"{RESTORE_ADVICE}; without it the same ids can be started again"
        yield Finding(ERROR, "agreement", _named(lost), what, advice)


def _named(ids: Iterable[str]) -> str:
    known = list(ids)
    shown = ", ".join(known[:MAX_IDS_NAMED])
    return shown if len(known) <= MAX_IDS_NAMED else f"{shown} and {len(known) - MAX_IDS_NAMED} more"
