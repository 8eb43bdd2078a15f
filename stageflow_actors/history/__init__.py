"""The durable store of finished instances and their results: one SQLite file, one row per instance.

`HistoryWriter` (the coordinator, alone) · `HistoryReader` (anybody) · `HistoryRow` (what both speak of) · the errors
below `HistoryError`. It is the authority for idempotent starts once an instance has finished.
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
