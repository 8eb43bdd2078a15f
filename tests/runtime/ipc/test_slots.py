"""A slot shows the message in work, never with the start time of another one."""

from __future__ import annotations

import os

import pytest

from stageflow_actors.runtime.ipc.slots import LIFE_BYTES, POLICY_TEXT_BYTES, SLOT_BYTES, Slot, SlotTable


def test_a_slot_shows_what_is_running_and_since_when() -> None:
    table = SlotTable.create(4)
    slot = table[3]
    assert not slot.read().is_busy
    slot.begin(77, 5_000, 1_000)
    state = slot.read()
    assert (state.message_id, state.since_ns, state.timeout_ns) == (77, 1_000, 5_000)
    assert (state.started, state.finished, state.is_busy) == (1, 0, True)
    assert not state.is_overdue(6_000)
    assert state.is_overdue(6_001)
    slot.end()
    state = slot.read()
    assert (state.is_busy, state.started, state.finished) == (False, 1, 1)
    assert not state.is_overdue(10**18)
    assert table[2].read().started == 0
    table.close()


def test_without_a_timeout_nothing_is_ever_overdue() -> None:
    table = SlotTable.create(1)
    table[0].begin(1, 10, 1)
    table[0].end()
    table[0].begin(2, 0, 1)
    assert not table[0].read().is_overdue(10**18)
    table.close()


def test_both_ends_see_the_same_memory() -> None:
    table = SlotTable.create(2)
    other = SlotTable.attach(os.dup(table.fd), 2)
    table[1].begin(5, 0, 9)
    assert other[1].read().message_id == 5
    assert os.fstat(table.fd).st_size == 2 * (SLOT_BYTES + POLICY_TEXT_BYTES + LIFE_BYTES)
    table[1].begin_policy(b"why", 0, 9)
    assert other[1].read().policy_failure == b"why"
    other[1].cancel(5)
    assert table[1].is_cancelled()
    assert table[1].read().cancelled
    other.close()
    table.close()


def test_a_late_cancel_does_not_reach_the_next_message() -> None:
    table = SlotTable.create(1)
    slot = table[0]
    slot.begin(5, 0, 1)
    slot.end()
    slot.cancel(5)
    assert not slot.is_cancelled()
    slot.begin(6, 0, 2)
    assert not slot.is_cancelled()
    assert not slot.read().cancelled
    slot.end()
    slot.begin(5, 0, 3)
    assert slot.is_cancelled()
    table.close()


def test_a_cleared_slot_is_as_new() -> None:
    table = SlotTable.create(1)
    fresh = table[0].read()
    table[0].begin(5, 3, 1)
    table[0].cancel(5)
    table[0].clear()
    assert table[0].read() == fresh
    table[0].begin(6, 3, 1)
    assert table[0].read().timeout_ns == 3
    table.close()


def test_while_a_policy_decides_the_slot_names_the_message_and_its_time_restarts() -> None:
    table = SlotTable.create(2)
    slot = table[0]
    slot.set_grace(1_000)
    slot.begin(7, 50, 1)
    assert not slot.read().is_overdue(1_051), "the worker has a grace, in which it ends its handler"
    slot.begin_policy(b"ValueError: x", 60, 100)
    state = slot.read()
    assert (state.message_id, state.since_ns, state.timeout_ns, state.policy_failure) == (7, 100, 60, b"ValueError: x")
    assert (state.started, state.is_overdue(160), state.is_overdue(161)) == (1, False, True), "and nobody ends a policy"
    assert table[1].read().policy_failure == b""
    slot.set_timeout(0, 200)
    assert (slot.read().since_ns, slot.read().is_overdue(10**18)) == (200, False)
    slot.end_policy()
    assert (slot.read().policy_failure, slot.read().is_busy) == (b"", True)
    slot.begin_policy(b"x" * 5_000, 60, 100)
    assert slot.read().policy_failure == b"x" * (POLICY_TEXT_BYTES - 2), "no more than there is room for"
    slot.clear()
    slot.begin(8, 0, 1)
    assert slot.read().policy_failure == b""
    table.close()


