"""The stderr of workers reaches the program's stderr completely and blocks no process."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stageflow_actors import Runtime, Workflow
from stageflow_actors.runtime.ipc.output_frames import DROPPED_OUTPUT, STDERR, FrameReader
from stageflow_actors.runtime.node.output_relay import CHUNK_BYTES, MAX_ORPHANED_PIPES, OutputRelay
from stageflow_actors.runtime.node.program_channel import ProgramChannel

Row = dict[str, Any]

LINES = 50_000


def write_lines(context: Row) -> None:
    for n in range(LINES):
        print(f"line {context['n']} {n:06d}", "." * 80, file=sys.stderr)


def write_heaps(context: Row) -> None:
    heap = b"".join(b"heap %d %06d" % (context["n"], n) + b"." * 80 + b"\n" for n in range(LINES))
    left = memoryview(heap)
    while left:
        left = left[os.write(2, left) :]


def nothing(context: Row) -> None:
    pass


lines: Workflow[Row] = Workflow("lines").add_stage(write_lines)
heaps: Workflow[Row] = Workflow("heaps").add_stage(write_heaps)
quiet: Workflow[Row] = Workflow("quiet").add_stage(nothing)


def test_ten_megabytes_on_stderr_arrive_line_by_line_and_take_neither_memory_nor_time_from_others(
    tmp_path: Path, others_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(lines, heaps, quiet, data_dir=tmp_path / "data")
    file = (tmp_path / "stderr").open("w")
    monkeypatch.setattr(sys, "stderr", file)
    runtime.start()
    others = others_of(runtime, quiet)
    try:
        before = psutil.Process(runtime.node_pid).memory_info().rss
        with others.go_on():
            instances = runtime.submit_many(lines, [{"n": n} for n in range(2)])
            instances += runtime.submit_many(heaps, [{"n": n} for n in range(2)])
            assert all(instance.result(timeout=60).success for instance in instances)
        after = psutil.Process(runtime.node_pid).memory_info().rss
    finally:
        others.stop()
        runtime.stop(grace=0.0)
        file.close()
    written = (tmp_path / "stderr").read_text().splitlines()
    assert len((tmp_path / "stderr").read_bytes()) > 10_000_000
    assert {len(line) for line in written} == {len("line 0 000000") + 1 + 80, len("heap 0 000000") + 80}
    for kind in ("line 0", "line 1", "heap 0", "heap 1"):
        numbers = [int(line[7:13]) for line in written if line.startswith(kind)]
        assert numbers == list(range(LINES)), f"{kind}: all of them, in their order"
    assert after - before < 30_000_000, f"the node grew by {after - before} bytes"


class Program:
    """The program's end of the connection that a relay sends to, and all output read from it."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.channel = ProgramChannel(theirs)
        self.ours.setblocking(False)
        self.read = b""
        self.dropped = 0
        self._frames = FrameReader()

    def has(self, text: bytes) -> bool:
        try:
            for kind, data in self._frames.feed(self.ours.recv(1 << 20)):
                if kind == STDERR:
                    self.read += data
                elif kind == DROPPED_OUTPUT:
                    self.dropped += int(data)
        except BlockingIOError:
            pass
        return text in self.read


@pytest.fixture
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program.ours.close()
    program.channel.close()


