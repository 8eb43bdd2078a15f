"""References to tracebacks: many instances fail in the same way, and the history stores each traceback once.

In the history, the table in an outcome has references in place of tracebacks. Pure functions: the caller stores the
tracebacks and looks them up. A reference whose traceback is gone, or that is damaged, is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import msgspec

from stageflow_actors.core.envelope import decode_outcome, encode
from stageflow_actors.core.tracebacks.table import Entries, decode_table, encode_table

__all__ = ["Digest", "find_references", "refer_to_tracebacks", "with_tracebacks"]

Digest = bytes

MARK = b"\x00stageflow:traceback:"
"""Precedes the digest in a reference. A packed traceback begins with another byte."""

DIGEST_BYTES = 16


def refer_to_tracebacks(table: bytes) -> tuple[bytes, dict[Digest, bytes]]:
    """Return the table with references, and the packed tracebacks by digest."""
    texts: dict[Digest, bytes] = {}
    entries: Entries = []
    for packed, places in decode_table(table):
        digest = blake2b(packed, digest_size=DIGEST_BYTES).digest()
        texts[digest] = packed
        entries.append((MARK + digest, places))
    return encode_table(entries) or b"", texts


def find_references(outcome: bytes) -> list[Digest]:
    """Return the digests that an encoded outcome may refer to, without decoding it; usually none."""
    found: list[Digest] = []
    at = outcome.find(MARK)
    while at >= 0:
        at += len(MARK)
        found.append(outcome[at : at + DIGEST_BYTES])
        at = outcome.find(MARK, at)
    return found


def with_tracebacks(outcome: bytes, texts: Mapping[Digest, bytes]) -> bytes:
    """Return an encoded outcome with tracebacks in place of references."""
    try:
        read = decode_outcome(outcome)
    except msgspec.MsgspecError:
        return outcome  # the reader of the row reports it
    if read.tracebacks is None:
        return outcome  # the mark is part of the user's data
    entries: Entries = []
    for packed, places in decode_table(read.tracebacks):
        text = texts.get(packed.removeprefix(MARK)) if packed.startswith(MARK) else packed
        if text is not None:
            entries.append((text, places))
    read.tracebacks = encode_table(entries)
    return encode(read)
