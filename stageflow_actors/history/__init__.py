"""The durable store of finished instances and their results: one SQLite file, one row per instance.

========  ========================================================
`writer`  `HistoryWriter`: the coordinator alone writes
`reader`  `HistoryReader`: any process reads
`rows`    `HistoryRow`: one finished instance
`schema`  the format of the file, and how it is created and opened
`errors`  the errors below `HistoryError`
========  ========================================================

The history decides whether a start is a duplicate once its instance has finished.
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
