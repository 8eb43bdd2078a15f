"""`format_traceback`: the traceback of an exception as text, with frames of user code and of the libraries it calls.

The form is that of the interpreter: causes first, then the exception itself, with its notes, and below it the members
of a group. The exceptions belong to the user: their methods may raise, their texts may be huge, and their causes may
form a circle. So each part has a limit, and no step may raise.
"""

from __future__ import annotations

import importlib.util
import linecache
import os
import textwrap
import traceback
from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import TracebackType

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import MAX_ERROR_CHARACTERS, error_text, failure_of, printable
from stageflow_actors.core.tracebacks.table import MAX_TRACEBACK_BYTES, pack_traceback

__all__ = ["failure_with_traceback", "format_traceback"]

MAX_FRAMES = 60
"""Most frames of one exception: half of them the outermost, half the innermost."""
MAX_EXCEPTIONS = 50
"""Most exceptions of one traceback: causes and members of groups."""
MAX_CAUSES = 10
"""Most causes of one exception, the nearest ones."""
MAX_MEMBERS = 15
"""Most members of one group, as in the interpreter's tracebacks."""
MAX_DEPTH = 5
"""Deepest group inside groups."""
MAX_NOTES = 20
MAX_LINE_CHARACTERS = 300
"""Limit of a source line."""


def _directories(*packages: str) -> tuple[str, ...]:
    found = [importlib.util.find_spec(package) for package in packages]
    return tuple(os.path.dirname(one.origin) + os.sep for one in found if one is not None and one.origin is not None)


_OURS = _directories("stageflow_actors", "stageflow_brokers", "pykka")
"""The directories of code between a worker's loop and user code."""

CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"
HEADING = "Traceback (most recent call last):\n"


def failure_with_traceback(error: BaseException) -> Failure:
    """Return the failure for an exception of user code, with its traceback."""
    return failure_of(error, pack_traceback(format_traceback(error)))


def format_traceback(error: BaseException) -> str | None:
    """Return the traceback of an exception, at most `MAX_TRACEBACK_BYTES` of UTF-8; None if no user code raised it."""
    writer = _Writer()
    try:
        text = "".join(writer.chain(error, 0))
    except BaseException:  # noqa: BLE001 - attributes of the exception are user code
        text = f"{HEADING}{''.join(writer.frames(error))}{type(error).__name__}: {error_text(error)}\n"
    return _cut(printable(text).rstrip("\n")) if writer.found_frames else None


