"""Failures as values: from an exception to what travels with a message, and back to what a policy is asked about.

An exception never crosses a process boundary itself: its type may not exist on the other side, and unpickling is not
done. What a policy sees of a death or a timeout is made anew here.
"""

from __future__ import annotations

import re

import msgspec

from stageflow_actors.core.envelope import Failure, encode
from stageflow_actors.errors import StageError, StageFlowError, StageTimeout, WorkerDied

__all__ = [
    "EXPIRED",
    "STDERR_HEADING",
    "UNDECIDED",
    "describe_error",
    "exception_of",
    "failure_of",
    "last_lines",
    "read_failure",
    "shorten_failure",
    "undecided_failure",
    "write_failure",
]

EXPIRED = b"expired"
"""What the broker attaches to a message that waited longer than its ttl."""

UNDECIDED = "undecided"
"""Kind of a failure about which a policy was asked that did not answer: it is final, or it would be asked for ever."""

STDERR_HEADING = "; the last on its stderr:\n"
"""What comes before the last lines of a worker, in the text of how it ended."""

MAX_ERROR_CHARACTERS = 2_000
"""Characters of an exception's text that are kept: an error is read by people, and travels with every hop."""

_decode = msgspec.msgpack.Decoder(Failure).decode


def describe_error(error: BaseException) -> str:
    """`ValueError: boom failed`, the way a traceback ends."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - a __str__ of the user's may do anything, and leaving is no exception to that
        text = "(its text cannot be made)"
    # Undecodable file names come as lone surrogates, which no encoder takes.
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) > MAX_ERROR_CHARACTERS:
        text = text[:MAX_ERROR_CHARACTERS] + " …"
    if not text.isascii():
        # Names of files may hold bytes that are no text, and have no form in a message.
        text = text.encode(errors="backslashreplace").decode()
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def failure_of(error: BaseException) -> Failure:
    """The failure that an exception of a handler is."""
    retryable = error.retryable if isinstance(error, StageError) else None
    kind = "timeout" if isinstance(error, StageTimeout) else "exception"
    return Failure(kind, describe_error(error), type(error).__name__, retryable)


def read_failure(data: bytes | None) -> Failure | None:
    """The failure attached to a message, if there is one."""
    if data is None:
        return None
    if data == EXPIRED:
        return Failure("expired", "StageError: the message waited in its queue for longer than its ttl", "StageError")
    return _decode(data)


def write_failure(failure: Failure) -> bytes:
    """The failure as it is attached to a message."""
    return encode(failure)


def shorten_failure(failure: Failure, size: int) -> bytes:
    """The failure in `size` bytes (from 200), as it is attached to a message: without what a worker has written, and
    cut short if need be."""
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
    return Failure(UNDECIDED, text, failure.error_type, failure.retryable)


def exception_of(failure: Failure) -> Exception:
    """What a retry policy, or a later attempt's `ctx.previous_failure`, is given for a failure."""
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

FATAL_ERROR_PREFIX = "Fatal Python error: "
"""How the interpreter begins its last words; its traceback, most recent call first, follows."""

_OURS = re.compile(r'^ *File ".*/(stageflow_actors/(runtime|definition)|stageflow_brokers/zeromq)/[a-z_/]+\.py", line ')
"""Frames between the worker's loop and a handler, which tell nobody anything."""
_HEADINGS = ("Extension modules:", "Current thread 0x", "Stack (most recent call first)")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


def last_lines(written: bytes) -> str:
    """What a worker wrote to stderr, of which this is the end, as it is told with its death: a few lines, or ""."""
    text = _CONTROL.sub("", written.decode(errors="backslashreplace").replace("\r", "\n"))
    fatal = text.rfind(FATAL_ERROR_PREFIX)
    lines = [line.rstrip()[:MAX_STDERR_LINE_CHARACTERS] for line in text[max(fatal, 0) :].splitlines() if line.strip()]
    if fatal < 0:
        return "\n".join(lines[-MAX_STDERR_LINES:])
    own = [line for line in lines if not line.startswith(_HEADINGS) and not _OURS.match(line)]
    return "\n".join(own[:MAX_STDERR_LINES])
