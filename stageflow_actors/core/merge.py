"""Contexts of several branches as one: what each changed, field by field, without knowing what a field means.

Works on encoded contexts, so that the coordinator, which runs no code of the user's, can do it, too. Fields are those
of a map, or the places of an array. Nothing here raises for contexts that a codec has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

__all__ = ["MergeConflict", "merge_fields"]

MergeConflict = tuple[Any, str, str]
"""A field (of an array: its place), and two branches that changed it differently."""

_encode = msgspec.msgpack.Encoder().encode
_map = msgspec.msgpack.Decoder(dict[Any, Raw]).decode
_array = msgspec.msgpack.Decoder(list[Raw]).decode


def merge_fields(base: Raw, branches: Mapping[str, Raw]) -> tuple[Raw, MergeConflict | None]:
    """`base` with what each branch changed, and the first contradiction; of a disputed field the first change counts.

    Fields are compared as they are encoded, so that NaN equals itself. A set that was read and written again may differ
    from itself that way: encode contexts in a canonical order where that matters.
    """
    in_array = _is_array(base)
    merged = _fields(base)
    before = {field: bytes(value) for field, value in merged.items()}
    changed: dict[Any, tuple[str, bytes | None]] = {}
    conflict: MergeConflict | None = None
    for name, context in branches.items():
        own = _fields(context)
        for field in (*before, *(field for field in own if field not in before)):
            now = bytes(own[field]) if field in own else None
            if now == before.get(field):
                continue
            earlier = changed.setdefault(field, (name, now))
            if earlier[1] != now:
                conflict = conflict or (field, earlier[0], name)
            elif earlier[0] != name:
                continue
            elif now is None:
                del merged[field]
            else:
                merged[field] = own[field]
    return Raw(_encode([merged[place] for place in sorted(merged)] if in_array else merged)), conflict


def _is_array(context: Raw) -> bool:
    kind = bytes(context)[0]
    return 0x90 <= kind <= 0x9F or kind in (0xDC, 0xDD)


def _fields(context: Raw) -> dict[Any, Raw]:
    return dict(enumerate(_array(context))) if _is_array(context) else _map(context)
