"""The bytes of an input: of a file, a pipe or stdin, decompressed if they are gzip.

The first bytes can be looked at before they are read, because a pipe can be read only once. The bytes are never in
memory as a whole.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import zlib
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

import click

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["HEAD_BYTES", "Damaged", "Source", "is_regular", "open_source"]

HEAD_BYTES = 256 << 10
"""Bytes that are looked at, at most, to recognise what an input is."""

_CHUNK_BYTES = 256 << 10
_GZIP = b"\x1f\x8b"


class Damaged(OSError):
    """Compressed data that end too early or were changed; the message says which."""


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Source(io.RawIOBase):
    """Bytes to be read once, of which the first ones, `head`, can be looked at before."""

    def __init__(self, file: _Readable, *, owned: bool = True, compressed: bool = False) -> None:
        self._file = file
        self._owned = owned
        self._failed: Damaged | None = None
        self.head = b""
        self.ended = False
        self.compressed = compressed

    def look(self, size: int = HEAD_BYTES) -> bool:
        """Read more of the head, and return True. False at the end, at damage, or if `size` bytes are there already."""
        if self.ended or self._failed is not None or len(self.head) >= size:
            return False
        try:
            chunk = self._file.read1(size - len(self.head))
        except Damaged as error:
            self._failed = error  # the reader has to get what comes before the damage first
            return False
        self.head += chunk
        self.ended = not chunk
        return bool(chunk)

    @property
    def damage(self) -> Damaged | None:
        """The damage that ends the head, if any."""
        return self._failed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        if self.head:
            chunk, self.head = self.head[: len(view)], self.head[len(view) :]
        elif self._failed is not None:
            raise self._failed
        elif self.ended:
            return 0
        else:
            chunk = self._file.read1(len(view))
        view[: len(chunk)] = chunk
        return len(chunk)

    def buffered(self) -> io.BufferedReader:
        """Return a reader of all bytes, the head included."""
        return io.BufferedReader(self, _CHUNK_BYTES)

    def close(self) -> None:
        if self._owned and not self.closed:
            self._file.close()
        super().close()


class _Gunzip:
    """Decompresses, and raises `Damaged` for what cannot be decompressed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file = gzip.GzipFile(fileobj=source.buffered())

    def read1(self, size: int, /) -> bytes:
        try:
            return self._file.read1(size)
        except EOFError:
            raise Damaged("the gzip data are truncated") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise Damaged(f"the gzip data are damaged ({error})") from None

    def close(self) -> None:
        self._source.close()


def open_source(path: str) -> Source:
    """Open an input; `-` is stdin. Raises `click.UsageError` for one that cannot be opened."""
    if path == "-":
        if sys.stdin is None:
            raise click.UsageError("--input - is standard input, and it is closed")
        source = Source(cast("_Readable", sys.stdin.buffer), owned=False)
    else:
        try:
            file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed with the source
        except OSError as error:
            raise click.UsageError(f"{path} cannot be read: {error.strerror}") from None
        source = Source(cast("_Readable", file))
    while len(source.head) < len(_GZIP) and source.look():
        pass
    return Source(_Gunzip(source), compressed=True) if source.head.startswith(_GZIP) else source


def is_regular(path: str) -> bool:
    """True if `path` can be read twice, which a pipe cannot. Opening it reports a path that does not exist."""
    try:
        return path != "-" and stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
