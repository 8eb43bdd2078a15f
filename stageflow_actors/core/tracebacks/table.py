"""The tracebacks of an instance: one table in its messages and in its outcome, by place.

A place is a stage id, or `compensation_place` of one. The table holds the traceback of the last failed attempt of each
place, compressed, and equal ones once. It is bytes, so that a stage passes it on without decoding it. It may have been
written by another release or be damaged: reading it never raises.
"""

from __future__ import annotations

import zlib

import msgspec

__all__ = [
    "MAX_TRACEBACK_BYTES",
    "Entries",
    "compensation_place",
    "decode_table",
    "encode_table",
    "merge_tracebacks",
    "pack_traceback",
    "read_traceback",
    "read_tracebacks",
    "with_traceback",
]

MAX_TRACEBACK_BYTES = 16 << 10
"""Limit of the text of one traceback, in UTF-8."""

MAX_TABLE_BYTES = 256 << 10
"""Limit of the table of one instance; the tracebacks kept first are dropped first."""

Entries = list[tuple[bytes, list[str]]]
"""Each distinct packed traceback, with the places that have it."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entries).decode


def compensation_place(stage_id: str) -> str:
    """Return the place of the compensation of a stage. No stage id contains a colon."""
    return f"undo:{stage_id}"


def pack_traceback(text: str | None) -> bytes | None:
    """Return a traceback as it travels."""
    return None if text is None else zlib.compress(text.encode("utf-8", "backslashreplace"))


def read_traceback(packed: bytes | None) -> str | None:
    """Return the text of a packed traceback."""
    if packed is None:
        return None
    try:
        return zlib.decompressobj().decompress(packed, 4 * MAX_TRACEBACK_BYTES).decode(errors="replace")
    except zlib.error as error:
        return f"(the traceback cannot be read: {error})"


def with_traceback(table: bytes | None, place: str, packed: bytes | None) -> bytes | None:
    """Return the table with this traceback for a place; None removes one."""
    if packed is None and table is None:
        return None
    entries = [(known, [one for one in places if one != place]) for known, places in decode_table(table)]
    if packed is not None:
        places = next((places for known, places in entries if known == packed), None)
        if places is None:
            entries.append((packed, [place]))
        else:
            places.append(place)
    return encode_table(entries)


def merge_tracebacks(table: bytes | None, other: bytes | None) -> bytes | None:
    """Return the table with the tracebacks of another one."""
    if other is None or other == table:
        return table
    for packed, places in decode_table(other):
        for place in places:
            table = with_traceback(table, place, packed)
    return table


def read_tracebacks(table: bytes | None) -> dict[str, str]:
    """Return the text of each traceback, by place."""
    found: dict[str, str] = {}
    for packed, places in decode_table(table):
        text = read_traceback(packed) or ""
        found.update(dict.fromkeys(places, text))
    return found


def decode_table(table: bytes | None) -> Entries:
    """Return the entries of a table; none of a damaged one."""
    if table is None:
        return []
    try:
        return _decode(table)
    except msgspec.MsgspecError:
        return []


def encode_table(entries: Entries) -> bytes | None:
    """Return a table within its limit, or None for an empty one."""
    kept = [(packed, places) for packed, places in entries if places]
    while sum(len(packed) for packed, _ in kept) > MAX_TABLE_BYTES:
        del kept[0]
    return _encode(kept) if kept else None