def test_a_worker_that_dies_within_begin_looks_idle() -> None:
    table = SlotTable.create(1)
    table[0].begin(5, 0, 1)
    with pytest.raises(TypeError):
        table[0].begin(6, 0, "not a number")  # type: ignore[arg-type]  # stops it after all cells but the last
    state = table[0].read()
    assert not state.is_busy
    table.close()


class Interrupted:
    """Cells that let the worker go on to its next message just before the n-th read."""

    def __init__(self, slot: Slot, cells: memoryview, turn: int) -> None:
        self.slot, self.cells, self.turn = slot, cells, turn

    def __getitem__(self, index: int) -> int:
        self.turn -= 1
        if self.turn == 0:
            self.slot.end()
            self.slot.begin(2, 2, 2)
        return int(self.cells[index])


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_reader_never_sees_a_message_with_the_start_of_another(turn: int) -> None:
    table = SlotTable.create(1)
    table[0].begin(1, 1, 1)
    state = Slot(Interrupted(table[0], table[0]._cells, turn + 2)).read()  # type: ignore[arg-type]
    assert state.message_id == state.since_ns == state.timeout_ns == state.started
    table.close()


def test_a_closed_table_is_closed() -> None:
    table = SlotTable.create(1)
    slot = table[0]
    table.close()
    with pytest.raises(ValueError, match="released"):
        slot.begin(1, 0, 1)
    assert len(table) == 0


def test_a_slot_that_is_opened_again_writes_a_time_limit_that_was_cleared() -> None:
    node = SlotTable.create(1)
    zygote = SlotTable.attach(os.dup(node.fd), 1)
    node[0].begin(1, 500, 9)
    assert zygote[0].read().timeout_ns == 500
    node[0].clear()
    zygote.open_again(0).begin(2, 500, 9)
    assert node[0].read().timeout_ns == 500
    node.close()
    zygote.close()


def test_a_slot_shows_the_turn_of_a_coroutine_while_its_message_is_in_work() -> None:
    table = SlotTable.create(1)
    slot = table[0]
    slot.begin(5, 1_000, 10)
    assert slot.time_limit(110) == (1_000, 900)
    slot.begin_turn(20)
    assert slot.read().turn_since_ns == 20
    slot.excuse(500)
    assert (slot.read().since_ns, slot.time_limit(110)) == (510, (1_000, 1_400))
    slot.end()
    assert slot.read().turn_since_ns == 0
    slot.excuse(500)
    assert not slot.read().is_busy, "no message is in work that could be excused"
    slot.begin(6, 0, 30)
    slot.end_turn()
    assert (slot.read().turn_since_ns, slot.time_limit(40)) == (0, None)
    table.close()


def test_the_life_of_a_worker_is_shown_and_ends_with_it() -> None:
    table = SlotTable.create(2)
    other = SlotTable.attach(os.dup(table.fd), 2)
    worker, node = table[1], other[1]
    assert (node.is_ready, node.ending_since_ns, node.step) == (False, 0, "")
    worker.mark_ready()
    worker.begin_end(1_000_000_000_001)
    worker.set_step("the close of service 'bank'")
    assert (node.is_ready, node.ending_since_ns) == (True, 1_000_000_000_001)
    assert node.step == "the close of service 'bank'"
    worker.set_step("an atexit function")
    assert node.step == "an atexit function"
    worker.set_step("é" * LIFE_BYTES)
    assert 0 < len(node.step) < LIFE_BYTES
    assert (other[0].is_ready, other[0].ending_since_ns, other[0].step) == (False, 0, "")
    node.clear()
    assert (worker.is_ready, worker.ending_since_ns, worker.step) == (False, 0, "")
    other.close()
    table.close()
