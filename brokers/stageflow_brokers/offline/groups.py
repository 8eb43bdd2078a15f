"""The groups named by the records of a batch, and those that a damaged batch may name.

This module must not apply records: that is the task of `Replay`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from stageflow_brokers.core import records, wire
from stageflow_brokers.errors import ProtocolError
from stageflow_brokers.journal.format import Batch
from stageflow_brokers.types import MAX_NAME_CHARS

__all__ = ["groups_in", "possible_groups_in"]

MAX_SEARCHED_BYTES = 32 << 20
"""Bytes of a damaged header that are searched for names."""

_ARRAY = re.compile(rb"[\x92-\x9f\xdc]")
_SHAPES = {
    records.PUBLISH_FRAME: ("iis", "siiis", "ssis"),
    records.SETTLE_FRAME: ("iis", "iiis", "iiiis", "siiis", "ssis"),
    records.COPY: ("iss",),
    records.MARK: ("iss",),
    records.GROUP: ("s",),
    records.GATHER: ("s",),
}
"""How arrays begin that name a group, by kind of record: integers and strings, the last of which is the group."""


def groups_in(batch: Batch) -> dict[str, None]:
    """Return the groups that the records of a batch name, in order, without records that cannot be decoded."""
    named: dict[str, None] = {}
    for kind, _, _, header, blob in batch.records:
        try:
            named.update(dict.fromkeys(_groups_of(kind, bytes(header), bytes(blob))))
        except (ProtocolError, msgspec.MsgspecError):
            continue
    named.pop("", None)
    return named


def possible_groups_in(batch: Batch) -> dict[str, None]:
    """Return the groups that a damaged batch may name: the strings at places where a group is expected."""
    named: dict[str, None] = {}
    for kind, _, _, header, blob in batch.records:
        try:
            found = _groups_of(kind, bytes(header), bytes(blob))
        except (ProtocolError, msgspec.MsgspecError, RecursionError, ValueError):
            found = list(_guess_groups(kind, bytes(header[:MAX_SEARCHED_BYTES])))
        named.update((name, None) for name in found if name.isprintable() and len(name) <= MAX_NAME_CHARS)
    named.pop("", None)
    return named


def _guess_groups(kind: int, header: bytes) -> Iterator[str]:
    for array in _ARRAY.finditer(header):
        at = array.end() + 2 * (array[0] == b"\xdc")
        shape, last = "", ""
        while len(shape) < 5:
            kind_of_value, last, at = _value(header, at)
            shape += kind_of_value
            if shape in _SHAPES.get(kind, ()):
                yield last
            if not kind_of_value:
                break


def _value(data: bytes, at: int) -> tuple[str, str, int]:
    """Decode a msgpack value: its kind ("i" integer, "s" string, "" neither), its string, and its end."""
    first = data[at] if at < len(data) else 0xC1
    if first < 0x80:
        return "i", "", at + 1
    if 0xCC <= first <= 0xCF:
        return "i", "", at + 1 + (1 << (first - 0xCC))
    if 0xA0 <= first <= 0xBF:
        begin, length = at + 1, first - 0xA0
    elif first in (0xD9, 0xDA):
        begin = at + first - 0xD7
        length = int.from_bytes(data[at + 1 : begin], "big")
    else:
        return "", "", at
    text = data[begin : begin + length]
    try:
        return ("s", text.decode(), begin + length) if len(text) == length else ("", "", at)
    except UnicodeDecodeError:
        return "", "", at


def _groups_of(kind: int, header: bytes, blob: bytes) -> list[str]:
    if kind == records.PUBLISH_FRAME:
        publish = wire.decode_publish(header, blob)
        return [each.group for part in (publish.items, publish.opens, publish.arrivals) for each in part]
    if kind == records.SETTLE_FRAME:
        settle = wire.decode_settle(header, blob)
        named = [move[4] for move in settle.moves] + [ack[3] for ack in settle.acks]
        for other in settle.others:
            named += [each.group for part in (other.publishes, other.opens, other.arrivals) for each in part]
            named.append(other.close_group)
        return named
    if kind in (records.COPY, records.MARK):
        return [records.decode_message(header).group]
    if kind == records.GROUP:
        return [records.decode_group(header).id]
    if kind == records.GATHER:
        return [records.decode_gather(header).group]
    return list(records.decode_closed_groups(header)) if kind == records.GROUPS_CLOSED else []
