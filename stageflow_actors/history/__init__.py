"""The history: a durable SQLite file of finished instances and their results, one row per instance.

========  ========================================================
`writer`  `HistoryWriter`: used only by the coordinator
`reader`  `HistoryReader`: used by any process
`rows`    `HistoryRow`: one finished instance
`schema`  the format of the file; creating and opening it
`errors`  the errors below `HistoryError`
========  ========================================================

After an instance has finished, the history decides whether a submit with its id is a duplicate.
"""

from stageflow_actors.history.errors import (
    HistoryDamaged,
    HistoryError,
    HistoryMissing,
    HistoryOutdated,
    HistoryTooNew,
    HistoryUnavailable,
    JournalMissing,
)
from stageflow_actors.history.reader import HistoryReader
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.writer import HistoryWriter

__all__ = [
    "HistoryDamaged",
    "HistoryError",
    "HistoryMissing",
    "HistoryOutdated",
    "HistoryReader",
    "HistoryRow",
    "HistoryTooNew",
    "HistoryUnavailable",
    "HistoryWriter",
    "JournalMissing",
]
