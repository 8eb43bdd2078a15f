"""The history that a cluster goes on with: whether it is the journal's own, and both are of the same day.

The history is written before the journal forgets an instance, and the journal is told before that how much had been
written. So a history with less than that has lost rows, and one with more may know the ends of instances that the
journal still holds for live. Only what was copied or mended apart comes to that; nothing that ended is run again.
"""

from __future__ import annotations

from stageflow_actors.core.plural import pluralize
from stageflow_actors.history import HistoryMissing, HistoryOutdated, HistoryWriter, JournalMissing
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_brokers.api import BrokerAdmin

__all__ = ["HISTORY_FACT", "WRITTEN_FACT", "check_journal", "forget_finished", "open_history"]

HISTORY_FACT = "history"
"""Under which the broker keeps the identity of the history that belongs to its journal."""

WRITTEN_FACT = "history-written"
"""Under which the broker keeps how many rows had ever been written to that history when it was told of them."""

LOOKUP_BATCH = 5_000
"""Instances asked for in one query."""


def check_journal(data: DataDir) -> None:
    """Before a broker makes a journal: raises `JournalMissing` where one is missing that the history remembers."""
    if data.history.exists() and not any(data.journal.glob("*.journal")):
        with HistoryWriter.open(data.history, create=False) as history:
            if history.has_journal:
                raise JournalMissing(data.history, data.journal)


def open_history(data: DataDir, admin: BrokerAdmin, *, lasting: bool) -> HistoryWriter:
    """The history of the journal behind `admin`, made where there is none; `lasting`: the journal outlives the broker.

    Raises `HistoryMissing`, `HistoryOutdated`, `JournalMissing` where the two do not belong together, and what opening
    it raises.
    """
    known = admin.get_fact(HISTORY_FACT).result()
    recorded = admin.get_fact(WRITTEN_FACT).result()
    history = HistoryWriter.open(data.history, create=known is None)
    try:
        if known is not None and history.identity != known:
            raise HistoryMissing(data.history)
        if lasting and known is None and history.has_journal:
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
    """Have the broker forget what it holds for live and the history knows the end of; what is to be said of that.

    To be called before anything is delivered.
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
        f"{pluralize(len(found), 'instance')} that the journal holds for live have finished by the history, and will "
        f"not be run again ({', '.join(found[:3])}{' …' if len(found) > 3 else ''}): the journal is an older copy, or "
        "a repair has given up its end. What was started after that, and had not finished, is not known any more"
    )
