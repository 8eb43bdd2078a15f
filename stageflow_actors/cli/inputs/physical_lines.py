"""Splits an input into its lines, each of bounded length: a file without line ends must not fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import BufferedReader

__all__ = ["physical_lines"]

_CHUNK_BYTES = 256 << 10


def physical_lines(file: BufferedReader, ending: bytes, limit: int) -> Iterator[bytes]:
    """Yield each line with its end. A line of more than `limit` bytes is dropped, and b"" takes its place."""
    if ending == b"\r":
        yield from _of_old_macintosh(file, limit)
        return
    while line := file.readline(limit):
        if len(line) < limit or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit)
        yield b""


def _of_old_macintosh(file: BufferedReader, limit: int) -> Iterator[bytes]:
    rest, long = b"", False
    while chunk := file.read1(_CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\r")
        for line in lines:
            yield b"" if long or len(line) > limit else line + b"\n"
            long = False
        if len(rest) > limit:
            rest, long = b"", True
    if rest or long:
        yield b"" if long else rest
