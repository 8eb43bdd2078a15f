"""`Failure` values: from an exception to the bytes attached to a message, and to the exception for a retry policy.

An exception itself must never cross a process boundary: its type may not exist in the other process, and the runtime
unpickles nothing that it received. `exception_of` makes the exception that a policy receives for a death or timeout.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import structs

from stageflow_actors.core.envelope import Failure, encode
from stageflow_actors.errors import StageError, StageFlowError, StageTimeout, WorkerDied

__all__ = [
    "EXPIRED",
    "STDERR_HEADING",
    "UNCERTAIN_MARK",
    "UNDECIDED",
    "AttemptCancelled",
    "describe_error",
    "error_text",
    "exception_of",
    "failure_of",
    "fatal_traceback",
    "is_uncertain",
    "last_lines",
    "printable",
    "read_failure",
    "shorten_failure",
    "traceback_of",
    "undecided_failure",
    "write_failure",
]

EXPIRED = b"expired"
"""The bytes that the broker attaches to a message that exceeded its ttl."""

UNDECIDED = "undecided"
"""Kind of a failure whose retry policy did not return. It is final: otherwise the policy would be called forever."""

STDERR_HEADING = "; the last on its stderr:\n"
"""Precedes the last lines of a worker's stderr in the message of its death."""

UNCERTAIN_MARK = ":uncertain"
"""The step that marks a message of which an attempt has ended with its effect unknown."""

MAX_ERROR_CHARACTERS = 2_000
"""Limit of an exception's text: it is sent with each following message of the instance."""

_decode = msgspec.msgpack.Decoder(Failure).decode


def error_text(error: BaseException) -> str:
    """Return the text of an exception, whatever its `__str__` does, as far as the limit allows."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - __str__ is user code: it may even raise SystemExit
        text = "(str() failed)"
    text = printable(text[: MAX_ERROR_CHARACTERS + 1])
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + " …"


def printable(text: str) -> str:
    """Return the text as UTF-8 can encode it: undecodable file names contain lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def describe_error(error: BaseException) -> str:
    """Return `ValueError: no address`, as the last line of a traceback."""
    text = error_text(error)
    name = type(error).__name__
    return f"{name}: {text}" if text else name


class AttemptCancelled(StageError):
    """The reason with which the runtime cancels an async handler, because its instance is cancelled."""

    def __init__(self) -> None:
        super().__init__("the instance was cancelled")


def is_uncertain(failure: Failure | None) -> bool:
    """Return True if the attempt ended with its effect unknown: by its timeout, its worker's death, or a cancel."""
    return failure is not None and (
        failure.kind in ("timeout", "died", "cancelled") or failure.error_type in ("StageTimeout", "WorkerDied")
    )


def failure_of(error: BaseException, traceback: bytes | None = None) -> Failure:
    """Return the failure for an exception of a handler; `traceback` is packed."""
    retryable = error.retryable if isinstance(error, StageError) else None
    if isinstance(error, AttemptCancelled):
        return Failure("cancelled", f"StageError: {error}", "StageError", retryable, traceback)
    kind = "timeout" if isinstance(error, StageTimeout) else "exception"
    return Failure(kind, describe_error(error), type(error).__name__, retryable, traceback)


def read_failure(data: bytes | None) -> Failure | None:
    """Return the failure attached to a message, or None. Raises `msgspec.MsgspecError` for damaged data."""
    if data is None:
        return None
    if data == EXPIRED:
        return Failure("expired", "StageError: the message waited in its queue for longer than its ttl", "StageError")
    return _decode(data)


def traceback_of(data: bytes | None) -> bytes | None:
    """Return the packed traceback of the failure attached to a message, or None."""
    try:
        failure = read_failure(data)
    except msgspec.MsgspecError:
        return None
    return None if failure is None else failure.traceback


def write_failure(failure: Failure) -> bytes:
    """Return the failure as bytes to attach to a message."""
    return encode(failure)


def shorten_failure(failure: Failure, size: int) -> bytes:
    """Return the failure as at most `size` bytes (at least 200): without stderr, and truncated if necessary."""
    text = failure.message.partition(STDERR_HEADING)[0]
    data = encode(Failure(failure.kind, text, failure.error_type, failure.retryable))
    if len(data) <= size:
        return data
    error_type = failure.error_type[:20]
    spare = size - len(encode(Failure(failure.kind, "", error_type, failure.retryable))) - 8
    text = text.encode()[: max(0, spare)].decode(errors="ignore") + " …"
    return encode(Failure(failure.kind, text, error_type, failure.retryable))


def undecided_failure(asked: bytes, how: str) -> Failure | None:
    """Return the failure in `asked` as final, because its retry policy did not answer; None if it holds no failure.

    `asked` comes from `shorten_failure`; `how` is the reason, as a verb phrase: "ran longer than 1 s".
    """
    try:
        failure = _decode(asked)
    except msgspec.MsgspecError:
        return None
    text = f"{failure.message} (and its retry policy {how})"
    return structs.replace(failure, kind=UNDECIDED, message=text)


def exception_of(failure: Failure) -> Exception:
    """Return the exception for a failure, for a retry policy and `ctx.previous_failure`."""
    message = failure.message
    prefix = f"{failure.error_type}: "
    text = message.removeprefix(prefix)
    if failure.kind == "timeout":
        return StageTimeout(text)
    if failure.kind == "died":
        return WorkerDied(text)
    if failure.kind == "expired":
        return StageError(text, retryable=False)
    if failure.error_type == "StageError":
        return StageError(text, retryable=bool(failure.retryable))
    return StageFlowError(message)


MAX_STDERR_LINES = 5
MAX_STDERR_LINE_CHARACTERS = 200
MAX_FATAL_LINES = 60

FATAL_ERROR_PREFIX = "Fatal Python error: "
"""Start of the interpreter's fatal error message; a traceback follows, most recent call first."""

_OURS = re.compile(r'^ *File ".*/(stageflow_actors/(runtime|definition)|stageflow_brokers/zeromq)/[a-z_/]+\.py", line ')
"""Frames between the worker's loop and a handler: they do not help to find the error."""
_HEADINGS = ("Extension modules:", "Current thread 0x", "Stack (most recent call first)")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


def last_lines(written: bytes) -> str:
    """Return the lines of a worker's stderr for the message of its death; `written` is the end of the stream.

    After a fatal error of the interpreter these are its message and the first frames of user code, else the last lines.
    """
    fatal = _fatal_error(written)
    lines = fatal or _lines(written.decode(errors="backslashreplace"))[-MAX_STDERR_LINES:]
    return "\n".join(lines[:MAX_STDERR_LINES])


def fatal_traceback(written: bytes) -> str | None:
    """Return a fatal error of the interpreter with its frames of user code, most recent call first; or None."""
    return "\n".join(_fatal_error(written)[:MAX_FATAL_LINES]) or None


def _fatal_error(written: bytes) -> list[str]:
    text = written.decode(errors="backslashreplace")
    at = text.rfind(FATAL_ERROR_PREFIX)
    if at < 0:
        return []
    return [line for line in _lines(text[at:]) if not line.startswith(_HEADINGS) and not _OURS.match(line)]


def _lines(text: str) -> list[str]:
    text = _CONTROL.sub("", text.replace("\r", "\n"))
    return [line.rstrip()[:MAX_STDERR_LINE_CHARACTERS] for line in text.splitlines() if line.strip()]
