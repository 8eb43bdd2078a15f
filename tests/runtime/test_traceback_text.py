"""The text of tracebacks, whatever the exceptions do."""

from __future__ import annotations

import asyncio
import json
import linecache
import time
from collections.abc import Callable
from typing import Any

import pytest

from stageflow_actors.core.tracebacks.table import MAX_TRACEBACK_BYTES
from stageflow_actors.definition.duration import seconds
from stageflow_actors.runtime.worker import traceback_text as module
from stageflow_actors.runtime.worker.traceback_text import format_traceback


def raised(function: Callable[[], Any]) -> BaseException:
    """Return the exception that the function raises."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def text_of(function: Callable[[], Any]) -> str:
    text = format_traceback(raised(function))
    assert text is not None
    return text


def price(order: dict[str, Any]) -> Any:
    return order["price"]


def test_a_traceback_has_file_line_function_source_and_error() -> None:
    text = text_of(lambda: price({}))
    number = price.__code__.co_firstlineno + 1
    assert text.startswith("Traceback (most recent call last):\n")
    assert f'File "{__file__}", line {number}, in price\n    return order["price"]\n' in text
    assert text.endswith("KeyError: 'price'")


def test_a_cause_stands_before_the_error_it_caused() -> None:
    def load() -> None:
        try:
            int("x")
        except ValueError as error:
            raise RuntimeError("could not load") from error

    text = text_of(load)
    assert text.index("invalid literal") < text.index("direct cause of the following") < text.index("could not load")


def test_an_error_during_the_handling_of_another_shows_both() -> None:
    def load() -> None:
        try:
            int("x")
        except ValueError:
            price({})

    text = text_of(load)
    assert text.index("invalid literal") < text.index("During handling of the above") < text.index("KeyError")


def test_a_suppressed_context_is_left_out() -> None:
    def load() -> None:
        try:
            int("x")
        except ValueError:
            raise RuntimeError("could not load") from None

    assert "invalid literal" not in text_of(load)


def test_notes_stand_below_the_error() -> None:
    def load() -> None:
        error = ValueError("boom")
        error.add_note("while reading order 17")
        raise error

    assert text_of(load).endswith("ValueError: boom\nwhile reading order 17")


def test_each_member_of_a_group_has_its_own_traceback() -> None:
    async def charge() -> None:
        raise ConnectionError("bank closed")

    async def ship() -> None:
        price({})

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(charge())
            group.create_task(ship())

    text = text_of(lambda: asyncio.run(both()))
    assert "  | ConnectionError: bank closed\n" in text
    assert "in charge\n" in text
    assert "in price\n" in text
    assert "  | KeyError: 'price'\n" in text


def test_frames_of_this_package_are_left_out_and_those_of_libraries_stay() -> None:
    class Odd(json.JSONEncoder):
        def default(self, o: object) -> object:
            return seconds("no duration", "timeout")  # type: ignore[arg-type]

    text = text_of(lambda: json.dumps({"a": object()}, cls=Odd))
    assert "json/encoder.py" in text
    assert "in default\n" in text
    assert "duration.py" not in text


def test_an_error_that_no_user_code_raised_has_no_traceback() -> None:
    error = ValueError("made and not raised")
    assert format_traceback(error) is None


def test_a_deep_recursion_keeps_both_ends_of_the_stack_and_is_quick() -> None:
    def down(number: int) -> int:
        return up(number + 1)

    def up(number: int) -> int:
        return down(number + 1)

    error = raised(lambda: down(0))
    began = time.process_time()
    text = format_traceback(error)
    assert time.process_time() - began < 1
    assert text is not None
    assert "frames are left out" in text
    assert text.endswith("RecursionError: maximum recursion depth exceeded")
    assert "lambda" in text
    assert len(text.encode()) <= MAX_TRACEBACK_BYTES


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class _NoNotes(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise LookupError("no notes either")


def _circle() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__context__, two.__context__ = two, one
    raise one


def _long_chain() -> None:
    error: Exception | None = None
    for number in range(2_000):
        try:
            raise ValueError(f"number {number}") from error
        except ValueError as raised_now:
            error = raised_now
    assert error is not None
    raise error


def _nested(depth: int) -> Exception:
    return ExceptionGroup(f"depth {depth}", [_nested(depth - 1) for _ in range(15)]) if depth else ValueError("leaf")


def _raise(error: BaseException) -> None:
    raise error


ODD_EXCEPTIONS: dict[str, Callable[[], None]] = {
    "a text that raises": lambda: _raise(_Unprintable()),
    "notes that raise": lambda: _raise(_NoNotes("boom")),
    "a text of 10 MB": lambda: _raise(ValueError("x" * 10_000_000)),
    "a surrogate": lambda: _raise(ValueError("file \udc80")),
    "a circle of causes": _circle,
    "two thousand causes": _long_chain,
    "groups of groups": lambda: _raise(_nested(4)),
    "a group with one member twice": lambda: _raise(ExceptionGroup("twice", [_same := ValueError("a"), _same])),
    "SystemExit": lambda: _raise(SystemExit(3)),
    "a syntax error": lambda: compile("1 +", "typed.py", "exec") and None,
}


@pytest.mark.parametrize("name", ODD_EXCEPTIONS)
def test_no_exception_makes_its_traceback_fail_or_grow_over_the_limit(name: str) -> None:
    text = text_of(ODD_EXCEPTIONS[name])
    data = text.encode()
    assert len(data) <= MAX_TRACEBACK_BYTES
    assert "test_traceback_text.py" in text


def test_a_long_traceback_loses_its_middle() -> None:
    def load() -> None:
        error = ValueError("boom")
        for number in range(20):
            error.add_note(f"note {number} {'ä' * 1_900}")
        raise error

    text = text_of(load)
    assert len(text.encode()) <= MAX_TRACEBACK_BYTES
    assert text.startswith("Traceback")
    assert "bytes are left out)" in text
    assert "ValueError: boom\nnote 0" in text


def test_a_source_line_of_a_megabyte_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"value = [1][{'  ' * 500_000}2]\n"
    monkeypatch.setitem(linecache.cache, "made.py", (len(source), None, [source], "made.py"))
    text = text_of(lambda: exec(compile(source, "made.py", "exec"), {}))
    assert 'File "made.py", line 1' in text
    assert len(text) < 2_000


def test_a_file_that_is_gone_leaves_file_and_line() -> None:
    text = text_of(lambda: exec(compile("\n\n1 / 0\n", "/nowhere/gone.py", "exec"), {}))
    assert 'File "/nowhere/gone.py", line 3, in <module>\nZeroDivisionError' in text


def test_the_last_fallback_still_has_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_last_lines", lambda error: 1 / 0)
    text = text_of(lambda: price({}))
    assert "in price\n" in text
    assert text.endswith("KeyError: 'price'")
