"""`merge_fields`: merges the contexts of parallel branches, field by field.

It works on encoded contexts, so that the coordinator, which runs no user code, can merge, too. A field is a key of a
map or an index of an array. These functions must not raise for contexts that `ContextCodec` encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

__all__ = ["MergeConflict", "merge_fields"]

MergeConflict = tuple[Any, str, str]
"""(field, branch, branch): a field, or an index of an array, that two branches changed differently."""

_encode = msgspec.msgpack.Encoder().encode
_map = msgspec.msgpack.Decoder(dict[Any, Raw]).decode
_array = msgspec.msgpack.Decoder(list[Raw]).decode


def merge_fields(base: Raw, branches: Mapping[str, Raw]) -> tuple[Raw, MergeConflict | None]:
    """Return `base` with the changes of each branch, and the first conflict; the first change of a field wins.

    Encoded fields are compared, so that NaN equals NaN. A set may have another order after decoding and encoding, and
    then counts as changed: where that matters, pass contexts in canonical order (`ContextCodec.canonical`).
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
