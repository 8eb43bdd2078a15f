"""The journal: acknowledged bytes that survive a crash. It knows nothing of queues or messages.

===================  ============================================================================
`journal`            `Journal`: open, commit, read, seal, drop_oldest
`repair`             makes a damaged journal usable again; `salvage` reads damaged batches
`verify`             reads a journal without its lock: reports damage, yields batches
`recovery`           opens an existing journal for writing
`scanner`            reads all segments in order, and continues after damage
`segment_allocator`  future segments: preallocation, the spare, recycling
`segment_reader`     reads one segment
`lock`               one writer per directory
`filesystem`         the interface to the operating system
`format`             the bytes: the specification
===================  ============================================================================

A module imports only modules below it in this list.
"""

from stageflow_brokers.journal.format import Batch, Record
from stageflow_brokers.journal.journal import BatchLocation, FreeSpace, Journal, SegmentInfo
from stageflow_brokers.journal.repair import RepairReport, repair
from stageflow_brokers.journal.verify import Finding, scan, verify

__all__ = [
    "Batch",
    "BatchLocation",
    "Finding",
    "FreeSpace",
    "Journal",
    "Record",
    "RepairReport",
    "SegmentInfo",
    "repair",
    "scan",
    "verify",
]
