"""The journal: acknowledged bytes that survive a crash. It knows nothing of queues or messages.

===================  =====================================================================
`journal`            `Journal`: open, commit, read, seal, drop_oldest
`recovery`           opens an existing journal for writing
`repair`             verify, scan and repair from outside; `salvage` reads damaged batches
`scanner`            all segments in order, past damage too
`segment_allocator`  future segments: preallocation, the spare, recycling
`segment_reader`     reads one segment
`lock`               one writer per directory
`filesystem`         the interface to the operating system
`format`             the bytes: the specification
===================  =====================================================================

Imports point down that list, except that `repair` stands beside `journal`.
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
