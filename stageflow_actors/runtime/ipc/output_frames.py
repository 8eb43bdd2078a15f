"""Frames of the connection on which the node sends output and log records to the program.

A frame is its kind, the length of its data, and the data. The node decodes log records only to name one that it drops.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["DROPPED_OUTPUT", "LOGS", "REPORTED_ATTRIBUTES", "STDERR", "STDOUT", "FrameReader", "pack_frame"]

STDOUT, STDERR, LOGS, DROPPED_OUTPUT = range(4)
"""Kinds of frame. The data of `LOGS` are records, each with its length in front (see `stageflow_brokers.log_sender`);
of `DROPPED_OUTPUT` the number of lines that the node has dropped, as text."""

REPORTED_ATTRIBUTES = ("name", "workflow_id", "stage_id")
"""Attributes of the last dropped record that are reported with the number of dropped ones."""

_HEAD = struct.Struct("<BI")


def pack_frame(kind: int, data: bytes) -> bytes:
    """Return a frame."""
    return _HEAD.pack(kind, len(data)) + data


class FrameReader:
    """Divides what arrives into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Add data and yield the frames that are complete."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(buffer, at)
            end = at + _HEAD.size + length
            if len(buffer) < end:
                break
            yield kind, bytes(buffer[at + _HEAD.size : end])
            at = end
        del buffer[:at]