class _Writer:
    """Formats one exception with all that belongs to it."""

    def __init__(self) -> None:
        self.found_frames = False
        self._left = MAX_EXCEPTIONS
        self._seen: set[int] = set()

    def chain(self, error: BaseException, depth: int) -> Iterator[str]:
        """Yield the text of an exception after those of its causes."""
        causes: list[tuple[BaseException, str]] = []
        cause: tuple[BaseException, str] | None = (error, "")
        while cause is not None and id(cause[0]) not in self._seen and len(causes) <= MAX_CAUSES and self._left > 0:
            self._seen.add(id(cause[0]))
            self._left -= 1
            causes.append(cause)
            cause = _cause_of(cause[0])
        if not causes:
            yield f"({'it stands above' if self._left > 0 else 'it is left out'})\n"
        elif cause is not None and id(cause[0]) not in self._seen:
            yield f"(earlier causes are left out)\n{cause[1]}"
        for one, link in reversed(causes):
            yield from self._exception(one, depth)
            yield link

    def _exception(self, error: BaseException, depth: int) -> Iterator[str]:
        members = _members_of(error)
        frames = self.frames(error)
        if frames:
            yield f"{'Exception Group ' if members else ''}{HEADING}"
            yield from frames
        yield _last_lines(error)
        for note in _notes_of(error):
            yield f"{note}\n"
        if not members:
            return
        if depth >= MAX_DEPTH:
            yield f"  (its {len(members)} members are left out)\n"
            return
        for number, member in enumerate(members[:MAX_MEMBERS], 1):
            yield f"  +---------------- {number} ----------------\n"
            yield textwrap.indent("".join(self.chain(member, depth + 1)), "  | ", lambda line: True)
        if len(members) > MAX_MEMBERS:
            yield f"  +---------------- (and {len(members) - MAX_MEMBERS} more) ----------------\n"
        yield "  +------------------------------------\n"

    def frames(self, error: BaseException) -> list[str]:
        """Return the lines of the frames of an exception."""
        frames, left_out = _user_frames(error.__traceback__)
        if not frames:
            return []
        self.found_frames = True
        head, tail = (frames, []) if not left_out else (frames[: MAX_FRAMES // 2], frames[MAX_FRAMES // 2 :])
        lines = _lines(head)
        if left_out:
            lines += [f"  ({left_out} frames are left out)\n", *_lines(tail)]
        return lines


def _cause_of(error: BaseException) -> tuple[BaseException, str] | None:
    if isinstance(error.__cause__, BaseException):
        return error.__cause__, CAUSE
    if isinstance(error.__context__, BaseException) and not error.__suppress_context__:
        return error.__context__, CONTEXT
    return None


def _members_of(error: BaseException) -> list[BaseException]:
    return list(error.exceptions) if isinstance(error, BaseExceptionGroup) else []


def _notes_of(error: BaseException) -> list[str]:
    try:
        notes = getattr(error, "__notes__", None)
    except BaseException:  # noqa: BLE001 - it may be a property of the user's class
        return []
    if not isinstance(notes, (list, tuple)):
        return []
    return [note[:MAX_ERROR_CHARACTERS] for note in notes[:MAX_NOTES] if isinstance(note, str)]


def _last_lines(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__", "__mp_main__"):
        name = f"{kind.__module__}.{name}"
    if isinstance(error, SyntaxError) and error.lineno is not None:
        line = "" if error.text is None else f"    {error.text.strip()[:MAX_LINE_CHARACTERS]}\n"
        return f'  File "{error.filename or "<string>"}", line {error.lineno}\n{line}{name}: {error.msg}\n'
    text = error_text(error)
    return f"{name}: {text}\n" if text else f"{name}\n"


def _user_frames(trace: TracebackType | None) -> tuple[list[traceback.FrameSummary], int]:
    """Return the frames that are not ours, and how many are left out in the middle."""
    first: list[TracebackType] = []
    last: deque[TracebackType] = deque(maxlen=MAX_FRAMES // 2)
    count = 0
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_OURS):
            (first if len(first) < MAX_FRAMES // 2 else last).append(trace)
            count += 1
        trace = trace.tb_next
    return [_summary(one) for one in (*first, *last)], max(0, count - MAX_FRAMES)


def _summary(trace: TracebackType) -> traceback.FrameSummary:
    code, number = trace.tb_frame.f_code, trace.tb_lineno
    # For modules that are in no file, such as those of a zip archive.
    linecache.lazycache(code.co_filename, trace.tb_frame.f_globals)
    line = linecache.getline(code.co_filename, number)
    if len(line) > MAX_LINE_CHARACTERS:
        line = f"{line.strip()[:MAX_LINE_CHARACTERS]} …"
        return traceback.FrameSummary(code.co_filename, number, code.co_name, lookup_line=False, line=line)
    at = trace.tb_lasti // 2
    _, end, column, end_column = next(islice(code.co_positions(), at, None), (None, None, None, None))
    return traceback.FrameSummary(
        code.co_filename,
        number,
        code.co_name,
        lookup_line=False,
        line=line,
        end_lineno=end,
        colno=column,
        end_colno=end_column,
    )


def _lines(frames: list[traceback.FrameSummary]) -> list[str]:
    try:
        return traceback.StackSummary.from_list(frames).format()
    except Exception:  # noqa: BLE001 - a source that has changed since may have no such columns
        return [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n' for frame in frames]


def _cut(text: str) -> str:
    data = text.encode()
    if len(data) <= MAX_TRACEBACK_BYTES:
        return text
    head, tail = MAX_TRACEBACK_BYTES // 4, MAX_TRACEBACK_BYTES // 4 * 3 - 64
    left_out = len(data) - head - tail
    begin, end = data[:head].decode(errors="ignore"), data[-tail:].decode(errors="ignore")
    return f"{begin}\n({left_out} bytes are left out)\n{end}"
