"""The table in which the tracebacks of an instance travel."""

from __future__ import annotations

import pytest

from stageflow_actors.core.tracebacks.table import (
    MAX_TABLE_BYTES,
    compensation_place,
    merge_tracebacks,
    pack_traceback,
    read_traceback,
    read_tracebacks,
    with_traceback,
)


def test_equal_tracebacks_are_stored_once() -> None:
    packed = pack_traceback("Traceback …\nValueError: boom")
    table = with_traceback(with_traceback(None, "one", packed), "two", packed)
    assert read_tracebacks(table) == dict.fromkeys(("one", "two"), "Traceback …\nValueError: boom")
    assert packed is not None
    assert table is not None
    assert table.count(packed) == 1


def test_a_place_has_the_traceback_of_its_last_failed_attempt() -> None:
    first, second = pack_traceback("first"), pack_traceback("second")
    table = with_traceback(with_traceback(None, "pay", first), "pay", second)
    assert read_tracebacks(table) == {"pay": "second"}
    assert with_traceback(table, "pay", None) is None


def test_a_compensation_has_a_place_of_its_own() -> None:
    table = with_traceback(
        with_traceback(None, "pay", pack_traceback("a")), compensation_place("pay"), pack_traceback("b")
    )
    assert read_tracebacks(table) == {"pay": "a", compensation_place("pay"): "b"}


def test_tables_of_branches_are_merged() -> None:
    base = with_traceback(None, "load", pack_traceback("load"))
    one = with_traceback(base, "left", pack_traceback("left"))
    other = with_traceback(base, "right", pack_traceback("right"))
    merged = merge_tracebacks(merge_tracebacks(base, one), other)
    assert read_tracebacks(merged) == {name: name for name in ("load", "left", "right")}


def test_a_full_table_drops_the_tracebacks_kept_first() -> None:
    table = None
    for number in range(MAX_TABLE_BYTES // 1_000 + 10):
        table = with_traceback(table, f"stage-{number}", bytes([number % 251]) + number.to_bytes(4, "big") * 250)
    assert table is not None
    assert len(table) < MAX_TABLE_BYTES + 20_000
    assert "stage-0" not in read_tracebacks(table)


@pytest.mark.parametrize("damaged", [b"", b"\x00", b"\xc1", b"\x91\x92\xc4\x01x\x91\xa1a"])
def test_a_damaged_table_is_read_without_an_error(damaged: bytes) -> None:
    assert set(read_tracebacks(damaged)) <= {"a"}
    assert read_tracebacks(with_traceback(damaged, "pay", pack_traceback("new")))["pay"] == "new"


def test_a_damaged_traceback_says_so() -> None:
    assert str(read_traceback(b"not compressed")).startswith("(the traceback cannot be read:")
