"""Checks that journal and history belong together and are of the same age.

Before the broker forgets an instance, its row is written to the history, and the journal records the count of rows
written. So a history with fewer rows has lost some, and a history with more rows may contain the ends of instances that
are still live in the journal. Neither happens unless one of the two was copied or repaired without the other. An
instance that has finished must never run again.
"""

from __future__ import annotations

from stageflow_actors.core.plural import pluralize
from stageflow_actors.history import HistoryMissing, HistoryOutdated, HistoryWriter, JournalMissing
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_brokers.api import BrokerAdmin

__all__ = ["HISTORY_FACT", "WRITTEN_FACT", "check_journal", "forget_finished", "open_history"]

HISTORY_FACT = "history"
"""Name of the broker's fact with the identity of the history that belongs to its journal."""

WRITTEN_FACT = "history-written"
"""Name of the broker's fact with the number of rows ever written to that history, at the time of the last update."""

LOOKUP_BATCH = 5_000
"""Instances looked up with one query."""


def check_journal(data: DataDir) -> None:
    """Raise `JournalMissing` if the history belongs to a journal that is missing.

    Called before the broker starts, because the broker would create a new journal.
    """
    if data.history.exists() and not any(data.journal.glob("*.journal")):
        with HistoryWriter.open(data.history, create=False) as history:
            if history.has_journal:
                raise JournalMissing(data.history, data.journal)


def open_history(data: DataDir, admin: BrokerAdmin, *, lasting: bool) -> HistoryWriter:
    """Open the history that belongs to the broker's journal, or create it for a new journal.

    `lasting` is True if the journal outlives the broker process. Raises `HistoryMissing`, `HistoryOutdated` or
    `JournalMissing` if the two do not belong together, and the errors of `HistoryWriter.open`.
    """
    identity = admin.get_fact(HISTORY_FACT).result()
    recorded = admin.get_fact(WRITTEN_FACT).result()
    history = HistoryWriter.open(data.history, create=identity is None)
    try:
        if identity is not None and history.identity != identity:
            raise HistoryMissing(data.history)
        if lasting and identity is None and history.has_journal:
            raise JournalMissing(data.history, data.journal)
        if recorded is not None and history.written < int(recorded):
            raise HistoryOutdated(data.history, int(recorded) - history.written)
        admin.set_fact(HISTORY_FACT, history.identity).result()
        if lasting:
            history.mark_journal_bound()
    except BaseException:
        history.close()
        raise
    return history


def forget_finished(history: HistoryWriter, admin: BrokerAdmin) -> str:
    """Make the broker forget live instances that have finished in the history.

    Return a notice for the user; empty if there are none. Must be called before any message is delivered, or finished
    instances would run again.
    """
    recorded = admin.get_fact(WRITTEN_FACT).result() or "0"
    found: list[str] = []
    for rows in history.written_since(int(recorded), LOOKUP_BATCH):
        groups = admin.lookup(list(rows)).result()["groups"]
        ended = [id for id, group in groups.items() if not group["ended"] and group["epoch"] <= rows[id]]
        if ended:
            admin.forget_groups(ended).result()
            found += ended
    if not found:
        return ""
    return (
        f"{pluralize(len(found), 'instance')} that are live in the journal have finished in the history, and will not "
        f"run again ({', '.join(found[:3])}{' …' if len(found) > 3 else ''}): the journal is an older copy, or its "
        "end was lost in a repair. Unfinished instances that were started after that point are lost"
    )