@pytest.fixture
def relay(program: Program) -> Iterator[OutputRelay]:
    relay = OutputRelay(program.channel)
    yield relay
    relay.close(timeout=5.0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_a_worker_wrote_last_is_known_when_it_has_ended_and_still_passed_on(
    relay: OutputRelay, program: Program, eventually: Callable[..., Any]
) -> None:
    stderr, theirs = relay.open()
    os.write(theirs, b"one\n")
    eventually(lambda: program.has(b"one\n"), "a line at once")
    os.write(theirs, b"two\nwithout an end")
    os.close(theirs)
    assert stderr.finish() == b"one\ntwo\nwithout an end"
    eventually(lambda: program.has(b"two\nwithout an end"), "the rest")


def test_reading_the_last_stderr_lines_does_not_wait_for_a_program_that_does_not_read_its_stderr(
    relay: OutputRelay, program: Program, eventually: Callable[..., Any]
) -> None:
    loud, theirs = relay.open()
    os.set_blocking(theirs, False)
    eventually(lambda: (fill(theirs), program.channel.has_backlog)[1], "a program's connection that is full")
    silent, own = relay.open()
    os.write(own, b"the last words of another\n")
    os.close(own)
    os.close(theirs)
    assert silent.finish() == b"the last words of another\n"
    assert loud.finish().endswith(b"x" * 1000)
    eventually(lambda: program.has(b"the last words of another\n"), "everything, once somebody reads")


def fill(fd: int) -> bool:
    try:
        os.write(fd, b"x" * CHUNK_BYTES)
    except BlockingIOError:
        return True
    return False


def test_a_program_without_stderr_holds_up_no_worker(relay: OutputRelay, program: Program) -> None:
    program.ours.close()
    stderr, theirs = relay.open()
    for _ in range(50):
        os.write(theirs, b"x" * CHUNK_BYTES)  # would wait forever without a reader
    os.close(theirs)
    assert stderr.finish().endswith(b"x")


def test_output_that_a_worker_has_left_behind_is_relayed_too_with_a_bounded_number_of_descriptors(
    relay: OutputRelay, program: Program, eventually: Callable[..., Any]
) -> None:
    before = descriptors()
    left: list[int] = []
    for _ in range(2 * MAX_ORPHANED_PIPES):
        stderr, theirs = relay.open()
        left.append(theirs)  # as a child has it that has outlived its worker
        stderr.finish()
    eventually(lambda: descriptors() <= before + len(left) + MAX_ORPHANED_PIPES, "the oldest ends closed")
    with pytest.raises(BrokenPipeError):
        os.write(left[0], b"nobody hears this\n")
    os.write(left[-1], b"I am still here\n")
    eventually(lambda: program.has(b"I am still here\n"), "what it wrote")
    for fd in left:
        os.close(fd)
    eventually(lambda: descriptors() == before, "all ends closed")


def test_a_late_exit_of_a_worker_does_not_affect_the_worker_that_reuses_its_descriptor(
    relay: OutputRelay, eventually: Any
) -> None:
    first, theirs = relay.open()
    os.write(theirs, b"of the first\n")
    os.close(theirs)
    eventually(lambda: not Path(f"/proc/self/fd/{first.fd}").exists(), "its end has been seen")
    second, theirs = relay.open()
    others = []
    while second.fd < first.fd:  # other tests have left lower numbers free
        others.append(theirs)
        second, theirs = relay.open()
    try:
        assert second.fd == first.fd, "numbers are used again"
        assert first.finish() == b"of the first\n"
        for _ in range(3):  # each round looks at the remaining ones
            os.write(theirs, b"x\n")
            eventually(lambda: not select.select([second.fd], [], [], 0)[0], "it has been read")
        assert relay._open[second.fd] is second
        assert second.finish() == b"x\n" * 3
    finally:
        for descriptor in [theirs, *others]:
            os.close(descriptor)


def test_a_child_that_writes_all_the_time_does_not_hold_up_the_burial_of_its_worker() -> None:
    relay = OutputRelay(ProgramChannel(None))
    stderr, theirs = relay.open()
    stopping = threading.Event()

    def write() -> None:
        while not stopping.is_set():
            fill(theirs)

    os.set_blocking(theirs, False)
    child = threading.Thread(target=write)
    child.start()
    assert stderr.finish() is not None
    stopping.set()
    child.join()
    os.close(theirs)
    relay.close(timeout=5.0)


def test_closing_passes_on_what_was_written_and_does_not_wait_for_what_is_left_behind(program: Program) -> None:
    relay = OutputRelay(program.channel)
    stderr, theirs = relay.open()
    _, open_still = relay.open()
    os.write(theirs, b"the very last\n")
    os.close(theirs)
    stderr.finish()
    relay.close(timeout=10.0)
    assert not relay._thread.is_alive()
    assert program.has(b"the very last\n")
    os.close(open_still)
