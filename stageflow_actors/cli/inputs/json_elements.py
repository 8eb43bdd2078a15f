"""The elements of a JSON array, or JSON values one after the other, each as its text and with its place.

Only one element is in memory, and it is not interpreted: the scanner of `json` finds its end.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BrokenJson", "Element", "elements"]

_CHUNK_BYTES = 64 << 10

_SPACE = " \t\r\n"

_LONGEST_WORD = 16
"""Characters of the longest token, strings and numbers apart, that may be cut at the end of what was read."""

_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


class Element(NamedTuple):
    """`number` counts from 1; `line` is the line on which the text begins."""

    number: int
    line: int
    text: bytes


class BrokenJson(ValueError):
    """JSON that cannot be read any further: `number` is the element that it breaks in or before."""

    def __init__(self, reason: str, number: int, *, at_end: bool) -> None:
        super().__init__(reason)
        self.number = number
        self.at_end = at_end
        """True if more text might have completed it."""


def elements(
    read: Callable[[int], bytes], *, array: bool, limit: int, old_line_ends: bool = False
) -> Iterator[Element]:
    """Yield the elements of an array, or the values one after the other. Raises `BrokenJson` where they end wrongly.

    `read` returns up to that many bytes, none at the end. `limit`: characters of an element, at most.
    """
    return _Elements(read, limit, "\r" if old_line_ends else "\n").each(array=array)


class _Elements:
    def __init__(self, read: Callable[[int], bytes], limit: int, newline: str) -> None:
        self._read = read
        self._limit = limit
        self._newline = newline
        # Bytes that are not UTF-8 are kept: they concern the element that they are in, not the others.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._text = ""
        self._at = 0
        self._ended = False
        self._line = 1
        self._column = 1
        self._counted = 0
        self._number = 0

    def each(self, *, array: bool) -> Iterator[Element]:
        if array:
            self._expect("[", "an array begins with [")
            if self._next() == "]":
                self._at += 1
                self._expect_end()
                return
        elif self._next() == "":
            return
        while True:
            self._number += 1
            if self._next() == "":
                raise self._broken("the text ends before the array does", at_end=True)
            line = self._place(self._at)[0]
            end = self._end_of_value()
            text = self._text[self._at : end].encode("utf-8", "surrogateescape")
            self._at = end
            yield Element(self._number, line, text)
            following = self._next()
            if following == ",":
                self._at += 1
            elif array and following == "]":
                self._at += 1
                self._expect_end()
                return
            elif array:
                self._number += 1
                what = "the text ends before the array does" if following == "" else "expecting ',' or ']'"
                raise self._broken(what, at_end=following == "")
            if not array and self._next() == "":
                return

    def _end_of_value(self) -> int:
        while True:
            try:
                _, end = _SCANNER.raw_decode(self._text, self._at)
            except RecursionError:
                raise self._broken("is nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if self._ended and error.pos >= len(self._text.rstrip()):
                    raise self._broken("the text ends before the value does", error.pos, at_end=True) from None
                if self._ended or not cut:
                    raise self._broken(error.msg.lower(), error.pos, at_end=cut) from None
            else:
                # A number may go on behind what was read.
                if end < len(self._text) or self._ended or self._text[self._at] in '{["':
                    return end
            if len(self._text) - self._at > self._limit:
                raise self._broken(f"is longer than {self._limit:,} characters")
            self._more()

    def _next(self) -> str:
        """Return the next character that is no space, without taking it; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more()

    def _more(self) -> None:
        self._place(self._at)
        self._text = self._text[self._at :]
        self._at = self._counted = 0
        # As much again as there is: a long element is scanned a few times only.
        chunk = self._read(max(_CHUNK_BYTES, len(self._text)))
        self._ended = not chunk
        self._text += self._decoder.decode(chunk, final=self._ended)

    def _place(self, at: int) -> tuple[int, int]:
        """Return line and column of a character, which must not lie before the last one asked for."""
        passed = self._text.count(self._newline, self._counted, at)
        if passed:
            self._line += passed
            self._column = at - self._text.rindex(self._newline, self._counted, at)
        else:
            self._column += at - self._counted
        self._counted = at
        return self._line, self._column

    def _expect(self, character: str, reason: str) -> None:
        if self._next() != character:
            raise self._broken(reason)
        self._at += 1

    def _expect_end(self) -> None:
        if self._next() != "":
            self._number += 1
            raise self._broken("the array has ended, and more text follows")

    def _broken(self, reason: str, at: int | None = None, *, at_end: bool = False) -> BrokenJson:
        line, column = self._place(self._at if at is None else max(at, self._counted))
        return BrokenJson(f"{reason} (line {line}, column {column})", self._number, at_end=at_end)
