"""The journal: bytes that were acknowledged, kept through any crash. It knows nothing of queues or messages.

================  ====================================================================================
`format`          the bytes, and how they are read: the specification
`journal`         `Journal`: open, commit, read, seal, drop_oldest
`recovery`        from what is on disk to a journal that can be written again
`supply`          segments to come: preallocation, the spare, recycling
`survey`          all segments in their order, past damage too; underneath everything that reads
`segment`         one segment, read
`inspect`         from outside: verify, scan, repair; `salvage` what can still be read of what is damaged
`lock`            one writer to a directory
`files`           the one seam to the operating system
`testing`         a disk in memory that fails, tears and forgets
================  ====================================================================================

Imports point down that list, except that `inspect` stands beside `journal`.
"""

from stageflow_brokers.journal.format import Batch, Record
from stageflow_brokers.journal.journal import BatchPlace, Journal, Room, SegmentInfo
from stageflow_brokers.journal.repair import Finding, RepairReport, repair, scan, verify

__all__ = [
    "Batch",
    "BatchPlace",
    "Finding",
    "Journal",
    "Record",
    "RepairReport",
    "Room",
    "SegmentInfo",
    "repair",
    "scan",
    "verify",
]
